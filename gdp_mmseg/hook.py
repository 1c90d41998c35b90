"""The hook that moves the gates while an mmengine runner trains."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import broadcast, is_main_process
from mmengine.runner import Runner

from .checkpoint import closed_gates, fingerprint, versions
from .files import drop_rows_after
from .guard import GuardHook
from .latency import SECONDS
from .model import COSTS, Pruner, find_pruner
from .registry import HOOKS


@HOOKS.register_module()
class GDPHook(GuardHook):
    """Moves the gates of a ``GDPModel``; the optimizer config stays as it is.

    The gates' step is a pre-hook of the optimizer's step: it happens when the
    optimizer really steps (gradients accumulated, averaged over processes,
    unscaled; never where mixed precision skips a step), and it takes the
    gates' gradients away, so that no optimizer moves or decays them. A
    gradient that is not finite moves no gate.

    Examples:
        In a config: ``default_hooks = dict(gdp=dict(type=
        'gdp_mmseg.GDPHook'))``.

    Args:
        interval (int): Iterations between two records of the gates' path.
            Defaults to 10.
        patience (int): See :class:`GuardHook`. Defaults to 10.
    """

    def __init__(self, interval: int = 10, patience: int = 10) -> None:
        super().__init__(patience)
        self.interval = interval

    def before_train(self, runner: Runner) -> None:
        """Take hold of the optimizer.

        Raises:
            ValueError: If the model has no gates, or there are several
                optimizers.
        """
        super().before_train(runner)
        pruner = find_pruner(runner.model)
        optimizer = getattr(runner.optim_wrapper, 'optimizer', None)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ValueError('GDPHook: expected one optimizer, but got '
                             f'{type(runner.optim_wrapper).__name__}; set '
                             'one optim_wrapper for all parameters')
        if pruner.unmeasured:
            _measure_(pruner, runner)
        if is_main_process():
            # What another run in this folder did is not part of this one.
            drop_rows_after(Path(runner.work_dir) / 'gates.jsonl', runner.iter)

        def step(optimizer: Any, args: Any, kwargs: Any) -> None:
            if (_unscale_(optimizer, pruner.gates.theta) and not pruner.step_(
                    runner.iter / runner.max_iters, runner.max_iters)):
                skipped = runner.message_hub.runtime_info.get('gdp_skipped', 0)
                runner.message_hub.update_info('gdp_skipped', skipped + 1)
                runner.logger.warning(
                    f'GDP: the gates stay in iteration {runner.iter + 1}: '
                    'their gradient is not finite; so far in '
                    f'{skipped + 1} iterations')
            # No optimizer moves or decays a parameter without a gradient.
            pruner.gates.theta.grad = None

        optimizer.register_step_pre_hook(step)
        kept = ', '.join(f'{row.channels} channels ({row.reason})'
                         for row in pruner.groups.frozen)
        target = pruner.settings.target
        runner.logger.info(f'GDP: {pruner.groups.number} gates in '
                           f'{len(pruner.groups.groups)} groups on '
                           f'{pruner.flops.dense / 1e9:.2f} GFLOPs, target '
                           f'{target.ratio} of the {COSTS[target.type]}; '
                           f'without a gate: {kept}')

    def after_train_iter(self,
                         runner: Runner,
                         batch_idx: int,
                         data_batch: Any = None,
                         outputs: dict[str, Any] | None = None) -> None:
        """Log the share of FLOPs left, and the gates' path.

        The share by whole channels and by openness goes with the losses, and
        that of the cost if the target is about another;
        ``gates.jsonl`` in the work folder gets the mean openness of each
        group.
        """
        super().after_train_iter(runner, batch_idx, data_batch, outputs)
        pruner = find_pruner(runner.model)
        with torch.no_grad():
            openness = pruner.gates.openness()
            half_open = (openness > 0.01) & (openness < 0.5)
            scalars = dict(
                flops=pruner.flops((openness > 0).float()),
                flops_by_openness=pruner.flops(openness),
                undecided=half_open.float().mean(),
                multiplier=pruner.gates.multiplier)
            if pruner.cost is not pruner.flops:
                scalars['cost'] = pruner.cost((openness > 0).float())
        # Each iteration, because mmengine logs the mean of the last ones.
        for name, value in scalars.items():
            runner.message_hub.update_scalar(f'train/gdp_{name}', value.item())
        if self.every_n_train_iters(runner,
                                    self.interval) and (is_main_process()):
            row = dict(
                iter=runner.iter + 1,
                flops=float(scalars['flops']),
                openness=[
                    round(float(openness[group.gates].mean()), 4)
                    for group in pruner.groups.groups
                ])
            with open(Path(runner.work_dir) / 'gates.jsonl', 'a') as file:
                file.write(json.dumps(row) + '\n')

    def before_save_checkpoint(self, runner: Runner,
                               checkpoint: dict[str, Any]) -> None:
        """Add what the gates are of."""
        super().before_save_checkpoint(runner, checkpoint)
        checkpoint['meta'].update(
            groups=fingerprint(find_pruner(runner.model).groups),
            versions=versions())

    def after_load_checkpoint(self, runner: Runner,
                              checkpoint: dict[str, Any]) -> None:
        """Say what becomes of the gates.

        Raises:
            ValueError: If the checkpoint has the gates of another analysis,
                or is of a pruned model.
        """
        super().after_load_checkpoint(runner, checkpoint)
        closed = closed_gates(
            find_pruner(runner.model).groups,
            checkpoint.get('state_dict', checkpoint),
            checkpoint.get('meta') or {})
        runner.logger.info(
            'GDP: the checkpoint has no gates; all of them start open' if
            closed is None else f'GDP: gates of the checkpoint: {closed} are '
            'closed, and stay so')


def _measure_(pruner: Pruner, runner: Runner) -> None:
    """Measure the cost in one process, in place; all get its numbers."""
    if is_main_process():
        runner.logger.info('GDP: measuring the latency of the layers, in '
                           f'about {SECONDS:.0f} s at most')
        pruner.measure_()
    broadcast(pruner.cost.shares)
    pruner.check_target()


def _unscale_(optimizer: Any, theta: torch.nn.Parameter) -> bool:
    """Undo what mixed precision leaves to a fused optimizer, in place.

    A fused optimizer is stepped with scaled gradients, and at an overflow
    too; it looks at these attributes itself.

    Returns:
        bool: False at an overflow.
    """
    overflow = getattr(optimizer, 'found_inf', None)
    if overflow is not None and bool(overflow):
        return False
    scale = getattr(optimizer, 'grad_scale', None)
    if scale is not None and theta.grad is not None:
        theta.grad.div_(scale)
    return True
