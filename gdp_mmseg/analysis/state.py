"""Conversion of an analysis to and from plain types, for checkpoints.

The state consists of lists, numbers and strings only, so that
``torch.load(weights_only=True)`` can read it. With the state at hand, a model
need not be traced and verified again.
"""
from __future__ import annotations

import dataclasses
from typing import Any, Iterable, Mapping

import torch
from torch import Tensor

from .structure import (Analysis, FrozenChannels, Group, Layer, LayerCall,
                        ReadPoint)


def to_state(analysis: Analysis) -> dict[str, Any]:
    """Turn an analysis into plain types.

    Examples:
        >>> from torch import nn
        >>> from gdp_mmseg.analysis.analyse import analyse
        >>> net = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Conv2d(2, 4, 1))
        >>> found = analyse(net, (3, 5, 5), lambda net, x: net(x))
        >>> state = to_state(found)
        >>> state['num_gates'], to_state(from_state(state)) == state
        (2, True)
    """
    state = _plain({
        field.name: getattr(analysis, field.name)
        for field in dataclasses.fields(Analysis)
        if field.name != 'gate_of_slot'
    })
    # JSON and weights_only allow no pair as the key of a mapping.
    state['gate_of_slot'] = [[
        name, axis, gates.tolist()
    ] for (name, axis), gates in analysis.gate_of_slot.items()]
    return state


def from_state(state: Mapping[str, Any]) -> Analysis:
    """Restore an analysis from the state that :func:`to_state` returned.

    Raises:
        ValueError: If another version of the package wrote the state.
    """
    try:
        return Analysis(
            num_gates=state['num_gates'],
            gate_of_slot={
                (name, axis): torch.tensor(gates)
                for name, axis, gates in state['gate_of_slot']
            },
            layers=tuple(_layer(**row) for row in state['layers']),
            groups=tuple(_group(**row) for row in state['groups']),
            parameters={
                name: tuple(shape)
                for name, shape in state['parameters'].items()
            },
            frozen=tuple(
                FrozenChannels(row['reason'], tuple(row['writers']),
                               row['channels']) for row in state['frozen']),
            norms=dict(state['norms']),
            input_shape=tuple(state['input_shape']))
    except (KeyError, TypeError) as error:
        raise ValueError(
            'expected an analysis of this version of gdp_mmseg, but got one '
            f'with other fields ({error}); use the version that wrote it'
        ) from error


def fits(analysis: Analysis, tensors: Mapping[str, Tensor]) -> bool:
    """Return True if tensors have all axes on which an analysis has gates.

    Args:
        analysis (Analysis): Analysis of a model.
        tensors (Mapping[str, Tensor]): State dict of a dense model.
    """
    return all(name in tensors and axis < tensors[name].dim()
               and tensors[name].shape[axis] == len(gates)
               for (name, axis), gates in analysis.gate_of_slot.items())


def first_difference(one: Analysis, other: Analysis) -> str | None:
    """Name the first module whose gates differ between two analyses.

    Gates can only be loaded into a model with the same analysis: an equal
    number of gates is not enough.

    Returns:
        str, optional: Name of a module; None if each gate acts on the same
        channels in both.
    """
    for first, second in zip(one.groups, other.groups):
        if (first.writers, first.readers) != (second.writers, second.readers):
            return first.writers[0]
        if not torch.equal(first.gates, second.gates):
            return first.writers[0]
    if len(one.groups) != len(other.groups):
        longer = max(one.groups, other.groups, key=len)
        return longer[min(len(one.groups), len(other.groups))].writers[0]
    for key in (*one.gate_of_slot, *other.gate_of_slot):
        if (key not in one.gate_of_slot
                or key not in other.gate_of_slot or not torch.equal(
                    one.gate_of_slot[key], other.gate_of_slot[key])):
            return key[0].rpartition('.')[0]
    return None


def _layer(calls: Iterable[Mapping[str, Any]], inputs: list[int],
           outputs: list[int], **rest: Any) -> Layer:
    return Layer(
        inputs=torch.tensor(inputs, dtype=torch.long),
        outputs=torch.tensor(outputs, dtype=torch.long),
        calls=tuple(
            LayerCall(**{
                name: _tuples(value)
                for name, value in call.items()
            }) for call in calls),
        **rest)


def _group(gates: list[int],
           writers: list[str],
           readers: list[str],
           can_be_empty: bool,
           read_points: Iterable[Mapping[str, Any]] = (),
           norms: Iterable[str] = (),
           behind: Iterable[str] | None = None) -> Group:
    """Restore a group; earlier versions have not saved the last three."""
    norms = tuple(norms)
    if behind is None:
        # Norms had the gates of all readers, or of none.
        behind = readers if norms else ()
    return Group(
        torch.tensor(gates), tuple(writers), tuple(readers), can_be_empty,
        _read_points(read_points), norms, tuple(behind))


def _read_points(rows: Iterable[Mapping[str, Any]]) -> tuple[ReadPoint, ...]:
    return tuple(
        ReadPoint(**{
            name: _tuples(value)
            for name, value in row.items()
        }) for row in rows)


def _plain(value: Any) -> Any:
    """Convert to lists, mappings, numbers and strings, recursively."""
    if dataclasses.is_dataclass(value):
        value = {
            field.name: getattr(value, field.name)
            for field in dataclasses.fields(value)
        }
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value.tolist() if isinstance(value, Tensor) else value


def _tuples(value: Any) -> Any:
    """Convert lists to tuples, recursively."""
    if isinstance(value, list):
        return tuple(_tuples(item) for item in value)
    return value
