"""What a decoder is: one frozen, JSON-friendly description, checked when it is made."""

import dataclasses
from typing import Any, Literal, get_args

import jax

DType = Literal["float32", "bfloat16", "float64"]


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape and numerics of a decoder-only transformer.

    The defaults are LLaMA style; GPT-2 style is ``positions="learned", norm="layer",
    mlp="gelu"``.

    Raises:
        ValueError: when a field is out of range or two fields contradict each other; the
            message names the field, its value and what was wanted.

    >>> DecoderConfig(vocab_size=64, width=32, depth=2, heads=4, context=16).hidden_width
    128
    """

    vocab_size: int
    """Number of token ids."""
    width: int
    """Width d of the residual stream."""
    depth: int
    """Number of layers L."""
    heads: int
    """Attention heads."""
    head_dim: int | None = None
    """Width of one head; None: width / heads."""
    kv_heads: int | None = None
    """Key and value heads (grouped-query attention); None: as many as heads."""
    hidden: int | None = None
    """Inner width of the MLP; None: 4 d for gelu, 8/3 d rounded up to 64 for swiglu."""
    context: int = 1024
    """Longest sequence, in tokens."""
    positions: Literal["rope", "learned"] = "rope"
    """Rotary embedding of queries and keys, or a learned table added to the tokens."""
    norm: Literal["rms", "layer"] = "rms"
    """RMSNorm or LayerNorm, before each sublayer and before the head."""
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    """Gated SiLU, or GELU in its tanh approximation."""
    tied: bool = True
    """Whether the head is the transposed token embedding."""
    bias: bool = False
    """Biases on every linear layer and LayerNorm (RMSNorm never has one)."""
    qkv_bias: bool = False
    """Biases on queries, keys and values alone, as in Qwen2."""
    qk_norm: bool = False
    """RMSNorm of each head of queries and keys, before their rotation, as in Qwen3."""
    rope_base: float = 10_000.0
    """Base of the rotary wavelengths."""
    rope_scaling: tuple[float, ...] | None = None
    """Wavelengths stretched as in Llama 3.1: factor, low and high frequency factor, original
    context (`models.attention.rotate`); None: as they are."""
    norm_eps: float = 1e-5
    """Added to the variance inside the norms."""
    compute_dtype: DType = "float32"
    """Matrix products and activations; norms, softmax and the loss stay in float32 or wider."""
    param_dtype: DType = "float32"
    """Stored parameters."""
    loop: Literal["unrolled", "scanned"] = "unrolled"
    """Unrolled is faster on a GPU at moderate depth; scanned compiles in constant time."""
    remat: Literal["none", "full", "dots"] = "none"
    """What the backward pass recomputes: nothing, whole layers, or all but matrix products."""
    attention: Literal["auto", "xla", "cudnn"] = "auto"
    """Attention kernel; auto takes cuDNN's on a GPU in bfloat16 where the shapes allow it, and
    JAX's own on a TPU (`models.splash`). Forward mode and second derivatives need xla, which also
    does without the kernels for norms and the loss on GPUs (`models.gpu_kernels`)."""
    document_mask: bool = False
    """Restrict attention to the document of the query; needs segment ids with every batch."""
    fused_qkv_as: Literal["three", "one"] = "three"
    """How `matrix_axes` shows query, key and value to a matrix optimizer."""

    def __post_init__(self):
        """Checks every field."""
        check_choices(self)
        for name in ("vocab_size", "width", "depth", "heads", "context"):
            require(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("rope_base", "norm_eps"):
            require(self, name, getattr(self, name) > 0, "greater than 0")
        if self.head_dim is None:
            divides = self.width % self.heads == 0
            require(self, "heads", divides, f"a divisor of width = {self.width}")
        else:
            require(self, "head_dim", self.head_dim >= 1, "at least 1, or None")
        if self.kv_heads is not None:
            divides = self.kv_heads >= 1 and self.heads % self.kv_heads == 0
            require(self, "kv_heads", divides, f"a divisor of heads = {self.heads}")
        if self.hidden is not None:
            require(self, "hidden", self.hidden >= 1, "at least 1")
        if self.positions == "rope":
            wanted = f"such that the head width is even (width = {self.width})"
            name = "heads" if self.head_dim is None else "head_dim"
            require(self, name, self.head_width % 2 == 0, wanted)
        require(
            self, "qk_norm", not self.qk_norm or self.norm == "rms", 'False with norm = "layer"'
        )
        if self.rope_scaling is not None:
            object.__setattr__(self, "rope_scaling", tuple(map(float, self.rope_scaling)))
            self._check_rope_scaling(*self.rope_scaling)

    def _check_rope_scaling(self, *numbers: float) -> None:
        wanted = "four: factor >= 1, 0 < low < high, original context >= 1"
        holds = len(numbers) == 4 and numbers[0] >= 1 and 0 < numbers[1] < numbers[2]
        require(self, "rope_scaling", holds and numbers[3] >= 1, wanted)
        require(self, "rope_scaling", self.positions == "rope", "None without rotary positions")

    @property
    def head_width(self) -> int:
        """Width of one head, with the default filled in."""
        return self.width // self.heads if self.head_dim is None else self.head_dim

    @property
    def num_kv_heads(self) -> int:
        """Key and value heads, with the default filled in."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def hidden_width(self) -> int:
        """Inner width of the MLP, with the default filled in."""
        if self.hidden is not None:
            return self.hidden
        return 4 * self.width if self.mlp == "gelu" else -(-8 * self.width // 3 // 64) * 64


def check_tokens(config: DecoderConfig, tokens_BxT: jax.Array, segment_ids_BxT: Any) -> None:
    """Checks the static properties of a batch before anything is traced through the model.

    Raises:
        ValueError: for a sequence longer than the context, a wrong rank, or segment ids that are
            missing, unwanted or of another shape.
    """
    if tokens_BxT.ndim != 2:
        raise ValueError(f"tokens: got shape {tokens_BxT.shape}, wanted (batch, length)")
    if tokens_BxT.shape[1] > config.context:
        raise ValueError(
            f"tokens: got {tokens_BxT.shape[1]} positions, wanted at most "
            f"context = {config.context}"
        )
    if config.document_mask != (segment_ids_BxT is not None):
        got = "none" if segment_ids_BxT is None else f"shape {segment_ids_BxT.shape}"
        wanted = "required" if config.document_mask else "not allowed"
        raise ValueError(
            f"segment_ids: got {got}, but they are {wanted} with "
            f"document_mask = {config.document_mask}"
        )
    if segment_ids_BxT is not None and segment_ids_BxT.shape != tokens_BxT.shape:
        raise ValueError(
            f"segment_ids: got shape {segment_ids_BxT.shape}, wanted {tokens_BxT.shape}"
        )


def check_dtypes(config: Any) -> None:
    """Checks that JAX will keep the requested precisions.

    Raises:
        ValueError: for float64 while ``jax_enable_x64`` is off.
    """
    for name in ("param_dtype", "compute_dtype"):
        if getattr(config, name) == "float64" and not jax.config.read("jax_enable_x64"):
            raise ValueError(f"{name}: got float64, which needs jax_enable_x64 to be on")


def check_choices(config: Any) -> None:
    """Checks that every field with a list of choices has one of them.

    Raises:
        ValueError: names the field and the choices.
    """
    for field in dataclasses.fields(config):
        value, choices = getattr(config, field.name), get_args(field.type)
        if choices and all(isinstance(choice, str) for choice in choices) and value not in choices:
            raise ValueError(f"{field.name}: got {value!r}, wanted one of {', '.join(choices)}")


def require(config: Any, name: str, condition: bool, wanted: str) -> None:
    """Checks one field.

    Raises:
        ValueError: names the field, its value and what was wanted.
    """
    if not condition:
        raise ValueError(f"{name}: got {getattr(config, name)}, wanted {wanted}")
