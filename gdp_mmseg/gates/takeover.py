"""Takeover: other channels go on telling what a closing channel told.

The channels that a layer reads are correlated. With the inverse ``P`` of
their covariance, the least-squares estimate of a channel c by the others is

.. code-block:: text

    x_c ~ mean_c + sum over s of b_s (x_s - mean_s),   b_s = -P_cs / P_cc

so a layer of kernel W, whose input x_c had the factor g_c, loses little if
the others take over:

.. code-block:: text

    W_s  <- W_s  + W_c g_c b_s / g_s
    bias <- bias + sum of W_c g_c (mean_c - sum over s of b_s mean_s)

The inverse covariance of the others is the Schur complement of P_cc in P, so
one inverse serves many closing channels, until it is renewed. All this is this
project's own; the papers of the gates have nothing like it.

Letters: ``G`` gates, ``C`` channels that a layer reads, ``K`` of them that
are left in the model, ``n`` positions.
"""
from __future__ import annotations

import math
from typing import Any, Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ..analysis.liveness import kept_slots
from ..analysis.structure import Analysis, Layer
from .base import GateMethod, has_processes
from .lookup import slot_values
from .scaling import along

# Share of the mean variance of the channels that is added to each of them,
# because the covariance is an estimate.
_RIDGE = 0.01
# Lower bound of that: it only prevents an inverse of zero.
_LEAST_RIDGE = 1e-12
# About as many positions of a batch are taken into account.
_POSITIONS = 4096
# Times that this is renewed in the pruning phase: a network changes slowly
# while it trains, and an inverse takes as long as a step.
_RENEWALS = 24
# Share of what was known that stays when it is renewed.
_KEPT = 0.7


class Takeover(nn.Module):
    """The layers of a model that take over, and what they read.

    Layers that read each channel by weights of their own take part: not
    depthwise, grouped or transposed ones, and none whose kernel is frozen.
    Channels of a kernel that belongs to several layers have no gates.

    Args:
        analysis (Analysis): Analysis of the model.
        model (nn.Module): The model with gates.
        gates (GateMethod): Its gates.

    Attributes:
        analysis (Analysis): Analysis of the model, which tells where its gates
            stand.
        watches (Tensor): Scalar, 1 if the next passes are observed, else 0.
    """

    watches: Tensor

    def __init__(self, analysis: Analysis, model: nn.Module,
                 gates: GateMethod) -> None:
        super().__init__()
        self.analysis = analysis
        # In a tuple, because the model is no part of this module.
        self._parts = model, gates
        self._release: list[Callable[[], None]] = []
        self.register_buffer('watches', torch.tensor(0.))
        self.readers: Any = nn.ModuleList(
            _reader_of(layer, analysis, model)
            for layer in _taking_over(analysis, model))

    def watch_in_(self, index: int, steps: float,
                  phases: tuple[float, float, float]) -> None:
        """Observe what the layers read in a step if it is one of a few.

        Args:
            index (int): Number of steps before it.
            steps (float): Number of steps in the training.
            phases (tuple[float, float, float]): Shares of it that are
                warm-up, pruning and settling.
        """
        begin, length = (share * steps for share in phases[:2])
        interval = max(round(length / _RENEWALS), 1)
        self.watch_(index % interval == 0
                    and begin - interval <= index < begin + length)

    def watch_(self, watches: bool) -> None:
        """Observe what the layers read in the next passes, or no longer."""
        for release in self._release:
            release()
        self._release = []
        self.watches.fill_(watches)
        if not watches:
            return
        model, gates = self._parts
        at_norms = self.analysis.at_norms()
        for reader in self.readers:
            hook = model.get_submodule(reader.name).register_forward_pre_hook(
                _Observer(reader, gates, at_norms))
            self._release.append(hook.remove)

    def narrow_(self, keep: Tensor) -> None:
        """Note that the model has the channels of some gates only, in place.

        Args:
            keep (Tensor): ``(G,)`` bool on the CPU.
        """
        for reader in self.readers:
            reader.left = kept_slots(reader.slots, keep)

    @torch.no_grad()
    def renew_(self, openness: Tensor) -> None:
        """Compute what the layers need to know from what they read, in place.

        Args:
            openness (Tensor): ``(G,)`` openness in these passes.
        """
        for reader in self.readers:
            reader.renew_(openness)

    @torch.no_grad()
    def take_over_(self, before: Tensor, after: Tensor) -> None:
        """Add to kernels and biases what closing gates let through, in place.

        The host reads the gates once, and each layer with closing channels.

        Args:
            before (Tensor): ``(G,)`` openness before the step of the gates.
            after (Tensor): ``(G,)`` openness after it.
        """
        before, after = torch.stack((before, after)).cpu()
        if not bool(((before > 0) & (after == 0)).any()):
            return
        for reader in self.readers:
            reader.take_over_(self._parts[0], before, after)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.watch_(bool(self.watches))

    def __getstate__(self) -> dict[str, Any]:
        """Leave the hooks out of copies: they belong to this model."""
        return dict(vars(self), _release=[])


