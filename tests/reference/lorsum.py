"""LoRSum and F-LoRSum in NumPy, by forming the dense target and its normal equations."""

import numpy as np


def sweep(target, a0, b0, lam, *, sweeps=1, jitter=0.0, rows=None, columns=None, start="a"):
    """Alternating least squares on the dense target in the norm of the metric."""
    n, m = target.shape
    mr = np.eye(n) if rows is None else (np.diag(rows) if rows.ndim == 1 else rows)
    mc = np.eye(m) if columns is None else (np.diag(columns) if columns.ndim == 1 else columns)
    eye = np.eye(a0.shape[1])

    def left(b):
        return (lam * a0 + target @ mc @ b.T) @ np.linalg.inv(b @ mc @ b.T + (lam + jitter) * eye)

    def right(a):
        return np.linalg.inv(a.T @ mr @ a + (lam + jitter) * eye) @ (lam * b0 + a.T @ mr @ target)

    if sweeps == 0:
        return left(b0), right(a0)
    a, b = a0, b0
    for _ in range(sweeps):
        if start == "a":
            a = left(b)
            b = right(a)
        else:
            b = right(a)
            a = left(b)
    return a, b


def objective(target, a, b, a0, b0, lam, rows, columns):
    """What a half-step minimises over one factor."""
    dr, dc = np.sqrt(rows)[:, None], np.sqrt(columns)
    fit = np.sum((dr * (a @ b - target) * dc) ** 2)
    return (fit + lam * np.sum((dr * (a - a0)) ** 2) + lam * np.sum(((b - b0) * dc) ** 2)) / 2


class Run:
    """An optimizer of one adapter beside one other leaf, with every option written out."""

    def __init__(self, a, b, other, momentum, **options):
        self.a, self.b, self.other = a, b, other
        self.m_a, self.m_b = momentum
        self.rows, self.columns = np.ones(a.shape[0]), np.ones(b.shape[1])
        self.trace = None
        self.moments = [np.zeros_like(other), np.zeros_like(other)]
        self.t = 0
        self.options = {
            **{"rho": 1e-2, "sweeps": 1, "jitter": 0.0, "scale": 1.0, "clip": None, "start": "a"},
            **{"clip_scales_stats": True, "decay": 0.0, "scale_rho": True, "paper": False},
            **options,
        }

    def clipped(self, x, s, other):
        """Inputs for the statistics, the factor of the gradient, and the other leaf's gradient."""
        limit = self.options["clip"]
        if limit is None:
            return x, 1.0, other
        norm = np.sqrt(np.sum((x.T @ s) ** 2) + np.sum(other**2))
        q = min(1.0, limit / (norm + 1e-6))
        if self.options["clip_scales_stats"]:
            return q * x, 1.0, q * other
        return x, q, q * other

    def plain(self, x, s, other, rate, mu, damp):
        o = self.options
        x, q, other = self.clipped(x, s, other)
        g, m = q * (x.T @ s), self.m_a @ self.m_b
        lam = rate * o["rho"] if o["scale_rho"] else o["rho"]
        keywords = {"sweeps": o["sweeps"], "jitter": o["jitter"], "start": o["start"]}
        target = (1 - rate * o["decay"]) * self.a @ self.b
        target = target - rate / o["scale"] * ((1 - damp) * g + mu * m)
        new = sweep(target, self.a, self.b, lam, **keywords)
        self.m_a, self.m_b = sweep(mu * m + (1 - damp) * g, self.m_a, self.m_b, lam, **keywords)
        self.a, self.b = new
        self.trace = other if self.trace is None else mu * self.trace + (1 - damp) * other
        self.other = self.other - rate * self.trace

    def scaled(self, x, s, other, rate, b1, b2, damping, power, rest_rate):
        o = self.options
        x, q, other = self.clipped(x, s, other)
        self.t += 1
        self.rows = b2 * self.rows + (1 - b2) * np.mean(x**2, 0)
        self.columns = b2 * self.columns + (1 - b2) * len(x) * np.sum(s**2, 0)
        dr, dc = (self.rows + damping) ** power, (self.columns + damping) ** power
        g, m = q * (x.T @ s), self.m_a @ self.m_b
        lam = rate * o["rho"] if o["scale_rho"] else o["rho"]
        fresh = q * (x.T @ s) if o["paper"] else (1 - b1) * g
        step = (fresh + b1 * m) / dr[:, None] / dc
        target = (1 - rate * o["decay"]) * self.a @ self.b - rate / o["scale"] * step
        keywords = {"sweeps": o["sweeps"], "jitter": o["jitter"], "start": o["start"]}
        metric = {"rows": dr, "columns": dc}
        new = sweep(target, self.a, self.b, max(lam, 1e-5), **keywords, **metric)
        self.m_a, self.m_b = sweep(b1 * m + (1 - b1) * g, self.m_a, self.m_b, lam, **keywords)
        self.a, self.b = new
        mu, nu = self.moments
        self.moments = [0.9 * mu + 0.1 * other, 0.999 * nu + 0.001 * other**2]
        mu, nu = self.moments
        correction = np.sqrt(1 - 0.999**self.t) / (1 - 0.9**self.t)
        self.other = self.other - rest_rate * correction * mu / (np.sqrt(nu) + 1e-8)
