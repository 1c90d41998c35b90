"""Replacement for a layer that has no inputs or no outputs left."""
from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd


class Constant(nn.Module):
    """Layer without a kernel: its output is a bias at every position.

    Source: GDP (ICCV 2021), section 3: a residual branch whose gates are all
    zero leaves the constant of its last batch norm, which is kept as a bias.

    Args:
        layer (nn.Module): The layer that is replaced, which gives the size of
            the output.
        channels (int): Number of output channels ``C_out``, possibly 0.

    Examples:
        >>> import torch
        >>> left = Constant(nn.Conv2d(4, 2, 3, stride=2, padding=1), 2)
        >>> left(torch.ones(1, 0, 8, 8)).shape
        torch.Size([1, 2, 4, 4])
    """

    def __init__(self, layer: nn.Linear | _ConvNd, channels: int) -> None:
        super().__init__()
        self.expand = Expansion(layer)
        self.bias: nn.Parameter | None = None
        if channels:
            self.bias = nn.Parameter(layer.weight.new_zeros(channels))

    def forward(self, inputs: Tensor) -> Tensor:
        """Expand the bias: ``(N, C_in, ...) -> (N, C_out, ...)``."""
        channels = (
            inputs.new_empty(0)
            if self.bias is None else self.bias.to(inputs.dtype))
        return self.expand(channels, inputs)


class Expansion:
    """Function that repeats a value per channel at each output position.

    Args:
        layer (nn.Module): The layer that gives the positions.
    """

    def __init__(self, layer: nn.Linear | _ConvNd) -> None:
        # (extent of the dilated kernel, stride, padding of both sides less
        # the output padding) along each spatial axis; None for a linear layer.
        self.windows: list[tuple[int, int, int]] | None = None
        self.transposed = isinstance(layer, _ConvNd) and layer.transposed
        if isinstance(layer, _ConvNd):
            self.windows = [
                (dilation * (size - 1) + 1, step, around - added)
                for size, step, dilation, around, added in zip(
                    layer.kernel_size, layer.stride, layer.dilation,
                    _total_padding(layer), layer.output_padding)
            ]

    def __call__(self, channels: Tensor, inputs: Tensor) -> Tensor:
        """Return ``channels`` at each output position.

        Args:
            channels (Tensor): ``(C_out,)``, possibly without any entry.
            inputs (Tensor): ``(N, C_in, ...)``, for a linear layer
                ``(..., C_in)``; only its shape counts.

        Returns:
            Tensor: ``(N, C_out, ...)``, for a linear layer ``(..., C_out)``.
        """
        # The sizes are read as inputs.shape[i], never len(inputs): a trace
        # records the former and fixes the latter to the traced batch.
        # Cloned, because a layer that follows may work in place.
        if self.windows is None:
            return channels.expand(*inputs.shape[:-1], -1).clone()
        size = [(length - 1) * step - around + window if self.transposed else
                (length + around - window) // step + 1
                for length, (window, step,
                             around) in zip(inputs.shape[2:], self.windows)]
        return channels.reshape(-1, *(1 for _ in size)).expand(
            inputs.shape[0], -1, *size).clone()


def _total_padding(layer: _ConvNd) -> list[int]:
    """Padding along each spatial axis, both sides together."""
    if layer.padding == 'same':
        return [
            dilation * (size - 1)
            for dilation, size in zip(layer.dilation, layer.kernel_size)
        ]
    if layer.padding == 'valid':
        return [0 for _ in layer.kernel_size]
    return [2 * int(side) for side in layer.padding]