def _taking_over(analysis: Analysis, model: nn.Module) -> Iterator[Layer]:
    """Yield the layers of a model that take over."""
    for layer in analysis.gated_layers():
        module: Any = model.get_submodule(layer.name)
        is_plain = isinstance(
            module,
            nn.Linear) or (isinstance(module, _ConvNd) and module.groups == 1
                           and not isinstance(module, _ConvTransposeNd))
        # A kernel may also be computed from other parameters.
        kernel = module._parameters.get('weight')
        if is_plain and kernel is not None and kernel.requires_grad:
            yield layer


def _reader_of(layer: Layer, analysis: Analysis, model: nn.Module) -> _Reader:
    """Make the reader of a layer, and find where its constants can go."""
    norm = analysis.norms.get(layer.name, '')
    module: Any = model.get_submodule(layer.name)
    found: Any = model.get_submodule(norm)
    has_mean = isinstance(found, _BatchNorm) and found.running_mean is not None
    return _Reader(layer, norm, module.bias is not None or has_mean)


class _Reader(nn.Module):
    """Layer that takes over, and what is known of the channels it reads.

    Args:
        layer (Layer): The layer.
        norm (str): The batch norm that alone reads its outputs; empty if
            there is none.
        is_centred (bool): Whether a constant can be added to its outputs.

    Attributes:
        precision (Tensor): ``(C, C)`` inverse covariance of the channels
            before their gates; only the rows and columns of channels that
            were open are of use. All zero if nothing is known yet.
        mean (Tensor): ``(C,)`` their means.
        left (Tensor): ``(C,)`` bool on the CPU, channels in the model.
    """

    precision: Tensor
    mean: Tensor

    def __init__(self, layer: Layer, norm: str, is_centred: bool) -> None:
        super().__init__()
        self.name, self.norm, self.is_centred = layer.name, norm, is_centred
        self.slots = layer.inputs
        self.left = torch.ones_like(self.slots, dtype=torch.bool)
        width = len(self.slots)
        self.register_buffer('precision', torch.zeros(width, width))
        self.register_buffer('mean', torch.zeros(width))
        # Number of positions that were observed, sums, sums of products.
        self._seen: list[Tensor] = []

    def observe_(self, inputs: Tensor) -> None:
        """Take inputs ``(n, K)`` of the layer into account, in place."""
        found = [
            torch.full((), len(inputs), device=inputs.device),
            inputs.sum(0), inputs.T @ inputs
        ]
        if self._seen and self._seen[1].shape == found[1].shape:
            found = [old + new for old, new in zip(self._seen, found)]
        self._seen = found

    def renew_(self, openness: Tensor) -> None:
        """Compute precision and mean from what was observed, in place.

        Args:
            openness (Tensor): ``(G,)``.
        """
        if not self._seen:
            return
        if has_processes():
            for tensor in self._seen:
                dist.all_reduce(tensor)
        number, sums, products = self._seen
        self._seen = []
        mean = sums / number * self.is_centred
        covariance = (products / number - torch.outer(mean, mean)).double()
        # Closed channels tell nothing.
        is_open = slot_values(openness.cpu(), self.slots[self.left]) > 0
        among = is_open.nonzero()[:, 0].to(covariance.device)
        rows = self.left.nonzero()[:, 0][is_open].to(covariance.device)
        covariance = covariance[among[:, None], among]
        variance = covariance.diagonal().mean()
        covariance.diagonal().add_(_RIDGE * variance + _LEAST_RIDGE)
        mean, known = mean[among], self.precision[rows[:, None], rows].double()
        if not bool(covariance.isfinite().all()):
            return
        if bool((known.diagonal() > 0).all()):
            covariance.lerp_(torch.linalg.inv(known), _KEPT)
            mean.lerp_(self.mean[rows], _KEPT)
        self.precision[rows[:, None],
                       rows] = torch.linalg.inv(covariance).to(self.precision)
        self.mean[rows] = mean
        if has_processes():
            # Inverses on GPUs may differ in the last bit.
            dist.broadcast(self.precision, 0)
            dist.broadcast(self.mean, 0)

    def take_over_(self, model: nn.Module, before: Tensor,
                   after: Tensor) -> None:
        """Add what this layer lost to its kernel, in place.

        Args:
            model (nn.Module): The model.
            before (Tensor): ``(G,)`` openness before the step of the gates,
                on the CPU.
            after (Tensor): ``(G,)`` openness after it.
        """
        old, new = (
            slot_values(openness, self.slots) for openness in (before, after))
        closing = (old > 0) & (new == 0) & self.left
        if not bool(closing.any()):
            return
        # Nothing may have been observed yet.
        if not bool((self.precision.diagonal().cpu() > 0)[closing].all()):
            return
        stays = (new > 0) & self.left
        coefficients, constant = self._estimate_(closing, stays)
        layer: Any = model.get_submodule(self.name)
        kernel = layer.weight
        lost = kernel[:, closing[self.left]].transpose(0, 1)
        lost = lost * along(old[closing].to(lost), lost, 0)
        coefficients = (coefficients / new[stays].to(coefficients)).to(lost)
        kernel[:, stays[self.left]] += (
            coefficients.T @ lost.flatten(1)).unflatten(
                1, lost.shape[1:]).transpose(0, 1)
        shift = constant.to(lost) @ lost.reshape(*lost.shape[:2], -1).sum(2)
        if layer.bias is not None:
            layer.bias += shift
        elif self.is_centred:
            norm: Any = model.get_submodule(self.norm)
            norm.running_mean -= shift

    def _estimate_(self, closing: Tensor,
                   stays: Tensor) -> tuple[Tensor, Tensor]:
        """Estimate ``k`` closing channels by ``s`` others, and forget them.

        Args:
            closing (Tensor): ``(C,)`` bool on the CPU.
            stays (Tensor): ``(C,)`` bool on the CPU.

        Returns:
            tuple[Tensor, Tensor]: Coefficients ``(k, s)`` and constants
            ``(k,)``.
        """
        device = self.precision.device
        ours, others = (
            mask.nonzero()[:, 0].to(device) for mask in (closing, stays))
        across = self.precision[ours[:, None], others].double()
        inner = self.precision[ours[:, None], ours].double()
        coefficients = -torch.linalg.solve(inner, across)
        self.precision[others[:, None],
                       others] += (coefficients.T @ across).to(self.precision)
        self.precision[ours] = 0
        self.precision[:, ours] = 0
        means = self.mean.double()
        return coefficients, means[ours] - coefficients @ means[others]


