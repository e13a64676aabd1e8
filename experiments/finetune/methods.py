"""The methods under comparison: what moves, the optimizer, and five rates for each."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import optax

import jaxopt_lab as jol
from jaxopt_lab.optim import AdamW

Schedule = Callable[[Any], Any]
Kind = Literal["head", "adapters", "chosen", "grown", "projected", "full"]

ADAPTERS, KEEP, RANK, SCALE = 18, 6, 8, 2.0
HALVINGS, EVERY = 2, 10  # of WeightLoRA+, as released
HEAD_RATE = 1e-3  # of the head beside scaled LoRSum, whose own rates are of another kind
CLIP = 1.0

ADAPTER_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)


class Method(NamedTuple):
    """Methods of one kind and rank are lanes of one compiled program; the rest is numbers."""

    name: str
    kind: Kind
    rates: tuple[float, ...]
    rank: int = RANK
    random: bool = False  # adapters on KEEP random kernels
    every: int = 1  # steps between projections, where adapters are chosen
    head_apart: bool = False  # the head at HEAD_RATE; beside scaled LoRSum it always is

    @property
    def slug(self) -> str:
        """Name of its directory of results."""
        kept = (c if c.isalnum() else "-" for c in self.name.lower().replace("+", " plus"))
        return "-".join(filter(None, "".join(kept).split("-")))

    @property
    def stored_rank(self) -> int:
        """Columns of the arrays: adapters that are to grow have room for it from the start."""
        return self.rank * 2**HALVINGS if self.kind == "grown" else self.rank

    @property
    def program(self) -> tuple[Kind, int, bool]:
        """What tells one compiled program from another."""
        return self.kind, self.stored_rank, self.head_apart

    @property
    def final_parameters(self) -> int | None:
        """Parameters in adapters at the end, those without weight not counted."""
        left = {"adapters": KEEP if self.random else ADAPTERS, "projected": ADAPTERS}
        left |= {"chosen": KEEP, "grown": ADAPTERS // 2**HALVINGS}
        return left[self.kind] * self.stored_rank * 2 * 384 if self.kind in left else None


METHODS = (
    Method("head", "head", (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)),
    Method("LoRA", "adapters", ADAPTER_RATES),
    Method("LoRA, rank 3", "adapters", ADAPTER_RATES, rank=3),
    Method("LoRA, 6 random", "adapters", ADAPTER_RATES, random=True),
    Method("WeightLoRA", "chosen", ADAPTER_RATES),
    Method("WeightLoRA, every 125", "chosen", ADAPTER_RATES, every=125),
    Method("WeightLoRA+", "grown", ADAPTER_RATES),
    Method("scaled LoRSum", "projected", (0.03, 0.1, 0.3, 1.0, 3.0)),
    Method("full", "full", (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)),
)


def optimizer(
    method: Method, rate: Any, schedule: Schedule, every: Any, freeze_after: int
) -> optax.GradientTransformation:
    """The optimizer of a method; the rate and `every` may be traced."""

    def follow(peak: Any) -> Schedule:
        return lambda count: peak * schedule(count)

    if method.kind == "chosen":
        return jol.lora.weight_lora(
            follow(rate), keep=KEEP, weight_learning_rate=follow(5.0), every=every,
            freeze_after=freeze_after, eps=1e-8,
        )  # fmt: skip
    if method.kind == "grown":
        return jol.lora.weight_lora_plus(
            follow(rate), every=EVERY, halvings=HALVINGS, weight_learning_rate=follow(5.0), eps=1e-8
        )
    if method.kind == "projected":
        head = AdamW(learning_rate=follow(HEAD_RATE))
        return jol.lora.scaled_lorsum(follow(rate), clip=CLIP, fallback=head)
    adamw = optax.adamw(follow(rate), weight_decay=0.0)
    if not method.head_apart:
        return adamw

    def group(params: Any) -> Any:
        return {n: jax.tree.map(lambda _, n=n: n == "head", x) for n, x in params.items()}

    head = optax.adamw(follow(HEAD_RATE), weight_decay=0.0)
    return optax.partition({False: adamw, True: head}, group)
