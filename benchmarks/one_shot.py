"""One-shot pruning: channels removed at one point of a training, by rank.

Torch-Pruning (https://github.com/VainF/Torch-Pruning) removes the same ratio
of every layer, down to the same multiply-adds. ``l1_head`` prunes only the
decode head, which has most of the multiply-adds. ``slimming_global`` has one
threshold for all layers, like the paper of Network Slimming (ICCV 2017,
section 3); a layer that would lose all its channels is kept whole by the
library, together with the layers that are sliced with it.
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

from gdp_mmseg.engine.forwards import inference_forward, training_forward
from gdp_mmseg.report.measure import count_flops


@dataclass(frozen=True)
class Method:
    """Criterion by which an alternative chooses channels.

    Args:
        importance (Callable[[], Any]): Constructor of the library's ranking.
        only (str): Beginning of the names of the modules that may lose
            channels of their own. Defaults to all modules.
        at_once (bool): True to rank the channels of all layers together,
            False to rank those of each layer.
        sparsity (float): Weight of ``|gamma|`` in the loss until the pruning.
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
# Largest share of the channels that may go, of a layer or of all layers. With
# fewer left, a network is not worth a comparison.
MAX_RATIO = 0.95


class OutOfReach(ValueError):
    """Error of a method that cannot meet the target at any ratio."""


class PruneOnce(Hook):
    """Hook that prunes at one iteration.

    Until then it adds the penalty of Network Slimming, if the method has one.

    Args:
        name (str): A key of ``METHODS``.
        target (float): Share of the dense multiply-adds.
        iteration (int): Iteration before which the model is pruned.
        shape (tuple[int, ...]): Input size ``(N, C, H, W)`` of the count of
            multiply-adds.
        seed (int): Seed of random ranks.
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
            OutOfReach: If no ratio meets the target.
        """
        # Only to fail early: the scales that slimming ranks by still change.
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
        """Return nearly the least ratio that meets the target, by bisection.

        Raises:
            OutOfReach: If no ratio meets it.
        """
        budget = self.target * count_flops(model, self.shape,
                                           inference_forward)
        low, high = 0., MAX_RATIO
        with torch.random.fork_rng():
            for _ in range(8):
                middle = (low + high) / 2
                trial = copy.deepcopy(model)
                prune_(trial, self.method, middle, self.shape, self.seed)
                if count_flops(trial, self.shape, inference_forward) > budget:
                    low = middle
                else:
                    high = middle
        if high == MAX_RATIO:
            raise OutOfReach(f'{self.name}: expected a target that is met '
                             f'with less than {MAX_RATIO:.0%} of the channels '
                             f'removed, but got {self.target}; choose another '
                             'target or method')
        return high


class WithinLayers:
    """Ranking of channels among those that the same convolution writes.

    The library ranks all channels of a group together. If a depthwise
    convolution reads a concatenation, a group has channels of several
    convolutions with kernels of different sizes. A ranking by their norm would
    remove all channels of one convolution; the library refuses that and then
    prunes nothing of the group.

    Args:
        importance (Callable[[Any], Tensor | None]): The library's ranking of
            a group.
    """

    def __init__(self, importance: Callable[[Any], Tensor | None]) -> None:
        self.importance = importance

    def __call__(self, group: Any) -> Tensor | None:
        """Return the share ``(C,)`` of a convolution's channels worth less."""
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
    ignored = [
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
        ignored_layers=ignored,
        forward_fn=_forward).step()
    for name, module in model.named_modules():
        module.training = training[name]
    model.zero_grad(set_to_none=True)


def _forward(model: nn.Module, inputs: Tensor) -> Any:
    """Run a model with its auxiliary head, so that the head is sliced too."""
    return training_forward(model, inputs)
