"""Labels: who owns a slot of a channel axis, and which slots go together.

Every slot of every channel axis of every parameter owns a label, an integer
from 1 on; 0 stands for a channel that is nobody's to prune. A tensor of labels
travels beside each activation, in its shape; axes on which labels do not vary
are expanded (stride 0), so it takes little memory.

Labels that need to live or die together are *tied*; labels that something
reads without a gate are *frozen*.
"""
from __future__ import annotations

import dataclasses
import math
from collections import Counter
from typing import Any, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .structure import LayerCall


@dataclasses.dataclass
class KernelUse:
    """How a convolution or linear layer was run.

    Args:
        calls (tuple[LayerCall, ...]): All counted calls.
        macs_per_pair (int): Multiply-adds per image and pair of channels (of a
            layer of blocks: per output channel), over all counted calls.
        sizes (tuple[int, int]): Slots of its kernel's input and output axis.
        axes (tuple[int, int]): Those axes: (1, 0), or (0, 1) of a transposed
            convolution.
        blockwise (bool): Each block of outputs reads one block of inputs and
            goes with it, as in a depthwise convolution; its kernel has one
            axis of channels then, axis 0.
        in_inference (bool): Whether inference runs it.
    """
    calls: tuple[LayerCall, ...]
    macs_per_pair: int
    sizes: tuple[int, int]
    axes: tuple[int, int]
    blockwise: bool
    in_inference: bool


@dataclasses.dataclass
class ActivationProduct:
    """A product of two activations, as in attention.

    Args:
        module (str): In which it ran.
        macs_per_pair (int): Multiply-adds per image and pair of input and
            output channel.
        inputs (int): Numbers that are summed over; none is prunable.
        outputs (Tensor): Labels ``(C,)`` of the axis that channels pass by.
        in_inference (bool): Whether inference runs it.
    """
    module: str
    macs_per_pair: int
    inputs: int
    outputs: Tensor
    in_inference: bool


