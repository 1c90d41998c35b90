"""The hook that moves the gates while an mmengine runner trains."""
from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Iterable

import torch
from mmengine.dist import broadcast, is_main_process
from mmengine.runner import Runner

from ..cost.latency import SECONDS
from ..gates.base import GateMethod
from ..pruner.figures import Figures
from ..pruner.pruner import Pruner
from ..registry import HOOKS
from ..report.record import RECORD, GateRow, append_row, begin_record
from .checkpoint import unwrapped, versions
from .compat import accumulated_gradients, check_length, check_runner, compiles
from .matching import check_gates, fitting_of, gate_meta, keep_own_
from .model import find_pruner
from .monitor import (log_export, log_phase, log_start, log_summary, scalars,
                      show_gates)
from .pruned_config import check_not_exported, check_survives
from .resume import ResumeHook, network_of
from .shrinking import ShrinkHook, averages


@HOOKS.register_module()
class GDPHook(ResumeHook):
    """Hook that moves the gates of a ``GDPModel``.

    The optimizer config stays as it is. The gates' step is a pre-hook of the
    optimizer's step: it happens when the optimizer really steps (gradients
    accumulated, averaged over processes and unscaled; never where mixed
    precision skips a step), and it removes the gates' gradients, so that no
    optimizer moves or decays them. A gradient that is not finite moves no
    gate.

    Examples:
        In a config: ``default_hooks = dict(gdp=dict(type=
        'gdp_mmseg.GDPHook'))``.

    Args:
        interval (int): Iterations between two lines of ``gates.jsonl``.
            Defaults to 10.
        picture_interval (int): Iterations between two pictures for the
            visualizer. The last ones are made at the end. Defaults to 2000.
        patience (int): See :class:`ResumeHook`. Defaults to 10.
    """

    def __init__(self,
                 interval: int = 10,
                 picture_interval: int = 2000,
                 patience: int = 10) -> None:
        super().__init__(patience)
        self.interval = interval
        self.picture_interval = picture_interval
        # Undo what before_train did to the optimizer.
        self._undo: list[Callable[[], None]] = []
        # Name of the phase that was logged last.
        self._phase = ''
        # State of the gates after their last step.
        self._figures: Figures | None = None
        self._shrink = ShrinkHook()

    def before_run(self, runner: Runner) -> None:
        """Register the hook that removes closed channels, which comes last.

        Raises:
            ValueError: See :class:`ResumeHook`.
        """
        super().before_run(runner)
        if runner.cfg.get('efficient_conv_bn_eval'):
            # It reads the parameters of norms and does not call them.
            find_pruner(runner.model).move_to_layers_(network_of(runner.model))
        if self._shrink not in runner.hooks:
            runner.register_hook(self._shrink)

    def before_train(self, runner: Runner) -> None:
        """Attach the gates' step to the optimizer.

        Raises:
            ValueError: If the model has no gates, if the runner does not work
                with gates, if the pruning phase is too short, if the config
                is one of an export or could not be exported after the
                training, or if a training would resume with the record of
                another one.
        """
        check_runner(runner)
        check_not_exported(runner.cfg)
        # A runner may also be made of parts, without a config of its model.
        if 'model' in runner.cfg:
            check_survives(runner.cfg)
        super().before_train(runner)
        pruner = find_pruner(runner.model)
        pruner.hooked = True
        note = check_length(pruner.settings, runner.max_iters,
                            accumulated_gradients(runner.optim_wrapper))
        # No whole number, so that progress from step to step is exact.
        steps = runner.max_iters / accumulated_gradients(runner.optim_wrapper)
        for one in (pruner, *averages(runner)):
            one.begin_(runner.iter / runner.max_iters, steps)
        if pruner.unmeasured:
            _measure_(pruner, runner)
        notes = [
            note,
            pruner.note_on_target(), *pruner.gates.notes(),
            _leave_out_takeover_(pruner, runner)
        ]
        for line in filter(None, notes):
            runner.logger.warning(f'GDP: {line}')
        if is_main_process():
            begin_record(
                Path(runner.work_dir) / RECORD, pruner.analysis.groups,
                runner.iter)
        self._release_()
        handle = runner.optim_wrapper.optimizer.register_step_pre_hook(
            self._gate_step(runner, pruner, steps))
        self._undo = [
            handle.remove,
            _exclude_from_clipping_(runner.optim_wrapper, pruner.gates.theta)
        ]
        log_start(runner, pruner)
        self._phase, self._figures = '', None

    def _release_(self) -> None:
        """Detach from the optimizer, which another training may use."""
        for undo in self._undo:
            undo()
        self._undo = []

    def _gate_step(self, runner: Runner, pruner: Pruner,
                   steps: float) -> Callable[..., None]:
        """Make the pre-hook of the optimizer's step that moves the gates."""
        # mmengine may compile its train_step. The gates' step is not a part
        # of the network, and would be compiled anew at each step.
        @torch.compiler.disable
        def step(optimizer: Any, args: Any, kwargs: Any) -> None:
            overflow = _unscale_(optimizer, pruner.gates)
            figures = pruner.step_(runner.iter / runner.max_iters, steps)
            self._figures = figures or self._figures
            if figures and not figures.moved and not bool(overflow):
                _count_skipped(runner)

        return step

    def before_train_iter(self,
                          runner: Runner,
                          batch_idx: int,
                          data_batch: Any = None) -> None:
        """Log the phase that begins, or in which a training resumes."""
        super().before_train_iter(runner, batch_idx, data_batch)
        pruner = find_pruner(runner.model)
        phase = pruner.schedule.phase_at(runner.iter / runner.max_iters)
        if phase != self._phase:
            self._phase = phase
            log_phase(runner, pruner, phase)

    def after_train_iter(self,
                         runner: Runner,
                         batch_idx: int,
                         data_batch: Any = None,
                         outputs: dict[str, Any] | None = None) -> None:
        """Log the shares of the cost, and write the record and pictures.

        The scalars ``gdp_flops`` (by whole channels),
        ``gdp_flops_by_openness``, ``gdp_budget``, ``gdp_held_cost``,
        ``gdp_multiplier``, ``gdp_undecided`` and, if the target is about
        another resource, ``gdp_cost`` are logged with the losses.
        ``gates.jsonl`` in the work folder gets the mean openness of each
        group; its first line names the groups.
        """
        super().after_train_iter(runner, batch_idx, data_batch, outputs)
        pruner = find_pruner(runner.model)
        figures = self._figures = self._figures or pruner.figures(
            runner.iter / runner.max_iters)
        self._shrink.flops = figures.flops
        # Each iteration, because mmengine logs the mean of the last ones.
        for name, value in scalars(pruner, figures).items():
            runner.message_hub.update_scalar(f'train/gdp_{name}', value)
        if not is_main_process():
            return
        if self.every_n_train_iters(runner, self.interval):
            append_row(
                Path(runner.work_dir) / RECORD,
                GateRow(runner.iter + 1, figures.flops, figures.budget,
                        figures.held_cost,
                        [round(value, 4) for value in figures.openness]))
        if self.every_n_train_iters(runner, self.picture_interval):
            show_gates(runner, pruner, runner.iter + 1)

    def after_train(self, runner: Runner) -> None:
        """Show and log the final state of the gates, and the next command."""
        self._release_()
        if is_main_process():
            pruner = find_pruner(runner.model)
            show_gates(runner, pruner, runner.iter)
            log_summary(runner, pruner)
            log_export(runner, self.last_checkpoint(runner))

    def before_save_checkpoint(self, runner: Runner,
                               checkpoint: dict[str, Any]) -> None:
        """Add gate method, analysis and versions to the meta."""
        super().before_save_checkpoint(runner, checkpoint)
        checkpoint['meta'].update(
            gdp=gate_meta(find_pruner(runner.model)), versions=versions())

    def after_load_checkpoint(self, runner: Runner,
                              checkpoint: dict[str, Any]) -> None:
        """Check the gates of a checkpoint, and log how many are closed.

        Raises:
            ValueError: If the checkpoint has other gates, or is of a pruned
                model.
        """
        super().after_load_checkpoint(runner, checkpoint)
        state = checkpoint.get('state_dict', checkpoint)
        pruner = find_pruner(runner.model)
        closed = check_gates(pruner, unwrapped(state),
                             checkpoint.get('meta') or {})
        anew = keep_own_(state, network_of(runner.model),
                         fitting_of(pruner.analysis))
        if anew:
            runner.logger.warning(
                f'GDP: {", ".join(anew)} begin anew, because the checkpoint '
                'has them in other shapes')
        runner.logger.info(
            'GDP: the checkpoint has no gates; all of them start open' if
            closed is None else f'GDP: {closed} gates of the checkpoint are '
            'closed, and stay closed')


