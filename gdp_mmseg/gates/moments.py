"""Moments of correlated channels, by which some are estimated from others.

Letters: ``c`` channels, ``n`` positions.
"""
from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from .base import has_processes

# Share of the mean variance of the channels that is added to each of them,
# because the covariance is an estimate.
_RIDGE = 0.01
# Lower bound of that: it only prevents a division by zero.
_LEAST_RIDGE = 1e-12
# About as many positions of a batch are taken into account.
_POSITIONS = 4096
# Share of what was known that stays when a batch is observed: a single one
# tells too little of channels that are only seen at few positions.
_KEPT = 0.7


class Moments:
    """Channels that tell each other, and what is known of them.

    Args:
        channels (Tensor): ``(c,)`` their places among those that a layer
            reads.

    Attributes:
        values (Tensor | None): ``((c + 1) (c + 2) / 2,)`` running means of
            the products of a constant 1 and the channels with each other, so
            of the channels themselves, too: the lower triangle of a matrix
            that is symmetric. None before anything was observed. They are in
            main memory, because few steps use them.
    """

    def __init__(self, channels: Tensor) -> None:
        self.channels = channels
        self.values: Tensor | None = None

    def observe_(self, inputs: Tensor, factors: Tensor, rows: Tensor) -> None:
        """Average with the moments of channels at positions, in place.

        Args:
            inputs (Tensor): ``(n, k)`` ``k`` of the channels at positions,
                times their factors.
            factors (Tensor): ``(k,)``, none of them zero.
            rows (Tensor): ``(k,)`` places of these channels in the block, on
                the CPU.
        """
        inputs = functional.pad(inputs.to(factors), (1, 0), value=1)
        scale = functional.pad(factors, (1, 0), value=1)
        found = (inputs.T @ inputs / len(inputs)).div_(
            torch.outer(scale, scale)).cpu()
        weight = 1. if self.values is None else 1 - _KEPT
        matrix = self._matrix(found.dtype)
        places = functional.pad(rows + 1, (1, 0))
        at = places[:, None], places
        # Inputs that are not finite teach nothing.
        finite = found.isfinite().all()
        matrix[at] = matrix[at].lerp(
            found.nan_to_num(0, 0, 0), weight * finite.to(found))
        self.values = matrix[tuple(self._triangle())]

    def _triangle(self) -> Tensor:
        """Rows and columns of the lower triangle of the matrix."""
        size = len(self.channels) + 1
        return torch.tril_indices(size, size)

    def _matrix(self, dtype: torch.dtype) -> Tensor:
        """Matrix ``(c + 1, c + 1)`` of what is known; zero if nothing is."""
        size = len(self.channels) + 1
        matrix = torch.zeros(size, size, dtype=dtype)
        if self.values is not None:
            rows, columns = self._triangle()
            values = self.values.to(dtype)
            matrix[rows, columns] = matrix[columns, rows] = values
        return matrix

    def agree_(self, like: Tensor) -> None:
        """Take the mean of what all processes know, in place.

        Args:
            like (Tensor): Any tensor with the device and the data type.
        """
        if not has_processes():
            return
        number = like.new_ones(1)
        # A layer may not have run in this process.
        if self.values is None:
            number = like.new_zeros(1)
            values = like.new_zeros(self._triangle().shape[1])
        else:
            values = self.values.to(like)
        dist.all_reduce(values)
        dist.all_reduce(number)
        self.values = (values / number.clamp(min=1)).cpu()

    def estimate(self, ours: Tensor, others: Tensor, is_centred: bool,
                 like: Tensor) -> tuple[Tensor, Tensor]:
        """Estimate ``k`` channels by ``s`` others.

        Args:
            ours (Tensor): ``(k,)`` places of the channels in the block.
            others (Tensor): ``(s,)`` places of the others.
            is_centred (bool): Whether the estimate has a constant.
            like (Tensor): Any tensor with the device and the data type of the
                results.

        Returns:
            tuple[Tensor, Tensor]: Coefficients ``(k, s)`` and constants
            ``(k,)``.
        """
        assert self.values is not None
        moments = self._matrix(torch.double)
        mean = moments[1:, 0] * is_centred
        covariance = moments[1:, 1:] - torch.outer(mean, mean)
        inner = covariance[others[:, None], others]
        inner.diagonal().add_(_RIDGE * inner.diagonal().mean() + _LEAST_RIDGE)
        factor, failed = torch.linalg.cholesky_ex(inner)
        coefficients = torch.cholesky_solve(covariance[others[:, None], ours],
                                            factor).T
        # Rounding may have made it no covariance: nothing is taken over.
        coefficients = coefficients.masked_fill(failed > 0, 0)
        constant = (mean[ours] - coefficients @ mean[others]).to(like)
        coefficients = coefficients.to(like).contiguous()
        if has_processes():
            # Solutions of other processors may differ in the last bit.
            dist.broadcast(coefficients, 0)
            dist.broadcast(constant, 0)
        return coefficients, constant


def spread(inputs: Tensor, layer: Any) -> Tensor:
    """Select positions ``(..., C)`` of a layer's inputs, evenly spaced.

    Args:
        inputs (Tensor): ``(N, C, H, W)`` of a convolution of two dimensions,
            ``(..., C)`` of a linear layer.
        layer (nn.Module): The layer.

    Returns:
        Tensor: A view of the inputs.
    """
    if isinstance(layer, nn.Linear):
        inputs = inputs.flatten(0, -2)
        return inputs[::math.ceil(len(inputs) / _POSITIONS)]
    axes = len(layer.kernel_size)
    inputs = inputs.movedim(-1 - axes, -1)
    number = math.prod(inputs.shape[:-1])
    stride = math.ceil((number / _POSITIONS)**(1 / axes))
    return inputs[(..., ) + (slice(None, None, stride), ) * axes +
                  (slice(None), )]
