"""What a config of several processes imports to watch each of them."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from mmengine.dist import get_rank
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from gdp_mmseg.engine.model import find_pruner

from helpers.light import spare_time_
from helpers.project import Recorder

spare_time_()


def _refuse() -> None:
    raise RuntimeError('expected one process to look at the clock')


@HOOKS.register_module()
class RankRecorder(Recorder):
    """Leaves each process's record in the work folder.

    Args:
        shake (bool): Whether the cost is not quite the same in all, as sums
            on GPUs are not.
    """

    def __init__(self, shake: bool = False) -> None:
        super().__init__()
        self.shake = shake

    def before_run(self, runner: Runner) -> None:
        if get_rank() > 0:
            pruner: Any = find_pruner(runner.model)
            pruner.measure_ = _refuse

    def before_train_iter(self, runner: Runner, *_: object,
                          **__: object) -> None:
        if self.shake and runner.iter == 0:
            find_pruner(runner.model).cost.shares *= 1 + 0.01 * get_rank()

    def after_train(self, runner: Runner) -> None:
        torch.save(
            dict(
                theta=torch.stack(self.theta),
                gain=torch.stack(self.gain),
                weights=torch.cat([
                    weight.detach().flatten()
                    for weight in runner.model.parameters()
                ]),
                observed=self.observed,
                sizes=self.sizes,
                shares=find_pruner(runner.model).cost.shares),
            Path(runner.work_dir) / f'rank{get_rank()}.pth')
