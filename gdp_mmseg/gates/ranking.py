"""Gates that are cut in the order of their worth, and what is left then.

Letters: ``G`` gates.
"""
from __future__ import annotations

import torch
from torch import Tensor

from .base import CostFunction, GateMethod
from .blocks import Blocks
from .trimming import trimmed


class Ranking:
    """Cost of a model whose gates are cut in the order of their worth.

    Args:
        gates (GateMethod): ``G`` gates.
        cost (CostFunction): Cost and its price.
        protected (Tensor, optional): ``(G,)`` bool, gates that are kept.
        blocks (Blocks, optional): Gates that close together.

    Attributes:
        worth (Tensor): ``(G,)`` worth of the gates, infinite for protected
            ones.
        order (Tensor): ``(G,)`` gates, the least worth first; of equal ones
            the dearest.
    """

    def __init__(self, gates: GateMethod, cost: CostFunction,
                 protected: Tensor | None, blocks: Blocks | None) -> None:
        self.gates, self.cost, self.blocks = gates, cost, blocks
        self.protected = protected
        self.open: Tensor = ~gates.is_closed()
        price = cost.price(self.open.float())
        first = price.argsort(descending=True, stable=True)
        worth = gates.worth().masked_fill(~self.open, -torch.inf)
        if protected is not None:
            worth = worth.masked_fill(protected, torch.inf)
        self.worth = worth
        self.order = first[worth[first].argsort(stable=True)]
        self.place = torch.empty_like(self.order)
        self.place[self.order] = torch.arange(len(worth), device=worth.device)

    def _stays(self, cut: Tensor) -> Tensor:
        stays = self.open & (self.place >= cut)
        return stays if self.protected is None else (
            stays | (self.open & self.protected))

    def channels(self, cut: Tensor) -> Tensor:
        """Channels ``(G,)`` for the cost if the first ``cut`` gates go."""
        stays = self._stays(cut)
        if self.blocks is None:
            return stays.double()
        return self.blocks.channels(self.open, stays, self.protected).double()

    def kept(self, cut: Tensor) -> Tensor:
        """Mask ``(G,)`` of the gates that are kept then, in whole blocks."""
        return self._whole(self._stays(cut))

    def trimmed(self, cut: Tensor, budget: Tensor | float) -> Tensor:
        """Mask ``(G,)`` of the gates that are kept, and use up a budget.

        Where the next gate is too dear, cheaper ones of less worth take its
        place. It reads values from the device.
        """
        held = torch.zeros_like(self.open)
        if self.protected is not None:
            held = self.open & self.protected
        return self._whole(
            trimmed(
                self._stays(cut), held, self.worth, self._whole, self.cost,
                budget))

    def _whole(self, stays: Tensor) -> Tensor:
        """Round a choice of gates ``(G,)`` to whole blocks."""
        if self.blocks is None:
            return stays
        return self.gates.strongest(
            self.blocks.group_of,
            self.blocks.left(self.open, stays, self.protected), self.worth)

    def least_cut(self, budget: Tensor | float) -> Tensor:
        """Find the least number of cut gates that is within a budget.

        The search has a fixed number of steps and reads no value.
        """
        low = torch.full_like(self.order[0], -1)
        high = low + 1 + len(self.order)
        for _ in range(len(self.order).bit_length() + 1):
            middle = (low + high).div(2, rounding_mode='floor').clamp(min=0)
            meets = self.cost(self.channels(middle)) <= budget
            high = torch.where(meets, middle, high)
            low = torch.where(meets, low, middle)
        return high


def midway(values: Tensor, cut: Tensor) -> Tensor:
    """Mean, a scalar, of the last of the first ``cut`` values and the next."""
    ends = torch.stack([cut - 1, cut]).clamp(0, len(values) - 1)
    return values[ends].mean()
