"""Adapters as files in peft's layout: adapter_config.json and adapter_model.safetensors.

peft names a tensor after its module and stores it (out, in): `base_model.model.NAME.lora_A.weight`
(rank, inputs) and `lora_B.weight` (outputs, rank), one pair for each matrix. Which matrices have an
adapter is read from the tensors, so the patterns that chose them do not matter.
"""

import hashlib
import json
import math
import pathlib
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxopt_lab.core.keys import path_names
from jaxopt_lab.core.matrices import MatrixAxes
from jaxopt_lab.core.packed import is_packed, unpacked
from jaxopt_lab.lora.adapters import Adapters, get, nodes, put
from jaxopt_lab.lora.config import AdapterSpec, LoraConfig, LoraSpec, resolve
from jaxopt_lab.lora.resize import fold
from jaxopt_lab.optim.routing import MatrixAxesSpec
from jaxopt_lab.report.storage import path_of, staged, uploading

_CONFIG, _WEIGHTS, _FULL = "adapter_config.json", "adapter_model.safetensors", "full.safetensors"
_PREFIX, _OUR_KEY = "base_model.model.", "jaxopt_lab"
_SUFFIXES = {"a": "lora_A.weight", "b": "lora_B.weight", "magnitude": "lora_magnitude_vector"}

Path = str | pathlib.Path


def save(
    directory: Path, adapters: Adapters, spec: LoraSpec, *, base: optax.Params | None = None
) -> None:
    """Write adapters so that `load` and peft read them.

    Weights of WeightLoRA are folded into `b`. Leaves that are trained whole stand in a file of
    their own, `full.safetensors`, in our layout.

    Args:
      directory: Created if need be; must not hold an adapter yet.
      adapters: To write.
      spec: Theirs; its names of matrices become those of modules.
      base: The parameters they belong to: a digest of the adapted kernels is recorded, which `load`
        compares.

    Raises:
      FileExistsError: The directory holds an adapter.
      ValueError: Several matrices have one name, as the fused projection of a GPT-2, which is one
        module in peft: read it as one matrix (`fused_qkv_as="one"`).
    """
    # Here: the optimizers of this package work where safetensors is not installed.
    from safetensors.flax import save_file

    directory = path_of(directory)
    if (directory / _CONFIG).exists():
        raise FileExistsError(f"{directory / _CONFIG} already exists, wanted a new directory")
    if spec.config.weights:
        adapters, spec = fold(adapters, spec)
    tensors = {}
    for entry, node in nodes(adapters, spec):
        for position, name in enumerate(_kept_names(entry)):
            for kind, suffix in _SUFFIXES.items():
                if kind in node:
                    leaf = node[kind] if entry.axes.batch else node[kind][None]
                    tensor = jnp.asarray(leaf[position].T)  # NumPy only turns its view
                    key = f"{_PREFIX}{name}.{suffix}"
                    if key in tensors:
                        raise ValueError(
                            f"{entry.module}: several matrices are one module {name} in peft; "
                            'resolve it as one matrix, with DecoderConfig(fused_qkv_as="one")'
                        )
                    tensors[key] = tensor
    config = _to_peft(spec)
    config[_OUR_KEY] = {
        "base": None if base is None else digest(base, spec),
        "full": [list(path) for path in spec.full],
        "init": spec.config.init,
    }
    with uploading(directory) as local:
        local.mkdir(parents=True, exist_ok=True)
        save_file(tensors, local / _WEIGHTS, {"format": "pt"})
        if spec.full:
            whole = {".".join(path): get(adapters, path) for path in spec.full}
            save_file(whole, local / _FULL)
        # Last: nobody loads a directory without it.
        (local / _CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def load(
    directory: Path,
    params: optax.Params,
    matrix_axes: MatrixAxesSpec = None,
    names: Any = None,
) -> tuple[Adapters, LoraSpec]:
    """Read adapters, ours or peft's.

    Args:
      directory: With adapter_config.json and adapter_model.safetensors.
      params: The base.
      matrix_axes: As for `resolve`.
      names: As for `resolve`: names of modules, which those of the tensors must be.

    Raises:
      FileNotFoundError: A file is missing.
      ValueError: The base has another digest; tensors are missing, unknown, or of another shape,
        transposed ones among them; matrices of one kernel leaf differ in rank or scale.
    """
    from safetensors.flax import load_file

    directory = pathlib.Path(staged(directory))
    theirs = json.loads((directory / _CONFIG).read_text())
    if theirs.get("peft_type", "LORA") != "LORA":
        raise ValueError(f"{directory}: got peft_type {theirs['peft_type']!r}, wanted LORA")
    tensors = load_file(directory / _WEIGHTS)
    ours = theirs.get(_OUR_KEY) or {}
    modules = _modules(tensors)
    config = LoraConfig(
        rank=int(theirs["r"]),
        alpha=theirs["lora_alpha"],
        target=tuple(modules),
        init=ours.get("init", "default"),
        dropout=theirs.get("lora_dropout") or 0.0,
        rslora=bool(theirs.get("use_rslora")),
        dora=bool(theirs.get("use_dora")),
        rank_pattern=tuple((theirs.get("rank_pattern") or {}).items()),
        alpha_pattern=tuple((theirs.get("alpha_pattern") or {}).items()),
        dtype=str(tensors[f"{_PREFIX}{next(iter(modules))}.lora_A.weight"].dtype),
    )
    spec = resolve(config, params, matrix_axes, names)
    missing = modules - {name for entry in spec.adapters for name in _kept_names(entry)}
    if missing:
        raise ValueError(
            f"{directory}: no matrix of the model is named {', '.join(sorted(missing))}"
        )
    adapters: Adapters = {}
    for entry in spec.adapters:
        put(adapters, entry.path, _node(tensors, entry, config.dora))
    if ours.get("full"):
        whole = load_file(directory / _FULL)
        spec = replace(spec, full=tuple(map(tuple, ours["full"])))
        for path in spec.full:
            put(adapters, path, whole[".".join(path)])
    recorded = ours.get("base")
    if recorded and recorded != (found := digest(params, spec)):
        raise ValueError(
            f"{directory}: the adapter belongs to other base weights, whose adapted kernels have "
            f"digest {recorded[:12]}; these have {found[:12]}"
        )
    return adapters, spec


def digest(params: optax.Params, spec: LoraSpec) -> str:
    """SHA-256 of the adapted kernels, values and dtypes; packed or not makes no difference."""
    wanted = {entry.path for entry in spec.adapters}
    total = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_packed):
        if path_names(path) in wanted:
            array = np.asarray(unpacked(leaf))
            total.update(f"{'.'.join(path_names(path))} {array.dtype} {array.shape} ".encode())
            total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()


