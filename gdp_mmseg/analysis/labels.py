"""Labels of channels: one integer for each slot of each channel axis.

Every slot of every channel axis of every parameter owns a label, an integer
from 1 on; 0 stands for a channel that no layer wrote and nothing can prune. A
tensor of labels with the activation's shape travels beside each activation.
Axes along which labels do not vary are expanded (stride 0), so a tensor of
labels takes little memory.

Labels that have to be kept or removed together are *tied*. Labels that an
operator reads where no gate can act are *frozen*.
"""
from __future__ import annotations

import dataclasses
import math
from collections import Counter
from typing import Any, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .batch import BatchTracker
from .structure import LayerCall


@dataclasses.dataclass
class KernelUse:
    """Calls of a convolution or linear layer.

    Args:
        calls (tuple[LayerCall, ...]): All calls in inference.
        macs_per_pair (int): Multiply-adds per image and pair of an input and
            an output channel, over all calls in inference. If ``blockwise``,
            multiply-adds per image and output channel.
        sizes (tuple[int, int]): Number of slots on the kernel's input and
            output axis.
        axes (tuple[int, int]): Index of the kernel's input and output axis:
            (1, 0), or (0, 1) for a transposed convolution.
        blockwise (bool): Whether each block of outputs reads one block of
            inputs and is removed with it, as in a depthwise convolution. The
            kernel then has a single axis of channels, axis 0.
        in_inference (bool): Whether inference runs the layer.
    """
    calls: tuple[LayerCall, ...]
    macs_per_pair: int
    sizes: tuple[int, int]
    axes: tuple[int, int]
    blockwise: bool
    in_inference: bool


@dataclasses.dataclass
class ActivationProduct:
    """A product whose kernel is no parameter: attention, computed kernels.

    Args:
        name (str): Kind of the product and module that ran it.
        module (str): Name of the module that ran the product.
        macs_per_pair (int): Multiply-adds per image and pair of a summed
            entry and an output channel.
        inputs (int): Number of entries that are summed over; none of them is
            prunable.
        outputs (Tensor): Labels ``(C,)`` along the axis of the result that
            keeps the channels of one of the factors.
        in_inference (bool): Whether inference runs the product.
        call (LayerCall): The call, for one image.
        reason (str): The reason why the outputs of a layer with a computed
            kernel are frozen; empty for a product of activations.
    """
    name: str
    module: str
    macs_per_pair: int
    inputs: int
    outputs: Tensor
    in_inference: bool
    call: LayerCall
    reason: str = ''


