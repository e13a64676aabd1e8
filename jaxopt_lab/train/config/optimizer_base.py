"""What every optimizer of the trainer has: rates, checks, a `build` method, a count of its work."""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import optax
from jaxtyping import Array, PyTree

from jaxopt_lab import optim
from jaxopt_lab.core.dual_norms import DualNorms
from jaxopt_lab.core.flops import total_flops
from jaxopt_lab.models import DecoderConfig, matrix_axes, roles
from jaxopt_lab.step import Estimator, accumulated
from jaxopt_lab.train.config.bounds import Positive, PositiveOrZero, check_bounds

# Operations per element: a momentum and its sign, AdamW.
SIGN_FLOPS, ADAM_FLOPS = 6, 12


class ModelInfo(NamedTuple):
    """What an optimizer may need to know about the model."""

    matrix_axes: PyTree = None  # of MuonDimensionNumbers, None for leaves that are not matrices
    param_shardings: PyTree = None  # of NamedSharding
    vocab_size: int | None = None
    decays: PyTree = None  # of bools: no norm, bias or embedding; None: every parameter
    key: Array | None = None  # of the run, for an optimizer that draws
    clip: float | None = None  # largest norm, for those that clip by themselves
    # whether all parameters move, and the loss can perturb them layer by layer
    perturbs_layers: bool = False

    @classmethod
    def of(
        cls,
        model: DecoderConfig,
        param_shardings: PyTree = None,
        vocab_size: int | None = None,
        key: Array | None = None,
    ) -> "ModelInfo":
        """What there is to know about a decoder, and the key of a run.

        >>> from jaxopt_lab.models import PRESETS
        >>> ModelInfo.of(PRESETS["tiny"]).decays["final_norm"]
        {'scale': False}
        """
        decays = jax.tree.map(lambda role: role in ("matrix", "head"), roles(model))
        size = vocab_size or model.vocab_size
        axes = matrix_axes(model)
        return cls(axes, param_shardings, size, decays, key, perturbs_layers=True)


@dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer by name, with the settings that all of them have."""

    learning_rate: Positive = 1e-3
    """Peak learning rate."""
    weight_decay: PositiveOrZero = 0.1
    """Decoupled weight decay, as a multiple of the rate."""
    decay: Literal["matrices", "all"] = "matrices"
    """What decays: the matrices of the layers and a head of its own, or every parameter, norms,
    biases and embeddings included, as in the papers."""

    # Operations per element, of matrices and of everything else.
    _element_flops: ClassVar[tuple[int, int]] = (SIGN_FLOPS, SIGN_FLOPS)
    # What `build` calls, for those that do not build themselves.
    _factory: ClassVar[Callable[..., optax.GradientTransformation]]

    def validate(self) -> None:
        """Checks the values.

        Raises:
          ConfigError: For a number that is out of bounds.
        """
        check_bounds(self, "optimizer.")

    def build(self, rate: optax.Schedule, model: ModelInfo) -> optax.GradientTransformation:
        """Builds the transformation; its updates are added to the parameters.

        Settings that the factory has under the same name go there.

        Args:
          rate: Schedule of the learning rate, or a constant where the schedule scales afterwards.
          model: Facts about the model.
        """
        taken = inspect.signature(self._factory).parameters
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name in taken}
        return self._factory(**own | {"learning_rate": rate} | self._common_arguments(model))

    @property
    def forward_passes(self) -> int:
        """What a step costs in forward passes of the batch; a backward pass counts as two."""
        return 3

    def gradient(self, microbatches: int, model: ModelInfo) -> Estimator:
        """How a step learns from a batch that is cut into microbatches.

        Args:
          microbatches: Parts of the batch.
          model: As for `build`.
        """
        del model  # the same for all
        return accumulated(microbatches)

    def rates(self, rate: Array) -> dict[str, Array]:
        """Learning rates to report while the scheduled one is `rate`."""
        return {"rate": rate}

    def step_norm(self) -> Mapping[DualNorms, float]:
        """The norm in which its steps on matrices have one length, or shares of several.

        Adaptive warm-up asks for it. Whoever divides by second moments moves every coordinate by
        about the rate, as a sign does.
        """
        spectral = self._spectral_share()
        return {"spectral": spectral, "sign": 1 - spectral}

    def mean_flops(self, params: PyTree, matrix_axes: PyTree) -> float:
        """FLOPs of one optimizer step, averaged over the kinds of steps it takes.

        Matrix products are counted as such, everything else as 6 operations per element for a
        momentum and its sign and 12 for AdamW.

        Args:
          params: Tree of arrays or shapes.
          matrix_axes: Tree of MuonDimensionNumbers, None for leaves that are not matrices.
        """
        of_matrices, elsewhere = self._element_flops

        def beyond_elsewhere(m: int, n: int) -> float:
            return self._product_flops(m, n) + (of_matrices - elsewhere) * m * n

        size = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
        return total_flops(params, matrix_axes, beyond_elsewhere) + elsewhere * size

    def _product_flops(self, m: int, n: int) -> float:
        """Mean FLOPs of the products of one m x n matrix in a step."""
        return 0.0

    def _spectral_share(self) -> float:
        """Share of the steps whose direction is the orthogonal factor of a matrix."""
        return 0.0

    def _decay(self, model: ModelInfo) -> dict[str, Any]:
        """How much decays and where, as arguments; no mask where all parameters do."""
        mask = None if self.decay == "all" else model.decays
        return {"weight_decay": self.weight_decay, "mask": mask}

    def _common_arguments(self, model: ModelInfo) -> dict[str, Any]:
        """Arguments of the factory that the model decides or several settings make up."""
        return self._decay(model)


@dataclass(frozen=True)
class WholeMatrixConfig(OptimizerConfig):
    """An optimizer that works on whole matrices, and AdamW for everything else."""

    replicated_work: Literal["repeat", "share"] = "repeat"
    """Whether replicas repeat the work on matrices or share it out and gather the result."""
    _element_flops: ClassVar[tuple[int, int]] = (ADAM_FLOPS, ADAM_FLOPS)

    def _common_arguments(self, model: ModelInfo) -> dict[str, Any]:
        return super()._common_arguments(model) | {
            "matrix_axes": model.matrix_axes,
            "routing": optim.Routing(on_uncovered="error"),
            "mesh": optim.MeshWork(model.param_shardings, self.replicated_work),
        }
