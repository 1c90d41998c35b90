"""Summary of what was kept of a network, part by part."""
from __future__ import annotations

import dataclasses
import re
from typing import Sequence

from torch import Tensor

from ..analysis.structure import Analysis, Group, Layer
from ..gates.layers import slot_values

# A numbered stage of a backbone; elsewhere, the first two levels of a name.
_PART = re.compile(r'[^.]+\.(?:layers|stages|blocks)\.\d+|[^.]+\.[^.]+')


@dataclasses.dataclass(frozen=True)
class Part:
    """Channels of the groups that the same part of a network writes.

    Args:
        name (str): Name of the part, e.g. ``backbone.layer1``.
        channels (int): Number of channels of its groups.
        kept (int): Number of those that were kept.
    """
    name: str
    channels: int
    kept: int


def part_of(module: str) -> str:
    """Name of the top-level part that a module belongs to.

    Examples:
        >>> part_of('backbone.layer3.5.conv2'), part_of('head')
        ('backbone.layer3', 'head')
        >>> part_of('backbone.stages.2.blocks.0.ffn.layers.1')
        'backbone.stages.2'
        >>> part_of('decode_head.aspp_modules.1.depthwise_conv.conv')
        'decode_head.aspp_modules'
    """
    found = _PART.match(module)
    return found.group() if found else module


def parts_of(groups: Sequence[Group]) -> list[str]:
    """Name of the part ``(S,)`` whose modules write each group first."""
    return [part_of(group.writers[0]) for group in groups]


def kept_by_part(groups: Sequence[Group], keep: Tensor) -> list[Part]:
    """Count the channels that were kept, by part, in network order.

    Args:
        groups (Sequence[Group]): Groups of the network.
        keep (Tensor): ``(G,)`` bool, the gates whose channels were kept.
    """
    numbers: dict[str, tuple[int, int]] = {}
    for group in groups:
        name = part_of(group.writers[0])
        channels, kept = numbers.get(name, (0, 0))
        numbers[name] = (channels + len(group.gates),
                         kept + int(keep[group.gates].sum()))
    return [Part(name, *both) for name, both in numbers.items()]


def dead_parts(analysis: Analysis, keep: Tensor) -> list[str]:
    """Name the largest parts all of whose layers read or write no channel.

    Dead layers of a part whose other layers live are named together, e.g. the
    convolutions of a residual block with a downsample.

    Args:
        analysis (Analysis): Analysis of the network.
        keep (Tensor): ``(G,)`` bool, the gates whose channels were kept.

    Returns:
        list[str]: In the order of the network, e.g. ``backbone.layer2.1`` and
        ``backbone.layer3.0: conv1, conv2``.
    """

    def dead(layer: Layer) -> bool:
        return not all(
            bool(slot_values(keep.float(), slots).any())
            for slots in (layer.inputs, layer.outputs))

    layers = [layer for layer in analysis.layers if layer.in_inference]
    gone = {layer.name: dead(layer) for layer in layers if layer.kernel}

    def whole(name: str) -> str:
        """Name of the largest dead part around a dead layer."""
        parent = name.rpartition('.')[0]
        below = [gone[one] for one in gone if one.startswith(f'{parent}.')]
        return whole(parent) if parent and all(below) else name

    parts: dict[str, None] = {}
    for name, is_gone in gone.items():
        if is_gone:
            parts[whole(name)] = None
    inside: dict[str, list[str]] = {}
    for part in parts:
        parent, _, leaf = part.rpartition('.')
        # A single layer is listed under its parent, a larger part by name.
        key, rest = (parent, [leaf]) if part in gone else (part, [])
        inside.setdefault(key, []).extend(rest)
    return [
        f'{part}: {", ".join(names)}' if names else part
        for part, names in inside.items()
    ]
