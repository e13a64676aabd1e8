"""What zero-order optimizers of a run share: distance, directions, how losses are evaluated."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import optax
from jaxtyping import PyTree

from jaxopt_lab import zeroth_order as zo
from jaxopt_lab.core.keys import purpose_key
from jaxopt_lab.step import Estimator, forward_only
from jaxopt_lab.train.config.bounds import Count, Positive, PositiveOrZero, check_bounds
from jaxopt_lab.train.config.optimizer_base import ModelInfo, OptimizerConfig
from jaxopt_lab.train.errors import ConfigError
from jaxopt_lab.zeroth_order.matrix_sign import matrix_layouts

Options = dict[str, Any]
Transformation = optax.GradientTransformation
Perturbed = Literal["trees", "layers", "beside"]
PROBE_AXIS = "probe"
"""Axis of a mesh along which groups of devices evaluate different probes."""
# A multiplication and an addition, wherever a direction is added to something. Random bits are
# integers and count nothing.
_ADDED_FLOPS = 2

ENGINES: dict[str, Callable[[int], zo.Engine]] = {
    "layerwise": lambda chunk: zo.sequential(),
    "sequential": lambda chunk: zo.sequential(),
    "chunked": zo.chunked,
    "vmapped": lambda chunk: zo.vmapped(),
}
SAMPLERS: dict[str, Callable[[int], zo.Sampler]] = {
    "normal": lambda rank: zo.gaussian(),
    "signs": lambda rank: zo.signs(),
    "sphere": lambda rank: zo.sphere(),
    "low-rank": zo.low_rank,
}


@dataclass(frozen=True)
class ZerothOrderConfig(OptimizerConfig):
    """What all zero-order methods have: distance, engine, and a loss instead of a gradient."""

    learning_rate: Positive = 1e-6
    """Peak learning rate."""
    weight_decay: PositiveOrZero = 0.0
    """Decoupled weight decay, as a multiple of the rate."""
    eps: Positive = 1e-3
    """How far from the parameters losses are evaluated, in multiples of a direction."""
    engine: Literal["auto", "layerwise", "sequential", "chunked", "vmapped"] = "auto"
    """How losses are evaluated; `auto`: layerwise where a whole model moves, low-rank vmapped."""
    chunk: Count = 1
    """Directions in a chunk of the engine `chunked`."""
    _element_flops: ClassVar[tuple[int, int]] = (_ADDED_FLOPS, _ADDED_FLOPS)
    _per_direction: ClassVar[str] = ""
    """The setting that chunks have to divide; none where there is one direction."""
    _whole_trees: ClassVar[bool] = False
    """Whether directions are whole anyway, so that perturbing layer by layer saves nothing."""

    def validate(self) -> None:
        """Also checks that chunks divide the directions."""
        check_bounds(self, "optimizer.")
        self.check_groups(1)

    def check_groups(self, groups: int) -> None:
        """Checks that groups of devices divide the directions, and chunks those of a group.

        Raises:
          ConfigError: If they do not.
        """
        name = self._per_direction
        count, given = (getattr(self, name), f"optimizer.{name}") if name else (1, "the directions")
        if count % groups:
            raise ConfigError("mesh.probe", groups, f"expected a divisor of {given} = {count}")
        if self.engine == "chunked" and count // groups % self.chunk:
            given = given if groups == 1 else f"{given} / mesh.probe"
            wanted = f"expected a divisor of {given} = {count // groups}"
            raise ConfigError("optimizer.chunk", self.chunk, wanted)

    def evaluation(self, *, whole: bool) -> tuple[str, Perturbed]:
        """The engine in use, and where it perturbs parameters (`jaxopt_lab.step.forward_only`).

        Args:
          whole: Whether a whole model moves, and its loss can perturb it.

        Raises:
          ConfigError: If the method or the model cannot be evaluated so.
        """
        if self._low_rank and not whole:
            wanted = "expected another: they stand beside a model all of whose parameters move"
            raise ConfigError("optimizer.distribution", "low-rank", wanted)
        layers = whole and not self._whole_trees
        if self.engine == "layerwise" and not layers:
            why = (
                "its directions are whole matrices anyway"
                if self._whole_trees
                else "it perturbs stacked layers of a model all of whose parameters move"
            )
            raise ConfigError("optimizer.engine", "layerwise", f"expected another: {why}")
        name: str = self.engine
        if name == "auto":
            name = "vmapped" if self._low_rank else "layerwise" if layers else "sequential"
        if name == "layerwise":
            return name, "layers"
        return name, "beside" if self._low_rank else "trees"

    def build(self, rate: optax.Schedule, model: ModelInfo) -> optax.GradientTransformation:
        """See the base class."""
        if model.key is None:
            raise ValueError("ModelInfo.key: got None, wanted the key of the run")
        probes = zo.Probes(
            engine=self._engine(model), matrix_axes=model.matrix_axes, **self._probes()
        )
        key = purpose_key(model.key, "optimizer")
        method = self._method(rate, model, {"eps": self.eps, "key": key, "probes": probes})
        if not self.weight_decay:
            return method
        mask = self._decay(model)["mask"]
        decay = optax.add_decayed_weights(lambda count: -self.weight_decay * rate(count), mask)
        return optax.chain(method, decay)

    def _engine(self, model: ModelInfo) -> zo.Engine:
        name, _ = self.evaluation(whole=model.perturbs_layers)
        engine = ENGINES[name](self.chunk)
        for placed in jax.tree.leaves(model.param_shardings)[:1]:
            if PROBE_AXIS in placed.mesh.shape:
                return zo.sharded(placed.mesh, PROBE_AXIS, engine=engine)
        return engine

    def gradient(self, microbatches: int, model: ModelInfo) -> Estimator:
        """See the base class."""
        _, perturbed = self.evaluation(whole=model.perturbs_layers)
        return forward_only(microbatches, losses=self._losses, perturbed=perturbed)

    def mean_flops(self, params: PyTree, matrix_axes: PyTree) -> float:
        """See the base class; to the method's own come the sums with directions."""
        # Embeddings and heads are matrices to these methods.
        layouts = matrix_layouts(params, matrix_axes)
        leaves, structure = jax.tree.flatten(params)
        axes = structure.unflatten([layouts.get(i) for i in range(len(leaves))])
        entries = sum(leaf.size for leaf in leaves)
        return super().mean_flops(params, axes) + _ADDED_FLOPS * self._sums() * entries

    @property
    def _low_rank(self) -> bool:
        """Whether directions have two factors a matrix."""
        return False

    def _probes(self) -> Options:
        """Options of `zeroth_order.Probes`."""
        return {}

    def _method(self, rate: optax.Schedule, model: ModelInfo, options: Options) -> Transformation:
        """The method without decay."""
        raise NotImplementedError

    def _losses(self, opt_state: PyTree) -> jax.Array:
        """Losses of the last step at or near the parameters."""
        return zo.recorded(opt_state)

    def _directions(self) -> int:
        """Directions that an update adds up."""
        return 1

    def _sums(self) -> int:
        """Times that a direction is added to something of the size of the parameters."""
        return self.forward_passes + self._directions()


