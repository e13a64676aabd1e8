"""Optimization from values of the loss alone: estimates of gradients, and methods on top of them.

Everything is an Optax transformation whose `update` takes the loss as `value_fn`:

    tx = mezo(1e-6, eps=1e-3, key=jax.random.key(0))
    updates, state = tx.update(None, state, params, value_fn=lambda p: loss(p, batch))
"""

from jaxopt_lab.zeroth_order.adaptive import AdaMMState, scale_by_adamm, zo_adamm
from jaxopt_lab.zeroth_order.conservative import conservative
from jaxopt_lab.zeroth_order.directions import Direction, Sampler
from jaxopt_lab.zeroth_order.engines import Engine, chunked, sequential, vmapped
from jaxopt_lab.zeroth_order.estimators import estimate
from jaxopt_lab.zeroth_order.forward_gradient import forward_gradient
from jaxopt_lab.zeroth_order.jaguar import (
    CoordinateMomentumState,
    JaguarState,
    jaguar_muon,
    jaguar_signsgd,
    scale_by_coordinate_momentum,
    scale_by_jaguar,
)
from jaxopt_lab.zeroth_order.ldsd import LDSDState, ldsd
from jaxopt_lab.zeroth_order.losses import fill_masked
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
from jaxopt_lab.zeroth_order.sign import zo_signsgd
from jaxopt_lab.zeroth_order.subspace_muon import (
    Subspace,
    scale_by_subspace_muon,
    subspace_muon,
)

__all__ = [
    "AdaMMState",
    "CoordinateMomentumState",
    "Direction",
    "Draws",
    "Engine",
    "JaguarState",
    "LDSDState",
    "ProbeState",
    "Probes",
    "Sampler",
    "Subspace",
    "apply_replay",
    "blocks",
    "chunked",
    "conservative",
    "estimate",
    "fill_masked",
    "forward_gradient",
    "gaussian",
    "jaguar_muon",
    "jaguar_signsgd",
    "ldsd",
    "mezo",
    "orthogonal",
    "recorded",
    "sampling_muon",
    "save_replay",
    "scale_by_adamm",
    "scale_by_coordinate_momentum",
    "scale_by_jaguar",
    "scale_by_matrix_sign",
    "scale_by_subspace_muon",
    "sequential",
    "signs",
    "single_coordinate",
    "sparse",
    "sphere",
    "subspace_muon",
    "vmapped",
    "zo_adamm",
    "zo_muon",
    "zo_signsgd",
]
