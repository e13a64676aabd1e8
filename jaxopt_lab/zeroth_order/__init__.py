"""Zero-order optimization: methods that need values of a function, not its gradients.

Black-box optimization asks for values and is told them, `jaguar_frank_wolfe` and `jaguar_gd`.
"""

from jaxopt_lab.zeroth_order.ask_tell import BlackBox, BlackBoxDraws, BlackBoxState, ask_tell
from jaxopt_lab.zeroth_order.averaging import AverageState, averaged
from jaxopt_lab.zeroth_order.black_box_baselines import (
    full_coordinates,
    random_coordinates,
    random_directions,
    sega,
)
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
from jaxopt_lab.zeroth_order.frank_wolfe import frank_wolfe, jaguar_frank_wolfe

__all__ = [
    "AverageState",
    "BlackBox",
    "BlackBoxDraws",
    "BlackBoxState",
    "ConstraintSet",
    "CoordinateMemory",
    "Coordinates",
    "Estimator",
    "Found",
    "ask_tell",
    "averaged",
    "box",
    "coordinate_memory",
    "frank_wolfe",
    "full_coordinates",
    "gradient_descent",
    "jaguar_frank_wolfe",
    "jaguar_gd",
    "l1_ball",
    "l2_ball",
    "linf_ball",
    "lp_ball",
    "nuclear_ball",
    "random_coordinates",
    "random_directions",
    "sega",
    "simplex",
    "spectral_ball",
]
