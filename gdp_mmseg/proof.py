"""A proof by experiment that the surgery of a model is exact.

The analysis knows what operators do, not what a forward pass reads from its
own attributes: ``x.view(n, self.heads, 32, -1)`` works on the dense network
and on no other. So the surgery is done once, on a copy with lively random
weights and random gates, before anything is trained: what the pruned copy
computes is compared with what the gated copy computes. Groups of channels
for which that fails stay as they are.
"""
from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from typing import Any, Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from .gate import Gates, gate_layer_
from .groups import Groups, nothing_left
from .surgery import copy_structure, cut
from .trace import Forward, set_mode_

# Of numbers in double precision, in which a small error is not lost in noise.
TOLERANCE = 1e-8
_REASON = 'not exact when pruned: the forward counts on these channels'
# Sides of the input that are tried before the one that was analysed.
_SIDES = (64, 128)
_GAINS = (1., 0.5, 0.25, 0.1)


def prove(model: nn.Module,
          groups: Groups,
          forward: Forward,
          training_forward: Forward | None = None,
          tolerance: float = TOLERANCE) -> tuple[Groups, float]:
    """Keep the groups whose surgery is exact on a copy of this very model.

    Args:
        model (nn.Module): The model that was analysed, without gates; left as
            it is.
        groups (Groups): What the analysis found.
        forward (Forward): See :func:`gdp_mmseg.groups.analyse`.
        training_forward (Forward, optional): Likewise.
        tolerance (float): Largest difference of outputs, over the largest
            output.

    Returns:
        tuple[Groups, float]: The groups, some frozen, some that keep a
        channel; and the difference with half of their channels gone.

    Raises:
        ValueError: If that is not exact whatever is frozen.
    """
    with torch.random.fork_rng(devices=[]), _double_precision():
        torch.manual_seed(0)
        trial = _Trial(model, groups, forward, training_forward)
        wrong = _culprits(trial, half=True, tolerance=tolerance)
        if wrong:
            groups = groups.without(wrong, _REASON)
            if not groups.number:
                raise ValueError(nothing_left(groups))
            trial.use(groups)
        stiff = _culprits(trial, half=False, tolerance=tolerance)
        if stiff:
            groups = dataclasses.replace(
                groups,
                groups=tuple(
                    dataclasses.replace(
                        group, vanishes=group.vanishes and index not in stiff)
                    for index, group in enumerate(groups.groups)))
            trial.use(groups)
        everyone = range(len(groups.groups))
        half, whole = (
            trial.difference(everyone, half) for half in (True, False))
    if not max(half, whole) <= tolerance:
        frozen = [frozen.writers[0] for frozen in groups.frozen]
        raise ValueError(
            'expected a pruned copy of the model to compute what the gated '
            f'one does, but got a relative difference of '
            f'{max(half, whole):.1e}, also with the channels of '
            f'{", ".join(frozen[-len(wrong):]) or "no layer"} frozen; keep '
            'parts out with ignore=[...]')
    return groups, half


