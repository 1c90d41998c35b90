"""SCP: soft channel pruning by masks of the batch norms.

"Operation-Aware Soft Channel Pruning using Differentiable Masks" (Kang and
Han, ICML 2020): a channel is masked by the probability that its batch norm
and ReLU deactivate it. The masks are the paper's, as its official code
computes them. The budget is this project's own: it solves for the threshold of
the masks, and holds a scale-free strength of the penalty.

Letters: ``G`` gates, ``R`` channels of all norms that tell of them.
"""
from __future__ import annotations

import math
from typing import Any, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..analysis.structure import Analysis
from .base import CostFunction, GateMethod, has_processes
from .blocks import Blocks
from .deactivation import Evidence
from .masks import drop_probability, soft_mask, uniform_numbers
from .norm_checks import with_evidence
from .ranking import Ranking, midway
from .scp_options import (SHARPNESS, SPREAD, TAU, TEMPERATURE, THRESHOLD,
                          check_options)

# Least solved threshold: a fresh norm has Phi = 0.52, and a threshold there
# would turn the masks of a whole layer into noise.
_LEAST_THRESHOLD = 0.75
# Distance by which the penalty alone would move beta in the pruning phase, in
# units of how far the channels are from being deactivated: that of the
# authors' ResNet-56 on CIFAR-10, 5e-5 times the sum of lr / (1 - momentum).
_STRENGTH = 3.3
# Default of gate_travel: the same distance for a gate of GDP.
_TRAVEL = 8.
# Growth of the strength over a phase of steps that miss the budget: by e^2,
# about 1 % a step in 200 steps.
_GROWTH = 2.
# Least openness of a gate that is kept.
_LEAST_OPENNESS = 1e-3


