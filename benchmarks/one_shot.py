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
import dataclasses
from fnmatch import fnmatchcase
from functools import partial
from types import MappingProxyType
from typing import Any, Callable, Mapping, Sequence

import torch
import torch_pruning as tp
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor, nn

from gdp_mmseg.engine.forwards import inference_forward, training_forward
from gdp_mmseg.report.measure import count_flops


@dataclasses.dataclass(frozen=True)
class Method:
    """Criterion by which an alternative chooses channels.

    Args:
        importance (Callable[[], Any]): Constructor of the library's ranking.
        only (str): Beginning of the names of the modules that may lose
            channels of their own. Defaults to all modules.
        at_once (bool): True to rank the channels of all layers together,
            False to rank those of each layer.
        sparsity (float): Weight of ``|gamma|`` in the loss until the pruning.
        whole (tuple[str, ...]): Names or patterns of convolutions that keep
            all outputs. Defaults to none.
    """

    importance: Callable[[], Any]
    only: str = ''
    at_once: bool = False
    sparsity: float = 0.
    whole: tuple[str, ...] = ()


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
# Largest distance below a target that is taken as met without more ado.
_POINT = 0.01
# Ends of the names of layers whose outputs are classes.
_LAST = ('conv_seg', 'head.fc')


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
        whole (Sequence[str]): Names or patterns of convolutions that keep
            all outputs. Defaults to none.
    """

    priority = 'VERY_HIGH'

    def __init__(self,
                 name: str,
                 target: float,
                 iteration: int,
                 shape: tuple[int, ...],
                 seed: int,
                 whole: Sequence[str] = ()) -> None:
        self.name = name
        self.method = dataclasses.replace(METHODS[name], whole=tuple(whole))
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
        self._ratios(runner.model)
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
            ratio, lower = self._ratios(runner.model)
            optimizer = runner.optim_wrapper.optimizer
            # Pruning makes new parameters of the same names.
            name_of = {p: name for name, p in runner.model.named_parameters()}
            names = [[name_of[p] for p in group['params']]
                     for group in optimizer.param_groups]
            with torch.random.fork_rng():
                prune_(runner.model, self.method, ratio, self.shape, self.seed,
                       lower)
            parameters = dict(runner.model.named_parameters())
            for group, its_names in zip(optimizer.param_groups, names):
                group['params'] = [parameters[name] for name in its_names]
            optimizer.state.clear()
            runner.logger.info(f'{self.name}: {ratio:.3f} of the channels '
                               'are removed')

    def _ratios(self, model: nn.Module) -> tuple[float, dict[str, float]]:
        """Return nearly the least ratio that meets the target, by bisection.

        Where all layers are so narrow that one channel of each is more than a
        point of the target, the first layers may lose one channel less.

        Returns:
            tuple[float, dict[str, float]]: The ratio, and the lower ratios of
            some layers by their names.

        Raises:
            OutOfReach: If no ratio meets the target.
        """
        dense = count_flops(model, self.shape, inference_forward)

        def share(ratio: float, lower: Mapping[str, float]) -> float:
            trial = copy.deepcopy(model)
            with torch.random.fork_rng():
                prune_(trial, self.method, ratio, self.shape, self.seed, lower)
            return count_flops(trial, self.shape, inference_forward) / dense

        low, high = 0., MAX_RATIO
        for _ in range(8):
            middle = (low + high) / 2
            if share(middle, {}) > self.target:
                low = middle
            else:
                high = middle
        if high == MAX_RATIO:
            raise OutOfReach(f'{self.name}: expected a target that is met '
                             f'with less than {MAX_RATIO:.0%} of the channels '
                             f'removed, but got {self.target}; choose another '
                             'target or method')
        if share(high, {}) >= self.target - _POINT:
            return high, {}
        layers = _pruned_layers(model, self.method)
        fits, exceeds = 0, len(layers)
        while exceeds - fits > 1:
            number = (fits + exceeds) // 2
            if share(high, dict.fromkeys(layers[:number], low)) > self.target:
                exceeds = number
            else:
                fits = number
        return high, dict.fromkeys(layers[:fits], low)


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


def prune_(
        model: nn.Module,
        method: Method,
        ratio: float,
        shape: tuple[int, ...],
        seed: int,
        lower: Mapping[str, float] = MappingProxyType({}),
) -> None:
    """Remove a share of the channels, by rank, in place.

    Args:
        model (nn.Module): The model.
        method (Method): The criterion.
        ratio (float): The share.
        shape (tuple[int, ...]): Input size ``(N, C, H, W)``.
        seed (int): Seed of random ranks.
        lower (Mapping[str, float]): The shares of some layers by their names.
    """
    torch.manual_seed(seed)
    training = {name: one.training for name, one in model.named_modules()}
    model.eval()
    pruned = _pruned_layers(model, method)
    ignored = [
        module for name, module in model.named_modules()
        if name.endswith(_LAST)
        or isinstance(module, nn.Conv2d) and name not in pruned
    ]
    importance = method.importance()
    tp.pruner.BasePruner(
        model,
        torch.randn(shape, device=next(model.parameters()).device),
        importance if method.at_once else WithinLayers(importance),
        global_pruning=method.at_once,
        pruning_ratio=ratio,
        pruning_ratio_dict={
            model.get_submodule(name): share
            for name, share in lower.items()
        },
        ignored_layers=ignored,
        forward_fn=_forward).step()
    for name, module in model.named_modules():
        module.training = training[name]
    model.zero_grad(set_to_none=True)


def _pruned_layers(model: nn.Module, method: Method) -> list[str]:
    """Return the names of the convolutions that may lose outputs."""
    return [
        name for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and name.startswith(method.only)
        and not name.endswith(_LAST) and not any(
            fnmatchcase(name, pattern) for pattern in method.whole)
    ]


def _forward(model: nn.Module, inputs: Tensor) -> Any:
    """Run a model with its auxiliary head, so that the head is sliced too."""
    return training_forward(model, inputs)
