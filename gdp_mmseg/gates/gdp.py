"""GDP: gates with differentiable polarization.

Openness is formula (1) of "GDP: Stabilized Neural Network Pruning via Gates
with Differentiable Polarization" (ICCV 2021). The step that moves the gates is
this project's own, because the paper's optimiser is not public.

Letters: ``G`` gates, one for each class of channels (see ``analysis``).
"""
from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .base import CostFunction
from .blocks import Blocks
from .gains import GainMethod
from .multiplier import first_guess, held_cost, solve_multiplier

# Weight of the root mean square of dL/dg in the gain of an open gate. Once the
# weights have settled, the mean of dL/dg is about zero, and only its square
# tells what closing costs. 0.3 was chosen once and is not tuned per network.
_RMS_SHARE = 0.3
# Gates that move by less than these ways in a step, and the halvings of the
# search for the multiplier. The shorter the way, the less a multiplier counts
# that changes by magnitudes and is not found exactly: the next step, which
# searches around it, makes up for that.
_HALVINGS = ((0.002, 7), (0.02, 10), (math.inf, 15))
# Lower bound of a mean square that divides: it only prevents 0 / 0.
_LEAST_NOISE = 1e-38


def openness(theta: Tensor, epsilon: Tensor | float) -> Tensor:
    """Smoothed L0 norm of ``theta``, element by element, scaled to 1 at 1.

    Source: GDP (ICCV 2021), section 3: theta^2 / (theta^2 + epsilon). The
    factor 1 + epsilon is ours: a gate at theta = 1 then changes nothing,
    whatever epsilon is, so a network with fresh gates computes what it did
    without gates.

    Args:
        theta (Tensor): Any shape, in [0, 1].
        epsilon (Tensor | float): Positive; the smaller, the harder the gate.

    Returns:
        Tensor: Values in [0, 1] in the shape of ``theta``; exactly 0 only at
        theta = 0.

    Examples:
        >>> openness(torch.tensor([0., 0.5, 1.]), 0.25).tolist()
        [0.0, 0.625, 1.0]
    """
    square = theta * theta
    return (1 + epsilon) * square / (square + epsilon)


def theta_of(values: Tensor, epsilon: Tensor | float) -> Tensor:
    """Inverse of :func:`openness` on [0, 1].

    Examples:
        >>> float(openness(theta_of(torch.tensor(0.25), 0.1), 0.1))
        0.25
    """
    return (epsilon * values / (1 + epsilon - values)).sqrt().clamp(max=1)


def openness_slope(theta: Tensor, epsilon: Tensor | float) -> Tensor:
    """Derivative of :func:`openness` with respect to ``theta``.

    Returns:
        Tensor: 2 (1 + epsilon) theta epsilon / (theta^2 + epsilon)^2. It is
        zero at zero: a closed gate gets no gradient and stays closed.
    """
    return 2 * (1 + epsilon) * theta * epsilon / (theta * theta + epsilon)**2


def annealed(epsilon: tuple[float, float], pruned_share: float) -> float:
    """Geometric interpolation between two values of epsilon.

    Args:
        epsilon (tuple[float, float]): Values at the start and at the end of
            the pruning phase.
        pruned_share (float): Share of the pruning phase that is over, in
            [0, 1].

    Returns:
        float: The first value at 0, the second at 1.

    Examples:
        >>> round(annealed((0.1, 0.001), 0.5), 6)
        0.01
    """
    start, end = epsilon
    return start * (end / start)**pruned_share


