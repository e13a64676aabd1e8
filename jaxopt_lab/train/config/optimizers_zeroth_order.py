"""Zero-order methods as optimizers of a run: values of the loss, no backward pass.

Rates and distances are those of the released scripts, which fine-tune whole language models, and
for JAGUAR and LDSD adapters of them; every one of them is to be tuned.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import jax
import optax
from jaxtyping import PyTree

from jaxopt_lab import optim
from jaxopt_lab import zeroth_order as zo
from jaxopt_lab.core.newton_schulz import newton_schulz_flops
from jaxopt_lab.train.config.bounds import Average, Bound, Count, Positive, PositiveOrZero
from jaxopt_lab.train.config.optimizer_base import ADAM_FLOPS, SIGN_FLOPS, ModelInfo
from jaxopt_lab.train.config.zeroth_order_base import (
    AveragedConfig,
    DrawnConfig,
    EstimateConfig,
    Options,
    Transformation,
    ZerothOrderConfig,
)
from jaxopt_lab.train.errors import ConfigError

Ratio = Annotated[float, Bound(0, 1, open_low=True)]
Iterations = Annotated[int, Bound(1, 100)]


@dataclass(frozen=True)
class MeZOConfig(EstimateConfig):
    """SGD on an estimate from two losses."""

    momentum: Average | None = None
    """Decay of a heavy-ball momentum; None: none, and no state of the size of the parameters."""

    def _method(self, rate: optax.Schedule, model: ModelInfo, options: Options) -> Transformation:
        return zo.mezo(rate, momentum=self.momentum, **options)


@dataclass(frozen=True)
class MeZOMomentumConfig(MeZOConfig):
    """MeZO with momentum."""

    learning_rate: Positive = 1e-7
    """Peak learning rate."""
    momentum: Average | None = 0.9
    """Decay of the heavy-ball momentum."""


@dataclass(frozen=True)
class ZoSignSgdConfig(EstimateConfig):
    """Sign of an estimate."""

    learning_rate: Positive = 1e-5
    """Peak learning rate."""
    rule: Literal["elementwise", "scalar"] = "elementwise"
    """Sign of each entry, as in the paper, or of the difference alone, as in ZO-Bench."""
    b1: Average | None = None
    """Decay of an average of estimates whose sign is taken; None: no average."""
    _element_flops: ClassVar[tuple[int, int]] = (SIGN_FLOPS, SIGN_FLOPS)

    def validate(self) -> None:
        """Also checks that the scalar rule has no average."""
        super().validate()
        if self.rule == "scalar" and self.b1 is not None:
            raise ConfigError("optimizer.b1", self.b1, "expected None: the rule scalar has none")

    def _method(self, rate: optax.Schedule, model: ModelInfo, options: Options) -> Transformation:
        return zo.zo_signsgd(rate, rule=self.rule, b1=self.b1, **options)


@dataclass(frozen=True)
class ZoAdaMMConfig(EstimateConfig):
    """AMSGrad on an estimate."""

    learning_rate: Positive = 1e-5
    """Peak learning rate."""
    b1: Average = 0.9
    """Decay of the average."""
    b2: Average = 0.999
    """Decay of the average of squares."""
    _element_flops: ClassVar[tuple[int, int]] = (ADAM_FLOPS, ADAM_FLOPS)

    def _method(self, rate: optax.Schedule, model: ModelInfo, options: Options) -> Transformation:
        return zo.zo_adamm(rate, b1=self.b1, b2=self.b2, **options)


@dataclass(frozen=True)
class ZoMuonConfig(EstimateConfig):
    """Newton-Schulz of the estimate of a matrix, signs elsewhere."""

    learning_rate: Positive = 1e-5
    """Peak learning rate."""
    ns_steps: Iterations = 5
    """Newton-Schulz iterations, in float32."""

    def _method(self, rate: optax.Schedule, model: ModelInfo, options: Options) -> Transformation:
        return zo.zo_muon(rate, **_newton_schulz(self.ns_steps, model), **options)

    def _product_flops(self, m: int, n: int) -> float:
        return newton_schulz_flops(m, n, self.ns_steps)


@dataclass(frozen=True)
class SamplingMuonConfig(AveragedConfig):
    """Steps along random orthogonal matrices, by the sign of the difference."""

    learning_rate: Positive = 1e-5
    """Peak learning rate."""
    _whole_trees: ClassVar[bool] = True

    def _method(self, rate: optax.Schedule, model: ModelInfo, options: Options) -> Transformation:
        return zo.sampling_muon(rate, **options)


@dataclass(frozen=True)
class SubspaceMuonConfig(AveragedConfig):
    """Muon in random subspaces of each matrix, from differences to one loss in the middle."""

    learning_rate: Positive = 1e-5
    """Peak learning rate of the matrices."""
    vector_learning_rate: Positive = 1e-7
    """Rate of everything else, not scheduled."""
    rank: Count = 2
    """Dimensions of a subspace."""
    interval: Count = 100
    """Steps from one draw of the subspaces to the next."""
    directions: Count = 4
    """Directions a step, of one loss each."""
    _whole_trees: ClassVar[bool] = True

    @property
    def forward_passes(self) -> int:
        """See the base class."""
        return 1 + self.directions

    def _probes(self) -> Options:
        return super()._probes() | {"two_sided": False}

    def _losses(self, opt_state: PyTree) -> jax.Array:
        return zo.recorded(opt_state)[:1]  # in the middle

    def _method(self, rate: optax.Schedule, model: ModelInfo, options: Options) -> Transformation:
        return zo.subspace_muon(
            rate,
            vector_learning_rate=self.vector_learning_rate,
            subspace=zo.Subspace(self.rank, self.interval),
            **options,
        )

    def _product_flops(self, m: int, n: int) -> float:
        lifted = (self.forward_passes + self.directions + 1) * 2 * m * n * self.rank
        return lifted + newton_schulz_flops(self.rank, n, 5)


@dataclass(frozen=True)
class ConservativeConfig(DrawnConfig):
    """The best of staying, stepping, and stepping the other way."""

    @property
    def forward_passes(self) -> int:
        """See the base class."""
        return 5

    def _losses(self, opt_state: PyTree) -> jax.Array:
        return zo.recorded(opt_state)[2:3]  # between the two sides comes that of staying

    def _method(self, rate: optax.Schedule, model: ModelInfo, options: Options) -> Transformation:
        return zo.conservative(rate, **options)


@dataclass(frozen=True)
class JaguarSignSgdConfig(AveragedConfig):
    """Sign of a momentum of which each step refreshes a few coordinates."""

    learning_rate: Positive = 1e-3
    """Peak learning rate."""
    b1: Average = 0.9
    """What is kept of the old momentum where it is refreshed."""
    selection: Literal["block", "single", "sparse"] = "block"
    """What a direction moves: random rows x columns of every matrix, one coordinate of all, or
    whole matrices."""
    rows_ratio: Ratio = 0.1
    """Share of the rows of a block."""
    cols_ratio: Ratio = 0.1
    """Share of the columns of a block."""
    params_ratio: Ratio = 0.1
    """Share of the matrices and vectors that `sparse` draws."""
    _element_flops: ClassVar[tuple[int, int]] = (SIGN_FLOPS, SIGN_FLOPS)

    def _probes(self) -> Options:
        drawn = {
            "block": lambda: zo.blocks(rows_ratio=self.rows_ratio, cols_ratio=self.cols_ratio),
            "single": zo.single_coordinate,
            "sparse": lambda: zo.sparse(params_ratio=self.params_ratio),
        }
        return super()._probes() | {"sampler": drawn[self.selection]()}

    def _method(self, rate: optax.Schedule, model: ModelInfo, options: Options) -> Transformation:
        return zo.jaguar_signsgd(rate, b1=self.b1, **options)


@dataclass(frozen=True)
class JaguarMuonConfig(JaguarSignSgdConfig):
    """Newton-Schulz of the momentum of JAGUAR, signs for what is no matrix."""

    ns_steps: Iterations = 5
    """Newton-Schulz iterations, in float32."""
    matrix_scale: Positive = 1.0
    """Rate of the matrices over that of everything else."""

    def _method(self, rate: optax.Schedule, model: ModelInfo, options: Options) -> Transformation:
        given = _newton_schulz(self.ns_steps, model) | options
        return zo.jaguar_muon(rate, b1=self.b1, matrix_scale=self.matrix_scale, **given)

    def _product_flops(self, m: int, n: int) -> float:
        return newton_schulz_flops(m, n, self.ns_steps)


@dataclass(frozen=True)
class LdsdConfig(ZerothOrderConfig):
    """SGD along the best of several directions, from a policy that learns from their losses."""

    learning_rate: Positive = 5e-4
    """Peak learning rate."""
    candidates: Count = 5
    """Directions that are scored by their losses, in one more forward pass than there are."""
    policy_rate: PositiveOrZero = 1e-2
    """Rate of the policy's mean, not scheduled."""
    policy_std: Positive = 1.0
    """Standard deviation of the directions about the mean."""
    selection: Literal["best", "random", "mean"] = "best"
    """The candidate that becomes the step; `mean`: the average of the best `selected`."""
    selected: Count = 3
    """Candidates of `mean`, each of which takes a forward pass for its other side."""
    start: Literal["zero", "random", "estimate"] = "zero"
    """Where the mean starts: 0, a random direction, or an estimate from 40 losses."""
    momentum: Average | None = None
    """Decay of the heavy-ball momentum of the step; None: none."""
    _per_direction: ClassVar[str] = "candidates"

    def validate(self) -> None:
        """Also checks that there are as many candidates as are to be selected."""
        super().validate()
        if self.selection == "mean" and self.selected > self.candidates:
            wanted = f"expected at most optimizer.candidates = {self.candidates}"
            raise ConfigError("optimizer.selected", self.selected, wanted)

    @property
    def forward_passes(self) -> int:
        """See the base class."""
        return self.candidates + (self.selected if self.selection == "mean" else 1)

    def _directions(self) -> int:
        # Those of the step, and all for the policy.
        return self.forward_passes

    def _method(self, rate: optax.Schedule, model: ModelInfo, options: Options) -> Transformation:
        return zo.ldsd(
            self._base(rate),
            candidates=self.candidates,
            policy_rate=self.policy_rate,
            policy_std=self.policy_std,
            selection=self.selection,
            selected=self.selected,
            start=self.start,
            **options,
        )

    def _base(self, rate: optax.Schedule) -> optax.GradientTransformation:
        return optax.sgd(rate, self.momentum)


