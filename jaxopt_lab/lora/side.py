"""Adapters as what stands beside the kernels of linear layers: x W + s (x a) b."""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import DictKey
from jaxtyping import Array

from jaxopt_lab.core.keys import leaf_key
from jaxopt_lab.core.matrices import MatrixAxes, batch_first
from jaxopt_lab.core.numerics import dropped, widened
from jaxopt_lab.core.packed import linear, unpacked
from jaxopt_lab.lora.adapters import Adapters, magnitude_over_norm, nodes, put
from jaxopt_lab.lora.config import LoraSpec, as_array
from jaxopt_lab.lora.pairs import stacked


def _static() -> Any:
    return field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Adapter:
    """The adapters of one linear layer, or of a stack of layers (`jaxopt_lab.models.side`)."""

    a: Array  # (adapters, inputs, rank)
    b: Array  # (adapters, rank, outputs)
    weight: Array | None  # (adapters,)
    magnitude: Array | None  # (adapters, outputs)
    keys: Array | None  # uint32 (adapters, words): of dropout; None: no dropout
    shape: tuple[int, ...] = _static()  # of the kernel
    axes: MatrixAxes = _static()
    kept: tuple[int, ...] = _static()  # the matrices of the kernel with an adapter
    scale: float = _static()
    dropout: float = _static()

    def product(self, x: Array, kernel: Array) -> Array:
        """`x @ kernel` and the adapters' part of it, in the dtype of `x`."""
        y = linear(x, kernel)
        lead, out = x.shape[:-1], [axis - 1 for axis in self.axes.batch + self.axes.output]
        order = [*range(len(lead)), *(len(lead) + axis for axis in out)]
        moved = y.transpose(order)
        matrices, _, outputs = self.axes.matrix_shape(self.shape)
        view = moved.reshape(*lead, matrices, outputs)
        part, every = self._part(x), len(self.kept) == matrices
        old = view if every else view[..., as_array(self.kept), :]
        new = old + part
        if self.magnitude is not None:
            new = new * self._norm_factor(kernel).astype(x.dtype)
        view = new if every else view.at[..., as_array(self.kept), :].set(new, unique_indices=True)
        return view.reshape(moved.shape).transpose([order.index(i) for i in range(len(order))])

    def layer(self, index: int) -> "Adapter | None":
        """Of a stack over axis 0 of the kernel, the adapters of one layer; None without any."""
        per_layer = self._per_layer()
        first = index * per_layer
        at = [i for i, number in enumerate(self.kept) if first <= number < first + per_layer]
        if not at:
            return None
        one = jax.tree.map(lambda leaf: leaf[at[0] : at[-1] + 1], self)
        return replace(one, **self._inner(), kept=tuple(self.kept[i] - first for i in at))

    def scanned(self) -> "Adapter":
        """Of a stack over axis 0 of the kernel, the same with leaves (layers, adapters, ...).

        Layers without an adapter that others have get one of zeros: a scan saves no memory there.
        """
        depth, per_layer = self.shape[0], self._per_layer()
        pieces = sorted({number % per_layer for number in self.kept})
        wanted = [layer * per_layer + piece for layer in range(depth) for piece in pieces]
        if len(wanted) != len(self.kept) and self.magnitude is not None:
            raise ValueError(
                'DoRA on a part of the layers needs DecoderConfig(loop="unrolled"): in a scan all '
                "layers are alike, and an adapter of zeros would change those without one"
            )
        places = as_array([wanted.index(number) for number in self.kept])

        def spread(leaf: Array) -> Array:
            if len(wanted) != len(self.kept):
                zeros = jnp.zeros((len(wanted), *leaf.shape[1:]), leaf.dtype)
                leaf = zeros.at[places].set(leaf)
            return leaf.reshape(depth, len(pieces), *leaf.shape[1:])

        return replace(jax.tree.map(spread, self), **self._inner(), kept=tuple(pieces))

    def _part(self, x: Array) -> Array:
        a, b = self.a.astype(x.dtype), self.b.astype(x.dtype)
        if self.keys is None:
            hidden = jnp.einsum("...n,knr->...kr", x, a)
        else:
            # Each adapter has a mask of its own, and keeps its own input for the backward pass.
            keys = map(jax.random.wrap_key_data, self.keys)
            masked = [dropped(x, self.dropout, key) for key in keys]
            hidden = jnp.stack([x @ a for x, a in zip(masked, a, strict=True)], -2)
        scale = jnp.full(len(self.kept), self.scale, x.dtype)
        if self.weight is not None:
            scale = scale * self.weight.astype(x.dtype)
        return jnp.einsum("...kr,krm->...km", hidden * scale[:, None], b)

    def _norm_factor(self, kernel: Array) -> Array:
        matrices, n, m = self.axes.matrix_shape(self.shape)
        base = widened(batch_first(unpacked(kernel), self.axes)).reshape(matrices, n, m)
        product = jnp.einsum("knr,krm->knm", widened(self.a), widened(self.b))
        if self.weight is not None:
            product = product * widened(self.weight)[:, None, None]
        whole = base[as_array(self.kept)] + self.scale * product
        assert self.magnitude is not None
        return magnitude_over_norm(self.magnitude, whole)

    def _per_layer(self) -> int:
        return math.prod(self.shape[axis] for axis in self.axes.batch if axis > 0)

    def _inner(self) -> dict[str, Any]:
        """What a layer of the stack says of its kernel."""
        axes = MatrixAxes(*(tuple(axis - 1 for axis in group if axis > 0) for group in self.axes))
        return {"shape": self.shape[1:], "axes": axes}


def side(adapters: Adapters, spec: LoraSpec, key: Array | None = None) -> dict[str, Any]:
    """The adapters as models take them, by path of the linear module.

    With `jaxopt_lab.models.apply(config, params, tokens, side=side(adapters, spec))` no adapted
    kernel is formed, and layers without an adapter keep nothing for the backward pass.

    Args:
      adapters: As from `jaxopt_lab.lora.init`.
      spec: Theirs.
      key: Of dropout, for one step; None, as in evaluation: no dropout.

    Raises:
      ValueError: A kernel whose inputs are not its first axis (that of a layer stack not counted).
    """
    out: dict[str, Any] = {}
    for entry, node in nodes(adapters, spec):
        keys = None
        if key is not None and spec.config.dropout > 0:
            own = leaf_key(key, tuple(map(DictKey, entry.path)))
            folded = jax.vmap(jax.random.fold_in, (None, 0))(own, as_array(entry.kept))
            keys = jax.random.key_data(folded)
        inputs = entry.axes.reduction
        if inputs != ((1,) if 0 in entry.axes.batch else (0,)):
            raise ValueError(
                f"{entry.module}: inputs are axes {inputs}; a linear layer contracts its first "
                "axis alone, so use jaxopt_lab.lora.effective for this kernel"
            )
        a, b = stacked(node["a"]), stacked(node["b"])
        weight, magnitude = node.get("weight"), node.get("magnitude")
        adapter = Adapter(
            a,
            b,
            None if weight is None else weight.reshape(-1),
            None if magnitude is None else magnitude.reshape(len(a), -1),
            keys,
            *(entry.shape, entry.axes, entry.kept, entry.scale, spec.config.dropout),
        )
        path = entry.path[:-1] if entry.path[-1] == "kernel" else entry.path
        put(out, path, adapter)
    return out
