"""Hooks that set what ``gdp=dict(...)`` has no key for, before a training."""
from __future__ import annotations

import math

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from gdp_mmseg.engine.model import find_pruner


@HOOKS.register_module()
class GainHook(Hook):
    """Set the decay rates of the running means of the gains.

    Args:
        betas (tuple[float, float]): Those of the mean and the mean square.
    """

    def __init__(self, betas: tuple[float, float]) -> None:
        self.betas = tuple(betas)

    def before_train(self, runner: Runner) -> None:
        """Set them; no gain has been observed yet."""
        find_pruner(runner.model).gates.betas = self.betas


@HOOKS.register_module()
class StreamHook(Hook):
    """Keep a larger share of the channels of residual streams.

    A stream is a group of channels that several layers add to.
    ``gdp.min_keep_ratio`` must be above 0, so that it is heeded.

    Args:
        ratio (float): Least share of the channels of a stream that stays.
    """

    def __init__(self, ratio: float) -> None:
        self.ratio = ratio

    def before_train(self, runner: Runner) -> None:
        """Raise the least number of channels of each stream.

        Raises:
            ValueError: If the target cannot be met then.
        """
        pruner = find_pruner(runner.model)
        for index, group in enumerate(pruner.analysis.groups):
            if any(point.summed for point in group.read_points):
                pruner.min_kept[index] = math.ceil(self.ratio *
                                                   len(group.gates))
        pruner.check_target()
