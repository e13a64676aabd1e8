"""Which matrices get an adapter, of which rank and scale: patterns resolved to a static table."""

import difflib
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import optax
from jax.tree_util import tree_leaves_with_path

from jaxopt_lab.core.checks import POSITIVE, check_dtype, check_number
from jaxopt_lab.core.keys import path_names
from jaxopt_lab.core.matrices import MatrixAxes
from jaxopt_lab.core.packed import as_shapes
from jaxopt_lab.lora.options import require
from jaxopt_lab.lora.pairs import Names
from jaxopt_lab.optim.roles import module_names, names_a_table, role_by_name
from jaxopt_lab.optim.routing import MatrixAxesSpec, route

Patterns = str | tuple[str, ...]
ALL_LINEAR = "all-linear"
INITS = ("default", "gaussian", "pissa", "olora", "wlora")


@dataclass(frozen=True)
class LoraConfig:
    """What one asks for; `resolve` turns it into a `LoraSpec`.

    Patterns are those of peft: a string is a regular expression that must match a whole name, a
    tuple holds names or their ends after a dot. Both are tried on the path of a module
    ("layers.attention.qkv") and on the name of each of its matrices ("layers.attention.qkv.3.0", or
    "model.layers.3.self_attn.q_proj" with the names of `jaxopt_lab.models.matrix_names`).
    """

    rank: int = 8
    """Rank r of the adapters."""

    alpha: float = 16.0
    """Their scale is alpha / r."""

    target: Patterns = ALL_LINEAR
    """Modules or matrices with an adapter; "all-linear": all but embeddings and output heads."""

    exclude: Patterns = ()
    """Modules or matrices without one."""

    layers: tuple[int, ...] | None = None
    """Entries of stacked kernels with an adapter; None: all (peft's layers_to_transform)."""

    rank_pattern: Mapping[str, int] | tuple[tuple[str, int], ...] = ()
    """Other ranks: a regular expression for the end of a name, after a dot; the first that fits."""

    alpha_pattern: Mapping[str, float] | tuple[tuple[str, float], ...] = ()
    """Other alphas, likewise."""

    init: Literal["default", "gaussian", "pissa", "olora", "wlora"] = "default"
    """See `jaxopt_lab.lora.init`."""

    dropout: float = 0.0
    """Of the inputs of the adapters, in training: where a key is given."""

    rslora: bool = False
    """Scale by alpha / sqrt(r) (Kalajdzievski, arXiv 2312.03732)."""

    dora: bool = False
    """Learn the norm of each output apart from its direction (Liu et al., arXiv 2402.09353)."""

    weights: bool = False
    """Give each adapter a trainable weight, which starts at 1, for `weight_lora`."""

    full: Patterns = ()
    """Modules whose parameters are trained whole, such as heads (peft's modules_to_save)."""

    bias: Literal["none", "all", "lora_only"] = "none"
    """Biases trained whole: none, all, or those of adapted modules."""

    dtype: str = "float32"
    """Of the factors, whatever that of the kernels."""

    def __post_init__(self) -> None:
        """Checks the fields; mappings and lists become tuples, so that a spec can be hashed."""
        for field in ("rank_pattern", "alpha_pattern"):
            value = getattr(self, field)
            items = value.items() if isinstance(value, Mapping) else map(tuple, value)
            object.__setattr__(self, field, tuple(items))
        for field in ("target", "exclude", "full", "layers"):
            value = getattr(self, field)
            if value is not None and not isinstance(value, str):
                object.__setattr__(self, field, tuple(value))
        ranks = [self.rank, *(rank for _, rank in self.rank_pattern)]
        positive = all(isinstance(r, int) and r > 0 for r in ranks)
        require(self, "rank", positive, "integers > 0, in rank_pattern as well")
        check_number("LoraConfig.alpha", self.alpha, POSITIVE)
        for name, alpha in self.alpha_pattern:
            check_number(f"LoraConfig.alpha_pattern of {name!r}", alpha, POSITIVE)
        check_dtype("LoraConfig.dtype", self.dtype)
        require(self, "dropout", 0 <= self.dropout < 1, "a number in [0, 1)")
        require(self, "init", self.init in INITS, f"one of {', '.join(INITS)}")
        require(self, "bias", self.bias in ("none", "all", "lora_only"), "none, all or lora_only")
        given = [self.target, self.exclude, self.full, *(key for key, _ in self.rank_pattern)]
        for pattern in given:
            if isinstance(pattern, str):
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise ValueError(f"pattern {pattern!r} of LoraConfig: {error}") from None


class AdapterSpec(NamedTuple):
    """The adapters of one kernel leaf."""

    path: Names  # of the kernel, in the parameters and in the adapters
    shape: tuple[int, ...]  # of the kernel
    axes: MatrixAxes  # which of its axes are inputs, outputs, and count its matrices
    kept: tuple[int, ...]  # its matrices with an adapter, by number, in the order of the stack
    rank: int
    scale: float
    names: tuple[str, ...]  # of all its matrices

    @property
    def matrix_shape(self) -> tuple[int, int, int]:
        """(matrices, inputs, outputs)."""
        return self.axes.matrix_shape(self.shape)

    @property
    def module(self) -> str:
        """The path as one name."""
        return ".".join(self.path)


