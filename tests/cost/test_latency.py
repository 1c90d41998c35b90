"""Latency as a cost: what is timed, what is fitted, and when; never a time."""
from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from gdp_mmseg import packages
from gdp_mmseg.analysis.structure import Layer, LayerCall
from gdp_mmseg.cost.counts import inference_layers
from gdp_mmseg.cost.latency import ROUNDS, LatencyCost, fit, measure, stopwatch
from gdp_mmseg.cost.onnx_layers import layer_model
from gdp_mmseg.cost.workload import Workload
from gdp_mmseg.pruner.pruner import Pruner
from gdp_mmseg.pruner.settings import Settings, Target

from helpers.toys import TOYS

CPU = torch.device('cpu')


class Clock:
    """A stopwatch that knows the time beforehand, and what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Workload] = []

    def __call__(self, workload: Workload, device: torch.device) -> float:
        self.asked.append(workload)
        return (1 + 0.5 * workload.outputs * (not workload.blockwise) +
                0.1 * workload.inputs * workload.outputs)


def by_hand(layer: Layer, inputs: float, outputs: float) -> float:
    """What the clock says of all runs of a layer."""
    if layer.blockwise:
        return len(layer.calls) * (1 + 0.1 * outputs)
    return len(layer.calls) * (1 + 0.5 * outputs + 0.1 * inputs * outputs)


@pytest.mark.parametrize('name', TOYS)
def test_cost_is_the_sum_of_the_layers_times(name: str) -> None:
    analysis = TOYS[name].analyse()[1]
    layers, cost = inference_layers(analysis), LatencyCost(analysis)
    dense = cost.weigh_(measure(layers, CPU, Clock()).flatten())
    assert dense == pytest.approx(
        sum(
            by_hand(layer, len(layer.inputs), len(layer.outputs))
            for layer in layers))
    openness = torch.rand(
        analysis.num_gates, generator=torch.Generator().manual_seed(4))

    def opened(gates: torch.Tensor) -> float:
        return float(openness[gates[gates >= 0]].sum() + (gates < 0).sum())

    expected = sum(
        by_hand(layer, opened(layer.inputs), opened(layer.outputs))
        for layer in layers)
    assert float(cost(openness)) == pytest.approx(expected / dense, rel=1e-4)


@pytest.mark.parametrize('name', TOYS)
def test_what_is_timed_is_the_layer_at_its_width(name: str) -> None:
    """It runs, and has as many multiply-adds as the layer would."""
    groups = TOYS[name].analyse()[1]
    for layer in inference_layers(groups):
        clock = Clock()
        flops: dict[LayerCall, set[float]] = {}
        measure([layer], CPU, clock, seconds=-1)
        for workload in dict.fromkeys(clock.asked):
            with FlopCounterMode(display=False) as counter:
                workload(*workload.tensors(torch.device('meta')))
            pairs = workload.outputs * (1 if layer.blockwise else
                                        workload.inputs)
            flops.setdefault(workload.call,
                             set()).add(counter.get_total_flops() / 2 / pairs)
        # As many for each pair of channels, at every width.
        assert all(len(values) == 1 for values in flops.values())
        assert sum(sum(flops[run])
                   for run in layer.calls) == layer.macs_per_pair


def test_stopwatch_runs_the_layer() -> None:
    groups = TOYS['residual'].analyse()[1]
    coefficients = measure(
        inference_layers(groups), CPU, stopwatch, seconds=-1)
    assert coefficients.shape == (4, 4)
    assert bool((coefficients >= 0).all())
    assert bool((coefficients.sum(1) > 0).all())


def test_equal_layers_are_timed_once() -> None:
    groups = TOYS['called twice'].analyse()[1]
    clock = Clock()
    layers = inference_layers(groups)
    measure(layers, CPU, clock, seconds=-1)
    once = len(clock.asked)
    clock.asked.clear()
    measure(layers * 3, CPU, clock, seconds=-1)
    assert len(clock.asked) == once


@pytest.mark.parametrize('seconds, rounds', [(-1., 2), (math.inf, ROUNDS + 1)])
def test_measuring_ends(seconds: float, rounds: int) -> None:
    clock = Clock()
    measure(inference_layers(TOYS['chain'].analyse()[1]), CPU, clock, seconds)
    points = set(clock.asked)
    assert len(clock.asked) == rounds * len(points)
    # Chain 3 -> 4 -> 6 -> 2: inputs and outputs without gates stay.
    assert {(point.inputs, point.outputs)
            for point in points} == {(3, 4), (3, 2), (3, 1), (6, 2), (2, 2),
                                     *((i, o) for i in (4, 2, 1)
                                       for o in (6, 3, 2)), (3, 2)}


def test_fit_is_never_negative_where_times_fall_with_width() -> None:
    widths = [(inputs, outputs) for inputs in (8, 4, 2)
              for outputs in (8, 4, 2)]
    found = fit(widths, [1 / inputs for inputs, _ in widths])
    assert bool((found >= 0).all())
    assert found.tolist() == pytest.approx([(1 / 8 + 1 / 4 + 1 / 2) / 3, 0, 0,
                                            0])


# -- in ONNX Runtime --------------------------------------------------------


@pytest.mark.parametrize('name', [
    'stride and dilation without padding', 'depthwise of two per channel',
    'transposed convolution', 'transposed grouped convolution',
    'grouped convolution of few groups', 'linear on tokens', 'attention'
])
def test_onnx_layer_computes_what_the_layer_does(name: str) -> None:
    pytest.importorskip('onnx')
    onnxruntime = pytest.importorskip('onnxruntime')
    for layer in inference_layers(TOYS[name].analyse()[1]):
        clock = Clock()
        measure([layer], CPU, clock, seconds=-1)
        for workload in dict.fromkeys(clock.asked):
            session = onnxruntime.InferenceSession(layer_model(workload))
            inputs, weight = workload.tensors(CPU)
            inputs = torch.randn_like(inputs)
            found = session.run(None, dict(inputs=inputs.numpy()))[0]
            torch.testing.assert_close(
                torch.from_numpy(found), workload(inputs, weight))


def test_layers_are_measured_in_onnx_runtime() -> None:
    pytest.importorskip('onnx')
    pytest.importorskip('onnxruntime')
    pruner = pruner_of('residual', runtime='onnxruntime')
    pruner.measure_()
    assert float(pruner.cost(torch.ones(
        pruner.analysis.num_gates))) == pytest.approx(1)
    assert pruner.settings.target.resource == 'latency in onnxruntime'


def test_missing_runtime_is_refused_before_anything_is_measured(
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, 'is_installed', 'onnx'.__eq__)
    pruner = pruner_of('residual', runtime='onnxruntime')
    with pytest.raises(
            ValueError,
            match="gdp.target.runtime='onnxruntime': "
            'expected the packages onnx, onnxruntime, but got no '
            'onnxruntime; install them by: pip install onnxrunt'):
        pruner.measure_()
    assert pruner.unmeasured


@pytest.mark.parametrize('target, reason', [
    (dict(type='latency', runtime='onnxruntme'),
     r"expected one of \['torch', 'onnxruntime'\], but got 'onnxruntme'; did "
     "you mean 'onnxruntime'"),
    (dict(type='latency', runtime=None), 'but got None'),
    (dict(type='flops', runtime='onnxruntime'), "expected type='latency'"),
])
def test_bad_runtime_is_refused(target: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=f'gdp.target.runtime: .*{reason}'):
        Target.from_config(dict(target, ratio=0.4))


# -- in a pruner ------------------------------------------------------------


def pruner_of(name: str, ratio: float = 0.6, **target: str) -> Pruner:
    return Pruner(
        TOYS[name].analyse()[1],
        Settings.from_config(
            dict(target=dict(type='latency', ratio=ratio, **target))))


def test_nothing_is_measured_when_a_pruner_is_made() -> None:
    pruner = pruner_of('residual')
    assert pruner.unmeasured
    pruner.measure_(Clock())
    assert not pruner.unmeasured


def test_gates_do_not_move_before_it_is_measured() -> None:
    pruner = pruner_of('residual')
    pruner.gates.theta.grad = torch.zeros_like(pruner.gates.theta)
    with pytest.raises(RuntimeError, match='measured latency.*GDPHook'):
        pruner.step_(0.5, 10)


def test_state_dict_carries_the_cost() -> None:
    pruner, loaded = pruner_of('residual'), pruner_of('residual')
    pruner.measure_(Clock())
    loaded.load_state_dict(pruner.state_dict())
    assert not loaded.unmeasured
    openness = torch.linspace(0, 1, pruner.analysis.num_gates)
    assert torch.equal(loaded.cost(openness), pruner.cost(openness))
    assert float(pruner.cost(torch.ones_like(openness))) == pytest.approx(1)


def test_target_below_what_no_gate_can_save_is_an_error() -> None:
    pruner = pruner_of('residual', 0.01)
    pruner.measure_(Clock())
    with pytest.raises(
            ValueError,
            match='gdp.target: expected more than .*'
            'latency .* but got 0.01'):
        pruner.check_target()


def test_flops_stay_what_they_are() -> None:
    pruner = pruner_of('residual')
    pruner.measure_(Clock())
    openness = torch.linspace(0, 1, pruner.analysis.num_gates)
    assert float(pruner.flops(openness)) != pytest.approx(
        float(pruner.cost(openness)))
    assert isinstance(pruner.cost, nn.Module)
