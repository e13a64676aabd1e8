"""The training step of the same decoder in PyTorch, to be timed beside ours.

It is what a PyTorch user writes: float32 parameters under bfloat16 autocast, the loss compiled,
attention by `scaled_dot_product_attention`, fused AdamW. PyTorch is no dependency of this library.
"""

import importlib
import time
from typing import Any

import jax
import numpy as np

from jaxopt_lab.models import DecoderConfig


def peer_for(config: DecoderConfig) -> Any:
    """The module `torch`.

    Raises:
      ValueError: PyTorch is not installed, or the decoder is of another kind than `TorchTrainer`'s.
    """
    plain = not (config.bias or config.qkv_bias or config.qk_norm or config.rope_scaling)
    if not (plain and config.tied and config.num_kv_heads == config.heads):
        raise ValueError("peers: the PyTorch step has no biases, untied head or grouped heads")
    try:
        return importlib.import_module("torch")
    except ImportError as error:
        raise ValueError("peers: torch is not installed") from error


class TorchTrainer:
    """Steps of PyTorch on the parameters, tokens and device of ours.

    Args:
      config: A GPT-2 or LLaMA decoder without biases, with a tied head and as many key heads as
        query heads.
      params: As from `init_params`; copied.
      tokens: (B, T + 1).
      rate: Learning rate of AdamW.
      decay: Weight decay of AdamW.

    Raises:
      ValueError: As `peer_for`.
    """

    def __init__(
        self, config: DecoderConfig, params: Any, tokens: jax.Array, *, rate: float, decay: float
    ):
        """Copies the parameters; compiles nothing yet."""
        self.torch = torch = peer_for(config)
        self.device = "cuda" if jax.default_backend() == "gpu" else "cpu"
        self._params = _copied(torch, params, self.device)
        self._tokens = torch.tensor(np.asarray(tokens), dtype=torch.long, device=self.device)
        self._autocast = torch.autocast(
            self.device, torch.bfloat16, enabled=config.compute_dtype == "bfloat16"
        )
        leaves = [x for x in jax.tree.leaves(self._params) if x.requires_grad]
        fused = self.device == "cuda"
        self._optimizer = torch.optim.AdamW(leaves, lr=rate, weight_decay=decay, fused=fused)
        torch.set_float32_matmul_precision("high")
        self._loss = _loss(torch, config)
        self._compiled = torch.compile(self._loss)

    def loss(self) -> float:
        """Of the batch, not compiled."""
        with self.torch.no_grad(), self._autocast:
            return float(self._loss(self._params, self._tokens))

    def warm_up(self) -> float:
        """Compiles and takes a few steps; returns the seconds."""
        if self.device == "cuda":
            self.torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        self.run(4)
        return time.perf_counter() - start

    def run(self, steps: int) -> float:
        """Seconds a step."""
        self._wait()
        start = time.perf_counter()
        for _ in range(steps):
            with self._autocast:
                loss = self._compiled(self._params, self._tokens)
            loss.backward()
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
        self._wait()
        return (time.perf_counter() - start) / steps

    def peak_bytes(self) -> int | None:
        """The most that PyTorch's tensors have taken; None on a CPU."""
        return self.torch.cuda.max_memory_allocated() if self.device == "cuda" else None

    def _wait(self) -> None:
        if self.device == "cuda":
            self.torch.cuda.synchronize()


def _copied(torch: Any, params: Any, device: str) -> Any:
    """A tree of PyTorch parameters with a list of layers and kernels (out, in), its own order."""

    def parameter(x: Any, matrix: bool) -> Any:
        x = torch.tensor(np.array(x), device=device)
        if matrix:
            x = x.reshape(x.shape[0], -1).T.contiguous()
        return torch.nn.Parameter(x)

    def layer(i: int) -> Any:
        return jax.tree.map_with_path(
            lambda path, x: parameter(x[i], path[-1].key == "kernel"), params["layers"]
        )

    depth = jax.tree.leaves(params["layers"])[0].shape[0]
    others = {name: tree for name, tree in params.items() if name != "layers"}
    copied = jax.tree.map(lambda x: parameter(x, matrix=False), others)
    return copied | {"layers": [layer(i) for i in range(depth)]}


def _loss(torch: Any, config: DecoderConfig) -> Any:
    """(parameters, tokens) -> mean next-token loss."""
    F = torch.nn.functional
    width = (config.width,)

    def norm(x: Any, scale: Any) -> Any:
        if config.norm == "layer":
            return F.layer_norm(x, width, scale, None, config.norm_eps)
        return F.rms_norm(x, width, scale, config.norm_eps)

    def rotated(x: Any) -> Any:
        T, E = x.shape[-2:]
        index = torch.arange(0, E, 2, dtype=torch.float32, device=x.device)
        angle = torch.arange(T, device=x.device)[:, None] * config.rope_base ** (-index / E)
        a, b = x.float().chunk(2, -1)
        cos, sin = angle.cos(), angle.sin()
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)

    def attention(x: Any, weights: Any) -> Any:
        B, T, _ = x.shape
        qkv = F.linear(x, weights["qkv"]["kernel"]).view(B, T, 3, config.heads, -1)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        if config.positions == "rope":
            q, k = rotated(q), rotated(k)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return F.linear(y.transpose(1, 2).reshape(B, T, -1), weights["out"]["kernel"])

    def mlp(x: Any, weights: Any) -> Any:
        h = F.linear(x, weights["up"]["kernel"])
        if config.mlp == "swiglu":
            h = F.silu(F.linear(x, weights["gate"]["kernel"])) * h
        else:
            h = F.gelu(h, approximate="tanh")
        return F.linear(h, weights["down"]["kernel"])

    def loss(params: Any, tokens: Any) -> Any:
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        table = params["embedding"]["tokens"]
        x = F.embedding(inputs, table)
        if config.positions == "learned":
            x = x + params["embedding"]["positions"][: inputs.shape[1]]
        x = x.to(getattr(torch, config.compute_dtype))  # the residual stream, as ours
        for weights in params["layers"]:
            x = x + attention(norm(x, weights["attention_norm"]["scale"]), weights["attention"])
            x = x + mlp(norm(x, weights["mlp_norm"]["scale"]), weights["mlp"])
        logits = F.linear(norm(x, params["final_norm"]["scale"]), table)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    return loss
