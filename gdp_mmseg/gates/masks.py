"""Soft masks of SCP (Kang and Han, ICML 2020), as its official code has them.

The noise is a function of the step, so that it can be drawn again.
"""
from __future__ import annotations

import torch
from torch import Tensor


def drop_probability(phi: Tensor | float, threshold: Tensor,
                     sharpness: float) -> Tensor:
    """Probability that a channel is masked: sigma(k (Phi - c)).

    Args:
        phi (Tensor | float): Probability that the channel is deactivated.
        threshold (Tensor): c.
        sharpness (float): k.

    Examples:
        Even a channel that is never active is kept at times.

        >>> found = drop_probability(
        ...     torch.tensor([0.95, 1.]), torch.tensor(0.95), 20.)
        >>> [round(value, 4) for value in found.tolist()]
        [0.5, 0.7311]
    """
    return torch.sigmoid(sharpness * (phi - threshold))


def soft_mask(drop: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """Relaxed Bernoulli draw of a mask: 1 for a channel that is kept.

    Args:
        drop (Tensor): Probability that it is 0.
        uniform (Tensor): Numbers from (0, 1).
        temperature (float): T.

    Examples:
        >>> half = torch.tensor(0.5)
        >>> round(float(soft_mask(half, torch.tensor(0.25), 0.5)), 4)
        0.1
    """
    return torch.sigmoid((uniform.logit() - drop.logit()) / temperature)


def uniform_numbers(seed: Tensor, step: Tensor, count: int) -> Tensor:
    """Pseudorandom numbers ``(count,)`` from (0, 1), in double.

    They are a function of their arguments alone, so that a resumed training,
    another process or a repeated forward pass draws the same, on any device.

    Args:
        seed (Tensor): Scalar integer.
        step (Tensor): Scalar integer.
        count (int): Number of numbers.
    """
    places = torch.arange(count, device=seed.device)
    mixed = _mixed(_mixed(_mixed(seed) + step) + places)
    return (mixed.double() + 0.5) / 2**32


def _mixed(number: Tensor) -> Tensor:
    """Hash integers to 32 bits (a multiply-xorshift finaliser)."""
    number = number & 0xFFFFFFFF
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        number = ((number ^ number >> shift) * factor) & 0xFFFFFFFF
    return number ^ number >> 16
