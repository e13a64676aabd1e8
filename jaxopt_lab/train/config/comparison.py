"""What a comparison is: one run, several optimizers, the same number of learning rates for each."""

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from jaxopt_lab.sweep.tuning import check_rates, check_seeds
from jaxopt_lab.train.config.bounds import Bound, Count, Seed
from jaxopt_lab.train.config.choices import choose
from jaxopt_lab.train.config.decode import decode
from jaxopt_lab.train.config.optimizer_base import OptimizerConfig
from jaxopt_lab.train.config.optimizers import OPTIMIZERS
from jaxopt_lab.train.config.run import RunConfig, check_optimizer, validate_run
from jaxopt_lab.train.config.sections import HeldOutConfig
from jaxopt_lab.train.config.tuned import default_optimizer
from jaxopt_lab.train.errors import ConfigError, within


@dataclass(frozen=True)
class CompareConfig(RunConfig):
    """The same run for several optimizers, each with the same number of learning rates.

    Every rate trains on one seed; the best one then trains on the final seeds, which decide.
    """

    optimizers: tuple[str, ...] = ("adamw", "muon", "lion-muon")
    """What is compared, by name, with settings after a colon (`lion-muon:period=5,b2=0.9`). The
    others are measured against the first."""
    cells: Annotated[int, Bound(1, 1000)] = 5
    """Learning rates tried for each optimizer."""
    spacing: Annotated[float, Bound(1, 1000, open_low=True)] = 2.0
    """Ratio of neighbouring rates in a grid around the optimizer's own rate."""
    rates: tuple[str, ...] = ()
    """Grids given by hand, as many rates as cells: `adamw=1e-3,2e-3,4e-3`."""
    sweep_seed: Seed = 0
    """Seed on which the rates are tried."""
    seeds: tuple[Seed, ...] = (1, 2, 3)
    """Seeds on which the best rate of each optimizer is judged."""
    vectorize: Literal["auto", "always", "never"] = "auto"
    """Runs of one optimizer side by side in one program: as many as fit into memory, all, or one
    after the other."""
    timing_steps: Count = 20
    """Steps of a timed round; a multiple of every period that an optimizer has."""
    eval: HeldOutConfig = HeldOutConfig()
    """Held-out evaluation."""


@dataclass(frozen=True)
class Entrant:
    """One optimizer of a comparison and its learning rates."""

    label: str
    optimizer: OptimizerConfig
    rates: tuple[float, ...]

    @property
    def file_name(self) -> str:
        """Name of its result file.

        >>> Entrant("lion-muon:period=5", OptimizerConfig(), ()).file_name
        'lion-muon-period-5.json'
        """
        return "".join(c if c.isalnum() or c in "._" else "-" for c in self.label) + ".json"

    def with_rate(self, rate: Any) -> OptimizerConfig:
        """The optimizer at a learning rate, which may be a traced scalar."""
        return replace(self.optimizer, learning_rate=rate)


def validate_comparison(config: CompareConfig) -> list[Entrant]:
    """Checks everything that can be known before the corpus is read.

    Returns:
      The optimizers with their grids.

    Raises:
      ConfigError: Names the field, the value and what would be right.
    """
    validate_run(config)
    with within("compare"):
        check_seeds(config.sweep_seed, config.seeds)
    if not config.optimizers:
        raise ConfigError("optimizers", config.optimizers, "expected at least one name")
    given = _given_rates(config)
    entrants = [_entrant(text, config, given) for text in config.optimizers]
    names = [entrant.file_name for entrant in entrants]
    for entrant in entrants:
        if names.count(entrant.file_name) > 1:
            raise ConfigError("optimizers", entrant.label, "which is there twice")
    return entrants


def _entrant(text: str, config: CompareConfig, given: Mapping[str, tuple[float, ...]]) -> Entrant:
    name, _, settings = text.partition(":")
    kind = choose("optimizers", OPTIMIZERS, name)
    default, place = default_optimizer(config.preset, name), f"optimizers.{name}"
    optimizer = decode(kind, default, _settings(text, settings), place)
    optimizer.validate()
    check_optimizer(config, optimizer)
    rates = given.get(text)
    if rates is None:
        first = -(config.cells // 2)
        factors = [config.spacing**k for k in range(first, first + config.cells)]
        rates = tuple(optimizer.learning_rate * factor for factor in factors)
        try:
            check_rates(rates)
        except ValueError as error:
            wanted = f"expected a grid of {config.cells} positive numbers around {text}'s rate"
            raise ConfigError("spacing", config.spacing, wanted) from error
    return Entrant(text, optimizer, rates)


def _settings(text: str, settings: str) -> dict[str, Any]:
    """Values in `a=1,b=text`, read as JSON where they are JSON."""
    values: dict[str, Any] = {}
    for part in filter(None, settings.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            raise ConfigError("optimizers", text, "expected NAME or NAME:setting=value,...")
        with contextlib.suppress(json.JSONDecodeError):
            value = json.loads(value)
        values[key.replace("-", "_")] = value
    return values


def _given_rates(config: CompareConfig) -> dict[str, tuple[float, ...]]:
    given = {}
    for text in config.rates:
        # The last sign: settings of the optimizer hold some as well.
        label, _, numbers = text.rpartition("=")
        if label not in config.optimizers:
            wanted = f"expected OPTIMIZER=rate,rate,... of one of {', '.join(config.optimizers)}"
            raise ConfigError("rates", text, wanted)
        try:
            rates = tuple(float(number) for number in numbers.split(","))
            check_rates(rates)
        except ValueError as error:
            wanted = f"expected increasing positive numbers: {error}"
            raise ConfigError("rates", text, wanted) from error
        if len(rates) != config.cells:
            found = f"with {len(rates)} rates, expected cells = {config.cells}"
            raise ConfigError("rates", text, f"{found}: every optimizer gets the same number")
        given[label] = rates
    return given
