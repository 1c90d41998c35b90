"""Outputs of models that can be compared: same random numbers, same state."""
from __future__ import annotations

import math
from typing import Sequence

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..analysis.tracer import Forward, copy_model, fixed_seeds, set_mode_

# Largest difference of the outputs of a gated and a pruned model, relative to
# the largest output, in single precision.
TOLERANCE = 1e-4


@torch.no_grad()
def outputs_of(model: nn.Module,
               forward: Forward,
               inputs: Tensor,
               training: bool = False,
               shared: object = None) -> list[Tensor]:
    """Run a copy of a model with fixed seeds and return all output tensors.

    The copy has buffers, attributes and parameters without gradients of its
    own, so that a forward which writes into them, for example into an averaged
    copy of the weights, starts from the same state in each run. The other
    parameters are shared with the model.

    Args:
        model (nn.Module): The model, which stays unchanged.
        forward (Forward): Function of the copy and the inputs.
        inputs (Tensor): ``(N, C, H, W)``.
        training (bool): Whether the copy is in training mode (see
            :func:`gdp_mmseg.analysis.tracer.set_mode_`).
        shared (object, optional): Object that the copy shares with the model.
    """

    def with_own_state(tensor: Tensor) -> Tensor:
        trained = isinstance(tensor, nn.Parameter) and tensor.requires_grad
        return tensor if trained else tensor.clone()

    running = copy_model(model, with_own_state, (shared, ))
    with fixed_seeds():
        set_mode_(running, training)
        outputs = tree_leaves(forward(running, inputs))
    return [leaf for leaf in outputs if isinstance(leaf, Tensor)]


def largest_difference(got: Sequence[Tensor],
                       wanted: Sequence[Tensor]) -> float:
    """Return the largest difference, relative to the largest number.

    Each output is scaled by the largest number in it. The difference is
    infinite where the outputs differ in number or shape, or one is nan.

    Args:
        got (Sequence[Tensor]): Outputs to test.
        wanted (Sequence[Tensor]): Outputs to compare with, which give the
            scale.
    """
    if len(got) != len(wanted):
        return math.inf
    worst = 0.
    for found, expected in zip(got, wanted):
        if found.shape != expected.shape:
            return math.inf
        if found.is_floating_point() and found.numel():
            scale = float(expected.abs().max()) or 1.
            difference = float((found - expected).abs().max()) / scale
            # A comparison with nan is false, and max() would drop it.
            worst = max(worst, difference) if difference >= 0 else math.inf
    return worst


def first_line(error: BaseException) -> str:
    """Name the type of an error and the first line of its message."""
    line = str(error).partition('\n')[0][:200]
    return f'{type(error).__name__}: {line}'
