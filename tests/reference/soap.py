"""SOAP, and the loop that DyKAF shares with it: Adam in eigenbases that something else tracks.

Factors are lists with one entry an axis of the (merged) parameter, None where there is none.
`second_moment` is "full"; "rank_one" (DyKAF's: l r^T advanced by one integrator step); or
"factored" (SOAP's: row sums times column sums over their total).
"""

import string
from typing import Any, NamedTuple

import numpy as np


class Step(NamedTuple):
    params: np.ndarray
    momentum: np.ndarray  # in the basis of the parameters
    second: Any  # shape of the parameter; (l, r) or (rows, columns) if it has that form
    factors: list
    bases: list


def soap(w, grads, *, b2, factor_decay=None, one_sided=False, max_precond_dim=10_000, **options):
    """SOAP for one parameter: a list of `Step`s. `one_sided` keeps the smaller side of a matrix."""
    b = b2 if factor_decay is None else factor_decay
    weight = 1 - b if b < 1 else 1
    shape = merged(w.shape, max_precond_dim) if options.get("merge_dims") else w.shape
    kept = [d <= max_precond_dim for d in shape]
    if w.ndim == 1 and not options.pop("precondition_1d", False):
        kept = [False]
    options.pop("precondition_1d", None)
    if one_sided and len(shape) == 2 and all(kept):
        kept = [shape[0] <= shape[1], shape[0] > shape[1]]

    def step(factors, grad):
        if factors is None:
            factors = [np.zeros((d, d)) if k else None for d, k in zip(shape, kept, strict=True)]
        return [
            None if x is None else b * x + weight * gram(grad, axis)
            for axis, x in enumerate(factors)
        ]

    return eigenbasis_adam(w, grads, step, shape=shape, b2=b2, **options)


def eigenbasis_adam(
    w,
    grads,
    factor_step,
    *,
    rates,
    b1,
    b2,
    eps,
    frequency,
    decay=0.0,
    decay_after_step=True,
    correct_bias=True,
    normalize=False,
    second_moment="full",
    eps_in_rank_one=False,
    ignore_zero_start=False,
    shape=None,
    merge_dims=False,
    first_bases=None,
):
    """The whole trajectory; `rates` is a number or one a gradient, `first_bases` are injected."""
    del merge_dims
    shape = w.shape if shape is None else shape
    w = np.array(w, np.float64).reshape(shape)
    momentum, factors, bases, steps = np.zeros(shape), None, None, []
    k, second = 0, second_moment_start(shape, second_moment, eps)
    rates = np.broadcast_to(rates, len(grads))
    for raw, rate in zip(np.asarray(grads, np.float64), rates, strict=True):
        grad = raw.reshape(shape)
        if factors is None and ignore_zero_start and not grad.any():
            steps.append(Step(w, momentum, second, [], []))
            continue
        if factors is None:
            factors = factor_step(None, grad)
            bases = [None if x is None else eigenbasis(x) for x in factors]
            if first_bases is not None:
                bases = list(first_bases)
            steps.append(Step(w, momentum, second, factors, bases))
            continue
        k += 1
        momentum = b1 * momentum + (1 - b1) * grad
        second, size = second_moment_step(
            second, rotate(grad, bases) ** 2, second_moment, b2, eps, eps_in_rank_one
        )
        direction = rotate_back(rotate(momentum, bases) / size, bases)
        if normalize:
            direction = direction / (1e-30 + np.sqrt(np.mean(direction**2)))
        alpha = rate * (np.sqrt(1 - b2**k) / (1 - b1**k) if correct_bias else 1)
        if decay_after_step:
            w = w - alpha * direction
            w = w - rate * decay * w
        else:
            w = w - alpha * direction - rate * decay * w
        factors = factor_step(factors, grad)
        if k % frequency == 0:
            pairs = [refresh(x, q) for x, q in zip(factors, bases, strict=True)]
            bases = [q for q, _ in pairs]
            second = permute(second, [order for _, order in pairs])
        steps.append(Step(w, momentum, second, factors, list(bases)))
    return [in_original_shape(step, np.shape(grads)[1:]) for step in steps]


def merged(shape, limit):
    if not shape:
        return shape
    groups = [[shape[0]]]
    for d in shape[1:]:
        product = int(np.prod(groups[-1])) * d
        if product <= limit:
            groups[-1].append(d)
        else:
            groups.append([d])
    return tuple(int(np.prod(group)) for group in groups)


def gram(grad, axis):
    others = [a for a in range(grad.ndim) if a != axis]
    return np.tensordot(grad, grad, (others, others))


def eigenbasis(x):
    return np.linalg.eigh(x)[1][:, ::-1]


def refresh(x, q):
    if x is None:
        return None, None
    order = np.argsort(-np.diag(q.T @ x @ q), kind="stable")
    return np.linalg.qr(x @ q[:, order])[0], order


def rotate(x, bases):
    """Contract each axis with the columns of its basis."""
    for axis, q in enumerate(bases):
        if q is not None:
            x = along(x, q.T, axis)
    return x


def rotate_back(x, bases):
    return rotate(x, [None if q is None else q.T for q in bases])


def along(x, matrix, axis):
    letters = string.ascii_lowercase[: x.ndim]
    new = letters.replace(letters[axis], "z")
    return np.einsum(f"z{letters[axis]},{letters}->{new}", matrix, x)


def second_moment_start(shape, kind, eps):
    if kind == "full" or len(shape) != 2:
        return np.zeros(shape)
    start = eps if kind == "rank_one" else 0.0
    return tuple(np.full(d, start) for d in shape)


def second_moment_step(second, squares, kind, b2, eps, eps_in_rank_one):
    """The new second moment and the denominator."""
    if kind == "full" or squares.ndim != 2:
        second = b2 * second + (1 - b2) * squares
        return second, np.sqrt(second) + eps
    if kind == "factored":
        rows, columns = second
        rows = b2 * rows + (1 - b2) * squares.sum(1)
        columns = b2 * columns + (1 - b2) * squares.sum(0)
        total = rows.sum()
        estimate = np.outer(rows, columns) / total if total > 0 else np.zeros_like(squares)
        return (rows, columns), np.sqrt(estimate) + eps
    left, right = rank_one_step(*second, squares, b2)
    return (left, right), np.sqrt(np.outer(left, right)) + (eps if eps_in_rank_one else 0)


def rank_one_step(left, right, squares, b2):
    tau = b2 * np.linalg.norm(left) * np.linalg.norm(right)
    lh, rh = left / np.linalg.norm(left), right / np.linalg.norm(right)
    x = tau * lh + (1 - b2) * squares @ rh
    y = tau * rh + (1 - b2) * squares.T @ lh
    x, y = x / np.linalg.norm(x), y / np.linalg.norm(y)
    c = tau * (x @ lh) * (y @ rh) + (1 - b2) * x @ squares @ y
    return np.sqrt(c) * x, np.sqrt(c) * y


def permute(second, orders):
    if isinstance(second, tuple):
        pairs = zip(second, orders, strict=True)
        return tuple(x if order is None else x[order] for x, order in pairs)
    for axis, order in enumerate(orders):
        if order is not None:
            second = np.take(second, order, axis)
    return second


def in_original_shape(step, shape):
    second = step.second if isinstance(step.second, tuple) else step.second.reshape(shape)
    return step._replace(
        params=step.params.reshape(shape),
        momentum=step.momentum.reshape(shape),
        second=second,
    )
