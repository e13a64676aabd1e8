"""The repeated-learning loop from recorded draws, one step after the other, in float64."""

import numpy as np


def repeat(x, y, draws, *, setup, usage, adherence, rule, every, num_held_out, alpha):
    """Everything a replay returns; the active set is a list of (row, label), oldest first."""
    active0, items, splits, u, z = draws
    active = [(int(row), float(y[row])) for row in active0]
    coefs, scales, residuals, targets, labels = [], [], [], [], []
    for step in range(len(items) + 1):
        if step % every == 0 or step == len(items):
            rows = np.array([row for row, _ in active])
            now = np.array([label for _, label in active])
            split = splits[len(scales)]
            train, test = split[num_held_out:], split[:num_held_out]
            coef, intercept = ridge(x[rows[train]], now[train], alpha)
            error = now[test] - x[rows[test]] @ coef - intercept
            scale = np.mean(np.abs(error)) if rule == "mae" else np.sqrt(np.mean(error**2))
            coefs.append(np.append(coef, intercept))
            scales.append(scale)
            residuals.append(error)
            targets.append(now)
        if step == len(items):
            break
        spread = (adherence if rule == "mae" else np.sqrt(adherence)) * scales[-1]
        row = items[step]
        offered = x[row] @ coefs[-1][:-1] + coefs[-1][-1] + spread * z[step]
        if setup == "window":
            label = offered if u[step] < usage else float(y[row])
            active = [*active[1:], (int(row), label)]
        else:
            place = [r for r, _ in active].index(row)
            label = offered if u[step] < usage else active[place][1]
            active[place] = (int(row), label)
        labels.append(label)
    return tuple(map(np.array, (coefs, scales, residuals, targets, labels)))


def ridge(x, y, alpha):
    """(coef, intercept): alpha |w|^2 on centred features, added to the sum of squares."""
    centred = x - x.mean(axis=0)
    system = centred.T @ centred + alpha * np.eye(x.shape[1])
    coef = np.linalg.solve(system, centred.T @ (y - y.mean()))
    return coef, y.mean() - x.mean(axis=0) @ coef


def sgd(x, y, orders, *, learning_rate, tolerance, patience):
    """(weights and intercept, epochs) of per-item steps on features that are scaled already."""
    rows = np.column_stack([x, np.ones(len(x))])
    weights, best, stalled, count = np.zeros(rows.shape[1]), np.inf, 0, 0
    epochs = 0
    for order in orders:
        loss, epochs = 0.0, epochs + 1
        for i in order:
            count += 1
            error = y[i] - rows[i] @ weights
            loss += error**2 / 2
            weights = weights + learning_rate / count**0.25 * error * rows[i]
        loss /= len(x)
        stalled = stalled + 1 if loss > best - tolerance else 0
        best = min(best, loss)
        if stalled >= patience:
            break
    return weights, epochs
