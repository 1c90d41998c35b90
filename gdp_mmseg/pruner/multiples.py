"""Limits of what closes, where gates close one by one or in blocks.

Letters: ``G`` gates, ``S`` groups.
"""
from __future__ import annotations

import math

import torch
from torch import Tensor

from ..analysis.liveness import live_channels
from ..analysis.structure import Analysis
from ..cost.counts import Cost
from ..gates.blocks import Blocks


def min_kept(cost: Cost, analysis: Analysis, ratio: float,
             blocks: Blocks | None, least: float) -> Tensor:
    """Least number ``(S,)`` of open gates of each group, in whole blocks.

    In blocks, groups close early as a whole. Those do not that would take the
    cost too low with all that dies with them: in a plain chain of layers, the
    whole network.

    Args:
        cost (Cost): Cost that is known already.
        analysis (Analysis): The analysis of the model.
        ratio (float): Least share of the gates of each group.
        blocks (Blocks, optional): Gates that close together.
        least (float): Cost below which no single group may take it.
    """
    sizes = analysis.group_sizes()
    numbers = torch.tensor(
        [math.ceil(ratio * size) for size in sizes.tolist()])
    if blocks is None:
        return numbers
    # A group that cannot be empty would keep a single channel otherwise.
    needed = torch.tensor([
        not group.can_be_empty or _without(cost, analysis, group.gates) < least
        for group in analysis.groups
    ])
    numbers = torch.maximum(numbers, needed.to(numbers))
    return torch.minimum(blocks.rounded_up(numbers), sizes)


def _without(cost: Cost, analysis: Analysis, gates: Tensor) -> float:
    """Cost where only some gates close, and what dies with them."""
    is_open = torch.ones(analysis.num_gates)
    is_open[gates] = 0
    live = live_channels(analysis, is_open)
    return float(cost(live.to(cost.shares)))


def too_large(cost: Cost, blocks: Blocks, is_open: Tensor,
              least: float) -> Tensor:
    """Mask ``(G,)`` of the gates whose block would take the cost too low.

    A block of a large layer may cost several points. Near the target, only
    smaller ones close, so that the target is met.

    Args:
        cost (Cost): Cost that the target is about.
        blocks (Blocks): Gates that close together.
        is_open (Tensor): ``(G,)`` bool, gates that are not closed.
        least (float): Cost below which no block may take it, but for the
            smallest one, without which the target might never be met.
    """
    channels = is_open.to(cost.shares)
    price = cost.price(channels) * blocks.sizes[blocks.group_of]
    smallest = price.masked_fill(~is_open, torch.inf).min()
    return is_open & (price > torch.maximum(cost(channels) - least, smallest))
