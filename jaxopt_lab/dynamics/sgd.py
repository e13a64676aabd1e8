r"""SGD as motion in a fluctuating landscape: moments, regimes, Langevin counterparts, ensembles.

A step $w_{n+1} = w_n - \eta \nabla L_n(w_n)$ is deterministic motion on the loss $L_n$ of a batch,
which is drawn anew for every step. Its noise enters at order $\eta$ and depends on $w$ through the
fluctuating Hessian, unlike the $\sqrt\eta$ kicks of a Brownian particle.

Source: Ignashin, Radovskaya, Semenov, Lopatin, Potapov, Kovalenko, Veprikov, Shestakov, Leonidov
and Beznosikov, "Why SGD is not Brownian Motion: A New Perspective on Stochastic Dynamics", arXiv
2605.22644.
"""

from jaxopt_lab.dynamics.landscape.batches import Sampling, batch_indices
from jaxopt_lab.dynamics.landscape.closed_forms import (
    diffusion_coefficient,
    drift_spreading,
    gaussian_lyapunov,
    geometric_sum,
    growth_excess,
    in_mismatch_region,
    is_stable,
    mean_at,
    powers_less_one,
    proportional_noise_variance,
    stability_bound,
    stationary_variance,
    variance_at,
)
from jaxopt_lab.dynamics.landscape.comparison import (
    Comparison,
    Summary,
    compare,
    flat_growth,
    late_slope,
    summarise,
    summary_table,
)
from jaxopt_lab.dynamics.landscape.curvature import (
    Eigenbasis,
    eigenbasis,
    flattest,
    mean_hessian,
    mini_batch_hessians,
    sharpest,
)
from jaxopt_lab.dynamics.landscape.digits import Digits, read_digits
from jaxopt_lab.dynamics.landscape.ensemble import Ensemble, run_ensemble
from jaxopt_lab.dynamics.landscape.fokker_planck import (
    IncrementTraces,
    WeakStep,
    increment_traces,
    weak_step,
)
from jaxopt_lab.dynamics.landscape.independent import (
    DirectionMoments,
    coupled_covariance,
    coupled_radius,
    coupled_variances,
    direction_moments,
)
from jaxopt_lab.dynamics.landscape.interventions import (
    choose_directions,
    interpolate_noise,
    match_noise_norm,
    project_noise,
)
from jaxopt_lab.dynamics.landscape.lanczos import FlatProxies, Lanczos, flat_proxies, lanczos
from jaxopt_lab.dynamics.landscape.langevin import (
    LangevinKind,
    corrected_gradient,
    covariance_root,
    flow,
    simulate_langevin,
)
from jaxopt_lab.dynamics.landscape.networks import adaptive_average_pool
from jaxopt_lab.dynamics.landscape.noise import CurvatureEntries, NoiseStatistics, noise_statistics
from jaxopt_lab.dynamics.landscape.predictors import finite_time_variance, stationary_proxy
from jaxopt_lab.dynamics.landscape.quadratics import (
    FiniteSum,
    Moments,
    all_batches,
    batch_factor,
    finite_sum,
    moments,
    sample_ensemble,
    second_moment_radius,
    sgd_step,
    simulate,
)
from jaxopt_lab.dynamics.landscape.recorder import (
    FluctuationState,
    fluctuation_mean,
    fluctuation_variance,
    record_fluctuations,
)
from jaxopt_lab.dynamics.landscape.reference import ReferencePoint, reference_point
from jaxopt_lab.dynamics.landscape.regimes import (
    REGIMES,
    PhaseTable,
    phase_table,
    regime_codes,
    regime_names,
)
from jaxopt_lab.dynamics.landscape.rough import (
    RoughComparison,
    compare_rough,
    rough_mean_gradient,
    rough_noise,
    rough_noise_variance,
    simulate_rough,
)
from jaxopt_lab.dynamics.landscape.study import SgdConfig, SgdStudy, run_study
from jaxopt_lab.dynamics.landscape.systems import System, cnn, mlp, nano_gpt, quadratic
from jaxopt_lab.dynamics.landscape.text import ALPHABET, read_text

__all__ = [
    "ALPHABET",
    "REGIMES",
    "Comparison",
    "CurvatureEntries",
    "Digits",
    "DirectionMoments",
    "Eigenbasis",
    "Ensemble",
    "FiniteSum",
    "FlatProxies",
    "FluctuationState",
    "IncrementTraces",
    "Lanczos",
    "LangevinKind",
    "Moments",
    "NoiseStatistics",
    "PhaseTable",
    "ReferencePoint",
    "RoughComparison",
    "Sampling",
    "SgdConfig",
    "SgdStudy",
    "Summary",
    "System",
    "WeakStep",
    "adaptive_average_pool",
    "all_batches",
    "batch_factor",
    "batch_indices",
    "choose_directions",
    "cnn",
    "compare",
    "compare_rough",
    "corrected_gradient",
    "coupled_covariance",
    "coupled_radius",
    "coupled_variances",
    "covariance_root",
    "diffusion_coefficient",
    "direction_moments",
    "drift_spreading",
    "eigenbasis",
    "finite_sum",
    "finite_time_variance",
    "flat_growth",
    "flat_proxies",
    "flattest",
    "flow",
    "fluctuation_mean",
    "fluctuation_variance",
    "gaussian_lyapunov",
    "geometric_sum",
    "growth_excess",
    "in_mismatch_region",
    "increment_traces",
    "interpolate_noise",
    "is_stable",
    "lanczos",
    "late_slope",
    "match_noise_norm",
    "mean_at",
    "mean_hessian",
    "mini_batch_hessians",
    "mlp",
    "moments",
    "nano_gpt",
    "noise_statistics",
    "phase_table",
    "powers_less_one",
    "project_noise",
    "proportional_noise_variance",
    "quadratic",
    "read_digits",
    "read_text",
    "record_fluctuations",
    "reference_point",
    "regime_codes",
    "regime_names",
    "rough_mean_gradient",
    "rough_noise",
    "rough_noise_variance",
    "run_ensemble",
    "run_study",
    "sample_ensemble",
    "second_moment_radius",
    "sgd_step",
    "sharpest",
    "simulate",
    "simulate_langevin",
    "simulate_rough",
    "stability_bound",
    "stationary_proxy",
    "stationary_variance",
    "summarise",
    "summary_table",
    "variance_at",
    "weak_step",
]
