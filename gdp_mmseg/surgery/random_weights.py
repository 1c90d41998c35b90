"""Copies of models with random weights, under which errors show.

The weights of a model at the start of a training hide them: zero biases,
layer scales of 1e-6, norms that are the identity.
"""
from __future__ import annotations

from typing import Any, Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from ..analysis.tracer import copy_model

_GAINS = (1., 0.5, 0.25, 0.1)
# Numbers between the starts of two kernels in the same memory; a prime, so
# that no row of the one is a row of the other.
_SHIFT = 1009


def copy_with_random_weights(model: nn.Module,
                             run: Callable[[nn.Module], Any]) -> nn.Module:
    """A copy on the CPU, as lively as it bears, in the default dtype.

    Its kernels share memory (see :func:`randomise_`): it is never to be
    trained.

    Args:
        model (nn.Module): Left as it is.
        run (Callable[[nn.Module], Any]): Its outputs on some input.
    """

    def converted(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor.detach().to('cpu', copy=True)
        if isinstance(tensor, nn.Parameter):
            return torch.zeros(()).expand(tensor.shape)  # takes no memory
        return tensor.detach().to('cpu', torch.get_default_dtype(), copy=True)

    random_copy = copy_model(model, converted)
    for gain in _GAINS:
        randomise_(random_copy, gain)
        if all(leaf.isfinite().all() for leaf in tree_leaves(run(random_copy))
               if isinstance(leaf, Tensor)):
            break
    return random_copy


@torch.no_grad()
def randomise_(model: nn.Module, gain: float = 1.) -> nn.Module:
    """Random numbers of order ``gain`` for all that is learnt, in place.

    Kernels of as many inputs lie in the same memory, each a bit further on:
    that of a large model is little, and quickly filled. Biases have both
    signs, or all features would be about the same, and what is normalised or
    compared later be lost in rounding.
    """
    kernels: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            continue
        if sum(size > 1 for size in parameter.shape) > 1:
            # Of tokens (1, N, C) each is one.
            tokens = parameter.dim() == 3 and len(parameter) == 1
            inputs = parameter.numel() / parameter.shape[int(tokens)]
            kernels.setdefault(inputs, []).append(parameter)
            continue
        parameter.data = torch.empty_like(
            parameter, memory_format=torch.contiguous_format)
        if name.endswith('bias'):
            parameter.data.normal_(0, 0.5 * gain)
        else:
            parameter.data.uniform_(0.5 * gain, 1.5 * gain)
    for inputs, parameters in kernels.items():
        longest = max(parameter.numel() for parameter in parameters)
        numbers = parameters[0].new_empty(longest + _SHIFT * len(parameters))
        numbers.normal_(0, gain * inputs**-0.5)
        for index, parameter in enumerate(parameters):
            start = _SHIFT * index
            parameter.data = numbers[start:start + parameter.numel()].view(
                parameter.shape)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            if module.running_mean is not None:
                module.running_mean.normal_(0, 0.1)
            if module.running_var is not None:
                module.running_var.uniform_(0.5, 1.5)
    return model
