"""What the name of a leaf says about it, in Linen, NNX, Haiku, Equinox and MaxText.

A name counts where it is that of the leaf itself, or that of the module whose weight the leaf is:
`head`, `head/kernel` and `head.weight` are the same head.
"""

from collections.abc import Sequence

from jax.tree_util import KeyPath

from jaxopt_lab.core.keys import path_names

# Tuples: closures that read them must hash.
_VECTORS = ("bias", "scale", "offset")
_HEADS = (
    *("head", "lm_head", "output_head", "classifier"),
    *("logits", "logits_dense", "logitdense", "unembed", "unembedding"),
)
_TABLES = ("embedder", "embed", "wte", "wpe")
WEIGHTS = ("kernel", "weight", "w")


def module_names(path: KeyPath) -> tuple[str, ...]:
    """The names along a path, without positions in lists; Haiku's module names are split."""
    parts = (part for name in path_names(path) for part in name.split("/"))
    return tuple(part for part in parts if not part.isdigit() and part != "~") or ("",)


def role_by_name(path: KeyPath) -> str | None:
    """vector, embedding, head, or None where the names say nothing."""
    *modules, name = module_names(path)
    if name in _VECTORS or name.endswith(tuple(f"_{vector}" for vector in _VECTORS)):
        return "vector"
    if _is_table(name):
        return "embedding"
    owner = modules[-1] if modules and name in WEIGHTS else name
    if owner in _HEADS:
        return "head"
    # A `kernel` beneath an embedding projects something: the patches of an image, say.
    return "embedding" if name != "kernel" and _is_table(owner) else None


def names_a_table(names: Sequence[str]) -> bool:
    """Whether any of the names is that of an embedding or an output head."""
    return any(_is_table(name) or name in _HEADS for name in names)


def _is_table(name: str) -> bool:
    return name in _TABLES or name.endswith(("embedding", "embeddings"))
