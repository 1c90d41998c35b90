"""The stopwatch: what is called when, and which layers it names."""
from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from gdp_mmseg.report.measure import _without_norms, layer_ms, median_ms


def test_calls_alternate_and_the_first_round_is_dropped() -> None:
    order: list[str] = []
    seconds = itertools.chain([0., 9., 0., 9.], itertools.cycle([0., 2.]))
    found = median_ms([lambda: order.append('a'), lambda: order.append('b')],
                      repeats=3,
                      seconds=float('inf'),
                      clock=lambda: next(seconds))
    assert order == ['a', 'b'] * 4
    assert found == [2000., 2000.]


@pytest.mark.parametrize('seconds, rounds', [(-1., 3), (float('inf'), 6)])
def test_measuring_ends(seconds: float, rounds: int) -> None:
    calls: list[int] = []
    median_ms([lambda: calls.append(0)], 5, seconds)
    assert len(calls) == rounds


def test_layers_are_named_and_timed_as_often_as_they_run() -> None:
    layer = nn.Linear(4, 4)
    model = nn.ModuleDict(dict(twice=layer, parts=nn.Sequential(nn.ReLU())))
    runs: list[int] = []
    layer.register_forward_hook(lambda *_: runs.append(0))

    def forward(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
        assert isinstance(model, nn.ModuleDict)
        return model['parts'](model['twice'](model['twice'](inputs)))

    times, = layer_ms([model], (1, 4), forward, repeats=2, seconds=-1.)
    assert set(times) == {'', 'twice', 'parts.0'}
    assert all(time > 0 for time in times.values())
    assert len(runs) == 2 * 3
    assert not model['parts'][0]._forward_hooks


class _AnySize(nn.modules.batchnorm._BatchNorm):
    """Batch norm like the one that mmengine puts in the place of SyncBN."""

    def _check_input_dim(self, inputs: torch.Tensor) -> None:
        pass


class _Mixing(nn.BatchNorm2d):
    """Batch norm with multiply-adds of its own."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return super().forward(inputs) @ inputs


@pytest.mark.parametrize('norm, leaves', [(nn.BatchNorm2d, True),
                                          (nn.SyncBatchNorm, True),
                                          (_AnySize, True), (_Mixing, False),
                                          (nn.InstanceNorm2d, False)])
def test_norms_without_multiply_adds_leave_a_count(norm: type[nn.Module],
                                                   leaves: bool) -> None:
    model = _without_norms(nn.Sequential(nn.Conv2d(3, 4, 1), norm(4)))
    assert isinstance(model[1], nn.Identity) == leaves
