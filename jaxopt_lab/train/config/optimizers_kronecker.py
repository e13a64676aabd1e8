"""SOAP, DyKAF and Shampoo as optimizers of the trainer: a Kronecker factor a side."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from jaxopt_lab import optim
from jaxopt_lab.core.flops import newton_root_flops, power_iteration_flops, two_sided_flops
from jaxopt_lab.optim.kronecker.blocks import Blocks
from jaxopt_lab.optim.kronecker.transform import preconditioned_sides
from jaxopt_lab.train.config.bounds import (
    Average,
    Count,
    CountOrZero,
    InnerShare,
    Positive,
    PositiveOrZero,
)
from jaxopt_lab.train.config.optimizer_base import ModelInfo, WholeMatrixConfig


@dataclass(frozen=True)
class KroneckerConfig(WholeMatrixConfig):
    """What the three have in common: how often the expensive part is done anew."""

    b1: Average = 0.95
    """Average of the gradient; of SOAP and DyKAF in the eigenbases."""
    precondition_frequency: Count = 10
    """Steps from one refresh of the bases (SOAP, DyKAF) or inverse roots (Shampoo) to the next."""
    stagger: bool = False
    """Refresh a share of the matrices at every step, so that no step pays for all of them."""


@dataclass(frozen=True)
class EigenbasisConfig(KroneckerConfig):
    """Adam in Kronecker eigenbases: SOAP and DyKAF."""

    learning_rate: Positive = 3e-3
    b2: Average = 0.95
    """Average of the gradient's square, and of the factors."""
    eps: PositiveOrZero = 1e-8
    """Added to the uncorrected root of the second average."""
    max_precond_dim: CountOrZero = 10_000
    """A longer side of a matrix has no factor; a matrix with two of them is AdamW's."""

    def _eigenbasis(self) -> optim.Eigenbasis:
        return optim.Eigenbasis(stagger=self.stagger, max_precond_dim=self.max_precond_dim)

    def _common_arguments(self, model: ModelInfo) -> dict[str, Any]:
        return super()._common_arguments(model) | {"eigenbasis": self._eigenbasis()}

    def _factor_products(self) -> int:
        """Two-sided products that bring both factors up to date."""
        return 1

    def _product_flops(self, m: int, n: int) -> float:
        """Mean FLOPs of a matrix.

        Counted are the rotations of the gradient into the eigenbases and of the direction back
        (the first moment lives in them), the products of the factors and, as the share of one
        step, a power iteration with an orthogonalisation a side and the two rotations that
        re-express the first moment. A side without a factor is not rotated.
        """
        rows, columns = preconditioned_sides(m, n, self.max_precond_dim)
        rotation = 2 * m * n * (m * rows + n * columns)
        power = rows * power_iteration_flops(m) + columns * power_iteration_flops(n)
        refresh = power + 2 * rotation
        # One side alone averages its Gram matrix, whatever the method.
        products = self._factor_products() if rows and columns else 1
        return (2 + products) * rotation + refresh / self.precondition_frequency


@dataclass(frozen=True)
class SoapConfig(EigenbasisConfig):
    """Adam in the eigenbases of the averaged Gram matrices of the gradient."""

    _factory = staticmethod(optim.soap)


@dataclass(frozen=True)
class DyKAFConfig(EigenbasisConfig):
    """Adam in the eigenbases of a tracked Kronecker approximation of the second moment."""

    integrator: Literal["ksl", "parallel"] = "ksl"
    """How a gradient enters the factors; `parallel` is that of the released code."""
    rank1_second_moment: bool = False
    """Keep the second average as a product of a column and a row; less memory."""
    _factory = staticmethod(optim.dykaf)

    def _eigenbasis(self) -> optim.Eigenbasis:
        kind = "rank_one" if self.rank1_second_moment else "full"
        return replace(super()._eigenbasis(), second_moment=kind)

    def _factor_products(self) -> int:
        return 2 if self.integrator == "ksl" else 3


@dataclass(frozen=True)
class ShampooConfig(KroneckerConfig):
    """Inverse fourth roots of averaged Gram matrices on both sides, with a grafted step size."""

    learning_rate: Positive = 1e-3
    """Peak learning rate; with `graft` adam, that of a tuned AdamW."""
    b1: Average = 0.9
    """Average of the gradient."""
    b2: InnerShare = 0.999
    """Average of the factors and of the graft's squares."""
    eps: PositiveOrZero = 1e-12
    """Ridge of the factors."""
    graft: Literal["adam", "rmsprop", "adagrad", "sgd"] | None = "adam"
    """Method whose step size every block takes; None: that of Shampoo itself."""
    max_precond_dim: Count = 1024
    """Longest edge of a block; longer sides are cut."""
    _factory = staticmethod(optim.shampoo)

    def _common_arguments(self, model: ModelInfo) -> dict[str, Any]:
        roots = optim.InverseRoot(stagger=self.stagger, max_precond_dim=self.max_precond_dim)
        return super()._common_arguments(model) | {
            "inverse_root": roots,
            "graft": optim.Graft(self.graft),
        }

    def _product_flops(self, m: int, n: int) -> float:
        """Mean FLOPs of a matrix.

        Counted are, for every block, the Gram matrices, the products of the direction with both
        roots and, as the share of one step, ten Newton iterations a side, which is what float32
        factors take.
        """
        blocks = Blocks.of((m, n), self.max_precond_dim)
        rows, columns = min(m, blocks.edges[0]), min(n, blocks.edges[-1])
        roots = newton_root_flops(rows) + newton_root_flops(columns)
        every_step = 2 * two_sided_flops(rows, columns)
        return blocks.number * (every_step + roots / self.precondition_frequency)
