"""Gates on the kernels of layers: conv(g x, W) = conv(x, W g).

Letters: ``G`` gates, ``C`` channels on an axis of a kernel.
"""
from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from .gdp import Gates


def gate_layer_(layer: nn.Module, gates: Gates, slots: Tensor) -> None:
    """Put gates on the input channels of a layer's kernel, in place.

    conv(g x, W) = conv(x, W g): the gate multiplies the kernel, so it costs
    no activation-sized work or memory, and the layer's parameters keep their
    names.

    Args:
        layer (nn.Module): Convolution, transposed or not, or linear layer.
        gates (Gates): Where the gates are.
        slots (Tensor): Gate of each slot on the kernel's axis of inputs, -1
            for none: ``(C_in,)``, of a grouped convolution ``(C_in /
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
    """In place of a layer's forward; an object, so that deepcopy rebinds it.

    Args:
        layer (nn.Module): The layer.
        gates (Gates): Where the gates are.
        slots (Tensor): See :func:`gate_layer_`.
    """
    axis = 1

    def __init__(self, layer: nn.Module, gates: Gates, slots: Tensor) -> None:
        self.layer = layer
        self.gates = gates
        self.index = gates.add_slots(slots)

    def gated(self, weight: Tensor) -> Tensor:
        """The kernel times the gates."""
        return weight * along(
            self.gates.slot_openness(self.index), weight, self.axis)


class _GatedConvolution(_GatedForward):

    def __call__(self, inputs: Tensor, weight: Tensor,
                 bias: Tensor | None) -> Tensor:
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


def along(values: Tensor, kernel: Tensor, axis: int) -> Tensor:
    """Numbers ``(C,)``, in a shape that multiplies an axis of a kernel."""
    shape = [1] * kernel.dim()
    shape[axis] = -1
    return values.reshape(shape)


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
