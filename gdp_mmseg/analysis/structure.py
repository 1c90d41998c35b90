"""Results of an analysis: groups of channels, layers, frozen channels."""
from __future__ import annotations

import dataclasses
from typing import Any, Iterator, Mapping

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Layer:
    """A convolution, linear layer or matrix product, as the cost needs it.

    Args:
        name (str): Name of the module.
        kernel (str): Name of the parameter that is the kernel; empty for a
            product of activations.
        macs_per_pair (int): Multiply-adds per image and pair of an input and
            an output channel: k^2 H W for a convolution (H, W of its output,
            of its input if transposed), the number of rows for a linear
            layer.
        axis (int): The kernel's axis of input channels.
        inputs (Tensor): ``(C_in,)`` gate of each slot on that axis, -1 for
            none. A grouped convolution has ``C_in / groups`` slots, and each
            group keeps the same ones.
        outputs (Tensor): ``(C_out,)`` gate of each output channel, -1 for
            none.
        blockwise (bool): Whether a block of outputs is removed together with
            the block of inputs that it reads, as in a depthwise convolution.
            The kernel then has no axis of inputs that could be cut, and the
            multiply-adds are ``macs_per_pair * C_out``.
        in_inference (bool): Whether inference runs the layer; False if only
            training does.
        calls (tuple[LayerCall, ...]): The layer's calls in inference.
    """
    name: str
    kernel: str
    macs_per_pair: int
    axis: int
    inputs: Tensor
    outputs: Tensor
    blockwise: bool
    in_inference: bool
    calls: tuple[LayerCall, ...]


@dataclasses.dataclass(frozen=True)
class ReadPoint:
    """View of a gated layer on the channels of a group.

    Args:
        norms (tuple[str, ...]): Batch norms whose outputs are added up there,
            each the last one on its way; empty if that is not known.
        activation (str): Activation function after them: ``'relu'`` (also
            ReLU6), ``'silu'``, ``'gelu'``, ``'hardswish'`` or none.
        summed (bool): Whether something was added since the norms.
        of_sum (bool): Whether a norm reads a sum.
        reason (str): The reason why there is no norm; empty if there is one.
    """
    norms: tuple[str, ...] = ()
    activation: str = ''
    summed: bool = False
    of_sum: bool = False
    reason: str = ''


@dataclasses.dataclass(frozen=True)
class Group:
    """Channels that lie between the same layers.

    Args:
        gates (Tensor): ``(n,)`` gates of the group, consecutive numbers. The
            first group has the first gates, the next one those after them.
        writers (tuple[str, ...]): Modules that write the channels.
        readers (tuple[str, ...]): Modules that read the channels through a
            gate.
        can_be_empty (bool): Whether all channels can be removed. False where
            an operator between the layers may refuse a tensor without
            channels; one channel is then kept.
        read_points (tuple[ReadPoint, ...]): What the layers that read the
            channels see of them; empty in an analysis that an earlier version
            saved.
        norms (tuple[str, ...]): Batch norms that can have the gates instead
            of readers: a factor of their outputs is one of these readers'
            inputs, and changes nothing else. Empty if there are none.
        behind (tuple[str, ...]): These readers.
    """
    gates: Tensor
    writers: tuple[str, ...]
    readers: tuple[str, ...]
    can_be_empty: bool
    read_points: tuple[ReadPoint, ...] = ()
    norms: tuple[str, ...] = ()
    behind: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class FrozenChannels:
    """Channels that are never pruned, and the reason.

    Args:
        reason (str): The reason, e.g. the operator that depends on these
            channels and the module that ran it.
        writers (tuple[str, ...]): Modules that write the channels.
        channels (int): Number of the channels.
    """
    reason: str
    writers: tuple[str, ...]
    channels: int


