"""Shampoo in float64 NumPy, block by block without padding, from the specification."""

import numpy as np


def merged_from_right(shape, limit):
    """Adjacent dimensions multiplied together, from the right, while the product allows."""
    dims = [d for d in shape if d != 1] or [1]
    merged = [dims.pop()]
    while dims:
        d = dims.pop()
        if merged[0] * d <= limit:
            merged[0] *= d
        else:
            merged.insert(0, d)
    return tuple(merged)


def inverse_root(x, exponent, eps, relative=False):
    """(X + eps I)^-exponent, the spectrum shifted where round-off took it below eps."""
    if relative:
        eps = eps * max(np.linalg.eigvalsh(x)[-1], 0.0)
    values, vectors = np.linalg.eigh(x + eps * np.eye(len(x)))
    if values[0] < eps:
        values = values - values[0] + eps
    return (vectors * values**-exponent) @ vectors.T


def along(x, matrix, mode):
    """Multiply a tensor by a symmetric matrix along one mode."""
    return np.moveaxis(np.tensordot(matrix, x, (1, mode)), 0, mode)


def trajectory(w, grads, *, limit, merge, **options):
    """(T, *shape) weights after each step; merge says whether dimensions are merged."""
    squeezed = tuple(d for d in w.shape if d != 1) or (1,)
    shape = merged_from_right(w.shape, limit) if merge else squeezed
    w_blocks, g_blocks = w.reshape(shape), grads.reshape(len(grads), *shape)
    out = np.zeros((len(grads), *shape))
    starts = [range(0, d, limit) for d in shape]
    for corner in np.stack(np.meshgrid(*starts, indexing="ij"), -1).reshape(-1, len(shape)):
        block = tuple(slice(c, c + limit) for c in corner)
        out[(slice(None), *block)] = block_trajectory(
            w_blocks[block], g_blocks[(slice(None), *block)], **options
        )
    return out.reshape(len(grads), *w.shape)


def block_trajectory(
    w,
    grads,
    *,
    rate,
    b1,
    b2,
    eps,
    relative=False,
    frequency=1,
    start=None,
    exponent=None,
    bias_correction=True,
    graft=None,
    graft_b2=None,
    graft_eps=1e-8,
    b3=None,
    momentum=0.0,
    dampening=0.0,
    nesterov=False,
    decay=0.0,
    decay_type="decoupled",
):
    """(T, *shape) weights of one block after each step."""
    order, start = w.ndim, frequency if start is None else start
    p = 1 / (2 * order) if exponent is None else exponent
    factors = [np.zeros((d, d)) for d in w.shape]
    roots = [np.eye(d) for d in w.shape]
    m, squares, velocity = np.zeros_like(w), np.zeros_like(w), np.zeros_like(w)
    out = []
    for t, g in enumerate(grads, 1):
        if decay_type == "l2":
            g = g + decay * w
        for k in range(order):
            others = [j for j in range(order) if j != k]
            gram = np.tensordot(g, g, (others, others))
            factors[k] = factors[k] + gram if b2 == 1 else b2 * factors[k] + (1 - b2) * gram
        if t == start or (t > start and t % frequency == 0):
            for k in range(order):
                x = factors[k] / (1 - b2**t) if bias_correction and b2 < 1 else factors[k]
                roots[k] = inverse_root(x, p, eps, relative)
        if graft == "adagrad":
            squares = squares + g**2
        elif graft in ("adam", "rmsprop"):
            squares = graft_b2 * squares + (1 - graft_b2) * g**2
        look_ahead = m
        m = b1 * m + (1 - b1) * g
        if b3 is None:
            average, filled = m, 1 - b1**t
        else:
            average, filled = b3 * look_ahead + (1 - b3) * g, 1 - b3 * b1 ** (t - 1)
        average = average / filled if bias_correction else average
        grafted = average
        if graft == "adam":
            grafted = average / (np.sqrt(squares / (1 - graft_b2**t)) + graft_eps)
        elif graft in ("adagrad", "rmsprop"):
            grafted = average / (np.sqrt(squares) + graft_eps)
        if graft and t < start:
            direction = grafted
        else:
            direction = average
            for k in range(order):
                direction = along(direction, roots[k], k)
            if graft:
                direction = (
                    direction * np.linalg.norm(grafted) / (np.linalg.norm(direction) + 1e-16)
                )
        if decay_type == "decoupled":
            direction = direction + decay * w
        if momentum:
            velocity = momentum * velocity + (1 - dampening) * direction
            if nesterov:
                direction = (1 - dampening) * direction + momentum * velocity
            else:
                direction = velocity
        w = w - rate * direction
        out.append(w)
    return np.stack(out)
