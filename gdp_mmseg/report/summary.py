"""Summary of what was kept of a network, part by part."""
from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from typing import Iterable, Iterator, Mapping, Sequence

from torch import Tensor

from ..analysis.liveness import kept_slots
from ..analysis.structure import Analysis, Group, Layer

# Most parts that the numbered modules of one container become.
_MOST = 12
# Most layers that a note names.
_MOST_SHOWN = 5
# Share of all channels from which on a part is divided further.
_LARGE = 1 / 3

Path = tuple[str, ...]


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


@dataclasses.dataclass(frozen=True)
class GroupRow:
    """A group of channels and how many of them were kept.

    Args:
        writers (list[str]): Modules that write the channels.
        readers (list[str]): Modules that read them through a gate.
        channels (int): Number of channels of the group.
        kept (int): Number of those that were kept.
    """
    writers: list[str]
    readers: list[str]
    channels: int
    kept: int


def kept_share(row: Part | GroupRow) -> float:
    """Share of the channels of a part or group that were kept, in [0, 1]."""
    return row.kept / row.channels


def kept_by_group(groups: Sequence[Group], keep: Tensor) -> list[GroupRow]:
    """Count the channels that were kept, by group.

    Args:
        groups (Sequence[Group]): Groups of the network.
        keep (Tensor): ``(G,)`` bool, the gates whose channels were kept.
    """
    return [
        GroupRow(
            list(group.writers), list(group.readers), len(group.gates),
            int(keep[group.gates].sum())) for group in groups
    ]


def kept_by_part(groups: Sequence[Group], keep: Tensor) -> list[Part]:
    """Count the channels that were kept, by part, in network order.

    Args:
        groups (Sequence[Group]): Groups of the network.
        keep (Tensor): ``(G,)`` bool, the gates whose channels were kept.
    """
    numbers: dict[str, tuple[int, int]] = {}
    for name, row in zip(parts_of(groups), kept_by_group(groups, keep)):
        channels, kept = numbers.get(name, (0, 0))
        numbers[name] = (channels + row.channels, kept + row.kept)
    return [Part(name, *both) for name, both in numbers.items()]


def parts_of(groups: Sequence[Group]) -> list[str]:
    """Name of the part ``(S,)`` whose modules write each group first.

    A part is a module of the second level, e.g. ``decode_head.bottleneck``.
    Modules around a single other one do not count as a level, and a module
    with a large share of all channels is divided further, until it consists
    of numbered modules such as ``layer1`` or ``stages.0``. So the stages of a
    backbone are parts, however deep they are wrapped. Where there are many
    numbered modules, a part is a range of them, e.g. ``blocks.0-1``.

    Args:
        groups (Sequence[Group]): Groups of the network.
    """
    sizes: Counter[Path] = Counter()
    for group in groups:
        sizes[_path(group)] += len(group.gates)
    names = {
        writer: name
        for name, writers in _divided((), [*sizes], sizes, 0)
        for writer in writers
    }
    return [names[_path(group)] for group in groups]


def _path(group: Group) -> Path:
    """Name of the first writer of a group, component by component."""
    return tuple(group.writers[0].split('.'))


def _divided(path: Path, writers: Sequence[Path], sizes: Counter[Path],
             level: int) -> Iterator[tuple[str, Sequence[Path]]]:
    """Yield the parts of a module: their names and the writers in each.

    Args:
        path (Path): Name of the module; empty for the network.
        writers (Sequence[Path]): Writers inside it.
        sizes (Counter[Path]): Channels of all writers of the network.
        level (int): Number of modules around it that were divided.
    """
    if len(writers) == 1:
        yield '.'.join(writers[0][:max(2, len(path))]), writers
        return
    children: dict[Path, list[Path]] = {}
    for writer in writers:
        children.setdefault(writer[:len(path) + 1], []).append(writer)
    channels = {
        child: sum(sizes[writer] for writer in inside)
        for child, inside in children.items()
    }
    numbered = _numbered(children)
    rows = [child for siblings in numbered for child in siblings]
    if 2 * sum(channels[child] for child in rows) >= sum(channels.values()):
        for siblings in numbered:
            yield from _ranges(siblings, children)
        for child in children.keys() - rows:
            yield '.'.join(child), children[child]
        return
    if level and len(children) > _MOST:
        yield '.'.join(path), writers
        return
    # Backbone and heads, or modules that are enough parts already.
    are_few = not level and 2 * len(children) <= _MOST
    for child, inside in children.items():
        # A module around a single other one is no level.
        is_wrapped = len(children) == 1
        is_large = channels[child] >= _LARGE * sizes.total()
        if is_wrapped or are_few or is_large:
            below = level if is_wrapped else level + 1
            yield from _divided(child, inside, sizes, below)
        else:
            yield '.'.join(child), inside


def _numbered(modules: Iterable[Path]) -> list[list[Path]]:
    """Lists of at least two modules whose names differ in a last number."""
    by_stem: dict[str, list[Path]] = {}
    for module in modules:
        found = re.fullmatch(r'(.*?)\d+', module[-1])
        if found:
            by_stem.setdefault(found[1], []).append(module)
    return [siblings for siblings in by_stem.values() if len(siblings) > 1]


def _ranges(
    siblings: Sequence[Path],
    children: Mapping[Path,
                      list[Path]]) -> Iterator[tuple[str, Sequence[Path]]]:
    """Yield numbered modules as parts, or ranges of them if they are many."""
    step = math.ceil(len(siblings) / _MOST)
    for start in range(0, len(siblings), step):
        chunk = siblings[start:start + step]
        name = '.'.join(chunk[0])
        if step > 1 and len(chunk) > 1:
            name += '-' + re.findall(r'\d+', chunk[-1][-1])[-1]
        yield name, [writer for child in chunk for writer in children[child]]


def other_widths(analysis: Analysis, keep: Tensor,
                 multiple: int) -> dict[str, int]:
    """Number of output channels of layers where it is no multiple.

    Args:
        analysis (Analysis): Analysis of the network.
        keep (Tensor): ``(G,)`` bool, the gates whose channels were kept.
        multiple (int): Number of which the widths were to be multiples.

    Returns:
        dict[str, int]: Width by the name of the layer, for layers that
        inference runs and that have gates on their outputs.
    """
    widths = {
        layer.name: int(kept_slots(layer.outputs, keep).sum())
        for layer in analysis.layers
        if layer.in_inference and bool((layer.outputs >= 0).any())
    }
    return {name: width for name, width in widths.items() if width % multiple}


def note_on_widths(analysis: Analysis, keep: Tensor,
                   multiple: int) -> str | None:
    """Compose a note on layers whose width is no multiple.

    Args:
        analysis (Analysis): See :func:`other_widths`.
        keep (Tensor): See :func:`other_widths`.
        multiple (int): See :func:`other_widths`.

    Returns:
        str, optional: None if all widths are multiples.
    """
    widths = other_widths(analysis, keep, multiple)
    if not widths:
        return None
    shown = [f'{name} ({width})' for name, width in widths.items()]
    more = len(shown) - _MOST_SHOWN
    return (f'gdp.multiple is {multiple}, but the outputs of {len(shown)} '
            f'layer(s) are no multiple of it: '
            f'{", ".join(shown[:_MOST_SHOWN])}' +
            (f' and {more} more' if more > 0 else ''))


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
            bool(kept_slots(slots, keep).any())
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