class Labels:
    """Labels of a model's parameters and of the activations of a trace.

    Args:
        model (nn.Module): The model that is traced; its parameters may be on
            the meta device.
        shared (Iterable[str]): Names of tensors that have several names;
            their channels are frozen.

    Attributes:
        axes (dict[tuple[str, int], Tensor]): Labels ``(size,)`` of the slots
            of each ``(tensor name, axis)``.
        pairs (list[Tensor]): Tied labels, each tensor of shape ``(2, n)``.
        freezes (list[tuple[Tensor, str]]): Frozen labels and the reason.
        stops (list[Tensor]): Labels that pass an operator which may refuse
            tensors without any channel.
        calls (dict[str, KernelUse]): Calls of each kernel by the kernel's
            name, in order of the first call.
        products (list[ActivationProduct]): Products without a parameter as
            their kernel.
        parameters (dict[str, tuple[int, ...]]): Name and shape of each
            parameter that inference reads.
        read_axes (set[tuple[str, int]]): Axes of kernels by which a layer
            reads channels.
        written_axes (set[tuple[str, int]]): Axes of kernels by which a layer
            writes channels.
        modules (list[str]): Names of the running modules, innermost last.
        kernels (dict[int, str]): Kernel name by the id of a tensor that is
            the transpose of this kernel.
        in_inference (bool): Whether the forward that runs now is inference.
        batch (BatchTracker): Record of the tensors that grow with the batch.
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
        self.batch = BatchTracker()
        self.next_label = 1
        self._model = model
        self._names: dict[int, str] = {}
        for name, tensor in [
                *model.named_parameters(), *model.named_buffers()
        ]:
            self._names.setdefault(id(tensor), name)
        self._buffers = {name for name, _ in model.named_buffers()}
        self._shared = set(shared)
        # The norms that read each layer's output ('' is another operator),
        # and the layers that each norm reads.
        self._readers: dict[str, set[str]] = {}
        self._sources: dict[str, set[str]] = {}
        # State of the forward pass that runs now, by the tensors' ids.
        self._labels: dict[int, Tensor] = {}
        self._reads: Counter[int] = Counter()
        self._written: dict[int, str] = {}
        self._normed: dict[int, str] = {}

    # -- tensors -----------------------------------------------------------

    def here(self) -> str:
        """Name of the innermost running module, to be used in reasons."""
        return (self.modules and self.modules[-1]) or 'the model'

    def name_of(self, tensor: Tensor) -> str | None:
        """Name of a parameter or buffer; None for any other tensor."""
        return self._names.get(id(tensor))

    def knows(self, tensor: Tensor) -> bool:
        """Return True if a tensor has labels or a name."""
        return id(tensor) in self._labels or id(tensor) in self._names

    def get(self, tensor: Tensor) -> Tensor | None:
        """Labels of an activation, with its shape; None if it has none."""
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
        """Attach labels of the same shape to an activation; return True.

        The return value lets a rule end in ``return labels.set(...)``.
        """
        if labels is None:
            self._labels.pop(id(tensor), None)
        else:
            assert labels.shape == tensor.shape, (labels.shape, tensor.shape)
            self._labels[id(tensor)] = labels
        return True

    def axis(self, name: str, axis: int, size: int) -> Tensor:
        """Labels ``(size,)`` of an axis, created on first use."""
        key = (name, axis)
        if key not in self.axes:
            self.axes[key] = torch.arange(self.next_label,
                                          self.next_label + size)
            self.next_label += size
            if name in self._shared:
                self.freeze_labels(self.axes[key], f'{name} has other names')
        return self.axes[key]

    # -- ties and freezes --------------------------------------------------

    def tie(self, first: Tensor, second: Tensor) -> None:
        """Tie two tensors of labels to each other, element by element."""
        first, second = torch.broadcast_tensors(first, second)
        first, second = compact(first, second), compact(second, first)
        # Two labels in one integer: integers are sorted faster than pairs.
        pairs = torch.unique((first << 32 | second)[first != second])
        self.pairs.append(torch.stack([pairs >> 32, pairs & 0xFFFFFFFF]))

    def tie_along(self, labels: Tensor, dim: int) -> Tensor:
        """Tie all labels along an axis to each other.

        Returns:
            Tensor: The first label along the axis, expanded to the shape of
            ``labels``.
        """
        first = labels.narrow(dim, 0, 1).expand(labels.shape)
        self.tie(labels, first)
        return first

    def freeze(self, tensor: Tensor, reason: str) -> None:
        """Freeze a tensor's channels; an activation loses its labels."""
        labels = self.get(tensor)
        name = self.name_of(tensor)
        if labels is not None:
            self.freeze_labels(labels, reason)
            self.set(tensor, None)
        elif name is not None:
            for axis, size in enumerate(tensor.shape):
                self.freeze_labels(self.axis(name, axis, size), reason)

    def freeze_labels(self, labels: Tensor, reason: str) -> None:
        """Freeze labels for a reason that the report shows."""
        self.freezes.append((torch.unique(compact(labels)), reason))

    def needs_channels(self, labels: Tensor) -> None:
        """Note that an operator may refuse tensors without channels."""
        self.stops.append(torch.unique(compact(labels)))

    def per_channel(self, tensor: Tensor, channels: Tensor) -> None:
        """Tie a parameter or buffer ``(C,)`` to channels ``(C,)``."""
        name = self.name_of(tensor)
        if name is None:
            self.freeze_labels(channels,
                               f'computed parameter of {self.here()}')
        else:
            self.tie(self.axis(name, 0, len(channels)), channels)

    # -- layers ------------------------------------------------------------

    def read(self, kernel: str, axis: int, size: int,
             channels: Tensor | None) -> None:
        """Tie an axis of a kernel to the channels that a layer reads by it.

        This is where a gate acts, on the kernel of the layer that reads.
        """
        slots = self.axis(kernel, axis, size)
        if channels is None:
            self.freeze_labels(slots, f'input of {self.here()}')
        else:
            self.tie(slots, channels)
            self.read_axes.add((kernel, axis))

    def write(self, kernel: str, call: KernelUse, channels: Tensor,
              bias: Tensor | None, output: Tensor, dim: int) -> bool:
        """Label a layer's output with the layer's own channels ``(C_out,)``.

        Returns:
            bool: Always True, so that a rule can end with it.
        """
        self.written_axes.add((kernel, call.axes[1]))
        owner, _, leaf = kernel.rpartition('.')
        module = self._model.get_submodule(owner)
        if (leaf != 'weight' or self.here() != owner
                or not isinstance(module, (nn.Linear, _ConvNd))):
            # A gate replaces the forward of the layer that owns the kernel.
            # A forward that takes the kernel past its layer has no gate.
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
        """Note that the batch norm with this weight reads these inputs."""
        name = self.name_of(weight)
        if name is not None:
            norm = name.rpartition('.')[0]
            self._normed[id(inputs)] = norm
            self._sources.setdefault(norm, set()).add(
                self._written.get(id(inputs), ''))

    def count_reads(self, tensors: Sequence[Tensor]) -> None:
        """Count one read of each tensor by an operator."""
        names = {id(tensor): self.name_of(tensor) for tensor in tensors}
        self._reads.update(names.keys())
        for tensor in tensors if self.in_inference else ():
            name = names[id(tensor)]
            if name is not None and name not in self._buffers:
                self.parameters[name] = tuple(tensor.shape)

    def forget_activations(self) -> None:
        """Forget what belongs to the forward pass that has ended."""
        for key, layer in self._written.items():
            # A constant can be folded into a norm only where nothing else
            # reads the layer's output.
            norm = self._normed.get(key, '') if self._reads[key] == 1 else ''
            self._readers.setdefault(layer, set()).add(norm)
        for record in (self._labels, self.kernels, self._reads, self._written,
                       self._normed, self.modules):
            record.clear()

    def norms(self) -> dict[str, str]:
        """Batch norm of each layer that only feeds a norm which only reads it.
        """
        pairs = ((layer, norm) for layer, norms in self._readers.items()
                 for norm in norms)
        return {
            layer: norm
            for layer, norm in pairs
            if norm and self._readers[layer] == {norm}
            and self._sources[norm] == {layer}
        }


