"""Choice of the gates that stay open, within a budget.

Letters: ``G`` gates.
"""
from __future__ import annotations

import bisect
from typing import Callable

import torch
from torch import Tensor

from .base import CostFunction

# Cost that a choice may leave unused: a point.
_SLACK = 0.01


def trimmed(stays: Tensor, held: Tensor, ranks: Tensor,
            whole: Callable[[Tensor], Tensor], cost: CostFunction,
            budget: Tensor | float) -> Tensor:
    """Close or open gates so that the cost is a budget, within one point.

    A choice that is so already stays as it is. Otherwise the gates of highest
    rank stay open, as many as the budget allows. Where the next one is too
    dear for the rest of the budget, cheaper ones of lower rank take its place,
    until less than a point is left.

    Args:
        stays (Tensor): ``(G,)`` bool, the choice.
        held (Tensor): ``(G,)`` bool, gates that stay open in any case.
        ranks (Tensor): ``(G,)``, -inf for gates that are closed for good.
        whole (Callable[[Tensor], Tensor]): Round a choice to whole blocks. It
            grows with the choice.
        cost (CostFunction): Cost and its price.
        budget (Tensor | float): Upper bound of the cost.

    Returns:
        Tensor: ``(G,)`` bool, the choice before it is rounded to blocks.

    Examples:
        Three channels of prices 0.5, 0.3 and 0.2, and a budget of 0.75: the
        second one does not fit beside the first.

        >>> class Sum:
        ...     def __call__(self, b): return self.price(b) @ b
        ...     def price(self, b): return torch.tensor([0.5, 0.3, 0.2])
        >>> chosen = trimmed(torch.tensor([True, True, False]),
        ...                  torch.zeros(3, dtype=torch.bool),
        ...                  torch.tensor([3., 2., 1.]), lambda b: b, Sum(),
        ...                  0.75)
        >>> chosen.tolist()
        [True, False, True]
    """
    limit = float(budget)

    def spent(chosen: Tensor) -> float:
        return float(cost(whole(chosen).to(ranks)))

    if limit - _SLACK <= spent(stays) <= limit:
        return stays
    chosen = held.clone()
    order = ranks.argsort(descending=True, stable=True)
    rest = order[(ranks[order] > -torch.inf) & ~held[order]]
    while len(rest) and spent(chosen) < limit - _SLACK:
        fitting = _most_that_fit(chosen, rest, spent, limit)
        chosen = _with(chosen, rest[:fitting])
        # What costs as much as the first that does not fit does not either.
        price = cost.price(whole(chosen).to(ranks))
        rest = rest[fitting:]
        rest = rest[price[rest] < price[rest[:1]]]
    return chosen


def _most_that_fit(chosen: Tensor, rest: Tensor,
                   spent: Callable[[Tensor], float], limit: float) -> int:
    """Number of the first gates of ``rest`` that the budget allows."""
    return bisect.bisect_right(
        range(1,
              len(rest) + 1),
        limit,
        key=lambda number: spent(_with(chosen, rest[:number])))


def _with(chosen: Tensor, gates: Tensor) -> Tensor:
    """Choice with some more gates."""
    more = chosen.clone()
    more[gates] = True
    return more
