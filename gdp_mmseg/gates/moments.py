"""Moments of correlated channels, by which some are estimated from others.

Letters: ``c`` channels, ``n`` positions.
"""
from __future__ import annotations

import math
from typing import Any, NamedTuple

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
# What stands for a correlation of 1.
_ONE = 2**15 - 1


class Known(NamedTuple):
    """Means and covariance of channels, in little memory.

    Correlations are in [-1, 1], and 16 bits of a whole number round them by
    at most 1.6e-5. Whatever the channels are, that is less than the share of
    variance that is added to 256 of them, so a covariance stays positive.

    Args:
        mean (Tensor): ``(c,)``.
        deviation (Tensor): ``(c,)`` standard deviations.
        correlations (Tensor): ``(c (c - 1) / 2,)`` int16, the lower triangle
            of the correlations, times :data:`_ONE`.
    """
    mean: Tensor
    deviation: Tensor
    correlations: Tensor

    @classmethod
    def zeros(cls, size: int, dtype: torch.dtype) -> Known:
        """Make that of ``size`` channels that are zero."""
        return cls(
            torch.zeros(size, dtype=dtype), torch.zeros(size, dtype=dtype),
            torch.zeros(size * (size - 1) // 2, dtype=torch.int16))

    def set_(self, mean: Tensor, covariance: Tensor) -> None:
        """Keep a mean ``(c,)`` and a covariance ``(c, c)``, in place.

        New tensors would be scattered over the memory of a training.
        """
        self.mean.copy_(mean)
        self.deviation.copy_(covariance.diagonal().clamp(min=0).sqrt())
        # Channels that are constant are correlated with none.
        products = torch.outer(
            self.deviation,
            self.deviation).clamp_(min=torch.finfo(mean.dtype).tiny)
        correlations = (covariance / products).clamp_(-1, 1).mul_(_ONE)
        torch.take(
            correlations.round_().to(torch.int16),
            _triangle(len(mean), -1),
            out=self.correlations)

    @classmethod
    def of_moments(cls, moments: Tensor) -> Known:
        """Keep means of products of a constant 1 and the channels.

        Args:
            moments (Tensor): ``((c + 1) (c + 2) / 2,)`` lower triangle of
                their matrix, of which the constant is the first row. Earlier
                versions kept these.
        """
        size = (math.isqrt(8 * len(moments) + 1) - 1) // 2
        half = moments.new_zeros(size, size).put_(_triangle(size, 0), moments)
        mean, products = half[1:, 0], half[1:, 1:]
        known = cls.zeros(size - 1, moments.dtype)
        known.set_(mean,
                   products + products.tril(-1).T - torch.outer(mean, mean))
        return known

    def moments(self) -> Tensor:
        """Undo :meth:`of_moments`."""
        matrix = functional.pad(self.covariance(self.mean.dtype), (1, 0, 1, 0))
        mean = functional.pad(self.mean, (1, 0), value=1)
        matrix += torch.outer(mean, mean)
        return matrix.take(_triangle(len(mean), 0))

    def covariance(self, dtype: torch.dtype) -> Tensor:
        """Covariance ``(c, c)`` in a data type."""
        size, deviation = len(self.mean), self.deviation.to(dtype)
        half = torch.zeros(size, size, dtype=torch.int16)
        half.put_(_triangle(size, -1), self.correlations)
        correlations = (half + half.T).to(dtype).div_(_ONE).fill_diagonal_(1)
        return correlations.mul_(torch.outer(deviation, deviation))


def _triangle(size: int, offset: int) -> Tensor:
    """Places of the lower triangle in the entries of a square matrix."""
    rows, columns = torch.tril_indices(size, size, offset)
    return rows.mul_(size).add_(columns)


class Moments:
    """Channels that tell each other, and what is known of them.

    Args:
        channels (Tensor): ``(c,)`` their places among those that a layer
            reads.

    Attributes:
        known (Known | None): Running means; None before anything was
            observed. They are in main memory, because few steps use them.
    """

    def __init__(self, channels: Tensor) -> None:
        self.channels = channels
        self.known: Known | None = None

    def observe_(self, inputs: Tensor, factors: Tensor, rows: Tensor) -> None:
        """Average with the moments of channels at positions, in place.

        Args:
            inputs (Tensor): ``(n, k)`` ``k`` of the channels at positions,
                times their factors. They are overwritten.
            factors (Tensor): ``(k,)``, none of them zero.
            rows (Tensor): ``(k,)`` places of these channels in the block, on
                the CPU.
        """
        inputs = inputs.to(factors)
        mean = inputs.mean(0)
        inputs -= mean
        covariance = (inputs.T @ inputs / len(inputs)).div_(
            torch.outer(factors, factors))
        found = torch.cat(((mean / factors)[None], covariance)).cpu()
        # Inputs that are not finite teach nothing.
        if found.isfinite().all():
            self._average_(found[0], found[1:], rows)

    def _average_(self, mean: Tensor, covariance: Tensor,
                  rows: Tensor) -> None:
        """Average with a mean ``(k,)`` and a covariance, in place."""
        weight = 1 - _KEPT
        if self.known is None:
            self.known = Known.zeros(len(self.channels), mean.dtype)
            weight = 1.
        all_mean = self.known.mean.clone()
        whole = self.known.covariance(mean.dtype)
        at = rows[:, None], rows
        step = mean - all_mean[rows]
        all_mean[rows] += weight * step
        # Means that differ add to the variance of both together.
        whole[at] = whole[at].lerp(covariance, weight).addr_(
            step, step, alpha=weight * (1 - weight))
        self.known.set_(all_mean, whole)

    def agree_(self, like: Tensor) -> None:
        """Take the mean of what all processes know, in place.

        Args:
            like (Tensor): Any tensor with the device and the data type.
        """
        if not has_processes():
            return
        number = like.new_ones(1)
        # A layer may not have run in this process.
        if self.known is None:
            number = like.new_zeros(1)
            size = len(self.channels) + 1
            moments = like.new_zeros(size * (size + 1) // 2)
        else:
            moments = self.known.moments().to(like)
        dist.all_reduce(moments)
        dist.all_reduce(number)
        self.known = Known.of_moments((moments / number.clamp(min=1)).cpu())

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
        assert self.known is not None
        mean = self.known.mean.double()
        covariance = self.known.covariance(torch.double)
        if not is_centred:
            covariance += torch.outer(mean, mean)
            mean = torch.zeros_like(mean)
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
