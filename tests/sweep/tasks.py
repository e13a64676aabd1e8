"""A task whose step costs microseconds: the bigram model of the trainer's tests."""

import numpy as np

from jaxopt_lab.sweep import Task
from tests.train.stand_in import batch_at, init_params, loss_fn

ROWS, LENGTH, STEPS = 8, 9, 6


def batches(seed, start, stop):
    rows = [batch_at(1000 * seed + step, ROWS, LENGTH)["tokens"] for step in range(start, stop)]
    return {"tokens": np.stack(rows)}


TASK = Task(
    init_params=init_params,
    loss=loss_fn,
    batches=batches,
    held_out=batches(99, 0, 2),
    steps=STEPS,
    evaluate_every=3,
    tokens_per_step=ROWS * (LENGTH - 1),
    clip=0.5,
)
