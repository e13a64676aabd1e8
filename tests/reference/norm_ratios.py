"""Norm diagnostics of one record over several matrices, norms in float64."""

import numpy as np

from tests.reference.spectral import norms


def norm_ratios(grads, params, updates, momenta, previous):
    """Medians over matrices; `previous` is the (grads, params) of the last record, or None."""
    ratios = {name: [] for name in RATIOS}
    for i, (g, w, u, m) in enumerate(zip(grads, params, updates, momenta, strict=True)):
        grad, param, update, error = norms(g), norms(w), norms(u), norms(g - m)
        ratios["grad_nuc_over_1"].append(_divide(grad["nuc"], grad["1"]))
        ratios["param_2_over_inf"].append(_divide(param["2"], param["inf"]))
        ratios["update_2_over_inf"].append(_divide(update["2"], update["inf"]))
        ratios["errmom_F_over_nuc"].append(_divide(error["F"], error["nuc"]))
        ratios["errmom_F_over_1"].append(_divide(error["F"], error["1"]))
        if previous is not None:
            dg, dw = norms(g - previous[0][i]), norms(w - previous[1][i])
            ratios["smooth_nuc_over_2"].append(_divide(dg["nuc"], dw["2"]))
            ratios["smooth_1_over_inf"].append(_divide(dg["1"], dw["inf"]))
    return {name: _median(values) for name, values in ratios.items()}


RATIOS = (
    "grad_nuc_over_1",
    "param_2_over_inf",
    "update_2_over_inf",
    "errmom_F_over_nuc",
    "errmom_F_over_1",
    "smooth_nuc_over_2",
    "smooth_1_over_inf",
)


def _divide(a, b):
    return a / b if b > 1e-12 else np.nan


def _median(values):
    kept = [v for v in values if not np.isnan(v)]
    return float(np.median(kept)) if kept else np.nan
