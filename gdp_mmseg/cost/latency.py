"""Measures how the time of each layer depends on its widths.

Each distinct layer that inference runs is timed by itself, on the device at
hand, at a few numbers of inputs and outputs, and a model that no width can
make negative is fitted:

.. code-block:: text

    milliseconds = a + b s_in + c s_out + d s_in s_out,  a, b, c, d >= 0

What stands between the layers (norms, activations, resampling) is not timed.

Letters: ``L`` counted layers, ``P`` points (widths of a layer).
"""
from __future__ import annotations

import dataclasses
import statistics
import time
from typing import Callable, Sequence

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor
from torch.nn import functional as F

from ..analysis.structure import Analysis, Layer, LayerCall
from .counts import ONE, Cost, CostTerm, inference_layers, product_of


class LatencyCost(Cost):
    """Time of the counted layers, one after the other, as it was measured.

    A layer costs a + b s_in + c s_out + d s_in s_out. The four numbers of
    each are measured once, when a training begins (see ``latency.py``), and
    live in the state dict: whoever loads the checkpoint has the same cost.
    The constant a stays, whatever is closed.

    Args:
        analysis (Analysis): What the analysis found.
    """

    def __init__(self, analysis: Analysis) -> None:
        products = []
        for layer in inference_layers(analysis):
            both = product_of(layer)
            products += [
                CostTerm(ONE, ONE),
                CostTerm(both.inputs, ONE),
                CostTerm(ONE, both.outputs), both
            ]
        super().__init__(analysis, products, persistent=True)

    @property
    def measured(self) -> bool:
        """Whether :meth:`weigh_` was called, or a state dict loaded."""
        return bool(self.shares.any())


# Shares of the channels at which a layer with gates is timed, on each side:
# a round over all layers takes as long as three dense forward passes.
WIDTHS = (1., 0.5, 0.25)
SECONDS = 60.
ROUNDS = 20
# Launching a kernel takes the host longer than a small layer the GPU.
_CALLS = {'cuda': 20}


@dataclasses.dataclass(frozen=True)
class Workload:
    """A layer at some width.

    Args:
        run (Run): Its call.
        inputs (int): Slots of its kernel's axis of inputs.
        outputs (int): Output channels.
        blockwise (bool): See :class:`gdp_mmseg.groups.Layer`.
    """
    run: LayerCall
    inputs: int
    outputs: int
    blockwise: bool

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """An input and a kernel."""
        run = self.run
        kernel, size, options = run.kernel, run.size, run.options
        if not options:
            shapes: tuple[Sequence[int], ...] = ((*size, self.inputs),
                                                 (self.outputs, self.inputs))
        else:
            images, *sides = size
            transposed, groups = options[3], self.groups
            if self.blockwise:
                channels, narrow = groups * kernel[1], (self.outputs,
                                                        kernel[1])
            else:
                channels = groups * self.inputs
                narrow = ((self.inputs, self.outputs) if transposed else
                          (self.outputs, self.inputs))
            shapes = (images, channels, *sides), (*narrow, *kernel[2:])
        inputs, weight = (torch.ones(shape, device=device) for shape in shapes)
        return inputs, weight

    @property
    def groups(self) -> int:
        """Of the convolution at this width: of blocks, some are gone."""
        groups: int = self.run.options[5]
        return (self.outputs * groups //
                self.run.kernel[0] if self.blockwise else groups)

    def __call__(self, inputs: Tensor, weight: Tensor) -> Tensor:
        """Run the layer."""
        if not self.run.options:
            return F.linear(inputs, weight)
        return torch.ops.aten.convolution(inputs, weight, None,
                                          *self.run.options[:5], self.groups)


Stopwatch = Callable[[Workload, torch.device], float]


