"""Copies of models with random weights, with which errors become visible.

The initial weights of a training hide errors: biases are zero, layer scales
are 1e-6 and norms are the identity.
"""
from __future__ import annotations

from typing import Any, Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from ..analysis.tracer import copy_model

# Sizes of the weights to try, in this order: the largest one with which the
# outputs are finite shows errors best.
_GAINS = (1., 0.5, 0.25, 0.1)
# Offset between the starts of two kernels in the same memory. It is a prime,
# so that no row of one kernel is a row of another.
_SHIFT = 1009
# Positions over which the mean of a channel is taken, at least.
_LEAST_POSITIONS = 8
# Layers whose channels lie on the last axis of their output.
_LAST_AXIS = (nn.Linear, nn.LayerNorm)


def copy_with_random_weights(model: nn.Module,
                             run: Callable[[nn.Module], Any]) -> nn.Module:
    """Copy a model to the CPU, in the default dtype, with random weights.

    The weights are as large as finite outputs allow. Kernels share memory
    (see :func:`randomise_`), so the copy must not be trained.

    Args:
        model (nn.Module): The model, which stays unchanged.
        run (Callable[[nn.Module], Any]): Function that runs the copy and
            returns its outputs.
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
    """Fill all parameters with random numbers of order ``gain``, in place.

    Kernels with the same number of inputs are overlapping views of the same
    memory, which makes it fast to fill a large model. Biases have both signs:
    otherwise all features would be nearly equal, and their differences would
    be lost in rounding where they are normalised or compared.
    """
    kernels: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            continue
        if sum(size > 1 for size in parameter.shape) > 1:
            # A parameter (1, N, C) holds N tokens, each with its own inputs.
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
    _fill_(kernels, gain)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            if module.running_mean is not None:
                module.running_mean.normal_(0, 0.1)
            if module.running_var is not None:
                module.running_var.uniform_(0.5, 1.5)
    return model


def _fill_(kernels: dict[float, list[nn.Parameter]], gain: float) -> None:
    """Fill kernels with numbers of variance ``gain^2 / inputs``, in place.

    Args:
        kernels (dict[float, list[nn.Parameter]]): Kernels by their number of
            inputs.
        gain (float): See :func:`randomise_`.
    """
    everything = [one for group in kernels.values() for one in group]
    if not everything:
        return
    # Drawn once, because that takes longer than to scale the numbers.
    drawn = everything[0].new_empty(
        max(one.numel() for one in everything) +
        _SHIFT * len(everything)).normal_(0, gain)
    start = 0
    for inputs, parameters in kernels.items():
        longest = max(one.numel() for one in parameters)
        numbers = inputs**-0.5 * drawn[start:start + longest +
                                       _SHIFT * len(parameters)]
        for index, parameter in enumerate(parameters):
            first = _SHIFT * index
            parameter.data = numbers[first:first + parameter.numel()].view(
                parameter.shape)
        # No kernel begins where another one does.
        start += _SHIFT * len(parameters)


@torch.no_grad()
def centre_biases_(model: nn.Module, run: Callable[[], Any]) -> None:
    """Move the biases of a model with random weights in place, by one run.

    Features vary less behind each layer, while random biases stay as large.
    A narrow layer then often gives nothing but zeros behind its activation,
    and outputs are equal whatever is wrong in front of it. Here the mean of
    each channel is moved to within half a standard deviation of zero.

    Args:
        model (nn.Module): Model with random weights of its own.
        run (Callable[[], Any]): Function that runs the model or copies of it.
    """

    def centre(layer: Any) -> Callable[..., Any]:

        def after(module: Any, inputs: Any, output: Any) -> Any:
            axis = -1 if isinstance(layer, _LAST_AXIS) else 1
            if not isinstance(output, Tensor) or output.dim() < 2 or (
                    output.shape[axis] != len(layer.bias)):
                return output
            values = output.transpose(0, axis).flatten(1)
            # Few positions tell nothing about the spread of a channel.
            if values.shape[1] < _LEAST_POSITIONS:
                return output
            mean, spread = values.mean(1), values.std(1)
            shift = mean - mean.clamp(-spread / 2, spread / 2)
            layer.bias.data.sub_(shift.to(layer.bias))
            if module.bias is not layer.bias:
                module.bias.data.copy_(layer.bias)
            shape = [1] * output.dim()
            shape[axis] = -1
            return output - shift.reshape(shape)

        return after

    handles = [
        module.register_forward_hook(centre(module))
        for module in model.modules()
        if isinstance(bias := getattr(module, 'bias', None), nn.Parameter)
        and bias.dim() == 1
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
