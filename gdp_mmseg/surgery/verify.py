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
import dataclasses
import math
import re
from typing import Any, Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..analysis.analyse import nothing_left
from ..analysis.structure import Analysis
from ..analysis.tracer import Forward, copy_model, set_mode_
from ..gates.gdp import GDPGates, theta_of
from ..gates.layers import gate_layer_
from .prune import cut
from .random_weights import copy_with_random_weights

# Of numbers in double precision, in which a small error is not lost in noise.
TOLERANCE = 1e-8
_REASON = 'not exact when pruned: the forward counts on these channels'
# Sides of the input that are tried before the one that was analysed, and the
# steps between larger ones.
_SIDES = (64, 128)
_STEP = 32


def verify(model: nn.Module,
           analysis: Analysis,
           forward: Forward,
           training_forward: Forward | None = None,
           tolerance: float = TOLERANCE) -> tuple[Analysis, float]:
    """Keep the groups whose surgery is exact on a copy of this very model.

    Args:
        model (nn.Module): The model that was analysed, without gates; left as
            it is.
        analysis (Analysis): What the analysis found.
        forward (Forward): See :func:`gdp_mmseg.groups.analyse`.
        training_forward (Forward, optional): Likewise.
        tolerance (float): Largest difference of outputs, over the largest
            output.

    Returns:
        tuple[Analysis, float]: The groups, some frozen, some that keep a
        channel; and the difference with half of their channels gone.

    Raises:
        ValueError: If that is not exact whatever is frozen.
    """
    with torch.random.fork_rng(devices=[]), _double_precision():
        torch.manual_seed(0)
        trial = _Trial(model, analysis, forward, training_forward, tolerance)
        wrong = _inexact_groups(trial, half=True)
        if wrong:
            analysis = analysis.without(wrong, _REASON)
            if not analysis.num_gates:
                raise ValueError(nothing_left(analysis))
            trial.use(analysis)
        must_keep_one = _inexact_groups(trial, half=False)
        if must_keep_one:
            analysis = dataclasses.replace(
                analysis,
                groups=tuple(
                    dataclasses.replace(
                        group,
                        can_be_empty=group.can_be_empty
                        and index not in must_keep_one)
                    for index, group in enumerate(analysis.groups)))
            trial.use(analysis)
        everyone = range(len(analysis.groups))
        half, whole = (
            trial.difference(everyone, half) for half in (True, False))
    if not max(half, whole) <= tolerance:
        frozen = [frozen.writers[0] for frozen in analysis.frozen]
        raise ValueError(
            'expected a pruned copy of the model to compute what the gated '
            f'one does, but got a relative difference of '
            f'{max(half, whole):.1e}, also with the channels of '
            f'{", ".join(frozen[-len(wrong):]) or "no layer"} frozen; keep '
            'parts out with ignore=[...]')
    return analysis, half


@contextlib.contextmanager
def _double_precision() -> Iterator[None]:
    """New tensors, also those that a forward makes, are of float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _inexact_groups(trial: _Trial, half: bool) -> list[int]:
    """The groups that are not exact by themselves.

    Where a forward pass fails says where to look first; what was found there,
    what to look for elsewhere.
    """

    def search(suspects: Sequence[int]) -> list[int]:
        if not suspects or trial.exact(suspects, half):
            return []
        if len(suspects) == 1:
            return list(suspects)
        middle = len(suspects) // 2
        return search(suspects[:middle]) + search(suspects[middle:])

    everyone = range(len(trial.analysis.groups))
    if trial.exact(everyone, half):
        return []
    found = trial.without_effect()

    def left() -> tuple[int, ...]:
        return tuple(index for index in everyone if index not in found)

    while left() and not trial.exact(left(), half):
        for suspects in (*trial.near_failure(left()), left()):
            more = search(suspects)
            if more:
                break
        else:
            break  # none by itself
        found += more
        for index in trial.alike(more[-1], left()):
            if trial.exact((index, ), half):
                break
            found.append(index)
    return sorted(found)


class _WatchedGates(GDPGates):
    """Gates that know which of the layers asked for them."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.asked: set[int] = set()

    def slot_factors(self, index: int) -> Tensor:
        self.asked.add(index)
        return super().slot_factors(index)