def _leave_out_takeover_(pruner: Pruner, runner: Runner) -> str | None:
    """Train without a takeover where layers cannot be observed, in place.

    Returns:
        str, optional: The reason, if so.
    """
    if pruner.takeover is None or not compiles(runner.cfg):
        return None
    pruner.takeover.watch_(False)
    pruner.takeover = None
    return ('other channels take over nothing from closing ones, because what '
            'compiled layers read cannot be observed, and the pruned network '
            'may be less accurate; remove compile, or set '
            'gdp=dict(takeover=False) to train like this without a warning')


def _measure_(pruner: Pruner, runner: Runner) -> None:
    """Measure the latency in one process and share it with all, in place."""
    if is_main_process():
        runner.logger.info('GDP: measuring the latency of the layers, which '
                           f'takes at most about {SECONDS:.0f} s')
        pruner.measure_()
    broadcast(pruner.cost.shares)
    pruner.check_target()


def _exclude_from_clipping_(optim_wrapper: Any,
                            theta: torch.nn.Parameter) -> Callable[[], None]:
    """Leave the gates' gradient out of gradient clipping, in place.

    The gates have a step of their own. In the norm, their gradient would make
    the weights' step smaller.

    Returns:
        Callable[[], None]: Function that undoes this.
    """
    clip = getattr(optim_wrapper, 'clip_func', None)
    if clip is None:
        return lambda: None

    def clip_weights(parameters: Iterable[torch.Tensor],
                     **options: Any) -> Any:
        return clip([one for one in parameters if one is not theta], **options)

    def undo() -> None:
        optim_wrapper.clip_func = clip

    optim_wrapper.clip_func = clip_weights
    return undo


