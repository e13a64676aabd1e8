"""Layer inputs and output gradients, from zero probes beside the kernels of adapted layers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxopt_lab.core.packed import linear
from jaxopt_lab.lora.adapters import Adapters, get, put
from jaxopt_lab.lora.config import AdapterSpec, LoraSpec, as_array
from jaxopt_lab.lora.pairs import Names
from jaxopt_lab.lora.side import Adapter, side
from jaxopt_lab.lora.tap import Tap

# Of one layer: zeros whose "gradients" are its inputs, and zeros that are added to its outputs.
Probe = tuple[Array, Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Probed:
    """An adapter between probes."""

    adapter: Adapter
    probes: tuple[Probe, ...]  # one a layer that has an adapter; a single one after `layer`
    layers: tuple[int, ...] = field(metadata={"static": True})

    def product(self, x: Array, kernel: Array) -> Array:
        """As the adapter; the gradients of the probes are x and that of the result."""
        (probe,) = self.probes
        return _recorded(self.adapter.product(x, kernel), x, *probe)

    def layer(self, index: int) -> "Probed | None":
        """As the adapter."""
        adapter = self.adapter.layer(index)
        if adapter is None:
            return None
        return Probed(adapter, (self.probes[self.layers.index(index)],), (index,))

    def scanned(self) -> "Probed":
        """As the adapter; every layer has a probe."""
        missing = jax.tree.map(jnp.zeros_like, self.probes[0])
        each = dict(zip(self.layers, self.probes, strict=True))
        probes = [each.get(i, missing) for i in range(self.adapter.shape[0])]
        stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *probes)
        return Probed(self.adapter.scanned(), (stack,), self.layers)


@jax.tree_util.register_static
@dataclass(eq=False)
class _Measured:
    """Notes the shapes of inputs and outputs while a model is traced."""

    shapes: list[tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]]

    def product(self, x: Array, kernel: Array) -> Array:
        y = linear(x, kernel)
        self.shapes.append(jax.eval_shape(lambda *both: both, x, y))
        return y

    def layer(self, index: int) -> "_Measured":
        del index
        return self

    def scanned(self) -> "_Measured":
        return self


def value_grad_and_taps(
    loss: Callable[[Adapters, dict[str, Any]], Any],
    adapters: Adapters,
    spec: LoraSpec,
    key: Array | None = None,
    *,
    has_aux: bool = False,
) -> tuple[Any, Adapters, dict[str, Any]]:
    r"""Like `jax.value_and_grad`, with the taps that `lorsum` and `scaled_lorsum` need.

    The gradient of each adapted kernel is $X^\top S$. With dropout, $X$ is what enters the layer,
    before the mask of the adapter.

    Args:
      loss: (adapters, side) -> scalar, such as
        `lambda adapters, side: models.loss(config, params, batch, side=side)[0]`; leaves that are
        trained whole it takes from the adapters.
      adapters: As from `jaxopt_lab.lora.init`.
      spec: Theirs.
      key: Of dropout.
      has_aux: Whether `loss` returns (scalar, anything).

    Returns:
      The value, or (value, anything); the gradients of the adapters; a tree with a `Tap` at the
      path of every adapted kernel. They hold (inputs + outputs) numbers for each row and kernel.

    Raises:
      ValueError: With DoRA, whose kernels are rescaled, or with weights, which change the scales.
    """
    if spec.config.dora:
        raise ValueError(
            "taps: DoRA rescales the kernel, whose gradient is not inputs times outputs"
        )
    if spec.config.weights:
        raise ValueError("taps: weights change the scale of adapters; use jaxopt_lab.lora.fold")
    probes = _zero_probes(loss, adapters, spec)

    def objective(adapters: Adapters, probes: dict[Names, tuple[Probe, ...]]) -> Any:
        sides = side(adapters, spec, key)
        for entry in spec.adapters:
            path = _module(entry)
            adapter: Any = get(sides, path)
            put(sides, path, Probed(adapter, probes[entry.path], _layers(entry)))
        return loss(adapters, sides)

    value, (grads, found) = jax.value_and_grad(objective, (0, 1), has_aux=has_aux)(adapters, probes)
    taps: dict[str, Any] = {}
    for entry in spec.adapters:
        put(taps, entry.path, _tap(entry, found[entry.path]))
    return value, grads, taps


def joined_taps(taps: Sequence[Any], weights: Sequence[Any] | None = None) -> Any:
    """The taps of a batch from those of its parts.

    Args:
      taps: Trees of taps, of losses that are means over their parts.
      weights: What part of the whole each one is; None: all the same. The gradients are averaged
        by them as well.
    """
    shares = [1 / len(taps)] * len(taps) if weights is None else weights

    def join(*parts: Tap) -> Tap:
        scaled = [tap.s * jnp.asarray(w, tap.s.dtype) for tap, w in zip(parts, shares, strict=True)]
        x = jnp.concatenate([tap.x for tap in parts], -2)
        return replace(parts[0], x=x, s=jnp.concatenate(scaled, -2))

    return jax.tree.map(join, *taps, is_leaf=lambda node: isinstance(node, Tap))


@jax.custom_vjp
def _recorded(y: Array, x: Array, for_x: Array, for_y: Array) -> Array:
    del x, for_x, for_y
    return y


def _recorded_forward(y: Array, x: Array, for_x: Array, for_y: Array) -> tuple[Array, Array]:
    del for_x, for_y
    return y, x


def _recorded_backward(x: Array, gradient: Array) -> tuple[Array, Array, Array, Array]:
    return gradient, jnp.zeros_like(x), x, gradient


_recorded.defvjp(_recorded_forward, _recorded_backward)


def _zero_probes(
    loss: Callable[..., Any], adapters: Adapters, spec: LoraSpec
) -> dict[Names, tuple[Probe, ...]]:
    measured: dict[str, Any] = {}
    notes: dict[Names, _Measured] = {}
    for entry in spec.adapters:
        notes[entry.path] = _Measured([])
        put(measured, _module(entry), notes[entry.path])
    jax.eval_shape(lambda adapters: loss(adapters, measured), adapters)
    probes = {}
    for entry in spec.adapters:
        shapes = notes[entry.path].shapes
        if not shapes:
            raise ValueError(f"taps: the model never uses its layer {entry.module}")
        zeros = [jnp.zeros(shape.shape, shape.dtype) for shape in shapes[0]]
        probes[entry.path] = tuple((zeros[0], zeros[1]) for _ in _layers(entry))
    return probes


def _module(entry: AdapterSpec) -> Names:
    return entry.path[:-1] if entry.path[-1] == "kernel" else entry.path


def _layers(entry: AdapterSpec) -> tuple[int, ...]:
    """The layers of a stack that have an adapter; one where there is no stack."""
    if 0 not in entry.axes.batch:
        return (0,)
    per_layer = entry.matrix_shape[0] // entry.shape[0]
    return tuple(sorted({number // per_layer for number in entry.kept}))


def _tap(entry: AdapterSpec, probes: tuple[Probe, ...]) -> Tap:
    """Rows of one kernel from the gradients of its probes."""
    matrices, n, m = entry.matrix_shape
    layers = _layers(entry)
    in_stack = 0 in entry.axes.batch
    per_layer = matrices // entry.shape[0] if in_stack else matrices
    first = 1 if in_stack else 0
    inner = [axis for axis in entry.axes.batch if axis >= first]
    xs, outputs = [], []
    for (x, s), layer in zip(probes, layers, strict=True):
        lead = x.ndim - 1
        pieces = [i % per_layer for i in entry.kept if i // per_layer == layer]
        # The output has the kernel's axes after that of its inputs.
        batch, output = (
            [lead + axis - first - 1 for axis in axes] for axes in (inner, entry.axes.output)
        )
        rows = s.transpose(*batch, *range(lead), *output).reshape(per_layer, -1, m)
        # A gather of all would be a copy, and a slow one.
        outputs.append(rows if len(pieces) == per_layer else rows[as_array(pieces)])
        xs.append(x.reshape(-1, n))
    if not entry.axes.batch:
        return Tap(xs[0], outputs[0][0], entry.scale)
    counts = {len(s) for s in outputs}
    if len(counts) > 1:  # layers share their inputs among different numbers of adapters
        xs = [x for x, s in zip(xs, outputs, strict=True) for _ in range(len(s))]
    return Tap(jnp.stack(xs), jnp.concatenate(outputs), entry.scale)
