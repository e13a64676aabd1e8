"""Runs as files of a few kilobytes: a key and losses, from which the parameters are rebuilt.

Given the losses, a zero-order step is a function of parameters, state and key. So the losses of a
run are the run, whatever the method and its buffers.
"""

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import keystr, tree_leaves_with_path
from jaxtyping import Array

from jaxopt_lab.zeroth_order.probes import ProbeState

_FORMAT = 1


def recorded(state: optax.OptState) -> Array:
    """The losses of the last step, to be kept for a replay.

    Args:
      state: Of any chain with a zero-order method in it.

    Returns:
      (losses of a step,) in the order of evaluation.

    Raises:
      ValueError: There is no zero-order method, or more than one.
    """
    return _probe_state(state).losses


def save_replay(
    path: str | Path,
    *,
    method: str,
    settings: Mapping[str, Any],
    key: Array,
    params: optax.Params,
    losses: Array,
) -> None:
    """Write a run to a file.

    Args:
      path: The file, in NumPy's `.npz` format without pickles.
      method: Name of the method.
      settings: Whatever else decides its steps, as JSON can hold it.
      key: The key that the method was given.
      params: Parameters, or their shapes; values are not kept.
      losses: (steps, losses of a step), what `recorded` returned after each step.

    Example:
      >>> import tempfile
      >>> from jaxopt_lab import zeroth_order as zo
      >>> key, x = jax.random.key(0), jnp.array([1.0, -2.0])
      >>> tx = zo.mezo(0.1, key=key)
      >>> state, losses, start = tx.init(x), [], x
      >>> for _ in range(3):
      ...     updates, state = tx.update(None, state, x, value_fn=lambda x: jnp.sum(x**2))
      ...     x, losses = optax.apply_updates(x, updates), [*losses, recorded(state)]
      >>> run = {"method": "mezo", "settings": {"learning_rate": 0.1}}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     file = f"{folder}/run.npz"
      ...     save_replay(file, **run, key=key, params=start, losses=jnp.stack(losses))
      ...     again = apply_replay(file, tx, start, **run)
      >>> bool(jnp.allclose(again, x, rtol=1e-6))
      True
    """
    header = {
        "format": _FORMAT,
        "method": method,
        "settings": dict(settings),
        "tree": _tree(params),
    }
    data = key
    if jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key):
        data = jax.random.key_data(key)
    with Path(path).open("wb") as file:
        np.savez(
            file,
            header=np.array(json.dumps(header)),
            key=np.asarray(data),
            losses=np.asarray(losses),
        )


def apply_replay(
    path: str | Path,
    tx: optax.GradientTransformationExtraArgs,
    params: optax.Params,
    *,
    method: str,
    settings: Mapping[str, Any],
) -> optax.Params:
    """The parameters at the end of a saved run; no loss is evaluated.

    On the device of the run this gives its bits, provided that the run compiled its steps as this
    does: `jax.jit` of update and `optax.apply_updates`.

    Args:
      path: From `save_replay`.
      tx: The method, made as it was for the run.
      params: The parameters at the start.
      method: Compared with what was saved.
      settings: Compared with what was saved.

    Raises:
      ValueError: The file is no replay, or one of another method, configuration, tree or key; the
        message names the difference.
    """
    header, key, losses = _read(path)
    for name, mine in (("method", method), ("settings", json.loads(json.dumps(dict(settings))))):
        if header[name] != mine:
            raise ValueError(f"{path}: {name} of the run was {header[name]!r}, got {mine!r}")
    _check_tree(path, header["tree"], _tree(params))
    state = tx.init(params)
    known = _probe_state(state)
    if not np.array_equal(key, known.key):
        raise ValueError(f"{path}: the key of the run was {key}, that of tx is {known.key}")
    if losses.ndim != 2 or losses.shape[1:] != known.losses.shape:
        wanted = ("steps", *known.losses.shape)
        raise ValueError(f"{path}: losses have shape {losses.shape}, tx takes {wanted}")

    @jax.jit
    def step(params: Any, state: Any, losses: Array) -> tuple[Any, Any]:
        unused: Any = None
        updates, state = tx.update(unused, state, params, losses=losses)
        return optax.apply_updates(params, updates), state

    for row in jnp.asarray(losses):
        params, state = step(params, state, row)
    return params


def _read(path: str | Path) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    try:
        with Path(path).open("rb") as file, np.load(file) as archive:
            header = json.loads(archive["header"].item())
            key, losses = archive["key"], archive["losses"]
    except (ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is no replay: {error}") from error
    if header.get("format") != _FORMAT:
        raise ValueError(f"{path}: format {header.get('format')!r}, this version reads {_FORMAT}")
    return header, key, losses


def _tree(params: optax.Params) -> list[list[Any]]:
    return [[keystr(p), list(x.shape), str(x.dtype)] for p, x in tree_leaves_with_path(params)]


def _check_tree(path: str | Path, saved: list[Any], mine: list[Any]) -> None:
    if len(saved) != len(mine):
        raise ValueError(f"{path}: the run had {len(saved)} leaves, the parameters {len(mine)}")
    for then, now in zip(saved, mine, strict=True):
        if then != now:
            raise ValueError(f"{path}: the run had the leaf {then}, the parameters have {now}")


def _probe_state(state: optax.OptState) -> ProbeState:
    def is_probes(node: Any) -> bool:
        return isinstance(node, ProbeState)

    found = [x for x in jax.tree.leaves(state, is_leaf=is_probes) if is_probes(x)]
    if len(found) != 1:
        raise ValueError(f"the state holds {len(found)} zero-order methods, wanted one")
    return found[0]
