"""WeightLoRA+ in arrays that keep their shape, against the library's, whose shapes change.

python experiments/finetune/checks.py
"""

import jax
import jax.numpy as jnp
import numpy as np
from growth import grown
from methods import EVERY, HALVINGS, METHODS
from program import Scale, loss_of, spec_of, start, step_of

import jaxopt_lab as jol
from jaxopt_lab.models import EncoderConfig, encoder
from jaxopt_lab.step import Adapted, Step

STEPS = 40


def main() -> None:
    """Prints the largest difference of 40 losses on a small random encoder."""
    jax.config.update("jax_enable_x64", True)
    config = EncoderConfig(
        vocab_size=64, width=48, depth=6, heads=4, context=16, classes=2, param_dtype="float64",
        compute_dtype="float64",
    )  # fmt: skip
    key = jax.random.key(0)
    base = encoder.init_params(config, key)
    tokens = jax.random.randint(key, (STEPS, 8, 12), 0, 64)
    rest = {"mask": jnp.ones((8, 12), bool), "label": jnp.arange(8) % 2, "kept": jnp.ones(18)}
    batches = [{"tokens": each, **rest} for each in tokens]
    method = next(method for method in METHODS if method.kind == "grown")
    scale = Scale(STEPS, 1, 8, 1, 1, None)

    params, _, spec = start(config, method, base, key)
    step = step_of(scale, config, method, spec, 1e-2, 1)
    take = jax.jit(step.take)
    state, here = step.start(params, key), []
    for number, batch in enumerate(batches):
        state, metrics = take(state, batch)
        state = grown(step.tx, state, jnp.asarray(number + 1), key)
        here.append(float(metrics["loss"]))

    spec = spec_of(config, method, method.rank)
    params = Adapted(params.base, jol.lora.init(jax.random.fold_in(key, 2), spec, params.base))
    tx, there = step.tx, []
    taker = Step(loss_of(config, spec, method, dropout=True), tx, guarded=False, clip=step.clip)
    state = taker.start(params, key)
    for number, batch in enumerate(batches):
        state, metrics = taker.take(state, batch)
        there.append(float(metrics["loss"]))
        if number + 1 in [EVERY * round for round in range(1, HALVINGS + 1)]:
            new = jol.lora.select_and_grow(state.params, spec, tx, state.opt_state, key)
            spec = new.spec
            taker = Step(
                loss_of(config, spec, method, dropout=True), tx, guarded=False, clip=step.clip
            )
            state = state._replace(params=new.adapters, opt_state=new.state)
    entry = spec.adapters[0]
    print(f"{len(entry.kept)} adapters of rank {entry.rank} in the library")
    print(f"loss {there[0]:.4f} to {there[-1]:.4f}")
    print(f"largest difference {np.max(np.abs(np.subtract(here, there))):.1e}")


if __name__ == "__main__":
    main()
