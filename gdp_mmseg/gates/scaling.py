"""Layers whose inputs or kernel are multiplied by factors of channels.

A layer is linear in its inputs x and in its kernel W, so that it computes
conv(x g, W) = conv(x, W g). The smaller of the two tensors is multiplied:
deep layers have few positions and large kernels, early ones the opposite.

Letters: ``C`` channels on an axis of the tensor.
"""
from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .operators import Convolution, Matrix, Operator, Plain

# Elements of a tensor that are worked on at once in the backward pass: they
# stay in the processor's cache. A GPU takes the whole tensor.
_CHUNK = 2**18
# Elements below which the plain product takes no longer.
_SMALL = 2**18


class Scaling(NamedTuple):
    """Tensor of a layer that factors ``(C,)`` multiply, and how.

    Args:
        of_inputs (bool): Whether it is the inputs, else the kernel.
        axis (int): Axis of the tensor that has the ``C`` channels.
        neutral (bool): Whether all factors are 1, so that the product is the
            tensor itself.
        heeded (bool): Whether a gradient of the factors would be used. If
            not, it may be zero.
    """
    of_inputs: bool
    axis: int
    neutral: bool = False
    heeded: bool = True


def run(operator: Operator | Plain, inputs: Tensor, weight: Tensor,
        bias: Tensor | None, factors: Tensor, scaling: Scaling) -> Tensor:
    """Compute the outputs of a layer, differentiable in all tensors.

    No product of a large tensor is kept for the backward pass.

    Args:
        operator (Operator | Plain): Operator of the layer. A plain function
            does not compute its gradients, so the product is kept.
        inputs (Tensor): Inputs of the layer; of a convolution, a batch.
        weight (Tensor): Kernel.
        bias (Tensor, optional): Bias.
        factors (Tensor): ``(C,)``.
        scaling (Scaling): What the factors multiply.
    """
    tensor = inputs if scaling.of_inputs else weight
    if scaling.neutral and not factors.requires_grad:
        return operator(inputs, weight, bias)
    is_large = scaling.neutral or tensor.numel() >= _SMALL
    if (is_large and tensor.requires_grad
            and isinstance(operator, (Convolution, Matrix))
            and not torch.compiler.is_compiling()):
        # Autocast does so, too: what is kept for the backward pass is cast.
        dtype = output_type(inputs)
        outputs: Tensor = _Gated.apply(
            inputs.to(dtype), weight, None if bias is None else bias.to(dtype),
            factors, operator, scaling)
        return outputs
    return operator(*_multiplied(inputs, weight, factors, scaling, None), bias)


def output_type(inputs: Tensor) -> torch.dtype:
    """Data type of a layer's outputs, which autocast may choose."""
    device = inputs.device.type
    if torch.is_autocast_enabled(device) and inputs.dtype != torch.double:
        return torch.get_autocast_dtype(device)
    return inputs.dtype


def _multiplied(inputs: Tensor, weight: Tensor, factors: Tensor,
                scaling: Scaling,
                dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """Multiply the inputs or the kernel of a layer by factors.

    Args:
        inputs (Tensor): Inputs.
        weight (Tensor): Kernel.
        factors (Tensor): ``(C,)``.
        scaling (Scaling): What the factors multiply.
        dtype (torch.dtype, optional): Data type of the results. Defaults to
            that of each tensor.

    Returns:
        tuple[Tensor, Tensor]: Inputs and kernel.
    """
    tensors = [inputs, weight]
    place = 0 if scaling.of_inputs else 1
    tensor = tensors[place]
    if not scaling.neutral:
        shaped = along(factors, tensor, scaling.axis)
        if torch.is_grad_enabled():
            tensors[place] = (tensor * shaped).to(dtype or tensor.dtype)
        else:
            tensors[place] = torch.mul(
                tensor, shaped, out=torch.empty_like(tensor, dtype=dtype))
    inputs, weight = (one.to(dtype or one.dtype) for one in tensors)
    return inputs, weight


class _Gated(torch.autograd.Function):

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None,
                factors: Tensor, operator: Operator,
                scaling: Scaling) -> Tensor:
        ctx.save_for_backward(inputs, weight, factors)
        ctx.operator, ctx.scaling = operator, scaling
        return operator(
            *_multiplied(inputs, weight, factors, scaling, inputs.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        inputs, weight, factors = ctx.saved_tensors
        scaling: Scaling = ctx.scaling
        *wanted, is_linked = ctx.needs_input_grad[:4]
        found = list(
            ctx.operator.gradients(
                gradient,
                *_multiplied(inputs, weight, factors, scaling, inputs.dtype),
                wanted))
        place = 0 if scaling.of_inputs else 1
        tensor = (inputs, weight)[place]
        product: Tensor = found[place].to(tensor.dtype)
        axis, dtype = scaling.axis % tensor.dim(), factors.dtype
        shaped = None if scaling.neutral else along(factors, tensor, axis)
        of_factors = torch.zeros_like(factors) if is_linked else None
        is_seen = is_linked and scaling.heeded
        if torch.is_grad_enabled():  # The gradient is differentiated again.
            if is_seen:
                of_factors = _sums(product, tensor, axis, dtype)
            if shaped is not None:
                product = (product * shaped).to(product.dtype)
        elif is_seen:
            of_factors = _gradients_(product, tensor, shaped, axis, dtype)
        elif shaped is not None:
            product *= shaped
        found[place] = product
        return *found, of_factors, None, None


def _gradients_(gradient: Tensor, tensor: Tensor, shaped: Tensor | None,
                axis: int, dtype: torch.dtype) -> Tensor:
    """Turn the gradient of a product into that of its tensor, in place.

    Args:
        gradient (Tensor): Gradient of the product.
        tensor (Tensor): Inputs or kernel.
        shaped (Tensor, optional): Factors in a shape that multiplies the
            tensor; None if all are 1.
        axis (int): Axis of the tensor that has the ``C`` channels.
        dtype (torch.dtype): Data type of the factors.

    Returns:
        Tensor: ``(C,)`` gradient of the factors.
    """
    if tensor.device.type != 'cpu' or axis != 1 or tensor.numel() <= _CHUNK:
        of_factors = _sums(gradient, tensor, axis, dtype)
        if shaped is not None:
            gradient *= shaped
        return of_factors
    rows = max(min(_CHUNK // tensor[0].numel(), len(tensor)), 1)
    products = torch.empty_like(tensor[:rows], dtype=dtype)
    sums = torch.zeros_like(tensor[0], dtype=dtype)
    for start in range(0, len(tensor), rows):
        part = gradient[start:start + rows]
        sums += torch.mul(
            part.to(dtype),
            tensor[start:start + rows].to(dtype),
            out=products[:len(part)]).sum(0)
        if shaped is not None:
            part *= shaped
    return sums.reshape(tensor.shape[axis], -1).sum(1)


def _sums(gradient: Tensor, tensor: Tensor, axis: int,
          dtype: torch.dtype) -> Tensor:
    """Sum the products of two tensors for each channel: ``(C,)``."""
    others = [other for other in range(tensor.dim()) if other != axis]
    products = gradient.to(dtype) * tensor.to(dtype)
    # A sum over no axis would be one over all.
    return products.sum(others) if others else products


def along(values: Tensor, tensor: Tensor, axis: int) -> Tensor:
    """Reshape ``(C,)`` so that it multiplies a tensor along an axis."""
    shape = [1] * tensor.dim()
    shape[axis] = -1
    return values.reshape(shape)
