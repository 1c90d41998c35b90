"""An analysis survives the way through plain types."""
from __future__ import annotations

import io
from typing import Any

import pytest
import torch

from gdp_mmseg.analysis.state import (first_difference, fits, from_state,
                                      to_state)
from gdp_mmseg.cost.counts import FlopCost, ParameterCost

from helpers.toys import TOYS


def is_plain(value: Any) -> bool:
    """Tell whether only lists, mappings, numbers and strings are inside."""
    if isinstance(value, dict):
        return all(
            type(key) is str and is_plain(item) for key, item in value.items())
    if isinstance(value, list):
        return all(map(is_plain, value))
    return value is None or type(value) in (int, float, bool, str)


@pytest.mark.parametrize('name', TOYS)
def test_state_is_plain_and_gives_the_same_analysis(name: str) -> None:
    net, analysis = TOYS[name].analyse()
    state = to_state(analysis)
    assert is_plain(state)
    again = from_state(state)
    assert to_state(again) == state
    assert first_difference(analysis, again) is None
    assert fits(again, net.state_dict())
    ones = torch.ones(analysis.num_gates)
    for cost in (FlopCost, ParameterCost):
        assert cost(again).count(ones) == cost(analysis).count(ones)


def test_state_is_loaded_without_running_code() -> None:
    state = to_state(TOYS['residual'].analyse()[1])
    content = io.BytesIO()
    torch.save(state, content)
    content.seek(0)
    assert torch.load(content, weights_only=True) == state


def test_the_module_whose_gates_differ_is_named() -> None:
    _, analysis = TOYS['residual'].analyse()
    fewer = analysis.without({0: 'a reason'})
    assert first_difference(analysis, fewer) in analysis.groups[0].writers
    state = to_state(analysis)
    name, _, gates = state['gate_of_slot'][0]
    gates[0], gates[1] = gates[1], gates[0]
    assert first_difference(analysis,
                            from_state(state)) == name.rpartition('.')[0]


def test_an_analysis_of_a_wider_network_does_not_fit() -> None:
    net, analysis = TOYS['chain'].analyse()
    tensors = net.state_dict()
    (name, axis), _ = next(iter(analysis.gate_of_slot.items()))
    shape = list(tensors[name].shape)
    shape[axis] += 1
    assert not fits(analysis, dict(tensors, **{name: torch.empty(shape)}))
    del tensors[name]
    assert not fits(analysis, tensors)


def test_a_state_of_other_fields_is_refused() -> None:
    state = to_state(TOYS['chain'].analyse()[1])
    del state['groups']
    with pytest.raises(ValueError, match='expected an analysis of this'):
        from_state(state)