@contextlib.contextmanager
def _double_precision() -> Iterator[None]:
    """New tensors, also those that a forward makes, are of float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _culprits(trial: _Trial, half: bool, tolerance: float) -> list[int]:
    """The groups that are not exact by themselves.

    Where a forward pass fails says where to look first.
    """

    def search(suspects: Sequence[int]) -> list[int]:
        if not suspects or trial.difference(suspects, half) <= tolerance:
            return []
        if len(suspects) == 1:
            return list(suspects)
        middle = len(suspects) // 2
        return search(suspects[:middle]) + search(suspects[middle:])

    everyone = range(len(trial.groups.groups))
    found: list[int] = []
    left: Sequence[int] = everyone
    while left and not trial.difference(left, half) <= tolerance:
        for suspects in (*trial.near_failure(left), left):
            more = search(suspects)
            if more:
                break
        else:
            break  # none by itself
        found += more
        left = tuple(index for index in everyone if index not in found)
    return sorted(found)


class _Trial:
    """A lively copy of a model, gated, to be pruned in many ways."""

    def __init__(self, model: nn.Module, groups: Groups, forward: Forward,
                 training_forward: Forward | None) -> None:
        self.model = _copy_in_double(model)
        self.forwards = [(forward, False)]
        if training_forward is not None:
            self.forwards.append((training_forward, True))
        self.inputs = self._make_lively_(groups.input_shape)
        self.use(groups)

    def use(self, groups: Groups) -> None:
        """Gate a copy of the model at these groups."""
        self.groups = groups
        self.gates = Gates(groups.number)
        self.gated = copy_structure(self.model)
        self.known: dict[tuple[Sequence[int], bool], float] = {}
        # The module that ran last.
        self.failed_at = ''
        for layer in groups.readers():
            gate_layer_(
                self.gated.get_submodule(layer.name), self.gates, layer.inputs)

    def _make_lively_(self, shape: tuple[int, ...]) -> Tensor:
        """Random weights, and the least input that the dense model takes."""
        _, channels, height, width = shape
        for side in (*_SIDES, max(height, width)):
            inputs = torch.randn(1, channels, min(side, height),
                                 min(side, width))
            try:
                randomise_until_finite_(self.model,
                                        lambda net: self._run(net, inputs))
                return inputs
            except Exception:  # the model's own, of any kind
                if side >= max(height, width):
                    raise
        raise AssertionError('unreachable')

    def _run(self,
             model: nn.Module,
             inputs: Tensor,
             training_too: bool = True) -> list[Tensor]:
        outputs: list[Any] = []
        for forward, training in self.forwards[:1 + training_too]:
            set_mode_(model, training)
            torch.manual_seed(1)
            with torch.no_grad():
                outputs += tree_leaves(forward(model, inputs))
        return [leaf for leaf in outputs if isinstance(leaf, Tensor)]

    def near_failure(self, suspects: Sequence[int]) -> list[tuple[int, ...]]:
        """Those that touch the module after which a forward last failed.

        Then those that touch the module around it, and so on.
        """
        found: list[tuple[int, ...]] = []
        module = self.failed_at
        while module:
            near = tuple(
                index for index in suspects
                if any(f'{name}.'.startswith(f'{module}.')
                       for name in _members(self.groups, index)))
            if near and near not in found:
                found.append(near)
            module = module.rpartition('.')[0]
        return found

    def difference(self, closed: Sequence[int], half: bool) -> float:
        """Relative difference of gated and pruned outputs.

        Args:
            closed (Sequence[int]): Groups of which channels go; those of all
                others stay, and count as they do without gates.
            half (bool): Whether about half of the channels go, or all; the
                others of these groups are gated by numbers in (0, 1).
        """
        if (closed, half) not in self.known:
            self.known[closed, half] = self._measure(closed, half)
        return self.known[closed, half]

    def _measure(self, closed: Sequence[int], half: bool) -> float:
        openness = torch.ones(self.groups.number)
        generator = torch.Generator().manual_seed(len(closed))
        for index in closed:
            gates = self.groups.groups[index].gates
            # Odd numbers stay, that differ from group to group: none that a
            # forward may count on, or take for that of other channels.
            golden = index * 0.618 % 1
            stay = len(gates) // 4 + int(golden * (len(gates) // 2 + 1)) | 1
            number = len(gates) - stay * half
            order = torch.randperm(len(gates), generator=generator)
            openness[gates] = 0.3 + 0.6 * torch.rand(
                len(gates), generator=generator)
            openness[gates[order[:number]]] = 0
        pruned, _ = cut(self.model, self.groups, openness)
        self.failed_at = ''
        for name, module in pruned.named_modules():
            module.register_forward_pre_hook(self._remember(name))
        try:
            got = self._run(pruned, self.inputs, half)
        except Exception:  # the model's own, of any kind
            return math.inf
        self._set_gates(openness)
        wanted = self._run(self.gated, self.inputs, half)
        return largest_difference(got, wanted)

    def _remember(self, name: str) -> Callable[..., None]:

        def begin(module: nn.Module, inputs: Any) -> None:
            self.failed_at = name

        return begin

    @torch.no_grad()
    def _set_gates(self, openness: Tensor) -> None:
        """The thetas that have this openness."""
        share = openness / (1 + self.gates.epsilon)
        self.gates.theta.copy_(
            (self.gates.epsilon * share / (1 - share)).sqrt())


def _copy_in_double(model: nn.Module) -> nn.Module:
    """On the CPU, without a copy in between: models can be large."""
    memo: dict[int, Tensor] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        dtype = torch.float64 if tensor.is_floating_point() else tensor.dtype
        other = tensor.detach().to('cpu', dtype, copy=True)
        memo[id(tensor)] = nn.Parameter(
            other, tensor.requires_grad) if isinstance(
                tensor, nn.Parameter) else other
    return copy.deepcopy(model, memo)


def _members(groups: Groups, index: int) -> tuple[str, ...]:
    group = groups.groups[index]
    return group.writers + group.readers


def largest_difference(got: Sequence[Tensor],
                       wanted: Sequence[Tensor]) -> float:
    """Over all outputs, each over the largest number in it; inf if in doubt.
    """
    if len(got) != len(wanted):
        return math.inf
    worst = 0.
    for one, other in zip(got, wanted):
        if one.shape != other.shape:
            return math.inf
        if one.is_floating_point() and one.numel():
            scale = float(other.abs().max()) or 1.
            difference = float((one - other).abs().max()) / scale
            # nan must not be lost in a maximum.
            worst = max(worst, difference) if difference >= 0 else math.inf
    return worst


def randomise_until_finite_(model: nn.Module, run: Callable[[nn.Module],
                                                            Any]) -> nn.Module:
    """:func:`randomise_` as lively as the model bears, in place.

    Args:
        model (nn.Module): Changed.
        run (Callable[[nn.Module], Any]): Its outputs on some input.
    """
    for gain in _GAINS:
        randomise_(model, gain)
        if all(leaf.isfinite().all() for leaf in tree_leaves(run(model))
               if isinstance(leaf, Tensor)):
            break
    return model


@torch.no_grad()
def randomise_(model: nn.Module, gain: float = 1.) -> nn.Module:
    """Random numbers of order ``gain`` for all that is learnt, in place.

    Weights at the start of a training hide errors: zero biases, layer scales
    of 1e-6, norms that are the identity.
    """
    for parameter in model.parameters():
        if not parameter.is_floating_point():
            continue
        if sum(size > 1 for size in parameter.shape) > 1:
            inputs = parameter.numel() / parameter.shape[0]
            parameter.normal_(0, gain * inputs**-0.5)
        else:
            parameter.uniform_(0.5 * gain, 1.5 * gain)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            if module.running_mean is not None:
                module.running_mean.normal_(0, 0.1)
            if module.running_var is not None:
                module.running_var.uniform_(0.5, 1.5)
            if module.bias is not None:
                module.bias.normal_(0, 0.5)
    return model
