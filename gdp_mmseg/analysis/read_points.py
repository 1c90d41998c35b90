"""Batch norms that the readers of each group of channels see last.

A gate method may judge a channel by the statistics of the batch norm in front
of a layer that reads it. For that, an expression travels beside each
activation of a trace: which batch norm wrote it, and what happened since. A
norm begins a new expression; an activation function, a sum or a concatenation
makes one of others; pooling, resizing, padding and views pass it on. What else
an operator does loses it, with a reason.

Expressions do not say which channels they are about. An expression is
evaluated for one group of channels at a time: a norm tells something of a
group only if the group lies on the norm's own axis.

Gates, too, may stand at norms instead of the layers behind them, if a factor
g >= 0 of a norm's output reaches the layers as it is.
"""
from __future__ import annotations

import dataclasses
from typing import Callable, Iterable, Iterator, Mapping

from torch import Tensor

from .labels import Labels
from .operators import SPATIAL, Operation
from .structure import ReadPoint

# An axis of a parameter, and whether a group lies on it.
Axis = tuple[str, int]
LiesOn = Callable[[Axis], bool]
_Points = tuple[ReadPoint, ...]
# Most read points of an expression: sums of concatenations multiply them.
_MAX_POINTS = 64
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


class Expression:
    """Knowledge of an activation, which ``points`` evaluates."""

    def points(self, lies_on: LiesOn) -> _Points:
        """List what it tells of a group of channels.

        Args:
            lies_on (LiesOn): Whether the group lies on an axis.

        Returns:
            _Points: None of them if the group is not in the activation.
        """
        raise NotImplementedError

    def scales(self) -> bool:
        """Tell whether it grows with the norms' outputs in proportion."""
        return all(part.scales() for part in self._operands())

    def norms(self, lies_on: LiesOn) -> Iterator[str]:
        """Yield the last norms on the ways to it, whatever came after."""
        for part in self._operands():
            yield from part.norms(lies_on)

    def _operands(self) -> Iterator[Expression]:
        """Yield the expressions that it is made of."""
        for value in vars(self).values():
            for part in value if isinstance(value, tuple) else (value, ):
                if isinstance(part, Expression):
                    yield part


@dataclasses.dataclass(frozen=True, eq=False)
class _Leaf(Expression):
    """Output of a batch norm, or of a layer before any norm."""
    axis: Axis
    point: ReadPoint

    def points(self, lies_on: LiesOn) -> _Points:
        return (self.point, ) if lies_on(self.axis) else ()

    def norms(self, lies_on: LiesOn) -> Iterator[str]:
        yield from self.point.norms if lies_on(self.axis) else ()


@dataclasses.dataclass(frozen=True, eq=False)
class _Joined(Expression):
    """Several activations side by side."""
    parts: tuple[Expression, ...]

    def points(self, lies_on: LiesOn) -> _Points:
        return tuple(
            dict.fromkeys(
                point for part in self.parts
                for point in part.points(lies_on)))


@dataclasses.dataclass(frozen=True, eq=False)
class _Activated(Expression):
    """An activation function, or a factor in [0, 1], of an activation."""
    inner: Expression
    name: str
    in_proportion: bool = False

    def scales(self) -> bool:
        return self.in_proportion and super().scales()

    def points(self, lies_on: LiesOn) -> _Points:
        return tuple(map(self._of, self.inner.points(lies_on)))

    def _of(self, point: ReadPoint) -> ReadPoint:
        if (not self.name or point.reason
                or point.activation == self.name == 'relu'):
            return point
        if point.activation:
            return ReadPoint(reason=f'{self.name} after {point.activation} at '
                             f'{point.norms[0]}')
        return dataclasses.replace(point, activation=self.name)


@dataclasses.dataclass(frozen=True, eq=False)
class _Lost(Expression):
    """Result of an operator that changes channels in another way."""
    inner: Expression
    reason: str

    def scales(self) -> bool:
        return False

    def points(self, lies_on: LiesOn) -> _Points:
        inner = self.inner.points(lies_on)
        known = tuple(point for point in inner if point.reason)
        return known[:1] or self._all(inner)

    def _all(self, inner: _Points) -> _Points:
        return (ReadPoint(reason=self.reason), ) if inner else ()


