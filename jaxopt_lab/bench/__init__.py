"""Benchmarks; ratios within one run.

`python -m jaxopt_lab.bench optimizers` needs only jax, optax, jaxtyping and numpy; `train` and
`collectives` build a model and need flax.
"""

from jaxopt_lab.bench.optimizers import OptimizerReport, OptimizerRow, run_optimizers

__all__ = ["OptimizerReport", "OptimizerRow", "run_optimizers"]