def _unscale_(optimizer: Any, gates: GateMethod) -> torch.Tensor | bool:
    """Undo the loss scale that mixed precision leaves to a fused optimizer.

    A fused optimizer is stepped with scaled gradients, also at an overflow;
    it reads these attributes itself.

    Returns:
        Tensor | bool: True at an overflow, where the gradient becomes nan, so
        that the gates do not move. It is not read here, because the host
        would wait for the GPU.
    """
    theta = gates.theta
    scale = getattr(optimizer, 'grad_scale', None)
    overflow = getattr(optimizer, 'found_inf', None)
    gates.loss_scale = scale
    if theta.grad is not None and scale is not None:
        theta.grad.div_(scale)
    if overflow is None:
        return False
    overflow = overflow > 0
    if theta.grad is not None:
        theta.grad.masked_fill_(overflow, torch.nan)
    return overflow


def _count_skipped(runner: Runner) -> None:
    """Count and log an iteration in which the gates do not move."""
    skipped = runner.message_hub.runtime_info.get('gdp_skipped', 0) + 1
    runner.message_hub.update_info('gdp_skipped', skipped)
    runner.logger.warning(
        f'GDP: the gates do not move in iteration {runner.iter + 1}, because '
        f'their gradient is not finite; so far in {skipped} iterations')
