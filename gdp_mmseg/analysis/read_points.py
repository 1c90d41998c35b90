"""Batch norms that the readers of each group of channels see last.

A gate method may judge a channel by the statistics of the batch norm in front
of a layer that reads it. For that, an expression travels beside each
activation of a trace: which batch norm wrote it, and what happened since (see
:mod:`gdp_mmseg.analysis.expressions`). Pooling, resizing, padding and views
pass it on.

Gates, too, may stand at norms instead of the layers behind them, if a factor
g >= 0 of a norm's output reaches the layers as it is.
"""
from __future__ import annotations

from typing import Iterable, Mapping

from torch import Tensor

from .expressions import (Activated, Axis, Bounded, Expression, Joined, Leaf,
                          Lost, OtherNorm, Points, Sum)
from .labels import Labels
from .operators import SPATIAL, Operation
from .structure import ReadPoint

_NORMS = ('native_batch_norm', '_native_batch_norm_legit',
          '_native_batch_norm_legit_no_training', 'cudnn_batch_norm',
          'miopen_batch_norm', '_batch_norm_with_update',
          '_batch_norm_no_update')
# A channel that is about zero stays so, and no channel is mixed with others.
_PASSING = frozenset(
    ('clone', 'detach', 'alias', '_to_copy', 'contiguous', 'lift_fresh',
     'expand', 'unsqueeze', 'squeeze', 'select', 'flip', 'roll', 'view',
     '_unsafe_view', 'reshape', '_reshape_alias', 'split', 'split_with_sizes',
     'unbind', 'slice', 'repeat', 'mean', 'amax', 'max', 'permute',
     'transpose', 't', 'pixel_shuffle', 'pixel_unshuffle', 'im2col', 'cat',
     'stack', 'native_dropout', 'constant_pad_nd'))
_ACTIVATIONS = dict(
    relu='relu', silu='silu', gelu='gelu', hardswish='hardswish')
# Functions with values in [0, 1], and the activation that is its argument
# times such a function.
_BOUNDED = dict(sigmoid='silu', hardsigmoid='hardswish')


