"""bfloat16 where the device has instructions for it, float32 elsewhere."""
from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip('mmengine')

import torch
from torch import nn

from gdp_mmseg.engine.amp import BFloat16OptimWrapper
from gdp_mmseg.report.precision import (computes_in_bfloat16,
                                        precision_of_training)


def output(monkeypatch: pytest.MonkeyPatch, operators: Any) -> torch.Tensor:
    """Output of a layer in a training on a CPU with some operators."""
    monkeypatch.setattr(torch.ops, 'mkldnn', operators)
    monkeypatch.setattr(torch.backends.mkldnn, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    layer = nn.Linear(4, 4)
    wrapper = BFloat16OptimWrapper(torch.optim.SGD(layer.parameters(), 1.))
    with wrapper.optim_context(layer):
        found: torch.Tensor = layer(torch.ones(2, 4))
    return found


def test_cpu_with_bfloat16_trains_in_it(
        monkeypatch: pytest.MonkeyPatch) -> None:
    operators = SimpleNamespace(_is_mkldnn_bf16_supported=lambda: True)
    assert output(monkeypatch, operators).dtype == torch.bfloat16
    assert precision_of_training().startswith('bfloat16')


@pytest.mark.parametrize('operators', [
    SimpleNamespace(_is_mkldnn_bf16_supported=lambda: False),
    SimpleNamespace(),
])
def test_cpu_without_bfloat16_trains_in_float32(
        operators: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.warns(UserWarning, match='no instructions for bfloat16'):
        assert output(monkeypatch, operators).dtype == torch.float32
    assert precision_of_training() == 'float32'
    assert computes_in_bfloat16('cuda')
