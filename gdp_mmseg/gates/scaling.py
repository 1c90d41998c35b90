"""Inputs or kernel of a layer times the factors of its input channels.

A layer is linear in its inputs x and in its kernel W, so that it computes
conv(x g, W) = conv(x, W g). The smaller of the two tensors is multiplied:
deep layers have few positions and large kernels, early ones the opposite.

Letters: ``C`` channels on an axis of the tensor.
"""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Elements of a tensor that are worked on at once in the backward pass: they
# stay in the processor's cache. A GPU takes the whole tensor.
_CHUNK = 2**18
# Elements below which the plain product takes no longer.
_SMALL = 2**18


def scaled(tensor: Tensor,
           factors: Tensor,
           axis: int,
           neutral: bool = False,
           heeded: bool = True) -> Tensor:
    """Compute the product with factors, differentiable in both.

    Nothing but a layer may read the product, because its gradient is
    overwritten.

    Args:
        tensor (Tensor): Inputs or kernel of a layer. The product has their
            data type.
        factors (Tensor): ``(C,)``.
        axis (int): Axis of the tensor that has the ``C`` channels.
        neutral (bool): Whether all factors are 1, so that the product is the
            tensor itself.
        heeded (bool): Whether a gradient of the factors would be used. If
            not, it is zero.
    """
    axis %= tensor.dim()
    is_linked = factors.requires_grad
    if neutral and not is_linked:
        return tensor
    is_small = tensor.numel() < _SMALL and not neutral
    if (torch.compiler.is_compiling() or not tensor.requires_grad
            or (heeded and not is_linked)
            or (is_small and heeded == is_linked)):
        return (tensor * along(factors, tensor, axis)).to(tensor.dtype)
    product: Tensor = _Product.apply(tensor, factors, axis, neutral, heeded)
    return product


class _Product(torch.autograd.Function):

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, factors: Tensor, axis: int,
                neutral: bool, heeded: bool) -> Tensor:
        ctx.save_for_backward(factors, *[tensor] * heeded)
        ctx.axis, ctx.neutral = axis, neutral
        if neutral:
            return tensor.view_as(tensor)
        return torch.mul(
            tensor, along(factors, tensor, axis), out=torch.empty_like(tensor))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        factors, *seen = ctx.saved_tensors
        axis, dtype = ctx.axis, factors.dtype
        shaped = None if ctx.neutral else along(factors, gradient, axis)
        of_factors = torch.zeros_like(factors)
        if torch.is_grad_enabled():  # The gradient is differentiated again.
            if seen:
                of_factors = _sums(gradient, seen[0], axis, dtype)
            if shaped is not None:
                gradient = (gradient * shaped).to(gradient.dtype)
        elif seen:
            of_factors = _gradients_(gradient, seen[0], shaped, axis, dtype)
        elif shaped is not None:
            gradient *= shaped
        return gradient, of_factors, None, None, None


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
    return (gradient.to(dtype) * tensor.to(dtype)).sum(others)


def along(values: Tensor, tensor: Tensor, axis: int) -> Tensor:
    """Reshape ``(C,)`` so that it multiplies a tensor along an axis."""
    shape = [1] * tensor.dim()
    shape[axis] = -1
    return values.reshape(shape)
