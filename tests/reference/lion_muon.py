"""LionMuon and the heavy-ball classes for one matrix, the AdamW fallback for anything else.

`rate_factors` multiplies the scheduled rate before each step; None means ones. Matrices are
(out, in); a parameter with more axes is taken as (dim0, rest).
"""

from typing import NamedTuple

import numpy as np

from tests.reference.spectral import newton_schulz, stable_rank


class Trajectory(NamedTuple):
    params: np.ndarray  # (T, *shape), after each step
    buffers: dict[str, np.ndarray]  # after the last step
    directions: np.ndarray  # (T, *matrix shape), before the rate; scale included
    spectral: np.ndarray  # (T,) bool, branch taken


def lion_muon(
    w,
    grads,
    *,
    rate,
    sign_rate,
    b1,
    b2,
    period,
    ns_steps,
    decay=0.0,
    rate_factors=None,
    stable_rank_threshold=0.0,
    probes=None,
    orthogonalise=newton_schulz,
):
    """Alternate 0.2 sqrt(max(m, n)) NS(D) and sign(D); one buffer M, two averaging constants."""
    shape, w, grads = w.shape, _matrix(w), grads.reshape(len(grads), *_matrix(w).shape)
    momentum = np.zeros_like(w)
    log = _Log()
    for t, (grad, factor) in enumerate(_stream(grads, rate_factors)):
        direction = b1 * momentum + (1 - b1) * grad
        if stable_rank_threshold > 0:
            spectral = stable_rank(direction, probes[t]) <= stable_rank_threshold * min(w.shape)
        else:
            spectral = period <= 1 or t % period == 0
        if spectral:
            update = 0.2 * np.sqrt(max(w.shape)) * orthogonalise(direction, ns_steps)
            eta = factor * rate
        else:
            update, eta = np.sign(direction), factor * sign_rate
        momentum = b2 * momentum + (1 - b2) * grad
        w = (1 - eta * decay) * w - eta * update
        log.add(w, update, spectral)
    return log.trajectory(shape, exp_avg=momentum)


def sign_muon_legacy(
    w,
    grads,
    *,
    rate,
    cheap_rate,
    momentum,
    nesterov,
    period,
    ns_steps,
    cheap_mode,
    sign_scaling="none",
    cheap_ns_steps=2,
    decay=0.0,
    rate_factors=None,
    stable_rank_threshold=0.0,
    probes=None,
):
    """Heavy-ball SignMuon: only the spectral rate is scheduled; four kinds of cheap step."""
    m, n = w.shape
    scale = 0.2 * np.sqrt(max(m, n))
    fan = np.sqrt(max(1, m / n))
    factors = {"none": 1.0, "frob": max(m, n) ** -0.5, "muon": fan * max(m, n) ** -0.5}
    buffer = np.zeros_like(w)
    cached = None
    log = _Log()
    for t, (grad, factor) in enumerate(_stream(grads, rate_factors)):
        buffer = momentum * buffer + grad
        direction = grad + momentum * buffer if nesterov else buffer
        if stable_rank_threshold > 0:
            spectral = stable_rank(buffer, probes[t]) <= stable_rank_threshold * min(m, n)
        else:
            spectral = period <= 1 or t % period == 0
        eta = factor * rate if spectral else cheap_rate
        if spectral:
            update = cached = scale * newton_schulz(direction, ns_steps)
        elif cheap_mode == "sign":
            update = factors[sign_scaling] * np.sign(direction)
        elif cheap_mode == "cheap_ns":
            update = scale * newton_schulz(direction, cheap_ns_steps)
        elif cheap_mode == "cached" and cached is not None:
            update = cached
        else:
            update = direction / (np.linalg.norm(direction) + 1e-7) * np.sqrt(min(m, n)) * fan
        w = (1 - eta * decay) * w - eta * update
        log.add(w, update, spectral)
    buffers = {"momentum_buffer": buffer}
    if cached is not None:
        buffers["cached_direction"] = cached
    return log.trajectory(w.shape, **buffers)


