"""Blocks of gates that close together, so that widths are multiples.

Letters: ``G`` gates, ``S`` groups.
"""
from __future__ import annotations

import math

import torch
from torch import Tensor

from ..analysis.constants import WithConstants
from ..analysis.structure import Analysis, Layer


class Blocks(WithConstants):
    """Number of gates of each group that close together.

    Args:
        analysis (Analysis): The analysis of the model.
        multiple (int): Number of which the channels of each group are to be
            a multiple, on every channel axis of a layer that inference runs.

    Attributes:
        group_of (Tensor): ``(G,)`` index of each gate's group.
        sizes (Tensor): ``(S,)`` number of gates of a block.

    Raises:
        ValueError: If no group has enough gates for one block.

    Examples:
        A group of six channels keeps four of them or none.

        >>> from gdp_mmseg.analysis.analyse import analyse
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 1))
        >>> blocks = Blocks(analyse(net, (3, 5, 5), lambda net, x: net(x)), 4)
        >>> is_open = torch.tensor([True] * 6)
        >>> blocks.left(is_open, is_open).tolist()
        [4]
        >>> low = torch.tensor([False, True, True, True, True, True])
        >>> blocks.left(is_open, ~low).tolist()
        [4]
        >>> blocks.left(is_open, ~is_open).tolist()
        [0]
    """

    group_of: Tensor
    sizes: Tensor

    def __init__(self, analysis: Analysis, multiple: int) -> None:
        super().__init__()
        group_of, gates = analysis.group_of(), analysis.group_sizes()
        sizes = block_sizes(analysis, multiple)
        if not bool((sizes <= gates).any()):
            raise ValueError(
                f'gdp.multiple: expected at most {int(gates.max())}, the '
                'number of gates of the largest group, but got '
                f'{multiple}; lower gdp.multiple')
        self.add_constant('group_of', group_of)
        self.add_constant('sizes', sizes)

    def count(self, gates: Tensor) -> Tensor:
        """Number ``(S,)`` of gates of a mask ``(G,)`` in each group."""
        return torch.zeros_like(self.sizes).index_add(
            0, self.group_of, gates.to(self.sizes.dtype))

    def rounded_up(self, numbers: Tensor) -> Tensor:
        """Number ``(S,)`` of gates of the blocks that hold ``numbers``."""
        return (numbers + self.sizes - 1).div(
            self.sizes, rounding_mode='floor') * self.sizes

    def full(self, is_open: Tensor, protected: Tensor | None = None) -> Tensor:
        """Number ``(S,)`` of gates in the whole blocks of each group.

        A group with fewer gates than a block counts as a block.

        Args:
            is_open (Tensor): ``(G,)`` bool, gates that are not closed.
            protected (Tensor, optional): ``(G,)`` bool, gates that must not
                close, even where they are no whole blocks.
        """
        number = self.count(is_open)
        whole = number.div(self.sizes, rounding_mode='floor') * self.sizes
        whole = torch.where(number < self.sizes, number, whole)
        if protected is None:
            return whole
        return torch.maximum(whole, self.count(protected))

    def left(self,
             is_open: Tensor,
             stays: Tensor,
             protected: Tensor | None = None) -> Tensor:
        """Number ``(S,)`` of gates that are open once whole blocks closed.

        Args:
            is_open (Tensor): ``(G,)`` bool, gates that are not closed yet.
            stays (Tensor): ``(G,)`` bool, those of them that do not close.
            protected (Tensor, optional): See :meth:`full`.
        """
        return torch.minimum(
            self.rounded_up(self.count(stays)), self.full(is_open, protected))

    def channels(self,
                 is_open: Tensor,
                 stays: Tensor,
                 protected: Tensor | None = None) -> Tensor:
        """Number ``(G,)`` of channels that each gate counts for.

        The gates that stay share those that are held open with them, so that
        the sum of each group is that of :meth:`left`.

        Args:
            is_open (Tensor): See :meth:`left`.
            stays (Tensor): See :meth:`left`.
            protected (Tensor, optional): See :meth:`full`.
        """
        share = self.left(is_open, stays,
                          protected) / self.count(stays).clamp(min=1)
        return share[self.group_of] * stays


def block_sizes(analysis: Analysis, multiple: int) -> Tensor:
    """Least number ``(S,)`` of gates whose channels are a multiple.

    A gate stands for several channels of an axis in some groups, for example
    where a layer shuffles channels into pixels.

    Args:
        analysis (Analysis): The analysis of the model.
        multiple (int): See :class:`Blocks`.
    """
    group_of, gates = analysis.group_of(), analysis.group_sizes()
    sizes = [1] * len(gates)
    for layer in analysis.layers:
        for slots in _channel_axes(layer):
            slots = slots[slots >= 0]
            channels = group_of[slots].bincount(minlength=len(gates))
            for index in channels.nonzero().flatten().tolist():
                each = int(channels[index] // gates[index])
                sizes[index] = math.lcm(sizes[index],
                                        multiple // math.gcd(multiple, each))
    return torch.tensor(sizes)


def _channel_axes(layer: Layer) -> list[Tensor]:
    """Gates of the channel axes of a layer, none if only training runs it.

    The inputs of a kernel with groups are those of one group. All groups
    keep the same, and the layer that writes them has them all.
    """
    if not layer.in_inference:
        return []
    grouped = any(call.options and call.options[5] > 1 for call in layer.calls)
    return [layer.outputs] if grouped else [layer.inputs, layer.outputs]
