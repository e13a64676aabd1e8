"""Option objects: what decides shapes, branches and precisions, documented once on the fields.

Numbers that one schedules or injects are arguments of the optimizers. Everything else stands in
frozen objects, which `optax.inject_hyperparams` passes through untouched. They are no pytrees, and
compare by identity.
"""

import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import optax
from jax.sharding import NamedSharding
from jax.typing import DTypeLike

from jaxopt_lab.core.checks import (
    COUNT,
    DECAY,
    NOT_NEGATIVE,
    Wanted,
    check_choice,
    check_dtype,
    check_number,
    check_rates,
    check_tree,
    plain_number,
)
from jaxopt_lab.core.inverse_roots import check_root
from jaxopt_lab.core.newton_schulz import COEFFICIENTS
from jaxopt_lab.core.orthogonalization import Orthogonalizer
from jaxopt_lab.core.precision import PrecisionName, ProductPrecision
from jaxopt_lab.core.stacks import ReplicatedWork

OnUncovered = Literal["adamw", "error", "modes"]
SecondMoment = Literal["full", "factored", "rank_one"]


# What a mask is, and where a function goes.
MASK = (
    "bools",
    "under optax.inject_hyperparams, which takes functions for schedules, give the function as "
    "routing=Routing(decay_mask=...)",
)


class _Options:
    """Checks fields by their types: words, flags and integers. `_check` knows the rest."""

    def __post_init__(self) -> None:
        for field, hint in typing.get_type_hints(type(self)).items():
            name, value = self._name(field), plain_number(getattr(self, field))
            object.__setattr__(self, field, value)
            kinds = (hint, *typing.get_args(hint))  # of a union, also the members
            words = [kind for kind in kinds if typing.get_origin(kind) is Literal]
            if words:
                none = (None,) if type(None) in kinds else ()
                check_choice(name, value, (*typing.get_args(words[0]), *none))
            elif hint is bool and not isinstance(value, bool):
                raise ValueError(f"{name}: got {value!r}, wanted True or False")
            elif hint is int and not isinstance(value, int):
                raise ValueError(f"{name}: got {value!r}, wanted an integer")
        self._check()

    def _check(self) -> None:
        """What types do not say."""

    def _name(self, field: str) -> str:
        return f"{type(self).__name__}.{field}"

    def _check_numbers(self, wanted: Wanted, *fields: str) -> None:
        """Numbers, or None where that is the default."""
        for field in fields:
            value = getattr(self, field)
            if value is not None or getattr(type(self), field) is not None:
                check_number(self._name(field), value, wanted)


@dataclass(frozen=True, eq=False)
class Routing(_Options):
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

    def _check(self) -> None:
        self._check_numbers(COUNT, "vocabulary_size")
        check_tree("Routing.decay_mask", self.decay_mask, *MASK)


@dataclass(frozen=True, eq=False)
class AdamW(_Options):
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

    def _check(self) -> None:
        self._check_numbers(DECAY, "b1", "b2")
        self._check_numbers(NOT_NEGATIVE, "lr_ratio", "eps")
        rates = {"learning_rate": self.learning_rate, "weight_decay": self.weight_decay}
        check_rates(**{self._name(k): rate for k, rate in rates.items() if rate is not None})
        multiplied = isinstance(self.lr_ratio, int | float) and self.lr_ratio != 1
        if self.learning_rate is not None and multiplied:
            raise ValueError(
                f"AdamW.lr_ratio: got {self.lr_ratio}, wanted none beside AdamW.learning_rate, "
                "which it does not multiply"
            )


@dataclass(frozen=True, eq=False)
class NewtonSchulz(_Options):
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

    def _check(self) -> None:
        self._check_numbers(COUNT, "steps")
        self._check_numbers(NOT_NEGATIVE, "eps")
        if self.coefficients == "dion":
            raise ValueError(
                "NewtonSchulz.coefficients: got 'dion', wanted 'you_jiacheng', the name of these "
                "coefficients after their source"
            )
        check_choice("NewtonSchulz.coefficients", self.coefficients, COEFFICIENTS)
        check_dtype("NewtonSchulz.dtype", self.dtype)


@dataclass(frozen=True, eq=False)
class Eigenbasis(_Options):
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

    def _check(self) -> None:
        at_least_0 = Wanted("an integer >= 0", lambda x: x >= 0)
        self._check_numbers(at_least_0, "max_precond_dim")


@dataclass(frozen=True, eq=False)
class InverseRoot(_Options):
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

    def _check(self) -> None:
        self._check_numbers(COUNT, "max_precond_dim")
        given = self.exponent if isinstance(self.exponent, Mapping) else {2: self.exponent}
        if not set(given) <= {1, 2, 3, 4}:
            raise ValueError(f"InverseRoot.exponent: got {given!r}, wanted orders from 1 to 4")
        for value in given.values():
            if value is not None:
                check_root("InverseRoot.exponent", plain_number(value), self.method)

    def of_order(self, order: int) -> float:
        """The exponent for blocks of an order."""
        given = self.exponent
        value = given.get(order) if isinstance(given, Mapping) else given
        return 1 / (2 * order) if value is None else float(value)


@dataclass(frozen=True, eq=False)
class Graft(_Options):
    """The method whose step size every block of Shampoo takes."""

    kind: Literal["adam", "rmsprop", "adagrad", "sgd"] | None = "adam"
    """"sgd" takes the norm of the averaged gradient; None keeps that of Shampoo itself."""

    b2: float | None = None
    """Decay of the second moment; None: that of the factors, or 0.999 where these are sums."""

    eps: float = 1e-8
    """Added to the root of the second moment."""

    def _check(self) -> None:
        self._check_numbers(DECAY, "b2")
        self._check_numbers(NOT_NEGATIVE, "eps")


@dataclass(frozen=True, eq=False)
class MeshWork(_Options):
    """Where the parameters are laid out, and how replicas share the work on whole matrices."""

    param_shardings: Any = None
    """Tree of `NamedSharding` of the parameters, or a prefix of one. Needed on meshes with Auto
    axes, where types do not show the layout; without it the partitioner gathers inside of every
    iteration."""

    replicated_work: ReplicatedWork = "repeat"
    """On mesh axes that replicate the parameters, "repeat" the work on whole matrices or "share"
    it for one all-gather of its results."""

    def _check(self) -> None:
        for x in jax.tree.leaves(self.param_shardings):
            if not isinstance(x, NamedSharding):
                raise ValueError(f"MeshWork.param_shardings: got {x!r}, wanted NamedShardings")
