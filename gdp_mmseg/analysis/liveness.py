"""Consequences of closed gates: which channels a pruned network keeps."""
from __future__ import annotations

import torch
from torch import Tensor

from .structure import Analysis, Group


def kept_channels(analysis: Analysis, openness: Tensor) -> Tensor:
    """Which gates' channels a pruned network has.

    Besides the open ones: the first of a group that is closed as a whole but
    cannot vanish as a whole. Without those, open or not, that only feed
    layers whose own outputs are all gone.

    Args:
        analysis (Analysis): What the analysis found.
        openness (Tensor): ``(G,)``.

    Returns:
        Tensor: ``(G,)`` bool.
    """
    keep = openness.detach().cpu() > 0
    for group in analysis.groups:
        if not group.can_be_empty and not keep[group.gates].any():
            keep[group.gates[0]] = True
    outputs = {layer.name: layer.outputs for layer in analysis.layers}

    def dead(group: Group) -> bool:
        return (group.can_be_empty and bool(keep[group.gates].any())
                and not any(
                    bool(kept_slots(outputs[name], keep).any())
                    for name in group.readers))

    while unread := [group for group in analysis.groups if dead(group)]:
        for group in unread:
            keep[group.gates] = False
    return keep


def constant_channels(analysis: Analysis, keep: Tensor) -> Tensor:
    """Gates of channels that hold a constant: all that writes them is dead.

    Args:
        analysis (Analysis): What the analysis found.
        keep (Tensor): ``(G,)`` bool, which gates' channels are there.

    Returns:
        Tensor: ``(G,)`` bool, a part of ``keep``.
    """
    inputs = {layer.name: layer.inputs for layer in analysis.layers}
    constant = torch.zeros_like(keep)
    for group in analysis.groups:
        if group.can_be_empty and not any(
                bool(kept_slots(inputs[name], keep).any())
                for name in group.writers):
            constant[group.gates] = keep[group.gates]
    return constant


def kept_slots(gates: Tensor, keep: Tensor) -> Tensor:
    """Mask of the slots that stay: no gate, or a kept one."""
    return keep[gates.clamp(min=0)] | (gates < 0)