class SCPGates(GateMethod):
    """SCP masks of a model, which its batch norms decide.

    A gate has no parameter of its own. Its probability of being deactivated
    (see :mod:`gdp_mmseg.gates.deactivation`) gives

    .. code-block:: text

        p = sigma(k (Phi - c))                     of being masked
        m = sigma((log((1 - p) / p) + L) / T)      L logistic noise

    In training the kernels are multiplied by m, one draw for each step, which
    all layers and images share; in evaluation by 1 if Phi <= c, else by 0. The
    gradient of m passes to the norms. All of this is SCP.

    The rest is ours: c is the largest threshold, at most 0.95, whose kept
    channels are within the budget, but at least 0.75. While the budget is
    not met at 0.95, the penalty of SCP, beta + s |gamma|, moves the norms of
    all gates that are not deactivated, as a step of its own besides the
    optimizer's. Gates come and go until the pruning phase ends; then those of
    the largest Phi close, as many as the budget asks for.

    With ``threshold`` and ``penalty``, both are as in the paper instead, and
    no budget is held.

    Args:
        evidence (Evidence): Norms of ``G`` gates.
        k (float): Sharpness of the masks.
        T (float): Temperature of the draw.
        s (float): Weight of |gamma| in the penalty.
        threshold (float, optional): Fixed c.
        penalty (float, optional): Fixed weight of the penalty in the loss.
        tau (float): See :class:`Evidence`, which has it.
        streams (bool): Whether sums have gates, see :meth:`admitted`.
    """

    OPTIONS = ('tau', 'k', 'T', 's', 'streams', 'threshold', 'penalty')
    ABSORBING = False
    WHOLE_CHANNELS = True
    MULTIPLIER = (
        'strength of the penalty of the norms; 0 while the budget is '
        'met without it')
    score: Tensor
    kept: Tensor
    phase: Tensor
    limit: Tensor
    step_number: Tensor
    seed: Tensor
    distance: Tensor
    strength: Tensor
    push: Tensor
    mask: Tensor

    def __init__(self,
                 num_gates: int,
                 evidence: Evidence,
                 tau: float = TAU,
                 k: float = SHARPNESS,
                 T: float = TEMPERATURE,
                 s: float = SPREAD,
                 streams: bool = False,
                 threshold: float | None = None,
                 penalty: float | None = None) -> None:
        super().__init__(num_gates)
        self.evidence = evidence
        self.sharpness, self.temperature, self.spread = k, T, s
        self.threshold, self.penalty = threshold, penalty
        self.gradual = penalty is None
        # It only receives the gradient of the masks, and stays zero.
        nn.init.zeros_(self.theta)
        # Logarithm of 1 - Phi at the last step.
        self.register_buffer('score', torch.zeros(num_gates))
        self.register_buffer('kept', torch.ones(num_gates))
        # 0 before the first step of the pruning phase, 1 in it, 2 after it.
        self.register_buffer('phase', torch.tensor(0.))
        self.register_buffer('limit', torch.tensor(threshold or THRESHOLD))
        self.register_buffer('step_number', torch.tensor(0))
        self.register_buffer('seed',
                             torch.tensor(torch.initial_seed() % 2**32))
        self.register_buffer('distance', torch.tensor(1.))
        self.register_buffer('strength', torch.tensor(1.))
        self.register_buffer('push', torch.zeros(num_gates))
        self.register_buffer('mask', torch.ones(num_gates), persistent=False)
        self._drawn = self._settled = False
        self._finite: Tensor | None = None

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        """Check the values of some options.

        Raises:
            ValueError: If one is out of its range.
        """
        check_options(options)

    @classmethod
    def of(cls, analysis: Analysis, **options: Any) -> GateMethod:
        """Make the gates of a model (see :class:`GateMethod`)."""
        evidence = Evidence(analysis, options.get('tau', TAU))
        return cls(analysis.num_gates, evidence, **options)

    @classmethod
    def admitted(cls,
                 analysis: Analysis,
                 model: nn.Module,
                 streams: bool = False,
                 **_: Any) -> Analysis:
        """Freeze the groups that no batch norm tells enough of.

        Args:
            analysis (Analysis): Analysis of the model.
            model (nn.Module): The model, which stays unchanged.
            streams (bool): Whether gates may stand where batch norms are
                added up, or without a ReLU. Where several layers read such
                channels, all of their norms have to agree. By default gates
                only stand where each reader sees a batch norm and a ReLU, as
                in the paper's networks; residual streams keep their width.

        Raises:
            ValueError: If no gate is left.
        """
        return with_evidence(analysis, model, streams)

    def bind_(self, model: nn.Module) -> None:
        """Take the norms of a model, in place."""
        self.evidence.bind_(model)

    def notes(self) -> list[str]:
        """List what a user should know at the start of a training."""
        if self.penalty is None:
            return []
        return [
            f'gdp.gate.threshold={self.threshold} and penalty={self.penalty} '
            'decide how much is pruned, and gdp.target is not held'
        ]

    def outcome(self) -> list[str]:
        """Tell the last threshold, and what the budget forced out."""
        closed = self.is_closed()
        forced = closed & (self._phi() < THRESHOLD)
        return [
            f'threshold of SCP at the end: {float(self.limit):.4f}; '
            f'{int(forced.sum())} of {int(closed.sum())} closed gates had a '
            f'Phi below {THRESHOLD}, and were forced out by the budget'
        ]

    # -- the forward pass --------------------------------------------------

    def levels(self) -> tuple[Tensor, Tensor]:
        """Soft masks of all gates and their slope, ``(G,)`` each."""
        return self.mask + self.theta, torch.ones_like(self.mask)

    def draw_(self) -> None:
        """Draw the masks of the next forward passes, in place, if due."""
        if not self._drawn:
            self._draw_()

    @torch.compiler.disable
    @torch.no_grad()
    def _draw_(self) -> None:
        self._drawn = True
        if self._settled:  # Channels may have left the norms.
            self.mask.fill_(1)
            return
        mask = self._masks(*self.evidence.values())
        self.mask.copy_(torch.where(self._prunes(), mask, 1.))

    def _masks(self, beta: Tensor, gamma: Tensor) -> Tensor:
        """Masks ``(G,)`` of this step, differentiable in both ``(R,)``."""
        phi = -self.evidence.log_active(beta, gamma).expm1()
        drop = drop_probability(phi, self.limit, self.sharpness)
        uniform = uniform_numbers(self.seed, self.step_number, len(phi))
        return soft_mask(drop, uniform, self.temperature)

    def _prunes(self) -> Tensor:
        """Tell on the device whether the pruning phase runs, a scalar bool."""
        # An average of models may average it: above 1 is settled.
        return (self.phase > 0) & (self.phase <= 1)

    def are_open(self) -> Tensor:
        """Return whether all masks are 1 in training, a scalar bool."""
        return ~self._prunes() & ~self.is_closed().any()

    # -- the state of the gates --------------------------------------------

    def openness(self) -> Tensor:
        """Rescaled probability ``(G,)`` of being kept, from 0 at Phi = 1."""
        drop, least, most = (
            drop_probability(phi, self.limit.double(), self.sharpness)
            for phi in (self._phi(), 1., 0.))
        soft = ((least - drop) / (least - most)).clamp(min=_LEAST_OPENNESS)
        value = torch.where(self._prunes(), soft.to(self.score), 1.)
        return value * self.decided()

    def decided(self) -> Tensor:
        """Openness ``(G,)`` in evaluation and for the cut: 0 or 1."""
        value = torch.where(self._prunes() & (self.kept <= 0.5), 0., 1.)
        return value.masked_fill(self.is_closed(), 0)

    def worth(self) -> Tensor:
        """Logarithm ``(G,)`` of 1 - Phi."""
        return self.score

    # -- the training ------------------------------------------------------

    def begin_(self, pruned_share: float) -> None:
        """Take the phase of a training that begins or resumes, in place."""
        self._settled, self._drawn = pruned_share >= 1, False
        if pruned_share < 1:
            self.phase.clamp_(max=1 if pruned_share else 0)

    @torch.no_grad()
    def observe_(self) -> Tensor:
        """Pass the gradient of the masks to the norms, in place.

        Returns:
            Tensor: Scalar bool, False if it is not finite; nothing is passed
            then.
        """
        gradient = self.gradient()
        self._finite = gradient.isfinite().all()
        passed = torch.where(self._finite & self._prunes(), gradient.double(),
                             0.)
        beta, gamma = (one.requires_grad_() for one in self.evidence.values())
        with torch.enable_grad():
            found = torch.autograd.grad(
                self._masks(beta, gamma), (beta, gamma), passed)
        self.evidence.add_gradients_(found[0], found[1], self.loss_scale)
        return self._finite

    @torch.no_grad()
    def step_(self,
              cost: CostFunction,
              budget: Tensor | float,
              lr: float,
              channel_weight: float = 0.5,
              protected: Tensor | None = None,
              scarcity: Tensor | float = 1.,
              blocks: Blocks | None = None) -> None:
        """Solve for the threshold, and push the norms by the penalty.

        Args:
            cost (CostFunction): Cost and its price.
            budget (Tensor | float): Upper bound of the cost in channels that
                are kept.
            lr (float): Distance that a gate of GDP may move in this step; the
                push is proportional to it.
            channel_weight (float): Not used: whole channels count.
            protected (Tensor, optional): ``(G,)`` bool, gates that are kept
                whatever their Phi is.
            scarcity (Tensor | float): Not used.
            blocks (Blocks, optional): Gates that close together.
        """
        beta, gamma = self.evidence.values()
        self.distance.copy_(
            torch.where(self.phase == 0, self.evidence.distance(beta, gamma),
                        self.distance))
        self.score.copy_(self.evidence.log_active(beta, gamma))
        if self.penalty is None:
            self._push_(gamma)
            self._hold_(cost, budget, lr, protected, blocks)
        else:
            self._penalise_(gamma, self.penalty)
            self.kept.copy_(self._phi() <= self.limit)
        self.phase.fill_(1)
        self.step_number += 1
        self._drawn = False

    def _phi(self) -> Tensor:
        return -self.score.double().expm1()

    def _hold_(self, cost: CostFunction, budget: Tensor | float, lr: float,
               protected: Tensor | None, blocks: Blocks | None) -> None:
        """Solve for threshold and kept gates, and for the next push."""
        ranking = Ranking(self, cost, protected, blocks)
        phi = -ranking.worth[ranking.order].double().expm1()
        natural = (phi > THRESHOLD).sum()
        cut = ranking.least_cut(budget)
        is_met = cut <= natural
        self.limit.copy_(
            torch.where(is_met, THRESHOLD,
                        midway(phi, cut)).clamp(_LEAST_THRESHOLD, THRESHOLD))
        # Those that the soft masks keep, too.
        soft_cut = torch.minimum(
            torch.maximum(cut, natural), (phi > _LEAST_THRESHOLD).sum())
        self.kept.copy_(ranking.kept(soft_cut))
        is_missed = cost(ranking.channels(soft_cut)) > budget
        self.strength.mul_(
            torch.where(is_missed, math.exp(_GROWTH * lr / _TRAVEL), 1.))
        self.multiplier.copy_(torch.where(is_met, 0., self.strength))
        pushed = ~ranking.kept(cut) & (self._phi()
                                       <= THRESHOLD) & ~self.is_closed()
        if protected is not None:
            pushed &= ~protected
        self.push.copy_(pushed * self.multiplier * self.distance *
                        (lr * _STRENGTH / _TRAVEL))

    def _push_(self, gamma: Tensor) -> None:
        """Move the norms as the penalty would, by the push of the last step.

        All processes agree on it.
        """
        moved = self.evidence.rows_of(self.push * self._finite_or_not())
        shrunk = torch.minimum(moved * self.spread, gamma.abs())
        self.evidence.move_(-moved, -shrunk * gamma.sign())

    def _penalise_(self, gamma: Tensor, penalty: float) -> None:
        """Add the gradient of the paper's penalty to that of the norms."""
        rows = self.evidence.rows_of(~self.is_closed()
                                     & self._finite_or_not()) * penalty
        self.evidence.add_gradients_(rows, rows * self.spread * gamma.sign(),
                                     self.loss_scale)

    def _finite_or_not(self) -> Tensor | bool:
        """Tell whether the last gradient was finite, a scalar bool."""
        return True if self._finite is None else self._finite

    def agree_(self) -> None:
        """Copy the first process's gates to all processes, in place."""
        super().agree_()
        if has_processes():
            for tensor in (self.kept, self.limit, self.strength, self.push,
                           self.seed):
                dist.broadcast(tensor, 0)

    @torch.no_grad()
    def settle_(self,
                cost: CostFunction,
                budget: Tensor | float,
                protected: Tensor | None = None,
                blocks: Blocks | None = None) -> None:
        """Close the gates of the largest Phi for good, in place.

        As many close as the budget asks for. With the paper's own objective,
        those close whose Phi is above the threshold.

        Args:
            cost (CostFunction): Cost and its price.
            budget (Tensor | float): Upper bound of the cost of what is kept.
            protected (Tensor, optional): See :meth:`step_`.
            blocks (Blocks, optional): See :meth:`step_`.
        """
        if self.penalty is None:
            ranking = Ranking(self, cost, protected, blocks)
            cut = ranking.least_cut(budget)
            self.kept.copy_(ranking.trimmed(cut, budget))
            phi = -ranking.worth[ranking.order].double().expm1()
            self.limit.copy_(midway(phi, cut).clamp(max=THRESHOLD))
        self.close_(self.kept < 0.5)
        self.phase.fill_(2)
        self._settled, self._drawn = True, False

    def is_settled(self) -> bool:
        """Tell whether the pruning phase is over."""
        return bool(self.phase > 1)