def muon(w, grads, *, rate, momentum, nesterov, ns_steps, decay=0.0, rate_factors=None):
    """The Muon class: scale sqrt(max(1, m/n)); without Nesterov the raw gradient is used."""
    m, n = w.shape
    buffer = np.zeros_like(w)
    log = _Log()
    for grad, factor in _stream(grads, rate_factors):
        buffer = momentum * buffer + grad
        direction = grad + momentum * buffer if nesterov else grad
        update = np.sqrt(max(1, m / n)) * newton_schulz(direction, ns_steps)
        w = (1 - factor * rate * decay) * w - factor * rate * update
        log.add(w, update, True)
    return log.trajectory(w.shape, momentum_buffer=buffer)


def d_muon(w, grads, *, rate, momentum, nesterov, ns_steps, rms=0.2, decay=0.0, rate_factors=None):
    """DistributedMuon: scale 0.2 sqrt(max(m, n)); without Nesterov the buffer is used."""
    buffer = np.zeros_like(w)
    log = _Log()
    for grad, factor in _stream(grads, rate_factors):
        buffer = momentum * buffer + grad
        direction = grad + momentum * buffer if nesterov else buffer
        update = rms * np.sqrt(max(w.shape)) * newton_schulz(direction, ns_steps)
        w = (1 - factor * rate * decay) * w - factor * rate * update
        log.add(w, update, True)
    return log.trajectory(w.shape, muon_buffer=buffer)


def adamw_fallback(w, grads, *, rate, b1, b2, eps, decay=0.0, rate_factors=None):
    """AdamW with epsilon added to the uncorrected root of the second moment."""
    m, v = np.zeros_like(w), np.zeros_like(w)
    log = _Log()
    for j, (grad, factor) in enumerate(_stream(grads, rate_factors), start=1):
        m = b1 * m + (1 - b1) * grad
        v = b2 * v + (1 - b2) * grad * grad
        update = np.sqrt(1 - b2**j) / (1 - b1**j) * m / (np.sqrt(v) + eps)
        w = (1 - factor * rate * decay) * w - factor * rate * update
        log.add(w, update, False)
    return log.trajectory(w.shape, moment1=m, moment2=v)


def lion(w, grads, *, rate, b1, b2, decay=0.0, rate_factors=None):
    """Lion with decoupled decay."""
    momentum = np.zeros_like(w)
    log = _Log()
    for grad, factor in _stream(grads, rate_factors):
        update = np.sign(b1 * momentum + (1 - b1) * grad)
        w = (1 - factor * rate * decay) * w - factor * rate * update
        momentum = b2 * momentum + (1 - b2) * grad
        log.add(w, update, False)
    return log.trajectory(w.shape, exp_avg=momentum)


def heavy_ball(
    w,
    grads,
    *,
    kind,
    rate,
    momentum,
    dampening=0.0,
    nesterov=False,
    init_buffer="zeros",
    decay=0.0,
    rate_factors=None,
):
    """Signum (`kind="sign"`) and NormalizedSGD (`kind="norm"`); no buffer when momentum is 0."""
    buffer = np.zeros_like(w)
    log = _Log()
    for t, (grad, factor) in enumerate(_stream(grads, rate_factors)):
        eta = factor * rate
        w = (1 - eta * decay) * w
        if t == 0 and init_buffer == "params":
            buffer = w
        direction = grad
        if momentum:
            buffer = momentum * buffer + (1 - dampening) * grad
            direction = grad + momentum * buffer if nesterov else buffer
        normalised = direction / (np.linalg.norm(direction) + 1e-8)
        update = np.sign(direction) if kind == "sign" else normalised
        w = w - eta * update
        log.add(w, update, False)
    return log.trajectory(w.shape, **({"momentum_buffer": buffer} if momentum else {}))


class _Log:
    def __init__(self):
        self.rows = []

    def add(self, w, update, spectral):
        self.rows.append((w, update, spectral))

    def trajectory(self, shape, **buffers):
        params, directions, spectral = map(np.array, zip(*self.rows, strict=True))
        return Trajectory(params.reshape(-1, *shape), buffers, directions, spectral)


def _matrix(w):
    return w.reshape(w.shape[0], -1)


def _stream(grads, rate_factors):
    factors = np.ones(len(grads)) if rate_factors is None else rate_factors
    # Stored gradients are float32; products such as (1 - b1) g must be formed in float64.
    return zip(np.asarray(grads, np.float64), factors, strict=True)
