"""Expressions: what an activation tells of the batch norms before it.

A norm begins a new expression; an activation function, a sum or a
concatenation makes one of others; what else an operator does loses it, with a
reason.

Expressions do not say which channels they are about. An expression is
evaluated for one group of channels at a time: a norm tells something of a
group only if the group lies on the norm's own axis.
"""
from __future__ import annotations

import dataclasses
from typing import Callable, Iterator

from .structure import ReadPoint

# An axis of a parameter, and whether a group lies on it.
Axis = tuple[str, int]
LiesOn = Callable[[Axis], bool]
Points = tuple[ReadPoint, ...]
# Most read points of an expression: sums of concatenations multiply them.
_MAX_POINTS = 64


class Expression:
    """Knowledge of an activation, which ``points`` evaluates."""

    def points(self, lies_on: LiesOn) -> Points:
        """List what it tells of a group of channels.

        Args:
            lies_on (LiesOn): Whether the group lies on an axis.

        Returns:
            Points: None of them if the group is not in the activation.
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
class Leaf(Expression):
    """Output of a batch norm, or of a layer before any norm."""
    axis: Axis
    point: ReadPoint

    def points(self, lies_on: LiesOn) -> Points:
        """List its own read point, if the group lies on its axis."""
        return (self.point, ) if lies_on(self.axis) else ()

    def norms(self, lies_on: LiesOn) -> Iterator[str]:
        """Yield its norm, if the group lies on it."""
        yield from self.point.norms if lies_on(self.axis) else ()


@dataclasses.dataclass(frozen=True, eq=False)
class Joined(Expression):
    """Several activations side by side."""
    parts: tuple[Expression, ...]

    def points(self, lies_on: LiesOn) -> Points:
        """List the read points of all parts."""
        return tuple(
            dict.fromkeys(
                point for part in self.parts
                for point in part.points(lies_on)))


@dataclasses.dataclass(frozen=True, eq=False)
class Activated(Expression):
    """An activation function, or a factor in [0, 1], of an activation."""
    inner: Expression
    name: str
    in_proportion: bool = False

    def scales(self) -> bool:
        """Tell whether it is ReLU, and its argument grows in proportion."""
        return self.in_proportion and super().scales()

    def points(self, lies_on: LiesOn) -> Points:
        """List those of its argument, with this function after it."""
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
class Lost(Expression):
    """Result of an operator that changes channels in another way."""
    inner: Expression
    reason: str

    def scales(self) -> bool:
        """Return False: nothing is known of it."""
        return False

    def points(self, lies_on: LiesOn) -> Points:
        """List one point with the reason, or with an earlier one."""
        inner = self.inner.points(lies_on)
        known = tuple(point for point in inner if point.reason)
        return known[:1] or self._all(inner)

    def _all(self, inner: Points) -> Points:
        return (ReadPoint(reason=self.reason), ) if inner else ()


@dataclasses.dataclass(frozen=True, eq=False)
class OtherNorm(Lost):
    """Output of a norm that tells nothing of its channels."""

    def points(self, lies_on: LiesOn) -> Points:
        """List one point with its own reason."""
        # It tells more than that no batch norm came before.
        return self._all(self.inner.points(lies_on))


@dataclasses.dataclass(frozen=True, eq=False)
class Bounded(Lost):
    """Function with values in [0, 1]."""
    name: str


@dataclasses.dataclass(frozen=True, eq=False)
class Sum(Expression):
    """Sum of two activations.

    Where one of them is behind an activation function, the sum is about zero
    if both are; two outputs of norms add up to one.
    """
    first: Expression
    second: Expression

    def points(self, lies_on: LiesOn) -> Points:
        """List the norms of both parts that are added up, in pairs."""
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
