"""What every optimizer of the trainer has: rates, checks, a `build` method, a count of its work."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import optax
from jaxtyping import Array, PyTree

from jaxopt_lab import optim
from jaxopt_lab.core.dual_norms import DualNorms
from jaxopt_lab.core.flops import matrix_shapes
from jaxopt_lab.models import DecoderConfig, matrix_axes, roles
from jaxopt_lab.train.config.bounds import Positive, PositiveOrZero, check_bounds

# Operations per element: a momentum and its sign, AdamW.
SIGN_FLOPS, ADAM_FLOPS = 6, 12


class ModelInfo(NamedTuple):
    """What an optimizer may need to know about the model."""

    matrix_axes: PyTree = None  # of MuonDimensionNumbers, None for leaves that are not matrices
    param_shardings: PyTree = None  # of NamedSharding
    vocab_size: int | None = None
    decays: PyTree = None  # of bools: no norm, bias or embedding; None: every parameter
    clip: float | None = None  # largest norm, for those that clip by themselves

    @classmethod
    def of(
        cls, model: DecoderConfig, param_shardings: PyTree = None, vocab_size: int | None = None
    ) -> "ModelInfo":
        """What there is to know about a decoder.

        >>> from jaxopt_lab.models import PRESETS
        >>> ModelInfo.of(PRESETS["tiny"]).decays["final_norm"]
        {'scale': False}
        """
        decays = jax.tree.map(lambda role: role in ("matrix", "head"), roles(model))
        return cls(matrix_axes(model), param_shardings, vocab_size or model.vocab_size, decays)


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

    def validate(self) -> None:
        """Checks the values.

        Raises:
          ConfigError: For a number that is out of bounds.
        """
        check_bounds(self, "optimizer.")

    def build(self, rate: optax.Schedule, model: ModelInfo) -> optax.GradientTransformation:
        """Builds the transformation; its updates are added to the parameters.

        Args:
          rate: Schedule of the learning rate, or a constant where the schedule scales afterwards.
          model: Facts about the model.
        """
        raise NotImplementedError

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
        products = elements = 0.0
        for count, m, n in matrix_shapes(params, matrix_axes):
            products += count * self._product_flops(m, n)
            elements += count * m * n
        rest = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) - elements
        of_matrices, elsewhere = self._element_flops
        return products + of_matrices * elements + elsewhere * rest

    def _product_flops(self, m: int, n: int) -> float:
        """Mean FLOPs of the products of one m x n matrix in a step."""
        return 0.0

    def _spectral_share(self) -> float:
        """Share of the steps whose direction is the orthogonal factor of a matrix."""
        return 0.0

    def _decay(self, model: ModelInfo) -> dict[str, Any]:
        """How much decays and where, as arguments; no mask where all parameters do."""
        if self.decay == "all" or model.decays is None:
            return {"weight_decay": self.weight_decay, "mask": None}
        named = jax.tree_util.tree_leaves_with_path(model.decays)
        decays = {jax.tree_util.keystr(path): value for path, value in named}

        # By name: Optax's Muon asks with only a part of the parameters.
        def mask(params: PyTree) -> PyTree:
            return jax.tree_util.tree_map_with_path(
                lambda path, _: decays[jax.tree_util.keystr(path)], params
            )

        return {"weight_decay": self.weight_decay, "mask": mask}


@dataclass(frozen=True)
class WholeMatrixConfig(OptimizerConfig):
    """An optimizer that works on whole matrices, and AdamW for everything else."""

    replicated_work: Literal["repeat", "share"] = "repeat"
    """Whether replicas repeat the work on matrices or share it out and gather the result."""
    _element_flops: ClassVar[tuple[int, int]] = (ADAM_FLOPS, ADAM_FLOPS)

    def _common_arguments(self, model: ModelInfo) -> dict[str, Any]:
        return self._decay(model) | {
            "matrix_axes": model.matrix_axes,
            "routing": optim.Routing(on_uncovered="error"),
            "mesh": optim.MeshWork(model.param_shardings, self.replicated_work),
        }