class _Observer:
    """Hook of a layer that observes what it reads in training.

    Args:
        reader (_Reader): What is known of that.
        gates (GateMethod): Gates of the model.
        at_norms (Tensor): ``(G,)`` bool, gates at batch norms, which have
            multiplied the inputs already.
    """

    def __init__(self, reader: _Reader, gates: GateMethod,
                 at_norms: Tensor) -> None:
        self.reader, self.gates, self.at_norms = reader, gates, at_norms

    @torch.compiler.disable
    @torch.no_grad()
    def __call__(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        """Observe the inputs of the layer."""
        slots = self.reader.slots[self.reader.left]
        if not layer.training or not len(slots):
            return
        openness = self.gates.openness()
        factors = slot_values(openness, slots.to(openness.device))
        elsewhere = (slots < 0) | ~self.at_norms[slots.clamp(min=0)]
        # What a closed gate let through counts no longer.
        factors = factors.masked_fill(
            elsewhere.to(factors.device) | (factors == 0), 1)
        inputs = _spread(args[0].detach(), layer)
        with torch.autocast(inputs.device.type, enabled=False):
            self.reader.observe_(inputs.to(factors) / factors)


def _spread(inputs: Tensor, layer: Any) -> Tensor:
    """Select positions ``(n, C)`` of a layer's inputs, evenly spaced.

    Args:
        inputs (Tensor): ``(N, C, H, W)`` of a convolution of two dimensions,
            ``(..., C)`` of a linear layer.
        layer (nn.Module): The layer.
    """
    if isinstance(layer, nn.Linear):
        inputs = inputs.flatten(0, -2)
        return inputs[::math.ceil(len(inputs) / _POSITIONS)]
    axes = len(layer.kernel_size)
    inputs = inputs.movedim(-1 - axes, -1)
    number = math.prod(inputs.shape[:-1])
    stride = math.ceil((number / _POSITIONS)**(1 / axes))
    spaced = inputs[(..., ) + (slice(None, None, stride), ) * axes +
                    (slice(None), )]
    return spaced.flatten(0, -2)
