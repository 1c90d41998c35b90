"""The pruner: gates of a model, held to a budget by cost and schedule."""
from __future__ import annotations

import torch
from torch import Tensor, nn

from ..analysis.constants import WithConstants
from ..analysis.liveness import kept_channels, live_channels
from ..analysis.structure import Analysis
from ..cost.counts import Cost, FlopCost, ParameterCost, inference_layers
from ..cost.latency import STOPWATCHES, LatencyCost, Stopwatch, measure
from ..gates.base import GateMethod
from ..gates.blocks import Blocks
from ..gates.layers import gate_, move_to_layers_
from ..gates.takeover import Takeover
from .figures import Figures, read, state_of
from .multiples import min_kept, too_large
from .notes import on_miss, on_target, refusal
from .schedule import Schedule, steps_before
from .settings import Settings

# Largest amount by which rounding may raise the budget: less than one point of
# the dense cost, so that the target is met within one point.
_LARGEST_ROUNDING = 0.009


class Pruner(WithConstants):
    """The gates of a model with their settings, cost, schedule and step.

    It is registered as the submodule ``gdp`` of a gated model, the only
    module that such a model has in addition.

    Args:
        analysis (Analysis): Result of the analysis of the model.
        settings (Settings): Settings of ``gdp=dict(...)``.
        gates (GateMethod, optional): ``G`` gates. Defaults to those of the
            method that the settings name.

    Attributes:
        gates (GateMethod): Their state is in the model's state dict.
        flops (FlopCost): Share of the dense FLOPs.
        cost (Cost): Share of the resource that the target names; it may be
            the same object as ``flops``.

    Raises:
        ValueError: If the target is below the share that cannot be pruned.
    """

    min_kept: Tensor

    def __init__(self,
                 analysis: Analysis,
                 settings: Settings,
                 gates: GateMethod | None = None) -> None:
        super().__init__()
        self.analysis = analysis
        self.settings = settings
        self.gates = gates or settings.build_gates(analysis)
        self.schedule = Schedule(settings.phases, rests=self.gates.RESTS)
        self.takeover: Takeover | None = None
        self.flops = FlopCost(analysis)
        self.cost: Cost = self.flops
        if settings.target.type == 'params':
            self.cost = ParameterCost(analysis)
        elif settings.target.type == 'latency':
            self.cost = LatencyCost(analysis)
        self.blocks: Blocks | None = None
        if settings.multiple > 1:
            self.blocks = Blocks(analysis, settings.multiple)
        self.add_constant(
            'min_kept',
            # The latency is not known yet.
            min_kept(self.flops if self.unmeasured else self.cost, analysis,
                     settings.min_keep_ratio, self.blocks,
                     settings.target.ratio - _LARGEST_ROUNDING))
        if not self.unmeasured:
            self.check_target()

    def gate_(self, model: nn.Module) -> None:
        """Put the gates on the model that was analysed, in place."""
        gate_(model, self.analysis, self.gates)
        if self.gates.takes_over:
            self.takeover = Takeover(self.analysis, model, self.gates)

    def move_to_layers_(self, model: nn.Module) -> None:
        """Move the gates at norms of the model to the layers, in place."""
        self.analysis = move_to_layers_(model, self.analysis, self.gates)
        if self.takeover is not None:
            self.takeover.place_(self.analysis)

    # -- cost and target ---------------------------------------------------

    @property
    def unmeasured(self) -> bool:
        """True until :meth:`measure_` has measured the cost."""
        return isinstance(self.cost, LatencyCost) and not self.cost.measured

    def measure_(self, stopwatch: Stopwatch | None = None) -> None:
        """Measure the latency of the model's layers on its device, in place.

        Args:
            stopwatch (Stopwatch, optional): See
                :func:`gdp_mmseg.cost.latency.measure`. Defaults to that of
                the target's runtime.

        Raises:
            ValueError: If that runtime is not installed.
        """
        coefficients = measure(
            inference_layers(self.analysis), self.gates.theta.device, stopwatch
            or STOPWATCHES[self.settings.target.runtime]())
        self.cost.weigh_(coefficients.flatten())

    def check_target(self) -> None:
        """Check that the gates can reach the target.

        Raises:
            ValueError: If more than the target cannot be pruned.
        """
        least = self._cost_of(self.min_kept)
        if self.settings.target.ratio <= least:
            raise ValueError(refusal(self.settings, self.analysis, least))

    def note_on_target(self) -> str | None:
        """Compose a note on a target that whole groups or blocks may miss.

        Returns:
            str, optional: None if it leaves a channel or a block in each
            group, and is not above what whole blocks leave.
        """
        numbers, most = self.min_kept.clamp(min=1), 1.
        if self.blocks is not None:
            full = self.blocks.full(torch.ones_like(self.gates.closed) > 0)
            numbers = torch.minimum(self.blocks.rounded_up(numbers), full)
            share = (full / self.cost.sizes)[self.cost.group_of]
            most = float(self.cost(share))
        return on_target(self.settings, self._cost_of(numbers), most)

    @torch.no_grad()
    def _cost_of(self, numbers: Tensor) -> float:
        """Share of the cost with so many gates ``(S,)`` open in each group."""
        kept = self.gates.strongest(self.cost.group_of, numbers)
        kept = kept_channels(self.analysis, kept.float())
        return float(self.cost(kept.to(self.gates.theta)))

    def note_on(self, left: float) -> str | None:
        """Compose a note on a network that misses the target.

        Args:
            left (float): Share of the dense cost that is left in it.

        Returns:
            str, optional: None if it is within one percentage point.
        """
        return on_miss(self.settings, left, bool(self.gates.notes()))

    def budget(self, progress: float) -> float:
        """Share of the dense cost that is allowed at a progress in [0, 1]."""
        target = self.settings.target.ratio
        if (not self.gates.gradual
                and self.schedule.phase_at(progress) != 'warmup'):
            return target
        return self.schedule.budget_at(progress, target)

    @torch.no_grad()
    def figures(self, progress: float) -> Figures:
        """Return the state of the gates, read from their device at once.

        Args:
            progress (float): Share of the training that is over, in [0, 1].
        """
        state = self._state(self.gates.openness(), progress)
        return Figures.of(read(state), self.budget(progress))

    def _state(self, openness: Tensor, progress: float) -> dict[str, Tensor]:
        """Compute what :class:`Figures` tells, on the device of the gates."""
        weight = 1. if self.gates.WHOLE_CHANNELS else (
            self.schedule.channel_weight_at(progress))
        return dict(
            state_of(openness, self.flops, self.cost, weight),
            multiplier=self.gates.multiplier)

    # -- the training ------------------------------------------------------

    def begin_(self, progress: float, steps: float) -> None:
        """Prepare gates that another training moved, in place.

        Args:
            progress (float): Share of this training that is over.
            steps (float): Number of steps of the optimizer in it.
        """
        self.gates.begin_(self.schedule.pruned_share(progress))
        is_over = self.schedule.phase_at(progress) == 'settling'
        self._prepare_(progress, steps, steps_before(progress, steps), is_over
                       and self.gates.is_settled())

    @torch.no_grad()
    def step_(self, progress: float, steps: float) -> Figures | None:
        """Move all gates by one step, in place, by the gradient of theta.

        The gradient is removed, so that no optimizer moves or decays theta,
        and the next backward pass starts anew. All processes take the gates
        of the first one. The host reads from the device of the gates once,
        at the end, and only if a whole group has closed a few times more.

        Args:
            progress (float): Share of the training that is over, in [0, 1].
            steps (float): Number of such steps in the whole training.

        Returns:
            Figures, optional: State of the gates after the step; None in the
            settling phase, where gates rest in between in a long training,
            and early in the warm-up of gates that are fully open, where the
            gradient tells nothing that counts later.

        Raises:
            RuntimeError: If the cost is not measured, or theta has no
                gradient.
        """
        if self.unmeasured:
            raise RuntimeError('expected a measured latency before the first '
                               'step of the gates, but got none; train with '
                               'GDPHook, or call measure_()')
        figures = None
        index = steps_before(progress, steps)
        is_over = self.schedule.phase_at(progress) == 'settling'
        # Also where gradients are accumulated and steps are many iterations
        # apart.
        is_last = self.schedule.is_last_pruning_step(progress,
                                                     1 / max(steps, 1))
        # Mixed precision may have skipped the last step of the pruning phase.
        if self.gates.heeded and not (is_over and self.gates.is_settled()):
            self.gates.gradient()
            if not (self._is_early(progress, steps)
                    or self.schedule.is_rest(index, steps)):
                figures = self._step_(progress, steps, is_over or is_last)
        self.gates.theta.grad = None
        self._prepare_(progress, steps, index + 1, is_over or is_last)
        return figures

    def _prepare_(self, progress: float, steps: float, index: int,
                  is_over: bool) -> None:
        """Note what the passes of the next step are observed for, in place.

        Args:
            progress (float): Share of the training that is over.
            steps (float): Number of steps in the whole training.
            index (int): Number of them before the next one.
            is_over (bool): Whether the gates no longer move.
        """
        # A step ahead, because a resume may begin between two steps.
        ahead = progress + 2 / max(steps, 1)
        self.gates.heeded = not (is_over or self._is_early(ahead, steps)
                                 or self.schedule.is_rest(index, steps))
        if self.takeover is not None:
            self.takeover.watch_(self.schedule.is_takeover(index, steps))

    def _is_early(self, progress: float, steps: float) -> bool:
        """Tell whether open gates need not observe their gains yet."""
        if progress >= self.schedule.observed_from(steps):
            return False
        if self.gates.known_open is None:
            self.gates.note_open_(bool(self.gates.are_open()))
        return bool(self.gates.known_open)

    def _step_(self, progress: float, steps: float, is_last: bool) -> Figures:
        """Move all gates by one step (see :meth:`step_`), in place."""
        phase = self.schedule.phase_at(progress)
        # The last step of the pruning phase has the target for its budget.
        if is_last:
            progress = self.schedule.end_of_pruning
        tensors = [*self.gates.state_dict().values()]
        saved = [tensor.clone() for tensor in tensors]
        # First observe: the gradient belongs to the state of the forward pass.
        finite = self.gates.observe_()
        self.gates.anneal_(self.schedule.pruned_share(progress))
        openness = self.gates.openness()
        alive = self._alive_groups(openness)
        if phase != 'warmup':
            self._move_(openness, progress, steps)
        # Undo the step instead of asking first, for which the host would wait.
        for tensor, old in zip(tensors, saved):
            tensor.copy_(torch.where(finite, tensor, old))
        self.gates.agree_()
        if is_last:
            self._settle_(progress)
            self.gates.agree_()
        openness = self.gates.openness()
        if self.takeover is not None:
            self.takeover.take_over_(openness)
            if is_last:
                self.takeover.forget_()
        died = (alive & ~self._alive_groups(openness)).any()
        state = read(
            dict(
                self._state(openness, progress),
                moved=finite,
                died=died,
                are_open=self.gates.are_open()))
        self.gates.note_open_(bool(state['are_open'][0]))
        if state['died'][0] and (self.gates.ABSORBING or is_last):
            self._close_dead_()
            state |= read(self._state(self.gates.openness(), progress))
        return Figures.of(state, self.budget(progress))

    def _settle_(self, progress: float) -> None:
        """Fix the gates for the settling phase, in place."""
        if not self.gates.ABSORBING:
            # What they cost is the others' then.
            self._close_dead_()
        self.gates.settle_(
            self.cost,
            self.budget(progress) + self._rounding(self.gates.openness()),
            self._protected(progress, True), self.blocks)

    def _move_(self, openness: Tensor, progress: float, steps: float) -> None:
        """Move all gates by one step of the pruning phase, in place."""
        self.gates.step_(
            self.cost,
            self.budget(progress) + self._rounding(openness),
            self.schedule.period(steps) * self.settings.gate_travel /
            max(steps * self.schedule.phases[1], 1),
            self.schedule.channel_weight_at(progress),
            self._protected(progress), self._scarcity(openness), self.blocks)

    def _rounding(self, openness: Tensor) -> Tensor:
        """Half of the price of the dearest open gate or block, a scalar.

        It rounds the budget to the nearest channel. A budget that is never
        exceeded would be missed by up to one channel, which is more than a
        point in a small network.
        """
        price = self.cost.price(openness).masked_fill(openness == 0, 0)
        if self.blocks is not None:
            price = price * self.blocks.sizes[self.blocks.group_of]
        return (price.max() / 2).clamp(max=_LARGEST_ROUNDING)

    def _protected(self,
                   progress: float,
                   settles: bool = False) -> Tensor | None:
        """Mask ``(G,)`` of the gates that must not close in this step.

        They are the strongest gates of each group, as many as
        ``min_keep_ratio`` asks for; late in the phase at least one, or one
        block.
        """
        numbers, blocks = self.min_kept, self.blocks
        if self.schedule.protects_groups(progress):
            numbers = numbers.clamp(min=1)
        elif not self.settings.min_keep_ratio and blocks is None:
            return None
        if blocks is None:
            return self.gates.strongest(self.cost.group_of, numbers)
        # A half-open gate goes on closing with its block.
        standing = self.gates.standing()
        kept = self.gates.strongest(blocks.group_of,
                                    blocks.rounded_up(numbers), standing)
        if settles and not self.gates.ABSORBING:
            return kept  # They may open others instead of large blocks.
        is_open = self.gates.openness() > 0
        large = too_large(self.cost, blocks, is_open,
                          self.settings.target.ratio - _LARGEST_ROUNDING)
        # What is open beyond whole blocks is no block, and closes.
        return kept | large & self.gates.strongest(
            blocks.group_of, blocks.full(is_open), standing)

    def _scarcity(self, openness: Tensor) -> Tensor:
        """Factor ``(G,)`` of the worth of a channel as its group shrinks.

        A gain tells what is lost with one channel while the others of its
        group can stand in for it. The fewer are left, the less they can.
        """
        left = self.cost.group_sums(openness).clamp(min=1)
        return (self.cost.sizes / left).index_select(0, self.cost.group_of)

    def _close_dead_(self) -> None:
        """Close gates that feed only closed layers or are fed by none.

        So do all gates of the groups of which nothing is kept.
        """
        openness = self.gates.openness()
        keep = live_channels(self.analysis, openness).to(openness.device)
        is_dead = self.cost.group_sums(keep.to(openness)) == 0
        self.gates.close_(~keep & (is_dead[self.cost.group_of]
                                   | (openness > 0)))

    def _alive_groups(self, openness: Tensor) -> Tensor:
        """Mask ``(S,)`` of the groups with a gate that is not closed."""
        return self.cost.group_sums(openness.sign()) > 0

    @torch.no_grad()
    def channels(self) -> Tensor:
        """Mask ``(G,)`` of 0 and 1: the gates whose channels a cut keeps."""
        keep = kept_channels(self.analysis, self.gates.decided())
        return keep.to(self.gates.theta)
