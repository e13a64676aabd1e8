"""The schedules a run can name: one frozen dataclass each."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import optax
from jaxtyping import Array, PyTree

from jaxopt_lab import schedules
from jaxopt_lab.core.dual_norms import DualNorms
from jaxopt_lab.diagnostics import find_state
from jaxopt_lab.parity.warmup import official_warmup
from jaxopt_lab.schedules import DecayShape
from jaxopt_lab.train.config.bounds import CountOrZero, PositiveOrZero, Share
from jaxopt_lab.train.errors import ConfigError, within


class Follower(NamedTuple):
    """A schedule that follows the run: it knows the rate only from its state."""

    scaling: optax.GradientTransformationExtraArgs  # stands behind an optimizer at its peak rate
    # (state of the chain) -> learning rate of the next step, and what explains it
    rate: Callable[[PyTree], tuple[Array, dict[str, Array]]]
    # (state of the chain at the end) -> how it went, as numbers and in a sentence
    outcome: Callable[[PyTree], tuple[dict[str, Any], str]]


@dataclass(frozen=True)
class ScheduleConfig:
    """A schedule by name."""

    def validate(self, steps: int) -> None:
        """Checks the values against the length of the run."""

    def rate(self, peak: float, steps: int) -> optax.Schedule:
        """(number of steps taken) -> learning rate."""
        raise NotImplementedError

    def follower(
        self, peak: float, steps: int, norm: Mapping[DualNorms, float], matrix_axes: PyTree
    ) -> Follower | None:
        """For a schedule that follows the run (reads the loss, say) instead of having a `rate`.

        Args:
          peak: Highest rate.
          steps: Length of the run.
          norm: The norm in which the optimizer's steps have one length, or shares of several.
          matrix_axes: Tree of MuonDimensionNumbers, None for leaves that are not matrices.
        """
        return None


@dataclass(frozen=True)
class ConstantConfig(ScheduleConfig):
    """The peak rate at every step."""

    def rate(self, peak: float, steps: int) -> optax.Schedule:
        """See the base class."""
        return optax.constant_schedule(peak)


@dataclass(frozen=True)
class _WarmupConfig(ScheduleConfig):
    warmup_fraction: Share = 0.05
    """Share of the steps in which the rate rises linearly from 1 % of the peak."""
    warmup_steps: CountOrZero | None = None
    """Number of those steps; overrides the share."""

    def validate(self, steps: int) -> None:
        """Checks the length of the warm-up."""
        given = self.warmup_steps
        if given is not None and given > steps:
            raise ConfigError("schedule.warmup_steps", given, f"expected 0 to steps = {steps}")

    def warmup(self, steps: int) -> int:
        """Number of warm-up steps of a run of `steps`."""
        given = self.warmup_steps
        return round(self.warmup_fraction * steps) if given is None else given


@dataclass(frozen=True)
class CosineConfig(_WarmupConfig):
    """Linear warm-up, then half a cosine to zero."""

    def rate(self, peak: float, steps: int) -> optax.Schedule:
        """See the base class."""
        warmup = self.warmup(steps)
        # The first step already moves. Optax refuses a decay of no steps.
        start, end = (0.01 if warmup else 1.0), max(steps, warmup + 1)
        shape = optax.warmup_cosine_decay_schedule(start, 1.0, warmup, end)
        # A comparison traces the peak, which Optax's function would look at.
        return lambda count: peak * shape(count)


@dataclass(frozen=True)
class WsdConfig(_WarmupConfig):
    """Linear warm-up, plateau, decay over the last part of the run."""

    decay_fraction: float = 0.2
    """Share of the steps in which the rate decays."""
    decay_shape: DecayShape = "linear"
    """Form of the decay."""
    final_fraction: float = 0.0
    """Share of the peak that is left at the end."""

    def validate(self, steps: int) -> None:
        """Also checks the decay."""
        super().validate(steps)
        with within("schedule"):
            self.rate(1.0, steps)

    def rate(self, peak: float, steps: int) -> optax.Schedule:
        """See the base class."""
        names = ("decay_fraction", "decay_shape", "final_fraction")
        options = {name: getattr(self, name) for name in names}
        return schedules.warmup_stable_decay(peak, steps, self.warmup(steps), **options)


@dataclass(frozen=True)
class AdaptiveWarmupConfig(ScheduleConfig):
    """The rate follows the training loss up to its peak, then decays."""

    target_loss: PositiveOrZero | Literal["auto"] | None = None
    """Training loss in nats per token that the run is expected to end at; a guess that is too high
    by a nat or two costs little, one that is too low much. `auto` extrapolates it as it goes."""
    div_factor: float = 100.0
    """Peak rate over the first rate."""
    delta_star_rule: Literal["exact", "official"] | float = "exact"
    """Gap to the target at which the peak is reached: by the paper's objective, integrated
    accurately or as released, or a share of the first gap."""
    smoothing: float = 0.0
    """Decay of an exponential average of the loss; 0 takes every loss as it is."""
    fallback_after: float | None = 0.5
    """Share of the steps after which the rate decays from where it is, should the peak not have
    been reached; None never does."""
    final_div_factor: float = 1e4
    """Peak rate over the last rate."""

    def validate(self, steps: int) -> None:
        """Checks the values."""
        if self.target_loss is None:
            wanted = "expected the loss that the run should end at"
            raise ConfigError("schedule.target_loss", None, wanted)
        with within("schedule"):
            self._transform(1.0, steps, "spectral", None)

    def follower(
        self, peak: float, steps: int, norm: Mapping[DualNorms, float], matrix_axes: PyTree
    ) -> Follower:
        """See the base class."""

        def rate(opt_state: PyTree) -> tuple[Array, dict[str, Array]]:
            state = find_state(opt_state, schedules.AdaptiveWarmupState)
            names = ("gap", "peak_gap", "switch_step")
            return state.rate, {name: getattr(state, name) for name in names}

        scaling = self._transform(peak, steps, norm, matrix_axes)
        return Follower(scaling, rate, lambda opt_state: self._outcome(opt_state, peak, steps))

    def _transform(
        self, peak: float, steps: int, norm: Any, matrix_axes: PyTree
    ) -> optax.GradientTransformationExtraArgs:
        assert self.target_loss is not None
        names = ("smoothing", "fallback_after", "final_div_factor")
        options: dict[str, Any] = {name: getattr(self, name) for name in names}
        options |= {"norm": norm, "matrix_axes": matrix_axes, "relative": True}
        run = (peak, steps, self.target_loss, self.div_factor)
        if self.delta_star_rule == "official":
            return official_warmup(*run, official_first_step=False, **options)
        return schedules.adaptive_warmup(*run, delta_star_rule=self.delta_star_rule, **options)

    def _outcome(self, opt_state: PyTree, peak: float, steps: int) -> tuple[dict[str, Any], str]:
        assert self.target_loss is not None
        state = jax.device_get(find_state(opt_state, schedules.AdaptiveWarmupState))
        target = self.target_loss
        if isinstance(target, str):
            target = float(state.estimate.first_loss - state.initial_gap)
        switch, decay_from = int(state.switch_step), float(state.decay_from)
        numbers = {
            "warmup_steps": switch if switch >= 0 else None,
            "initial_gap": float(state.initial_gap),
            "peak_gap": float(state.peak_gap),
            "losses_ignored": int(state.ignored),
        }
        wanted = f"a training loss of {target + float(state.peak_gap):.3f}"
        after, remedy = f"{switch} of {steps} steps", "choose a higher schedule.target_loss"
        if state.peak_gap <= 0:
            sentence = f"the first loss was at or below the target {target}; there was no warm-up, "
            sentence += "the rate decayed from its peak over the whole run"
        elif switch < 0:
            sentence = f"{wanted} was not reached, the rate never came to its peak; {remedy}"
        elif decay_from < (1 - 1e-6) * peak:
            sentence = f"{wanted} was not reached within {after}; the rate decayed from "
            sentence += f"{decay_from:.3g}, where it was; {remedy}"
        else:
            sentence = f"peak reached after {after}, at {wanted}"
        return numbers, f"adaptive warm-up: {sentence}"


SCHEDULES: dict[str, type[ScheduleConfig]] = {
    "cosine": CosineConfig,
    "wsd": WsdConfig,
    "constant": ConstantConfig,
    "adaptive-warmup": AdaptiveWarmupConfig,
}
