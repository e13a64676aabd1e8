"""Replay of the zero-order family through the public API, from the recorded draws."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxopt_lab as jol
from jaxopt_lab import zeroth_order as zo
from jaxopt_lab.parity import zeroth_order as parity
from tests.golden.harness import Case, Check, NotUnderstood, Result
from tests.golden.trajectory import find_states

TOLERANCE = 1e-10
# What the released code adds to the norm before Newton-Schulz: without it the replays are off by
# 3e-8.
RELEASED = {"dtype": "float64", "eps": 1e-7}

Arrays = Mapping[str, np.ndarray]

# Arrays of a state, and where we keep what they hold.
STATES = {
    "m": (zo.CoordinateMomentumState, "mu"),
    "momentum": (optax.TraceState, "trace"),
    "exp_avg": (zo.AdaMMState, "mu"),
    "exp_avg_sq": (zo.AdaMMState, "nu"),
    "max_exp_avg_sq": (zo.AdaMMState, "nu_max"),
    "mu": (zo.LDSDState, "mean"),
}


class Plan(NamedTuple):
    """How a case is replayed."""

    tx: optax.GradientTransformationExtraArgs
    draws: zo.Draws  # leaves (T, probes, *shape)
    losses: Sequence[np.ndarray]  # (T, n) each, in the order of our evaluations; NaN: not recorded


def replay(case: Case) -> list[Result]:
    """All comparisons of one case."""
    method = case.sidecar["method"]
    if method.startswith(("jaguar_fw", "jaguar_gd")):
        return importlib.import_module("tests.golden.black_box").replay(case)
    if method not in PLANS:
        raise NotUnderstood(f"unknown method {method!r}")
    with jax.enable_x64(True):
        plan = PLANS[method](case)
        params, states = run(plan, case)
        checks = [
            Check.of(f"params_{name}", params[name], case.arrays[f"params_{name}"][1:], TOLERANCE)
            for name in case.sidecar["param_names"]
        ]
        checks += compare_states(case, states)
        ours = np.asarray(find_states(states, zo.ProbeState)[0].losses)
        wanted = np.concatenate([np.asarray(x) for x in plan.losses], axis=1)
        known = ~np.isnan(wanted)
        if known.any():
            checks.append(Check.of("losses", ours[known], wanted[known], TOLERANCE))
    return [Result(f"{case.family}/{case.name}", tuple(checks))]


def problem(case: Case) -> Callable[[Any], jax.Array]:
    """The loss of a case: a quadratic, or a regularised logistic regression."""
    names, arrays = case.sidecar["param_names"], case.arrays
    known = {name: jnp.asarray(arrays[name]) for name in arrays if name.startswith("prob_")}

    def loss(params: Any) -> jax.Array:
        x = jnp.concatenate([params[name].reshape(-1) for name in names])
        if "prob_A" in known:
            gap = x - known["prob_t"]
            return 0.5 * gap @ known["prob_A"] @ gap
        margins = known["prob_y"] * (known["prob_D"] @ x)
        return jnp.mean(jnp.logaddexp(0.0, -margins)) + 0.5 * known["prob_lam"] * x @ x

    return loss


def run(plan: Plan, case: Case):
    """Parameters and states after each step."""
    loss = problem(case)
    start = {n: jnp.asarray(case.arrays[f"params_{n}"][0]) for n in case.sidecar["param_names"]}

    def step(carry: Any, draws: Any):
        params, state = carry
        updates, state = plan.tx.update(None, state, params, value_fn=loss, draws=draws)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, state)

    state = plan.tx.init(start)
    if found := find_states(state, zo.LDSDState):
        # The start of the policy was recorded.
        mean = {n: jnp.asarray(case.arrays[f"mu_{n}"][0]) for n in start}
        state = found[0]._replace(mean=mean)
    draws = jax.tree.map(jnp.asarray, plan.draws)
    # Compiled for a few milliseconds of work.
    quick = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    scan = jax.jit(lambda carry, draws: jax.lax.scan(step, carry, draws), compiler_options=quick)
    return jax.tree.map(np.asarray, scan((start, state), draws)[1])


def compare_states(case: Case, states: Any) -> list[Check]:
    """One check for each array of a state that was recorded."""
    checks = []
    for key in case.arrays:
        prefix, _, name = key.rpartition("_")
        if prefix in STATES and name in case.sidecar["param_names"]:
            kind, field = STATES[prefix]
            (state,) = find_states(states, kind)
            wanted = case.arrays[key]
            wanted = wanted[1:] if prefix == "mu" else wanted  # with its start
            checks.append(Check.of(key, getattr(state, field)[name], wanted, TOLERANCE))
    return checks


def numbers(case: Case, *names: str, **fixed: Any) -> list[float]:
    """Hyperparameters by name; anything else must have the value that a method knows."""
    given = dict(case.sidecar["hyperparameters"])
    for name, value in fixed.items():
        if name in given and given.pop(name) != value:
            raise NotUnderstood(f"hyperparameter {name}: only {value!r} is known")
    if unknown := set(given) - set(names):
        raise NotUnderstood(f"unknown hyperparameters {', '.join(sorted(unknown))}")
    return [given[name] for name in names]


def stacked(case: Case, prefix: str, probes: bool = False) -> Any:
    """Recorded directions as (T, probes, *shape) a parameter."""
    found = {n: case.arrays[f"{prefix}_{n}"] for n in case.sidecar["param_names"]}
    return found if probes else {n: x[:, None] for n, x in found.items()}


def two_losses(case: Case) -> list[np.ndarray]:
    return [case.arrays["loss_plus"][:, None], case.arrays["loss_minus"][:, None]]


def estimated(make: Callable[..., Any], *names: str, **fixed: Any) -> Callable[[Case], Plan]:
    """A plan for methods with one recorded direction a step."""

    def plan(case: Case) -> Plan:
        update = None
        if f"z_update_{case.sidecar['param_names'][0]}" in case.arrays:
            update = stacked(case, "z_update")
        tx = make(*numbers(case, *names, **fixed), key=jax.random.key(0))
        return Plan(tx, zo.Draws(stacked(case, "z"), update), two_losses(case))

    return plan


def conservative(case: Case) -> Plan:
    rate, eps = numbers(case, "lr", "eps")
    names = ("loss_plus", "loss_minus", "loss0", "loss_after_plus", "loss_after_minus")
    losses = [case.arrays[name][:, None] for name in names]
    tx = zo.conservative(rate, eps=eps, key=jax.random.key(0))
    return Plan(tx, zo.Draws(stacked(case, "z")), losses)


def forward(case: Case) -> Plan:
    rate, decay = numbers(case, "lr", "weight_decay")
    tx = zo.forward_gradient(rate, weight_decay=decay, key=jax.random.key(0))
    steps = case.arrays[f"params_{case.sidecar['param_names'][0]}"].shape[0] - 1
    return Plan(tx, zo.Draws(stacked(case, "z")), [np.full((steps, 1), np.nan)])


def jaguar(make: Callable[..., Any], *names: str) -> Callable[[Case], Plan]:
    """A plan for JAGUAR's blocks: ones on the recorded rows and columns."""

    def plan(case: Case) -> Plan:
        arrays, directions = case.arrays, {}
        for n in case.sidecar["param_names"]:
            z = np.zeros(arrays[f"m_{n}"].shape)
            for t, rows in enumerate(arrays[f"rows_{n}"]):
                index = np.ix_(rows, arrays[f"cols_{n}"][t]) if z.ndim == 3 else rows
                z[t][index] = 1
            directions[n] = z[:, None]
        tx = make(case, *numbers(case, *names), key=jax.random.key(0))
        return Plan(tx, zo.Draws(directions), two_losses(case))

    return plan


