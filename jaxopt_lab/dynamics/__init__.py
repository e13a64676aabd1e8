"""Two laboratories of learning dynamics, each with its closed forms and its simulation.

`sgd`: stochastic gradient descent as motion in a landscape that is redrawn at every step.
"""

from jaxopt_lab.dynamics import sgd

__all__ = ["sgd"]
