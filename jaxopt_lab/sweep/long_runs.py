"""The command of a study on source code that is too long for one call: in pieces, resumable."""

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxopt_lab import data, models
from jaxopt_lab.report.tables import format_table
from jaxopt_lab.sweep.blocks import PAIRED_RULE, paired_differences
from jaxopt_lab.sweep.decoder_runs import DecoderRuns
from jaxopt_lab.sweep.source_text import Text, open_text
from jaxopt_lab.sweep.stored import Budget, Entry, best_cell, cell_in_words, read_runs, run_entries
from jaxopt_lab.sweep.task import Task
from jaxopt_lab.tasks import language_model_loss

SWEEP_SEED = 0
SCALES = {
    "gpu": DecoderRuns(("site-packages",), 8192, 384, 6, 6, 256, 32, 3200, 200, 64, "bfloat16"),
    # Shows on two cores that the program works, and decides nothing.
    "trial": DecoderRuns(("stdlib",), 512, 32, 1, 2, 32, 4, 40, 20, 2, "float32"),
}


@dataclass(frozen=True)
class Study:
    """What is compared.

    Args:
      name: Begins the name of the directory of its results.
      entries: (size of the runs, directory of the results so far) -> the rows, in the order in
        which they are run; the first family is what the others are compared with.
      seeds: Of the final runs.
      clip: Largest global norm of the gradient; None where the optimizers clip.
    """

    name: str
    entries: Callable[[DecoderRuns, Path], Sequence[Entry]]
    seeds: tuple[int, ...]
    clip: float | None


def main(study: Study, home: Path, description: str) -> None:
    """Reads the command line; prepares text, runs what is missing, or prints the table.

    Args:
      study: What to run.
      home: Directory of the experiment.
      description: First line of the help.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--scale", choices=SCALES, default="gpu")
    parser.add_argument("--steps", type=int, help="of a run; 3200 by default")
    parser.add_argument("--only", nargs="*", help="families to run", metavar="NAME")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin nothing after that")
    parser.add_argument("--prepare", action="store_true", help="make the token files and stop")
    parser.add_argument("--report", action="store_true", help="print the table and stop")
    parser.add_argument("--corpus", type=Path, default=home / "corpus")
    parser.add_argument("--out", type=Path, default=home / "results")
    args = parser.parse_args()
    scale = SCALES[args.scale]
    if args.steps:
        scale = replace(scale, steps=args.steps, evaluate_every=max(1, args.steps // 16))
    directory = args.out / f"{study.name}-{args.scale}-{scale.steps}"
    entries = study.entries(scale, directory)
    if args.report:
        print(losses_table(directory, entries, study.seeds))
        return
    text = open_text(args.corpus / args.scale, scale.roots, scale.vocab_size)
    if args.prepare:
        return
    chosen = [each for each in entries if not args.only or each.shared in args.only]
    task = text_task(
        scale.model(), text, batch_size=scale.batch_size, steps=scale.steps,
        evaluate_every=scale.evaluate_every, clip=study.clip,
        held_out_windows=scale.validation_batches * scale.batch_size,
    )  # fmt: skip
    done = run_entries(
        task, chosen, directory, Budget(args.seconds),
        sweep_seed=SWEEP_SEED, seeds=study.seeds,
        conditions={
            "steps": scale.steps, "parameters": models.parameter_count(scale.model()),
            "batch": scale.batch_size, "context": scale.context, "corpus": text.facts["hash"],
            "device": jax.devices()[0].device_kind, "jax": jax.__version__,
        },
    )  # fmt: skip
    print("all runs are there" if done else "not all runs are there; call again", flush=True)


def text_task(
    config: models.DecoderConfig,
    text: Text,
    *,
    batch_size: int,
    steps: int,
    evaluate_every: int,
    held_out_windows: int,
    clip: float | None = None,
) -> Task:
    """What all runs share: held-out windows of all documents, training windows by seed.

    Args:
      config: The model.
      text: Its text.
      batch_size: Windows a step.
      steps: Of a run.
      evaluate_every: Steps between evaluations.
      held_out_windows: Windows of an evaluation, spread over all held-out documents.
      clip: Largest global norm of the gradient; None does not clip.
    """
    held_out = data.windows_of(
        text.validation, text.end_of_text, batch_size=batch_size, context=config.context,
        max_windows=held_out_windows,
    )  # fmt: skip

    def batches(seed: int, start: int, stop: int) -> Mapping[str, Any]:
        return {"tokens": text.windows(seed, start, stop, batch_size, config.context)}

    return Task(
        init_params=lambda key: models.init_params(config, key),
        loss=language_model_loss(config),
        batches=batches,
        held_out={n: np.stack([batch[n] for batch in held_out]) for n in held_out[0]},
        steps=steps,
        evaluate_every=evaluate_every,
        tokens_per_step=batch_size * config.context,
        clip=clip,
    )


def losses_table(directory: Path, entries: Sequence[Entry], seeds: Sequence[int]) -> str:
    """Final losses of every family, and differences to the first by the rule of paired seeds.

    Args:
      directory: Of the results.
      entries: The rows of the study.
      seeds: Of the final runs.
    """
    families = list(dict.fromkeys(entry.shared for entry in entries))
    found = {name: read_runs(directory, name, seeds) for name in families}
    complete = [name for name in families if len(found[name]) == len(seeds)]
    measures = {}
    for what in ("held_out", "train_last_100"):
        losses = {name: [last(run, what) for run in found[name]] for name in complete}
        finite = {name: x for name, x in losses.items() if np.isfinite(x).all()}
        measures[what] = paired_differences(finite) if len(finite) > 1 else {}
    rows = []
    for name in complete:
        entry, cell = best_cell(directory, [e for e in entries if e.shared == name]) or (None, 0)
        cells: list[Any] = [
            name,
            "" if entry is None else f"{entry.name}: {cell_in_words(entry, cell)}",
        ]
        for what, table in measures.items():
            each = table.get((name, families[0]))
            words = "" if each is None or each.counts else ", direction only"
            shown = "" if each is None else f"{each.value:+.4f} ± {each.standard_error:.4f}{words}"
            cells += [f"{np.mean([last(run, what) for run in found[name]]):.4f}", shown]
        seconds = np.mean([run["seconds"] / run["runs_at_once"] for run in found[name]])
        rows.append([*cells, f"{seconds:.0f}"])
    headers = [
        "row", "best cell", "held out [nats/token]", f"minus {families[0]}",
        "training, last 100 steps", f"minus {families[0]}", "seconds a run",
    ]  # fmt: skip
    absent = [name for name in families if name not in complete]
    note = f"Without all seeds: {', '.join(absent)}. No verdict.\n\n" if absent else ""
    return f"{note}{format_table(headers, rows, markdown=True)}\n\n{PAIRED_RULE}"


def last(run: Mapping[str, Any], what: str) -> float:
    """A final loss of a result file; NaN where the run has diverged.

    Args:
      run: The file.
      what: "held_out" or "train_last_100".
    """
    value = run[what][-1] if what == "held_out" else run[what]
    return math.nan if value is None else value
