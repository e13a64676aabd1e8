"""First-order optimizers as Optax transforms, one method per file."""

from jaxopt_lab.optim.describe import Description, describe
from jaxopt_lab.optim.fallback import scale_by_adamw_fallback
from jaxopt_lab.optim.flax_layouts import flax_matrix_axes
from jaxopt_lab.optim.kronecker.dykaf import dykaf, scale_by_dykaf
from jaxopt_lab.optim.kronecker.shampoo import ShampooState, scale_by_shampoo, shampoo
from jaxopt_lab.optim.kronecker.soap import scale_by_soap, soap
from jaxopt_lab.optim.kronecker.transform import EigenbasisAdamState
from jaxopt_lab.optim.lion_muon.lion_muon import lion_muon, sign_muon
from jaxopt_lab.optim.lion_muon.muon import d_muon, muon
from jaxopt_lab.optim.lion_muon.stable_rank import StableRankState, scale_by_stable_rank
from jaxopt_lab.optim.lion_muon.transform import (
    LionMuonState,
    branch_rate,
    scale_by_lion_muon,
)
from jaxopt_lab.optim.options import (
    AdamW,
    Eigenbasis,
    Graft,
    InverseRoot,
    MeshWork,
    NewtonSchulz,
    Routing,
)
from jaxopt_lab.optim.params_ema import params_ema, track_params_ema
from jaxopt_lab.optim.routing import route
from jaxopt_lab.optim.shardings import state_shardings
from jaxopt_lab.optim.sign import normalized_sgd, scale_by_normalized_heavy_ball, signum

__all__ = [
    "AdamW",
    "Eigenbasis",
    "Graft",
    "InverseRoot",
    "MeshWork",
    "NewtonSchulz",
    "Routing",
    "Description",
    "EigenbasisAdamState",
    "LionMuonState",
    "ShampooState",
    "StableRankState",
    "branch_rate",
    "d_muon",
    "describe",
    "dykaf",
    "flax_matrix_axes",
    "lion_muon",
    "muon",
    "normalized_sgd",
    "params_ema",
    "route",
    "scale_by_adamw_fallback",
    "scale_by_dykaf",
    "scale_by_lion_muon",
    "scale_by_normalized_heavy_ball",
    "scale_by_shampoo",
    "scale_by_soap",
    "scale_by_stable_rank",
    "shampoo",
    "sign_muon",
    "signum",
    "soap",
    "state_shardings",
    "track_params_ema",
]
