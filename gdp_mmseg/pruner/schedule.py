"""Schedule of a gated training, as pure functions of its progress.

Progress is the share of the training that is over, in [0, 1]. No state is
kept, so a resumed training cannot lose any.
"""
from __future__ import annotations

import dataclasses
import math
from typing import Any

# Until this share of the pruning phase a whole group may close. A group that
# closes later is gone at once, too late to spend its cost elsewhere.
_GROUPS_MAY_CLOSE_UNTIL = 2 / 3
# Share of the pruning phase that rounding may lack at its end.
_ROUNDING = 1e-9
# Observations of the gains in the warm-up, at its end: those of before would
# count less than a thousandth, as 0.99^700 < 0.001.
_OBSERVED_WARMUP = 700
# Moves of the gates that are enough for a pruning phase, several times those
# of the trainings in our results. In a phase that is twice as long, gates rest
# in every other step, which saves time.
_ENOUGH_MOVES = 2500
# Steps of the pruning phase in which other channels take over what gates let
# through less. Each takes longer than another step; in a short phase only one
# in so many steps is of that kind.
_TAKEOVERS = 24
_STEPS_PER_TAKEOVER = 4


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Phases and budget of a gated training.

    Args:
        phases (tuple[float, float, float]): Shares of the training that are
            warm-up (gates do not move), pruning (the budget falls, gates
            move) and settling (gates are fixed, weights adapt). They add up
            to 1.
        ramp (float): Share of the pruning phase over which the budget falls
            linearly to the target. It is constant from then on.
        rests (bool): Whether gates rest between their moves in a long pruning
            phase.

    Raises:
        ValueError: If a value is out of its range.

    Examples:
        >>> schedule = Schedule(phases=(0.1, 0.5, 0.4))
        >>> round(schedule.pruned_share(0.35), 6)
        0.5
        >>> schedule.budget_at(0.0, 0.4), schedule.budget_at(1., 0.4)
        (1.0, 0.4)
        >>> schedule.channel_weight_at(0.35), schedule.channel_weight_at(0.6)
        (0.5, 1.0)
    """
    phases: tuple[float, float, float] = (0.35, 0.5, 0.15)
    ramp: float = 0.9
    rests: bool = False

    def __post_init__(self) -> None:
        if (not _are_numbers(self.phases, 3) or min(self.phases) < 0
                or self.phases[1] == 0
                or not math.isclose(sum(self.phases), 1, abs_tol=1e-6)):
            raise ValueError(
                'gdp.phases: expected the shares of warm-up, pruning (above '
                '0) and settling, which add up to 1, e.g. (0.35, 0.5, 0.15), '
                f'but got {self.phases}')
        if not 0 < self.ramp <= 1:
            raise ValueError('ramp: expected a share in (0, 1], but got '
                             f'{self.ramp}')

    def pruned_share(self, progress: float) -> float:
        """Share of the pruning phase that is over: 0 before, 1 after it."""
        warmup, pruning, _ = self.phases
        return min(max((progress - warmup) / pruning, 0.), 1.)

    def phase_at(self, progress: float) -> str:
        """Name of the phase: 'warmup', 'pruning' or 'settling'."""
        if progress < self.phases[0]:
            return 'warmup'
        is_over = self.pruned_share(progress) >= 1 - _ROUNDING
        return 'settling' if is_over else 'pruning'

    def is_last_pruning_step(self, progress: float, step: float) -> bool:
        """Tell whether a step is the last one of the pruning phase.

        Args:
            progress (float): Progress at this step.
            step (float): Progress from one step to the next.
        """
        return (self.phase_at(progress) == 'pruning'
                and self.phase_at(progress + step) == 'settling')

    def period(self, steps: float) -> int:
        """Number of steps from one move of the gates to the next.

        Args:
            steps (float): Number of steps of the optimizer in the training.

        Examples:
            >>> [Schedule(rests=True).period(n) for n in (5000, 20000, 80000)]
            [1, 4, 16]
        """
        pruning = round(steps * self.phases[1])
        return max(pruning // _ENOUGH_MOVES, 1) if self.rests else 1

    def is_rest(self, index: int, steps: float) -> bool:
        """Tell whether gates neither move nor observe their gains in a step.

        They do not rest shortly before the settling phase.

        Args:
            index (int): Number of steps before it.
            steps (float): Number of steps in the training.
        """
        period = self.period(steps)
        return (index % period > 0 and self.phase_at(
            (index + period) / steps) != 'settling')

    def is_takeover(self, index: int, steps: float) -> bool:
        """Tell whether other channels take over in a step.

        They take over what gates let through less since the last such step.
        These steps are evenly spaced, with one at the end of the pruning
        phase.

        Args:
            index (int): Number of steps before it.
            steps (float): Number of steps in the training.
        """
        progress, step = index / max(steps, 1), 1 / max(steps, 1)
        # Gates move in it.
        period = self.period(steps)
        interval = period * max(
            round(steps * self.phases[1] /
                  (_TAKEOVERS * period)), _STEPS_PER_TAKEOVER)
        return (self.phase_at(progress) == 'pruning' and index % interval == 0
                or self.is_last_pruning_step(progress, step))

    def observed_from(self, steps: float) -> float:
        """Progress from which on the gains of open gates are observed.

        Args:
            steps (float): Number of steps in the training.
        """
        observed = _OBSERVED_WARMUP * self.period(steps)
        return self.phases[0] - observed / max(steps, 1)

    @property
    def end_of_pruning(self) -> float:
        """Progress just before the settling phase begins."""
        return (self.phases[0] + self.phases[1]) * (1 - 1e-9)

    def budget_at(self, progress: float, target: float) -> float:
        """Share of the dense cost that is allowed, from 1 to ``target``."""
        share = min(self.pruned_share(progress) / self.ramp, 1.)
        return 1 + (target - 1) * share

    def channel_weight_at(self, progress: float) -> float:
        """Share by which a half-open gate counts as a full channel.

        0.5 while the budget falls. Once the budget is constant it rises to 1
        over the first half of the remaining time. From then on the cost counts
        every half-open gate as a full channel, so opening it is free.
        """
        if self.pruned_share(progress) <= self.ramp:
            return 0.5
        constant = (self.pruned_share(progress) - self.ramp) / (1 - self.ramp)
        return min(0.5 + constant, 1.)

    def protects_groups(self, progress: float) -> bool:
        """Tell whether every group that is alive must keep an open gate.

        True in the last third of the pruning phase.
        """
        return self.pruned_share(progress) > _GROUPS_MAY_CLOSE_UNTIL


def steps_before(progress: float, steps: float) -> int:
    """Number of whole steps before a progress.

    Args:
        progress (float): Share of the training that is over, in [0, 1].
        steps (float): Number of steps in the training.
    """
    # A product of shares may be a little less than a whole number.
    return math.floor(progress * steps + 1e-6)


def _are_numbers(values: Any, length: int) -> bool:
    return (isinstance(values, (tuple, list)) and len(values) == length
            and all(isinstance(value, (int, float)) for value in values))