class Labels:
    """What is known of the labels of a model, and of the activations.

    Args:
        model (nn.Module): Its parameters may have no data.
        shared (Iterable[str]): Tensors that have several names; their
            channels are frozen.

    Attributes:
        axes (dict[tuple[str, int], Tensor]): Labels ``(size,)`` of the slots
            of ``(tensor name, axis)``.
        pairs (list[Tensor]): ``(2, n)`` labels that are tied.
        freezes (list[tuple[Tensor, str]]): Labels that are frozen, and why.
        stops (list[Tensor]): Labels that pass an operator which refuses
            tensors without channels.
        calls (dict[str, KernelUse]): Kernel name to how it was run, in order.
        products (list[ActivationProduct]): What else costs multiply-adds.
        parameters (dict[str, tuple[int, ...]]): Name to shape of those that
            inference reads.
        read_axes, written_axes (set[tuple[str, int]]): Axes of kernels by
            which channels are read, and written.
        modules (list[str]): Names of the modules that are running.
        kernels (dict[int, str]): Kernel of a tensor that is its transpose.
        in_inference (bool): Whether inference runs what runs now.
        images (int): In the batch that runs now.
    """

    def __init__(self, model: nn.Module, shared: Iterable[str] = ()) -> None:
        self.axes: dict[tuple[str, int], Tensor] = {}
        self.pairs: list[Tensor] = []
        self.freezes: list[tuple[Tensor, str]] = []
        self.stops: list[Tensor] = []
        self.calls: dict[str, KernelUse] = {}
        self.products: list[ActivationProduct] = []
        self.parameters: dict[str, tuple[int, ...]] = {}
        self.read_axes: set[tuple[str, int]] = set()
        self.written_axes: set[tuple[str, int]] = set()
        self.modules: list[str] = []
        self.kernels: dict[int, str] = {}
        self.in_inference = True
        self.images = 1
        self.next_label = 1
        self._model = model
        self._names: dict[int, str] = {}
        for name, tensor in [
                *model.named_parameters(), *model.named_buffers()
        ]:
            self._names.setdefault(id(tensor), name)
        self._buffers = {name for name, _ in model.named_buffers()}
        self._shared = set(shared)
        # Layer to what reads its outputs, norm to what it reads.
        self._readers: dict[str, set[str]] = {}
        self._sources: dict[str, set[str]] = {}
        # Of the forward pass under way, by identity of the tensor.
        self._labels: dict[int, Tensor] = {}
        self._reads: Counter[int] = Counter()
        self._written: dict[int, str] = {}
        self._normed: dict[int, str] = {}

    # -- of tensors --------------------------------------------------------

    def here(self) -> str:
        """The module that runs now, for the reasons."""
        return (self.modules and self.modules[-1]) or 'the model'

    def name_of(self, tensor: Tensor) -> str | None:
        """Name of a parameter or buffer of the model."""
        return self._names.get(id(tensor))

    def knows(self, tensor: Tensor) -> bool:
        """Whether a tensor has labels or a name."""
        return id(tensor) in self._labels or id(tensor) in self._names

    def get(self, tensor: Tensor) -> Tensor | None:
        """Labels of an activation, in its shape."""
        return self._labels.get(id(tensor))

    def own(self, tensor: Tensor) -> Tensor | None:
        """Labels of an activation, or of a parameter with one long axis."""
        labels = self.get(tensor)
        name = self.name_of(tensor)
        if labels is None and name is not None and name not in self._buffers:
            long = [axis for axis, size in enumerate(tensor.shape) if size > 1]
            if len(long) == 1:
                axis = long[0]
                return spread(
                    self.axis(name, axis, tensor.shape[axis]), tensor.shape,
                    axis)
        return labels

    def set(self, tensor: Tensor, labels: Tensor | None) -> bool:
        """Put labels, in its shape, beside an activation; always True."""
        if labels is None:
            self._labels.pop(id(tensor), None)
        else:
            assert labels.shape == tensor.shape, (labels.shape, tensor.shape)
            self._labels[id(tensor)] = labels
        return True

    def axis(self, name: str, axis: int, size: int) -> Tensor:
        """Labels ``(size,)`` of the slots of an axis, made at first use."""
        key = (name, axis)
        if key not in self.axes:
            self.axes[key] = torch.arange(self.next_label,
                                          self.next_label + size)
            self.next_label += size
            if name in self._shared:
                self.freeze_labels(self.axes[key], f'{name} has other names')
        return self.axes[key]

    # -- what happens to labels --------------------------------------------

    def tie(self, first: Tensor, second: Tensor) -> None:
        """The labels live and die together, element by element."""
        first, second = torch.broadcast_tensors(first, second)
        pairs = torch.stack([compact(first, second), compact(second, first)])
        self.pairs.append(torch.unique(pairs[:, pairs[0] != pairs[1]], dim=1))

    def tie_along(self, labels: Tensor, dim: int) -> Tensor:
        """Labels that differ along an axis live and die together.

        Returns:
            Tensor: The first of them, expanded to the same shape.
        """
        first = labels.narrow(dim, 0, 1).expand(labels.shape)
        self.tie(labels, first)
        return first

    def freeze(self, tensor: Tensor, reason: str) -> None:
        """The channels of a tensor stay; an activation loses its labels."""
        labels = self.get(tensor)
        name = self.name_of(tensor)
        if labels is not None:
            self.freeze_labels(labels, reason)
            self.set(tensor, None)
        elif name is not None:
            for axis, size in enumerate(tensor.shape):
                self.freeze_labels(self.axis(name, axis, size), reason)

    def freeze_labels(self, labels: Tensor, reason: str) -> None:
        """These labels stay."""
        self.freezes.append((torch.unique(compact(labels)), reason))

    def needs_channels(self, labels: Tensor) -> None:
        """An operator here refuses tensors without channels."""
        self.stops.append(torch.unique(compact(labels)))

    def per_channel(self, tensor: Tensor, channels: Tensor) -> None:
        """A parameter or buffer ``(C,)`` goes with the channels ``(C,)``."""
        name = self.name_of(tensor)
        if name is None:
            self.freeze_labels(channels,
                               f'computed parameter of {self.here()}')
        else:
            self.tie(self.axis(name, 0, len(channels)), channels)

    # -- layers ------------------------------------------------------------

    def read(self, kernel: str, axis: int, size: int,
             channels: Tensor | None) -> None:
        """A layer reads channels by an axis of its kernel: a gate's place."""
        slots = self.axis(kernel, axis, size)
        if channels is None:
            self.freeze_labels(slots, f'input of {self.here()}')
        else:
            self.tie(slots, channels)
            self.read_axes.add((kernel, axis))

    def write(self, kernel: str, call: KernelUse, channels: Tensor,
              bias: Tensor | None, output: Tensor, dim: int) -> bool:
        """A layer writes channels ``(C_out,)``, its own; always True."""
        self.written_axes.add((kernel, call.axes[1]))
        owner, _, leaf = kernel.rpartition('.')
        module = self._model.get_submodule(owner)
        if (leaf != 'weight' or self.here() != owner
                or not isinstance(module, (nn.Linear, _ConvNd))):
            # A gate works in the forward of the layer that owns the kernel.
            for axis in call.axes:
                self.freeze_labels(
                    self.axes[kernel, axis],
                    f'{kernel} is used without a call of its layer')
        if bias is not None:
            self.per_channel(bias, channels)
        known = self.calls.setdefault(
            kernel, dataclasses.replace(call, calls=(), macs_per_pair=0))
        if call.in_inference:
            known.calls += call.calls
            known.macs_per_pair += call.macs_per_pair
        elif not known.in_inference:
            self.freeze_labels(channels, f'{self.here()} is for training only')
        self._written[id(output)] = kernel.rpartition('.')[0]
        return self.set(output, spread(channels, output.shape, dim))

    def norm(self, inputs: Tensor, weight: Tensor) -> None:
        """A batch norm of this weight reads these inputs."""
        name = self.name_of(weight)
        if name is not None:
            norm = name.rpartition('.')[0]
            self._normed[id(inputs)] = norm
            self._sources.setdefault(norm, set()).add(
                self._written.get(id(inputs), ''))

    def count_reads(self, tensors: Sequence[Tensor]) -> None:
        """An operator reads these tensors."""
        names = {id(tensor): self.name_of(tensor) for tensor in tensors}
        self._reads.update(names.keys())
        for tensor in tensors if self.in_inference else ():
            name = names[id(tensor)]
            if name is not None and name not in self._buffers:
                self.parameters[name] = tuple(tensor.shape)

    def forget_activations(self) -> None:
        """A forward pass is over."""
        for key, layer in self._written.items():
            norm = self._normed.get(key, '') if self._reads[key] == 1 else ''
            self._readers.setdefault(layer, set()).add(norm)
        for record in (self._labels, self.kernels, self._reads, self._written,
                       self._normed, self.modules):
            record.clear()

    def norms(self) -> dict[str, str]:
        """Layer to batch norm, where each reads or is read by no other."""
        pairs = ((layer, norm) for layer, norms in self._readers.items()
                 for norm in norms)
        return {
            layer: norm
            for layer, norm in pairs
            if norm and self._readers[layer] == {norm}
            and self._sources[norm] == {layer}
        }


