"""Default rates of each optimizer for each preset, and in fine-tuning for what moves.

"Measured" stands for experiments/default_rates, a coarse sweep of short runs.

The tables of Bolatov et al., "LionMuon: Alternating Spectral and Sign Descent for Efficient
Training", arXiv 2605.19811, are for its runs at 124M (GPT-2 and LLaMA style, 16 384 tokens a
step), 355M (three quarters of the 124M rates) and 720M (tuned over 500 steps); its AdamW of
embeddings and norms has a rate of its own, here a ratio.
"""

from dataclasses import replace
from typing import Any

from jaxopt_lab.train.config.choices import CHOICES
from jaxopt_lab.train.config.optimizers import OPTIMIZERS, OptimizerConfig

Settings = dict[str, Any]

UNTUNED: Settings = {}
"""Nobody has tuned it here that we know of: the optimizer's own default."""

_124M: dict[str, Settings] = dict.fromkeys(OPTIMIZERS, UNTUNED) | {
    "lion-muon": {"learning_rate": 1e-3},  # two-step period, sign rate 5e-5, AdamW 1e-3
    "sign-muon": {"learning_rate": 2e-3, "sign_lr_ratio": 0.025, "adam_lr_ratio": 0.5},
    "muon": {"learning_rate": 1e-3},
    "lion": {"learning_rate": 1e-4},  # measured; the paper's has AdamW for embeddings and norms
    "adamw": {"learning_rate": 5e-4},
    "optax-muon": {"learning_rate": 1e-3},  # the paper's Muon, whose step has the same scale
    # llm-baselines at 124M, LLaMA style, as the authors of DyKAF ran it.
    "soap": {"learning_rate": 5e-4},
    "dykaf": {"learning_rate": 1e-3},
    "shampoo": {"learning_rate": 5e-4},  # its step is grafted from AdamW, so AdamW's
}

TUNED: dict[str, dict[str, Settings]] = {
    # Measured: the best rate of the others is their own default.
    "tiny": dict.fromkeys(OPTIMIZERS, UNTUNED)
    | {
        # 300 steps are short for an average over 100; averaging.md, five fresh seeds.
        "lion-muon": {"b2": 0.95},
        "lion": {"learning_rate": 3e-4},
        "signum": {"learning_rate": 3e-4},
        "adamw": {"learning_rate": 1e-3},
    },
    # Measured: with the published sign rate, 1/20, a batch near the end of the warm-up jumps.
    "gpt2-124m": _124M | {"lion-muon": {"learning_rate": 1e-3, "sign_lr_ratio": 1 / 60}},
    "llama-124m": _124M,
    "llama-210m": dict.fromkeys(OPTIMIZERS, UNTUNED)
    | {
        # The distributed Muon of the adaptive warm-up experiments at this shape, 1e-3 in batches of
        # 32 x 512; these have its spectral step, of the same scale.
        "lion-muon": {"learning_rate": 1e-3},
        "muon": {"learning_rate": 1e-3},
        "optax-muon": {"learning_rate": 1e-3},
    },
    "gpt2-355m": dict.fromkeys(OPTIMIZERS, UNTUNED)
    | {
        "lion-muon": {"learning_rate": 7.5e-4},
        "sign-muon": {"learning_rate": 1.5e-3, "sign_lr_ratio": 0.025, "adam_lr_ratio": 0.5},
        "muon": {"learning_rate": 7.5e-4},
        "optax-muon": {"learning_rate": 7.5e-4},
    },
    "gpt2-720m": dict.fromkeys(OPTIMIZERS, UNTUNED)
    | {
        "lion-muon": {"learning_rate": 3e-3, "sign_lr_ratio": 1 / 300},
        "sign-muon": {"learning_rate": 3e-3, "sign_lr_ratio": 0.01},
        "muon": {"learning_rate": 3e-3},
        "adamw": {"learning_rate": 1e-3},
    },
}
"""Settings that differ from the optimizer's own defaults, by preset and optimizer."""


def _finetuned(adam: float, sign: float, spectral: float) -> dict[str, Settings]:
    """Rates by the class of the optimizer: by what the length of its step is measured in."""
    rates = {
        # A coordinate moves by about the rate; Shampoo's step has the length of AdamW's.
        **dict.fromkeys(("adamw", "soap", "dykaf", "shampoo"), adam),
        **dict.fromkeys(("lion", "signum"), sign),
        **dict.fromkeys(("lion-muon", "sign-muon", "muon", "optax-muon"), spectral),
    }
    settings = {name: {"learning_rate": rate} for name, rate in rates.items()}
    settings["adamw"] |= {"b2": 0.999, "weight_decay": 0.0}
    return settings


_ADAPTERS = _finetuned(adam=1e-3, sign=3e-4, spectral=1e-2)

FINETUNED: dict[str, dict[str, Settings]] = {
    "full": _finetuned(adam=1e-4, sign=3e-5, spectral=1e-3),
    "head": _finetuned(adam=1e-2, sign=3e-3, spectral=1e-2),
    "lora": _ADAPTERS,
    "dora": _ADAPTERS,
}
"""The same for fine-tuning, by what moves; optimizers of pairs and without gradients have their own
defaults."""


def tuned_settings(place: str, name: str) -> Settings:
    """What differs from an optimizer's own defaults.

    Args:
      place: Name of a preset, of fine-tuning what moves, or anything else, for which nothing is
        tuned.
      name: Name of an optimizer.
    """
    return {**TUNED, **FINETUNED}.get(place, {}).get(name, UNTUNED)


def default_optimizer(place: str, name: str) -> OptimizerConfig:
    """An optimizer as it trains without further settings.

    >>> default_optimizer("gpt2-124m", "lion-muon").learning_rate
    0.001
    >>> default_optimizer("full", "adamw").learning_rate
    0.0001

    Args:
      place: As for `tuned_settings`.
      name: Name of an optimizer.
    """
    return replace(CHOICES["optimizer"][name](), **tuned_settings(place, name))
