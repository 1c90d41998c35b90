"""State of the gates of a model in numbers, read from their device at once."""
from __future__ import annotations

import dataclasses
from typing import Mapping

import torch
from torch import Tensor

from ..cost.counts import Cost
from ..gates.multiplier import held_cost

# Openness of a gate that counts as half open in :class:`Figures`.
HALF_OPEN = (0.01, 0.5)


@dataclasses.dataclass(frozen=True)
class Figures:
    """State of the gates of a model, in numbers.

    Args:
        flops (float): Share of the dense FLOPs in channels that are not
            closed.
        flops_by_openness (float): The same, each channel counted by its
            openness.
        cost (float): Share of the target's resource in channels that are not
            closed.
        budget (float): Share of the resource that is allowed.
        held_cost (float): Cost that is held against the budget.
        undecided (float): Share of the gates whose openness is between the
            limits of ``HALF_OPEN``.
        multiplier (float): Price multiplier of the last step.
        openness (tuple[float, ...]): ``(S,)`` mean openness of each group.
        moved (bool): False if the gates did not move in the step before,
            because their gradient was not finite.
    """
    flops: float
    flops_by_openness: float
    cost: float
    budget: float
    held_cost: float
    undecided: float
    multiplier: float
    openness: tuple[float, ...]
    moved: bool = True

    @classmethod
    def of(cls, state: Mapping[str, list[float]], budget: float) -> Figures:
        """Compose the figures of a state that was read."""
        return cls(
            openness=tuple(state['openness']),
            budget=budget,
            moved=bool(state.get('moved', [True])[0]),
            **{
                name: state[name][0]
                for name in ('flops', 'flops_by_openness', 'cost', 'held_cost',
                             'undecided', 'multiplier')
            })


def state_of(openness: Tensor, flops: Cost, cost: Cost,
             channel_weight: float) -> dict[str, Tensor]:
    """Compute what :class:`Figures` tells of an openness, on its device.

    Args:
        openness (Tensor): ``(G,)``.
        flops (Cost): Share of the dense FLOPs.
        cost (Cost): Share of the target's resource.
        channel_weight (float): See
            :func:`gdp_mmseg.gates.multiplier.held_cost`.
    """
    channels = openness.sign()
    low, high = HALF_OPEN
    whole, soft = flops(channels), flops(openness)
    state = dict(
        flops=whole,
        flops_by_openness=soft,
        cost=whole,
        held_cost=torch.lerp(soft, whole, channel_weight),
        undecided=((openness > low) & (openness < high)).float().mean(),
        openness=cost.group_sums(openness) / cost.sizes)
    if cost is not flops:
        state |= dict(
            cost=cost(channels),
            held_cost=held_cost(cost, openness, channel_weight))
    return state


def read(state: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """Copy small tensors to the host in one transfer."""
    flat = torch.cat([tensor.reshape(-1).float() for tensor in state.values()])
    values = iter(flat.tolist())
    return {
        name: [next(values) for _ in range(tensor.numel())]
        for name, tensor in state.items()
    }
