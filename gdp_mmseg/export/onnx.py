"""ONNX file of a network, checked in ONNX Runtime against PyTorch.

PyTorch has two exporters. The one that traces a call is fast, and is right
at any size for most networks. The one that captures a program knows more
operators. The first whose file gives PyTorch's outputs on all inputs is
taken. Nothing is written before that.
"""
from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import re
import signal
import sys
import threading
import traceback
import warnings
from typing import Any, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..engine.forwards import inference_forward
from ..packages import ONNX, check_packages, onnxruntime_session
from ..report.deployment import OnnxFile
from ..surgery.outputs import TOLERANCE, first_line, largest_difference

INPUT = 'images'
# Newer operators are not needed, and older runtimes lack them.
_OPSET = 18
# The axes that change with the input, and their names.
_AXES = {0: 'batch', 2: 'height', 3: 'width'}
# Sides of the second input of a dynamic file: a multiple of this, because
# many networks halve their input five times.
_STEP = 32
# Processor time that a captured program of any size may take. Networks that
# can be captured need half a minute; with others, such as Swin, PyTorch
# reasons about their sizes for many minutes.
_SECONDS = 120.
# Time between two signals, in case that code catches what the first raises.
_AGAIN = 5.


class Deployed(nn.Module):
    """Network from normalised images to logits of their size.

    Args:
        network (nn.Module): Segmentor or classifier without gates.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits ``(N, K, H, W)``, of a classifier ``(N, K)``.

        Args:
            images (Tensor): ``(N, C, H, W)``.
        """
        network: Any = self.network
        if not hasattr(network, 'encode_decode'):
            found = inference_forward(network, images)
            if isinstance(found, (list, tuple)) and len(found) == 1:
                found = found[0]
        else:
            size = images.shape[2:]
            meta = dict(ori_shape=size, img_shape=size, pad_shape=size)
            found = network.encode_decode(images, [meta])
        if not isinstance(found, Tensor):
            raise ValueError(
                'onnx: expected a network with one tensor of logits, but got '
                f'{type(found).__name__}; export its parts by torch.onnx')
        return found

    @property
    def threshold(self) -> float:
        """Probability above which a network with one logit finds class 1."""
        head: Any = getattr(self.network, 'decode_head', None)
        head = head[-1] if isinstance(head, nn.ModuleList) else head
        return float(getattr(head, 'threshold', None) or 0.5)


class _Refused(Exception):
    """An exporter's reason; its message is the end of an error."""


class _TookTooLong(BaseException):
    """The end of a time limit; no ``except Exception`` may stop it."""


@torch.no_grad()
def to_onnx(network: nn.Module,
            images: Sequence[Tensor],
            source: str,
            dynamic: bool = False,
            argmax: bool = False) -> tuple[bytes, OnnxFile]:
    """Export a network to ONNX and compare it with PyTorch on images.

    Args:
        network (nn.Module): Segmentor or classifier in eval mode on the CPU.
        images (Sequence[Tensor]): Normalised images ``(1, C, H, W)`` of equal
            size to compare on.
        source (str): Description of them.
        dynamic (bool): Whether batch, height and width may change. The file
            is compared at a second size and batch too.
        argmax (bool): Whether the output is the class of each pixel or image,
            int64 ``(N, H, W)`` or ``(N,)``, instead of the logits.

    Returns:
        tuple[bytes, OnnxFile]: Content of the file, and its description.

    Raises:
        ValueError: If a package or an operator is missing, or the outputs
            differ.
    """
    check_packages('onnx', *ONNX)
    deployed, inputs = Deployed(network).eval(), [*images]
    if dynamic:
        inputs.append(_at_another_size(deployed, inputs))
    refusal = None
    for exporter in (_by_trace, _by_program):
        try:
            content = exporter(deployed, inputs[0], dynamic)
            difference = max(
                _difference(deployed, content, one) for one in inputs)
        except _Refused as error:
            refusal = error
            continue
        if argmax:
            content = _with_classes(content, deployed, inputs[0])
        sizes = dict.fromkeys('{} x {}'.format(*one.shape[2:])
                              for one in inputs)
        return content, OnnxFile(
            file='',
            output='classes' if argmax else 'logits',
            dynamic=dynamic,
            max_rel_diff=difference,
            compared_on=f'{source}, {" and ".join(sizes)}')
    advice = ('; leave --dynamic out, because the network may fix its sizes'
              if dynamic else '')
    raise ValueError(f'onnx: {refusal}{advice}; nothing was written')


