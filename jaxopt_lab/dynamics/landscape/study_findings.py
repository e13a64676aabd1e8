"""What a study measures, whatever the system; figures, files and verdicts are made from it."""

from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from jaxopt_lab.dynamics.landscape.closed_forms import variance_at
from jaxopt_lab.dynamics.landscape.regimes import regime_codes, regime_names


class Findings(NamedTuple):
    """Per direction, in the order of increasing curvature."""

    curvature: Float[np.ndarray, " D"]  # λ
    gradient_variance: Float[np.ndarray, " D"]  # d of a batch; 0 where there is no noise
    curvature_variance: Float[np.ndarray, " D"]  # Γ of a batch; 0 where it was not measured
    steps: Int[np.ndarray, " records"]
    measured: Float[np.ndarray, "records D"]  # variance over replicas
    predicted: dict[str, Float[np.ndarray, " D"]]  # after the last step, by name
    summary: dict[str, Any]  # numbers of the system for results.json
    table: str
    verdict: str

    def regimes(self, learning_rate: float) -> list[str]:
        """Name of the regime of every direction over the whole horizon."""
        codes = regime_codes(
            self.steps[-1],
            learning_rate=learning_rate,
            curvature=self.curvature,
            curvature_variance=self.curvature_variance,
        )
        return regime_names(np.asarray(codes))

    def theory(self, learning_rate: float, steps: Any, directions: Any) -> np.ndarray:
        """Finite-time variance of some directions after each of some steps, (steps, directions)."""
        with jax.enable_x64(True):
            return np.asarray(
                variance_at(
                    np.asarray(steps)[:, None],
                    learning_rate=learning_rate,
                    curvature=self.curvature[directions],
                    gradient_variance=self.gradient_variance[directions],
                    curvature_variance=self.curvature_variance[directions],
                )
            )
