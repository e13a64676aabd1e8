"""DyKAF: the loop of `tests.reference.soap` with dynamically tracked Kronecker factors."""

import numpy as np

from tests.reference import soap as loop


def dykaf(
    w,
    grads,
    *,
    b2,
    factor_decay=None,
    integrator="ksl",
    init="kron",
    kron_init_scale="sigma",
    one_sided="ema",
    rank_one=False,
    rank_one_eps=True,
    max_precond_dim=10_000,
    **options,
):
    """DyKAF for one parameter. Matrices are tracked; other orders have SOAP's mode factors."""
    b = b2 if factor_decay is None else factor_decay
    weight = 1 - b if b < 1 else 1
    if w.ndim != 2:
        return loop.soap(
            w, grads, b2=b2, factor_decay=b, max_precond_dim=max_precond_dim, **options
        )
    for name in ("merge_dims", "precondition_1d"):
        options.pop(name, None)
    m, n = w.shape
    kept = [d <= max_precond_dim for d in w.shape]
    step_both = {"ksl": ksl_step, "parallel": parallel_step}[integrator]

    def two_sided(factors, grad):
        if factors is None:
            factors = start(grad, init, kron_init_scale)
        return list(step_both(*factors, grad, b, weight))

    def single(factors, grad):
        """The kept side only; "code" is the released start and plain sum."""
        new = []
        for axis, (d, keep) in enumerate(zip((m, n), kept, strict=True)):
            if not keep:
                new.append(None)
                continue
            if one_sided == "code":
                old = np.eye(d) / (np.sqrt(d) * 1e-3) if factors is None else factors[axis]
                new.append(old + loop.gram(grad, axis))
            else:
                old = np.zeros((d, d)) if factors is None else factors[axis]
                new.append(b * old + weight * loop.gram(grad, axis))
        return new

    return loop.eigenbasis_adam(
        w,
        grads,
        two_sided if all(kept) else single,
        b2=b2,
        second_moment="rank_one" if rank_one else "full",
        eps_in_rank_one=rank_one_eps,
        ignore_zero_start=init == "kron",
        **options,
    )


def start(grad, init, scale):
    if init == "eps":
        return [1e-3 * np.eye(d) / np.sqrt(d) for d in grad.shape]
    u, s, vh = np.linalg.svd(grad)
    size = s[0] if scale == "sigma" else np.sqrt(s[0])
    return [size * np.outer(u[:, 0], u[:, 0]), size * np.outer(vh[0], vh[0])]


def ksl_step(left, right, grad, b, w):
    """K-, S- and L-step of projector splitting at rank one."""
    sigma = b * np.linalg.norm(left) * np.linalg.norm(right)
    lb, rb = left / np.linalg.norm(left), right / np.linalg.norm(right)
    k = sigma * lb + w * grad @ rb @ grad.T
    u = k / np.linalg.norm(k)
    n = sigma * np.sum(u * lb) * rb + w * grad.T @ u @ grad
    s = np.linalg.norm(n)
    return symmetric(np.sqrt(s) * u), symmetric(n / np.sqrt(s))


def parallel_step(left, right, grad, b, w):
    """Both bases from the old factors, then the Galerkin coefficient."""
    sigma = b * np.linalg.norm(left) * np.linalg.norm(right)
    lb, rb = left / np.linalg.norm(left), right / np.linalg.norm(right)
    k = sigma * lb + w * grad @ rb @ grad.T
    n = sigma * rb + w * grad.T @ lb @ grad
    u, v = k / np.linalg.norm(k), n / np.linalg.norm(n)
    s = sigma * np.sum(lb * u) * np.sum(rb * v) + w * np.sum(u * (grad @ v @ grad.T))
    return symmetric(np.sqrt(s) * u), symmetric(np.sqrt(s) * v)


def symmetric(x):
    return (x + x.T) / 2