@torch.no_grad()
def stopwatch(workload: Workload, device: torch.device) -> float:
    """Milliseconds of a run of a layer."""
    inputs, weight = workload.tensors(device)
    calls = _CALLS.get(device.type, 1)
    _wait(device)
    start = time.perf_counter()
    for _ in range(calls):
        workload(inputs, weight)
    _wait(device)
    return (time.perf_counter() - start) * 1e3 / calls


def _wait(device: torch.device) -> None:
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def measure(layers: Sequence[Layer],
            device: torch.device,
            stopwatch: Stopwatch = stopwatch,
            seconds: float = SECONDS) -> Tensor:
    """Time layers at several widths, and fit each.

    Args:
        layers (Sequence[Layer]): ``L`` counted ones.
        device (torch.device): To measure on.
        stopwatch (Stopwatch): Gives the milliseconds of one run.
        seconds (float): No second timed round over all layers starts after
            this; a first one, and one that is not timed, are always made.

    Returns:
        Tensor: ``(L, 4)`` coefficients a, b, c, d in milliseconds, where a
        layer that is called several times has the sum of its calls.
    """
    points = {
        layer_run: _workloads(*layer_run)
        for layer_run in dict.fromkeys(
            _key(layer, run) for layer in layers for run in layer.calls)
    }
    workloads = [one for several in points.values() for one in several]
    times: dict[Workload, list[float]] = {one: [] for one in workloads}
    end = time.perf_counter() + seconds
    for number in range(ROUNDS + 1):
        if number > 1 and time.perf_counter() > end:
            break
        for workload in times:
            times[workload].append(stopwatch(workload, device))
    # The first run of a kind makes room and chooses an algorithm.
    medians = {
        workload: statistics.median(values[1:])
        for workload, values in times.items()
    }
    fits = {
        key:
        fit([(one.inputs, one.outputs)
             for one in several], [medians[one] for one in several])
        for key, several in points.items()
    }
    return torch.stack([
        torch.stack([fits[_key(layer, run)] for run in layer.calls]).sum(0)
        for layer in layers
    ])


# Run, widths of the inputs, widths of the outputs, blocks.
_Key = tuple[LayerCall, tuple[int, ...], tuple[int, ...], bool]


def _key(layer: Layer, run: LayerCall) -> _Key:
    """What tells a run of a layer, and the widths that it can have."""
    groups = run.options[5] if run.options else 1
    if layer.blockwise:
        # The inputs go with the outputs.
        return run, (1, ), _widths(layer.outputs,
                                   run.kernel[0] // groups), True
    return (run, _widths(layer.inputs, 1), _widths(layer.outputs,
                                                   groups), False)


def _widths(gates: Tensor, unit: int) -> tuple[int, ...]:
    """Numbers of channels, multiples of ``unit``; of gates ``(C,)``."""
    if not bool((gates >= 0).any()):
        return (len(gates), )
    units = len(gates) // unit
    return tuple(
        dict.fromkeys(max(round(share * units), 1) * unit for share in WIDTHS))


def _workloads(run: LayerCall, inputs: tuple[int, ...],
               outputs: tuple[int, ...], blockwise: bool) -> list[Workload]:
    return [
        Workload(run, width_in, width_out, blockwise) for width_in in inputs
        for width_out in outputs
    ]


def fit(widths: Sequence[tuple[int, int]],
        milliseconds: Sequence[float]) -> Tensor:
    """Nonnegative least squares of a + b s_in + c s_out + d s_in s_out.

    Args:
        widths (Sequence[tuple[int, int]]): ``P`` numbers of inputs and
            outputs. Of a side that does not vary, there is no term.
        milliseconds (Sequence[float]): ``P`` times.

    Returns:
        Tensor: ``(4,)`` a, b, c, d, none below zero.

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
    # Of one size, or the solver's tolerance means something else for each.
    scale = columns.max(0)
    found = np.zeros(4)
    found[used] = nnls((columns / scale)[:, used], np.array(milliseconds))[0]
    return torch.from_numpy(found / scale)
