"""The parts of `jaxopt_lab.dynamics.sgd`, one subject per module."""
