"""Option objects: what decides shapes, branches and precisions, documented once on the fields.

Numbers that one schedules or injects are arguments of the optimizers. Everything else stands in
frozen objects, which `optax.inject_hyperparams` passes through untouched. They are no pytrees, and
compare by identity.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from jaxopt_lab.core.newton_schulz import COEFFICIENTS
from jaxopt_lab.core.orthogonalization import ORTHOGONALIZERS, Orthogonalizer
from jaxopt_lab.core.precision import PRODUCT_PRECISIONS, PrecisionName, ProductPrecision
from jaxopt_lab.core.stacks import ReplicatedWork

OnUncovered = Literal["adamw", "error", "modes"]
SecondMoment = Literal["full", "factored", "rank_one"]


def _require(owner: Any, field: str, holds: bool, wanted: str) -> None:
    if not holds:
        name = f"{type(owner).__name__}.{field}"
        raise ValueError(f"{name}: got {getattr(owner, field)!r}, wanted {wanted}")


def _require_choice(owner: Any, field: str, choices: tuple[Any, ...]) -> None:
    value = getattr(owner, field)
    # Only a hashable value can be a choice; a tracer or an array is none.
    found = isinstance(value, str | None) and value in choices
    _require(owner, field, found, "one of " + ", ".join(map(str, choices)))


def _is_integer(value: Any, at_least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= at_least


def _in_range(value: Any, low: float, high: float) -> bool:
    """Whether a Python number is in [low, high); what is no number is not looked at."""
    return not isinstance(value, int | float) or low <= value < high


def _is_floating(dtype: Any) -> bool:
    try:
        return bool(jnp.issubdtype(jnp.dtype(dtype), jnp.floating))
    except TypeError:  # not the name of any dtype
        return False


@dataclass(frozen=True, eq=False)
class Routing:
    """Which leaves are matrices where `matrix_axes` does not say, and which decay."""

    vocabulary_size: int = 10_000
    """Without `matrix_axes`, a leaf with an axis at least this long is an embedding or a head. No
    hidden width of a common model reaches the default, every common vocabulary of words exceeds
    it."""

    on_uncovered: OnUncovered = "adamw"
    """What happens to a leaf of more than two axes for which there is no layout: "adamw" leaves it
    to the fallback, "error" refuses it at `init`, "modes" (SOAP, DyKAF and Shampoo) gives it one
    factor an axis."""

    decay_mask: Any = None
    """Which leaves decay, as the argument `mask`: a tree of bools, a prefix of one, or a function
    of the parameters. This is the place for a function under `optax.inject_hyperparams`, which
    takes a function that is an argument for a schedule."""

    def __post_init__(self) -> None:
        """Checks the fields."""
        _require(self, "vocabulary_size", _is_integer(self.vocabulary_size, 1), "an integer >= 1")
        _require_choice(self, "on_uncovered", get_args(OnUncovered))


@dataclass(frozen=True, eq=False)
class AdamW:
    """The rule of the leaves that are not matrices; None means what the method says."""

    learning_rate: optax.ScalarOrSchedule | None = None
    """A rate of its own, a number or a schedule; None: `lr_ratio` times that of the method."""

    lr_ratio: float = 1.0
    """Rate over that of the method, where `learning_rate` is None."""

    b1: float | None = None
    """Decay of the first moment."""

    b2: float | None = None
    """Decay of the second moment."""

    eps: float | None = None
    """Added to the root of the second moment before the bias correction."""

    weight_decay: optax.ScalarOrSchedule | None = None
    """Decoupled weight decay."""

    def __post_init__(self) -> None:
        """Checks the fields."""
        for field in ("b1", "b2"):
            _require(self, field, _in_range(getattr(self, field), 0, 1), "a number in [0, 1)")
        for field in ("learning_rate", "lr_ratio", "eps", "weight_decay"):
            holds = _in_range(getattr(self, field), 0, math.inf)
            _require(self, field, holds, "a finite number >= 0")


@dataclass(frozen=True, eq=False)
class NewtonSchulz:
    """The iteration that orthogonalises; see `jaxopt_lab.core.newton_schulz`."""

    steps: int = 5
    """Iterations."""

    coefficients: str = "quintic"
    """A name in `core.newton_schulz.COEFFICIENTS`, which gives the source of each."""

    dtype: DTypeLike = "bfloat16"
    """Dtype of the iterates; products accumulate in float32 or wider."""

    eps: float = 0.0
    """Added to the Frobenius norm by which a matrix is divided. Released codes take 1e-7, which
    makes the update of a matrix depend on its scale."""

    def __post_init__(self) -> None:
        """Checks the fields."""
        _require(self, "steps", _is_integer(self.steps, 1), "an integer >= 1")
        _require(self, "eps", _in_range(self.eps, 0, math.inf), "a finite number >= 0")
        renamed = "'you_jiacheng', the name of these coefficients after their source"
        _require(self, "coefficients", self.coefficients != "dion", renamed)
        _require_choice(self, "coefficients", tuple(COEFFICIENTS))
        _require(self, "dtype", _is_floating(self.dtype), "a floating-point dtype")


@dataclass(frozen=True, eq=False)
class Eigenbasis:
    """How SOAP and DyKAF keep their eigenbases and moments."""

    orthogonalizer: Orthogonalizer = "cholesky_qr"
    """"cholesky_qr" (block Gram-Schmidt, made of matrix products) or "householder"."""

    factor_precision: ProductPrecision = "bf16_x3"
    """Of the products that form factors and bases; see `core.precision`."""

    rotation_precision: ProductPrecision = "tf32"
    """Of the products that rotate into the bases and back. With "bfloat16" the bases of float32
    matrices are kept in bfloat16 as well: nothing else reads them."""

    stagger: bool = False
    """Refresh a share of the matrices at every step instead of all at once every
    `precondition_frequency` steps, so that no step pays for all of them. Which matrix has its turn
    when depends on how they are distributed over devices, and `precondition_frequency` must be a
    plain integer."""

    max_precond_dim: int = 10_000
    """A longer side has no factor and keeps its axes. A matrix with both sides longer belongs to
    the fallback."""

    one_sided: bool = False
    """Give a factor to the smaller side of each matrix only."""

    second_moment: SecondMoment = "full"
    """"full"; "factored" keeps row and column sums (Adafactor); "rank_one" fits a product of a
    column and a row: less memory, clearly worse in pretraining."""

    init: Literal["kron", "eps"] = "kron"
    """How the factors of DyKAF start: "kron" (from the best Kronecker approximation of the first
    gradient; a matrix whose gradient is zero waits for one that is not) or "eps" (from multiples
    of the identity). Those of SOAP start from zero."""

    def __post_init__(self) -> None:
        """Checks the fields."""
        _require_choice(self, "orthogonalizer", ORTHOGONALIZERS)
        _require_choice(self, "factor_precision", PRODUCT_PRECISIONS)
        _require_choice(self, "rotation_precision", PRODUCT_PRECISIONS)
        _require_choice(self, "second_moment", get_args(SecondMoment))
        _require_choice(self, "init", ("kron", "eps"))
        _require(self, "max_precond_dim", _is_integer(self.max_precond_dim, 0), "an integer >= 0")
        for field in ("stagger", "one_sided"):
            _require(self, field, isinstance(getattr(self, field), bool), "True or False")


@dataclass(frozen=True, eq=False)
class InverseRoot:
    """How Shampoo turns factors into inverse roots."""

    exponent: float | Mapping[int, float] | None = None
    """Of the inverse roots: a number, or {order: number}; None: 1 / (2 order), where the order is
    2 for a matrix."""

    method: Literal["newton", "eigh"] = "newton"
    """"newton" (matrix products) or "eigh", which takes any exponent; see `core.inverse_roots`."""

    relative_eps: bool = False
    """Measure the ridge `eps` in units of each factor's largest eigenvalue."""

    precision: PrecisionName = "bf16_x3"
    """Of the products of "newton"."""

    stagger: bool = False
    """Refresh a share of the roots at every step instead of all at once every
    `precondition_frequency` steps."""

    max_precond_dim: int = 1024
    """Longest edge of a block: longer sides are cut, each piece with a factor of its own."""

    def __post_init__(self) -> None:
        """Checks the fields."""
        _require_choice(self, "method", ("newton", "eigh"))
        given = self.exponent if isinstance(self.exponent, Mapping) else {1: self.exponent}
        _require(self, "exponent", set(given) <= {1, 2, 3, 4}, "orders from 1 to 4")
        for value in given.values():
            holds = value is None or (isinstance(value, int | float) and 0 < value < math.inf)
            _require(self, "exponent", holds, "Python numbers > 0")
            holds = value is None or math.isclose(1 / value, round(1 / value))
            wanted = 'inverses of integers, unless method="eigh"'
            _require(self, "exponent", holds or self.method == "eigh", wanted)
        _require_choice(self, "precision", get_args(PrecisionName))
        _require(self, "max_precond_dim", _is_integer(self.max_precond_dim, 1), "an integer >= 1")
        for field in ("relative_eps", "stagger"):
            _require(self, field, isinstance(getattr(self, field), bool), "True or False")

    def of_order(self, order: int) -> float:
        """The exponent for blocks of an order."""
        given = self.exponent
        value = given.get(order) if isinstance(given, Mapping) else given
        return 1 / (2 * order) if value is None else float(value)


