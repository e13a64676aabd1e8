"""What moves in a run and what is frozen: all parameters, a part, or adapters beside them.

Adapters are the trainable tree by themselves; the parameters that they stand beside are frozen, and
no gradient, optimizer state or reduction of a frozen leaf exists in the compiled step.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import tree_map_with_path
from jaxtyping import Array, PyTree
from optax.contrib import MuonDimensionNumbers

from jaxopt_lab import lora
from jaxopt_lab.core.keys import path_names, purpose_key
from jaxopt_lab.lora.adapters import get
from jaxopt_lab.lora.config import matches
from jaxopt_lab.lora.inits import FROM_KERNEL
from jaxopt_lab.step import (
    Adapted,
    Loss,
    split,
)
from jaxopt_lab.tasks import Task
from jaxopt_lab.train.config.optimizer_base import ModelInfo
from jaxopt_lab.train.config.trainable import HeadConfig, LoraAdaptersConfig, TrainableConfig
from jaxopt_lab.train.errors import ConfigError


@dataclass(frozen=True)
class Trained:
    """A task, and what of its parameters moves."""

    task: Task  # its parameters are `Adapted` where adapters move
    info: ModelInfo  # about what moves
    moves: PyTree | None = None  # tree of bools; None: everything, or the adapters
    spec: lora.LoraSpec | None = None  # of the adapters
    computed_in: str | None = None  # dtype of products beside adapters

    def beside(self, base: PyTree, key: Array) -> lora.Adapters:
        """The adapters at the start of a run."""
        assert self.spec is not None
        return _adapters(self.spec, base, key)

    @property
    def leaves_base(self) -> bool:
        """Whether adapters start from zero, beside the base as it is."""
        return self.spec is None or self.spec.config.init not in FROM_KERNEL

    def beneath(self, base: PyTree, start: lora.Adapters) -> PyTree:
        """What adapters are trained beside: the base without the product that they start from."""
        assert self.spec is not None
        return base if self.leaves_base else lora.unmerge(base, start, self.spec)

    def held(self, base: PyTree) -> PyTree:
        """The base as `frozen_in` the dtype of products."""
        return base if self.computed_in is None else frozen_in(self.computed_in, base)

    def ordinary(
        self, base: PyTree, key: Array, adapters: lora.Adapters
    ) -> tuple[lora.Adapters, lora.LoraSpec]:
        """Trained adapters as they stand beside the base as it is; twice the rank where it lost."""
        assert self.spec is not None
        if self.leaves_base:
            return adapters, self.spec
        start = self.beside(jax.tree.map(jnp.asarray, base), key)
        return lora.difference(adapters, start, self.spec)


def frozen_in(dtype: str, base: PyTree) -> PyTree:
    """Parameters with kernels of layers in the precision that they are multiplied in.

    Frozen, they need no other. The model casts whole stacks in every step, which would keep a
    second copy of all kernels beside the first.
    """

    def leaf(path: Any, x: Array) -> Array:
        is_kernel = path_names(path)[0] == "layers" and x.ndim > 2
        is_wider = jnp.promote_types(x.dtype, dtype) == x.dtype
        return x.astype(dtype) if is_kernel and is_wider else x

    return tree_map_with_path(leaf, base)


def everything(task: Task, info: ModelInfo) -> Trained:
    """All parameters move."""
    return Trained(task, info)


def part(config: TrainableConfig, task: Task, info: ModelInfo, roles: PyTree) -> Trained:
    """All parameters move, or the head alone.

    Args:
      config: `full` or `head`.
      task: What is learnt.
      info: About the model.
      roles: Of the parameters.

    Raises:
      ConfigError: If nothing is meant by a name, or there is no head.
    """
    if not isinstance(config, HeadConfig):
        return everything(task, info)
    names = [".".join(path_names(p)) for p, _ in jax.tree_util.tree_leaves_with_path(roles)]
    for module in config.modules:
        if not any(_inside(module, name) for name in names):
            known = ", ".join(dict.fromkeys(name.rpartition(".")[0] or name for name in names))
            raise ConfigError("trainable.modules", module, f"expected some of {known}")

    # A head of a task has a bias, which is none of the model's heads by its role.
    modules = config.modules or task.heads

    def moves(path: Any, role: str) -> bool:
        if not modules:
            return role == "head"
        return any(_inside(module, ".".join(path_names(path))) for module in modules)

    mask = tree_map_with_path(moves, roles)
    if not any(jax.tree.leaves(mask)):
        raise ConfigError(
            "trainable", "head",
            "but the head of this model is its token embedding: expected --trainable.modules",
        )  # fmt: skip
    kept = {
        name: split(getattr(info, name), mask)[0]
        for name in ("matrix_axes", "param_shardings", "decays")
    }
    return Trained(task, info._replace(**kept, perturbs_layers=False), mask)


def adapted(
    config: LoraAdaptersConfig,
    task: Task,
    info: ModelInfo,
    names: PyTree,
    *,
    weights: bool = False,
    spec: lora.LoraSpec | None = None,
    computed_in: str | None = None,
) -> Trained:
    """Low-rank adapters move beside frozen parameters.

    Args:
      config: What is wanted of them.
      task: What is learnt; its loss takes `side`.
      info: About the model, `param_shardings` among it.
      names: Of the matrices, as for `lora.resolve`.
      weights: Whether each adapter has a weight.
      spec: What adapters there are, where some have left or grown; None: those of the start.
      computed_in: Dtype of the model's products, in which frozen kernels are held; None: as read.

    Raises:
      ConfigError: If a pattern matches nothing or a rank is too large.
    """
    params = jax.eval_shape(task.init, jax.random.key(0))
    if spec is None:
        wanted = config.lora(weights=weights, heads=task.heads)
        try:
            spec = lora.resolve(wanted, params, info.matrix_axes, names)
        except ValueError as error:
            raise ConfigError.inside("trainable", error) from error
    found = spec
    beside = jax.eval_shape(lambda p, key: lora.init(key, found, p), params, jax.random.key(0))
    placed = lora.shardings(spec, info.param_shardings)

    def axes(path: Any, leaf: Any) -> Any:
        names = path_names(path)
        if names[:-1] not in kernels:
            return get(info.matrix_axes, names)
        is_factor = names[-1] in ("a", "b")
        return MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1) if is_factor else None

    def decays(path: Any, leaf: Any) -> bool:
        names = path_names(path)
        return get(info.decays, names) if names[:-1] not in kernels else names[-1] in ("a", "b")

    kernels = {entry.path for entry in spec.adapters}
    of_adapters = info._replace(
        matrix_axes=tree_map_with_path(axes, beside),
        decays=tree_map_with_path(decays, beside),
        param_shardings=placed,
        perturbs_layers=False,
    )

    def init(key: Array) -> Adapted:
        base = task.init(key)
        beside = _adapters(found, base, key)
        return Adapted(trained.held(trained.beneath(base, beside)), beside)

    evaluated: dict[Loss, Loss] = {}  # sets with one loss share a program
    for each in task.evaluations.values():
        evaluated.setdefault(each.loss, lora.loss_beside(each.loss, spec, dropout=False))
    changed = replace(
        task,
        init=init,
        loss=lora.loss_beside(task.loss, spec, dropout=True),
        param_specs=Adapted(task.param_specs, jax.tree.map(lambda s: s.spec, placed)),
        evaluations={
            name: replace(each, loss=evaluated[each.loss])
            for name, each in task.evaluations.items()
        },
    )
    trained = Trained(changed, of_adapters, spec=spec, computed_in=computed_in)
    return trained


def _adapters(spec: lora.LoraSpec, base: PyTree, key: Array) -> lora.Adapters:
    return lora.init(purpose_key(key, "adapters"), spec, base)


def _inside(module: str, name: str) -> bool:
    """Whether a leaf lies inside of a module, named by its path or the end of one."""
    parts = name.split(".")
    return any(matches((module,), ".".join(parts[:k])) for k in range(1, len(parts) + 1))
