"""Pruner of an mm model, which says so if no hook moves its gates."""
from __future__ import annotations

import logging
from typing import Any

from mmengine.logging import print_log

from ..pruner.pruner import Pruner

# Advice on a gated model without its hook.
ADD_HOOK = "set default_hooks=dict(gdp=dict(type='gdp_mmseg.GDPHook'))"


class HookedPruner(Pruner):
    """Pruner whose gates a hook of the training moves.

    A training without that hook prunes nothing. It is warned of where it
    begins and where it saves weights, because no hook is there to do so.

    Args:
        *args: See :class:`Pruner`.
        **kwargs: See :class:`Pruner`.

    Attributes:
        hooked (bool): Whether a training's ``GDPHook`` moves the gates.
        unmoved (bool): Whether a training began in which nothing does.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.hooked = self.unmoved = False
        self.register_state_dict_post_hook(_warn_if_unmoved)

    def train(self, mode: bool = True) -> HookedPruner:
        """Set the mode, in place; warn once if nothing moves the gates."""
        if mode and not self.hooked and not self.unmoved:
            self.unmoved = True
            _warn('GDPModel: nothing moves the gates, so no channel will be '
                  f'pruned; to prune, {ADD_HOOK}')
        super().train(mode)
        return self


def _warn_if_unmoved(pruner: HookedPruner, *_: Any) -> None:
    """Warn of gates that are saved from a training that never moved them."""
    if pruner.unmoved and not pruner.hooked:
        _warn('GDPModel: nothing moved the gates of the weights that are '
              'saved now, so an export would prune nothing; '
              f'{ADD_HOOK}, and train again')


def _warn(message: str) -> None:
    """Log a warning where the training logs."""
    print_log(message, logger='current', level=logging.WARNING)
