"""Running means of the gain of opening a gate.

Letters: ``G`` gates, one for each class of channels (see ``analysis``).
"""
from __future__ import annotations

import torch
from torch import Tensor

from .base import GateMethod

# Lower bound of a divisor: it only prevents overflow.
_LEAST_SLOPE = 1e-12


class GainMethod(GateMethod):
    """Base class of the methods that weigh the gain of a gate, dL/dg.

    Args:
        num_gates (int): ``G``.
        betas (tuple[float, float]): Decay rates of the two means.

    Attributes:
        gain (Tensor): ``(G,)`` running mean of dL/dg, negative where opening
            the gate lowers the loss.
        gain_square (Tensor): ``(G,)`` running mean of its square.
        observed (Tensor): Scalar, number of gradients in the means.
    """

    gain: Tensor
    gain_square: Tensor
    observed: Tensor

    def __init__(
        self, num_gates: int, betas: tuple[float,
                                           float] = (0.9, 0.99)) -> None:
        super().__init__(num_gates)
        self.betas = betas
        self.register_buffer('gain', torch.zeros(num_gates))
        self.register_buffer('gain_square', torch.zeros(num_gates))
        self.register_buffer('observed', torch.tensor(0))

    def observe_gain_(self, slope: Tensor) -> Tensor:
        """Update the running means by the gradient of theta, in place.

        Args:
            slope (Tensor): ``(G,)`` derivative dg/dtheta, which the gradient
                is divided by. A gate of slope 0 has no gain.

        Returns:
            Tensor: Scalar bool, False if the gradient is not finite. A single
            nan or inf would stay in the means for good.

        Raises:
            RuntimeError: If theta has no gradient.
        """
        gradient = self.gradient()
        gain = torch.where(slope > 0, gradient / slope.clamp(min=_LEAST_SLOPE),
                           torch.zeros_like(slope))
        square = gain * gain
        mean_decay, square_decay = self.betas
        self.gain.lerp_(gain, 1 - mean_decay)
        self.gain_square.lerp_(square, 1 - square_decay)
        self.observed += 1
        return square.isfinite().all()

    def mean_gains(self) -> tuple[Tensor, Tensor]:
        """Mean and mean square ``(G,)`` of the gain.

        The running means begin at zero, and this undoes the bias of it.
        """
        means = []
        for running, decay in zip((self.gain, self.gain_square), self.betas):
            begun = 1 - torch.full_like(
                self.multiplier, decay, dtype=torch.double)**self.observed
            means.append(running / begun)
        return means[0], means[1]
