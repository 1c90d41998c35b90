"""One layer at chosen widths, which can be run and timed alone."""
from __future__ import annotations

import dataclasses
from typing import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..analysis.structure import LayerCall


@dataclasses.dataclass(frozen=True)
class Workload:
    """One call of a layer at chosen widths.

    Args:
        call (LayerCall): The call of the dense layer.
        inputs (int): Number of slots on the kernel's axis of inputs.
        outputs (int): Number of output channels.
        blockwise (bool): Whether outputs are removed with the inputs that
            they read (see :class:`gdp_mmseg.analysis.structure.Layer`).
    """
    call: LayerCall
    inputs: int
    outputs: int
    blockwise: bool

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Create an input and a kernel of ones."""
        call = self.call
        kernel, size, options = call.kernel, call.size, call.options
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
                narrow = ((channels, self.outputs // groups) if transposed else
                          (self.outputs, self.inputs))
            shapes = (images, channels, *sides), (*narrow, *kernel[2:])
        inputs, weight = (torch.ones(shape, device=device) for shape in shapes)
        return inputs, weight

    @property
    def groups(self) -> int:
        """Groups of the convolution; a blockwise one has lost some."""
        groups: int = self.call.options[5]
        return (self.outputs * groups //
                self.call.kernel[0] if self.blockwise else groups)

    def __call__(self, inputs: Tensor, weight: Tensor) -> Tensor:
        """Run the layer once."""
        if not self.call.options:
            return F.linear(inputs, weight)
        return torch.ops.aten.convolution(inputs, weight, None,
                                          *self.call.options[:5], self.groups)
