"""What holds at which progress of a training, as pure functions."""
from __future__ import annotations

import dataclasses
import math
from typing import Any


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What holds at which progress of training, as pure functions.

    Args:
        phases (tuple[float, float, float]): Shares of the training that are
            warm-up (gates still), pruning (epsilon anneals, the budget closes
            in) and settling (gates fixed, weights adapt). They add up to 1.
        epsilon (tuple[float, float]): Its values at the start and at the end
            of the pruning phase; geometric in between.
        ramp (float): The share of the pruning phase over which the budget
            falls linearly to the target; then it holds.

    Examples:
        >>> schedule = Schedule(phases=(0.1, 0.5, 0.4), epsilon=(0.1, 0.001))
        >>> round(schedule.epsilon_at(0.35), 6)
        0.01
        >>> schedule.budget_at(0.0, 0.4), schedule.budget_at(1., 0.4)
        (1.0, 0.4)
        >>> schedule.channel_weight_at(0.35), schedule.channel_weight_at(0.6)
        (0.5, 1.0)
    """
    phases: tuple[float, float, float] = (0.35, 0.5, 0.15)
    epsilon: tuple[float, float] = (0.1, 1e-4)
    ramp: float = 0.9

    def __post_init__(self) -> None:
        if (not _are_numbers(self.phases, 3) or min(self.phases) < 0
                or self.phases[1] == 0
                or not math.isclose(sum(self.phases), 1, abs_tol=1e-6)):
            raise ValueError(
                'phases: expected the shares of warm-up, pruning (above 0) '
                'and settling, which add up to 1, e.g. (0.35, 0.5, 0.15), but '
                f'got {self.phases}')
        if (not _are_numbers(self.epsilon, 2)
                or not 0 < self.epsilon[1] <= self.epsilon[0]):
            raise ValueError(
                'epsilon: expected (start, end) with 0 < end <= start, e.g. '
                f'(0.1, 1e-4), but got {self.epsilon}')
        if not 0 < self.ramp <= 1:
            raise ValueError('ramp: expected a share in (0, 1], but got '
                             f'{self.ramp}')

    def pruned_share(self, progress: float) -> float:
        """Share of the pruning phase that is over, 0 before, 1 after it."""
        warmup, pruning, _ = self.phases
        return min(max((progress - warmup) / pruning, 0.), 1.)

    def phase_at(self, progress: float) -> str:
        """``'warmup'``, ``'pruning'`` or ``'settling'``."""
        if progress < self.phases[0]:
            return 'warmup'
        return 'pruning' if self.pruned_share(progress) < 1 else 'settling'

    def with_the_end(self, progress: float, step: float) -> float:
        """Progress, or the end of pruning if that comes before the next step.

        So the last step of the gates has the target for its budget, also
        where gradients are accumulated over many iterations.
        """
        end = self.phases[0] + self.phases[1]
        is_last = (
            self.phase_at(progress) == 'pruning'
            and self.phase_at(progress + step) == 'settling')
        return end * (1 - 1e-9) if is_last else progress

    def epsilon_at(self, progress: float) -> float:
        """Epsilon at ``progress`` in [0, 1], falling geometrically."""
        start, end = self.epsilon
        return start * (end / start)**self.pruned_share(progress)

    def budget_at(self, progress: float, target: float) -> float:
        """Budget at ``progress`` in [0, 1], from 1 to ``target``."""
        share = min(self.pruned_share(progress) / self.ramp, 1.)
        return 1 + (target - 1) * share

    def channel_weight_at(self, progress: float) -> float:
        """Share of a half-open gate that counts as a whole channel.

        One half while the budget falls; where the budget stands it rises
        linearly to 1, which is what the gate will be in the pruned network,
        and stays there for the second half of that time: to open what is
        half open then costs nothing.
        """
        if self.pruned_share(progress) <= self.ramp:
            return 0.5
        standing = (self.pruned_share(progress) - self.ramp) / (1 - self.ramp)
        return min(0.5 + standing, 1.)

    def protects_groups(self, progress: float) -> bool:
        """Whether a group that is alive must stay alive.

        In the last third of the pruning phase: what dies with a group is gone
        at once, and too late to be made good within the falling budget.
        """
        return self.pruned_share(progress) > 2 / 3


def _are_numbers(values: Any, length: int) -> bool:
    return (isinstance(values, (tuple, list)) and len(values) == length
            and all(isinstance(value, (int, float)) for value in values))
