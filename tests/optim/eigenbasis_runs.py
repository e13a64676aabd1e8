"""Runs of SOAP and DyKAF in double precision, from any state, with what each step left behind."""

import functools
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxopt_lab as jol
from jaxopt_lab.optim.kronecker.dykaf import dykaf_method
from jaxopt_lab.optim.kronecker.soap import soap_method
from jaxopt_lab.optim.kronecker.tensors import tensor_direction
from jaxopt_lab.optim.kronecker.transform import eigenbasis_direction
from jaxopt_lab.optim.nonfinite import guarded
from jaxopt_lab.parity.soap import decayed_after_step
from tests.quick_compile import OPTIONS

# Traced, so that runs that differ in numbers alone share a compiled step.
NUMBERS = {"b1": 0.9, "b2": 0.95, "eps": 1e-8, "precondition_frequency": 3, "weight_decay": 0.0}
RATE = 0.1
# Refreshes never come.
NEVER = 10**6

# Options of `Eigenbasis`, and what only `jaxopt_lab.parity` sets of the step.
BASIS = {"stagger", "orthogonalizer", "factor_precision", "rotation_precision", "max_precond_dim"}
BASIS |= {"one_sided", "second_moment", "init"}
STEP = {"correct_bias", "normalize_grads", "skip_first_step", "largest_ratio"}


class Run(NamedTuple):
    """One row a step: the directions, and parameters and state after it."""

    directions: Any
    params: Any
    states: Any

    def state(self, step):
        """The state after this many gradients."""
        return jax.tree.map(lambda x: x[step - 1], self.states)


def draw(seed, shapes, *lead):
    """Normal double-precision arrays of these shapes, `lead` axes before each."""
    rng = np.random.default_rng(seed)
    return {k: rng.normal(size=(*lead, *s)) for k, s in shapes.items()}


def run(method, grads, *, params=None, state=None, layouts=None, **options):
    """Feed gradients (a tree with a leading axis of steps) to the direction of a method.

    Args:
      method: "soap" or "dykaf".
      grads: The gradients.
      params: Initial parameters; None: zeros.
      state: Where to start from; None: `init`.
      layouts: `matrix_axes`.
      **options: Numbers are traced, everything else is static.
    """
    numbers = NUMBERS | {k: v for k, v in options.items() if type(v) in (int, float)}
    static = {k: v for k, v in options.items() if k not in numbers}
    if "max_precond_dim" in numbers:
        static["max_precond_dim"] = numbers.pop("max_precond_dim")
    if static.get("stagger"):
        static["precondition_frequency"] = numbers.pop("precondition_frequency")
    if layouts is not None:
        static["matrix_axes"] = tuple(layouts.items())
    with jax.enable_x64(True):
        if params is None:
            params = jax.tree.map(lambda g: np.zeros(g.shape[1:]), grads)
        params = jax.tree.map(jnp.asarray, params)
        key = tuple(sorted(static.items()))
        if state is None:
            state = build(method, key, numbers).init(params)
        steps = []
        for t in range(len(jax.tree.leaves(grads)[0])):
            grad = jax.tree.map(lambda g, t=t: g[t], grads)
            directions, params, state = _step(method, key, numbers, params, state, grad)
            steps.append((directions, params, state))
        return Run(*jax.tree.map(lambda *xs: np.stack(xs), *steps))


