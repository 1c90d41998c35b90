"""Probability that a channel is deactivated, from its batch norms.

The output of channel i of a batch norm is taken as N(beta_i, gamma_i^2), and a
channel as deactivated where the activation function makes at most ``tau`` of
it. For a ReLU the probability of that is

    Phi_i = Phi((tau - beta_i) / (|gamma_i| + 1e-8)),

as in SCP (Kang and Han, ICML 2020) and its code. All else here is ours: other
activation functions, sums, and several layers that read a channel.

Everything is computed as the logarithm of the rest, log(1 - Phi), because Phi
itself rounds to 1 long before channels cease to differ.

Letters: ``G`` gates, ``P`` read points of a gate, ``T`` norms that are added
up there, ``R`` channels of all norms.
"""
from __future__ import annotations

import math
from typing import Any, Callable

import torch
from torch import Tensor, nn

from ..analysis.constants import WithConstants
from ..analysis.structure import Analysis

# Added to |gamma|, as in the code of SCP.
_LEAST_SCALE = 1e-8
# Least |gamma| of the derivatives, which are infinite at 0.
_LEAST_SLOPE_SCALE = 1e-3
_LEAST_MASS = 1e-300
# Quantile of 0.95: Phi is below that if beta + 1.645 |gamma| > tau.
_QUANTILE = 1.6448536
_LEAST_DISTANCE = 0.1


class _Quotient(torch.autograd.Function):
    """``numerator / (scale + 1e-8)``, with bounded derivatives."""

    @staticmethod
    def forward(ctx: Any, numerator: Tensor, scale: Tensor) -> Tensor:
        quotient = numerator / (scale + _LEAST_SCALE)
        ctx.save_for_backward(quotient, scale)
        return quotient

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        quotient, scale = ctx.saved_tensors
        slope = gradient / (scale.clamp(min=_LEAST_SLOPE_SCALE) + _LEAST_SCALE)
        return slope, -slope * quotient


def log_active(beta: Tensor,
               scale: Tensor,
               tau: float,
               activation: str = 'relu') -> Tensor:
    """Logarithm of the probability that a channel is not deactivated.

    Args:
        beta (Tensor): Means, of any shape.
        scale (Tensor): Standard deviations in that shape, at least 0.
        tau (float): Largest absolute value of a deactivated channel.
        activation (str): See :class:`gdp_mmseg.analysis.structure.ReadPoint`.

    Returns:
        Tensor: Log(1 - Phi) in that shape, differentiable in both.

    Examples:
        >>> found = log_active(torch.zeros(1).double(), torch.ones(1), 0.05)
        >>> round(-float(found.expm1()), 7)
        0.5199388
    """

    def above(edge: float) -> Tensor:
        return torch.special.log_ndtr(_quotient(beta - edge, scale))

    if activation == 'relu':
        return above(tau)
    if not activation:
        below = torch.special.log_ndtr(_quotient(-tau - beta, scale))
        return torch.logaddexp(above(tau), below)
    # Far below zero, and around zero.
    *lows, high = edges_of(activation, tau)
    if not lows:
        return above(high)
    first, second = (
        torch.special.ndtr(_quotient(edge - beta, scale)) for edge in lows)
    between = (second - first).clamp(min=_LEAST_MASS)
    return torch.logaddexp(above(high), between.log())


def _quotient(numerator: Tensor, scale: Tensor) -> Tensor:
    found: Tensor = _Quotient.apply(numerator, scale)
    return found


_FUNCTIONS: dict[str, Callable[[float], float]] = dict(
    silu=lambda x: x / (1 + math.exp(-x)),
    gelu=lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2,
    hardswish=lambda x: x * min(max(x + 3, 0), 6) / 6)
# Where these functions are least, and where they are about zero.
_LEAST_AT = dict(silu=-1.2784645, gelu=-0.7517915, hardswish=-1.5)
_FAR = -40.


