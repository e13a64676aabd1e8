"""Model, rows and loss of the comparison, and a method on them as a program of lanes."""

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree
from methods import EPS, Given, Method
from optax.contrib import MuonDimensionNumbers

from jaxopt_lab import data, lora, models, sweep, tasks
from jaxopt_lab import zeroth_order as zo
from jaxopt_lab.data.tokenizer import make_tokenizer
from jaxopt_lab.step import Adapted, TrainState, backprop, forward_only
from jaxopt_lab.sweep.program import Program
from jaxopt_lab.sweep.task import start

TRAIN_ROWS, VALIDATION_ROWS, LENGTH, BATCH = 1_000, 512, 64, 16
HELD_OUT = 64  # rows at a time
ADAPTERS = 2**31  # folded into the key of a run for their start


@dataclass(frozen=True)
class Setting:
    """What all rows share."""

    config: models.DecoderConfig
    base: PyTree  # on the device
    logits: Any
    rows: dict[str, tasks.Rows]  # of the splits
    spec: lora.LoraSpec  # of the adapters
    passes: int  # forward passes a run

    def steps(self, method: Method) -> tuple[int, int]:
        """Evaluations of a run, about 20, and steps between two, such that few steps are lost."""
        steps = self.passes * method.longer // method.passes
        every = max(range(max(1, steps // 26), steps // 14 + 2), key=lambda n: (steps // n * n, -n))
        return steps // every, every


def open_setting(*, trial: bool) -> Setting:
    """Reads model and texts; for a trial of the program, a small random model and few rows."""
    passes, held_out = (64, 64) if trial else (5_000, 2_000)
    directory = data.find("smollm2")
    config, params = models.load_gguf(next(directory.glob("*.gguf")))
    # A loop over layers compiles once; lanes want the attention that is written in JAX.
    config = replace(config, loop="scanned", attention="xla", context=LENGTH, fused_qkv_as="three")
    if trial:
        config = replace(config, width=12, depth=2, heads=3, kv_heads=3, hidden=16)
        params = models.init_params(config, jax.random.key(0))
    corpus = data.prepare_labelled(data.MovieSentences())
    saved = data.TokenizerConfig("saved", config.vocab_size, str(directory))
    tokenizer = make_tokenizer(saved, corpus.train.texts)
    prompt = tasks.PROMPTS["movie-sentences"]
    rows = tasks.prompt_rows(config, corpus, tokenizer, prompt, length=LENGTH)
    chosen = np.random.default_rng(0).permutation(len(rows["train"].label))[:TRAIN_ROWS]
    rows["train"] = tasks.Rows(*(x[np.sort(chosen)] for x in rows["train"]))
    for name, count in (("validation", min(held_out, VALIDATION_ROWS)), ("test", held_out)):
        rows[name] = tasks.Rows(*(x[:count] for x in rows[name]))
    words = tasks.word_tokens(prompt, corpus, tokenizer)
    axes, names = models.matrix_axes(config), models.matrix_names(config)
    adapters = lora.LoraConfig(rank=8, alpha=16, target=("q_proj", "v_proj"))
    spec = lora.resolve(adapters, models.abstract_params(config), axes, names)
    base = jax.tree.map(jnp.asarray, params)
    return Setting(config, base, tasks.prompt_logits(config, words), rows, spec, passes)


class Lanes:
    """Runs of one method that advance together, each with the best of its checkpoints."""

    def __init__(self, setting: Setting, method: Method, runs: list[sweep.Run]) -> None:
        """Compiles nothing.

        Args:
          setting: What all rows share.
          method: The row.
          runs: Rate and seed of every lane.
        """
        self.setting, self.method, self.runs = setting, method, runs
        self.evaluations, self.every = setting.steps(method)
        self.task, one_seed = self._task(), len({run.seed for run in runs}) == 1
        self.program = Program(self.task, self._build(), len(runs), one_seed=one_seed)
        self._of_seed = None if one_seed else 0

    def start(self) -> TrainState:
        """The state before the first step, from the model's weights."""
        seeds = jnp.array([run.seed for run in self.runs], jnp.int32)
        begin = jax.jit(self._start)
        return begin(self.rates(), seeds if self._of_seed == 0 else seeds[0], self.setting.base)

    def rates(self) -> Array:
        """(lanes,)."""
        return jnp.array([run.rate for run in self.runs], jnp.float32)

    def batches(self, number: int) -> dict[str, np.ndarray]:
        """What the lanes read between two evaluations."""
        begin = number * self.every
        found = [self.task.batches(run.seed, begin, begin + self.every) for run in self.runs]
        if self._of_seed is None:
            return found[0]
        return {name: np.stack([of_lane[name] for of_lane in found]) for name in found[0]}

    def params(self, moving: PyTree, lane: int) -> tuple[PyTree, PyTree]:
        """Parameters of a lane, and what stands beside them."""
        own = jax.tree.map(lambda x: x[lane], moving)
        if self.method.moves == "full":
            return own, None
        return self.setting.base, lora.side(own, self.setting.spec)

    def _start(self, rates: Array, seeds: Array, base: PyTree) -> TrainState:
        task = replace(self.task, init_params=functools.partial(self._params, base))
        begin = functools.partial(start, task, self._build())
        vmapped = jax.vmap(begin, (0, self._of_seed), self.program.state_axes)
        return vmapped(rates, seeds)

    def _params(self, base: PyTree, key: Array) -> PyTree:
        if self.method.moves == "full":
            return base
        return Adapted(base, lora.init(jax.random.fold_in(key, ADAPTERS), self.setting.spec, base))

    def _loss(self, params: PyTree, batch: Any, key: Any, side: Any = None) -> Any:
        if isinstance(params, Adapted):
            params, side = params.base, lora.side(params.beside, self.setting.spec)
        return tasks.classification_loss(self.setting.logits)(params, batch, key, side=side)

    def _layouts(self) -> PyTree:
        if self.method.moves == "full":
            return models.matrix_axes(self.setting.config)
        beside = jax.eval_shape(lambda: self._params(self.setting.base, jax.random.key(0)).beside)
        return jax.tree.map(lambda x: MuonDimensionNumbers(x.ndim - 2, x.ndim - 1), beside)

    def _build(self) -> Any:
        method, eps, layouts = self.method, EPS[self.method.moves], self._layouts()
        steps = self.evaluations * self.every
        schedule = optax.cosine_decay_schedule(1.0, steps, alpha=0.1)

        def build(rate: Any, key: Array | None = None) -> optax.GradientTransformation:
            options = {"eps": eps, "key": key}
            probes = functools.partial(zo.Probes, matrix_axes=layouts)
            return method.build(Given(lambda count: rate * schedule(count), options, probes))

        return build

    def _task(self) -> sweep.Task:
        rows, method = self.setting.rows["train"], self.method
        shapes = models.abstract_params(self.setting.config)

        def unread(key: Array) -> PyTree:
            # Only which leaves depend on the key is asked of it.
            return self._params(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), key)

        def batches(seed: int, begin: int, end: int) -> dict[str, np.ndarray]:
            taken, order = np.arange(begin * BATCH, end * BATCH), np.random.default_rng(seed)
            count = len(rows.label)
            epochs = [order.permutation(count) for _ in range(taken[-1] // count + 1)]
            chosen = np.concatenate(epochs)[taken].reshape(end - begin, BATCH)
            return {name: x[chosen] for name, x in rows._asdict().items()}

        held_out = self.setting.rows["validation"]._asdict()
        return sweep.Task(
            init_params=unread,
            loss=self._loss,
            batches=batches,
            held_out={n: x.reshape(-1, HELD_OUT, *x.shape[1:]) for n, x in held_out.items()},
            steps=self.evaluations * self.every,
            evaluate_every=self.every,
            tokens_per_step=BATCH * LENGTH,
            clip=None if method.perturbed else 1.0,
            gradient=forward_only(perturbed=method.perturbed) if method.perturbed else backprop,
            keyed=method.perturbed is not None,
        )
