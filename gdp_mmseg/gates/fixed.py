"""Factors of gates that do not move."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Fixed(torch.autograd.Function):
    """Factors that do not move, with a gradient of zero for theta.

    Wrappers of several processes wait for the gradient of each parameter.
    """

    @staticmethod
    def forward(ctx: Any, theta: Tensor, factors: Tensor) -> Tensor:
        ctx.save_for_backward(theta)
        return factors.view_as(factors)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Any, ...]:
        theta, = ctx.saved_tensors
        return torch.zeros_like(theta), None