@dataclasses.dataclass(frozen=True)
class Analysis:
    """Result of an analysis: all that gates, cost and surgery need to know.

    Args:
        num_gates (int): Number of gates ``G``.
        gate_of_slot (dict[tuple[str, int], Tensor]): Gate of each slot
            ``(size,)`` on each ``(tensor name, axis)``, -1 for none. The
            surgery removes the slots of closed gates.
        layers (tuple[Layer, ...]): The layers in order of their first call.
        groups (tuple[Group, ...]): The groups; each gate is in exactly one.
        parameters (dict[str, tuple[int, ...]]): Name and dense shape of each
            parameter that inference reads.
        frozen (tuple[FrozenChannels, ...]): Channels that are never pruned,
            by reason, most channels first.
        norms (dict[str, str]): The batch norm that reads a layer's output,
            for layers whose output nothing else reads.
        input_shape (tuple[int, ...]): Shape ``(1, C, H, W)`` of the input
            that was analysed.
    """
    num_gates: int
    gate_of_slot: dict[tuple[str, int], Tensor]
    layers: tuple[Layer, ...]
    groups: tuple[Group, ...]
    parameters: dict[str, tuple[int, ...]]
    frozen: tuple[FrozenChannels, ...]
    norms: dict[str, str]
    input_shape: tuple[int, ...]

    def group_of(self) -> Tensor:
        """Index ``(num_gates,)`` of each gate's group."""
        return torch.arange(len(self.groups)).repeat_interleave(
            self.group_sizes())

    def group_sizes(self) -> Tensor:
        """Number of gates of each group."""
        return torch.tensor([len(group.gates) for group in self.groups],
                            dtype=torch.long)

    def gated_layers(self) -> Iterator[Layer]:
        """Yield the layers with a gate on at least one input channel."""
        for layer in self.layers:
            if not layer.blockwise and bool((layer.inputs >= 0).any()):
                yield layer

    def stands_at(self, name: str) -> Tensor:
        """Mask ``(num_gates,)`` of the gates that stand at a module.

        Args:
            name (str): A batch norm, or a layer that reads through gates.
        """
        stand = [
            name in group.norms
            or (name in group.readers and name not in group.behind)
            for group in self.groups
        ]
        return torch.tensor(stand, dtype=torch.bool)[self.group_of()]

    def at_layers(self) -> Analysis:
        """Return this analysis with all gates at layers, none at norms."""
        return dataclasses.replace(
            self,
            groups=tuple(
                dataclasses.replace(group, norms=(), behind=())
                for group in self.groups))

    def without(self, reasons: Mapping[int, str]) -> Analysis:
        """Return this analysis with some groups frozen.

        Args:
            reasons (Mapping[int, str]): Index into ``groups`` of each group
                to freeze, and the reason that is reported for it.
        """
        stay = torch.ones(self.num_gates, dtype=torch.bool)
        for index in reasons:
            stay[self.groups[index].gates] = False
        renumbered = (stay.cumsum(0) - 1).masked_fill(~stay, -1)

        def moved(slots: Tensor) -> Tensor:
            return renumbered[slots.clamp(min=0)].masked_fill(slots < 0, -1)

        rows = [(index, group) for index, group in enumerate(self.groups)]
        axes = {key: moved(slots) for key, slots in self.gate_of_slot.items()}
        return dataclasses.replace(
            self,
            num_gates=int(stay.sum()),
            gate_of_slot={
                key: slots
                for key, slots in axes.items() if bool((slots >= 0).any())
            },
            layers=tuple(
                dataclasses.replace(
                    layer,
                    inputs=moved(layer.inputs),
                    outputs=moved(layer.outputs)) for layer in self.layers),
            groups=tuple(
                dataclasses.replace(group, gates=moved(group.gates))
                for index, group in rows if index not in reasons),
            frozen=self.frozen + tuple(
                FrozenChannels(reasons[index], group.writers, len(group.gates))
                for index, group in rows if index in reasons))


@dataclasses.dataclass(frozen=True)
class LayerCall:
    """One call of a layer, described so that other widths can be timed.

    Args:
        size (tuple[int, ...]): Shape of the input for one image without the
            channels: ``(N, H, W)`` for a convolution, ``(rows, )`` for a
            matrix product.
        kernel (tuple[int, ...]): Shape of the dense kernel; empty for a
            matrix product.
        options (tuple[Any, ...]): The arguments of ATen's convolution after
            the bias: stride, padding, dilation, transposed, output padding,
            groups; empty for a matrix product.
    """
    size: tuple[int, ...]
    kernel: tuple[int, ...] = ()
    options: tuple[Any, ...] = ()
