"""Multiplier of the price that holds a cost to a budget.

Letters: ``G`` gates, one for each class of channels (see ``analysis``).
"""
from __future__ import annotations

from typing import Callable

import torch
from torch import Tensor

from .base import CostFunction


def held_cost(cost: CostFunction,
              openness: Tensor,
              channel_weight: float,
              channels: Tensor | None = None) -> Tensor:
    """Cost that is held against the budget, a scalar.

    Args:
        cost (CostFunction): Share of the dense cost at an openness.
        openness (Tensor): ``(G,)``.
        channel_weight (float): Share in [0, 1] by which a gate that is not
            closed counts as a full channel; the rest counts as its openness.
        channels (Tensor, optional): ``(G,)`` number of channels that each
            gate counts for. Defaults to 1 for each gate that is not closed.
    """
    if channels is None:
        channels = openness.sign()
    return torch.lerp(cost(openness), cost(channels), channel_weight)


# Lower bound of a divisor: it only prevents 0 / 0.
LEAST_SCALE = 1e-20


def first_guess(square: Tensor, price: Tensor) -> Tensor:
    """Compose a multiplier of the expected order of magnitude, a scalar.

    Args:
        square (Tensor): ``(G,)`` mean square of the gains.
        price (Tensor): ``(G,)``.
    """
    return square.sqrt().sum() / price.sum().clamp(min=LEAST_SCALE)


# Multipliers that are tried: a thousandth of the scale, four times that, and
# so on, 16 of them. At the last one all gates move at full speed; more would
# change nothing.
_LEAST_FACTOR = 1e-3
_FACTORS = 16
# Ten halvings: to a thousandth of the bracket.
_HALVINGS = 10


def solve_multiplier(spent: Callable[[Tensor], Tensor],
                     budget: Tensor | float,
                     scale: Tensor,
                     signed: bool = False) -> Tensor:
    """Find the least multiplier at which ``spent`` is within ``budget``.

    The search has a fixed number of steps and reads no value, so that no host
    waits for a GPU.

    Args:
        spent (Callable[[Tensor], Tensor]): Cost, a scalar, after a step at a
            multiplier, a scalar; it falls as the multiplier rises.
        budget (Tensor | float): In the unit of ``spent``.
        scale (Tensor): Multiplier of the expected order of magnitude, a
            scalar.
        signed (bool): Whether it may be negative, so that the budget is used
            up. Defaults to False.

    Returns:
        Tensor: Scalar. Zero if the budget is met without a price, unless
        ``signed``. If no multiplier can meet it in one step, or use it up,
        one at which every gate moves as far as it can.
    """
    scale = scale.double()
    # Without any gain to compare with, every multiplier is as good.
    scale = torch.where(scale > 0, scale, 1.)

    def multiplier(power: Tensor) -> Tensor:
        size = scale * _LEAST_FACTOR * 4.**(power.abs() - 1)
        return power.sign() * size

    # Bisect the powers first, for the multipliers span many magnitudes.
    power = torch.full_like(scale, _FACTORS)
    below = torch.full_like(scale, -_FACTORS if signed else 0)
    for _ in range((_FACTORS * (1 + signed)).bit_length() - 1):
        middle = ((below + power) / 2).floor()
        meets = spent(multiplier(middle)) <= budget
        below = torch.where(meets, below, middle)
        power = torch.where(meets, middle, power)
    low, high = multiplier(power - 1), multiplier(power)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        meets = spent(middle) <= budget
        low = torch.where(meets, low, middle)
        high = torch.where(meets, middle, high)
    if signed:
        return high
    return torch.where(spent(torch.zeros_like(scale)) <= budget, 0., high)