@dataclass(frozen=True)
class LoraSpec:
    """Static table of all adapters; hashable, so that it can be a static argument."""

    config: LoraConfig
    adapters: tuple[AdapterSpec, ...]
    full: tuple[Names, ...] = ()  # leaves that are trained whole

    def __str__(self) -> str:
        """One line a kernel."""
        lines = [
            f"{a.module}  {'x'.join(map(str, a.shape))}  {len(a.kept)} of {a.matrix_shape[0]} "
            f"matrices {a.matrix_shape[1]}x{a.matrix_shape[2]}  rank {a.rank}  scale {a.scale:g}"
            for a in self.adapters
        ]
        lines += [f"{'.'.join(path)}  trained whole" for path in self.full]
        return "\n".join([*lines, f"{self.parameter_count:,} parameters in adapters"])

    @property
    def parameter_count(self) -> int:
        """Numbers in all adapters; leaves that are trained whole not counted."""
        extra = (self.config.weights, self.config.dora)
        return sum(
            len(a.kept) * (a.rank * (n + m) + extra[0] + extra[1] * m)
            for a in self.adapters
            for _, n, m in [a.matrix_shape]
        )

    def with_adapters(self, adapters: Iterable[AdapterSpec]) -> "LoraSpec":
        """The same with other adapters."""
        return replace(self, adapters=tuple(adapters))


def resolve(
    config: LoraConfig,
    params: optax.Params,
    matrix_axes: MatrixAxesSpec = None,
    names: Any = None,
) -> LoraSpec:
    """Find the matrices that get an adapter.

    Args:
      config: What is wanted.
      params: The parameters, or `jax.ShapeDtypeStruct`s.
      matrix_axes: Which axes of a kernel are inputs (reduction) and which outputs; all others count
        matrices with an adapter each: (layers, d, 3, d) with inputs 1 and outputs 3 has three a
        layer. As for the optimizers of this library; None: leaves of two axes.
      names: Tree with a tuple of names for the matrices of each kernel, such as
        `jaxopt_lab.models.matrix_names(config)`, or a prefix of the kernels' tree; None: path and
        number.

    Raises:
      ValueError: A pattern matches nothing (near names are listed), a rank is larger than a matrix
        allows, or patterns ask for two ranks in one stack.

    >>> params = {"up": {"kernel": jax.ShapeDtypeStruct((16, 32), "float32")}}
    >>> print(resolve(LoraConfig(rank=4, alpha=8), params))
    up.kernel  16x32  1 of 1 matrices 16x32  rank 4  scale 2
    192 parameters in adapters
    """
    params = as_shapes(params)
    given = {path_names(path): value for path, value in _leaves_of(names)}
    candidates = []
    for r, leaf in zip(route(params, matrix_axes), jax.tree.leaves(params), strict=True):
        path = path_names(r.path)
        if r.axes is not None and not _is_table(r.path):
            count = r.axes.matrix_shape(leaf.shape)[0]
            found = tuple(given.get(path) or _numbered(path, leaf.shape, r.axes))
            if len(found) != count:
                raise ValueError(f"names of {'.'.join(path)}: got {len(found)}, wanted {count}")
            candidates.append((path, tuple(leaf.shape), r.axes, found))
    adapters = [_adapter(config, *candidate) for candidate in candidates]
    adapters = [a for a in adapters if a.kept]
    _check_patterns(config, candidates, adapters)
    _check_ranks(adapters)
    full = _full(config, params, adapters)
    return LoraSpec(config, tuple(adapters), full)


def matches(patterns: Patterns, name: str) -> bool:
    """Whether a name is meant: by a regular expression, or by one of several ends.

    >>> matches("layers.*q", "layers.attention.q"), matches(("q",), "layers.attention.q")
    (True, True)
    >>> matches(("q",), "layers.attention.wq")
    False
    """
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == p or name.endswith(f".{p}") for p in patterns)


def _leaves_of(names: Any) -> list[Any]:
    return tree_leaves_with_path(names, is_leaf=lambda node: isinstance(node, tuple))


def _is_table(path: Any) -> bool:
    return bool(role_by_name(path)) or names_a_table(module_names(path))


def _module(path: Names) -> str:
    return ".".join(path[:-1] if path[-1] == "kernel" else path)


def _numbered(path: Names, shape: Sequence[int], axes: MatrixAxes) -> list[str]:
    numbers = itertools.product(*(range(shape[a]) for a in axes.batch))
    return [".".join([_module(path), *map(str, number)]) for number in numbers]


