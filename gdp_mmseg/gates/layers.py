"""Gates on the kernels of layers: conv(g x, W) = conv(x, W g).

Letters: ``G`` gates, ``C`` channels on an axis of a kernel.
"""
from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ..analysis.liveness import kept_slots
from ..analysis.structure import Analysis
from .base import GateMethod
from .scaling import Product


def gate_(model: nn.Module, analysis: Analysis, gates: GateMethod) -> None:
    """Put gates on all layers of a model that read gated channels, in place.

    Args:
        model (nn.Module): The model that was analysed, without gates.
        analysis (Analysis): Layers and the gates of their inputs.
        gates (GateMethod): ``G`` gates, as many as the analysis has.
    """
    gates.bind_(model)
    for layer in analysis.gated_layers():
        gate_layer_(model.get_submodule(layer.name), gates, layer.inputs)


def ungate_(model: nn.Module, analysis: Analysis) -> None:
    """Take the gates off all layers that :func:`gate_` put them on, in place.

    Args:
        model (nn.Module): A model with gates.
        analysis (Analysis): The analysis that its gates are from.
    """
    for layer in analysis.gated_layers():
        attributes = vars(model.get_submodule(layer.name))
        for name in ('forward', '_conv_forward'):
            if isinstance(attributes.get(name), _GatedForward):
                del attributes[name]


def select_slots_(model: nn.Module, analysis: Analysis, keep: Tensor) -> None:
    """Let the gated layers read the slots of some gates only, in place.

    Args:
        model (nn.Module): A model with gates, whose kernels have those slots.
        analysis (Analysis): The analysis that its gates are from.
        keep (Tensor): ``(G,)`` bool on the CPU.
    """
    for layer in analysis.gated_layers():
        attributes = vars(model.get_submodule(layer.name))
        for name in ('forward', '_conv_forward'):
            gated = attributes.get(name)
            if isinstance(gated, _GatedForward):
                gated.gates.set_slots_(
                    gated.index, layer.inputs[kept_slots(layer.inputs, keep)])
                # Its memory has the former size.
                gated.product = Product()


def gate_layer_(layer: nn.Module, gates: GateMethod, slots: Tensor) -> None:
    """Put gates on the input channels of a layer's kernel, in place.

    The gate multiplies the kernel, not the activation. That gives the same
    outputs and gradients without work or memory of the size of an activation,
    and the layer's parameters keep their names.

    Args:
        layer (nn.Module): Convolution, transposed convolution or linear
            layer.
        gates (GateMethod): Gates of the model.
        slots (Tensor): Gate of each slot on the kernel's axis of inputs, -1
            for none: ``(C_in,)``, for a grouped convolution ``(C_in /
            groups,)``.

    Raises:
        TypeError: If the layer is of another kind.
    """
    gated: Any = layer
    if isinstance(layer, nn.Linear):
        gated.forward = _GatedLinear(layer, gates, slots)
    elif isinstance(layer, _ConvTransposeNd):
        gated.forward = _GatedTransposed(layer, gates, slots)
    elif isinstance(layer, _ConvNd):
        gated._conv_forward = _GatedConvolution(layer, gates, slots)
    else:
        raise TypeError('expected a convolution or linear layer, but got '
                        f'{type(layer).__name__}')


class _GatedForward:
    """Replacement of a layer's forward that multiplies the kernel by gates.

    It is an object and not a closure, because ``deepcopy`` (as in EMA) binds
    its attributes to the copied layer and gates.

    Args:
        layer (nn.Module): The layer.
        gates (GateMethod): Gates of the model.
        slots (Tensor): See :func:`gate_layer_`.
    """
    # Axis of the kernel along which its inputs lie.
    axis = 1

    def __init__(self, layer: nn.Module, gates: GateMethod,
                 slots: Tensor) -> None:
        self.layer = layer
        self.gates = gates
        self.index = gates.add_slots(slots)
        self.product = Product()

    def gated(self, weight: Tensor) -> Tensor:
        """Kernel times the gates of its inputs."""
        return self.product(weight, self.gates.slot_factors(self.index),
                            self.axis, self.gates.neutral, self.gates.heeded)


class _GatedConvolution(_GatedForward):

    def __call__(self, inputs: Tensor, weight: Tensor,
                 bias: Tensor | None) -> Tensor:
        # The class's own method: the layer's attribute is this object.
        plain: Any = type(self.layer)
        return plain._conv_forward(self.layer, inputs, self.gated(weight),
                                   bias)


class _GatedTransposed(_GatedForward):
    axis = 0

    def __call__(self,
                 inputs: Tensor,
                 output_size: list[int] | None = None) -> Tensor:
        layer: Any = self.layer
        axes = len(layer.kernel_size)
        convolve = (F.conv_transpose1d, F.conv_transpose2d,
                    F.conv_transpose3d)[axes - 1]
        added = layer._output_padding(inputs, output_size, layer.stride,
                                      layer.padding, layer.kernel_size, axes,
                                      layer.dilation)
        return convolve(inputs, self.gated(layer.weight), layer.bias,
                        layer.stride, layer.padding, added, layer.groups,
                        layer.dilation)


class _GatedLinear(_GatedForward):

    def __call__(self, inputs: Tensor) -> Tensor:
        layer: Any = self.layer
        return F.linear(inputs, self.gated(layer.weight), layer.bias)


def slot_values(openness: Tensor, slots: Tensor) -> Tensor:
    """Openness of each slot of a channel axis: 1 where there is no gate.

    Args:
        openness (Tensor): ``(G,)``.
        slots (Tensor): ``(C,)`` gate of each slot, -1 for none.

    Returns:
        Tensor: ``(C,)``, differentiable in ``openness``.

    Examples:
        >>> import torch
        >>> slot_values(torch.tensor([0.5, 0.]), torch.tensor([1, -1, 0]))
        tensor([0.0000, 1.0000, 0.5000])
    """
    return openness[slots.clamp(min=0)].masked_fill(slots < 0, 1)
