"""Kernel times the factors of its inputs, with as few passes as possible.

Plain ``weight * factors`` writes the product, its gradient and a product for
the gradient of the factors into new memory in each step. The operating system
hands that memory out page by page, which takes longer than the arithmetic.

Letters: ``C`` channels on an axis of a kernel.
"""
from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

# Elements of a kernel that are worked on at once in the backward pass: they
# stay in the processor's cache. A GPU takes the whole kernel.
_CHUNK = 2**18


class Product:
    """Product of a kernel and its factors, whose memory is used again.

    The product is written where the last one was if that one has done its
    work, and into new memory if not: in a layer that runs twice before a
    backward pass, or if a graph is retained.
    """

    def __init__(self) -> None:
        self._memory: Tensor | None = None
        self._last: weakref.ref[Any] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy (an average of models, say) has memory of its own.
        return Product, ()

    def __call__(self,
                 weight: Tensor,
                 factors: Tensor,
                 axis: int,
                 neutral: bool = False,
                 heeded: bool = True) -> Tensor:
        """Compute the product, differentiable in both.

        Args:
            weight (Tensor): Kernel.
            factors (Tensor): ``(C,)``.
            axis (int): Axis of the kernel that has the ``C`` channels.
            neutral (bool): Whether all factors are 1, so that the product is
                the kernel itself.
            heeded (bool): Whether the gradient of the factors is used. If
                not, it is zero.
        """
        if torch.compiler.is_compiling() or weight.requires_grad != (
                factors.requires_grad):
            return weight * along(factors, weight, axis)
        memory = None if neutral else self
        product: Tensor = _Product.apply(weight, factors, axis, memory, heeded)
        return product

    def memory(self, like: Tensor) -> Tensor:
        """Memory of the shape of a kernel that nothing else needs."""
        # PyTorch keeps the memory of a GPU itself. There a product that is
        # cast to half precision is needed no longer than that.
        if like.device.type != 'cpu' or self._in_use():
            return torch.empty_like(like)
        memory = self._memory
        if (memory is None or memory.shape != like.shape
                or memory.dtype != like.dtype or memory.device != like.device
                or memory.stride() != like.stride()):
            memory = self._memory = torch.empty_like(like)
        # Each user has a tensor of its own, with the history of its own.
        return memory.detach()

    def use_(self, context: Any) -> None:
        """Note the graph that needs the product until its backward pass."""
        if not self._in_use():
            self._last = weakref.ref(context)

    def _in_use(self) -> bool:
        """Tell whether a backward pass may still need the last product."""
        context = None if self._last is None else self._last()
        if context is None:
            return False
        try:
            return bool(context.saved_tensors)
        except RuntimeError:  # The backward pass has released them.
            return False


class _Product(torch.autograd.Function):

    @staticmethod
    def forward(ctx: Any, weight: Tensor, factors: Tensor, axis: int,
                memory: Product | None, heeded: bool) -> Tensor:
        ctx.save_for_backward(weight, factors)
        ctx.axis, ctx.heeded, ctx.neutral = axis, heeded, memory is None
        if memory is None:
            return weight.view_as(weight)
        product = memory.memory(weight.detach())
        torch.mul(weight, along(factors, weight, axis), out=product)
        memory.use_(ctx)
        return product

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        weight, factors = ctx.saved_tensors
        axis = ctx.axis
        shaped = None if ctx.neutral else along(factors, weight, axis)
        if torch.is_grad_enabled():  # The gradient is differentiated again.
            of_factors = (gradient * weight).sum(_others(weight, axis))
            if shaped is not None:
                gradient = gradient * shaped
        elif ctx.heeded:
            of_factors = _gradients_(gradient, weight, shaped, axis)
        else:
            of_factors = torch.zeros_like(factors)
            if shaped is not None:
                gradient *= shaped
        return gradient, of_factors, None, None, None


def _gradients_(gradient: Tensor, weight: Tensor, shaped: Tensor | None,
                axis: int) -> Tensor:
    """Turn the gradient of a product into that of its kernel, in place.

    Only the layer reads the product, so that nothing else uses its gradient.

    Args:
        gradient (Tensor): Gradient of the product.
        weight (Tensor): Kernel.
        shaped (Tensor, optional): Factors in a shape that multiplies the
            kernel; None if all are 1.
        axis (int): Axis of the kernel that has the ``C`` channels.

    Returns:
        Tensor: ``(C,)`` gradient of the factors.
    """
    if weight.device.type != 'cpu' or axis != 1 or not weight.numel():
        of_factors = (gradient * weight).sum(_others(weight, axis))
        if shaped is not None:
            gradient *= shaped
        return of_factors
    rows = max(min(_CHUNK // weight[0].numel(), len(weight)), 1)
    products = torch.empty_like(weight[:rows])
    sums = torch.zeros_like(weight[0])
    for start in range(0, len(weight), rows):
        part = gradient[start:start + rows]
        sums += torch.mul(
            part, weight[start:start + rows], out=products[:len(part)]).sum(0)
        if shaped is not None:
            part *= shaped
    return sums.reshape(weight.shape[axis], -1).sum(1)


def _others(weight: Tensor, axis: int) -> list[int]:
    """Axes of a kernel but for one."""
    return [other for other in range(weight.dim()) if other != axis]


def along(values: Tensor, kernel: Tensor, axis: int) -> Tensor:
    """Reshape ``(C,)`` so that it multiplies a kernel along an axis."""
    shape = [1] * kernel.dim()
    shape[axis] = -1
    return values.reshape(shape)


class _Fixed(torch.autograd.Function):
    """Factors that do not move."""

    @staticmethod
    def forward(ctx: Any, theta: Tensor, factors: Tensor) -> Tensor:
        ctx.save_for_backward(theta)
        return factors.view_as(factors)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Any, ...]:
        theta, = ctx.saved_tensors
        return torch.zeros_like(theta), None


def fixed(theta: Tensor, factors: Tensor) -> Tensor:
    """Return factors that do not move, with a gradient of zero for theta.

    Wrappers of several processes wait for the gradient of each parameter.
    """
    found: Tensor = _Fixed.apply(theta, factors)
    return found