class _Trial:
    """A lively copy of a model, gated, to be pruned in many ways."""

    def __init__(self, model: nn.Module, analysis: Analysis, forward: Forward,
                 training_forward: Forward | None, tolerance: float) -> None:
        self.tolerance = tolerance
        self.forwards = [(forward, False)]
        if training_forward is not None:
            self.forwards.append((training_forward, True))
        self.model, self.inputs = self._random_copy(model,
                                                    analysis.input_shape)
        self.use(analysis)

    def use(self, analysis: Analysis) -> None:
        """Gate a copy of the model at these groups."""
        self.analysis = analysis
        self.gates = _WatchedGates(analysis.num_gates)
        self.gated = copy_model(self.model)
        self.known: dict[tuple[Sequence[int], bool], float] = {}
        # The module that ran last.
        self.failed_at = ''
        for layer in analysis.gated_layers():
            gate_layer_(
                self.gated.get_submodule(layer.name), self.gates, layer.inputs)

    def _random_copy(self, model: nn.Module,
                     shape: tuple[int, ...]) -> tuple[nn.Module, Tensor]:
        """A lively copy, and about the least input that the model takes."""
        whole = max(shape[2:])
        for side in dict.fromkeys((self._least_side(model, shape), whole)):
            inputs = torch.randn(_shape_within(shape, side))
            try:
                # Of the last forward: it runs all that the others run.
                random_copy = copy_with_random_weights(
                    model, lambda net: self._run(-1, net, inputs))
                return random_copy, inputs
            except Exception:  # the model's own, of any kind
                if side == whole:
                    raise
        raise AssertionError('unreachable')

    def _least_side(self, model: nn.Module, shape: tuple[int, ...]) -> int:
        """Found without numbers; where that cannot be, the whole side."""
        empty = copy_model(model, lambda tensor: tensor.to('meta'))
        dtype = next(model.parameters()).dtype

        def takes(side: int) -> bool:
            inputs = torch.zeros(
                _shape_within(shape, side), dtype=dtype, device='meta')
            try:
                for index in range(len(self.forwards)):
                    self._run(index, empty, inputs)
            except Exception:  # the model's own, of any kind
                return False
            return True

        whole = max(shape[2:])
        low, high = 0, whole
        for side in _SIDES:
            if side >= whole or takes(side):
                return min(side, whole)
            low = side
        while high - low > _STEP:
            middle = (low + high) // (2 * _STEP) * _STEP
            low, high = (low, middle) if takes(middle) else (middle, high)
        return high

    def _run(self, index: int, model: nn.Module,
             inputs: Tensor) -> list[Tensor]:
        forward, training = self.forwards[index]
        set_mode_(model, training)
        torch.manual_seed(1)
        with torch.no_grad():
            outputs = tree_leaves(forward(model, inputs))
        return [leaf for leaf in outputs if isinstance(leaf, Tensor)]

    def without_effect(self) -> list[int]:
        """Groups with a layer whose gates are not asked when it runs."""
        self.gates.asked.clear()
        for index in range(len(self.forwards)):
            self._run(index, self.gated, self.inputs)
        unread = torch.zeros(self.analysis.num_gates, dtype=torch.bool)
        for index, layer in enumerate(self.analysis.gated_layers()):
            if index not in self.gates.asked:
                unread[layer.inputs[layer.inputs >= 0]] = True
        return [
            index for index, group in enumerate(self.analysis.groups)
            if bool(unread[group.gates].any())
        ]

    def alike(self, index: int, suspects: Sequence[int]) -> list[int]:
        """Those that only differ in numbers in the names of their modules."""
        role = _role(self.analysis, index)
        return [
            other for other in suspects if _role(self.analysis, other) == role
        ]

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
                       for name in _members(self.analysis, index)))
            if near and near not in found:
                found.append(near)
            module = module.rpartition('.')[0]
        return found

    def exact(self, closed: Sequence[int], half: bool) -> bool:
        """Whether :meth:`difference` is within the tolerance."""
        return self.difference(closed, half) <= self.tolerance

    def difference(self, closed: Sequence[int], half: bool) -> float:
        """Relative difference of gated and pruned outputs.

        Args:
            closed (Sequence[int]): Groups of which channels go; those of all
                others stay, and count as they do without gates.
            half (bool): Whether about half of the channels go, or all; the
                others of these groups are gated by numbers in (0, 1).

        Returns:
            float: The largest; if that is above the tolerance, of the first
            outputs for which it is.
        """
        if (closed, half) not in self.known:
            self.known[closed, half] = self._measure(closed, half)
        return self.known[closed, half]

    def _measure(self, closed: Sequence[int], half: bool) -> float:
        openness = self._openness(closed, half)
        pruned, _ = cut(self.model, self.analysis, openness)
        with torch.no_grad():
            self.gates.theta.copy_(theta_of(openness, self.gates.epsilon))
        self.failed_at = ''
        for name, module in pruned.named_modules():
            module.register_forward_pre_hook(self._remember(name))
        worst = 0.
        # Whether all channels can go is about inference.
        for index in range(len(self.forwards) if half else 1):
            try:
                got = self._run(index, pruned, self.inputs)
            except Exception:  # the model's own, of any kind
                return math.inf
            wanted = self._run(index, self.gated, self.inputs)
            worst = max(worst, largest_difference(got, wanted))
            if worst > self.tolerance:
                break
        return worst

    def _openness(self, closed: Sequence[int], half: bool) -> Tensor:
        openness = torch.ones(self.analysis.num_gates)
        generator = torch.Generator().manual_seed(len(closed))
        for index in closed:
            gates = self.analysis.groups[index].gates
            # Odd numbers stay, that differ from group to group: none that a
            # forward may count on, or take for that of other channels.
            golden = index * 0.618 % 1
            stay = len(gates) // 4 + int(golden * (len(gates) // 2 + 1)) | 1
            number = len(gates) - stay * half
            order = torch.randperm(len(gates), generator=generator)
            openness[gates] = 0.3 + 0.6 * torch.rand(
                len(gates), generator=generator)
            openness[gates[order[:number]]] = 0
        return openness

    def _remember(self, name: str) -> Callable[..., None]:

        def begin(module: nn.Module, inputs: Any) -> None:
            self.failed_at = name

        return begin


def _shape_within(shape: tuple[int, ...], side: int) -> tuple[int, ...]:
    """Of one input, of this side where it is longer."""
    return (1, shape[1], *(min(side, length) for length in shape[2:]))


def _members(analysis: Analysis, index: int) -> tuple[str, ...]:
    group = analysis.groups[index]
    return group.writers + group.readers


def _role(analysis: Analysis, index: int) -> tuple[str, ...]:
    return tuple(
        re.sub(r'\d+', '', name) for name in _members(analysis, index))


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
