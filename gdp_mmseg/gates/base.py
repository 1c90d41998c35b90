"""Interface of the gate methods, and the multiplier that holds a budget."""
from __future__ import annotations

from typing import Callable, Protocol

from torch import Tensor


class CostFunction(Protocol):
    """What the gate step must know of the cost (see ``cost.py``)."""

    def __call__(self, openness: Tensor) -> Tensor:
        """Share of the dense cost at openness ``(G,)``, a scalar."""

    def price(self, openness: Tensor) -> Tensor:
        """Derivative ``(G,)`` of the cost at openness ``(G,)``."""


def held_cost(cost: CostFunction, openness: Tensor,
              channel_weight: float) -> Tensor:
    """What is held against the budget, a scalar.

    Args:
        cost (CostFunction): Of an openness.
        openness (Tensor): ``(G,)``.
        whole (float): Share of a gate that counts as a whole channel; the
            rest counts as its openness.
    """
    channels = (openness > 0).to(openness)
    return (1 -
            channel_weight) * cost(openness) + channel_weight * cost(channels)


def solve_multiplier(spent: Callable[[float], float], budget: float,
                     scale: float) -> float:
    """Least multiplier at which ``spent`` is within ``budget``.

    Args:
        spent (Callable[[float], float]): Cost after a step at a multiplier;
            falling in it.
        budget (float): In the unit of ``spent``.
        scale (float): A multiplier of the order that is looked for.

    Returns:
        float: Zero if the budget holds of itself. If no multiplier can hold
        it in one step, the one at which every gate goes as far as it can.
    """
    if spent(0.) <= budget:
        return 0.
    # Without any gain to compare with, every multiplier is as good.
    scale = scale or 1.
    low, high = 0., scale * 1e-3
    while spent(high) > budget:
        low, high = high, high * 4
        if high > scale * 1e4:
            return high
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) > budget else (low, middle)
    return high
