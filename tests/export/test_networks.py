"""Weights are loaded strictly, but modules may drop keys that they compute."""
from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip('mmengine')

import torch
from torch import nn

from gdp_mmseg.export.networks import load_strictly

from helpers.toys import ComputedTable


def test_keys_that_a_module_drops_are_not_missing() -> None:
    model = nn.Sequential(ComputedTable())
    state = {'0.kernel': torch.arange(2.), '0.table': torch.zeros(3)}
    load_strictly(model, state)
    assert model[0].kernel.tolist() == [0, 1]
    assert model[0].table.tolist() == [1, 1, 1]
    assert set(state) == {'0.kernel', '0.table'}


@pytest.mark.parametrize('change, first', [
    (lambda state: state.pop('0.kernel'), '0.kernel first'),
    (lambda state: state.pop('0.table'), '0.table first'),
    (lambda state: state.update(other=torch.ones(1)), 'other first'),
    (lambda state: state.update({'0.kernel': torch.ones(3)}),
     '1 are missing or of another shape'),
])
def test_weights_of_another_model_are_refused(change: Any, first: str) -> None:
    model = nn.Sequential(ComputedTable())
    state = model.state_dict()
    change(state)
    with pytest.raises(ValueError, match=first):
        load_strictly(model, state)
