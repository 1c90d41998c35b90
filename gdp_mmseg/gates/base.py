"""Interface of a gate method.

A gate method decides how open each channel is and moves that while the
network trains. Everything else (which channels share a gate, what they cost,
the schedule, surgery, checkpoints) is the same for all methods.

Letters: ``G`` gates, one for each class of channels (see ``analysis``);
``S`` groups of gates; ``C`` channels on an axis of a kernel.
"""
from __future__ import annotations

import abc
from typing import Any, ClassVar, Mapping, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..analysis.structure import Analysis
from .blocks import Blocks
from .lookup import Lookup


def has_processes() -> bool:
    """Tell whether several processes train together."""
    return dist.is_available() and dist.is_initialized()


class CostFunction(Protocol):
    """Interface of a cost, as far as a gate method uses it."""

    def __call__(self, openness: Tensor) -> Tensor:
        """Share of the dense cost at openness ``(G,)``, a scalar."""

    def price(self, openness: Tensor) -> Tensor:
        """Derivative ``(G,)`` of the cost at openness ``(G,)``."""


class GateMethod(nn.Module, abc.ABC):
    """Base class of the gate methods: one vector of gates for a model.

    A method implements :meth:`openness`, :meth:`levels`, :meth:`worth`,
    :meth:`observe_` and :meth:`step_`; the other methods have defaults that
    fit gates without a schedule of their own. :meth:`observe_` and
    :meth:`step_` run right before the optimizer's step, on its gradients. A
    method with a gradient of its own (a penalty on norms, say) adds it to the
    parameters there.

    Args:
        num_gates (int): ``G``.

    Attributes:
        SETTINGS (tuple[str, ...]): Keys of ``gdp=dict(...)`` that belong to
            this method alone. The constructor takes them.
        OPTIONS (tuple[str, ...]): Keys of ``gate=dict(type=..., ...)`` besides
            ``type``. The constructor takes them.
        ABSORBING (bool): Whether a gate of openness 0 is closed for good. If
            not, gates come back until :meth:`settle_`, and nothing may take
            them for closed before.
        WHOLE_CHANNELS (bool): Whether gates that are not closed are held to
            the budget as full channels, whatever their openness is.
        RESTS (bool): Whether gates move in some of the steps only where there
            are many. A method that acts in each step does not rest.
        MULTIPLIER (str): Meaning of the multiplier, in a few words.
        theta (nn.Parameter): ``(G,)``, one number per gate, 1 at the start.
            Its gradient is read by :meth:`observe_`; no optimizer moves it.
        closed (Tensor): ``(G,)``, positive for gates that are closed for
            good. An average of models (EMA) may average this mask and keep a
            non-zero theta, so test ``closed > 0``, never ``theta == 0``.
        multiplier (Tensor): Scalar, the price multiplier of the last step.
        lookup (Lookup): The channel axes with these gates.
        gradual (bool): Whether the budget falls gradually. If not, it is the
            target in all of the pruning phase.
        loss_scale (Tensor | None): Factor that the gradients of the model's
            parameters still have in this step, and that of theta has not.
        heeded (bool): False if no step observes the gradient of theta that
            the next passes compute. It may then be zero or missing.
        takes_over (bool): Whether other channels take over what gates let
            through less (see :mod:`gdp_mmseg.gates.takeover`).
    """

    SETTINGS: ClassVar[tuple[str, ...]] = ()
    OPTIONS: ClassVar[tuple[str, ...]] = ()
    ABSORBING: ClassVar[bool] = True
    WHOLE_CHANNELS: ClassVar[bool] = False
    RESTS: ClassVar[bool] = False
    MULTIPLIER: ClassVar[str] = (
        'price of the cost: a gate closes if its gain in loss is worth less')
    theta: nn.Parameter
    closed: Tensor
    multiplier: Tensor

    def __init__(self, num_gates: int) -> None:
        super().__init__()
        self.lookup = Lookup()
        self._known_open = -1, False
        self.gradual = self.heeded = True
        self.takes_over = False
        self.loss_scale: Tensor | None = None
        self.theta = nn.Parameter(torch.ones(num_gates))
        self.register_buffer('multiplier', torch.tensor(0.))
        self.register_buffer('closed', torch.zeros(num_gates))

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        """Check the values of some options, before any long work.

        Args:
            options (Mapping[str, Any]): Values of some of ``OPTIONS``.

        Raises:
            ValueError: If one is out of its range. The message begins with
                ``gdp.gate.`` and the name of the option.
        """

    @classmethod
    def admitted(cls, analysis: Analysis, model: nn.Module,
                 **options: Any) -> Analysis:
        """Freeze the groups of channels that the method has no gates for.

        Gates that come back leave the norms, too: behind a norm that gives
        zeros, a ReLU passes no gradient, and they would stay closed.

        Args:
            analysis (Analysis): Analysis of the model.
            model (nn.Module): The model, which stays unchanged.
            **options: Values of some of ``OPTIONS``.

        Returns:
            Analysis: By default that of all groups.

        Raises:
            ValueError: If no gate is left.
        """
        return analysis if cls.ABSORBING else analysis.at_layers()

    @classmethod
    def of(cls, analysis: Analysis, **options: Any) -> GateMethod:
        """Make the gates of a model.

        Args:
            analysis (Analysis): Analysis of the model.
            **options: Values of ``SETTINGS`` and of some of ``OPTIONS``.
        """
        return cls(analysis.num_gates, **options)

    def bind_(self, model: nn.Module) -> None:
        """Take note of the model whose layers get these gates, in place."""

    def notes(self) -> list[str]:
        """List what a user should know at the start of a training."""
        return []

    def outcome(self) -> list[str]:
        """List what a user should know when the gates are settled."""
        return []

    # -- the forward pass --------------------------------------------------

    def slot_factors(self, index: int) -> Tensor:
        """Factors ``(C,)`` of a channel axis.

        They are differentiable in theta in training, and those of
        :meth:`decided` in evaluation. A change of a tensor here by its
        ``data`` is not seen in training.

        Args:
            index (int): Index of the axis in :attr:`lookup`.
        """
        if not self.training:
            return self.lookup.factors(index, self.decided())
        self.draw_()
        if torch.compiler.is_compiling():
            levels, slopes = self._levels()
            # It is zero, and its derivative is 1.
            moved = self.theta - self.theta.detach()
            return self.lookup.factors(index, levels + slopes * moved)
        state = (self.heeded,
                 *(one._version
                   for one in self._buffers.values() if one is not None))
        return self.lookup.known(index, self.theta, state, self._levels)

    @torch.no_grad()
    def _levels(self) -> tuple[Tensor, Tensor]:
        """Levels and slopes of the gates, of those that move."""
        levels, slopes = self.levels()
        closed = self.is_closed()
        return (levels.masked_fill(closed, 0),
                slopes.masked_fill(closed, 0) * self.heeded)

    def note_open_(self, are_open: bool) -> None:
        """Note what :meth:`are_open` returned; it holds until theta changes.
        """
        self._known_open = self.theta._version, are_open

    @property
    def known_open(self) -> bool | None:
        """Result of :meth:`are_open` if it is known without reading it."""
        version, are_open = self._known_open
        return are_open if version == self.theta._version else None

    @property
    def neutral(self) -> bool:
        """True if all factors are known to be 1 in this pass."""
        # The theta of an average changes unseen, but it only evaluates.
        return self.training and bool(self.known_open)

    def are_open(self) -> Tensor:
        """Return whether all factors are 1 in training, a scalar bool."""
        return torch.zeros((), dtype=torch.bool, device=self.theta.device)

    def draw_(self) -> None:
        """Draw what factors in training depend on, in place, if it is due."""

    @abc.abstractmethod
    def levels(self) -> tuple[Tensor, Tensor]:
        """Factors of the kernels in training and their derivative in theta.

        They may be soft or random. In evaluation they are :meth:`decided`.

        Returns:
            tuple[Tensor, Tensor]: ``(G,)`` each. Closed gates may have any
            values here; the caller sets them to zero.
        """

    # -- the state of the gates --------------------------------------------

    @abc.abstractmethod
    def openness(self) -> Tensor:
        """Openness ``(G,)`` in [0, 1] for the cost and for display.

        It is differentiable in theta, and exactly 0 where a gate is closed,
        be it for good or not.
        """

    def decided(self) -> Tensor:
        """Openness ``(G,)`` in evaluation and for the cut."""
        return self.openness().detach()

    @abc.abstractmethod
    def worth(self) -> Tensor:
        """Worth ``(G,)`` of each gate to the task; only its order counts."""

    def standing(self) -> Tensor:
        """Worth ``(G,)`` of each gate at its openness; its order counts."""
        return self.worth()

    def is_closed(self) -> Tensor:
        """Mask ``(G,)`` of the gates that are closed for good."""
        return self.closed > 0

    @torch.no_grad()
    def close_(self, gates: Tensor) -> None:
        """Close ``gates`` (mask ``(G,)``) for good, in place."""
        self.closed.masked_fill_(gates, 1)
        self.theta.masked_fill_(gates, 0)

    @torch.no_grad()
    def strongest(self,
                  group_of: Tensor,
                  numbers: Tensor,
                  worth: Tensor | None = None) -> Tensor:
        """Select the open gates of greatest worth in each group.

        Args:
            group_of (Tensor): ``(G,)`` index of each gate's group.
            numbers (Tensor): ``(S,)`` number of gates to select per group.
            worth (Tensor, optional): ``(G,)``. Defaults to :meth:`worth`.

        Returns:
            Tensor: ``(G,)`` bool.
        """
        closed = self.is_closed()
        worth = self.worth() if worth is None else worth
        order = worth.masked_fill(closed, -torch.inf).argsort(descending=True)
        order = order[group_of[order].argsort(stable=True)]
        # Not bincount, for which the host waits on a GPU.
        sizes = torch.zeros_like(numbers).index_add(0, group_of,
                                                    torch.ones_like(group_of))
        first = sizes.cumsum(0) - sizes
        place = torch.arange(len(order), device=order.device)
        chosen = torch.zeros_like(order, dtype=torch.bool)
        chosen[order] = place - first[group_of[order]] < numbers[
            group_of[order]]
        return chosen & ~closed

    # -- the training ------------------------------------------------------

    def gradient(self) -> Tensor:
        """Gradient ``(G,)`` of theta.

        Raises:
            RuntimeError: If theta has none.
        """
        if self.theta.grad is None:
            raise RuntimeError(
                'expected the loss to have passed a gradient to the gates, '
                'but theta.grad is None: is the forward pass under no_grad, '
                'or are the gated layers unused by the loss?')
        return self.theta.grad

    def begin_(self, pruned_share: float) -> None:
        """Prepare gates that another training moved, in place.

        Their openness stays as it is.

        Args:
            pruned_share (float): Share of the pruning phase that is over when
                this training begins, in [0, 1].
        """

    def anneal_(self, pruned_share: float) -> None:
        """Follow the method's own schedule, in place.

        Args:
            pruned_share (float): Share of the pruning phase that is over, in
                [0, 1]; 0 during the warm-up.
        """

    @abc.abstractmethod
    def observe_(self) -> Tensor:
        """Take the gradient of theta into account, in place.

        Called in each step of warm-up and pruning, before :meth:`anneal_`.

        Returns:
            Tensor: Scalar bool, False if the gradient is not finite. The
            caller then restores the state of the gates as it was before.

        Raises:
            RuntimeError: If theta has no gradient.
        """

    @abc.abstractmethod
    def step_(self,
              cost: CostFunction,
              budget: Tensor | float,
              lr: float,
              channel_weight: float = 0.5,
              protected: Tensor | None = None,
              scarcity: Tensor | float = 1.,
              blocks: Blocks | None = None) -> None:
        """Move the gates so that the cost after it is within the budget.

        Called in each step of the pruning phase, after :meth:`observe_`. On a
        GPU, a read of a value makes the host wait for all work that is queued
        there, so an implementation should read none.

        Args:
            cost (CostFunction): Cost and its price.
            budget (Tensor | float): Upper bound of the held cost after this
                step, a share of the dense cost.
            lr (float): Distance that a gate may move in this step, in units
                of theta.
            channel_weight (float): See
                :func:`gdp_mmseg.gates.multiplier.held_cost`.
            protected (Tensor, optional): ``(G,)`` bool, gates that must not
                close in this step.
            scarcity (Tensor | float): ``(G,)`` at least 1, factors of the
                worth of each gate by how little is left of its group.
            blocks (Blocks, optional): Gates that close together. Defaults to
                each gate by itself.
        """

    def agree_(self) -> None:
        """Copy the first process's gates to all processes, in place.

        Sums on GPUs differ in the last bit between processes. A gate at the
        limit would close in one process and stay open in another.
        """
        if has_processes():
            for tensor in (self.theta.detach(), self.closed, self.multiplier):
                dist.broadcast(tensor, 0)

    def settle_(self,
                cost: CostFunction,
                budget: Tensor | float,
                protected: Tensor | None = None,
                blocks: Blocks | None = None) -> None:
        """Fix the gates for the settling phase, in place.

        Called once, after the last step of the pruning phase, also where the
        gradient of that step was not finite. From then on :meth:`factors`
        must equal :meth:`decided`. It may read values from the device.

        Args:
            cost (CostFunction): Cost and its price.
            budget (Tensor | float): Upper bound of the cost in channels that
                are not closed.
            protected (Tensor, optional): See :meth:`step_`.
            blocks (Blocks, optional): See :meth:`step_`.
        """

    def is_settled(self) -> bool:
        """Tell whether :meth:`settle_` has nothing left to do."""
        return True
