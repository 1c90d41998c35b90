"""Operators of layers and their gradients.

Letters: ``x`` inputs, ``W`` kernel, ``b`` bias.
"""
from __future__ import annotations

from typing import Any, Callable, NamedTuple, Optional, Sequence, Union

import torch
from torch import Tensor
from torch.nn import functional as F

_CONVOLUTIONS: tuple[Callable[..., Tensor],
                     ...] = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED: tuple[Callable[..., Tensor],
                   ...] = (F.conv_transpose1d, F.conv_transpose2d,
                           F.conv_transpose3d)


class Convolution(NamedTuple):
    """Operator of a convolution or transposed convolution, zero-padded.

    Args:
        stride (tuple[int, ...]): One for each axis of positions, as below.
        padding (tuple[int, ...]): Number of zeros at either end.
        dilation (tuple[int, ...]): Distance of neighbours in the kernel.
        transposed (bool): Whether it is a transposed convolution.
        added (tuple[int, ...]): Output padding of a transposed convolution.
        groups (int): Number of groups of channels.
    """
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    added: tuple[int, ...]
    groups: int

    def __call__(self, inputs: Tensor, weight: Tensor,
                 bias: Tensor | None) -> Tensor:
        """Compute the outputs by x, W and b."""
        number = len(self.stride) - 1
        if self.transposed:
            return _TRANSPOSED[number](inputs, weight, bias, self.stride,
                                       self.padding, self.added, self.groups,
                                       self.dilation)
        return _CONVOLUTIONS[number](inputs, weight, bias, self.stride,
                                     self.padding, self.dilation, self.groups)

    def gradients(self, gradient: Tensor, inputs: Tensor, weight: Tensor,
                  wanted: Sequence[bool]) -> Sequence[Tensor | None]:
        """Compute the gradients of x, W and b; None where none is wanted.

        Args:
            gradient (Tensor): Gradient of the outputs.
            inputs (Tensor): x, a batch.
            weight (Tensor): W.
            wanted (Sequence[bool]): Which of the three are wanted.
        """
        backward: Any = torch.ops.aten.convolution_backward
        found: Sequence[Tensor | None] = backward(gradient, inputs, weight,
                                                  [gradient.shape[1]], *self,
                                                  wanted)
        return found


class Matrix:
    """Operator of a linear layer."""

    def __call__(self, inputs: Tensor, weight: Tensor,
                 bias: Tensor | None) -> Tensor:
        """Compute the outputs by x, W and b."""
        return F.linear(inputs, weight, bias)

    def gradients(self, gradient: Tensor, inputs: Tensor, weight: Tensor,
                  wanted: Sequence[bool]) -> Sequence[Tensor | None]:
        """Compute gradients; see :meth:`Convolution.gradients`."""
        # Inputs may also be a single vector.
        rows, read = (
            torch.atleast_2d(one).flatten(0, -2) for one in (gradient, inputs))
        return (gradient @ weight if wanted[0] else None,
                rows.T @ read if wanted[1] else None,
                rows.sum(0) if wanted[2] else None)


Operator = Union[Convolution, Matrix]
# Function of x, W and b, without gradients of its own.
Plain = Callable[[Tensor, Tensor, Optional[Tensor]], Tensor]
