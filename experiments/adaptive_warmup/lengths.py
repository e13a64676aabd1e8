"""Warm-up for Lion over 3 200 steps, by hand and adaptive; see lengths.md for the protocol.

python experiments/adaptive_warmup/lengths.py --prepare
python experiments/adaptive_warmup/lengths.py --seconds 540
"""

import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import optax
from methods import CLIP, OPTIMIZERS, Cells, Schedule, scheduled

from jaxopt_lab import models
from jaxopt_lab.schedules import warmup_kappa
from jaxopt_lab.sweep.decoder_runs import DecoderRuns
from jaxopt_lab.sweep.long_runs import Study, main
from jaxopt_lab.sweep.stored import Entry, best_cell, cell_file

LION = next(optimizer for optimizer in OPTIMIZERS if optimizer.name == "Lion")
RATES = (5e-5, 1e-4, 2e-4)
BY_HAND = (0, 1, 5, 10, 20, 40)  # percent of the steps
REFERENCE = "linear-10"


def entries(scale: DecoderRuns, directory: pathlib.Path) -> Sequence[Entry]:
    """Rows by hand first: the target of the adaptive ones comes from one of them."""
    axes = models.matrix_axes(scale.model())
    kappa = warmup_kappa(models.abstract_params(scale.model()), LION.norm, axes)

    def entry(row: Schedule) -> Entry:
        warmup = float(round(row.warmup * scale.steps))

        def build(cell: tuple[Any, ...]) -> optax.GradientTransformation:
            target = 0.0 if row.family == "linear" else target_of(directory, rows[REFERENCE])
            one = Cells(cell[0], warmup, kappa, target, LION.div_factor)
            return scheduled(LION, row.family, one, scale.steps, axes)

        return Entry(row.name, build, tuple((rate,) for rate in RATES))

    shares = {("none" if not x else f"linear-{x}"): x / 100 for x in BY_HAND}
    schedules = [Schedule(name, "linear", share) for name, share in shares.items()]
    schedules += [Schedule("exact", "exact"), Schedule("official", "official")]
    rows = {row.name: entry(row) for row in schedules}
    return list(rows.values())


def target_of(directory: pathlib.Path, reference: Entry) -> float:
    """Training loss of the reference row's best cell, last 100 steps, up to the next tenth."""
    found = best_cell(directory, [reference])
    if found is None:
        raise SystemExit(f"{reference.name} diverged at every rate; there is no target")
    run = json.loads(cell_file(directory, *found).read_text())
    return math.ceil(10 * run["train_last_100"]) / 10


STUDY = Study("lengths", entries, seeds=(1, 2, 3), clip=CLIP)

if __name__ == "__main__":
    main(STUDY, pathlib.Path(__file__).parent, __doc__.splitlines()[0])
