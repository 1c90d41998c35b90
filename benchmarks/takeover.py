"""Takeover: kernels do without a closing channel as well as they can.

A channel that closes takes with it what its readers got from it. Much of that
is in other channels, too. Where a gate closes, each layer that reads its
channel adds to the kernels of the channels that stay the least-squares
estimate of what is lost:

    x_j  ~  sum over k of A_kj x_k + constant,   W_k <- W_k + A_kj g_j W_j

The constant is lost in a batch norm; without one it goes into the bias.

Letters: ``G`` gates, ``C`` channels that a layer reads, ``F`` those of them
that close, ``n`` positions.
"""
from __future__ import annotations

from typing import Any, Callable, Mapping

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor, nn

from gdp_mmseg.analysis.liveness import kept_channels, kept_slots
from gdp_mmseg.analysis.structure import Layer
from gdp_mmseg.engine.model import find_pruner
from gdp_mmseg.gates.lookup import slot_values
from gdp_mmseg.gates.scaling import along
from gdp_mmseg.pruner.pruner import Pruner

# Share of the mean variance of the channels that is added to each of them,
# because the covariance is an estimate.
RIDGE = 0.01
# Decay of the moments at each batch: the weights that they depend on change.
DECAY = 0.95
# Least change of an openness that counts.
LEAST_FALL = 1e-3
# Most positions of a batch that the moments take into account.
POSITIONS = 4096


class Moments:
    """Running means of the channels that a layer reads, and of products.

    Args:
        slots (Tensor): ``(C,)`` gate of each channel, -1 for none.

    Examples:
        >>> moments = Moments(torch.tensor([0, 1]))
        >>> moments.add_(torch.tensor([[0., 2.], [2., 4.]]))
        >>> moments.mean.tolist(), moments.covariance().tolist()
        ([1.0, 3.0], [[1.0, 1.0], [1.0, 1.0]])
    """

    def __init__(self, slots: Tensor) -> None:
        self.slots = slots
        self.count = 0
        self._weight = 0.
        self._sum = torch.zeros(len(slots))
        self._squares = torch.zeros(len(slots), len(slots))

    def add_(self, samples: Tensor) -> None:
        """Take samples ``(n, C)`` into account, in place."""
        self._sum = self._sum.to(samples)
        self._squares = self._squares.to(samples)
        self._weight += (1 - DECAY) * (1 - self._weight)
        self._sum.lerp_(samples.mean(0), 1 - DECAY)
        self._squares.lerp_(samples.T @ samples / len(samples), 1 - DECAY)
        self.count += len(samples)

    def select_(self, left: Tensor) -> None:
        """Drop the channels that a cut took away, in place.

        Args:
            left (Tensor): ``(C,)`` bool, channels that are left.
        """
        self.slots = self.slots[left]
        self._sum = self._sum[left]
        self._squares = self._squares[left][:, left]

    @property
    def mean(self) -> Tensor:
        """Mean ``(C,)`` of each channel."""
        return self._sum / self._weight

    def covariance(self, centred: bool = True) -> Tensor:
        """Covariance ``(C, C)``, or the mean products if not centred."""
        products = self._squares / self._weight
        return products - torch.outer(self.mean, self.mean) * centred


def estimator(covariance: Tensor, closing: Tensor, stays: Tensor,
              openness: Tensor) -> Tensor:
    """Coefficients of the least-squares estimate of closing channels.

    Args:
        covariance (Tensor): ``(C, C)``.
        closing (Tensor): ``(C,)`` bool, channels to estimate.
        stays (Tensor): ``(C,)`` bool, channels to estimate them by.
        openness (Tensor): ``(C,)`` factor of each channel that stays.

    Returns:
        Tensor: ``(K, F)`` coefficients ``A`` of the channels that stay before
        they are multiplied by their openness.

    Examples:
        The second channel is twice the first, which is half open.

        >>> covariance = torch.tensor([[1., 2.], [2., 4.]])
        >>> half = torch.tensor([0.5, 0.])
        >>> found = estimator(covariance, half == 0, half > 0, half)
        >>> round(float(found), 1)
        3.6
    """
    factors = openness[stays]
    known = covariance[stays][:, stays] * torch.outer(factors, factors)
    wanted = covariance[stays][:, closing] * factors[:, None]
    ridge = RIDGE * covariance.diagonal().mean()
    known = known.double() + ridge * torch.eye(len(known)).to(known).double()
    return torch.linalg.solve(known, wanted.double()).to(covariance)


