"""Labels that travel beside the activations: what a forward pass says.

The engine behind ``groups.py``. Every slot of every channel axis of every
parameter owns a label, an integer from 1 on; 0 stands for a channel that is
nobody's to prune. Under a dispatch mode, which sees every ATen operator, a
tensor of labels travels beside each activation, in its shape, and is
reshaped, permuted, concatenated with it. Axes on which labels do not vary are
expanded (stride 0), so the labels of an activation take little memory.

Operators that need two labels to live or die together *tie* them. An operator
without a rule *freezes* the labels that it reads: an unknown operator costs
saving, never correctness.

Letters: ``N`` batch, ``C`` channels, ``H, W`` height and width.
"""
from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from collections import Counter
from typing import Any, Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Forward = Callable[[nn.Module, Tensor], Any]

# Operators that neither mix channels nor look at their number, by prefix.
_SPATIAL = ('upsample_', '_upsample_', 'max_pool', 'avg_pool', 'adaptive_',
            '_adaptive_', 'mkldnn_adaptive', 'reflection_pad',
            'replication_pad')
# Element by element too, but without the tag that says so.
_POINTWISE = ('hardswish', 'hardswish_', '_prelu_kernel', 'masked_fill',
              'masked_fill_')
# New tensors of a shape alone.
_CREATIONS = ('zeros_like', 'ones_like', 'empty_like', 'full_like',
              'new_zeros', 'new_ones', 'new_empty', 'new_full')
_REDUCTIONS = ('mean', 'sum', 'amax', 'amin', 'var', 'std')
_COPIES = ('clone', 'detach', 'alias', '_to_copy', 'contiguous', 'lift_fresh')
# Operators that only rearrange: done to the labels as they are.
_VIEWS = ('permute', 'transpose', 't', 'expand', 'unsqueeze', 'squeeze')
# The same, along axes that must not be of channels.
_MOVES = ('select', 'flip', 'roll')
_RESHAPES = ('view', '_unsafe_view', 'reshape', '_reshape_alias')


@dataclasses.dataclass
class Call:
    """How a convolution or linear layer was run.

    Args:
        positions (int): Multiply-adds per pair of channels and image, over
            all counted calls: k^2 H W of a convolution (H, W of its output),
            the rows of a linear layer.
        inputs (int): Input channels that one output channel reads.
        outputs (int): Output channels.
        depthwise (bool): Each output channel reads one input channel.
        counted (bool): Whether inference runs it.
    """
    positions: int
    inputs: int
    outputs: int
    depthwise: bool
    counted: bool