class GDPGates(GainMethod):
    """GDP gates of a model in one flat vector, and the step that moves them.

    A gate starts at theta = 1. For every gate, a step of the pruning phase
    weighs the gain of opening it against its price:

    .. code-block:: text

        gain   m = mean of dL/dg,  v = mean of (dL/dg)^2, both exponential
        price  p = dF/dg at the current openness of all gates
        step   theta <- theta - lr (min(m, 0) - 0.3 sqrt(v) + lambda p)
                                   / sqrt(v + (lambda p)^2)

    The multiplier lambda >= 0 is solved for in each step so that the held
    cost after the step meets the budget. The quotient does not depend on the
    scales of loss and cost, and no gate moves by more than about lr. Only the
    price closes a gate: a gain from closing cannot be told from noise, and
    would let gates drift shut while the budget is met without them. The mean
    of the gain vanishes where the weights have settled, but closing then
    still costs in second order, which the mean square estimates; so a gate
    that is worth its price opens, and hardly any gate stays half open. The
    gain counts more, the less of the gate's group is left (``scarcity``). The
    held cost counts a half-open gate partly as its openness and partly as a
    full channel, because a full channel is what it becomes in the pruned
    network. A gate whose openness falls to ``close_below`` is closed: it is
    exactly zero, for good.

    Args:
        num_gates (int): ``G``.
        epsilon (tuple[float, float]): Values at the start and at the end of
            the pruning phase.
        close_below (float): Openness at which a gate closes for good.
        betas (tuple[float, float]): Decay rates of the means ``m`` and ``v``.
        takeover (bool): Whether other channels take over what gates let
            through less (see :mod:`gdp_mmseg.gates.takeover`).

    Raises:
        ValueError: If ``epsilon`` is not ``(start, end)`` with
            0 < end <= start.

    Examples:
        Two channels have the same price, and the budget allows one of them.
        The task loses 1 by closing the first, and nothing by the second.

        >>> class Half:
        ...     def __call__(self, g): return g.mean()
        ...     def price(self, g): return torch.full_like(g, 1 / len(g))
        >>> gates = GDPGates(2)
        >>> for step in range(200):
        ...     loss = -gates.openness()[0]
        ...     gates.theta.grad, = torch.autograd.grad(loss, gates.theta)
        ...     _ = gates.observe_()
        ...     gates.step_(Half(), max(0.9 - step / 100, 0.5), lr=0.05)
        >>> (gates.openness() > 0).tolist()
        [True, False]
    """

    SETTINGS = ('epsilon', 'close_below', 'takeover')
    RESTS = True
    epsilon: Tensor

    def __init__(self,
                 num_gates: int,
                 epsilon: tuple[float, float] = (0.1, 1e-4),
                 close_below: float = 1e-2,
                 betas: tuple[float, float] = (0.9, 0.99),
                 takeover: bool = True) -> None:
        super().__init__(num_gates, betas)
        check_epsilon(epsilon)
        self.epsilon_range = epsilon
        self.takes_over = takeover
        self.close_below = close_below
        self.register_buffer('epsilon', torch.tensor(epsilon[0]))
        # Lower bound of epsilon, which is not read from its device.
        self._least_epsilon = 0.

    def levels(self) -> tuple[Tensor, Tensor]:
        """Openness of all gates and its slope, ``(G,)`` each."""
        return (openness(self.theta,
                         self.epsilon), openness_slope(self.theta,
                                                       self.epsilon))

    def openness(self) -> Tensor:
        """Openness ``(G,)`` of all gates, differentiable in theta."""
        return openness(self.theta,
                        self.epsilon).masked_fill(self.is_closed(), 0)

    def are_open(self) -> Tensor:
        """Return whether the openness of all gates is 1, a scalar bool."""
        # It is 1 at theta = 1, whatever epsilon is.
        return ((self.theta.detach() == 1) & ~self.is_closed()).all()

    def worth(self) -> Tensor:
        """Mean square gain ``(G,)``, an estimate of the cost of closing."""
        return self.gain_square

    def standing(self) -> Tensor:
        """Worth ``(G,)`` at the current openness: half-open gates add less."""
        return self.worth() * self.openness().detach()**2

    def begin_(self, pruned_share: float) -> None:
        """Raise epsilon to the schedule's, in place; openness stays.

        A training may begin with gates that another one has polarised at a
        smaller epsilon. It never falls here: that is :meth:`anneal_`'s.
        """
        self._raise_epsilon_(annealed(self.epsilon_range, pruned_share))

    def anneal_(self, pruned_share: float) -> None:
        """Take the epsilon of the schedule, in place."""
        epsilon = annealed(self.epsilon_range, pruned_share)
        if epsilon > self._least_epsilon:
            self._raise_epsilon_(epsilon)
        self.epsilon.fill_(epsilon)
        # The caller may restore the value before, which is no smaller.
        self._least_epsilon = epsilon

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._least_epsilon = 0.

    @torch.no_grad()
    def _raise_epsilon_(self, epsilon: float) -> None:
        """Take a larger epsilon and move theta so that openness stays."""
        value = torch.full_like(self.epsilon, epsilon)
        self.theta.copy_(
            torch.where(value > self.epsilon, theta_of(self.openness(), value),
                        self.theta))
        self.epsilon.copy_(torch.maximum(value, self.epsilon))

    @torch.no_grad()
    def observe_(self) -> Tensor:
        """Update the running means of the gain by the gradient of theta.

        Returns:
            Tensor: Scalar bool, False if the gradient is not finite.

        Raises:
            RuntimeError: If theta has no gradient.
        """
        # The slope of a closed gate is 0, and its gain is never used again.
        return self.observe_gain_(openness_slope(self.theta, self.epsilon))

    @torch.no_grad()
    def step_(self,
              cost: CostFunction,
              budget: Tensor | float,
              lr: float,
              channel_weight: float = 0.5,
              protected: Tensor | None = None,
              scarcity: Tensor | float = 1.,
              blocks: Blocks | None = None) -> None:
        """Solve for the multiplier, move the gates and close some, in place.

        Args:
            cost (CostFunction): Cost and its price.
            budget (Tensor | float): Upper bound of the held cost after this
                step.
            lr (float): Distance that a theta moves where gain and price do
                not oppose each other. Under a steady gain it is 1.3 times
                that.
            channel_weight (float): See
                :func:`gdp_mmseg.gates.multiplier.held_cost`.
            protected (Tensor, optional): ``(G,)`` bool, gates whose price is
                zero in this step, so that they cannot close.
            scarcity (Tensor | float): ``(G,)`` at least 1, factors of the
                gains.
            blocks (Blocks, optional): Gates that close together: one that is
                below ``close_below`` waits there until its block is. Defaults
                to each gate by itself.
        """
        closed = self.is_closed()
        surplus = self._surplus(blocks, protected)
        unbiased, noise = self.mean_gains()
        # A gate with neither gain nor price stays where it is.
        noise = (noise * scarcity**2).clamp(min=_LEAST_NOISE)
        gain = (unbiased * scarcity).clamp(max=0) - _RMS_SHARE * noise.sqrt()
        price = cost.price(self.openness())
        if protected is not None:
            price = price.masked_fill(protected, 0)
        # Zero absorbs: a closed gate stays where it is.
        travel = torch.full_like(gain, lr).masked_fill(closed, 0)

        def moved(multiplier: Tensor) -> tuple[Tensor, Tensor]:
            push = multiplier * price
            step = (gain + push) * torch.addcmul(noise, push, push).rsqrt()
            if surplus is not None:
                step = step.masked_fill(surplus, 1)
            # Above one the openness is flat: a gate that moved far beyond
            # could not come back in time.
            theta = torch.addcmul(
                self.theta, travel, step, value=-1).clamp(0, 1)
            return theta, F.threshold(
                openness(theta, self.epsilon), self.close_below, 0.)

        def spent(multiplier: Tensor) -> Tensor:
            _, value = moved(multiplier)
            channels = None if blocks is None else blocks.channels(
                ~closed, value > 0, protected)
            return held_cost(cost, value, channel_weight, channels)

        multiplier = solve_multiplier(
            spent,
            budget,
            first_guess(noise.masked_fill(closed, 0), price),
            self.multiplier,
            halvings=next(found for way, found in _HALVINGS if lr < way))
        self.multiplier.copy_(multiplier)
        theta, value = moved(multiplier)
        theta = theta * value.sign()
        if blocks is not None:
            theta = self._whole_blocks(theta, blocks, protected)
        self.close_(theta == 0)
        self.theta.copy_(theta)

    def _surplus(self, blocks: Blocks | None,
                 protected: Tensor | None) -> Tensor | None:
        """Mask ``(G,)`` of the weakest gates beyond the last whole block.

        They close whatever they are worth, because no multiple has room for
        them.
        """
        if blocks is None:
            return None
        # A half-open gate goes on closing.
        return ~self.is_closed() & ~self.strongest(
            blocks.group_of, blocks.full(~self.is_closed(), protected),
            self.standing())

    def _whole_blocks(self, theta: Tensor, blocks: Blocks,
                      protected: Tensor | None) -> Tensor:
        """Hold some gates ``(G,)`` of value 0 open, so that blocks are whole.

        They get the least openness of a gate that is not closed.
        """
        closed = self.is_closed()
        worth = self.worth().masked_fill(theta > 0, torch.inf)
        held = self.strongest(blocks.group_of,
                              blocks.left(~closed, theta > 0, protected),
                              worth)
        least = theta_of(
            torch.full_like(theta, self.close_below), self.epsilon)
        return torch.where(held & (theta == 0), least, theta)


def check_epsilon(epsilon: object) -> None:
    """Check the values of epsilon at the start and end of the pruning phase.

    Raises:
        ValueError: If they are not two numbers with 0 < end <= start.
    """
    if (not isinstance(epsilon, (tuple, list)) or len(epsilon) != 2
            or not all(isinstance(value, (int, float)) for value in epsilon)
            or not 0 < epsilon[1] <= epsilon[0]):
        raise ValueError(
            'gdp.epsilon: expected (start, end) with 0 < end <= start, e.g. '
            f'(0.1, 1e-4), but got {epsilon}')
