"""Compiler settings for programs that run for milliseconds and are compiled for seconds.

Import it before JAX starts, for `FLAGS`.
"""

from importlib.metadata import version

# Fusions are then compiled by the old emitters, in about half the time; jaxlib 0.11 has new ones
# only, and refuses the name.
_HAS_OLD_EMITTERS = tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11)

# The same for one program: `jax.jit(fn, compiler_options=OPTIONS)`.
OPTIONS = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    # One LLVM module a program, not one a kernel: a third less to compile, and fewer memory maps.
    # What several compile at once is lost, but workers keep the cores busy.
    "xla_cpu_parallel_codegen_split_count": 1,
    **({"xla_cpu_use_fusion_emitters": False} if _HAS_OLD_EMITTERS else {}),
}

FLAGS = " --xla_cpu_parallel_codegen_split_count=1"
FLAGS += " --xla_cpu_use_fusion_emitters=false" if _HAS_OLD_EMITTERS else ""

# As users compile, for tests of what rounding leaves: old emitters round more.
NEW_EMITTERS = {"xla_cpu_use_fusion_emitters": True} if _HAS_OLD_EMITTERS else {}