def spec_to_json(spec: LoraSpec) -> dict[str, Any]:
    """A spec as plain JSON values, for a checkpoint: shapes change with it, after a pruning say."""
    return {
        "config": asdict(spec.config),
        "adapters": [entry._asdict() for entry in spec.adapters],
        "full": spec.full,
    }


def spec_from_json(values: Mapping[str, Any]) -> LoraSpec:
    """The inverse of `spec_to_json`, also after the JSON has been written and read.

    >>> spec = resolve(LoraConfig(rank=2), {"up": {"kernel": jnp.zeros((4, 6))}})
    >>> spec_from_json(json.loads(json.dumps(spec_to_json(spec)))) == spec
    True
    """

    def entry(found: Mapping[str, Any]) -> AdapterSpec:
        fields = {name: tuple(v) if isinstance(v, list) else v for name, v in found.items()}
        axes = MatrixAxes(*(tuple(group) for group in found["axes"]))
        return AdapterSpec(**{**fields, "axes": axes})

    full = tuple(tuple(path) for path in values["full"])
    return LoraSpec(LoraConfig(**values["config"]), tuple(map(entry, values["adapters"])), full)


def _kept_names(entry: AdapterSpec) -> list[str]:
    return [entry.names[i] for i in entry.kept]


def _to_peft(spec: LoraSpec) -> dict[str, Any]:
    config, ranks, alphas = spec.config, {}, {}
    for entry in spec.adapters:
        root = math.sqrt(entry.rank) if config.rslora else entry.rank
        for name in _kept_names(entry):
            if entry.rank != config.rank:
                ranks[name] = entry.rank
            if not math.isclose(entry.scale * root, config.alpha):
                alphas[name] = entry.scale * root
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": sorted(name for e in spec.adapters for name in _kept_names(e)),
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "use_rslora": config.rslora,
        "use_dora": config.dora,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def _modules(tensors: Mapping[str, Any]) -> set[str]:
    """Names of the modules that the tensors belong to."""
    found, unknown = {}, []
    for key in tensors:
        module = key.removeprefix(_PREFIX)
        suffix = next((s for s in _SUFFIXES.values() if module.endswith(f".{s}")), None)
        if suffix is None or not key.startswith(_PREFIX):
            unknown.append(key)
        else:
            found.setdefault(module.removesuffix(f".{suffix}"), set()).add(suffix)
    if unknown:
        raise ValueError(
            f"{_WEIGHTS}: got {', '.join(sorted(unknown))}, wanted lora_A and lora_B of modules"
        )
    for module, suffixes in found.items():
        for suffix in ("lora_A.weight", "lora_B.weight"):
            if suffix not in suffixes:
                raise ValueError(f"{_WEIGHTS}: no tensor {_PREFIX}{module}.{suffix}")
    if not found:
        raise ValueError(f"{_WEIGHTS}: no adapter in it")
    return set(found)


def _node(tensors: Mapping[str, Any], entry: AdapterSpec, dora: bool) -> dict[str, Any]:
    _, n, m = entry.matrix_shape
    shapes = {"a": (entry.rank, n), "b": (m, entry.rank), "magnitude": (m,)}
    node: dict[str, Any] = {}
    for kind in ("a", "b", "magnitude") if dora else ("a", "b"):
        leaves = []
        for name in _kept_names(entry):
            key = f"{_PREFIX}{name}.{_SUFFIXES[kind]}"
            if key not in tensors:
                raise ValueError(f"{_WEIGHTS}: no tensor {key}")
            tensor, wanted = tensors[key], shapes[kind]
            if tuple(tensor.shape) != wanted:
                turned = tuple(tensor.shape) == wanted[::-1] and len(wanted) > 1
                hint = "; it seems to be transposed" if turned else ""
                raise ValueError(f"{key}: got shape {tensor.shape}, wanted {wanted}{hint}")
            leaves.append(tensor.T)
        node[kind] = jnp.stack(leaves) if entry.axes.batch else leaves[0]
    return node