@dataclass(frozen=True)
class LdsdJaguarConfig(LdsdConfig):
    """LDSD over JAGUAR SignSGD: signs of a momentum that is refreshed matrix by matrix."""

    learning_rate: Positive = 1e-3
    """Peak learning rate."""
    start: Literal["zero", "random", "estimate"] = "random"
    """Where the mean starts: 0, a random direction, or an estimate from 40 losses."""
    momentum: Average | None = 0.9
    """What is kept of the old momentum where it is refreshed."""
    params_ratio: Ratio = 0.1
    """Share of the matrices and vectors that take part in a step."""
    _element_flops: ClassVar[tuple[int, int]] = (SIGN_FLOPS, SIGN_FLOPS)

    def _probes(self) -> Options:
        return {"sampler": zo.sparse(params_ratio=self.params_ratio)}

    def _base(self, rate: optax.Schedule) -> optax.GradientTransformation:
        return optax.chain(
            zo.scale_by_coordinate_momentum(b1=self.momentum or 0.0),
            optax.scale_by_sign(),
            optax.scale_by_learning_rate(rate),
        )


def _newton_schulz(steps: int, model: ModelInfo) -> Options:
    return {
        "newton_schulz": optim.NewtonSchulz(steps=steps, dtype="float32"),
        "mesh": optim.MeshWork(model.param_shardings),
    }


ZEROTH_ORDER: dict[str, type[ZerothOrderConfig]] = {
    "mezo": MeZOConfig,
    "mezo-momentum": MeZOMomentumConfig,
    "zo-signsgd": ZoSignSgdConfig,
    "zo-adamm": ZoAdaMMConfig,
    "zo-muon": ZoMuonConfig,
    "sampling-muon": SamplingMuonConfig,
    "subspace-muon": SubspaceMuonConfig,
    "conservative": ConservativeConfig,
    "jaguar-signsgd": JaguarSignSgdConfig,
    "jaguar-muon": JaguarMuonConfig,
    "ldsd": LdsdConfig,
    "ldsd-jaguar": LdsdJaguarConfig,
}
