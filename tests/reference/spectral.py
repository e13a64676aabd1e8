"""Newton-Schulz, exact polar factor, stable rank, and norms in float64."""

import ml_dtypes
import numpy as np

QUINTIC = (3.4445, -4.7750, 2.0315)


def newton_schulz(x, steps, coefficients=QUINTIC):
    """The quintic iteration on the wide orientation, in the dtype of `x`."""
    a, b, c = coefficients
    tall = x.shape[0] > x.shape[1]
    x = x / (np.linalg.norm(x) + 1e-7)
    x = x.T if tall else x
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + (c * gram) @ gram) @ x
    return x.T if tall else x


def newton_schulz_bf16(x, steps, coefficients=QUINTIC):
    """The same, rounded to bfloat16 after every elementary operation; returned as float32."""
    a, b, c = (np.float32(k) for k in coefficients)
    tall = x.shape[0] > x.shape[1]
    x = bf16(x.astype(np.float32))
    norm = bf16(np.sqrt(np.sum(x.astype(np.float64) ** 2)))
    x = bf16(x / bf16(norm + np.float32(1e-7)))
    x = x.T if tall else x
    for _ in range(steps):
        gram = bf16(x @ x.T)
        inner = bf16(bf16(b * gram) + bf16(bf16(c * gram) @ gram))
        x = bf16(bf16(a * x) + bf16(inner @ x))
    return x.T if tall else x


def bf16(x):
    """Round to bfloat16; the value stays in float32, where products of two such are exact."""
    return np.asarray(x).astype(ml_dtypes.bfloat16).astype(np.float32)


def polar(x):
    """The exact polar factor of a full-rank matrix."""
    u, _, vt = np.linalg.svd(x, full_matrices=False)
    return u @ vt


def top_singular_value(x, start, iterations=3):
    """Power iteration from `start`; a lower bound of the largest singular value."""
    v = start
    for _ in range(iterations):
        u = x @ v
        u = u / (np.linalg.norm(u) + 1e-7)
        v = x.T @ u
        v = v / (np.linalg.norm(v) + 1e-7)
    return np.linalg.norm(x @ v)


def stable_rank(x, start, iterations=3):
    """Squared Frobenius norm over the squared estimate of the largest singular value."""
    return np.sum(x**2) / (top_singular_value(x, start, iterations) ** 2 + 1e-12)


def norms(x):
    """Entrywise l1, largest entry, Frobenius, spectral and nuclear norm."""
    s = np.linalg.svd(x, compute_uv=False)
    return {
        "1": np.abs(x).sum(),
        "inf": np.abs(x).max(),
        "F": np.sqrt(np.sum(x**2)),
        "2": s.max(),
        "nuc": s.sum(),
    }
