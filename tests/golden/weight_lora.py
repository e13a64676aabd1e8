"""Replay of WeightLoRA and WeightLoRA+ in a closed loop: eight parallel adapters of one stack."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxopt_lab import lora
from jaxopt_lab.core.matrices import MatrixAxes
from tests.golden.harness import Case, Check, NotUnderstood, Result

TOLERANCE = 1e-10
KNOWN = {
    *("lr", "lrw", "wd", "k", "F", "mfs", "ext", "alpha", "scale", "beta1", "beta2", "eps"),
    "schedule",
}
ARRAYS = {
    *("W", "A0", "B0", "X", "Y", "omega", "A", "B", "rank", "g_omega", "g_A", "g_B"),
    *("chosen", "loss", "lr", "lr_w"),
}
PATH = ("w", "kernel")


def replay(case: Case) -> list[Result]:
    """All comparisons of one case."""
    numbers = case.sidecar["hyperparameters"]
    unknown = set(numbers) - KNOWN
    if unknown:
        raise NotUnderstood(f"unknown hyperparameters: {', '.join(sorted(unknown))}")
    extra = {n for n in case.arrays if n not in ARRAYS and not n.startswith("noise_")}
    if extra:
        raise NotUnderstood(f"unknown arrays {', '.join(sorted(extra))}")
    with jax.enable_x64(True):
        checks = list(_checks(case, numbers))
    worst: dict[str, Check] = {}
    for check in checks:
        if check.what not in worst or check.severity > worst[check.what].severity:
            worst[check.what] = check
    return [Result(f"{case.family}/{case.name}", tuple(worst.values()))]


def _checks(case: Case, numbers: Any):
    arrays = {name: np.asarray(x) for name, x in case.arrays.items()}
    adapters, spec = _start(arrays, numbers["scale"])
    tx = _optimizer(case, numbers, arrays)
    state, step = tx.init(adapters), _compiled(tx, arrays, numbers["scale"])
    plus = case.sidecar["method"] == "WeightLoRA+"
    for t in range(len(arrays["X"])):
        (entry,) = spec.adapters
        active = np.asarray(entry.kept)
        adapters, state, loss, grads = step(adapters, state, jnp.asarray(t), jnp.asarray(active))
        yield Check.of("loss", loss, arrays["loss"][t], TOLERANCE)
        for ours, theirs in (("a", "g_A"), ("b", "g_B"), ("weight", "g_omega")):
            wanted = _trimmed(arrays[theirs][t][active], entry.rank, ours)
            yield Check.of(theirs, grads["w"]["kernel"][ours], wanted, TOLERANCE)
        if plus and (t + 1) % numbers["F"] == 0 and t + 1 <= numbers["F"] * numbers["mfs"]:
            options = {"growth": numbers["ext"], "max_rank": 1 << 30}
            draws = _draws(arrays, t, active, arrays["chosen"][t])
            key = jax.random.key(0)
            adapters, spec, state = lora.select_and_grow(
                adapters, spec, tx, state, key, draws={PATH: jnp.asarray(draws)}, **options
            )
        (entry,) = spec.adapters
        active, node = np.asarray(entry.kept), adapters["w"]["kernel"]
        chosen = arrays["chosen"][t]
        ours = np.zeros(len(chosen))
        ours[active] = np.asarray(node["weight"])
        yield Check.of("omega", ours, arrays["omega"][t + 1], TOLERANCE)
        mine = np.isin(np.arange(len(chosen)), active) if plus else ours != 0
        yield Check.of("chosen", mine, chosen, 0.0)
        for name in ("a", "b"):
            wanted = _trimmed(arrays[name.upper()][t + 1][active], entry.rank, name)
            yield Check.of(name.upper(), node[name], wanted, TOLERANCE)
        ranks = np.full(len(active), entry.rank)
        yield Check.of("rank", ranks, arrays["rank"][t + 1][active], 0.0)


def _trimmed(padded: np.ndarray, rank: int, name: str) -> np.ndarray:
    """Without the padding beyond the rank."""
    if name == "weight":
        return padded
    return padded[:, :, :rank] if name == "a" else padded[:, :rank]


def _draws(arrays: Any, t: int, active: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Draws of the adapters that survive, in their order; two each for a restart, side by side."""
    names = sorted(n for n in arrays if n.startswith("noise_") and n.endswith(f"_step{t}"))
    each = len(names) // len(active)
    draws = np.stack([arrays[n] for n in names]).reshape(len(active), each, *arrays[names[0]].shape)
    return np.concatenate(list(np.moveaxis(draws[chosen[active]], 1, 0)), -1)


def _start(arrays: Any, scale: float) -> tuple[lora.Adapters, lora.LoraSpec]:
    count, n, r = arrays["A0"].shape
    shape = (count, n, arrays["B0"].shape[2])
    names = tuple(map(str, range(count)))
    entry = lora.AdapterSpec(
        PATH, shape, MatrixAxes((0,), (1,), (2,)), tuple(range(count)), r, scale, names
    )
    spec = lora.LoraSpec(lora.LoraConfig(rank=r, weights=True), (entry,))
    node = {"a": arrays["A0"], "b": arrays["B0"], "weight": np.ones(count)}
    return {"w": {"kernel": jax.tree.map(jnp.asarray, node)}}, spec


def _optimizer(case: Case, numbers: Any, arrays: Any) -> optax.GradientTransformationExtraArgs:
    rates = {name: jnp.asarray(arrays[name]) for name in ("lr", "lr_w")}
    common = {
        "weight_learning_rate": lambda count: rates["lr_w"][count],
        "b1": numbers["beta1"],
        "b2": numbers["beta2"],
        "eps": numbers["eps"],
        "weight_decay": numbers["wd"],
        "every": numbers["F"],
    }
    match case.sidecar["method"]:
        case "WeightLoRA":
            return lora.weight_lora(lambda count: rates["lr"][count], keep=numbers["k"], **common)
        case "WeightLoRA+":
            return lora.weight_lora_plus(
                lambda count: rates["lr"][count], halvings=numbers["mfs"], **common
            )
        case method:
            raise NotUnderstood(f"unknown method {method!r}")


def _compiled(tx: optax.GradientTransformationExtraArgs, arrays: Any, scale: float):
    x, y, w = (jnp.asarray(arrays[name]) for name in ("X", "Y", "W"))

    def loss(adapters: Any, t: Any, active: Any) -> Any:
        node = adapters["w"]["kernel"]
        increments = node["weight"][:, None, None] * scale * (node["a"] @ node["b"])
        out = jnp.einsum("bin,inm->bm", x[t], w) + jnp.einsum(
            "bin,inm->bm", x[t][:, active], increments
        )
        return 0.5 * jnp.mean(jnp.sum(jnp.square(out - y[t]), 1))

    @jax.jit
    def step(adapters: Any, state: Any, t: Any, active: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(adapters, t, active)
        updates, state = tx.update(grads, state, adapters)
        return optax.apply_updates(adapters, updates), state, value, grads

    return step
