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


# The multipliers that are tried lie between a billionth of the scale, which a
# few large gains may make too large, and a million times it. At the latter
# all gates move at full speed; more would change nothing.
_LEAST_FACTOR = 1e-9
_MOST_FACTOR = 1e6


def solve_multiplier(spent: Callable[[Tensor], Tensor],
                     budget: Tensor | float,
                     scale: Tensor,
                     guess: Tensor | float = 0.,
                     signed: bool = False,
                     halvings: int = 15) -> Tensor:
    """Find the least multiplier at which ``spent`` is within ``budget``.

    The search has a fixed number of steps and reads no value, so that no host
    waits for a GPU. It is the more precise the better the guess. With 15
    halvings, a multiplier is found to within 0.3 %, wherever it is; with 10,
    so is one that differs from the guess by a tenth, and one that differs by
    magnitudes to within a tenth; with 7, these two are found to within 3 %
    and to within a half.

    Args:
        spent (Callable[[Tensor], Tensor]): Cost, a scalar, after a step at a
            multiplier, a scalar; it falls as the multiplier rises.
        budget (Tensor | float): In the unit of ``spent``.
        scale (Tensor): Multiplier of the expected order of magnitude, a
            scalar.
        guess (Tensor | float): Multiplier of the step before, a scalar; 0 if
            there is none.
        signed (bool): Whether it may be negative, so that the budget is used
            up. Defaults to False.
        halvings (int): Number of steps of the search. Defaults to 15.

    Returns:
        Tensor: Scalar. Zero if the budget is met without a price, unless
        ``signed``. If no multiplier can meet it in one step, or use it up,
        one at which every gate moves as far as it can.
    """
    scale = scale.double()
    # Without any gain to compare with, every multiplier is as good.
    scale = torch.where(scale > 0, scale, 1.)
    least, most = scale * _LEAST_FACTOR, scale * _MOST_FACTOR
    guess = torch.as_tensor(guess).to(scale).abs()
    centre = torch.where(guess > 0, guess, scale).clamp(least, most)
    sizes = _sizes(least, centre, most, 2**halvings)
    if signed:
        is_free = spent(torch.zeros_like(scale)) <= budget
        sizes = sizes * (1 - 2. * is_free)
    else:
        is_free = torch.zeros_like(scale, dtype=torch.bool)
        # The least that is tried is no price at all.
        sizes[1] = 0
    # Index of the least size that is known to be beyond the limit.
    beyond = torch.full_like(is_free, 2**halvings, dtype=torch.long)
    for halving in reversed(range(halvings)):
        is_beyond = (spent(sizes.take(beyond - 2**halving))
                     <= budget) != is_free
        beyond = beyond.add(is_beyond, alpha=-2**halving)
    if not signed:
        return sizes.take(beyond)
    # The last that was free: none of them if all are beyond.
    free = sizes.index_fill(0, beyond.new_zeros(1), 0).take(beyond - 1)
    return torch.where(is_free, free, sizes.take(beyond))


def _sizes(least: Tensor, centre: Tensor, most: Tensor, number: int) -> Tensor:
    """Sizes from least to most, dense around the centre in magnitude."""
    places = torch.linspace(
        -1, 1, number + 1, dtype=centre.dtype, device=centre.device)
    way = torch.where(places < 0, centre / least, most / centre).log()
    return centre * (places**3 * way).exp()
