"""DyKAF, SOAP and Shampoo over 3 200 steps and eight seeds; see longer.md for the protocol.

python experiments/dykaf/longer.py --prepare
python experiments/dykaf/longer.py --seconds 540
"""

import itertools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import optax
from methods import CLIP, WEIGHT_DECAY, Method

import jaxopt_lab as jol
from jaxopt_lab import models
from jaxopt_lab.sweep.decoder_runs import DecoderRuns
from jaxopt_lab.sweep.long_runs import Study, main
from jaxopt_lab.sweep.stored import Entry

ROTATED, DYKAF, ADAMW = (1.5e-3, 3e-3, 6e-3), (2.5e-3, 5e-3, 1e-2), (5e-4, 1e-3, 2e-3)
RULES: dict[str, tuple[Callable[..., optax.GradientTransformation], tuple[float, ...]]] = {
    "SOAP": (jol.scale_by_soap, ROTATED),
    "DyKAF": (jol.scale_by_dykaf, DYKAF),
    "Shampoo": (jol.scale_by_shampoo, ROTATED),
}


def entries(scale: DecoderRuns, directory: pathlib.Path) -> Sequence[Entry]:
    """Every method and average of the second moment, with a grid of (rate, AdamW rate)."""
    del directory
    schedule = optax.warmup_cosine_decay_schedule(0.01, 1.0, scale.warmup, scale.steps)
    axes = models.matrix_axes(scale.model())

    def entry(name: str, b2: float) -> Entry:
        scale_by, rates = RULES[name]

        def rule(matrix_axes: Any) -> optax.GradientTransformation:
            direction = scale_by(b1=0.95, b2=b2, precondition_frequency=10, matrix_axes=matrix_axes)
            return optax.chain(direction, optax.add_decayed_weights(WEIGHT_DECAY))

        method = Method(name, rates, rule)

        def build(cell: tuple[Any, ...]) -> optax.GradientTransformation:
            return method.build(*cell, schedule, axes)

        cells = tuple(itertools.product(rates, ADAMW))
        return Entry(f"{name}, b2 {b2:g}", build, cells, family=name)

    return [entry(name, b2) for name in RULES for b2 in (0.95, 0.99)]


STUDY = Study("longer", entries, seeds=tuple(range(1, 9)), clip=CLIP)

if __name__ == "__main__":
    main(STUDY, pathlib.Path(__file__).parent, __doc__.splitlines()[0])
