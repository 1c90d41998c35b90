"""Takeover: other channels go on telling what a closing channel told.

The channels that a layer reads are correlated. With their covariance S, the
least-squares estimate of a channel c by others s is

.. code-block:: text

    x_c ~ mean_c + sum over s of b_cs (x_s - mean_s),   b_c = S_cs S_ss^-1

so a layer of kernel W, whose input x_c had the factor g_c and now has less by
d_c, loses little if the others take over:

.. code-block:: text

    W_s  <- W_s  + sum over c of W_c d_c b_cs / g_s
    bias <- bias + sum over c of W_c d_c (mean_c - sum over s of b_cs mean_s)

A gate takes many steps to close. In some of the steps the inputs of the layers
are observed, and the gates that stay take over what those that moved let
through less since the last of these steps. All this is this project's own; the
papers of the gates have nothing like it.

Letters: ``G`` gates, ``C`` channels that a layer reads, ``K`` of them that
are left in the model, ``n`` positions.
"""
from __future__ import annotations

import math
from typing import Any, Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ..analysis.liveness import kept_slots
from ..analysis.structure import Analysis, Layer
from .base import GateMethod
from .lookup import slot_values
from .moments import Known, Moments, spread
from .scaling import along

# Most channels that tell each other. With more, hardly less is lost, and the
# memory grows with their square.
_WIDTH = 256
# Change of openness from which on a gate counts as one that moves.
_LEAST_MOVE = 1e-3


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
        level (Tensor): ``(G,)`` openness for which the kernels are: what gates
            have let through less since then is not taken over yet.
        watches (Tensor): Scalar, 1 if the next passes are observed, else 0.
        observed (bool): Whether passes have been observed since the last
            takeover.
    """

    level: Tensor
    watches: Tensor

    def __init__(self, analysis: Analysis, model: nn.Module,
                 gates: GateMethod) -> None:
        super().__init__()
        # In a tuple, because the model is no part of this module.
        self._parts = model, gates
        self._release: list[Callable[[], None]] = []
        self.register_buffer('level', torch.ones(analysis.num_gates))
        self.register_buffer('watches', torch.tensor(0.))
        self.observed = False
        self.readers: Any = nn.ModuleList(
            _reader_of(layer, analysis, model)
            for layer in _taking_over(analysis, model))
        self.place_(analysis)

    def place_(self, analysis: Analysis) -> None:
        """Note where the gates of the analysis stand, in place."""
        for reader in self.readers:
            reader.place_(analysis)

    def watch_(self, watches: bool) -> None:
        """Observe what the layers read in the next passes, or no longer."""
        for release in self._release:
            release()
        self._release = []
        self.watches.fill_(watches)
        if not watches:
            return
        for reader in self.readers:
            layer = self._parts[0].get_submodule(reader.name)
            hook = layer.register_forward_pre_hook(
                _Observer(self, reader, self._parts[1]))
            self._release.append(hook.remove)

    def narrow_(self, keep: Tensor) -> None:
        """Note that the model has the channels of some gates only, in place.

        Args:
            keep (Tensor): ``(G,)`` bool on the CPU.
        """
        for reader in self.readers:
            reader.left = kept_slots(reader.slots, keep)

    @torch.no_grad()
    def take_over_(self, openness: Tensor) -> None:
        """Add to kernels and biases what gates let through less, in place.

        Nothing is done if no passes were observed. The host reads the gates
        once.

        Args:
            openness (Tensor): ``(G,)`` openness that the gates have now.
        """
        if not self.observed:
            return
        self.observed = False
        moves = (self.level - openness).abs() > _LEAST_MOVE
        # The two differ where gates move, and nowhere else.
        before, after = torch.stack((torch.where(moves, self.level,
                                                 openness), openness)).cpu()
        for reader in self.readers:
            for block in reader.blocks:
                block.agree_(openness)
            reader.take_over_(self._parts[0], before, after)
        self.level.copy_(torch.where(moves, openness, self.level))

    def is_behind(self) -> bool:
        """Tell whether other channels have yet to take over closed ones."""
        closed = self._parts[1].is_closed()
        return bool((closed & (self.level > _LEAST_MOVE)).any())

    def forget_(self) -> None:
        """Forget what the layers read, in place: nothing moves any more."""
        for reader in self.readers:
            for block in reader.blocks:
                block.known = None

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str,
                              *args: Any, **kwargs: Any) -> None:
        # Gates that were trained without a takeover.
        state_dict.setdefault(f'{prefix}watches', torch.tensor(0.))
        state_dict.setdefault(f'{prefix}level',
                              self._parts[1].openness().detach())
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
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

    Channels tell each other within blocks of about equal size. Neighbours are
    in different blocks, so that each has some of every tensor that is
    concatenated.

    Args:
        layer (Layer): The layer.
        norm (str): The batch norm that alone reads its outputs; empty if
            there is none.
        is_centred (bool): Whether a constant can be added to its outputs.

    Attributes:
        left (Tensor): ``(C,)`` bool on the CPU, channels in the model.
        here (Tensor): ``(C,)`` bool on the CPU, channels that no gate has
            multiplied when the layer reads them.
        blocks (list[Moments]): What is known of each block. It is in the
            state dict while there is anything.
    """

    def __init__(self, layer: Layer, norm: str, is_centred: bool) -> None:
        super().__init__()
        self.name, self.norm, self.is_centred = layer.name, norm, is_centred
        self.slots = layer.inputs
        self.left = torch.ones_like(self.slots, dtype=torch.bool)
        number = math.ceil(len(self.slots) / _WIDTH)
        channels = torch.arange(len(self.slots))
        self.blocks = [
            Moments(channels[first::number]) for first in range(number)
        ]

    def place_(self, analysis: Analysis) -> None:
        """Note where the gates of the analysis stand, in place."""
        stands_here = analysis.stands_at(self.name)
        self.here = (self.slots < 0) | stands_here[self.slots.clamp(min=0)]

    def observe_(self, inputs: Tensor, factors: Tensor) -> None:
        """Take what the layer reads into account, in place.

        Args:
            inputs (Tensor): ``(..., K)`` channels times their factors.
            factors (Tensor): ``(K,)``, none of them zero.
        """
        for block in self.blocks:
            rows, places = self._places(block)
            if len(rows):
                places = places.to(inputs.device)
                block.observe_(inputs[..., places].flatten(0, -2),
                               factors[places], rows)

    def _places(self, block: Moments) -> tuple[Tensor, Tensor]:
        """Places of the channels of a block that are left in the model.

        Returns:
            tuple[Tensor, Tensor]: Their places in the block, and among all
            channels that are left; on the CPU.
        """
        left = self.left[block.channels]
        places = (self.left.cumsum(0) - 1)[block.channels]
        return left.nonzero()[:, 0], places[left]

    def take_over_(self, model: nn.Module, before: Tensor,
                   after: Tensor) -> None:
        """Add what this layer lost to its kernel, in place.

        Args:
            model (nn.Module): The model.
            before (Tensor): ``(G,)`` openness for which the kernel is; that
                of now where a gate has not moved.
            after (Tensor): ``(G,)`` openness that the gates have now.
        """
        old, new = (
            slot_values(openness, self.slots) for openness in (before, after))
        kernel = model.get_submodule(self.name).get_parameter('weight')
        for block in self.blocks:
            rows, places = self._places(block)
            channels = block.channels[rows]
            ours = (old != new)[channels]
            others = ~ours & (new[channels] > 0)
            if (block.known is None or not ours.any() or not others.any()
                    or not len(kernel)):
                continue
            coefficients, constant = block.estimate(rows[ours], rows[others],
                                                    self.is_centred, kernel)
            lost = kernel[:, places[ours]].transpose(0, 1)
            lost = lost * along((old - new)[channels[ours]].to(lost), lost, 0)
            coefficients /= new[channels[others]].to(coefficients)
            kernel[:, places[others]] += (
                coefficients.T @ lost.flatten(1)).unflatten(
                    1, lost.shape[1:]).transpose(0, 1)
            self._shift_(model,
                         constant @ lost.reshape(*lost.shape[:2], -1).sum(2))

    def _shift_(self, model: nn.Module, shift: Tensor) -> None:
        """Add constants to the outputs of the layer, in place."""
        layer: Any = model.get_submodule(self.name)
        if layer.bias is not None:
            layer.bias += shift
        elif self.is_centred:
            norm: Any = model.get_submodule(self.norm)
            norm.running_mean -= shift

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str,
                            keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for index, block in enumerate(self.blocks):
            if block.known is not None:
                for name, value in block.known._asdict().items():
                    destination[f'{prefix}{index}.{name}'] = value

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str,
                              *args: Any, **kwargs: Any) -> None:
        for index, block in enumerate(self.blocks):
            key = f'{prefix}{index}'
            found = [
                state_dict.pop(f'{key}.{name}', None) for name in Known._fields
            ]
            block.known = None
            if key in state_dict:  # Of a version that kept moments.
                block.known = Known.of_moments(state_dict.pop(key).cpu())
            elif all(value is not None for value in found):
                block.known = Known(*(value.to('cpu', copy=True)
                                      for value in found))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class _Observer:
    """Hook of a layer that observes what it reads in training.

    Args:
        takeover (Takeover): It notes that passes have been observed.
        reader (_Reader): What is known of the layer.
        gates (GateMethod): Gates of the model.
    """

    def __init__(self, takeover: Takeover, reader: _Reader,
                 gates: GateMethod) -> None:
        self.takeover, self.reader = takeover, reader
        self.gates = gates

    @torch.compiler.disable
    @torch.no_grad()
    def __call__(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        """Observe the inputs of the layer."""
        slots = self.reader.slots[self.reader.left]
        if not layer.training or not len(slots):
            return
        openness = self.gates.openness()
        factors = slot_values(openness, slots.to(openness.device))
        here = self.reader.here[self.reader.left]
        # What a closed gate let through counts no longer.
        factors = factors.masked_fill(
            here.to(factors.device) | (factors == 0), 1)
        inputs = spread(args[0].detach(), layer)
        with torch.autocast(inputs.device.type, enabled=False):
            self.reader.observe_(inputs, factors)
        self.takeover.observed = True
