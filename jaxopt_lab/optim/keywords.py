"""What a public factory does with its arguments before it looks at them.

Errors say where an option is, for names of earlier versions and of other libraries.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

from jaxopt_lab.core.checks import plain_number

P = ParamSpec("P")
T = TypeVar("T")

_OF_READY = ("mask=", "routing=", "fallback=")
# What to write instead of a keyword that no factory has, or that one does not have.
ELSEWHERE = {
    # Optax's names.
    "weight_decay_mask": "mask=...",
    "decay_mask": "mask=..., or routing=Routing(decay_mask=...)",
    "beta": "b1=...",
    "beta1": "b1=...",
    "beta2": "b2=...",
    "momentum": "b1=...",
    "b1": "momentum=...",
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
    # Zero-order methods.
    **{
        name: f"probes=Probes({name}=...)"
        for name in ("sampler", "num_directions", "two_sided", "engine", "matrix_axes", "trainable")
    },
    "seed": "key=jax.random.key(seed)",
}


def explains_keywords(**elsewhere: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorate a factory: an unknown keyword that has a place here is told where it is.

    NumPy numbers become Python's, whose dtypes promote nothing, and an option object has to be of
    the class of its default.

    Args:
      **elsewhere: What to write instead of a keyword, for this factory; `ELSEWHERE` holds for all.
    """

    def decorate(factory: Callable[P, T]) -> Callable[P, T]:
        own = inspect.signature(factory).parameters
        known = _elsewhere(factory.__name__, own) | elsewhere

        def taken(name: str, value: Any) -> Any:
            if name not in own and name in known:
                verb = "there is" if known[name].startswith("no such") else "write"
                raise TypeError(
                    f"{factory.__name__} has no argument {name!r}; {verb} {known[name]}"
                )
            default = own[name].default if name in own else None
            if dataclasses.is_dataclass(default) and not isinstance(value, type(default)):
                wanted = type(default).__name__
                raise TypeError(f"{factory.__name__}: {name} is {value!r}, wanted a {wanted}")
            return plain_number(value)

        # Not `**unknown` in the signature: `optax.inject_hyperparams` reads that.
        @functools.wraps(factory)
        def checked(*args: Any, **kwargs: Any) -> T:
            make: Callable[..., T] = factory
            kwargs = {name: taken(name, value) for name, value in kwargs.items()}
            return make(*map(plain_number, args), **kwargs)

        return checked

    return decorate


def _elsewhere(name: str, own: Mapping[str, Any]) -> dict[str, str]:
    """Of what holds for all, what this factory has, or its ready optimizer."""
    common = {old: new for old, new in ELSEWHERE.items() if new.split("=")[0] in own}
    if "momentum" in own:
        common |= {old: "momentum=..." for old, new in ELSEWHERE.items() if new == "b1=..."}
    if {"eps", "key"} <= own.keys():  # the size of a perturbation, in papers and elsewhere
        common |= {"tau": "eps=...", "zo_eps": "eps=..."}
    if name.startswith("scale_by_") and "probes" not in own:
        ready = {k: v for k, v in ELSEWHERE.items() if v.startswith(_OF_READY)}
        common |= {old: f"{new} of the ready optimizer" for old, new in ready.items()}
    return common
