"""Does LionMuon pass Muon as runs grow longer? See horizon.md for the protocol.

python experiments/lion_muon/horizon.py --prepare
python experiments/lion_muon/horizon.py --steps 800 --seconds 540
"""

import itertools
import pathlib
from collections.abc import Sequence
from typing import Any

import optax
from methods import Method

from jaxopt_lab import models
from jaxopt_lab.sweep.decoder_runs import DecoderRuns
from jaxopt_lab.sweep.long_runs import Study, main
from jaxopt_lab.sweep.stored import Entry

# Sign rate over spectral rate: the best of the nine cells of run.py.
SIGN_RATIO = 1 / 60
METHODS = (
    Method("Muon", 1, b2=0.9),
    Method("LionMuon P=1", 1),
    Method("LionMuon P=2", 2),
    Method("LionMuon P=2, b2 0.95", 2, b2=0.95),
)
SPECTRAL, ADAMW = (1.5e-3, 3e-3, 6e-3, 1.2e-2), (5e-4, 1e-3, 2e-3)
CELLS = tuple(itertools.product(SPECTRAL, ADAMW))


def entries(scale: DecoderRuns, directory: pathlib.Path) -> Sequence[Entry]:
    """Every method with the same grid of (spectral rate, AdamW rate)."""
    del directory
    schedule = optax.warmup_cosine_decay_schedule(0.01, 1.0, scale.warmup, scale.steps)
    axes = models.matrix_axes(scale.model())

    def entry(method: Method) -> Entry:
        def build(cell: tuple[Any, ...]) -> optax.GradientTransformation:
            spectral, adamw = cell
            return method.build(schedule, spectral, SIGN_RATIO * spectral, adamw, axes)

        return Entry(method.name, build, CELLS)

    return [entry(method) for method in METHODS]


STUDY = Study("horizon", entries, seeds=(1, 2, 3, 4), clip=None)

if __name__ == "__main__":
    main(STUDY, pathlib.Path(__file__).parent, __doc__.splitlines()[0])