def released_or_rounded(case: Case, rate: float, eps: float, b1: float, steps: int, key: Any):
    """JAGUAR Muon, in float64 or with the bfloat16 iterates of the code as it is."""
    patched = any("Newton-Schulz" in patch for patch in case.sidecar["patches_applied"])
    if not patched:
        return parity.jaguar_muon(rate, eps=eps, b1=b1, ns_steps=steps, key=key)
    iteration = jol.NewtonSchulz(steps=steps, **RELEASED)
    return zo.jaguar_muon(rate, eps=eps, b1=b1, newton_schulz=iteration, key=key)


def sparse(make: Callable[..., Any]) -> Callable[[Case], Plan]:
    def plan(case: Case) -> Plan:
        rate, eps, b1, ratio = numbers(case, "lr", "eps", "beta", "params_ratio")
        names = case.sidecar["param_names"]
        for i, n in enumerate(names):
            drawn = case.arrays[f"z_{n}"].any(axis=tuple(range(1, case.arrays[f"z_{n}"].ndim)))
            assert (drawn == case.arrays["selected"][:, i]).all()
        probes = zo.Probes(zo.sparse(params_ratio=ratio))
        tx = make(rate, eps=eps, b1=b1, key=jax.random.key(0), probes=probes)
        return Plan(tx, zo.Draws(stacked(case, "z")), two_losses(case))

    return plan


