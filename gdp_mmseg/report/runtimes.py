"""Networks in the runtimes that deploy them, on the CPU."""
from __future__ import annotations

from typing import Callable

import torch
from torch import Tensor

from ..packages import is_installed, onnxruntime_session
from .measure import Call


def onnxruntime_call(content: bytes, images: Tensor) -> Call:
    """Make a call of ONNX Runtime on images ``(N, C, H, W)``."""
    session = onnxruntime_session(content)
    feed = {session.get_inputs()[0].name: images.numpy()}
    return lambda: session.run(None, feed)


def openvino_call(content: bytes, images: Tensor) -> Call:
    """Make a call of OpenVINO on images ``(N, C, H, W)``."""
    import openvino
    core = openvino.Core()
    # The default precision may be bfloat16 where the CPU has it.
    compiled = core.compile_model(
        core.read_model(content), 'CPU',
        dict(
            INFERENCE_NUM_THREADS=torch.get_num_threads(),
            INFERENCE_PRECISION_HINT='f32'))
    request = compiled.create_infer_request()
    inputs = openvino.Tensor(images.numpy())
    return lambda: request.infer([inputs])


# Runtimes of ONNX files by the package that has to be installed.
RUNTIMES: dict[str, Callable[[bytes, Tensor], Call]] = dict(
    onnxruntime=onnxruntime_call, openvino=openvino_call)


def installed_runtimes() -> list[str]:
    """Names of the runtimes of ONNX files that are installed."""
    return [name for name in RUNTIMES if is_installed(name)]
