"""Named decoders.

The 124M, 355M and 720M shapes are those of the LionMuon experiments (50304-token vocabulary, tied
head, no biases); 210M is the 24-layer LLaMA of the adaptive warm-up experiments. `tiny` trains in
minutes on two CPU cores.
"""

from jaxopt_lab.models.config import DecoderConfig

_VOCAB = 50_304


def _gpt2(width: int, depth: int, heads: int, context: int) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=_VOCAB,
        width=width,
        depth=depth,
        heads=heads,
        context=context,
        positions="learned",
        norm="layer",
        mlp="gelu",
    )


def _llama(depth: int) -> DecoderConfig:
    return DecoderConfig(vocab_size=_VOCAB, width=768, depth=depth, heads=12, context=512)


PRESETS: dict[str, DecoderConfig] = {
    "tiny": DecoderConfig(vocab_size=4096, width=256, depth=3, heads=4, context=256),
    "gpt2-124m": _gpt2(768, 12, 12, 512),
    "llama-124m": _llama(12),
    "llama-210m": _llama(24),
    "gpt2-355m": _gpt2(1024, 24, 16, 1024),
    "gpt2-720m": _gpt2(2048, 12, 16, 512),
}
