"""Layers as ONNX models of one operator, timed in ONNX Runtime."""
from __future__ import annotations

import time
from typing import Any

import torch

from ..packages import check_packages, onnxruntime_session
from .workload import Workload

# A call takes a few microseconds beside the operator; a mean over several
# calls is steadier where the operator takes few.
_LEAST_MS = 1.


class OnnxStopwatch:
    """Stopwatch of layers in ONNX Runtime on the CPU.

    It keeps the session of each workload, because ONNX Runtime rearranges the
    weights when a session begins.

    Raises:
        ValueError: If a package is missing.
    """

    def __init__(self) -> None:
        check_packages("gdp.target.runtime='onnxruntime'", 'onnx',
                       'onnxruntime')
        self._sessions: dict[Workload, tuple[Any, dict[str, Any]]] = {}

    def __call__(self, workload: Workload, device: torch.device) -> float:
        """Measure the milliseconds of one call of a layer.

        Args:
            workload (Workload): The layer.
            device (torch.device): Device of the training, which does not
                matter here.
        """
        if workload not in self._sessions:
            self._sessions[workload] = _session(workload)
        session, feed = self._sessions[workload]
        start, calls = time.perf_counter(), 0
        while True:
            session.run(None, feed)
            calls += 1
            passed = (time.perf_counter() - start) * 1e3
            if passed >= _LEAST_MS:
                return passed / calls


def _session(workload: Workload) -> tuple[Any, dict[str, Any]]:
    """Load a layer into ONNX Runtime; return its input too."""
    inputs, _ = workload.tensors(torch.device('cpu'))
    session = onnxruntime_session(layer_model(workload))
    return session, dict(inputs=inputs.numpy())


def layer_model(workload: Workload) -> bytes:
    """Write a layer as an ONNX model of one operator.

    Args:
        workload (Workload): The layer; its kernel becomes a constant, as it
            is in the model of a network.
    """
    from onnx import TensorProto, helper, numpy_helper
    inputs, weight = workload.tensors(torch.device('cpu'))
    outputs = workload(inputs, weight)
    options: dict[str, Any] = {}
    operator, call = 'MatMul', workload.call
    if not call.options:
        weight = weight.T.contiguous()
    else:
        axes = weight.dim() - 2
        # One number may stand for all axes.
        stride, padding, dilation, output_padding = (
            [*numbers] * (axes if len(numbers) == 1 else 1)
            for numbers in (*call.options[:3], call.options[4]))
        transposed = call.options[3]
        operator = 'ConvTranspose' if transposed else 'Conv'
        options = dict(
            strides=stride,
            pads=padding * 2,
            dilations=dilation,
            group=workload.groups)
        if transposed:
            options['output_padding'] = output_padding
    graph = helper.make_graph([
        helper.make_node(operator, ['inputs', 'weight'], ['outputs'], **
                         options)
    ], 'layer', [
        helper.make_tensor_value_info('inputs', TensorProto.FLOAT,
                                      [*inputs.shape])
    ], [
        helper.make_tensor_value_info('outputs', TensorProto.FLOAT,
                                      [*outputs.shape])
    ], [numpy_helper.from_array(weight.numpy(), 'weight')])
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid('', 17)], ir_version=9)
    return model.SerializeToString()