def _adapter(
    config: LoraConfig,
    path: Names,
    shape: tuple[int, ...],
    axes: MatrixAxes,
    names: tuple[str, ...],
) -> AdapterSpec:
    module = _module(path)

    def chosen(patterns: Patterns, name: str) -> bool:
        return matches(patterns, module) or matches(patterns, name)

    per_layer = len(names) // shape[axes.batch[0]] if axes.batch else 1
    kept = tuple(
        i
        for i, name in enumerate(names)
        if (config.target == ALL_LINEAR or chosen(config.target, name))
        and not chosen(config.exclude, name)
        and (config.layers is None or (axes.batch and i // per_layer in config.layers))
    )
    numbers = {
        (
            _first(config.rank_pattern, module, names[i], config.rank),
            _first(config.alpha_pattern, module, names[i], config.alpha),
        )
        for i in kept
    }
    if len(numbers) > 1:
        raise ValueError(
            f"{module}: the matrices of a leaf have one rank and alpha; the patterns ask for "
            + " and ".join(f"rank {r} with alpha {a:g}" for r, a in sorted(numbers))
        )
    rank, alpha = numbers.pop() if numbers else (config.rank, config.alpha)
    scale = alpha / (math.sqrt(rank) if config.rslora else rank)
    return AdapterSpec(path, shape, axes, kept, rank, scale, names)


def _first(patterns: Any, module: str, name: str, otherwise: Any) -> Any:
    for pattern, value in patterns:
        if _ends_with(pattern, module) or _ends_with(pattern, name):
            return value
    return otherwise


def _ends_with(pattern: str, name: str) -> bool:
    return re.search(rf"(^|\.)(?:{pattern})$", name) is not None


def _check_patterns(config: LoraConfig, candidates: Sequence[Any], adapters: Sequence[Any]) -> None:
    known = [n for path, _, _, names in candidates for n in (_module(path), *names)]
    kept = [n for a in adapters for n in (_module(a.path), *(a.names[i] for i in a.kept))]
    wanted: list[tuple[str, Any, list[str], Any]] = [
        (field, pattern, known, matches)
        for field in ("target", "exclude")
        for pattern in _each(getattr(config, field))
        if pattern != ALL_LINEAR
    ]
    wanted += [
        (field, pattern, kept, _ends_with)
        for field in ("rank_pattern", "alpha_pattern")
        for pattern, _ in getattr(config, field)
    ]
    for field, pattern, among, test in wanted:
        if not any(test(pattern, name) for name in among):
            shown = pattern if isinstance(pattern, str) else pattern[0]
            raise ValueError(
                f"LoraConfig.{field}: {shown!r} matches nothing; {_near(shown, among)}"
            )
    if not adapters:
        raise ValueError(
            f"LoraConfig: target {config.target!r}, exclude {config.exclude!r} and layers "
            f"{config.layers!r} leave nothing to adapt; {_near('', known)}"
        )


def _each(patterns: Patterns) -> list[Patterns]:
    return [patterns] if isinstance(patterns, str) else [(p,) for p in patterns]


def _near(name: str, among: Sequence[str]) -> str:
    """The names closest to a wrong one, or the first ones."""
    ends = list(dict.fromkeys([*among, *(n.rsplit(".", 1)[-1] for n in among)]))
    close = difflib.get_close_matches(name, ends, n=5, cutoff=0.5) or ends[:5]
    return "there are " + ", ".join(close) if close else "there is no matrix at all"


def _check_ranks(adapters: Sequence[AdapterSpec]) -> None:
    for a in adapters:
        _, n, m = a.matrix_shape
        if a.rank > min(n, m):
            raise ValueError(
                f"{a.module}: got rank {a.rank}, wanted at most {min(n, m)} for matrices {n}x{m}"
            )


def _full(config: LoraConfig, params: Any, adapters: Sequence[AdapterSpec]) -> tuple[Names, ...]:
    paths = [path_names(path) for path, _ in tree_leaves_with_path(params)]
    adapted = {a.path for a in adapters}

    def inside(pattern: Patterns, path: Names) -> bool:
        return any(matches(pattern, ".".join(path[:k])) for k in range(1, len(path) + 1))

    for pattern in _each(config.full) if config.full else []:
        if not any(inside(pattern, path) for path in paths):
            shown = pattern if isinstance(pattern, str) else pattern[0]
            modules = sorted(
                {".".join(path[:k]) for path in paths for k in range(1, len(path) + 1)}
            )
            raise ValueError(f"LoraConfig.full: {shown!r} matches nothing; {_near(shown, modules)}")
    found = []
    for path in paths:
        biased = path[-1:] == ("bias",) and (
            config.bias == "all"
            or (config.bias == "lora_only" and (*path[:-1], "kernel") in adapted)
        )
        if biased or (config.full and inside(config.full, path)):
            if path in adapted:
                raise ValueError(
                    f"{'.'.join(path)}: it is trained whole and has an adapter; exclude it"
                )
            found.append(path)
    return tuple(found)


def as_array(numbers: Sequence[int]) -> np.ndarray:
    """Static indices."""
    return np.asarray(numbers, np.int32)
