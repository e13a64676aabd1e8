"""Optimization from values of the loss alone: estimates of gradients, and methods on top of them.

Everything is an Optax transformation whose `update` takes the loss as `value_fn`:

    tx = mezo(1e-6, eps=1e-3, key=jax.random.key(0))
    updates, state = tx.update(None, state, params, value_fn=lambda p: loss(p, batch))

or as `probe_fn`, which perturbs stacked layers inside of its own loop, at the memory of inference
(`jaxopt_lab.zeroth_order.layerwise`; of this library's decoders, `models.probe_loss`).

Black-box optimization asks for values and is told them: `jaguar_frank_wolfe`, `jaguar_gd`.
"""

from jaxopt_lab.zeroth_order.adaptive import AdaMMState, scale_by_adamm, zo_adamm
from jaxopt_lab.zeroth_order.ask_tell import BlackBox, BlackBoxDraws, BlackBoxState, ask_tell
from jaxopt_lab.zeroth_order.averaging import AverageState, averaged
from jaxopt_lab.zeroth_order.black_box_baselines import (
    full_coordinates,
    random_coordinates,
    random_directions,
    sega,
)
from jaxopt_lab.zeroth_order.conservative import conservative
from jaxopt_lab.zeroth_order.constraints import (
    ConstraintSet,
    box,
    l1_ball,
    l2_ball,
    linf_ball,
    lp_ball,
    nuclear_ball,
    simplex,
    spectral_ball,
)
from jaxopt_lab.zeroth_order.coordinate_memory import (
    CoordinateMemory,
    Coordinates,
    coordinate_memory,
)
from jaxopt_lab.zeroth_order.descent import gradient_descent, jaguar_gd
from jaxopt_lab.zeroth_order.differences import Estimator, Found
from jaxopt_lab.zeroth_order.directions import Direction, Sampler
from jaxopt_lab.zeroth_order.engines import Engine, chunked, sequential, vmapped
from jaxopt_lab.zeroth_order.estimators import estimate
from jaxopt_lab.zeroth_order.forward_gradient import forward_gradient
from jaxopt_lab.zeroth_order.frank_wolfe import frank_wolfe, jaguar_frank_wolfe
from jaxopt_lab.zeroth_order.jaguar import (
    CoordinateMomentumState,
    JaguarState,
    jaguar_muon,
    jaguar_signsgd,
    scale_by_coordinate_momentum,
    scale_by_jaguar,
)
from jaxopt_lab.zeroth_order.layerwise import perturbed_layer
from jaxopt_lab.zeroth_order.ldsd import LDSDState, ldsd, policy_mean
from jaxopt_lab.zeroth_order.losses import fill_masked
from jaxopt_lab.zeroth_order.low_rank import LowRankSide, beside, low_rank
from jaxopt_lab.zeroth_order.matrix_sign import scale_by_matrix_sign
from jaxopt_lab.zeroth_order.mezo import mezo
from jaxopt_lab.zeroth_order.muon import sampling_muon, zo_muon
from jaxopt_lab.zeroth_order.probes import Draws, Probes, ProbeState
from jaxopt_lab.zeroth_order.replay import apply_replay, recorded, save_replay
from jaxopt_lab.zeroth_order.samplers import (
    blocks,
    gaussian,
    orthogonal,
    signs,
    single_coordinate,
    sparse,
    sphere,
)
from jaxopt_lab.zeroth_order.sharded import sharded
from jaxopt_lab.zeroth_order.sign import zo_signsgd
from jaxopt_lab.zeroth_order.subspace_muon import (
    Subspace,
    scale_by_subspace_muon,
    subspace_muon,
)

__all__ = [
    "AdaMMState",
    "AverageState",
    "BlackBox",
    "BlackBoxDraws",
    "BlackBoxState",
    "ConstraintSet",
    "CoordinateMemory",
    "CoordinateMomentumState",
    "Coordinates",
    "Direction",
    "Draws",
    "Engine",
    "Estimator",
    "Found",
    "JaguarState",
    "LDSDState",
    "LowRankSide",
    "ProbeState",
    "Probes",
    "Sampler",
    "Subspace",
    "apply_replay",
    "ask_tell",
    "averaged",
    "beside",
    "blocks",
    "box",
    "chunked",
    "conservative",
    "coordinate_memory",
    "estimate",
    "fill_masked",
    "forward_gradient",
    "frank_wolfe",
    "full_coordinates",
    "gaussian",
    "gradient_descent",
    "jaguar_frank_wolfe",
    "jaguar_gd",
    "jaguar_muon",
    "jaguar_signsgd",
    "l1_ball",
    "l2_ball",
    "ldsd",
    "linf_ball",
    "lp_ball",
    "low_rank",
    "mezo",
    "nuclear_ball",
    "orthogonal",
    "perturbed_layer",
    "policy_mean",
    "random_coordinates",
    "random_directions",
    "recorded",
    "sampling_muon",
    "save_replay",
    "scale_by_adamm",
    "scale_by_coordinate_momentum",
    "scale_by_jaguar",
    "scale_by_matrix_sign",
    "scale_by_subspace_muon",
    "sega",
    "sequential",
    "sharded",
    "signs",
    "simplex",
    "single_coordinate",
    "sparse",
    "spectral_ball",
    "sphere",
    "subspace_muon",
    "vmapped",
    "zo_adamm",
    "zo_muon",
    "zo_signsgd",
]
