"""The rows of the comparison; README.md says how rates were set."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import optax

import jaxopt_lab as jol
from jaxopt_lab import zeroth_order as zo

EPS = {"full": 1e-3, "lora": 1e-2}
# As released; float32 iterates would take most of the time of a row.
RELEASED: dict[str, Any] = {"newton_schulz": jol.NewtonSchulz(dtype="bfloat16")}


class Given(NamedTuple):
    """What a method is built from."""

    rate: optax.Schedule
    options: dict[str, Any]  # eps and key
    probes: Callable[..., zo.Probes]  # with the layouts of the matrices


@dataclass(frozen=True)
class Method:
    """A row."""

    build: Callable[[Given], optax.GradientTransformation]
    rates: tuple[float, float, float]
    passes: int = 2  # forward passes a step; of backpropagation 3
    moves: Literal["full", "lora"] = "full"
    perturbed: Literal["trees", "beside"] | None = "trees"  # None: backpropagation
    longer: int = 1  # times the budget


def around(rate: float) -> tuple[float, float, float]:
    """Three rates a factor of 5 apart."""
    return rate / 5, rate, rate * 5


def mezo(given: Given) -> optax.GradientTransformation:
    """SGD on the estimate."""
    return zo.mezo(given.rate, **given.options, probes=given.probes())


def averaged(given: Given) -> optax.GradientTransformation:
    """MeZO with as many directions as LDSD has candidates."""
    return zo.mezo(given.rate, **given.options, probes=given.probes(num_directions=5))


def momentum(given: Given) -> optax.GradientTransformation:
    """MeZO with heavy-ball momentum."""
    return zo.mezo(given.rate, momentum=0.9, **given.options, probes=given.probes())


def sign(given: Given) -> optax.GradientTransformation:
    """Sign of every entry of the estimate."""
    return zo.zo_signsgd(given.rate, **given.options, probes=given.probes())


def adamm(given: Given) -> optax.GradientTransformation:
    """AMSGrad on the estimate."""
    return zo.zo_adamm(given.rate, **given.options, probes=given.probes())


def muon(given: Given) -> optax.GradientTransformation:
    """Newton-Schulz of the estimate."""
    return zo.zo_muon(given.rate, **RELEASED, **given.options, probes=given.probes())


def low_rank(given: Given) -> optax.GradientTransformation:
    """SGD on the average of 32 probes of rank 1, evaluated together beside the weights."""
    probes = given.probes(sampler=zo.low_rank(1), num_directions=32, engine=zo.vmapped())
    return zo.mezo(given.rate, **given.options, probes=probes)


def jaguar_sign(given: Given) -> optax.GradientTransformation:
    """Sign of a momentum that is refreshed block by block."""
    return zo.jaguar_signsgd(given.rate, **given.options, probes=given.probes())


def jaguar_muon(given: Given) -> optax.GradientTransformation:
    """Newton-Schulz of that momentum."""
    return zo.jaguar_muon(given.rate, **RELEASED, **given.options, probes=given.probes())


def ldsd(given: Given) -> optax.GradientTransformation:
    """SGD along the best of five candidates of a learned policy."""
    return zo.ldsd(optax.sgd(given.rate), candidates=5, **given.options, probes=given.probes())


def ldsd_jaguar(given: Given) -> optax.GradientTransformation:
    """JAGUAR SignSGD along the best of five candidates."""
    base = optax.chain(
        zo.scale_by_coordinate_momentum(b1=0.9),
        optax.scale_by_sign(),
        optax.scale_by_learning_rate(given.rate),
    )
    probes = given.probes(sampler=zo.sparse(params_ratio=0.1))
    return zo.ldsd(base, candidates=5, start="random", **given.options, probes=probes)


def adamw(given: Given) -> optax.GradientTransformation:
    """Backpropagation."""
    return optax.adamw(given.rate, weight_decay=0.0)


# In the order in which they are run: what the claims need comes first.
METHODS: dict[str, Method] = {
    "AdamW": Method(adamw, around(3e-5), 3, perturbed=None),
    "MeZO": Method(mezo, around(1e-6)),
    "LDSD over SGD": Method(ldsd, around(1e-6), 6),
    "MeZO, 5 probes": Method(averaged, around(5e-6), 10),
    "JAGUAR Muon": Method(jaguar_muon, around(1e-4)),
    "JAGUAR SignSGD": Method(jaguar_sign, around(5e-6)),
    "AdamW, LoRA": Method(adamw, around(1e-3), 3, "lora", None),
    "MeZO, LoRA": Method(mezo, around(1e-4), 2, "lora"),
    "LDSD over SGD, LoRA": Method(ldsd, around(1e-4), 6, "lora"),
    "JAGUAR Muon, LoRA": Method(jaguar_muon, around(1e-3), 2, "lora"),
    "low-rank, 32 probes": Method(low_rank, around(3e-5), 64, perturbed="beside"),
    "MeZO, momentum": Method(momentum, around(1e-7)),
    "ZO-SignSGD": Method(sign, around(1e-5)),
    "ZO-AdaMM": Method(adamm, around(3e-5)),
    "ZO-Muon": Method(muon, around(2e-4)),
    "LDSD over JAGUAR": Method(ldsd_jaguar, around(5e-6), 6),
    "AdamW at convergence": Method(adamw, around(3e-5), 3, perturbed=None, longer=3),
}
