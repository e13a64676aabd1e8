import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from optax.contrib import MuonDimensionNumbers

from jaxopt_lab.bench import floors, shapes
from jaxopt_lab.core.flops import total_flops
from jaxopt_lab.core.newton_schulz import newton_schulz_flops


def spectral_step_flops(params, axes, steps):
    return total_flops(params, axes, functools.partial(newton_schulz_flops, steps=steps))


def test_spectral_step_flops_of_one_stack():
    params = {"w": jax.ShapeDtypeStruct((3, 4, 10), jnp.float32), "b": jnp.zeros(7)}
    axes = {"w": MuonDimensionNumbers(1, 2), "b": None}
    assert spectral_step_flops(params, axes, steps=2) == 3 * 2 * 2 * 16 * (20 + 4)


@pytest.mark.parametrize("layout", shapes.LAYOUTS)
def test_spectral_step_flops_of_gpt2_with_fused_projections(layout):
    # 12 layers of 768 x 2304, 768 x 768 and two of 768 x 3072: 1.5e12 for five iterations.
    params = shapes.abstract_params("gpt2-124m", layout)
    axes = shapes.matrix_axes("gpt2-124m", layout, fused_qkv=True)
    assert spectral_step_flops(params, axes, steps=5) == pytest.approx(1.5e12, rel=0.03)


def test_step_bytes_counts_every_array_once_each_way():
    params = {"w": jnp.zeros((5, 5), jnp.float32)}
    state = optax.adam(1e-3).init(params)
    # Parameters and both moments read and written, gradients read, a counter of four bytes.
    assert floors.step_bytes(params, state) == 100 * (2 + 1 + 4) + 2 * 4


def test_ceilings_are_medians_of_the_samples(toy):
    probe = floors.CeilingProbe()
    probe._rates = [(1.0, 10.0), (3.0, 30.0), (2.0, 50.0)]
    assert probe.ceilings() == floors.Ceilings(2.0, 30.0)
    probe.sample()
    assert all(rate > 1e3 for rate in probe._rates[-1])
