"""Closed channels leave the model while an mmengine runner trains it.

Files stay dense: what is saved has all channels, with zeros for those that
left, and the ``meta`` says which gates they belong to.
"""
from __future__ import annotations

from typing import Any

import torch
from mmengine.dist import broadcast
from mmengine.hooks import EMAHook, Hook
from mmengine.model import BaseAveragedModel, is_model_wrapper
from mmengine.runner import Runner
from torch import Tensor, nn

from ..analysis.liveness import filled_up, kept_channels
from ..gates.blocks import block_sizes
from ..pruner.pruner import Pruner
from ..surgery.shrink import Shrinkage, foreign_state, obstacle
from .compat import compiles
from .model import find_pruner
from .resume import network_of

# Channels leave when the FLOPs have fallen to this share of what they were
# after the last ones left: a cut costs about as much as a tenth of a step.
_FALL = 0.9
# Widths stay multiples of it while the model trains, by closed channels that
# stay. Steps in half precision are much slower at others: one of MobileNetV2
# takes about as long at any widths with 0.4 of the FLOPs as the dense one.
_MULTIPLE = 8
# Most looks at the FLOPs in a training. Several processes agree at each look,
# for which the host waits.
_CHECKS = 1000


class ShrinkHook(Hook):
    """Hook that removes closed channels from a model that trains.

    ``GDPHook`` registers it. It comes last, so that it makes dense what any
    other hook adds to a checkpoint, and cuts when all others have seen the
    model before an iteration.

    Attributes:
        flops (float): Share of the FLOPs in channels that are not closed,
            after the last iteration.
    """

    priority = 'LOWEST'

    def __init__(self) -> None:
        self.flops = 1.
        # Those of the model and of its averages, while it trains.
        self._shrinkages: list[Shrinkage] = []
        # Number (S,) of gates of each group whose channels are a multiple.
        self._blocks = torch.ones(0)
        # Gates whose channels had left when a checkpoint was saved.
        self._loaded: Tensor | None = None
        # Share of the FLOPs in channels that are there.
        self._left = 1.
        self._done = False

    def after_load_checkpoint(self, runner: Runner,
                              checkpoint: dict[str, Any]) -> None:
        """Keep which channels had left, until the training goes on."""
        meta = checkpoint.get('meta') or {}
        resumes = getattr(runner, '_resume', False)
        self._loaded = (meta.get('gdp') or {}).get('cut') if resumes else None

    def before_train(self, runner: Runner) -> None:
        """Remove the channels that had left when the training stopped.

        The model, its averages and the optimizer are dense until now.
        """
        pruner = find_pruner(runner.model)
        loaded, self._loaded = self._loaded, None
        self._shrinkages, self._left, self._done = [], 1., False
        if not pruner.settings.shrink:
            return
        reason = _obstacle_of(runner)
        if reason is not None:
            _warn(runner, reason)
            return
        self.flops = pruner.figures(runner.iter / runner.max_iters).flops
        self._blocks = block_sizes(pruner.analysis, _MULTIPLE)
        networks = [
            network_of(runner.model),
            *(average.module for average in averaged_models(runner))
        ]
        self._shrinkages = [
            Shrinkage(network, pruner.analysis) for network in networks
        ]
        if loaded is not None:
            self._narrow_(runner, ~loaded.cpu())

    def before_train_iter(self,
                          runner: Runner,
                          batch_idx: int,
                          data_batch: Any = None) -> None:
        """Remove closed channels where that is worth it.

        That is where the FLOPs have fallen by a tenth since the last time, and
        other channels have taken over; and at the end of the pruning phase.
        What has been decided there depends on the gates alone, so that a
        resumed training does the same.
        """
        if not self._shrinkages or self._done:
            return
        pruner = find_pruner(runner.model)
        phase = pruner.schedule.phase_at(runner.iter / runner.max_iters)
        # The gates close no more.
        self._done = phase == 'settling' and pruner.gates.is_settled()
        if not self._done and not self._is_due(runner):
            return
        keep = self._needed(runner)
        if torch.equal(keep, self._shrinkages[0].present):
            return
        reason = foreign_state(runner.optim_wrapper.optimizer)
        if reason is not None:
            self._done = True
            _warn(runner, reason)
            return
        self._narrow_(runner, keep)
        runner.logger.info(
            f'GDP: {int((~keep).sum())} of {len(keep)} channels have left the '
            f'training, which goes on with {self._left:.3f} of the FLOPs; '
            'checkpoints have all channels')

    def _is_due(self, runner: Runner) -> bool:
        """Tell whether enough FLOPs can go; the first process decides."""
        period = max(runner.max_iters // _CHECKS, 1)
        pruner = find_pruner(runner.model)
        if (compiles(runner.cfg) or runner.iter % period
                or not pruner.gates.ABSORBING):
            return False
        limit, takeover = _FALL * self._left, pruner.takeover
        # Channels that must stay although they are closed have FLOPs, too.
        is_due = (
            self.flops <= limit
            and (takeover is None or not takeover.is_behind())
            and _share(pruner, self._needed(runner)) <= limit)
        # Sums on GPUs differ in the last bit between processes.
        decision = torch.tensor([int(is_due)])
        broadcast(decision)
        return bool(decision)

    def _needed(self, runner: Runner) -> Tensor:
        """Gates ``(G,)`` whose channels stay if closed ones leave now."""
        present = self._shrinkages[0].present
        return filled_up(
            find_pruner(runner.model).analysis, _kept_in_all(runner, present),
            present, self._blocks)

    def before_save_checkpoint(self, runner: Runner,
                               checkpoint: dict[str, Any]) -> None:
        """Make a checkpoint dense, and add which channels have left."""
        if not self._shrinkages:
            return
        shrinkage = self._shrinkages[0]
        network = shrinkage.model
        for key, prefix in (('state_dict', ''), ('ema_state_dict', 'module.')):
            state = checkpoint.get(key, {})
            dense = shrinkage.dense({
                name.removeprefix(prefix): value
                for name, value in state.items()
            })
            for name in state:
                state[name] = dense[name.removeprefix(prefix)]
        if 'optimizer' in checkpoint:
            _make_dense_(checkpoint['optimizer'],
                         runner.optim_wrapper.optimizer, shrinkage, network)
        checkpoint['meta']['gdp']['cut'] = ~shrinkage.present

    def after_train(self, runner: Runner) -> None:
        """Give the model, its averages and the optimizer all channels back.
        """
        if self._shrinkages:
            source, *others = self._shrinkages
            source.widen_(runner.optim_wrapper.optimizer)
            for other in others:
                other.widen_()
            _renew_(runner, torch.ones_like(source.present))
        self._shrinkages = []

    def _narrow_(self, runner: Runner, keep: Tensor) -> None:
        """Remove the channels of more gates from all that trains."""
        source, *others = self._shrinkages
        source.narrow_(keep, runner.optim_wrapper.optimizer)
        for other in others:
            other.narrow_(keep)
        _renew_(runner, keep)
        self._left = _share(find_pruner(runner.model), keep)


def averages(runner: Runner) -> list[Pruner]:
    """List the pruners of the averaged models that hooks keep (EMA)."""
    return [find_pruner(one.module) for one in averaged_models(runner)]


def averaged_models(runner: Runner) -> list[BaseAveragedModel]:
    """List the averaged models that hooks keep (EMA)."""
    return [
        hook.ema_model for hook in runner.hooks if isinstance(hook, EMAHook)
    ]


def _kept_in_all(runner: Runner, present: Tensor) -> Tensor:
    """Gates ``(G,)`` whose channels the model or one of its averages needs.

    Those of gates that may come back are among them. An average may be
    updated less often than the model.
    """
    pruners = [find_pruner(runner.model), *averages(runner)]
    closed = torch.stack(
        [pruner.gates.is_closed().cpu() for pruner in pruners])
    return kept_channels(pruners[0].analysis, (~closed.all(0)).float(),
                         present)


@torch.no_grad()
def _share(pruner: Pruner, keep: Tensor) -> float:
    """Share of the FLOPs in the channels of some gates."""
    return float(pruner.flops(keep.to(pruner.gates.theta)))


def _make_dense_(state: dict[str, Any], optimizer: torch.optim.Optimizer,
                 shrinkage: Shrinkage, network: nn.Module) -> None:
    """Make the state dict of an optimizer dense, in place."""
    name_of = {one: name for name, one in network.named_parameters()}
    names = {
        key: name_of[parameter]
        for packed, group in zip(state['param_groups'], optimizer.param_groups)
        for key, parameter in zip(packed['params'], group['params'])
        if parameter in name_of
    }
    state['state'] = shrinkage.dense_states(state['state'], names)


def _renew_(runner: Runner, keep: Tensor) -> None:
    """Renew what knows the shapes or the memory of the model's tensors.

    Args:
        runner (Runner): Runner of the training.
        keep (Tensor): ``(G,)`` bool, gates whose channels the model has.
    """
    takeover = find_pruner(runner.model).takeover
    if takeover is not None:
        takeover.narrow_(keep)
    for average in averaged_models(runner):
        if average.update_buffers:
            average.avg_parameters = average.module.state_dict()
    network = network_of(runner.model)
    if network is runner.model:
        return
    # Norms that were synchronised by this key are so already; done again, it
    # would replace them.
    sync_bn = runner.cfg.pop('sync_bn', None)
    runner.model = runner.wrap_model(
        runner.cfg.get('model_wrapper_cfg'), network)
    if sync_bn is not None:
        runner.cfg.sync_bn = sync_bn


def _obstacle_of(runner: Runner) -> str | None:
    """Tell why no channel can leave the model of a runner, if so."""
    if is_model_wrapper(runner.model):
        if not isinstance(runner, Runner):
            return ('FlexibleRunner does not wrap a model for several '
                    'processes twice')
        if compiles(runner.cfg):
            return ('compile wraps the model of several processes, which is '
                    'wrapped anew when channels leave')
    if runner.cfg.get('efficient_conv_bn_eval'):
        return ('efficient_conv_bn_eval does not work with layers without '
                'channels')
    return obstacle(runner.optim_wrapper.optimizer)


def _warn(runner: Runner, reason: str) -> None:
    """Say why closed channels stay in the training."""
    runner.logger.warning(
        'GDP: closed channels stay in the model while it trains, because '
        f'{reason}; the pruned network is the same, but the training takes '
        'longer; gdp=dict(shrink=False) turns this off')