def unexplained(covariance: Tensor) -> Tensor:
    """Share ``(C,)`` of each channel's variance that the others do not tell.

    Args:
        covariance (Tensor): ``(C, C)``.

    Examples:
        The first two channels are the same but for their scale.

        >>> found = unexplained(
        ...     torch.tensor([[1., 2., 0.], [2., 4., 0.], [0., 0., 1.]]))
        >>> [round(value, 1) for value in found.tolist()]
        [0.0, 0.0, 1.0]
    """
    ridge = RIDGE * covariance.diagonal().mean()
    known = covariance.double() + ridge * torch.eye(
        len(covariance)).to(covariance).double()
    rest = 1 / torch.linalg.inv(known).diagonal()
    return (rest / known.diagonal()).to(covariance)


@HOOKS.register_module()
class TakeoverHook(Hook):
    """Hook that lets the readers of a closing channel do without it.

    Args:
        interval (int): Iterations between two updates of the moments.
        weigh_every (int): Iterations between two updates of factors of the
            gains; 0 for none. A channel that the others tell can be taken
            over, so that its gain counts less.
        gradually (bool): Whether what is lost is taken over as soon as a gate
            falls, not only when it closes; and given back if it rises.
    """

    def __init__(self,
                 interval: int = 2,
                 weigh_every: int = 0,
                 gradually: bool = False) -> None:
        self.interval = interval
        self.gradually = gradually
        self.weigh_every = weigh_every
        self._layers: dict[str, _Reader] = {}
        self._openness = self._present = torch.empty(0)
        self._factors: Tensor | float = 1.

    def before_train(self, runner: Runner) -> None:
        """Begin to observe what the gated layers read."""
        pruner = find_pruner(runner.model)
        self._openness = pruner.gates.openness().detach()
        self._present = torch.ones(pruner.analysis.num_gates, dtype=torch.bool)
        self._layers = {
            layer.name:
            _Reader(
                runner.model.get_submodule(layer.name), layer, pruner,
                self._kept)
            for layer in pruner.analysis.gated_layers()
            if _is_known(runner.model.get_submodule(layer.name))
        }
        if self.weigh_every:
            plain = pruner._scarcity
            pruner._scarcity = lambda openness: plain(openness) * self._factors

    def _kept(self, pruner: Pruner) -> Tensor:
        """Gates ``(G,)`` whose channels are left in a pass after a cut."""
        is_open = (~pruner.gates.is_closed().cpu()).float()
        self._present = kept_channels(pruner.analysis, is_open, self._present)
        return self._present

    def before_train_iter(self,
                          runner: Runner,
                          batch_idx: int,
                          data_batch: Any = None) -> None:
        """Choose whether the moments are updated in this iteration."""
        for reader in self._layers.values():
            reader.observes = runner.iter % self.interval == 0
        phase = find_pruner(runner.model).schedule.phase_at(runner.iter /
                                                            runner.max_iters)
        if (self.weigh_every and runner.iter % self.weigh_every == 0
                and phase == 'pruning'):
            self._factors = self._weigh()

    def _weigh(self) -> Tensor:
        """Compute the factor ``(G,)`` of each gain.

        It is the root, because a gain has the unit of an activation, not of
        its square; and a mean over the layers that read the channel.
        """
        sums = torch.zeros_like(self._openness)
        numbers = torch.zeros_like(self._openness)
        for reader in self._layers.values():
            gates, shares = reader.unexplained(self._openness)
            sums.index_add_(0, gates, shares.sqrt())
            numbers.index_add_(0, gates, torch.ones_like(shares))
        return torch.where(numbers > 0, sums / numbers.clamp(min=1), 1.)

    def after_train_iter(self,
                         runner: Runner,
                         batch_idx: int,
                         data_batch: Any = None,
                         outputs: Mapping[str, Any] | None = None) -> None:
        """Hand over what the gates that have just closed let through."""
        pruner = find_pruner(runner.model)
        before, self._openness = (self._openness,
                                  pruner.gates.openness().detach())
        if not torch.equal(before, self._openness):
            for reader in self._layers.values():
                reader.take_over_(before, self._openness, self.gradually)
        progress = (runner.iter + 1) / runner.max_iters
        if pruner.schedule.phase_at(progress) == 'settling':
            self.after_train(runner)

    def after_train(self, runner: Runner) -> None:
        """Observe no longer."""
        for reader in self._layers.values():
            reader.release_()
        self._layers = {}


def _is_known(module: nn.Module) -> bool:
    """Tell whether each output of a layer reads all of its inputs."""
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d)
                                             and module.groups == 1)