def resized(image: Tensor, size: Sequence[int]) -> Tensor:
    """Resize an image ``(1, C, H, W)`` to a height and a width."""
    if tuple(image.shape[2:]) == tuple(size):
        return image.contiguous()
    return F.interpolate(image, tuple(size), mode='bilinear')


def _at_another_size(deployed: Deployed, inputs: Sequence[Tensor]) -> Tensor:
    """Make a batch of two images of other sides, that the network accepts."""

    def smaller(side: int, share: float) -> int:
        other = max(int(side * share) // _STEP, 1) * _STEP
        return other if other != side else side + _STEP

    height, width = inputs[0].shape[2:]
    size = smaller(height, 0.75), smaller(width, 0.5)
    batch = torch.cat([resized(inputs[index], size) for index in (0, -1)])
    try:
        deployed(batch)
    except Exception as error:  # a user's forward can raise anything
        raise ValueError(
            'onnx, dynamic: expected a network that accepts images of any '
            f'size, but got {first_line(error)} at {size[0]} x {size[1]}; '
            'leave --dynamic out') from error
    return batch


def _difference(deployed: Deployed, content: bytes, images: Tensor) -> float:
    """Run a file and return the difference to PyTorch's outputs.

    Raises:
        _Refused: If it cannot be run, or its outputs differ.
    """
    sides = '{} x {} x {} x {}'.format(*images.shape)
    try:
        session = onnxruntime_session(content)
        found = session.run(None, {INPUT: images.numpy()})[0]
    except Exception as error:  # the runtime's errors have no common type
        raise _Refused(
            f'expected ONNX Runtime to run the file on an input of {sides}, '
            f'but got {_short(error)}') from error
    difference = largest_difference([torch.from_numpy(found)],
                                    [deployed(images)])
    # The comparison is also false for nan.
    if not difference <= TOLERANCE:
        raise _Refused(
            'expected the outputs of PyTorch in ONNX Runtime, but got a '
            f'relative difference of {difference:.1e}, above {TOLERANCE}, on '
            f'an input of {sides}')
    return difference


def _with_classes(content: bytes, deployed: Deployed, images: Tensor) -> bytes:
    """Let a file end with the classes, as mmsegmentation chooses them."""
    import onnx
    from onnx import TensorProto, helper
    model = onnx.load_from_string(content)
    graph = model.graph
    logits = graph.output[0]
    batch, _, *sides = logits.type.tensor_type.shape.dim
    if deployed(images).shape[1] == 1:
        odds = deployed.threshold / (1 - deployed.threshold)
        bound = helper.make_tensor('gdp_bound', TensorProto.FLOAT, [1],
                                   [math.log(odds)])
        axis = helper.make_tensor('gdp_axis', TensorProto.INT64, [1], [1])
        graph.initializer.extend([bound, axis])
        graph.node.extend([
            helper.make_node('Greater', [logits.name, 'gdp_bound'],
                             ['gdp_above']),
            helper.make_node(
                'Cast', ['gdp_above'], ['gdp_cast'], to=TensorProto.INT64),
            helper.make_node('Squeeze', ['gdp_cast', 'gdp_axis'], ['classes'])
        ])
    else:
        graph.node.append(
            helper.make_node(
                'ArgMax', [logits.name], ['classes'], axis=1, keepdims=0))
    del graph.output[:]
    graph.output.append(
        helper.make_tensor_value_info('classes', TensorProto.INT64, [
            one.dim_param or one.dim_value or None for one in (batch, *sides)
        ]))
    onnx.checker.check_model(model)
    return model.SerializeToString()


def _by_trace(deployed: Deployed, image: Tensor, dynamic: bool) -> bytes:
    """Export by a traced call.

    Raises:
        _Refused: If this does not work.
    """
    file: Any = io.BytesIO()  # torch's annotation lacks streams
    axes = {INPUT: _AXES} if dynamic else None
    try:
        with _quiet():
            torch.onnx.export(
                deployed, (_example(image, dynamic), ),
                file,
                dynamo=False,
                input_names=[INPUT],
                output_names=['logits'],
                opset_version=_OPSET,
                dynamic_axes=axes)
    except Exception as error:  # an exporter raises errors of many types
        raise _Refused(f'expected to trace the network, but got '
                       f'{_short(error)}') from error
    return file.getvalue()


def _by_program(deployed: Deployed, image: Tensor, dynamic: bool) -> bytes:
    """Export by a captured program.

    Raises:
        _Refused: If this does not work; names the operator and the module.
    """
    try:
        with _time_limit(_SECONDS if dynamic else 0.):
            return _converted(deployed, _example(image, dynamic), dynamic)
    except _TookTooLong:
        raise _Refused(
            'expected a network whose sizes torch.export can compute from '
            f'those of the input within {_SECONDS:g} s of processor time, but '
            'got none by then') from None


def _converted(deployed: Deployed, image: Tensor, dynamic: bool) -> bytes:
    """Capture a program and convert it (see :func:`_by_program`)."""
    try:
        shapes = {INPUT: {axis: torch.export.Dim.AUTO for axis in _AXES}}
        with _quiet():
            program = torch.export.export(
                deployed, (image, ),
                dynamic_shapes=shapes if dynamic else None)
    except Exception as error:  # a user's forward can raise anything
        raise _Refused(
            'expected a network that torch.export can capture, but got '
            f'{_short(error)}; its forward must not depend on the values of '
            'tensors') from error
    try:
        with _quiet():
            converted: Any = torch.onnx.export(
                program, (image, ),
                dynamo=True,
                verbose=False,
                input_names=[INPUT],
                output_names=['logits'],
                opset_version=_OPSET)
            return converted.model_proto.SerializeToString()
    except Exception as error:
        raise _Refused(_missing_operator(error)) from error


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise ``_TookTooLong`` after some seconds of processor time; 0: never.

    Only the main thread gets signals, so there is no limit in another one.
    """
    if (not seconds
            or threading.current_thread() is not threading.main_thread()):
        yield
        return

    def stop(*_: Any) -> None:
        raise _TookTooLong

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, _AGAIN)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.)
        signal.signal(signal.SIGVTALRM, before)


def _missing_operator(error: BaseException) -> str:
    """Name the operator that could not be converted, and its module."""
    cause: BaseException | None = error
    while cause is not None:
        for frame, _ in traceback.walk_tb(cause.__traceback__):
            # The captured program may lack this node, because the exporter
            # replaces some operators by simpler ones first.
            node = frame.f_locals.get('node')
            if (isinstance(node, torch.fx.Node)
                    and f'node %{node.name} ' in str(cause)):
                return _of_node(node)
        cause = cause.__cause__
    return ('expected operators that ONNX has, but got '
            f'{_short(error)}; replace the operator')


def _of_node(node: torch.fx.Node) -> str:
    """Sentence about a node that ONNX has no operator for."""
    stack = [*(node.meta.get('nn_module_stack') or {}).values()]
    module = stack[-1][0].removeprefix('network.') if stack else ''
    return (f'expected operators that ONNX has, but got {node.target} in '
            f'module {module or "(the model itself)"}; replace it there')


def _example(image: Tensor, dynamic: bool) -> Tensor:
    """Input to export with; one image would make the batch a constant."""
    return torch.cat([image, image]) if dynamic else image


def _short(error: BaseException) -> str:
    """First sentence of an error, without colours and runs of spaces."""
    text = re.sub(r'\x1b\[[0-9;]*m', '', str(error)).strip()
    return f'{type(error).__name__}: {" ".join(text.split())[:160]}'


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide warnings, logs and prints of the exporters.

    They are about PyTorch's own code, and about sizes that are fixed, which
    the comparison at a second size finds.
    """
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(
                io.StringIO()), _without_stdout():
            warnings.simplefilter('ignore')
            yield
    finally:
        logging.disable(disabled)


@contextlib.contextmanager
def _without_stdout() -> Iterator[None]:
    """Drop what is written to stdout, by compiled code too.

    PyTorch prints the whole graph of a network that it cannot trace.
    """
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
