"""The direction whose norm the blocks of Shampoo take."""

import jax.numpy as jnp
import numpy as np

from jaxopt_lab.optim import Graft
from jaxopt_lab.optim.kronecker.grafting import graft_direction


def test_sums_of_squares_stay_finite():
    g = jnp.array([[1.5e19, 1.0]])
    nu, steps = jnp.zeros((1, 2)), jnp.ones((1, 1))
    for _ in range(4):
        direction, nu = graft_direction(Graft("adagrad"), g, nu, g, steps, b2=0.999)
    assert np.isfinite(nu).all()
    # Two of the four fit: from then on the sum stays what it is.
    np.testing.assert_allclose(direction, [[1.5e19 / 3.4028235e38**0.5, 0.5]], rtol=1e-5)
