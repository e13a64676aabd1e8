"""Shared test set-up: eight CPU devices, shape annotations enforced, reproducible examples."""

import os

from tests.quick_compile import FLAGS

# Before jax starts: sharding tests need eight devices; everything else uses the first.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8" + FLAGS)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Nearly all the time of the suite goes to compiling tiny programs that run for milliseconds. This
# turns off the expensive passes of LLVM alone, and `FLAGS` takes the faster way to it: the program
# XLA hands on, collectives, fusions and memory included, is the one users get. Processes that tests
# start inherit it; "0" and XLA_FLAGS of one's own compile as users do.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import hypothesis
import jaxtyping

# Annotations of `core`, array shapes included, are enforced while the tests run.
jaxtyping.install_import_hook("jaxopt_lab.core", "beartype.beartype")

hypothesis.settings.register_profile(
    "ci", deadline=None, derandomize=True, max_examples=25, print_blob=True
)
hypothesis.settings.load_profile("ci")
