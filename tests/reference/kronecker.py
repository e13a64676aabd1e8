"""Kronecker approximation of a second moment with every matrix formed in full, float64."""

import numpy as np


def second_moment(grad):
    """vec(G) vec(G)^T for the row-major vec."""
    return np.outer(grad, grad)


def rearranged(fisher, m, n):
    """A[(i, i'), (j, j')] = F[(i, j), (i', j')], entry by entry."""
    out = np.empty((m * m, n * n))
    for i in range(m):
        for k in range(m):
            block = fisher[i * n : (i + 1) * n, k * n : (k + 1) * n]
            out[i * m + k] = block.ravel()
    return out


def target(left, right, grad, decay, weight):
    """What a step approximates: decayed old product plus the new gradient's second moment."""
    new = rearranged(second_moment(grad), *grad.shape)
    return decay * np.outer(left, right) + weight * new


def ksl(start, end, u, v):
    """Rank-one projector splitting from `start` = sigma u v^T to any matrix `end`."""
    change = end - start
    k = start @ v + change @ v
    u_new = k / np.linalg.norm(k)
    s = np.linalg.norm(k) - u_new @ change @ v
    row = s * v + change.T @ u_new
    size = np.linalg.norm(row)
    return u_new, size, row / size


def parallel(start, end, u, v):
    """Rank-one basis update and Galerkin from `start` = sigma u v^T to any matrix `end`."""
    change = end - start
    u_new, v_new = start @ v + change @ v, start.T @ u + change.T @ u
    u_new, v_new = u_new / np.linalg.norm(u_new), v_new / np.linalg.norm(v_new)
    return u_new, u_new @ start @ v_new + u_new @ change @ v_new, v_new


INTEGRATORS = {"ksl": ksl, "parallel": parallel}


def step(name, left, right, grad, decay, weight):
    """One integrator step by the generic rank-one method on the m^2 x n^2 matrices."""
    u, v = left.ravel() / np.linalg.norm(left), right.ravel() / np.linalg.norm(right)
    end = target(left, right, grad, decay, weight)
    u, size, v = INTEGRATORS[name](decay * np.outer(left, right), end, u, v)
    return balanced(u, size, v, *grad.shape)


def best(matrix, m, n):
    """The balanced pair of the best rank-one approximation of a rearranged second moment."""
    u, s, vt = np.linalg.svd(matrix)
    return balanced(u[:, 0], s[0], vt[0], m, n)


def balanced(u, size, v, m, n):
    """Factors of equal norm with non-negative traces."""
    left, right = u.reshape(m, m), v.reshape(n, n)
    sign = np.sign(np.trace(left)) or 1.0
    return sign * np.sqrt(size) * left, sign * np.sqrt(size) * right


def errors(exact, approximation):
    """Relative Frobenius error, and the same after the best scalar."""
    size = np.linalg.norm(exact)
    scalar = np.vdot(approximation, exact) / np.vdot(approximation, approximation)
    return (
        np.linalg.norm(exact - approximation) / size,
        np.linalg.norm(exact - scalar * approximation) / size,
    )


def in_basis(fisher, left_basis, right_basis):
    """Q^T F Q for Q = Q_L (x) Q_R."""
    q = np.kron(left_basis, right_basis)
    return q.T @ fisher @ q


def from_basis(values, left_basis, right_basis):
    """Q diag(V) Q^T for an m x n matrix V of values in the eigenbasis."""
    q = np.kron(left_basis, right_basis)
    return q @ np.diag(values.ravel()) @ q.T