def varies(labels: Tensor, dim: int) -> bool:
    """Return True if the labels differ along an axis."""
    if labels.shape[dim] < 2 or labels.stride(dim) == 0:
        return False
    return bool((labels != labels.narrow(dim, 0, 1)).any())


def vector(labels: Tensor, dim: int) -> Tensor | None:
    """Labels along ``dim``; None if they vary along another axis."""
    if any(
            varies(labels, other) for other in range(labels.dim())
            if other != dim % labels.dim()):
        return None
    index: list[Any] = [0] * labels.dim()
    index[dim] = slice(None)
    return labels[tuple(index)]


def spread(channels: Tensor, shape: torch.Size, dim: int) -> Tensor:
    """Expand a vector of labels to a shape that has it along ``dim``."""
    thin = [1] * len(shape)
    thin[dim] = -1
    return channels.reshape(thin).expand(shape)


def thinned(labels: Tensor, dims: Iterable[int] | None = None) -> Tensor:
    """Shrink expanded axes (stride 0) to size 1; all axes by default."""
    for dim in range(labels.dim()) if dims is None else dims:
        if labels.stride(dim) == 0:
            labels = labels.narrow(dim, 0, 1)
    return labels


def compact(labels: Tensor, other: Tensor | None = None) -> Tensor:
    """Flatten labels without repeats along axes expanded in all tensors."""
    dims = [
        dim for dim in range(labels.dim())
        if other is None or other.stride(dim) == 0
    ]
    return thinned(labels, dims).reshape(-1)


def blocks(old: torch.Size,
           new: torch.Size) -> Iterator[tuple[list[int], list[int]]]:
    """Yield the smallest runs of axes that have equal products in two shapes.

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
