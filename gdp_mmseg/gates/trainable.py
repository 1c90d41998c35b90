"""Trainable gate: a step forward, a chosen gradient shape backward.

The gate is that of "Plug-in, Trainable Gate for Streamlining Arbitrary Neural
Networks" (AAAI 2020). The step that moves the gates under a budget, the vote
and the trim at the end are this project's own, because the paper's code and
settings are not public.

Letters: ``G`` gates, one for each class of channels (see ``analysis``).
"""
from __future__ import annotations

from typing import Any, Callable, Mapping

import torch
from torch import Tensor

from ..analysis.spelling import did_you_mean
from .base import CostFunction
from .blocks import Blocks
from .gains import GainMethod
from .multiplier import LEAST_SCALE, first_guess, solve_multiplier
from .trimming import trimmed

# Share of the pruning phase, at its end, in which the gates vote by whether
# they are open: a gate at the border of the budget flips from step to step.
_VOTING = 0.05
# Value of a gate that is held open.
_HELD = 1e-6


def _constant(values: Tensor) -> Tensor:
    return torch.ones_like(values)


def _sech(values: Tensor) -> Tensor:
    return 1 - values.tanh().square()


# Gradient shapes g(w). None is zero on [-1, 1], where the gates lie, because
# dL/db is the gradient of w over g(w).
SHAPES: dict[str, Callable[[Tensor], Tensor]] = dict(
    constant=_constant, sech=_sech, sigmoid=torch.sigmoid)