@dataclass(frozen=True, eq=False)
class Graft:
    """The method whose step size every block of Shampoo takes."""

    kind: Literal["adam", "rmsprop", "adagrad", "sgd"] | None = "adam"
    """"sgd" takes the norm of the averaged gradient; None keeps that of Shampoo itself."""

    b2: float | None = None
    """Decay of the second moment; None: that of the factors, or 0.999 where these are sums."""

    eps: float = 1e-8
    """Added to the root of the second moment."""

    def __post_init__(self) -> None:
        """Checks the fields."""
        _require_choice(self, "kind", ("adam", "rmsprop", "adagrad", "sgd", None))
        _require(self, "b2", _in_range(self.b2, 0, 1), "a number in [0, 1)")
        _require(self, "eps", _in_range(self.eps, 0, math.inf), "a finite number >= 0")


@dataclass(frozen=True, eq=False)
class MeshWork:
    """Where the parameters are laid out, and how replicas share the work on whole matrices."""

    param_shardings: Any = None
    """Tree of `NamedSharding` of the parameters, or a prefix of one. Needed on meshes with Auto
    axes, where types do not show the layout; without it the partitioner gathers inside of every
    iteration."""

    replicated_work: ReplicatedWork = "repeat"
    """On mesh axes that replicate the parameters, "repeat" the work on whole matrices or "share"
    it for one all-gather of its results."""

    def __post_init__(self) -> None:
        """Checks the fields."""
        _require_choice(self, "replicated_work", get_args(ReplicatedWork))
