"""Consequences of closed gates: which channels a pruned network keeps."""
from __future__ import annotations

import torch
from torch import Tensor

from .structure import Analysis, Group


def kept_channels(analysis: Analysis,
                  openness: Tensor,
                  present: Tensor | None = None) -> Tensor:
    """Return the gates whose channels a pruned network keeps.

    A channel is kept if its gate is open, with two exceptions. A group that
    is closed completely but must not be empty keeps its first channel. A
    group that only feeds layers without any output is removed, open or not.

    Args:
        analysis (Analysis): The analysis of the model.
        openness (Tensor): ``(G,)`` openness of the gates.
        present (Tensor, optional): ``(G,)`` bool on the CPU, gates whose
            channels the network still has; a group that must not be empty
            keeps the first of these. Defaults to all gates.

    Returns:
        Tensor: ``(G,)`` bool, True for gates whose channels are kept.
    """
    keep = openness.detach().cpu() > 0
    for group in analysis.groups:
        if not group.can_be_empty and not keep[group.gates].any():
            gates = group.gates
            if present is not None:
                gates = gates[present[gates]]
            keep[gates[0]] = True
    outputs = {layer.name: layer.outputs for layer in analysis.layers}

    def dead(group: Group) -> bool:
        return (group.can_be_empty and bool(keep[group.gates].any())
                and not any(
                    bool(kept_slots(outputs[name], keep).any())
                    for name in group.readers))

    # To remove one group can leave another one without readers, so this goes
    # on until nothing changes.
    while unread := [group for group in analysis.groups if dead(group)]:
        for group in unread:
            keep[group.gates] = False
    return keep


def constant_channels(analysis: Analysis, keep: Tensor) -> Tensor:
    """Return the kept gates whose channels hold a constant.

    That is so where no layer that writes the channels reads any.

    Args:
        analysis (Analysis): The analysis of the model.
        keep (Tensor): ``(G,)`` bool, gates whose channels are kept.

    Returns:
        Tensor: ``(G,)`` bool, a subset of ``keep``.
    """
    inputs = {layer.name: layer.inputs for layer in analysis.layers}
    constant = torch.zeros_like(keep)
    for group in analysis.groups:
        if group.can_be_empty and not any(
                bool(kept_slots(inputs[name], keep).any())
                for name in group.writers):
            constant[group.gates] = keep[group.gates]
    return constant


def live_channels(analysis: Analysis, openness: Tensor) -> Tensor:
    """Return the gates whose channels depend on the input and are read.

    Args:
        analysis (Analysis): The analysis of the model.
        openness (Tensor): ``(G,)`` openness of the gates.

    Returns:
        Tensor: ``(G,)`` bool on the CPU, a subset of :func:`kept_channels`.
    """
    keep = openness.detach().cpu() > 0
    while True:
        left = kept_channels(analysis, keep)
        left &= ~constant_channels(analysis, left)
        # Closing one group may leave the next without readers or writers.
        if torch.equal(left, keep):
            return left
        keep = left


def filled_up(analysis: Analysis, keep: Tensor, present: Tensor,
              sizes: Tensor) -> Tensor:
    """Add channels to those that are kept, so that groups have whole blocks.

    A group of which nothing is kept gets none.

    Args:
        analysis (Analysis): The analysis of the model.
        keep (Tensor): ``(G,)`` bool, gates whose channels are kept.
        present (Tensor): ``(G,)`` bool, gates whose channels can be added.
        sizes (Tensor): ``(S,)`` number of gates of a block of each group.

    Returns:
        Tensor: ``(G,)`` bool. Where too few can be added, all are.

    Examples:
        >>> from gdp_mmseg.analysis.analyse import analyse
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 1))
        >>> analysis = analyse(net, (3, 5, 5), lambda net, x: net(x))
        >>> keep = torch.tensor([True, False, False, True, True, False])
        >>> present = torch.tensor([True, False, True, True, True, True])
        >>> sizes = torch.tensor([4])
        >>> filled_up(analysis, keep, present, sizes).long().tolist()
        [1, 0, 1, 1, 1, 0]
        >>> filled_up(analysis, keep, present, 2 * sizes).long().tolist()
        [1, 0, 1, 1, 1, 1]
        >>> filled_up(analysis, keep & False, present, sizes).any()
        tensor(False)
    """
    filled = keep.clone()
    for group, size in zip(analysis.groups, sizes.tolist()):
        kept = keep[group.gates]
        others = group.gates[present[group.gates] & ~kept]
        filled[others[:-int(kept.sum()) % size]] = True
    return filled


def kept_slots(gates: Tensor, keep: Tensor) -> Tensor:
    """Mask of the slots that are kept: those of no gate or a kept gate."""
    return keep[gates.clamp(min=0)] | (gates < 0)