def varies(labels: Tensor, dim: int) -> bool:
    """Whether the labels differ along an axis."""
    if labels.shape[dim] < 2 or labels.stride(dim) == 0:
        return False
    return bool((labels != labels.narrow(dim, 0, 1)).any())


def vector(labels: Tensor, dim: int) -> Tensor | None:
    """Labels along ``dim``, if they vary along no other."""
    if any(
            varies(labels, other) for other in range(labels.dim())
            if other != dim % labels.dim()):
        return None
    index: list[Any] = [0] * labels.dim()
    index[dim] = slice(None)
    return labels[tuple(index)]


def spread(channels: Tensor, shape: torch.Size, dim: int) -> Tensor:
    """A vector of labels, expanded to a shape that has it along ``dim``."""
    thin = [1] * len(shape)
    thin[dim] = -1
    return channels.reshape(thin).expand(shape)


def thinned(labels: Tensor, dims: Iterable[int] | None = None) -> Tensor:
    """Labels with a size of 1 along axes (default: all) of stride 0."""
    for dim in range(labels.dim()) if dims is None else dims:
        if labels.stride(dim) == 0:
            labels = labels.narrow(dim, 0, 1)
    return labels


def compact(labels: Tensor, other: Tensor | None = None) -> Tensor:
    """Flat labels without the repeats of axes expanded in all tensors."""
    dims = [
        dim for dim in range(labels.dim())
        if other is None or other.stride(dim) == 0
    ]
    return thinned(labels, dims).reshape(-1)


def blocks(old: torch.Size,
           new: torch.Size) -> Iterator[tuple[list[int], list[int]]]:
    """Smallest runs of axes with the same product in both shapes.

    Examples:
        >>> list(blocks((2, 6, 5), (2, 3, 2, 5)))
        [([0], [0]), ([1], [1, 2]), ([2], [3])]
    """
    olds = [dim for dim, size in enumerate(old) if size != 1]
    news = [dim for dim, size in enumerate(new) if size != 1]
    while olds and news:
        left, right = [olds.pop(0)], [news.pop(0)]
        while True:
            before = math.prod(old[dim] for dim in left)
            after = math.prod(new[dim] for dim in right)
            if before == after:
                break
            if before < after:
                left.append(olds.pop(0))
            else:
                right.append(news.pop(0))
        yield left, right
