"""Run logs, figures and tables; imports nothing else of the library.

Everything here works on plain data and run directories, and the heavy packages (matplotlib,
rich, tensorboardX) are imported by the functions that draw or write with them.
"""

from jaxopt_lab.report.figures import Curve, curves_figure, loss_figure
from jaxopt_lab.report.hlo import CollectiveTotal, collectives
from jaxopt_lab.report.progress import Progress
from jaxopt_lab.report.smoothness import SmoothnessSeries, smoothness_figure
from jaxopt_lab.report.tables import format_table
from jaxopt_lab.report.tracker import Tracker, read_metrics

__all__ = [
    "CollectiveTotal",
    "Curve",
    "Progress",
    "SmoothnessSeries",
    "Tracker",
    "collectives",
    "curves_figure",
    "format_table",
    "loss_figure",
    "read_metrics",
    "smoothness_figure",
]
