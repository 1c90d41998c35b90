"""The alternatives: channels removed at one point of a training, by rank.

With Torch-Pruning (https://github.com/VainF/Torch-Pruning), at the same ratio
in every layer, down to the same multiply-adds. ``l1_head`` leaves all but the
decode head whole, as one would who knows where the multiply-adds are.
``slimming_global`` has one threshold for all layers, as Network Slimming has
in its paper (ICCV 2017, section 3); a layer that would lose all, and what is
sliced with it, the library leaves whole.
"""
from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any, Callable

import torch
import torch_pruning as tp
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor, nn

from gdp_mmseg.engine.model import train as training_forward
from gdp_mmseg.report.measure import count_macs


@dataclass(frozen=True)
class Method:
    """How an alternative chooses its channels.

    Args:
        importance (Callable[[], Any]): Makes the library's ranking.
        only (str): The modules whose names begin so lose channels of their
            own; all by default.
        at_once (bool): Whether all channels are ranked at once, not those of
            each layer.
        sparsity (float): Weight of ``|gamma|`` in the loss until it prunes.
    """

    importance: Callable[[], Any]
    only: str = ''
    at_once: bool = False
    sparsity: float = 0.


_L1 = partial(tp.importance.GroupMagnitudeImportance, p=1)
# Network Slimming (ICCV 2017), section 4: the weight of |gamma|.
_SPARSITY = 1e-4
METHODS = dict(
    narrow=Method(tp.importance.RandomImportance),
    random=Method(tp.importance.RandomImportance),
    l1=Method(_L1),
    l1_head=Method(_L1, only='decode_head'),
    slimming=Method(tp.importance.BNScaleImportance, sparsity=_SPARSITY),
    slimming_global=Method(
        partial(tp.importance.BNScaleImportance, normalizer=None),
        at_once=True,
        sparsity=_SPARSITY))
# Share of the channels that can go: of a layer, or of all if ranked at once.
MOST = 0.95


class OutOfReach(ValueError):
    """No ratio of a method meets the target."""


class PruneOnce(Hook):
    """Prunes at one iteration; before, Network Slimming's penalty if asked.

    Args:
        name (str): A key of ``METHODS``.
        target (float): Share of the dense multiply-adds.
        iteration (int): Before which it prunes.
        shape (tuple[int, ...]): ``(N, C, H, W)`` at which is counted.
        seed (int): Of random ranks.
    """

    priority = 'VERY_HIGH'

    def __init__(self, name: str, target: float, iteration: int,
                 shape: tuple[int, ...], seed: int) -> None:
        self.name = name
        self.method = METHODS[name]
        self.target = target
        self.iteration = iteration
        self.shape = shape
        self.seed = seed
        self.pruned = False

    def before_train(self, runner: Runner) -> None:
        """Add the penalty's gradient before each step until the pruning.

        Raises:
            OutOfReach: If no ratio meets the target now.
        """
        # Only to fail early: what slimming ranks by still changes.
        self._ratio(runner.model)
        sparsity = self.method.sparsity
        if not sparsity:
            return

        def penalise(optimizer: Any, args: Any, kwargs: Any) -> None:
            if self.pruned:
                return
            for module in runner.model.modules():
                if isinstance(module, nn.BatchNorm2d) and (module.weight.grad
                                                           is not None):
                    module.weight.grad += sparsity * module.weight.sign()

        runner.optim_wrapper.optimizer.register_step_pre_hook(penalise)

    def before_train_iter(self,
                          runner: Runner,
                          batch_idx: int,
                          data_batch: Any = None) -> None:
        """Prune the runner's model in place."""
        if runner.iter == self.iteration:
            self.pruned = True
            ratio = self._ratio(runner.model)
            optimizer = runner.optim_wrapper.optimizer
            # Pruning makes new parameters of the same names.
            name_of = {p: name for name, p in runner.model.named_parameters()}
            names = [[name_of[p] for p in group['params']]
                     for group in optimizer.param_groups]
            with torch.random.fork_rng():
                prune_(runner.model, self.method, ratio, self.shape, self.seed)
            parameters = dict(runner.model.named_parameters())
            for group, its_names in zip(optimizer.param_groups, names):
                group['params'] = [parameters[name] for name in its_names]
            optimizer.state.clear()
            runner.logger.info(f'{self.name}: {ratio:.3f} of the channels '
                               'are removed')

    def _ratio(self, model: nn.Module) -> float:
        """A ratio that meets the target, close to the least, by bisection.

        Raises:
            OutOfReach: If none does.
        """
        budget = self.target * count_macs(model, self.shape)
        low, high = 0., MOST
        with torch.random.fork_rng():
            for _ in range(8):
                middle = (low + high) / 2
                trial = copy.deepcopy(model)
                prune_(trial, self.method, middle, self.shape, self.seed)
                if count_macs(trial, self.shape) > budget:
                    low = middle
                else:
                    high = middle
        if high == MOST:
            raise OutOfReach(f'{self.name}: expected a target that is met '
                             f'with less than {MOST:.0%} of the channels '
                             f'removed, but got {self.target}; choose another '
                             'target or method')
        return high


class WithinLayers:
    """Ranks channels among those that the same convolution writes.

    The library ranks all channels of a group at once. Where a depthwise
    convolution reads a concatenation, they are of several convolutions, with
    kernels of other sizes: by their norm, all of one went, which the library
    then refuses, and prunes nothing of the group.

    Args:
        importance (Callable[[Any], Tensor | None]): The library's, of a group.
    """

    def __init__(self, importance: Callable[[Any], Tensor | None]) -> None:
        self.importance = importance

    def __call__(self, group: Any) -> Tensor | None:
        """Share ``(C,)`` of a convolution's channels that are worth less."""
        worth = self.importance(group)
        if worth is None:
            return None
        shares = _shares_below(worth)
        for item in group:
            if item.dep.pruning_fn == tp.prune_conv_out_channels:
                written = torch.tensor(item.root_idxs, device=worth.device)
                shares[written] = _shares_below(worth[written])
        return shares


def _shares_below(worth: Tensor) -> Tensor:
    return worth.argsort().argsort() / len(worth)


def prune_(model: nn.Module, method: Method, ratio: float,
           shape: tuple[int, ...], seed: int) -> None:
    """Remove a share of the channels, by rank, in place."""
    torch.manual_seed(seed)
    training = {name: one.training for name, one in model.named_modules()}
    model.eval()
    spared = [
        module for name, module in model.named_modules()
        if name.endswith('conv_seg')
        or isinstance(module, nn.Conv2d) and not name.startswith(method.only)
    ]
    importance = method.importance()
    tp.pruner.BasePruner(
        model,
        torch.randn(shape),
        importance if method.at_once else WithinLayers(importance),
        global_pruning=method.at_once,
        pruning_ratio=ratio,
        ignored_layers=spared,
        forward_fn=_forward).step()
    for name, module in model.named_modules():
        module.training = training[name]
    model.zero_grad(set_to_none=True)


def _forward(model: nn.Module, inputs: Tensor) -> Any:
    """With the auxiliary head, or it would not be sliced."""
    return training_forward(model, inputs)