class Tracer(TorchDispatchMode):
    """Runs a model and writes down what it says of its channels.

    Args:
        model (nn.Module): In eval mode, on any device; parameters may have
            no data.
        shared (Iterable[str]): Tensors that have several names; their
            channels are frozen.

    Attributes:
        axes (dict[tuple[str, int], Tensor]): Labels ``(size,)`` of the slots
            of ``(tensor name, axis)``.
        pairs (list[Tensor]): ``(2, n)`` labels that are tied.
        freezes (list[tuple[Tensor, str]]): Labels that are frozen, and why.
        stops (list[Tensor]): Labels that pass an operator which refuses
            tensors without channels.
        calls (dict[str, Call]): Kernel name to how it was run, in order.
        read_axes, written_axes (set[tuple[str, int]]): Axes of kernels by
            which channels are read, and written.
    """

    def __init__(self, model: nn.Module, shared: Iterable[str] = ()) -> None:
        super().__init__()
        self.model = model
        self.axes: dict[tuple[str, int], Tensor] = {}
        self.pairs: list[Tensor] = []
        self.freezes: list[tuple[Tensor, str]] = []
        self.stops: list[Tensor] = []
        self.calls: dict[str, Call] = {}
        self.read_axes: set[tuple[str, int]] = set()
        self.written_axes: set[tuple[str, int]] = set()
        self.next_label = 1
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
        self._counted = True
        self._images = 1
        # Of the forward pass under way, by identity; alive so that none is
        # used twice.
        self._alive: list[Tensor] = []
        self._labels: dict[int, Tensor] = {}
        self._kernels: dict[int, str] = {}
        self._reads: Counter[int] = Counter()
        self._written: dict[int, str] = {}
        self._normed: dict[int, str] = {}
        self._modules: list[str] = []

    def run(self, forward: Forward, inputs: Tensor, counted: bool) -> None:
        """Trace one forward pass; its outputs are frozen.

        Args:
            forward (Forward): Called with the model and the inputs.
            inputs (Tensor): ``(N, C, H, W)``, on the model's device.
            counted (bool): Whether inference does this too.
        """
        self._counted = counted
        self._images = len(inputs)
        with self._module_names(), torch.no_grad(), self:
            outputs = forward(self.model, inputs)
        for output in tree_leaves(outputs):
            if isinstance(output, Tensor):
                self._reads[id(output)] += 1
                self._freeze(output, 'output of the model')
        for key, layer in self._written.items():
            norm = self._normed.get(key, '') if self._reads[key] == 1 else ''
            self._readers.setdefault(layer, set()).add(norm)
        for record in (self._alive, self._labels, self._kernels, self._reads,
                       self._written, self._normed):
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

    @contextlib.contextmanager
    def _module_names(self) -> Iterator[None]:
        """Keep the name of the running module, for the reasons."""

        def enter(name: str) -> Callable[..., None]:
            return lambda module, inputs: self._modules.append(name)

        def leave(module: nn.Module, inputs: Any, output: Any) -> None:
            self._modules.pop()

        handles = []
        for name, module in self.model.named_modules():
            handles.append(module.register_forward_pre_hook(enter(name)))
            handles.append(module.register_forward_hook(leave))
        try:
            yield
        finally:
            self._modules.clear()
            for handle in handles:
                handle.remove()

    def __torch_dispatch__(self,
                           function: Any,
                           types: Any,
                           args: tuple[Any, ...] = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        output = function(*args, **(kwargs or {}))
        tensors = [
            leaf for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, Tensor)
        ]
        outputs = [
            leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)
        ]
        self._alive += [*tensors, *outputs]
        self._reads.update({id(tensor) for tensor in tensors})
        if any(
                id(tensor) in self._labels or id(tensor) in self._names
                for tensor in tensors):
            name = function.overloadpacket.__name__
            if not self._apply(function, name, args, kwargs or {}, tensors,
                               outputs):
                for tensor in tensors:
                    self._freeze(tensor, f'{name} in {self._here()}')
        return output

    # -- labels ------------------------------------------------------------

    def _here(self) -> str:
        return (self._modules and self._modules[-1]) or 'the model'

    def _get(self, tensor: Tensor) -> Tensor | None:
        return self._labels.get(id(tensor))

    def _set(self, tensor: Tensor, labels: Tensor | None) -> bool:
        if labels is None:
            self._labels.pop(id(tensor), None)
        else:
            assert labels.shape == tensor.shape, (labels.shape, tensor.shape)
            self._labels[id(tensor)] = labels
        return True

    def _axis(self, name: str, axis: int, size: int) -> Tensor:
        """Labels ``(size,)`` of the slots of an axis, made at first use."""
        key = (name, axis)
        if key not in self.axes:
            self.axes[key] = torch.arange(self.next_label,
                                          self.next_label + size)
            self.next_label += size
            if name in self._shared:
                self._freeze_labels(self.axes[key], f'{name} has other names')
        return self.axes[key]

    def _tie(self, first: Tensor, second: Tensor) -> None:
        """The labels live and die together, element by element."""
        first, second = torch.broadcast_tensors(first, second)
        pairs = torch.stack([_compact(first, second), _compact(second, first)])
        self.pairs.append(torch.unique(pairs[:, pairs[0] != pairs[1]], dim=1))

    def _freeze(self, tensor: Tensor, reason: str) -> None:
        """The channels of a tensor stay; an activation loses its labels."""
        labels = self._get(tensor)
        if labels is not None:
            self._freeze_labels(labels, reason)
            self._set(tensor, None)
        elif id(tensor) in self._names:
            for axis, size in enumerate(tensor.shape):
                self._freeze_labels(
                    self._axis(self._names[id(tensor)], axis, size), reason)

    def _freeze_labels(self, labels: Tensor, reason: str) -> None:
        self.freezes.append((torch.unique(_compact(labels)), reason))

    def _needs_channels(self, labels: Tensor) -> None:
        """An operator here refuses tensors without channels."""
        self.stops.append(torch.unique(_compact(labels)))

    def _vector(self, labels: Tensor, dim: int) -> Tensor | None:
        """Labels along ``dim``, if they vary along no other."""
        if any(
                _varies(labels, other) for other in range(labels.dim())
                if other != dim % labels.dim()):
            return None
        index: list[Any] = [0] * labels.dim()
        index[dim] = slice(None)
        return labels[tuple(index)]

    def _spread(self, vector: Tensor, like: Tensor, dim: int) -> Tensor:
        """A vector of labels, expanded to the shape of a tensor."""
        shape = [1] * like.dim()
        shape[dim] = -1
        return vector.reshape(shape).expand(like.shape)

    # -- operators ---------------------------------------------------------

    def _apply(self, function: Any, name: str, args: tuple[Any, ...],
               kwargs: dict[str, Any], tensors: list[Tensor],
               outputs: list[Tensor]) -> bool:
        """Let one operator act on the labels; False if it has no rule."""
        if name == 'convolution':
            return self._convolution(args, outputs[0])
        if name in ('addmm', 'mm', 'linear'):
            return self._linear(name, args, outputs[0])
        if 'batch_norm' in name:
            return self._batch_norm(args, outputs[0])
        if torch.Tag.pointwise in function.tags or name in _POINTWISE:
            return self._pointwise(tensors, outputs)
        source = args[0] if args and isinstance(args[0], Tensor) else None
        if name in ('cat', 'stack'):
            return self._join(function, args, kwargs, outputs[0])
        if source is not None and id(source) in self._names and (name in (
                't', 'transpose', 'permute')):
            return self._weight_view(source, outputs[0])
        if name in _CREATIONS:
            return True
        labels = None if source is None else self._own_labels(source)
        if source is None or labels is None or len(tensors) > 1 or any(
                tensor is source for tensor in outputs):
            return False
        if name in _COPIES:
            return self._set(outputs[0], labels)
        self._needs_channels(labels)
        if name in _VIEWS:
            return self._set(outputs[0], function(labels, *args[1:], **kwargs))
        if name in _MOVES:
            return self._move(function, labels, args, outputs[0])
        if name in _RESHAPES:
            return self._reshape(labels, outputs[0])
        if name in ('split', 'split_with_sizes'):
            return self._split(labels, args, kwargs, outputs)
        if name == 'unbind':
            dim = args[1] if len(args) > 1 else kwargs.get('dim', 0)
            return not _varies(labels, dim) and all(
                self._set(output, labels.select(dim, 0)) for output in outputs)
        if name == 'slice':
            return self._slice(labels, source, outputs[0])
        if name in _REDUCTIONS:
            return self._reduce(labels, args, kwargs, outputs)
        if name == 'constant_pad_nd':
            return self._spatial(labels, len(args[1]) // 2, outputs)
        if name.startswith(_SPATIAL):
            # The operators end in the number of axes that they act on.
            axes = re.search(r'([123])d', name)
            return axes is not None and self._spatial(labels, int(axes[1]),
                                                      outputs)
        if name in ('_softmax', '_log_softmax'):
            return (not _varies(labels, args[1])
                    and self._set(outputs[0], labels))
        return False

    def _convolution(self, args: tuple[Any, ...], output: Tensor) -> bool:
        inputs, weight, bias, transposed, groups = (*args[:3], args[6],
                                                    args[8])
        name = self._names.get(id(weight))
        labels = self._get(inputs)
        channels = None if labels is None else self._vector(labels, 1)
        if name is None or transposed or (labels is not None
                                          and channels is None):
            return False
        depthwise = groups > 1 and groups == inputs.shape[1]
        written = self._axis(name, 0, weight.shape[0])
        if depthwise and channels is not None:
            self._tie(
                channels.repeat_interleave(len(written) // groups), written)
        elif depthwise:
            self._freeze_labels(written, f'input of {self._here()}')
        elif groups > 1:
            reason = f'grouped convolution {self._here()}'
            self._freeze(inputs, reason)
            self._freeze_labels(written, reason)
        else:
            self._read(name, channels, inputs.shape[1])
        positions = math.prod(weight.shape[2:]) * math.prod(output.shape[2:])
        call = Call(positions * len(inputs) // self._images, weight.shape[1],
                    weight.shape[0], depthwise, self._counted)
        return self._write(name, call, bias, output, 1)

    def _linear(self, name: str, args: tuple[Any, ...],
                output: Tensor) -> bool:
        if name == 'linear':
            inputs, weight, *bias = args
            kernel = self._names.get(id(weight))
        else:
            *bias, inputs, weight = args[:3]
            kernel = self._kernels.get(id(weight))
        labels = self._get(inputs)
        channels = None if labels is None else self._vector(labels, -1)
        if kernel is None or (labels is not None and channels is None):
            return False
        self._read(kernel, channels, inputs.shape[-1])
        rows = math.prod(output.shape[:-1]) // self._images
        call = Call(rows, inputs.shape[-1], output.shape[-1], False,
                    self._counted)
        return self._write(kernel, call, bias[0] if bias else None, output, -1)

    def _read(self, kernel: str, channels: Tensor | None, size: int) -> None:
        """A layer reads channels by axis 1 of its kernel: a gate's place."""
        slots = self._axis(kernel, 1, size)
        if channels is None:
            self._freeze_labels(slots, f'input of {self._here()}')
        else:
            self._tie(slots, channels)
            self.read_axes.add((kernel, 1))

    def _write(self, kernel: str, call: Call, bias: Tensor | None,
               output: Tensor, dim: int) -> bool:
        """A layer writes channels of its own by axis 0 of its kernel."""
        slots = self._axis(kernel, 0, call.outputs)
        self.written_axes.add((kernel, 0))
        if bias is not None:
            self._per_channel(bias, slots)
        known = self.calls.setdefault(kernel,
                                      dataclasses.replace(call, positions=0))
        if call.counted:
            known.positions += call.positions
        elif not known.counted:
            self._freeze_labels(slots, f'{self._here()} is for training only')
        self._written[id(output)] = kernel.rpartition('.')[0]
        return self._set(output, self._spread(slots, output, dim))

    def _per_channel(self, tensor: Tensor, channels: Tensor) -> None:
        """A parameter or buffer ``(C,)`` goes with the channels ``(C,)``."""
        name = self._names.get(id(tensor))
        if name is None:
            self._freeze_labels(channels,
                                f'computed parameter of {self._here()}')
        else:
            self._tie(self._axis(name, 0, len(channels)), channels)

    def _batch_norm(self, args: tuple[Any, ...], output: Tensor) -> bool:
        labels = self._get(args[0])
        channels = None if labels is None else self._vector(labels, 1)
        if channels is None:
            return False
        for tensor in args[1:5]:
            if isinstance(tensor, Tensor):
                self._per_channel(tensor, channels)
        if id(args[1]) in self._names:
            norm = self._names[id(args[1])].rpartition('.')[0]
            self._normed[id(args[0])] = norm
            self._sources.setdefault(norm, set()).add(
                self._written.get(id(args[0]), ''))
        return self._set(output, labels)

    def _pointwise(self, tensors: list[Tensor], outputs: list[Tensor]) -> bool:
        output = outputs[0]
        known = [self._own_labels(tensor) for tensor in tensors]
        if any(labels is None and tensor.numel() > 1
               and id(tensor) in self._names
               for tensor, labels in zip(tensors, known)):
            return False
        result: Tensor | None = None
        for labels in known:
            if labels is not None:
                result = self._meet(result, labels)
        if result is None:
            return False
        for tensor, labels in zip(tensors, known):
            if labels is None and self._spans(tensor, result):
                return False
        result = result.expand(
            torch.broadcast_shapes(result.shape, output.shape))
        return self._set(output, result)

    def _own_labels(self, tensor: Tensor) -> Tensor | None:
        """Labels of an activation, or of a parameter with one axis."""
        labels = self._get(tensor)
        name = self._names.get(id(tensor))
        if labels is None and name is not None and (name not in self._buffers):
            long = [axis for axis, size in enumerate(tensor.shape) if size > 1]
            if len(long) == 1:
                axis = long[0]
                return self._spread(
                    self._axis(name, axis, tensor.shape[axis]), tensor, axis)
        return labels

    def _meet(self, first: Tensor | None, second: Tensor) -> Tensor:
        """Labels of an elementwise operator's result."""
        if first is None:
            return second
        shape = torch.broadcast_shapes(first.shape, second.shape)
        for one, other in ((first, second), (second, first)):
            wide = other.expand(torch.broadcast_shapes(other.shape, shape))
            thin = one.reshape((1, ) * (len(shape) - one.dim()) + one.shape)
            if any(thin.shape[dim] == 1 and shape[dim] > 1
                   and _varies(wide, dim) for dim in range(len(shape))):
                # One channel for all, e.g. a spatial attention map.
                self._freeze_labels(
                    one, f'channel spread over others in {self._here()}')
                return wide
        self._tie(first, second)
        return first.expand(shape)

    def _spans(self, tensor: Tensor, labels: Tensor) -> bool:
        """Whether an unlabelled tensor has a size along a channel axis."""
        offset = labels.dim() - tensor.dim()
        return any(size > 1 and _varies(labels, dim + offset)
                   for dim, size in enumerate(tensor.shape)
                   if dim + offset >= 0)

    def _weight_view(self, weight: Tensor, output: Tensor) -> bool:
        """The transpose of a linear layer's kernel."""
        if weight.dim() == 2 and output.shape == weight.shape[::-1]:
            self._kernels[id(output)] = self._names[id(weight)]
        return True

    def _join(self, function: Any, args: tuple[Any, ...],
              kwargs: dict[str, Any], output: Tensor) -> bool:
        parts = []
        for tensor in args[0]:
            labels = self._own_labels(tensor)
            parts.append(
                torch.zeros((), dtype=torch.long).
                expand(tensor.shape) if labels is None else labels)
        dim = (args[1] if len(args) > 1 else kwargs.get('dim', 0))
        dim %= output.dim()
        if function.overloadpacket.__name__ == 'stack':
            parts = [part.unsqueeze(dim) for part in parts]
        elif any(_varies(part, dim) for part in parts):
            # Along the channels: each other axis must be free of them.
            vectors = [
                vector for part in parts
                if (vector := self._vector(part, dim)) is not None
            ]
            if len(vectors) < len(parts):
                return False
            return self._set(output,
                             self._spread(torch.cat(vectors), output, dim))
        return self._set(output, torch.cat(parts, dim))

    def _move(self, function: Any, labels: Tensor, args: tuple[Any, ...],
              output: Tensor) -> bool:
        dims = args[1] if function.overloadpacket.__name__ == (
            'select') else args[-1]
        if any(_varies(labels, dim) for dim in _as_list(dims)):
            return False
        return self._set(output, function(labels, *args[1:]))

    def _reshape(self, labels: Tensor, output: Tensor) -> bool:
        """Axes merge as they are; an axis splits into equal blocks."""
        result = labels.reshape(output.shape)
        for old, new in _blocks(labels.shape, output.shape):
            if len(new) > 1 and any(_varies(labels, dim) for dim in old):
                if len(old) > 1:
                    return False
                # The inner axis gets shorter, so the outer ones must keep
                # the same of each block: C -> (blocks, C / blocks).
                for dim in new[:-1]:
                    first = result.narrow(dim, 0, 1).expand(result.shape)
                    self._tie(result, first)
                    result = first
        return self._set(output, result)

    def _split(self, labels: Tensor, args: tuple[Any, ...],
               kwargs: dict[str, Any], outputs: list[Tensor]) -> bool:
        dim = args[2] if len(args) > 2 else kwargs.get('dim', 0)
        pieces = labels.split([output.shape[dim] for output in outputs], dim)
        if _varies(labels, dim):
            if len({piece.shape for piece in pieces}) > 1:
                return False
            # Equal pieces stay equal if all keep the same.
            for piece in pieces:
                self._tie(pieces[0], piece)
            pieces = (pieces[0], ) * len(pieces)
        return all(map(self._set, outputs, pieces))

    def _slice(self, labels: Tensor, source: Tensor, output: Tensor) -> bool:
        changed = [
            dim for dim in range(source.dim())
            if source.shape[dim] != output.shape[dim]
        ]
        if any(_varies(labels, dim) for dim in changed):
            return False
        for dim in changed:
            labels = labels.narrow(dim, 0, 1)
        return self._set(output, labels.expand(output.shape))

    def _reduce(self, labels: Tensor, args: tuple[Any, ...],
                kwargs: dict[str, Any], outputs: list[Tensor]) -> bool:
        given = args[1] if len(args) > 1 else kwargs.get('dim')
        dims = ({dim % labels.dim()
                 for dim in _as_list(given)} or set(range(labels.dim())))
        if any(_varies(labels, dim) for dim in dims):
            return False
        for dim in sorted(dims, reverse=True):
            labels = labels.narrow(dim, 0, 1)
            if outputs[0].dim() < args[0].dim():
                labels = labels.squeeze(dim)
        return all(self._set(output, labels) for output in outputs)

    def _spatial(self, labels: Tensor, axes: int,
                 outputs: list[Tensor]) -> bool:
        """Operators on the last axes, which must be free of channels."""
        first = labels.dim() - axes
        if any(_varies(labels, dim) for dim in range(first, labels.dim())):
            return False
        for dim in range(first, labels.dim()):
            labels = labels.narrow(dim, 0, 1)
        return all(
            self._set(output, labels.expand(output.shape))
            for output in outputs)


def _as_list(dims: Any) -> list[int]:
    """Axes as an operator takes them: none, one or several."""
    if dims is None:
        return []
    return [dims] if isinstance(dims, int) else list(dims)


def _varies(labels: Tensor, dim: int) -> bool:
    """Whether the labels differ along an axis."""
    if labels.shape[dim] < 2 or labels.stride(dim) == 0:
        return False
    return bool((labels != labels.narrow(dim, 0, 1)).any())


def _compact(labels: Tensor, other: Tensor | None = None) -> Tensor:
    """Flat labels without the repeats of axes expanded in all tensors."""
    others = [labels] if other is None else [labels, other]
    for dim in range(labels.dim()):
        if all(tensor.stride(dim) == 0 for tensor in others):
            labels = labels.narrow(dim, 0, 1)
    return labels.reshape(-1)


def _blocks(old: torch.Size,
            new: torch.Size) -> Iterator[tuple[list[int], list[int]]]:
    """Smallest runs of axes with the same product in both shapes.

    Examples:
        >>> list(_blocks((2, 6, 5), (2, 3, 2, 5)))
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
