"""What comes after the last step: the summary, a sample, figures."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_lab import models
from jaxopt_lab.report.figures import loss_figure
from jaxopt_lab.report.files import write_json
from jaxopt_lab.report.progress import WAIT_WORTH_TELLING, error_of
from jaxopt_lab.report.schedule_figure import schedule_figure
from jaxopt_lab.step import Adapted, TrainState, merged
from jaxopt_lab.train.errors import TrainingError
from jaxopt_lab.train.finetuned import report
from jaxopt_lab.train.io.run_directory import SUMMARY_FILE
from jaxopt_lab.train.labelled import Labels
from jaxopt_lab.train.loop import FRESH_LOSS, Loop, Run
from jaxopt_lab.train.meter import peak_memory
from jaxopt_lab.train.program import averaged_params, optimizer_share
from jaxopt_lab.train.smoothness import fit_run
from jaxopt_lab.train.trained import whole

Message = Callable[[str], None]

_PROMPT_TOKENS = 32
_TEMPERATURE = 0.8
FIGURE = Path("figures") / "loss.png"
SCHEDULE_FIGURE = Path("figures") / "schedule.png"
SMOOTHNESS_FIGURE = Path("figures") / "smoothness.png"


def summary_of(
    run: Run, loop: Loop, state: TrainState, seconds: float, say: Message
) -> dict[str, Any]:
    """What a finished run has come to, as JSON values."""
    memory = {"step_memory_bytes": loop.step_bytes, **peak_memory()}
    return {
        "steps": int(state.step),
        "skipped": int(state.skipped),
        "parameters": run.program.parameters,
        "seconds": round(seconds, 1),
        "optimizer_share_of_flops": optimizer_share(run.program),
        "data_wait_share": loop.data_wait_share,
        "training_loss": loop.last_metrics.get("loss"),
        **_schedule_outcome(run, state, say),
        **loop.last_evaluation,
        **memory,
        **_trivial(run),
        "sample": _sample(run, state),
        **(report(run, state, say) if run.base is not None else {}),
    }


def _trivial(run: Run) -> dict[str, float]:
    """What is reached without learning."""
    about = run.program.task.evaluations["validation"].about
    names = ("unigram_nats", "unigram_bits_per_byte", "majority_accuracy")
    return {name: about[name] for name in names if name in about}


def write_report(run: Run, summary: Mapping[str, Any], say: Message) -> dict[str, Any]:
    """Writes and says how the run went; returns the summary, with what only a fit can tell."""
    if jax.process_index() != 0:
        return dict(summary)
    summary = {**summary, **_smoothness(run, say)}
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in summary.items()
    }
    write_json(run.directory / SUMMARY_FILE, finite)
    levels = {"unigram": summary["unigram_nats"]} if "unigram_nats" in summary else {}
    (run.directory / FIGURE).parent.mkdir(exist_ok=True)
    try:
        loss_figure(run.directory, run.directory / FIGURE, levels=levels)
        if run.program.outcome is not None:
            schedule_figure(run.directory, run.directory / SCHEDULE_FIGURE)
    except ValueError as error:
        raise TrainingError(
            f"{error}; the run is finished and saved, only figures are missing"
        ) from error
    if summary["sample"]:
        sample = summary["sample"]
        say(f"sample\n{sample['prompt']}\N{BLACK RIGHT-POINTING TRIANGLE}{sample['continuation']}")
    say(f"held-out loss {_held_out(summary)} after {summary['steps']} steps")
    say(_memory(summary))
    if stalled := _stalled(summary["data_wait_share"]):
        say(stalled)
    drawn = [FIGURE] if run.program.outcome is None else [FIGURE, SCHEDULE_FIGURE]
    place = run.checkpoints.run_directory
    say("\n".join(f"figure: {place / figure}" for figure in drawn))
    return summary


def _stalled(share: float | None) -> str | None:
    """Says that steps waited for their batches, where it is worth a word.

    >>> _stalled(0.234), _stalled(0.04), _stalled(None)
    ('input is a bottleneck: steps waited for data 23 % of their time', None, None)
    """
    if share is None or share < WAIT_WORTH_TELLING:
        return None
    return f"input is a bottleneck: steps waited for data {100 * share:.0f} % of their time"


def _memory(summary: Mapping[str, Any]) -> str:
    compiled = (
        f"memory of a compiled step: {summary['step_memory_bytes'] / 2**20:,.0f} MiB a device"
    )
    peak = summary.get("peak_memory_bytes")
    return compiled if peak is None else f"{compiled}, most in use: {peak / 2**20:,.0f} MiB"


def _held_out(summary: Mapping[str, Any]) -> str:
    error = summary.get(error_of("validation_loss"))
    beside = "" if error is None else f" \N{PLUS-MINUS SIGN} {error:.4f}"
    loss = f"{summary['validation_loss']:.4f}{beside} nats"
    if "validation_accuracy" in summary:
        right, majority = summary["validation_accuracy"], summary["majority_accuracy"]
        return f"{loss}/row, {100 * right:.2f} % right (most frequent label: {100 * majority:.2f})"
    bits, unigram = summary["bits_per_byte"], summary["unigram_bits_per_byte"]
    fresh = f", training {summary[FRESH_LOSS]:.4f}" if FRESH_LOSS in summary else ""
    return f"{loss}/token, {bits:.4f} bits/byte (unigram: {unigram:.4f}){fresh}"


def _schedule_outcome(run: Run, state: TrainState, say: Message) -> dict[str, Any]:
    """How a schedule went that followed the run; nothing for the others."""
    if run.program.outcome is None:
        return {}
    numbers, sentence = run.program.outcome(state.opt_state)
    say(sentence)
    return {"schedule": numbers}


def _sample(run: Run, state: TrainState) -> dict[str, str] | None:
    """A continuation of the beginning of the held-out text."""
    config, steps = run.config, run.config.eval.sample_tokens
    material = run.material
    if (
        not steps or jax.process_count() > 1 or isinstance(material, Labels)
    ):  # drawing token by token is not worth a network
        return None
    average = averaged_params(config, state)
    params: Any = merged(state.params if average is None else average, state.frozen)
    if isinstance(params, Adapted):
        params = whole(params.base, params.beside, run.program.trained)
    prompt = jnp.asarray(material.corpus.validation.tokens[:_PROMPT_TOKENS], jnp.int32)
    drawn = models.generate(
        config.model,
        params,
        prompt,
        steps=steps,
        temperature=_TEMPERATURE,
        key=jax.random.key(config.seed),
    )
    decode, start = material.corpus.tokenizer.decode, len(prompt)
    tokens = np.asarray(drawn)
    return {"prompt": decode(tokens[:start]), "continuation": decode(tokens[start:])}


def _smoothness(run: Run, say: Message) -> dict[str, Any]:
    diagnostics, figure = run.config.diagnostics, run.directory / SMOOTHNESS_FIGURE
    if "smoothness" not in diagnostics.record:
        return {}
    try:
        fitted = fit_run(run.directory, target_loss=diagnostics.target_loss, figure=figure)
    except ValueError as error:  # a short run, or a target above its losses; no reason to fail
        say(f"smoothness was not fitted: {error}")
        return {"smoothness": None}
    say(f"smoothness against the gap to {fitted['target_loss']:.4f} nats/token: {figure}")
    return {"smoothness": fitted}
