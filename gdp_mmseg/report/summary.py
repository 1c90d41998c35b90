"""What is left of a network, part by part."""
from __future__ import annotations

import dataclasses
import re
from typing import Sequence

from torch import Tensor

from ..analysis.structure import Analysis, Group, Layer
from ..gates.layers import slot_values

# Numbered stages of a backbone; else a stage is a part of a part.
_PART = re.compile(r'[^.]+\.(?:layers|stages|blocks)\.\d+|[^.]+\.[^.]+')


@dataclasses.dataclass(frozen=True)
class Part:
    """Groups that are written in the same top-level part.

    Args:
        name (str): Of the part, e.g. ``backbone.layer1``.
        channels (int): Of its groups.
        kept (int): Of these.
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


def kept_by_part(groups: Sequence[Group], keep: Tensor) -> list[Part]:
    """Channels that stay, by stage, in the order of the network.

    Args:
        groups (Sequence[Group]): Of the network.
        keep (Tensor): ``(G,)`` bool, which gates' channels stay.
    """
    numbers: dict[str, tuple[int, int]] = {}
    for group in groups:
        name = part_of(group.writers[0])
        channels, kept = numbers.get(name, (0, 0))
        numbers[name] = (channels + len(group.gates),
                         kept + int(keep[group.gates].sum()))
    return [Part(name, *both) for name, both in numbers.items()]


def dead_parts(analysis: Analysis, keep: Tensor) -> list[str]:
    """The largest parts of which every layer reads, or writes, no channel.

    Layers of a part of which others live, as the convolutions of a residual
    block with a downsample, are named together.

    Args:
        analysis (Analysis): What the analysis found.
        keep (Tensor): ``(G,)`` bool, which gates' channels stay.

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
        """The largest part around a dead layer that is dead."""
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
        # Of a part that is no layer, its own name says what died.
        key, rest = (parent, [leaf]) if part in gone else (part, [])
        inside.setdefault(key, []).extend(rest)
    return [
        f'{part}: {", ".join(names)}' if names else part
        for part, names in inside.items()
    ]