def ldsd(make: Callable[[Mapping[str, Any]], Any], *names: str) -> Callable[[Case], Plan]:
    """A plan for the policy methods: candidates, and what its update takes."""

    def plan(case: Case) -> Plan:
        h = case.sidecar["hyperparameters"]
        numbers(case, "lr", "eps", "k", "variance", "lr_mu", *names)
        subset = "params_ratio" in h
        probes = zo.Probes(zo.sparse(params_ratio=h["params_ratio"])) if subset else zo.Probes()
        tx = zo.ldsd(
            make(h),
            candidates=h["k"],
            eps=h["eps"],
            policy_rate=h["lr_mu"],
            policy_std=h["variance"],
            key=jax.random.key(0),
            probes=probes,
        )
        policy = None
        if f"mu_update_z_{case.sidecar['param_names'][0]}" in case.arrays:
            policy = stacked(case, "mu_update_z", probes=True)
        draws = zo.Draws(stacked(case, "cand_z", probes=True), policy=policy)
        return Plan(tx, draws, [case.arrays["cand_loss"], case.arrays["loss_minus"][:, None]])

    return plan


def subspace(case: Case) -> Plan:
    names = ("lr", "eps", "rank", "step_interval", "num_samples", "weight_decay")
    rate, eps, rank, interval, samples, decay = numbers(case, *names, inner="muon")
    iteration = jol.NewtonSchulz(**RELEASED)
    tx = zo.subspace_muon(
        rate,
        eps=eps,
        weight_decay=decay,
        key=jax.random.key(0),
        subspace=zo.Subspace(rank=rank, interval=interval, newton_schulz=iteration),
        probes=zo.Probes(num_directions=samples, two_sided=samples == 1),
    )
    steps = case.arrays["losses"].shape[0]
    basis = {
        n: case.arrays.get(f"P_{n}", np.zeros((steps, 0))) for n in case.sidecar["param_names"]
    }
    draws = zo.Draws(stacked(case, "u", probes=True), basis=basis)
    return Plan(tx, draws, [case.arrays["losses"]])


def chained(base: Callable[..., Any]) -> Callable[..., Any]:
    """An Optax optimizer behind the estimate."""
    return lambda rate, eps, *rest, key: optax.chain(zo.estimate(eps=eps, key=key), base(rate))


def descent(rate: float, eps: float, momentum: float, key: Any) -> Any:
    return zo.mezo(rate, eps=eps, momentum=momentum or None, key=key)


PLANS: dict[str, Callable[[Case], Plan]] = {
    "mezo": estimated(
        lambda rate, eps, decay, key: zo.mezo(rate, eps=eps, weight_decay=decay, key=key),
        *("lr", "eps", "weight_decay"),
    ),
    "zo_sgd": estimated(descent, "lr", "eps", "momentum"),
    "zo_sign_scalar": estimated(
        lambda rate, eps, key: zo.zo_signsgd(rate, rule="scalar", eps=eps, key=key), "lr", "eps"
    ),
    "zo_adam": estimated(chained(optax.adam), "lr", "eps"),
    "zo_adamm": estimated(
        lambda rate, eps, betas, key: zo.zo_adamm(rate, eps=eps, b1=betas[0], b2=betas[1], key=key),
        *("lr", "eps", "betas"),
    ),
    **dict.fromkeys(
        ("zo_muon", "zo_muon_head"),
        estimated(
            lambda rate, eps, key: zo.zo_muon(
                rate, eps=eps, newton_schulz=jol.NewtonSchulz(**RELEASED), key=key
            ),
            *("lr", "eps"),
        ),
    ),
    # The released step is longer by 1 / eps.
    "zo_sampling_muon": estimated(
        lambda rate, eps, key: zo.sampling_muon(rate / eps, eps=eps, key=key),
        *("lr", "eps"),
        matrix_sampling_type="Torch_QR",
    ),
    "zo_conserv": conservative,
    "forward_grad": forward,
    "jaguar_signsgd": jaguar(
        lambda case, rate, eps, b1, key: zo.jaguar_signsgd(rate, eps=eps, b1=b1, key=key),
        *("lr", "eps", "beta"),
    ),
    "jaguar_muon": jaguar(released_or_rounded, "lr", "eps", "beta", "ns_steps"),
    "sparse_jaguar_signsgd": sparse(zo.jaguar_signsgd),
    "sparse_jaguar_muon": sparse(
        lambda *args, **options: zo.jaguar_muon(
            *args, newton_schulz=jol.NewtonSchulz(**RELEASED), **options
        )
    ),
    "ldsd_sgd": ldsd(lambda h: optax.sgd(h["lr"], momentum=h["momentum"] or None), "momentum"),
    "ldsd_adamm": ldsd(
        lambda h: optax.chain(
            zo.scale_by_adamm(b1=h["betas"][0], b2=h["betas"][1]),
            optax.scale_by_learning_rate(h["lr"]),
        ),
        "betas",
    ),
    "ldsd_jaguar": ldsd(
        lambda h: optax.chain(
            zo.scale_by_coordinate_momentum(b1=h["beta"]),
            optax.scale_by_sign(),
            optax.scale_by_learning_rate(h["lr"]),
        ),
        *("beta", "params_ratio"),
    ),
    "zomuon_subspace": subspace,
    "zomuon_subspace4": subspace,
}