class ReadPointTracker:
    """Record of the expressions of a trace.

    Args:
        labels (Labels): Labels of the trace, for the names of parameters.
    """

    def __init__(self, labels: Labels) -> None:
        self._labels = labels
        self._reads: dict[str, list[Expression | None]] = {}
        # What norms read, norms that their own modules compute, and norms
        # that are used more than once.
        self._normed: list[Expression] = []
        self._modules: set[str] = set()
        self._repeated: set[str] = set()
        # Those of the forward pass that runs now, by the tensors' ids.
        self._known: dict[int, Expression] = {}
        self._calls: dict[str, int] = {}

    def forget_activations(self) -> None:
        """Forget what belongs to the forward pass that has ended."""
        self._known.clear()
        self._calls.clear()

    def follow(self, operation: Operation) -> None:
        """Take note of an operator after its rule was applied."""
        found = self._result(operation)
        for output in operation.outputs:
            if found is None:
                self._known.pop(id(output), None)
            else:
                self._known[id(output)] = found

    def points(self, kernels: Iterable[str], counts: Mapping[Axis,
                                                             int]) -> Points:
        """List the read points of a group of channels.

        Args:
            kernels (Iterable[str]): Kernels that read it through a gate.
            counts (Mapping[Axis, int]): Axes on which the group lies, and how
                often each of its channels does.
        """
        found: dict[ReadPoint, None] = {}
        for kernel in kernels:
            for expression in self._reads.get(kernel, []):
                points = () if expression is None else expression.points(
                    counts.__contains__)
                for point in points or (ReadPoint(
                        reason='no batch norm (before ' +
                        kernel.rpartition('.')[0] + ')'), ):
                    found[_checked(point, counts)] = None
        return tuple(found)

    def norms_to_gate(self, kernels: Iterable[str],
                      counts: Mapping[Axis, int]) -> dict[str, list[str]]:
        """List the norms that can have the gates of a group of channels.

        Args:
            kernels (Iterable[str]): Kernels that read it through a gate.
            counts (Mapping[Axis, int]): Axes on which the group lies, and how
                often each of its channels does.

        Returns:
            dict[str, list[str]]: Kernels that need no gates then, and the
            norms in front of each. A factor of the norms' outputs reaches
            these kernels as it is and changes nothing else.
        """
        found = {
            kernel: norms
            for kernel in kernels if (norms := self._norms(kernel, counts))
        }
        while True:
            others = self._normed + [
                part
                for kernel, parts in self._reads.items() if kernel not in found
                for part in parts if part is not None
            ]
            read_by_others = {
                norm
                for part in others
                for norm in part.norms(counts.__contains__)
            }
            free = {
                kernel: norms
                for kernel, norms in found.items()
                if read_by_others.isdisjoint(norms)
            }
            if len(free) == len(found):
                return free
            found = free

    def _norms(self, kernel: str, counts: Mapping[Axis, int]) -> list[str]:
        """List norms whose factor reaches a kernel as it is, if all do."""
        points = self.points([kernel], counts)
        norms = {norm: None for point in points for norm in point.norms}
        if (any(point.reason for point in points)
                or not (self._modules - self._repeated).issuperset(norms)
                or any(part is None or not part.scales()
                       for part in self._reads.get(kernel, []))):
            return []
        return list(norms)

    def _result(self, operation: Operation) -> Expression | None:
        """Expression of the outputs of an operator; None if there is none."""
        name = operation.name.rstrip('_') or operation.name
        if name in ('convolution', 'linear', 'addmm', 'mm'):
            return self._layer(operation)
        known = [
            self._known[id(tensor)] for tensor in operation.tensors
            if id(tensor) in self._known
        ]
        if not known:
            return None
        whole = known[0] if len(known) == 1 else Joined(tuple(known))
        if name in _NORMS:
            return self._norm(operation, whole)
        if name == 'native_group_norm':
            return OtherNorm(whole, f'group norm in {self._labels.here()}')
        if name in _PASSING or name.startswith(SPATIAL):
            return whole if _keeps_zero(operation) else self._lost(
                whole, operation)
        activation = _activation(operation, name)
        if activation in _BOUNDED:
            return Bounded(whole, f'{name} in {self._labels.here()}',
                           activation)
        if activation:
            return Activated(whole, activation, name == 'relu')
        if len(known) == 2 and name == 'add':
            return Sum(*known)
        if len(known) == 2 and name == 'mul':
            return _product(*known) or self._lost(whole, operation)
        return self._lost(whole, operation)

    def _layer(self, operation: Operation) -> Expression | None:
        """Note what a layer reads; return the expression of its output."""
        labels = self._labels
        if operation.name in ('convolution', 'linear'):
            inputs, weight = operation.args[:2]
            kernel = labels.name_of(weight)
        else:
            *_, inputs, weight = operation.args[:3]
            kernel = labels.kernels.get(id(weight))
        if kernel is None or kernel not in labels.calls:
            return None
        self._reads.setdefault(kernel, []).append(self._known.get(id(inputs)))
        axis = labels.calls[kernel].axes[1]
        module = kernel.rpartition('.')[0]
        return Leaf((kernel, axis),
                    ReadPoint(reason=f'no batch norm (after {module})'))

    def _norm(self, operation: Operation, inner: Expression) -> Expression:
        self._normed.append(inner)
        name, shift = map(self._name_of, operation.args[1:3])
        norm, _, leaf = (name or '').rpartition('.')
        if name is None or leaf != 'weight':
            return OtherNorm(
                inner, f'batch norm without scale ({self._labels.here()})')
        if self._labels.here() == norm and shift == f'{norm}.bias':
            self._modules.add(norm)
        if self._labels.in_inference:
            self._calls[norm] = self._calls.get(norm, 0) + 1
        if self._calls.get(norm, 0) > 1:
            self._repeated.add(norm)
            return OtherNorm(inner, f'batch norm used more than once ({norm})')
        return Leaf((name, 0),
                    ReadPoint((norm, ), of_sum=isinstance(inner, Sum)))

    def _name_of(self, argument: object) -> str | None:
        return self._labels.name_of(argument) if isinstance(argument,
                                                            Tensor) else None

    def _lost(self, inner: Expression, operation: Operation) -> Expression:
        return Lost(inner, f'{operation.name} in {self._labels.here()}')


def _product(first: Expression, second: Expression) -> Expression | None:
    """Expression of a product; None if it is lost."""
    for one, other in ((first, second), (second, first)):
        if isinstance(other, Bounded):
            # An attention in [0, 1] makes no dead channel alive.
            itself = other.inner is one
            return Activated(one, _BOUNDED[other.name] if itself else '')
    return None


def _activation(operation: Operation, name: str) -> str | None:
    """Name of the activation function that an operator computes, if any."""
    if name in ('hardtanh', 'clamp', 'clamp_min'):
        low, high = (operation.argument(place, key)
                     for place, key in ((1, 'min'), (2, 'max')))
        if isinstance(low, Tensor) or low != 0:
            return None
        return 'hardsigmoid' if high == 1 else 'relu'
    return name if name in _BOUNDED else _ACTIVATIONS.get(name)


def _keeps_zero(operation: Operation) -> bool:
    """Tell whether zero channels stay zero."""
    return operation.name != 'constant_pad_nd' or not operation.argument(
        2, 'value', 0)


def _checked(point: ReadPoint, counts: Mapping[Axis, int]) -> ReadPoint:
    """Read point, unless a sum does not pair the channels of its norms."""
    rows = [counts.get((f'{norm}.weight', 0), 0) for norm in point.norms]
    if len(rows) > 1 and max(rows) > 1:
        return ReadPoint(
            reason=f'a sum of several channels of {point.norms[0]}')
    return point