@dataclasses.dataclass(frozen=True, eq=False)
class _OtherNorm(_Lost):
    """Output of a norm that tells nothing of its channels."""

    def points(self, lies_on: LiesOn) -> _Points:
        # It tells more than that no batch norm came before.
        return self._all(self.inner.points(lies_on))


@dataclasses.dataclass(frozen=True, eq=False)
class _Bounded(_Lost):
    """Function with values in [0, 1]."""
    name: str


@dataclasses.dataclass(frozen=True, eq=False)
class _Sum(Expression):
    """Sum of two activations.

    Where one of them is behind an activation function, the sum is about zero
    if both are; two outputs of norms add up to one.
    """
    first: Expression
    second: Expression

    def points(self, lies_on: LiesOn) -> _Points:
        first, second = (
            part.points(lies_on) for part in (self.first, self.second))
        if not first or not second:
            return first or second
        plain = [[point for point in points if not _is_final(point)]
                 for points in (first, second)]
        final = [point for point in (*first, *second) if _is_final(point)]
        if all(plain):
            added = [
                _added(one, other) for one in plain[0] for other in plain[1]
            ]
        else:
            added = plain[0] + plain[1]
        found = dict.fromkeys(
            dataclasses.replace(point, summed=not point.reason)
            for point in (*final, *added))
        if len(found) > _MAX_POINTS:
            return (ReadPoint(reason='a sum of many concatenations'), )
        return tuple(found)


def _is_final(point: ReadPoint) -> bool:
    return bool(point.activation or point.reason)


def _added(one: ReadPoint, other: ReadPoint) -> ReadPoint:
    return ReadPoint(
        one.norms + other.norms, of_sum=one.of_sum or other.of_sum)


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
                                                             int]) -> _Points:
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
        whole = known[0] if len(known) == 1 else _Joined(tuple(known))
        if name in _NORMS:
            return self._norm(operation, whole)
        if name == 'native_group_norm':
            return _OtherNorm(whole, f'group norm in {self._labels.here()}')
        if name in _PASSING or name.startswith(SPATIAL):
            return whole if _keeps_zero(operation) else self._lost(
                whole, operation)
        activation = _activation(operation, name)
        if activation in _BOUNDED:
            return _Bounded(whole, f'{name} in {self._labels.here()}',
                            activation)
        if activation:
            return _Activated(whole, activation, name == 'relu')
        if len(known) == 2 and name == 'add':
            return _Sum(*known)
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
        return _Leaf((kernel, axis),
                     ReadPoint(reason=f'no batch norm (after {module})'))

    def _norm(self, operation: Operation, inner: Expression) -> Expression:
        self._normed.append(inner)
        name, shift = map(self._name_of, operation.args[1:3])
        norm, _, leaf = (name or '').rpartition('.')
        if name is None or leaf != 'weight':
            return _OtherNorm(
                inner, f'batch norm without scale ({self._labels.here()})')
        if self._labels.here() == norm and shift == f'{norm}.bias':
            self._modules.add(norm)
        if self._labels.in_inference:
            self._calls[norm] = self._calls.get(norm, 0) + 1
        if self._calls.get(norm, 0) > 1:
            self._repeated.add(norm)
            return _OtherNorm(inner,
                              f'batch norm used more than once ({norm})')
        return _Leaf((name, 0),
                     ReadPoint((norm, ), of_sum=isinstance(inner, _Sum)))

    def _name_of(self, argument: object) -> str | None:
        return self._labels.name_of(argument) if isinstance(argument,
                                                            Tensor) else None

    def _lost(self, inner: Expression, operation: Operation) -> Expression:
        return _Lost(inner, f'{operation.name} in {self._labels.here()}')


def _product(first: Expression, second: Expression) -> Expression | None:
    """Expression of a product; None if it is lost."""
    for one, other in ((first, second), (second, first)):
        if isinstance(other, _Bounded):
            # An attention in [0, 1] makes no dead channel alive.
            itself = other.inner is one
            return _Activated(one, _BOUNDED[other.name] if itself else '')
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
