"""The gates of a model with their settings, cost, schedule and step."""
from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor, nn

from ..analysis.liveness import constant_channels, kept_channels
from ..analysis.structure import Analysis
from ..cost.counts import Cost, FlopCost, ParameterCost, inference_layers
from ..cost.latency import LatencyCost, Stopwatch, measure, stopwatch
from ..gates.base import held_cost
from ..gates.gdp import Gates
from .schedule import Schedule
from .settings import COSTS, Settings

# Of the share that a target is about; never above it by more.
_NEARLY_A_POINT = 0.009


class Pruner(nn.Module):
    """The gates of a model, with all that governs them.

    Lives at ``model.gdp``; the only thing that a gated model has more.

    Args:
        analysis (Analysis): What the analysis of the model found.
        settings (Settings): See there.

    Attributes:
        gates (Gates): Their state is in the model's state dict.
        flops (FlopCost): Share of the dense multiply-adds.
        cost (Cost): Share of what the target is about; may be ``flops``.
        hooked (bool): Whether a training's ``GDPHook`` moves the gates.

    Raises:
        ValueError: If the target is below what cannot be pruned.
    """

    min_kept: Tensor

    def __init__(self, analysis: Analysis, settings: Settings) -> None:
        super().__init__()
        self.analysis = analysis
        self.settings = settings
        self.schedule = Schedule(settings.phases, settings.epsilon)
        self.gates = Gates(analysis.num_gates, settings.epsilon[0],
                           settings.close_below)
        self.flops = FlopCost(analysis)
        self.cost: Cost = self.flops
        self.hooked = False
        if settings.target.type == 'params':
            self.cost = ParameterCost(analysis)
        elif settings.target.type == 'latency':
            self.cost = LatencyCost(analysis)
        self.register_buffer(
            'min_kept',
            torch.tensor([
                math.ceil(settings.min_keep_ratio * len(group.gates))
                for group in analysis.groups
            ]),
            persistent=False)
        if not self.unmeasured:
            self.check_target()

    def train(self, mode: bool = True) -> Pruner:
        """As for any module; warns if nothing moves the gates."""
        if mode and not self.hooked:
            warnings.warn('GDPModel: nothing moves the gates, no channel will '
                          'go; to prune, set default_hooks=dict(gdp=dict('
                          "type='gdp_mmseg.GDPHook'))")
        return super().train(mode)

    @property
    def unmeasured(self) -> bool:
        """Whether the cost is yet to be measured, by :meth:`measure_`."""
        return isinstance(self.cost, LatencyCost) and not self.cost.measured

    def measure_(self, stopwatch: Stopwatch = stopwatch) -> None:
        """Measure the latency of the model's layers, where it is, in place.

        Args:
            stopwatch (Stopwatch): See :func:`gdp_mmseg.latency.measure`.
        """
        coefficients = measure(
            inference_layers(self.analysis), self.gates.theta.device,
            stopwatch)
        self.cost.weigh_(coefficients.flatten())

    @torch.no_grad()
    def check_target(self) -> None:
        """Fail if the target is below what no gate can save.

        Raises:
            ValueError: If so.
        """
        kept = self.gates.strongest(self.cost.group_of, self.min_kept)
        kept = kept_channels(self.analysis, kept.float())
        least = float(self.cost(kept.to(self.gates.theta)))
        target = self.settings.target
        if target.ratio <= least:
            raise ValueError(
                f'gdp.target: expected more than {least:.4f}, the share of '
                f'{COSTS[target.type]} that no gate can save, but got '
                f'{target.ratio}')

    def begin_(self, progress: float) -> None:
        """Take the gates of another training as they are, in place.

        Args:
            progress (float): Share of this one that is over.
        """
        self.gates.raise_epsilon_(self.schedule.epsilon_at(progress))

    def budget(self, progress: float) -> float:
        """The budget, a share of the dense cost, at ``progress`` in [0, 1]."""
        return self.schedule.budget_at(progress, self.settings.target.ratio)

    @torch.no_grad()
    def held_cost(self, progress: float) -> float:
        """What is held against the budget at ``progress`` in [0, 1]."""
        return float(
            held_cost(self.cost, self.gates.openness(),
                      self.schedule.channel_weight_at(progress)))

    @torch.no_grad()
    def step_(self, progress: float, steps: int) -> bool:
        """Move all gates by one step, in place, by theta's gradient.

        Args:
            progress (float): Share of the training that is over, in [0, 1].
            steps (int): How many of these the training has.

        Returns:
            bool: False, with no gate moved, if the gradient is not finite.

        Raises:
            RuntimeError: If the cost is not measured.
        """
        if self.unmeasured:
            raise RuntimeError('expected a measured latency before the first '
                               'step of the gates, but got none; train with '
                               'GDPHook, or call measure_()')
        progress = self.schedule.with_the_end(progress, 1 / max(steps, 1))
        phase = self.schedule.phase_at(progress)
        if phase == 'settling':
            return True
        # At the epsilon that the gradient is of.
        if not self.gates.observe_():
            return False
        self.gates.set_epsilon_(self.schedule.epsilon_at(progress))
        if phase == 'pruning':
            self._move_(progress, steps)
        return True

    def _move_(self, progress: float, steps: int) -> None:
        """Move all gates by one step of the pruning phase, in place."""
        alive = self._alive()
        self.gates.step_(
            self.cost,
            self.budget(progress) + self._rounding(),
            self.settings.gate_travel /
            max(steps * self.schedule.phases[1], 1),
            self.schedule.channel_weight_at(progress),
            self._protected(progress), self._scarcity())
        self._close_dead_(alive)

    def _rounding(self) -> float:
        """Half of what the dearest open gate costs: to the nearest channel.

        A budget that must not be passed would be missed by a whole channel,
        which in a small network is more than a point.
        """
        openness = self.gates.openness()
        price = self.cost.price(openness).masked_fill(openness == 0, 0)
        return min(float(price.max()) / 2, _NEARLY_A_POINT)

    def _protected(self, progress: float) -> Tensor | None:
        """Gates that must not close now: of the floor, the last of a group."""
        numbers = self.min_kept
        if self.schedule.protects_groups(progress):
            numbers = numbers.clamp(min=1)
        elif not self.settings.min_keep_ratio:
            return None
        return self.gates.strongest(self.cost.group_of, numbers)

    def _scarcity(self) -> Tensor:
        """How much more each channel is worth for what its group lost, (G,).

        A gain says what is lost with one channel while the others of its group
        can stand in for it: the fewer are left, the less they can.
        """
        openness = self.gates.openness()
        whole = self.cost.group_sums(torch.ones_like(openness))
        left = self.cost.group_sums(openness).clamp(min=1)
        return (whole / left)[self.cost.group_of]

    def _close_dead_(self, before: int) -> None:
        """Close what only feeds closed layers, or is fed by none.

        Only if a group died: ``before`` were alive.
        """
        while self._alive() < before:
            before = self._alive()
            openness = self.gates.openness()
            keep = kept_channels(self.analysis, openness)
            keep &= ~constant_channels(self.analysis, keep)
            self.gates.close_(~keep.to(openness.device))

    def _alive(self) -> int:
        """Groups with an open gate."""
        opened = (self.gates.openness() > 0).cpu()
        return sum(
            bool(opened[group.gates].any()) for group in self.analysis.groups)

    def channels(self) -> Tensor:
        """1 for each gate whose channels a pruned model has, ``(G,)``."""
        with torch.no_grad():
            keep = kept_channels(self.analysis, self.gates.openness())
        return keep.to(self.gates.theta)
