"""Results of an analysis: groups of channels, layers and what is frozen."""
from __future__ import annotations

import dataclasses
from typing import Any, Collection, Iterator

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer as the cost sees it: convolution, linear layer or product.

    Args:
        name (str): Its module's name.
        kernel (str): Its parameter's name; none of a product of activations.
        macs_per_pair (int): Multiply-adds per pair of channels: k^2 H W of a
            convolution (H, W of its output, of its input if transposed), the
            rows of a linear layer.
        axis (int): The kernel's axis of inputs.
        inputs (Tensor): ``(C_in,)`` gate of each slot on it, -1 for none. Of
            a grouped convolution, the same slots in each group.
        outputs (Tensor): ``(C_out,)`` likewise, all output channels.
        blockwise (bool): A block of outputs goes with the block of inputs that
            it reads, as in a depthwise convolution; the kernel has no axis of
            inputs that could be cut, and multiply-adds are
            ``macs_per_pair * C_out``.
        in_inference (bool): False for what only training runs.
        calls (tuple[LayerCall, ...]): Its calls in inference.
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
class Group:
    """Channels that stand in the same place: between the same layers.

    Args:
        gates (Tensor): ``(n,)`` its gates, ascending.
        writers (tuple[str, ...]): Modules whose outputs they are.
        readers (tuple[str, ...]): Modules that read them through a gate.
        can_be_empty (bool): Whether all of them can be removed, not only all
            but one, without an operator between that refuses no channels.
    """
    gates: Tensor
    writers: tuple[str, ...]
    readers: tuple[str, ...]
    can_be_empty: bool


@dataclasses.dataclass(frozen=True)
class FrozenChannels:
    """Channels that are never pruned, and why.

    Args:
        reason (str): The operator and the module that it ran in.
        writers (tuple[str, ...]): Modules whose outputs they are.
        channels (int): Their number.
    """
    reason: str
    writers: tuple[str, ...]
    channels: int


@dataclasses.dataclass(frozen=True)
class Analysis:
    """What an analysis found; all that gates, cost and surgery need.

    Args:
        num_gates (int): ``G``.
        gate_of_slot (dict[tuple[str, int], Tensor]): ``(tensor name, axis)``
            to the gate of each slot on that axis ``(size,)``, -1 for none.
            Slots of a closed gate are cut out.
        layers (tuple[Layer, ...]): In order of their first call.
        groups (tuple[Group, ...]): Each gate is in exactly one.
        parameters (dict[str, tuple[int, ...]]): Name to dense shape of those
            that inference reads.
        frozen (tuple[Frozen, ...]): Most channels first.
        norms (dict[str, str]): Layer to the batch norm that alone reads it.
        input_shape (tuple[int, ...]): ``(N, C, H, W)`` that was analysed.
    """
    num_gates: int
    gate_of_slot: dict[tuple[str, int], Tensor]
    layers: tuple[Layer, ...]
    groups: tuple[Group, ...]
    parameters: dict[str, tuple[int, ...]]
    frozen: tuple[FrozenChannels, ...]
    norms: dict[str, str]
    input_shape: tuple[int, ...]

    def gated_layers(self) -> Iterator[Layer]:
        """Layers with a gate on at least one input channel."""
        for layer in self.layers:
            if not layer.blockwise and bool((layer.inputs >= 0).any()):
                yield layer

    def without(self, indices: Collection[int], reason: str) -> Analysis:
        """The same without the gates of some groups: their channels stay.

        Args:
            indices (Collection[int]): Into ``groups``.
            reason (str): Why.
        """
        stay = torch.ones(self.num_gates, dtype=torch.bool)
        for index in indices:
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
                for index, group in rows if index not in indices),
            frozen=self.frozen + tuple(
                FrozenChannels(reason, group.writers, len(group.gates))
                for index, group in rows if index in indices))


@dataclasses.dataclass(frozen=True)
class LayerCall:
    """One call of a layer, to be repeated at other widths.

    Args:
        size (tuple[int, ...]): Of one image's input, without the channels:
            ``(N, H, W)``, of a product of matrices ``(rows, )``.
        kernel (tuple[int, ...]): Shape of the dense kernel; none of a product
            of matrices.
        options (tuple[Any, ...]): What ATen's convolution takes after the
            bias: stride, padding, dilation, transposed, output padding,
            groups; none of a product of matrices.
    """
    size: tuple[int, ...]
    kernel: tuple[int, ...] = ()
    options: tuple[Any, ...] = ()