@dataclass(frozen=True)
class AveragedConfig(ZerothOrderConfig):
    """A method that averages over several directions."""

    directions: Count = 1
    """Directions a step, of two losses each."""
    _per_direction: ClassVar[str] = "directions"

    @property
    def forward_passes(self) -> int:
        """See the base class."""
        return 2 * self.directions

    def _probes(self) -> Options:
        return {"num_directions": self.directions}

    def _directions(self) -> int:
        return self.directions


@dataclass(frozen=True)
class DrawnConfig(ZerothOrderConfig):
    """A method that takes directions of any distribution."""

    distribution: Literal["normal", "signs", "sphere", "low-rank"] = "normal"
    """What directions are drawn from; signs cost least, `low-rank` ones need no perturbed copy."""
    rank: Count = 1
    """Rank of the matrices of `low-rank`."""

    @property
    def _low_rank(self) -> bool:
        return self.distribution == "low-rank"

    def _probes(self) -> Options:
        return super()._probes() | {"sampler": SAMPLERS[self.distribution](self.rank)}

    def _sums(self) -> int:
        # Beside the weights nothing is added; the update is a product of depth directions x rank.
        return self.rank * self._directions() if self._low_rank else super()._sums()


@dataclass(frozen=True)
class EstimateConfig(DrawnConfig, AveragedConfig):
    """A method on estimates of the gradient."""
