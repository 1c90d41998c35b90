"""What a config imports to end its training in the middle."""
from __future__ import annotations

import os
import signal

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner


@HOOKS.register_module()
class KillAt(Hook):
    """Kills its own process after an iteration, counted from 1."""

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def after_train_iter(self, runner: Runner, *_: object,
                         **__: object) -> None:
        if runner.iter + 1 == self.iteration:
            os.kill(os.getpid(), signal.SIGKILL)