class _Step(torch.autograd.Function):

    @staticmethod
    def forward(ctx: Any, values: Tensor, shape: str) -> Tensor:
        ctx.save_for_backward(values)
        ctx.shape = shape
        return (values > 0).to(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        values, = ctx.saved_tensors
        return gradient * SHAPES[ctx.shape](values), None


def step(values: Tensor, shape: str = 'constant') -> Tensor:
    """Step function with the gradient of another shape, element by element.

    Source: the paper's gate is b(w) + s(w) g(w), with the step b and a
    sawtooth s of height 1 / M. Its derivative is g(w) + s(w) g'(w). This is
    its limit for large M: value b(w), derivative g(w). The sawtooth itself
    overflows in half precision, and is rounding noise in single precision.

    Args:
        values (Tensor): Any shape.
        shape (str): Gradient shape g, a key of ``SHAPES``: ``'constant'`` for
            1, ``'sech'`` for sech(w)^2, ``'sigmoid'`` for 1 / (1 + exp(-w)).

    Returns:
        Tensor: 1 where a value is above 0, and 0 elsewhere.

    Examples:
        >>> w = torch.tensor([-0.25, 0., 0.25], requires_grad=True)
        >>> opened = step(w, 'sigmoid')
        >>> opened.tolist()
        [0.0, 0.0, 1.0]
        >>> opened.sum().backward()
        >>> [round(slope, 4) for slope in w.grad.tolist()]
        [0.4378, 0.5, 0.5622]
    """
    stepped: Tensor = _Step.apply(values, shape)
    return stepped


class TrainableGates(GainMethod):
    """Trainable gates of a model, and the step that moves them.

    A gate is open where its w (``theta``) is above 0. All begin at w = 1 and
    stay in [-1, 1], so that a closed one can come back. The cost counts whole
    channels at all times. For every gate, a step of the pruning phase weighs
    the gain of opening it against its price:

    .. code-block:: text

        gain   m = mean of dL/db,  v = mean of (dL/db)^2, both exponential
        price  p = dF/db at the current state of all gates
        step   w <- w - lr g(w) (m + lambda p) / (sqrt(v) + |lambda| p)

    A closed gate has its true gain, that of opening it. The multiplier
    lambda is solved for in each step so that the cost after it is the budget:
    it is negative where the gates would close more than that, for noise may
    close many at once. The shape g stands outside of the quotient, which
    would cancel it otherwise. This divisor, and a mean m that is not above
    sqrt(v), make each step monotone in lambda, as the solution needs.

    No gate is closed for good before the pruning phase is over. Then those
    stay open that were open in at least half of its last 5 % of steps; those
    of least w close, or those of largest w open, if that is what the budget
    asks for.

    Args:
        num_gates (int): ``G``.
        shape (str): Gradient shape g, see :func:`step`.
        penalty (float, optional): The paper's own objective: a fixed
            multiplier of ``|F - target|``, in the unit of the loss, in the
            place of the solved one. The cost is then pulled to the target
            from both sides, and not held to it, at the end either.
        betas (tuple[float, float]): Decay rates of the means ``m`` and ``v``.

    Raises:
        ValueError: If ``shape`` or ``penalty`` is out of its range.

    Examples:
        Two channels have the same price, and the budget allows one of them.
        At first the task needs the first one, and later the second.

        >>> class Half:
        ...     def __call__(self, b): return b.mean()
        ...     def price(self, b): return torch.full_like(b, 1 / len(b))
        >>> gates = TrainableGates(2)
        >>> for needed in (0, 1):
        ...     for _ in range(100):
        ...         loss = -gates.openness()[needed]
        ...         gates.theta.grad, = torch.autograd.grad(loss, gates.theta)
        ...         _ = gates.observe_()
        ...         gates.step_(Half(), 0.5, lr=0.05)
        ...     print(gates.openness().tolist())
        [1.0, 0.0]
        [0.0, 1.0]
    """

    OPTIONS = ('shape', 'penalty')
    ABSORBING = False
    MULTIPLIER = ('price of the cost; negative where gates would close more '
                  'than the budget asks for')
    votes: Tensor
    ballots: Tensor
    settled: Tensor

    def __init__(
        self,
        num_gates: int,
        shape: str = 'constant',
        penalty: float | None = None,
        betas: tuple[float, float] = (0.9, 0.99)
    ) -> None:
        super().__init__(num_gates, betas)
        self.check_options(dict(shape=shape, penalty=penalty))
        self.shape = shape
        self.penalty = penalty
        self.gradual = penalty is None
        self.register_buffer('votes', torch.zeros(num_gates))
        self.register_buffer('ballots', torch.tensor(0.))
        # An average of models may average it: above 0 is settled.
        self.register_buffer('settled', torch.tensor(0.))

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        """Check the gradient shape and the penalty.

        Raises:
            ValueError: If one is out of its range.
        """
        shape = options.get('shape', 'constant')
        if not isinstance(shape, str) or shape not in SHAPES:
            raise ValueError(f'gdp.gate.shape: expected one of {[*SHAPES]}, '
                             f'but got {shape!r}' +
                             did_you_mean(str(shape), SHAPES))
        penalty = options.get('penalty')
        if penalty is not None and (isinstance(penalty, bool)
                                    or not isinstance(penalty, (int, float))
                                    or not 0 < penalty < float('inf')):
            raise ValueError('gdp.gate.penalty: expected a number above 0, the'
                             ' loss for missing the target by all of the '
                             f'dense cost, but got {penalty!r}')

    def notes(self) -> list[str]:
        """Say what a fixed penalty means."""
        if self.penalty is None:
            return []
        return [
            f'gdp.gate.penalty={self.penalty:g} is fixed, so the target is not'
            ' held: the loss pulls the cost towards it, and the network keeps '
            'what comes out; without gdp.gate.penalty the target is met'
        ]

    # -- the state of the gates --------------------------------------------

    def levels(self) -> tuple[Tensor, Tensor]:
        """Steps of all gates and their slope, ``(G,)`` each."""
        return (self._opened(self.theta), SHAPES[self.shape](
            self.theta).masked_fill(self.settled > 0, 0))

    def openness(self) -> Tensor:
        """Steps ``(G,)`` of all gates, differentiable in theta."""
        return self._opened(self.theta).masked_fill(self.is_closed(), 0)

    def _opened(self, values: Tensor) -> Tensor:
        """Steps of some values; 1 once the open gates are settled."""
        return step(values, self.shape).masked_fill(self.settled > 0, 1)

    def are_open(self) -> Tensor:
        """Return whether all gates are open, a scalar bool."""
        return (self.openness().detach() == 1).all()

    def is_settled(self) -> bool:
        """Tell whether the gates have been closed or opened for good."""
        return bool(self.settled > 0)

    def worth(self) -> Tensor:
        """Rank ``(G,)`` by w, and by the mean square gain where w is equal."""
        return self._ranks(self.theta.detach())

    def _ranks(self, values: Tensor) -> Tensor:
        """Ranks ``(G,)`` of some values, by the mean square gain in a tie."""
        order = self.gain_square.argsort(stable=True)
        order = order[values[order].argsort(stable=True)]
        ranks = torch.arange(len(order), device=order.device).to(values)
        return torch.empty_like(ranks).scatter(0, order, ranks)

    # -- the training ------------------------------------------------------

    def begin_(self, pruned_share: float) -> None:
        """Let gates move that another training has settled, in place.

        Those that are closed stay closed, and the others stay open.
        """
        # A training that resumes later than that has begun already.
        if pruned_share == 0:
            self._unsettle_()

    @torch.no_grad()
    def _unsettle_(self) -> None:
        """Give gates that are settled the w of open ones, in place.

        In an average of models, w is an average, which may be below 0.
        """
        is_open = (self.settled > 0) & ~self.is_closed()
        self.theta.masked_fill_(is_open, 1)
        self.settled.zero_()

    def anneal_(self, pruned_share: float) -> None:
        """Remove the votes until the last part of the phase, in place."""
        self.begin_(pruned_share)
        if pruned_share <= 1 - _VOTING:
            self.votes.zero_()
            self.ballots.zero_()

    @torch.no_grad()
    def observe_(self) -> Tensor:
        """Update the running means of dL/db by the gradient of theta.

        Returns:
            Tensor: Scalar bool, False if the gradient is not finite.

        Raises:
            RuntimeError: If theta has no gradient.
        """
        return self.observe_gain_(SHAPES[self.shape](self.theta))

    @torch.no_grad()
    def step_(self,
              cost: CostFunction,
              budget: Tensor | float,
              lr: float,
              channel_weight: float = 0.5,
              protected: Tensor | None = None,
              scarcity: Tensor | float = 1.,
              blocks: Blocks | None = None) -> None:
        """Solve for the multiplier and move the gates, in place.

        Args:
            cost (CostFunction): Cost and its price.
            budget (Tensor | float): Upper bound of the cost after this step.
            lr (float): Largest distance that a w moves.
            channel_weight (float): Unused: no gate is half open.
            protected (Tensor, optional): ``(G,)`` bool, gates that do not
                close in this step if they are open, and have no price.
            scarcity (Tensor | float): Unused: the paper's gates weigh the
                gain alone.
            blocks (Blocks, optional): Gates that close together: those of
                largest w of each group are held open until all others of
                their block are closed. Defaults to each gate by itself.
        """
        closed = self.is_closed()
        mean, square = self.mean_gains()
        scale = square.sqrt()
        # The means have different spans, so the mean may be the larger one.
        mean = torch.minimum(torch.maximum(mean, -scale), scale)
        price = cost.price(self.openness())
        held = torch.zeros_like(closed)
        if protected is not None:
            price = price.masked_fill(protected, 0)
            held = protected & (self.theta > 0)
        travel = (lr * SHAPES[self.shape](self.theta)).masked_fill(closed, 0)

        def moved(multiplier: Tensor) -> Tensor:
            push = multiplier * price
            way = (mean + push) / (scale + push.abs()).clamp(min=LEAST_SCALE)
            # Far beyond, a gate could not come back in time.
            theta = (self.theta - travel * way).clamp(-1, 1)
            return torch.where(held, theta.clamp(min=_HELD), theta)

        def spent(multiplier: Tensor) -> Tensor:
            is_open = moved(multiplier) > 0
            return cost(
                is_open.to(price) if blocks is
                None else blocks.channels(~closed, is_open, protected))

        if self.penalty is None:
            multiplier = solve_multiplier(
                spent,
                budget,
                first_guess(square.masked_fill(closed, 0), price),
                self.multiplier,
                signed=True)
        else:
            multiplier = self.penalty * (cost(self.openness()) - budget).sign()
        self.multiplier.copy_(multiplier)
        theta = moved(multiplier)
        if blocks is not None:
            theta = self._whole_blocks(theta, blocks, protected)
        self.theta.copy_(theta)
        self.votes += self.openness()
        self.ballots += 1

    def _whole_blocks(self, theta: Tensor, blocks: Blocks,
                      protected: Tensor | None) -> Tensor:
        """Open or close the fewest gates ``(G,)`` that make blocks whole."""
        is_open, closed = theta > 0, self.is_closed()
        ranks = self._ranks(theta)
        if protected is not None:
            ranks = ranks.masked_fill(protected & is_open, torch.inf)
        chosen = self.strongest(blocks.group_of,
                                blocks.left(~closed, is_open, protected),
                                ranks)
        return torch.where(chosen, theta.clamp(min=_HELD), theta.clamp(max=0))

    @torch.no_grad()
    def settle_(self,
                cost: CostFunction,
                budget: Tensor | float,
                protected: Tensor | None = None,
                blocks: Blocks | None = None) -> None:
        """Close gates for good by vote, w and budget, in place.

        Args:
            cost (CostFunction): Cost and its price.
            budget (Tensor | float): Upper bound of the cost. It is met
                within one point, but for a fixed penalty.
            protected (Tensor, optional): ``(G,)`` bool, gates that stay open
                if they are.
            blocks (Blocks, optional): Gates that close together.
        """
        opened = self.openness() > 0
        free = ~self.is_closed()
        # Where no vote was cast, because no gradient was finite.
        elected = torch.where(self.ballots > 0, 2 * self.votes >= self.ballots,
                              opened) & free
        held = torch.zeros_like(free)
        if protected is not None:
            held = protected & opened
        # Those that were elected stand above all others.
        ranks = self._ranks(self.theta + 4 * elected).masked_fill(
            held, torch.inf)

        def whole(stays: Tensor) -> Tensor:
            if blocks is None:
                return stays
            return self.strongest(blocks.group_of,
                                  blocks.left(free, stays, protected), ranks)

        stays = elected | held
        if self.penalty is None:
            stays = trimmed(stays, held, ranks.masked_fill(~free, -torch.inf),
                            whole, cost, budget)
        stays = whole(stays)
        self.close_(~stays)
        self.theta.masked_fill_(stays, 1)
        self.settled.fill_(1)
