"""What an encoder is: one frozen, JSON-friendly description, checked when it is made."""

import dataclasses
from typing import Any, ClassVar, Literal

import jax

from jaxopt_lab.models.config import DecoderConfig, DType, check_choices, require


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Shape and numerics of a BERT encoder: both directions, LayerNorm after each sublayer.

    Linear layers and norms have biases, positions are learned.

    Source: Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for Language
    Understanding", arXiv 1810.04805.

    Raises:
        ValueError: when a field is out of range or two fields contradict each other; the
            message names the field, its value and what was wanted.

    >>> EncoderConfig(vocab_size=64, width=32, depth=2, heads=4, context=16).hidden_width
    128
    """

    vocab_size: int
    """Number of token ids."""
    width: int
    """Width d of the residual stream."""
    depth: int
    """Number of layers L."""
    heads: int
    """Attention heads; each is width / heads wide."""
    hidden: int | None = None
    """Inner width of the MLP; None: 4 d."""
    context: int = 512
    """Longest sequence, in tokens."""
    types: int = 2
    """Token types: which of two sentences a token belongs to."""
    activation: Literal["gelu", "gelu_tanh"] = "gelu"
    """GELU, exact or in its tanh approximation."""
    pooling: Literal["mean", "cls"] = "mean"
    """What the head reads: the mean over the tokens that are no padding, or the first token."""
    classes: int | None = None
    """Outputs of a classification head; None: there is none."""
    dropout: float = 0.0
    """Of the embeddings, of what each sublayer adds, and of what the head reads; in training."""
    attention_dropout: float = 0.0
    """Of the attention weights; in training."""
    norm_eps: float = 1e-12
    """Added to the variance inside the norms."""
    compute_dtype: DType = "float32"
    """Matrix products and activations; norms, softmax and the head stay in float32 or wider."""
    param_dtype: DType = "float32"
    """Stored parameters."""
    loop: Literal["unrolled", "scanned"] = "unrolled"
    """Unrolled is faster on a GPU at moderate depth; scanned compiles in constant time."""
    remat: Literal["none", "full", "dots"] = "none"
    """What the backward pass recomputes: nothing, whole layers, or all but matrix products."""
    attention: Literal["auto", "xla", "cudnn"] = "auto"
    """Attention kernel; auto takes cuDNN's on a GPU in bfloat16 where the shapes allow it, and
    JAX's own on a TPU (`models.splash`). Dropout of attention weights needs XLA's, and takes it."""

    # What code for decoders as well reads of a configuration.
    norm: ClassVar[str] = "layer"
    bias: ClassVar[bool] = True
    fused_qkv_as: ClassVar[str] = "three"

    def __post_init__(self):
        """Checks every field."""
        check_choices(self)
        for name in ("vocab_size", "width", "depth", "heads", "context", "types"):
            require(self, name, getattr(self, name) >= 1, "at least 1")
        require(self, "norm_eps", self.norm_eps > 0, "greater than 0")
        require(self, "heads", self.width % self.heads == 0, f"a divisor of width = {self.width}")
        for name in ("hidden", "classes"):
            size = getattr(self, name)
            require(self, name, size is None or size >= 1, "at least 1, or None")
        for name in ("dropout", "attention_dropout"):
            require(self, name, 0 <= getattr(self, name) < 1, "a number in [0, 1)")

    @property
    def head_width(self) -> int:
        """Width of one head."""
        return self.width // self.heads

    @property
    def hidden_width(self) -> int:
        """Inner width of the MLP, with the default filled in."""
        return 4 * self.width if self.hidden is None else self.hidden


ModelConfig = DecoderConfig | EncoderConfig


def check_inputs(
    config: EncoderConfig, tokens_BxT: jax.Array, mask_BxT: Any, types_BxT: Any
) -> None:
    """Checks the static properties of a batch before anything is traced through the model.

    Raises:
        ValueError: for a sequence longer than the context, a wrong rank, or a mask or token types
            of another shape.
    """
    if tokens_BxT.ndim != 2:
        raise ValueError(f"tokens: got shape {tokens_BxT.shape}, wanted (batch, length)")
    if tokens_BxT.shape[1] > config.context:
        raise ValueError(
            f"tokens: got {tokens_BxT.shape[1]} positions, wanted at most "
            f"context = {config.context}"
        )
    for name, array in (("mask", mask_BxT), ("types", types_BxT)):
        if array is not None and array.shape != tokens_BxT.shape:
            raise ValueError(f"{name}: got shape {array.shape}, wanted {tokens_BxT.shape}")
