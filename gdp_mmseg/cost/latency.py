"""Measurement of how the time of each layer depends on its widths.

Each distinct layer that inference runs is timed alone, on the device of the
training or in the runtime that the target names, at a few numbers of inputs
and outputs. A function that cannot be negative at any width is fitted to the
times:

.. code-block:: text

    milliseconds = a + b s_in + c s_out + d s_in s_out,  a, b, c, d >= 0

Operators between the layers (norms, activations, resampling) are not timed.

Letters: ``L`` layers of inference, ``P`` points (widths of a layer).
"""
from __future__ import annotations

import statistics
import time
from typing import Callable, Sequence

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

from ..analysis.structure import Analysis, Layer, LayerCall
from .counts import ONE, Cost, CostTerm, inference_layers, term_of
from .onnx_layers import OnnxStopwatch
from .workload import Workload


class LatencyCost(Cost):
    """Sum of the measured times of all layers that inference runs.

    A layer costs a + b s_in + c s_out + d s_in s_out. The four coefficients
    of each layer are measured once, when a training begins (see
    :func:`measure`). They are part of the state dict, so that a resumed
    training has the same cost. The constant a is paid even for a layer whose
    channels are all closed.

    Args:
        analysis (Analysis): The analysis of the model.
    """

    def __init__(self, analysis: Analysis) -> None:
        terms = []
        for layer in inference_layers(analysis):
            both = term_of(layer)
            terms += [
                CostTerm(ONE, ONE),
                CostTerm(both.inputs, ONE),
                CostTerm(ONE, both.outputs), both
            ]
        super().__init__(analysis, terms, persistent=True)

    @property
    def measured(self) -> bool:
        """True once :meth:`weigh_` was called or a state dict was loaded."""
        return bool(self.shares.any())


# Shares of the channels at which a layer with gates is timed, on each side.
# The nine pairs cost 1.75^2, about three dense forward passes a round.
WIDTHS = (1., 0.5, 0.25)
# A median of 20 rounds is stable, and a minute is little beside a training.
SECONDS = 60.
ROUNDS = 20
# The host takes longer to launch a kernel than a GPU to run a small layer, so
# that several calls in a row are timed there.
_CALLS = {'cuda': 20}

Stopwatch = Callable[[Workload, torch.device], float]


@torch.no_grad()
def stopwatch(workload: Workload, device: torch.device) -> float:
    """Measure the milliseconds of one call of a layer."""
    inputs, weight = workload.tensors(device)
    calls = _CALLS.get(device.type, 1)
    _wait(device)
    start = time.perf_counter()
    for _ in range(calls):
        workload(inputs, weight)
    _wait(device)
    return (time.perf_counter() - start) * 1e3 / calls


# Functions that make the stopwatch of each runtime.
STOPWATCHES: dict[str, Callable[[], Stopwatch]] = dict(
    torch=lambda: stopwatch, onnxruntime=OnnxStopwatch)


def _wait(device: torch.device) -> None:
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def measure(layers: Sequence[Layer],
            device: torch.device,
            stopwatch: Stopwatch = stopwatch,
            seconds: float = SECONDS) -> Tensor:
    """Time layers at several widths and fit the coefficients of each.

    Args:
        layers (Sequence[Layer]): The ``L`` layers that inference runs.
        device (torch.device): The device to measure on.
        stopwatch (Stopwatch): Function that returns the milliseconds of one
            call.
        seconds (float): Time after which no further round over all layers
            begins. An untimed and one timed round are always made.

    Returns:
        Tensor: ``(L, 4)`` coefficients a, b, c, d in milliseconds; those of
        a layer that is called several times are summed over its calls.
    """
    points = {
        key: _workloads(*key)
        for key in dict.fromkeys(
            _key(layer, call) for layer in layers for call in layer.calls)
    }
    times: dict[Workload, list[float]] = {
        workload: []
        for workloads in points.values()
        for workload in workloads
    }
    end = time.perf_counter() + seconds
    for number in range(ROUNDS + 1):
        if number > 1 and time.perf_counter() > end:
            break
        for workload in times:
            times[workload].append(stopwatch(workload, device))
    # The first call of a kind allocates memory and selects an algorithm.
    medians = {
        workload: statistics.median(values[1:])
        for workload, values in times.items()
    }
    fits = {
        key:
        fit([(workload.inputs, workload.outputs) for workload in workloads],
            [medians[workload] for workload in workloads])
        for key, workloads in points.items()
    }
    return torch.stack([
        torch.stack([fits[_key(layer, call)] for call in layer.calls]).sum(0)
        for layer in layers
    ])


# A call, the widths of its inputs, those of its outputs, blockwise.
_Key = tuple[LayerCall, tuple[int, ...], tuple[int, ...], bool]


def _key(layer: Layer, call: LayerCall) -> _Key:
    """Return what identifies equal work: a call and its possible widths."""
    groups = call.options[5] if call.options else 1
    if layer.blockwise:
        # The inputs are removed with the outputs: one axis of widths only.
        return call, (1, ), _widths(layer.outputs,
                                    call.kernel[0] // groups), True
    return (call, _widths(layer.inputs, 1), _widths(layer.outputs,
                                                    groups), False)


def _widths(gates: Tensor, unit: int) -> tuple[int, ...]:
    """Return the widths to time, multiples of ``unit``, for gates ``(C,)``.
    """
    if not bool((gates >= 0).any()):
        return (len(gates), )
    units = len(gates) // unit
    return tuple(
        dict.fromkeys(max(round(share * units), 1) * unit for share in WIDTHS))


def _workloads(call: LayerCall, inputs: tuple[int, ...],
               outputs: tuple[int, ...], blockwise: bool) -> list[Workload]:
    return [
        Workload(call, width_in, width_out, blockwise) for width_in in inputs
        for width_out in outputs
    ]


def fit(widths: Sequence[tuple[int, int]],
        milliseconds: Sequence[float]) -> Tensor:
    """Fit a + b s_in + c s_out + d s_in s_out by nonnegative least squares.

    Args:
        widths (Sequence[tuple[int, int]]): ``P`` pairs of numbers of inputs
            and outputs. A side that does not vary gets no term.
        milliseconds (Sequence[float]): ``P`` times.

    Returns:
        Tensor: ``(4,)`` coefficients a, b, c, d, none of them negative.

    Examples:
        >>> times = [18., 10., 10., 6.]
        >>> fit([(4, 2), (2, 2), (4, 1), (2, 1)], times).round(decimals=3)
        tensor([2., 0., 0., 2.], dtype=torch.float64)
    """
    inputs, outputs = np.array(widths, dtype=float).T
    columns = np.stack(
        [np.ones_like(inputs), inputs, outputs, inputs * outputs], 1)
    varied_in, varied_out = (len(set(side)) > 1 for side in (inputs, outputs))
    used = [True, varied_in, varied_out, varied_in and varied_out]
    # Columns of equal size, so that the solver's tolerance means the same for
    # each coefficient.
    scale = columns.max(0)
    found = np.zeros(4)
    found[used] = nnls((columns / scale)[:, used], np.array(milliseconds))[0]
    return torch.from_numpy(found / scale)