def edges_of(activation: str, tau: float) -> tuple[float, ...]:
    """Bounds of the inputs that a function takes to at most ``tau``.

    Args:
        activation (str): ``'silu'``, ``'gelu'`` or ``'hardswish'``.
        tau (float): Largest absolute value.

    Returns:
        tuple[float, ...]: ``(a, b, c)``, where the inputs are those up to a
        and those from b to c; ``(c, )`` if no value is below -tau.

    Examples:
        >>> [round(edge, 4) for edge in edges_of('gelu', 0.05)]
        [-1.9489, -0.1096, 0.0931]
    """
    function, least = _FUNCTIONS[activation], _LEAST_AT[activation]
    high = _bisected(lambda x: function(x) > tau, 0., tau + 4)
    if function(least) >= -tau:
        return (high, )
    return (_bisected(lambda x: function(x) < -tau, _FAR, least),
            _bisected(lambda x: function(x) >= -tau, least, 0.), high)


def _bisected(holds: Callable[[float], bool], low: float,
              high: float) -> float:
    """Number between two others from which on a condition holds."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


class Evidence(WithConstants):
    """Rows of batch norms that tell of each gate whether it is deactivated.

    A gate that several layers read is deactivated if it is at all of its read
    points, so the least Phi of them counts.

    Args:
        analysis (Analysis): Analysis of the model, in which each group has
            read points with norms.
        tau (float): See :func:`log_active`.

    Attributes:
        norms (tuple[str, ...]): Names of the norms, whose channels are the
            ``R`` rows, one norm after the other.
        gate_of_row (Tensor): ``(R,)`` gate of each row, -1 for none.
    """

    gate_of_row: Tensor
    rows: Tensor
    kinds: Tensor

    def __init__(self, analysis: Analysis, tau: float) -> None:
        super().__init__()
        self.tau = tau
        self.norms = tuple(
            dict.fromkeys(norm for group in analysis.groups
                          for point in group.read_points
                          for norm in point.norms))
        gates = [
            analysis.gate_of_slot[f'{norm}.weight', 0] for norm in self.norms
        ]
        self._sizes = [len(one) for one in gates]
        starts = dict(
            zip(self.norms,
                torch.tensor([0, *self._sizes]).cumsum(0).tolist()))
        self._model: list[nn.Module] = []
        self.activations = tuple(
            sorted({
                point.activation
                for group in analysis.groups
                for point in group.read_points
            }))
        rows, kinds = self._table(analysis, starts)
        for name, tensor in (('rows', rows), ('kinds', kinds),
                             ('gate_of_row', torch.cat(gates))):
            self.add_constant(name, tensor)

    def _table(self, analysis: Analysis,
               starts: dict[str, int]) -> tuple[Tensor, Tensor]:
        """Rows ``(G, P, T)`` and activation ``(G, P)``; R and -1 for none."""
        found: list[list[tuple[int, Tensor]]] = []
        for group in analysis.groups:
            points: list[tuple[int, Tensor]] = []
            for point in group.read_points:
                places = torch.stack([
                    starts[norm] + _rows_of(analysis, norm, group.gates)
                    for norm in point.norms
                ], -1)
                # (n, r, T): several rows of a gate are a read point each.
                kind = self.activations.index(point.activation)
                points += [(kind, rows) for rows in places.unbind(1)]
            found.append(points)
        width = max(len(points) for points in found)
        terms = max(rows.shape[1] for points in found for _, rows in points)
        shape = (analysis.num_gates, width)
        table = torch.full((*shape, terms), sum(self._sizes))
        kinds = torch.full(shape, -1)
        for group, points in zip(analysis.groups, found):
            for index, (kind, rows) in enumerate(points):
                table[group.gates, index, :rows.shape[1]] = rows
                kinds[group.gates, index] = kind
        return table, kinds

    def bind_(self, model: nn.Module) -> None:
        """Take the norms of a model, in place.

        Not its modules but their names are kept: a training may replace them,
        e.g. by synchronised norms.
        """
        # In a list, so that the model is no part of this module.
        self._model = [model]

    def pairs(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """List the offsets and the scales of the norms."""
        norms: list[Any] = [
            self._model[0].get_submodule(name) for name in self.norms
        ]
        return [norm.bias for norm in norms], [norm.weight for norm in norms]

    def values(self) -> tuple[Tensor, Tensor]:
        """Copy the offsets and the scales ``(R,)`` of all rows, in double."""
        offsets, scales = self.pairs()
        return (torch.cat([one.detach() for one in offsets]).double(),
                torch.cat([one.detach() for one in scales]).double())

    def rows_of(self, gates: Tensor) -> Tensor:
        """Spread values ``(G,)`` of gates over their rows, ``(R,)``."""
        return gates.double()[self.gate_of_row.clamp(min=0)].masked_fill(
            self.gate_of_row < 0, 0)

    @torch.no_grad()
    def add_gradients_(self,
                       beta: Tensor,
                       gamma: Tensor,
                       loss_scale: Tensor | None = None) -> None:
        """Add to the gradients of the norms, in place.

        Args:
            beta (Tensor): ``(R,)`` gradient of the offsets.
            gamma (Tensor): ``(R,)`` gradient of the scales.
            loss_scale (Tensor, optional): Factor of all other gradients.
        """
        for parameters, rows in zip(self.pairs(), (beta, gamma)):
            for one in parameters:
                if one.grad is None:
                    one.grad = torch.zeros_like(one)
            self._add_([one.grad for one in parameters],
                       rows if loss_scale is None else rows * loss_scale)

    @torch.no_grad()
    def move_(self, beta: Tensor, gamma: Tensor) -> None:
        """Add ``(R,)`` to offsets and scales of the norms, in place."""
        for parameters, rows in zip(self.pairs(), (beta, gamma)):
            self._add_([one.data for one in parameters], rows)

    def _add_(self, tensors: list[Any], rows: Tensor) -> None:
        """Add rows ``(R,)`` to one tensor for each norm, in place."""
        torch._foreach_add_(tensors, [
            part.to(one) for one, part in zip(tensors, rows.split(self._sizes))
        ])

    def log_active(self, beta: Tensor, gamma: Tensor) -> Tensor:
        """Logarithm ``(G,)`` of 1 - Phi, differentiable in both.

        Args:
            beta (Tensor): ``(R,)`` offsets.
            gamma (Tensor): ``(R,)`` scales.
        """
        mean, scale = self._summed(beta, gamma)
        found = torch.full_like(mean, -torch.inf)
        for kind, activation in enumerate(self.activations):
            found = torch.where(self.kinds == kind,
                                log_active(mean, scale, self.tau, activation),
                                found)
        return found.max(1).values

    def distance(self, beta: Tensor, gamma: Tensor) -> Tensor:
        """Measure how far the median gate is from Phi = 0.95, a scalar.

        Args:
            beta (Tensor): ``(R,)`` offsets.
            gamma (Tensor): ``(R,)`` scales.

        Returns:
            Tensor: In units of a new norm's distance, and at least 0.1.
        """
        mean, scale = self._summed(beta, gamma)
        upper = (mean + _QUANTILE * scale).masked_fill(self.kinds < 0,
                                                       -torch.inf).amax(1)
        median = upper.sort().values[len(upper) // 2]
        return ((median - self.tau) /
                (_QUANTILE - self.tau)).clamp(min=_LEAST_DISTANCE)

    def _summed(self, beta: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation ``(G, P)`` at each read point."""
        # The last row stands for no norm.
        padded = [nn.functional.pad(one, (0, 1)) for one in (beta, gamma)]
        terms = [one[self.rows] for one in padded]
        return terms[0].sum(-1), torch.linalg.vector_norm(terms[1], dim=-1)


def _rows_of(analysis: Analysis, norm: str, gates: Tensor) -> Tensor:
    """Channels ``(n, r)`` of a norm that belong to each of some gates."""
    slots = analysis.gate_of_slot[f'{norm}.weight', 0]
    order = slots.argsort(stable=True)
    mine = order[torch.isin(slots[order], gates)]
    return mine.reshape(len(gates), -1)
