"""Two laboratories of learning dynamics, each with its closed forms and its simulation.

`sgd`: stochastic gradient descent as motion in a landscape that is redrawn at every step.
`repeated_learning`: a learner that is trained again and again on its own predictions.
"""

from jaxopt_lab.dynamics import repeated_learning, sgd

__all__ = ["repeated_learning", "sgd"]
