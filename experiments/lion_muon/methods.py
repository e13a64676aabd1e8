"""The optimizers under comparison and the cells of their learning-rate sweeps."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers

import jaxopt_lab as jol
from jaxopt_lab.core.newton_schulz import newton_schulz_flops

CLIP, WEIGHT_DECAY, NS_STEPS = 0.5, 0.1, 5
ADAM_B1, ADAM_B2 = 0.8, 0.999
# Every method gets this many cells. AdamW is tuned first; its best rate then drives the leaves that
# are not matrices (embedding, norm gains) in all other methods.
CELLS = 9
ADAMW_RATES = [5e-4 * 1.7**k for k in range(CELLS)]
SIGN_RATES = [5e-5 * 1.7**k for k in range(CELLS)]
SPECTRAL_RATES = [1e-3 * 1.6**k for k in range(CELLS)]


@dataclass(frozen=True)
class Method:
    """One optimizer; a cell is (spectral rate, sign rate), the unused one zero."""

    name: str
    period: float
    b2: float = 0.99
    cells: tuple[tuple[float, float], ...] = ()

    def build(
        self,
        schedule: Callable[[Any], Any],
        spectral_rate: Any,
        sign_rate: Any,
        adam_rate: Any,
        matrix_axes: Any,
    ) -> optax.GradientTransformation:
        """The whole chain; the rates may be traced, the schedule goes from 0 to 1."""

        def follow(rate: Any) -> Callable[[Any], Any]:
            return lambda count: rate * schedule(count)

        if self.name == "AdamW":
            # The same arithmetic as the fallback of the other methods.
            nowhere = jax.tree.map(lambda _: None, matrix_axes, is_leaf=_is_layout)
            tx = jol.lion_muon(
                follow(adam_rate),
                weight_decay=WEIGHT_DECAY,
                matrix_axes=nowhere,
                fallback=jol.AdamW(b1=ADAM_B1, b2=ADAM_B2),
            )
        else:
            tx = jol.lion_muon(
                follow(spectral_rate),
                sign_learning_rate=follow(sign_rate),
                period=self.period,
                b2=self.b2,
                weight_decay=WEIGHT_DECAY,
                matrix_axes=matrix_axes,
                newton_schulz=jol.NewtonSchulz(steps=NS_STEPS),
                fallback=jol.AdamW(learning_rate=follow(adam_rate), b1=ADAM_B1, b2=ADAM_B2),
            )
        return optax.chain(optax.clip_by_global_norm(CLIP), tx)


def _is_layout(node: Any) -> bool:
    return node is None or isinstance(node, MuonDimensionNumbers)


def _grid(spectral: list[float], sign: list[float]) -> tuple[tuple[float, float], ...]:
    return tuple((a, b) for a in spectral for b in sign)


_SIGN = [1e-5, 3e-5, 1e-4]
_SIGN_EMA = [1e-4, 2e-4, 4e-4]
_ALWAYS = tuple((rate, 0.0) for rate in SPECTRAL_RATES)
_NEVER = tuple((0.0, rate) for rate in SIGN_RATES)

METHODS = (
    Method("AdamW", math.inf, cells=tuple((rate, 0.0) for rate in ADAMW_RATES)),
    Method("Lion", math.inf, cells=_NEVER),
    Method("Signum", math.inf, b2=0.9, cells=_NEVER),
    Method("Muon", 1, b2=0.9, cells=_ALWAYS),
    Method("SignMuon P=2", 2, b2=0.9, cells=_grid([6e-3, 1.2e-2, 2.4e-2], _SIGN_EMA)),
    Method("SignMuon P=5", 5, b2=0.9, cells=_grid([1.2e-2, 2.4e-2, 4.8e-2], _SIGN_EMA)),
    Method("LionMuon P=1", 1, cells=_ALWAYS),
    Method("LionMuon P=2", 2, cells=_grid([3e-3, 6e-3, 1.2e-2], _SIGN)),
    Method("LionMuon P=5", 5, cells=_grid([6e-3, 1.2e-2, 2.4e-2], _SIGN)),
    Method("LionMuon P=20", 20, cells=_grid([1e-2, 2e-2, 4e-2], _SIGN)),
)


def optimizer_flops(method: Method, matrices: list[tuple[int, int, int]], parameters: int) -> float:
    """Mean FLOPs of one optimizer step.

    Newton-Schulz: steps x 2 dmin^2 (2 dmax + dmin) for each matrix of each spectral step.
    Elementwise work: 6 operations an element for momentum and sign, 12 for AdamW.

    Args:
      method: The optimizer.
      matrices: (count, rows, columns) of the matrix leaves.
      parameters: All parameters.
    """
    elements = sum(b * m * n for b, m, n in matrices)
    if method.name == "AdamW":
        return 12.0 * parameters
    spectral = sum(b * newton_schulz_flops(m, n, NS_STEPS) for b, m, n in matrices)
    share = 0.0 if math.isinf(method.period) else 1.0 / method.period
    return share * spectral + 6.0 * elements + 12.0 * (parameters - elements)
