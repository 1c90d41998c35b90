"""The hook that moves the gates while an mmengine runner trains."""
from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Iterable

import torch
from mmengine.dist import broadcast, is_main_process
from mmengine.hooks import EMAHook
from mmengine.runner import Runner

from ..cost.latency import SECONDS
from ..gates.base import GateMethod
from ..pruner.pruner import Pruner
from ..pruner.settings import COSTS
from ..registry import HOOKS
from ..report.record import drop_rows_after
from .checkpoint import closed_gates, fingerprint, unwrapped, versions
from .compat import accumulated_gradients, check_runner
from .model import find_pruner
from .monitor import RECORD, log_summary, show_gates
from .resume import ResumeHook


@HOOKS.register_module()
class GDPHook(ResumeHook):
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
        picture_interval (int): Iterations between two pictures, of the
            gates' path and of the widths, that the visualizer gets; it gets
            the last ones at the end. Defaults to 2000.
        patience (int): See :class:`GuardHook`. Defaults to 10.
    """

    def __init__(self,
                 interval: int = 10,
                 picture_interval: int = 2000,
                 patience: int = 10) -> None:
        super().__init__(patience)
        self.interval = interval
        self.picture_interval = picture_interval

    def before_train(self, runner: Runner) -> None:
        """Take hold of the optimizer.

        Raises:
            ValueError: If the model has no gates, or the runner is none that
                they go with.
        """
        check_runner(runner)
        super().before_train(runner)
        pruner = find_pruner(runner.model)
        pruner.hooked = True
        for one in (pruner, *averages(runner)):
            one.begin_(runner.iter / runner.max_iters)
        if pruner.unmeasured:
            _measure_(pruner, runner)
        if is_main_process():
            # What another run in this folder did is not part of this one.
            drop_rows_after(Path(runner.work_dir) / RECORD, runner.iter)

        steps = math.ceil(runner.max_iters /
                          accumulated_gradients(runner.optim_wrapper))

        # Not a part of the network, where mmengine compiles its train_step.
        @torch.compiler.disable
        def step(optimizer: Any, args: Any, kwargs: Any) -> None:
            if (_unscale_(optimizer, pruner.gates.theta) and
                    not pruner.step_(runner.iter / runner.max_iters, steps)):
                skipped = runner.message_hub.runtime_info.get('gdp_skipped', 0)
                runner.message_hub.update_info('gdp_skipped', skipped + 1)
                runner.logger.warning(
                    f'GDP: the gates stay in iteration {runner.iter + 1}: '
                    'their gradient is not finite; so far in '
                    f'{skipped + 1} iterations')
            _agree_(pruner.gates)
            # No optimizer moves or decays a parameter without a gradient.
            pruner.gates.theta.grad = None

        runner.optim_wrapper.optimizer.register_step_pre_hook(step)
        _spare_clipping_(runner.optim_wrapper, pruner.gates.theta)
        kept = ', '.join(f'{row.channels} channels ({row.reason})'
                         for row in pruner.analysis.frozen)
        target = pruner.settings.target
        runner.logger.info(f'GDP: {pruner.analysis.num_gates} gates in '
                           f'{len(pruner.analysis.groups)} groups on '
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
        that of the cost if the target is about another, and the budget that
        is asked for with what is held against it; ``gates.jsonl`` in the work
        folder gets the mean openness of each group.
        """
        super().after_train_iter(runner, batch_idx, data_batch, outputs)
        pruner = find_pruner(runner.model)
        progress = runner.iter / runner.max_iters
        with torch.no_grad():
            openness = pruner.gates.openness()
            half_open = (openness > 0.01) & (openness < 0.5)
            scalars = dict(
                flops=pruner.flops((openness > 0).float()),
                flops_by_openness=pruner.flops(openness),
                undecided=half_open.float().mean(),
                multiplier=pruner.gates.multiplier,
                budget=torch.tensor(pruner.budget(progress)),
                held_cost=torch.tensor(pruner.held_cost(progress)))
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
                budget=float(scalars['budget']),
                held_cost=float(scalars['held_cost']),
                openness=[
                    round(float(openness[group.gates].mean()), 4)
                    for group in pruner.analysis.groups
                ])
            with open(Path(runner.work_dir) / RECORD, 'a') as file:
                file.write(json.dumps(row) + '\n')
        if (self.every_n_train_iters(runner, self.picture_interval)
                and is_main_process()):
            show_gates(runner, pruner, runner.iter + 1)

    def after_train(self, runner: Runner) -> None:
        """Show and tell what became of the gates."""
        if is_main_process():
            pruner = find_pruner(runner.model)
            show_gates(runner, pruner, runner.iter)
            log_summary(runner, pruner)

    def before_save_checkpoint(self, runner: Runner,
                               checkpoint: dict[str, Any]) -> None:
        """Add what the gates are of."""
        super().before_save_checkpoint(runner, checkpoint)
        checkpoint['meta'].update(
            groups=fingerprint(find_pruner(runner.model).analysis),
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
            find_pruner(runner.model).analysis,
            unwrapped(checkpoint.get('state_dict', checkpoint)),
            checkpoint.get('meta') or {})
        runner.logger.info(
            'GDP: the checkpoint has no gates; all of them start open' if
            closed is None else f'GDP: gates of the checkpoint: {closed} are '
            'closed, and stay so')


def averages(runner: Runner) -> list[Pruner]:
    """Of the averages of the model that hooks keep."""
    return [
        find_pruner(hook.ema_model.module) for hook in runner.hooks
        if isinstance(hook, EMAHook)
    ]


def _measure_(pruner: Pruner, runner: Runner) -> None:
    """Measure the cost in one process, in place; all get its numbers."""
    if is_main_process():
        runner.logger.info('GDP: measuring the latency of the layers, in '
                           f'about {SECONDS:.0f} s at most')
        pruner.measure_()
    broadcast(pruner.cost.shares)
    pruner.check_target()


def _spare_clipping_(optim_wrapper: Any, theta: torch.nn.Parameter) -> None:
    """Leave the gates' gradient out of what is clipped, in place.

    It has a step of its own; in the norm it would make the weights' smaller.
    """
    clip = getattr(optim_wrapper, 'clip_func', None)
    if clip is None:
        return

    def clip_weights(parameters: Iterable[torch.Tensor],
                     **options: Any) -> Any:
        return clip([one for one in parameters if one is not theta], **options)

    optim_wrapper.clip_func = clip_weights


def _agree_(gates: GateMethod) -> None:
    """Take the first process's gates in all, in place.

    Sums on GPUs are not the same to the last bit in each; a gate at the limit
    would close in one process and stay open in another.
    """
    for tensor in (gates.theta.data, gates.closed, gates.multiplier):
        broadcast(tensor)


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