def build(method, static, numbers):
    """Direction and decay; the state is that of the direction. Products are exact by default."""
    static, numbers = {"rotation_precision": "highest", **dict(static)}, dict(numbers)
    weight_decay, rate = numbers.pop("weight_decay"), numbers.pop("decay_rate", None)
    basis = jol.Eigenbasis(**{k: static.pop(k) for k in BASIS & set(static)})
    quirks = {k: static.pop(k) for k in STEP & set(static)}
    layouts = dict(static.pop("matrix_axes")) if "matrix_axes" in static else None
    integrator = static.pop("integrator", "ksl")
    given = {"factor_decay": None, **numbers, **static}
    given |= {"eigenbasis": basis, "mesh": jol.MeshWork()}
    made = (
        soap_method(**given) if method == "soap" else dykaf_method(integrator=integrator, **given)
    )
    direction = eigenbasis_direction(replace(made, **quirks), layouts, basis, jol.MeshWork())
    decay = optax.add_decayed_weights(weight_decay)
    if rate is not None:
        decay = decayed_after_step(weight_decay, None, rate)
    tx = guarded(direction, decay)

    def update(updates, state, params):
        rest = tx.init(params)[1:]
        directions, (state, *_) = tx.update(updates, (state, *rest), params)
        return directions, state

    return optax.GradientTransformationExtraArgs(direction.init, update)


def scale_by_tensor_soap(*, merge_dims=False, weight_decay=None, mask=None, rate=None, **options):
    """One factor an axis for every leaf, vectors included; `rate`: decay comes after the step."""
    basis = jol.Eigenbasis(**{k: options.pop(k) for k in BASIS & set(options)})
    quirks = {k: options.pop(k) for k in STEP & set(options)}
    numbers = {"b1": 0.95, "b2": 0.95, "factor_decay": None, "eps": 1e-8}
    numbers |= {"precondition_frequency": 10, **options}
    method = replace(soap_method(**numbers, eigenbasis=basis, mesh=jol.MeshWork()), **quirks)
    direction = tensor_direction(method, basis, merge_dims=merge_dims)
    if weight_decay is None:
        return guarded(direction)
    if rate is not None:
        return guarded(direction, decayed_after_step(weight_decay, mask, rate))
    return guarded(direction, optax.add_decayed_weights(weight_decay, mask))


@functools.partial(jax.jit, static_argnums=(0, 1), compiler_options=OPTIONS)
def _step(method, static, numbers, params, state, grad):
    directions, state = build(method, static, numbers).update(grad, state, params)
    params = jax.tree.map(lambda w, d: w - RATE * d, params, directions)
    return directions, params, state


def orthogonal(seed, n):
    """A random orthogonal matrix."""
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))[0]


def turned(state, rows, columns):
    """The state of a tree of matrices seen from axes turned by orthogonal matrices."""
    return state._replace(
        row_factor=jax.tree.map(lambda p, x: p @ x @ p.T, rows, state.row_factor),
        column_factor=jax.tree.map(lambda q, x: q @ x @ q.T, columns, state.column_factor),
        row_basis=jax.tree.map(np.matmul, rows, state.row_basis),
        column_basis=jax.tree.map(np.matmul, columns, state.column_basis),
    )


def reordered(state, seed):
    """The same state with the columns of all bases shuffled and some of their signs turned."""
    rng = np.random.default_rng(seed)
    fields: dict[str, Any] = {name: {} for name in ("mu", "nu", "row_basis", "column_basis")}
    for name, mu in state.mu.items():
        (i, s), (j, t) = ((rng.permutation(n), rng.choice([-1.0, 1.0], n)) for n in mu.shape)
        fields["mu"][name] = s[:, None] * mu[i][:, j] * t
        fields["nu"][name] = state.nu[name][i][:, j]
        fields["row_basis"][name] = state.row_basis[name][:, i] * s
        fields["column_basis"][name] = state.column_basis[name][:, j] * t
    return state._replace(**fields)


def delayed_adam(grads, *, b1=0.9, b2=0.95, eps=1e-8):
    """Directions of Adam that ignores its first gradient, epsilon outside the bias correction."""
    mu, nu, out = 0.0, 0.0, [np.zeros_like(grads[0])]
    for k, g in enumerate(grads[1:], 1):
        mu, nu = b1 * mu + (1 - b1) * g, b2 * nu + (1 - b2) * g * g
        out.append(np.sqrt(1 - b2**k) / (1 - b1**k) * mu / (np.sqrt(nu) + eps))
    return np.stack(out)