class _Reader:
    """A gated layer, and the moments of what it reads.

    Args:
        module (nn.Module): Convolution or linear layer.
        layer (Layer): What the analysis found about it.
        pruner (Pruner): Gates of the model.
        kept (Callable): Returns the gates ``(G,)`` whose channels are left.
    """

    def __init__(self, module: nn.Module, layer: Layer, pruner: Pruner,
                 kept: Callable[[Pruner], Tensor]) -> None:
        self.module: Any = module
        self.observes = False
        # A batch norm alone reads its output.
        self._has_norm = layer.name in pruner.analysis.norms
        self._centred = self._has_norm or self.module.bias is not None
        self._moments = Moments(layer.inputs)
        self._pruner, self._kept = pruner, kept
        self._at_norms = pruner.analysis.at_norms()
        self.release_: Callable[[], None] = module.register_forward_pre_hook(
            self._observe).remove

    def _observe(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not module.training:
            return
        # Also if it does not observe: gates move on before it does.
        if self.module.weight.shape[1] != len(self._moments.slots):
            self._moments.select_(
                kept_slots(self._moments.slots, self._kept(self._pruner)))
        if not self.observes:
            return
        samples = samples_of(args[0].detach(), module)
        with torch.autocast(samples.device.type, enabled=False):
            self._moments.add_(samples / self._factors())

    @torch.no_grad()
    def _factors(self) -> Tensor:
        """Factors ``(C,)`` that the inputs have by gates at batch norms."""
        slots = self._moments.slots
        openness = self._pruner.gates.openness()
        values = slot_values(openness, slots.to(openness.device))
        elsewhere = (slots < 0) | ~self._at_norms[slots.clamp(min=0)]
        # What a closed gate let through counts no longer.
        return values.masked_fill(
            elsewhere.to(values.device) | (values == 0), 1)

    def unexplained(self, openness: Tensor) -> tuple[Tensor, Tensor]:
        """Gates ``(n,)`` of open inputs, and what no other input tells.

        Args:
            openness (Tensor): ``(G,)``.
        """
        moments = self._moments
        slots = moments.slots.to(openness.device)
        if not self._is_known():
            return slots[:0], openness[:0]
        is_open = slot_values(openness, slots) > 0
        shares = unexplained(
            moments.covariance(self._centred)[is_open][:, is_open])
        gated = slots[is_open] >= 0
        return slots[is_open][gated], shares[gated]

    def _is_known(self) -> bool:
        """Tell whether there are samples enough for so many channels."""
        return self._moments.count >= 2 * len(self._moments.slots)

    @torch.no_grad()
    def take_over_(self, before: Tensor, after: Tensor,
                   gradually: bool) -> None:
        """Add to the kernels what is lost of some inputs, in place.

        Args:
            before (Tensor): ``(G,)`` openness in the last forward pass.
            after (Tensor): ``(G,)`` openness in the next one.
            gradually (bool): Whether the inputs are all whose gates move,
                not only those whose gates close.
        """
        moments, kernel = self._moments, self.module.weight
        slots = moments.slots.to(before.device)
        old, new = slot_values(before, slots), slot_values(after, slots)
        fall = old - new
        closing = (old > 0) & (new == 0)
        if gradually:
            closing |= fall.abs() > LEAST_FALL
        stays = ~closing & (new > 0)
        if not bool(closing.any()) or not self._is_known():
            return
        found = estimator(
            moments.covariance(self._centred), closing, stays, new)
        lost = kernel[:, closing].transpose(0, 1) * along(
            fall[closing], kernel, 0)
        kernel[:, stays] += (found @ lost.flatten(1)).reshape(
            -1, *lost.shape[1:]).transpose(0, 1)
        if self.module.bias is not None and not self._has_norm:
            means = moments.mean
            constant = means[closing] - found.T @ (means * new)[stays]
            self.module.bias += constant @ lost.reshape(*lost.shape[:2],
                                                        -1).sum(2)


def samples_of(inputs: Tensor, module: nn.Module) -> Tensor:
    """Select positions ``(n, C)`` of a layer's input, evenly spaced.

    Args:
        inputs (Tensor): ``(N, C, H, W)`` of a convolution, ``(..., C)`` of a
            linear layer.
        module (nn.Module): The layer.
    """
    if isinstance(module, nn.Conv2d):
        inputs = inputs.movedim(1, -1)
    rows = inputs.flatten(0, -2)
    return rows[::-(-len(rows) // POSITIONS)].float()
