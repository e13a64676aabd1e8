"""Errors that say where an option is, for names of earlier versions and of other libraries."""

import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

# What to write instead of a keyword that no factory has, or that one does not have.
ELSEWHERE = {
    # Optax's names.
    "weight_decay_mask": "mask=...",
    "decay_mask": "mask=..., or routing=Routing(decay_mask=...)",
    "beta": "b1=...",
    "beta1": "b1=...",
    "beta2": "b2=...",
    "momentum": "b1=...",
    "decay": "b1=...",
    "epsilon": "eps=...",
    "ns_coeffs": "newton_schulz=NewtonSchulz(coefficients=...)",
    "ns_steps": "newton_schulz=NewtonSchulz(steps=...)",
    "ns_dtype": "newton_schulz=NewtonSchulz(dtype=...)",
    "ns_coefficients": "newton_schulz=NewtonSchulz(coefficients=...)",
    "consistent_rms": 'spectral_scale="match_rms", which is a consistent_rms of 0.2',
    "muon_weight_dimension_numbers": "matrix_axes=...",
    "adam_b1": "fallback=AdamW(b1=...)",
    "adam_b2": "fallback=AdamW(b2=...)",
    "adam_eps": "fallback=AdamW(eps=...)",
    "adam_eps_root": "fallback=AdamW(eps=...), which stands outside of the root",
    "adam_weight_decay": "fallback=AdamW(weight_decay=...)",
    "adam_learning_rate": "fallback=AdamW(learning_rate=...)",
    "adam_lr_ratio": "fallback=AdamW(lr_ratio=...)",
    # Earlier versions.
    "on_uncovered": "routing=Routing(on_uncovered=...)",
    "vocabulary_size": "routing=Routing(vocabulary_size=...)",
    "param_shardings": "mesh=MeshWork(param_shardings=...)",
    "replicated_work": "mesh=MeshWork(replicated_work=...)",
    "orthogonalizer": "eigenbasis=Eigenbasis(orthogonalizer=...)",
    "factor_precision": "eigenbasis=Eigenbasis(factor_precision=...)",
    "rotation_precision": "eigenbasis=Eigenbasis(rotation_precision=...)",
    "one_sided": "eigenbasis=Eigenbasis(one_sided=...)",
    "factored_second_moment": 'eigenbasis=Eigenbasis(second_moment="factored")',
    "rank1_second_moment": 'eigenbasis=Eigenbasis(second_moment="rank_one")',
}


def explains_keywords(**elsewhere: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorate a factory: an unknown keyword that has a place here is told where it is.

    Args:
      **elsewhere: What to write instead of a keyword, for this factory; `ELSEWHERE` holds for all.
    """

    def decorate(factory: Callable[P, T]) -> Callable[P, T]:
        own = inspect.signature(factory).parameters
        # Of what holds for all, only what this factory has, or its ready optimizer.
        common = {old: new for old, new in ELSEWHERE.items() if new.split("=")[0] in own}
        if factory.__name__.startswith("scale_by_"):
            ready = ("mask=", "routing=", "fallback=")
            common |= {
                old: f"{new} of the ready optimizer"
                for old, new in ELSEWHERE.items()
                if new.startswith(ready)
            }
        known = common | elsewhere

        # Not `**unknown` in the signature: `optax.inject_hyperparams` reads that.
        @functools.wraps(factory)
        def checked(*args: P.args, **kwargs: P.kwargs) -> T:
            for name in kwargs:
                if name not in own and name in known:
                    verb = "there is" if known[name].startswith("no such") else "write"
                    raise TypeError(
                        f"{factory.__name__} has no argument {name!r}; {verb} {known[name]}"
                    )
            return factory(*args, **kwargs)

        return checked

    return decorate
