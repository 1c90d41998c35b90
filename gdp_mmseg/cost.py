"""Multiply-adds of a gated network, as a function of its gates' openness.

One fused multiply-add is one FLOP, at the input size that was analysed, for
one image. Only convolutions and linear layers count (nothing else of a
segmentation network has a cost in channels squared), and only those that
inference runs.

Letters: ``G`` gates, ``S`` groups, ``K`` counted layers.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn

from .groups import Groups


class Cost(nn.Module):
    """Share of the dense multiply-adds, given the openness of all gates.

    Source: GDP (ICCV 2021), section 3: a layer costs k^2 H W s_in s_out, a
    depthwise one k^2 H W s, where s sums the openness of the channels.

    Args:
        groups (Groups): What the analysis found.

    Attributes:
        dense (int): Multiply-adds with all gates open.

    Examples:
        Two 1x1 convolutions, 3 -> 2 -> 4 channels, on 5 x 5 pixels.

        >>> from .groups import analyse
        >>> net = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Conv2d(2, 4, 1))
        >>> cost = Cost(analyse(net, (3, 5, 5), lambda net, x: net(x)))
        >>> cost.dense == 25 * (3 * 2 + 2 * 4)
        True
        >>> cost(torch.tensor([1., 0.])).item(), cost.macs(torch.ones(2))
        (0.5, 350)
        >>> cost.price(torch.ones(2)).tolist()  # (3 + 4) / 14 each
        [0.5, 0.5]
    """

    group_of: Tensor
    inputs: Tensor
    fixed_inputs: Tensor
    outputs: Tensor
    fixed_outputs: Tensor
    positions: Tensor
    shares: Tensor

    def __init__(self, groups: Groups) -> None:
        super().__init__()
        group_of = torch.zeros(groups.number, dtype=torch.long)
        for index, group in enumerate(groups.groups):
            group_of[group.gates] = index
        layers = [layer for layer in groups.layers if layer.counted]
        sides: dict[str, Tensor] = {}
        for side in ('inputs', 'outputs'):
            slots = torch.zeros(len(layers), len(groups.groups))
            fixed = torch.zeros(len(layers))
            for row, layer in enumerate(layers):
                gates = getattr(layer, side)
                if side == 'inputs' and layer.blocks:
                    fixed[row] = 1
                    continue
                fixed[row] = (gates < 0).sum()
                slots[row].index_add_(0, group_of[gates[gates >= 0]],
                                      torch.ones(int((gates >= 0).sum())))
            sides[side], sides[f'fixed_{side}'] = slots, fixed
        # Members of a group lie on the same axes equally often.
        sizes = torch.tensor([len(group.gates) for group in groups.groups])
        for side in ('inputs', 'outputs'):
            sides[side] /= sizes
        positions = torch.tensor([layer.positions for layer in layers],
                                 dtype=torch.double)
        for name, tensor in dict(
                group_of=group_of, positions=positions, **sides).items():
            self.register_buffer(name, tensor, persistent=False)
        self.dense = self.macs(torch.ones(groups.number))
        self.register_buffer(
            'shares', (positions / self.dense).float(), persistent=False)

    def _sums(self, openness: Tensor) -> tuple[Tensor, Tensor]:
        """Open input and output channels of each layer, ``(K,)`` twice."""
        sums = openness.new_zeros(self.inputs.shape[1]).index_add(
            0, self.group_of, openness)
        return (self.inputs.to(sums) @ sums + self.fixed_inputs.to(sums),
                self.outputs.to(sums) @ sums + self.fixed_outputs.to(sums))

    def forward(self, openness: Tensor) -> Tensor:
        """Share of the dense cost, a scalar; differentiable.

        Args:
            openness (Tensor): ``(G,)`` in [0, 1].
        """
        inputs, outputs = self._sums(openness)
        return (self.shares * inputs * outputs).sum()

    def price(self, openness: Tensor) -> Tensor:
        """Derivative ``(G,)`` of :meth:`forward`, in closed form."""
        inputs, outputs = self._sums(openness)
        groups = (
            self.inputs.T @ (self.shares * outputs) +
            self.outputs.T @ (self.shares * inputs))
        return groups[self.group_of]

    def macs(self, openness: Tensor) -> int:
        """Multiply-adds per image, exact where openness is 0 or 1."""
        inputs, outputs = self._sums(openness.double())
        return round(float((self.positions * inputs * outputs).sum()))

    def group_macs(self) -> Tensor:
        """Share ``(S,)`` of the dense cost that goes with each group.

        The multiply-adds that would be gone if this group alone were closed.
        Two neighbours share a layer, so the shares add up to more than 1.
        """
        shares = []
        for index in range(self.inputs.shape[1]):
            openness = (self.group_of != index).float()
            shares.append(1 - self(openness))
        return torch.stack(shares)
