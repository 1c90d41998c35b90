"""Consequences of closed gates: which channels a pruned network keeps."""
from __future__ import annotations

import torch
from torch import Tensor

from .structure import Group, Groups


def kept_channels(groups: Groups, openness: Tensor) -> Tensor:
    """Which gates' channels a pruned network has.

    Besides the open ones: the first of a group that is closed as a whole but
    cannot vanish as a whole. Without those, open or not, that only feed
    layers whose own outputs are all gone.

    Args:
        groups (Groups): What the analysis found.
        openness (Tensor): ``(G,)``.

    Returns:
        Tensor: ``(G,)`` bool.
    """
    keep = openness.detach().cpu() > 0
    for group in groups.groups:
        if not group.vanishes and not keep[group.gates].any():
            keep[group.gates[0]] = True
    outputs = {layer.name: layer.outputs for layer in groups.layers}

    def dead(group: Group) -> bool:
        return (group.vanishes and bool(keep[group.gates].any()) and not any(
            bool(kept_slots(outputs[name], keep).any())
            for name in group.readers))

    while unread := [group for group in groups.groups if dead(group)]:
        for group in unread:
            keep[group.gates] = False
    return keep


def constant_channels(groups: Groups, keep: Tensor) -> Tensor:
    """Gates of channels that hold a constant: all that writes them is dead.

    Args:
        groups (Groups): What the analysis found.
        keep (Tensor): ``(G,)`` bool, which gates' channels are there.

    Returns:
        Tensor: ``(G,)`` bool, a part of ``keep``.
    """
    inputs = {layer.name: layer.inputs for layer in groups.layers}
    constant = torch.zeros_like(keep)
    for group in groups.groups:
        if group.vanishes and not any(
                bool(kept_slots(inputs[name], keep).any())
                for name in group.writers):
            constant[group.gates] = keep[group.gates]
    return constant


def kept_slots(gates: Tensor, keep: Tensor) -> Tensor:
    """Mask of the slots that stay: no gate, or a kept one."""
    return keep[gates.clamp(min=0)] | (gates < 0)
