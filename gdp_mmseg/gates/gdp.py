"""Gates: how open a channel is, and the step that moves it.

``G`` gates, one for each prunable class of channels (see ``groups.py``).
Openness is formula (1) of "GDP: Stabilized Neural Network Pruning via Gates
with Differentiable Polarization" (ICCV 2021); the step is this project's own,
because the paper's is not public.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn

from .base import CostFunction, held_cost, solve_multiplier

# Part of the root mean square of dL/dg that counts as gain of an open gate.
_RMS_SHARE = 0.3


def openness(theta: Tensor, epsilon: Tensor | float) -> Tensor:
    """Smoothed L0 norm of ``theta``, element by element, 1 at 1.

    Source: GDP (ICCV 2021), section 3: theta^2 / (theta^2 + epsilon); times
    1 + epsilon here. So a gate at theta = 1 changes nothing, whatever epsilon
    is: a network with fresh gates computes what it did without.

    Args:
        theta (Tensor): Any shape, in [0, 1].
        epsilon (Tensor | float): Positive; the smaller, the harder the gate.

    Returns:
        Tensor: In [0, 1], the shape of ``theta``; exactly 0 only at 0.

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
        Tensor: 2 (1 + epsilon) theta epsilon / (theta^2 + epsilon)^2, zero at
        zero: a closed gate feels no force and stays closed.
    """
    return 2 * (1 + epsilon) * theta * epsilon / (theta * theta + epsilon)**2


class Gates(nn.Module):
    """All gates of a model in one flat vector, and the step that moves them.

    A gate starts at theta = 1. A step of the pruning phase weighs, for every
    gate, what opening it gains the task against what it costs:

    .. code-block:: text

        gain   m = mean of dL/dg,  v = mean of (dL/dg)^2, exponential
        price  p = dF/dg, with the neighbours' openness
        step   theta <- theta - lr (min(m, 0) - 0.3 sqrt(v) + lambda p)
                                   / sqrt(v + (lambda p)^2)

    and chooses the multiplier lambda >= 0 of that very step so that the cost
    after it meets the budget of the moment. The quotient is free of the
    scales of loss and cost, and every gate moves by at most ~lr. Only the
    price closes a gate: a gain from closing is not told from noise, which
    would let gates drift shut while the budget holds of itself. Where the
    weights have settled the mean is zero, but closing costs in second order,
    of which the mean square tells; so a gate that is worth its price opens
    and none rests in between. A gain counts the more, the less of the gate's
    group is left (``scarcity``). The cost counts a half-open gate partly as
    its openness and partly as a whole channel, because a whole channel is what
    it will be. A gate whose openness falls below ``close_below`` is closed:
    exact zero, for good.

    Args:
        number (int): ``G``.
        epsilon (float): At the start.
        close_below (float): Openness under which a gate closes for good.
        betas (tuple[float, float]): Decay of the means ``m`` and ``v``.

    Attributes:
        theta (nn.Parameter): ``(G,)``. Its gradient is read by
            :meth:`observe_`; no optimizer should move it.
        closed (Tensor): ``(G,)``, above 0 where a gate closed for good, and
            its theta is 0. In an average of models theta is not, and this is
            of the last one, or an average too: above 0 all the same.

    Examples:
        Two channels at the same price, budget for one; the task loses 1 for
        closing the first, nothing for the second.

        >>> class Half:
        ...     def __call__(self, g): return g.mean()
        ...     def price(self, g): return torch.full_like(g, 1 / len(g))
        >>> gates = Gates(2)
        >>> for step in range(200):
        ...     loss = -gates.openness()[0]
        ...     gates.theta.grad, = torch.autograd.grad(loss, gates.theta)
        ...     _ = gates.observe_()
        ...     gates.step_(Half(), max(0.9 - step / 100, 0.5), lr=0.05)
        >>> (gates.openness() > 0).tolist()
        [True, False]
    """

    theta: nn.Parameter
    epsilon: Tensor
    gain: Tensor
    gain_square: Tensor
    observed: Tensor
    multiplier: Tensor
    closed: Tensor

    def __init__(
        self,
        number: int,
        epsilon: float = 0.1,
        close_below: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.99)
    ) -> None:
        super().__init__()
        self.close_below = close_below
        self.betas = betas
        self._slots = 0
        self.theta = nn.Parameter(torch.ones(number))
        self.register_buffer('epsilon', torch.tensor(epsilon))
        self.register_buffer('gain', torch.zeros(number))
        self.register_buffer('gain_square', torch.zeros(number))
        self.register_buffer('observed', torch.tensor(0))
        self.register_buffer('multiplier', torch.tensor(0.))
        self.register_buffer('closed', torch.zeros(number))

    def add_slots(self, slots: Tensor) -> int:
        """Keep the gates ``(C,)`` of a channel axis on the gates' device.

        Returns:
            int: What to call :meth:`slot_openness` with.
        """
        index = self._slots
        self.register_buffer(f'slots{index}', slots, persistent=False)
        self._slots += 1
        return index

    def slot_openness(self, index: int) -> Tensor:
        """Openness ``(C,)`` of a channel axis, differentiable in theta."""
        slots = self.get_buffer(f'slots{index}')
        # Of these gates alone: cheaper than all, once for each layer.
        known = slots.clamp(min=0)
        values = openness(self.theta[known], self.epsilon)
        return values.masked_fill(self.closed[known] > 0,
                                  0).masked_fill(slots < 0, 1)

    def openness(self) -> Tensor:
        """Openness ``(G,)`` of all gates, differentiable in theta."""
        return openness(self.theta, self.epsilon).masked_fill(self._shut(), 0)

    def _shut(self) -> Tensor:
        """``(G,)`` bool: gates that are closed for good."""
        return self.closed > 0

    def set_epsilon_(self, epsilon: float) -> None:
        """Take another epsilon; see :meth:`raise_epsilon_`."""
        self.raise_epsilon_(epsilon)
        self.epsilon.fill_(epsilon)

    @torch.no_grad()
    def raise_epsilon_(self, epsilon: float) -> None:
        """Take another epsilon if it is larger; openness stays as it is.

        It falls while a training prunes. It rises where a training begins
        from gates that another has polarised.
        """
        value = self.epsilon.new_tensor(epsilon)
        if value > self.epsilon:
            self.theta.copy_(theta_of(self.openness(), value))
            self.epsilon.copy_(value)

    @torch.no_grad()
    def observe_(self) -> bool:
        """Take the gradient of theta into the running means of the gain.

        Returns:
            bool: False, with nothing done, if the gradient is not finite.

        Raises:
            RuntimeError: If theta has no gradient.
        """
        if self.theta.grad is None:
            raise RuntimeError(
                'expected the loss to have passed a gradient to the gates, '
                'but theta.grad is None: is the forward pass under no_grad, '
                'or are the gated layers unused by the loss?')
        slope = openness_slope(self.theta, self.epsilon)
        # A closed gate has no slope, and a gain that nobody will ask for.
        gain = torch.where(slope > 0, self.theta.grad / slope.clamp(min=1e-12),
                           torch.zeros_like(slope))
        square = gain * gain
        # Once in a mean, it would stay there for good.
        if not square.isfinite().all():
            return False
        mean_decay, square_decay = self.betas
        self.gain.lerp_(gain, 1 - mean_decay)
        self.gain_square.lerp_(square, 1 - square_decay)
        self.observed += 1
        return True

    @torch.no_grad()
    def step_(self,
              cost: CostFunction,
              budget: float,
              lr: float,
              channel_weight: float = 0.5,
              protected: Tensor | None = None,
              scarcity: Tensor | float = 1.) -> None:
        """One step in place, of what was observed: solve lambda, move, close.

        Args:
            cost (CostFunction): Cost and its price.
            budget (float): What the cost may be after this step.
            lr (float): The way of a theta on which task and cost agree; 1.3
                times that under a steady gain.
            whole (float): See :func:`held_cost`.
            spared (Tensor, optional): ``(G,)`` bool, gates on which there is
                no price in this step.
            scarcity (Tensor | float): ``(G,)``, at least 1, by which gains
                count more than as observed.
        """
        mean_decay, square_decay = self.betas
        seen = int(self.observed)
        noise = self.gain_square / (1 - square_decay**seen) * scarcity**2
        gain = (self.gain / (1 - mean_decay**seen) * scarcity).clamp(max=0)
        gain -= _RMS_SHARE * noise.sqrt()
        price = cost.price(self.openness())
        if protected is not None:
            price = price.masked_fill(protected, 0)

        def moved(multiplier: float) -> Tensor:
            push = multiplier * price
            # Where neither task nor cost has a say, the gate stays.
            scale = (noise + push * push).sqrt().clamp(min=1e-20)
            theta = self.theta - lr * (gain + push) / scale
            # Zero absorbs. Above one the openness is flat: a gate that
            # wandered off could not come back in time.
            theta = theta.clamp(0, 1)
            shut = openness(theta, self.epsilon) < self.close_below
            return theta.masked_fill(shut | self._shut(), 0)

        def spent(theta: Tensor) -> float:
            return float(
                held_cost(cost, openness(theta, self.epsilon), channel_weight))

        scale = float(noise[~self._shut()].sqrt().sum() /
                      price.sum().clamp(min=1e-20))
        multiplier = solve_multiplier(lambda x: spent(moved(x)), budget, scale)
        self.multiplier.fill_(multiplier)
        theta = moved(multiplier)
        self.close_(theta == 0)
        self.theta.copy_(theta)

    @torch.no_grad()
    def strongest(self, group_of: Tensor, numbers: Tensor) -> Tensor:
        """The open gates that the task asks for most, some of each group.

        Args:
            group_of (Tensor): ``(G,)`` index of each gate's group.
            numbers (Tensor): ``(S,)`` how many of each group.

        Returns:
            Tensor: ``(G,)`` bool.
        """
        worth = self.gain_square.masked_fill(self._shut(), -1)
        order = worth.argsort(descending=True)
        order = order[group_of[order].argsort(stable=True)]
        sizes = group_of.bincount(minlength=len(numbers))
        first = sizes.cumsum(0) - sizes
        place = torch.arange(len(order), device=order.device)
        chosen = torch.zeros_like(order, dtype=torch.bool)
        chosen[order] = place - first[group_of[order]] < numbers[
            group_of[order]]
        return chosen & ~self._shut()

    @torch.no_grad()
    def close_(self, gates: Tensor) -> None:
        """Close ``gates`` (mask ``(G,)``) for good, in place."""
        self.closed.masked_fill_(gates, 1)
        self.theta.masked_fill_(gates, 0)
