"""Rules that say what each ATen operator does to labels.

A rule is a function of the :class:`Labels` and one executed operator. It
attaches labels to the outputs and returns True, or it returns False. After
False all labels that the operator reads are frozen, as they are by an operator
without a rule. So an unknown operator can only cost savings, never make the
pruned network wrong.

Letters: ``N`` batch, ``C`` channels, ``H, W`` height and width, ``B`` blocks
(groups of a grouped convolution).
"""
from __future__ import annotations

import dataclasses
import math
import re
from typing import Any, Callable

import torch
from torch import Tensor

from .labels import (ActivationProduct, KernelUse, Labels, blocks, spread,
                     thinned, varies, vector)
from .structure import LayerCall

# Elementwise operators to which PyTorch gives no tag that says so.
_POINTWISE = ('hardswish', 'hardswish_', '_prelu_kernel', 'masked_fill',
              'masked_fill_', 'native_dropout')
# Attention kernels, of which PyTorch selects one by the device.
_ATTENTION = ('_scaled_dot_product_flash_attention_for_cpu',
              '_scaled_dot_product_flash_attention',
              '_scaled_dot_product_efficient_attention',
              '_scaled_dot_product_fused_attention_overrideable',
              '_scaled_dot_product_cudnn_attention')
# Operators that have a cost even where no channel of theirs has a label.
PRODUCTS = frozenset(
    (*_ATTENTION, 'convolution', 'addmm', 'mm', 'linear', 'bmm', 'baddbmm'))
# Operators that read a shape but no value, so that no channel passes.
_CREATIONS = ('zeros_like', 'ones_like', 'empty_like', 'full_like',
              'new_zeros', 'new_ones', 'new_empty', 'new_full')


@dataclasses.dataclass(frozen=True)
class Operation:
    """One executed operator.

    Args:
        function (Any): The operator's overload, which is callable on labels
            too.
        args (tuple[Any, ...]): The positional arguments.
        kwargs (dict[str, Any]): The keyword arguments.
        tensors (list[Tensor]): All tensors among the arguments.
        outputs (list[Tensor]): All tensors that the operator returned.
    """
    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tensors: list[Tensor]
    outputs: list[Tensor]

    @property
    def name(self) -> str:
        """Name without the overload, e.g. ``'add'`` or ``'mylib::add'``.

        Only PyTorch's own operators go by their bare name, so that no rule
        is applied to an operator of another library that shares the name.
        """
        namespace, _, name = self.function.name().rpartition('::')
        name = name.partition('.')[0]
        return name if namespace == 'aten' else f'{namespace}::{name}'

    @property
    def source(self) -> Tensor | None:
        """The first argument if it is a tensor, else None."""
        first = self.args[0] if self.args else None
        return first if isinstance(first, Tensor) else None

    def argument(self, index: int, name: str, default: Any = None) -> Any:
        """Return an argument that was passed by position or by name."""
        if len(self.args) > index:
            return self.args[index]
        return self.kwargs.get(name, default)


Rule = Callable[[Labels, Operation], bool]
# A rule for operators that rearrange or reduce one labelled tensor. The last
# argument is that tensor's labels.
SourceRule = Callable[[Labels, Operation, Tensor], bool]
_RULES: dict[str, Rule] = {}
_SOURCE_RULES: dict[str, SourceRule] = {}


def _rule(*names: str) -> Callable[[Rule], Rule]:

    def register(function: Rule) -> Rule:
        _RULES.update(dict.fromkeys(names, function))
        return function

    return register


def _source_rule(*names: str) -> Callable[[SourceRule], SourceRule]:

    def register(function: SourceRule) -> SourceRule:
        _SOURCE_RULES.update(dict.fromkeys(names, function))
        return function

    return register


def apply(labels: Labels, operation: Operation) -> bool:
    """Apply one operator to the labels; return False if no rule covers it."""
    name = operation.name
    if '::' in name:
        return False
    if name in _RULES:
        return _RULES[name](labels, operation)
    if torch.Tag.pointwise in operation.function.tags or name in _POINTWISE:
        return _pointwise(labels, operation)
    if name in _CREATIONS:
        return True
    source = operation.source
    # Source rules are about one tensor in and another one out; in place, the
    # old labels of the tensor would be lost.
    if source is None or len(operation.tensors) > 1 or any(
            tensor is source for tensor in operation.outputs):
        return False
    known = labels.own(source)
    if known is None:
        return False
    if name in _SOURCE_RULES:
        return _SOURCE_RULES[name](labels, operation, known)
    if name.startswith(SPATIAL):
        return _spatial(labels, operation, known)
    return False


# -- layers -----------------------------------------------------------------


@_rule('convolution')
def _convolution(labels: Labels, operation: Operation) -> bool:
    inputs, weight, bias = operation.args[:3]
    transposed, number = operation.args[6], operation.args[8]
    kernel = labels.name_of(weight)
    known = labels.get(inputs)
    channels = None if known is None else vector(known, 1)
    output = operation.outputs[0]
    read = inputs.shape[1] // number  # channels that one output reads
    # A convolution multiplies once per output position and kernel entry, a
    # transposed one once per input position and kernel entry.
    moves = inputs if transposed else output
    macs_per_pair = math.prod(weight.shape[2:]) * math.prod(moves.shape[2:])
    macs_per_pair = macs_per_pair * len(inputs) // labels.batch.images
    calls = (_layer_call(labels, operation), )
    # Blocks of a transposed convolution lie on both axes of its kernel, which
    # no width describes, unless each is a single channel.
    unknown = (known is not None
               and channels is None) or (transposed and number > 1
                                         and not read == weight.shape[1] == 1)
    if kernel is None or unknown:
        labels.products.append(
            ActivationProduct(f'convolution in {labels.here()}', labels.here(),
                              macs_per_pair, read,
                              torch.zeros(output.shape[1], dtype=torch.long),
                              labels.in_inference, calls[0],
                              _fixed_reason(labels, operation, kernel)))
        return False
    # Many small groups, as in a depthwise convolution: whole groups are
    # removed. Few large ones: each keeps the same number of channels.
    if number > read:
        written = labels.axis(kernel, 0, weight.shape[0])
        if channels is None:
            labels.freeze_labels(written, f'input of {labels.here()}')
        else:
            block = labels.tie_along(channels.reshape(number, read), 1)
            labels.tie(written.reshape(number, -1), block[:, :1])
        call = KernelUse(calls, macs_per_pair * read,
                         (len(written), len(written)), (0, 0), True,
                         labels.in_inference)
        return labels.write(kernel, call, written, bias, output, 1)
    axes = (0, 1) if transposed else (1, 0)
    written = labels.axis(kernel, axes[1], weight.shape[axes[1]])
    if number > 1:
        # A grouped convolution needs groups of equal size, so the channels
        # at the same place in each block share a gate.
        labels.tie_along(written.reshape(number, -1), 0)
        if channels is not None:
            channels = labels.tie_along(channels.reshape(number, read), 0)[0]
    labels.read(kernel, axes[0], read, channels)
    call = KernelUse(calls, macs_per_pair, (read, len(written)), axes, False,
                     labels.in_inference)
    return labels.write(kernel, call, written, bias, output, 1)


def _fixed_reason(labels: Labels, operation: Operation,
                  kernel: str | None) -> str:
    """Return the reason why a layer without gates is frozen."""
    if kernel is None:
        return f'computed kernel in {labels.here()}'
    return f'{operation.name} in {labels.here()}'


def _layer_call(labels: Labels, operation: Operation) -> LayerCall:
    """Describe a convolution so that it can be repeated."""
    inputs, weight = operation.args[:2]
    return LayerCall(
        (max(len(inputs) // labels.batch.images, 1), *inputs.shape[2:]),
        tuple(weight.shape),
        tuple(
            tuple(option) if isinstance(option, list) else option
            for option in operation.args[3:9]))


@_rule('addmm', 'mm', 'linear')
def _linear(labels: Labels, operation: Operation) -> bool:
    if operation.name == 'linear':
        inputs, weight, *bias = operation.args
        kernel = labels.name_of(weight)
    else:
        *bias, inputs, weight = operation.args[:3]
        kernel = labels.kernels.get(id(weight))
    known = labels.get(inputs)
    channels = None if known is None else vector(known, -1)
    output = operation.outputs[0]
    if kernel is None and operation.name == 'mm':
        return _product(labels, operation)
    if kernel is None or (known is not None and channels is None):
        _count_product(
            labels, output.shape, inputs.shape[-1], None, -1,
            _fixed_reason(labels, operation, kernel)
            if not labels.batch.from_inputs([weight]) else '')
        return False
    rows = math.prod(output.shape[:-1]) // labels.batch.images
    sizes = (inputs.shape[-1], output.shape[-1])
    labels.read(kernel, 1, sizes[0], channels)
    written = labels.axis(kernel, 0, sizes[1])
    call = KernelUse((LayerCall((rows, )), ), rows, sizes, (1, 0), False,
                     labels.in_inference)
    return labels.write(kernel, call, written, bias[0] if bias else None,
                        output, -1)


@_rule('native_batch_norm', '_native_batch_norm_legit',
       '_native_batch_norm_legit_no_training', 'cudnn_batch_norm',
       'miopen_batch_norm', '_batch_norm_with_update', '_batch_norm_no_update')
def _batch_norm(labels: Labels, operation: Operation) -> bool:
    inputs, weight = operation.args[:2]
    known = labels.get(inputs)
    channels = None if known is None else vector(known, 1)
    if known is None or channels is None:
        return False
    for tensor in operation.args[1:5]:
        if isinstance(tensor, Tensor):
            labels.per_channel(tensor, channels)
    if isinstance(weight, Tensor):
        labels.norm(inputs, weight)
    return labels.set(operation.outputs[0], known)


@_rule('native_group_norm')
def _group_norm(labels: Labels, operation: Operation) -> bool:
    """Tie the channels of each group: groups are normalised separately."""
    inputs, weight, bias = operation.args[:3]
    known = labels.get(inputs)
    channels = None if known is None else vector(known, 1)
    if (known is None or channels is None or weight is None
            or labels.name_of(weight) != f'{labels.here()}.weight'):
        return False
    labels.tie_along(channels.reshape(operation.args[6], -1), 1)
    for tensor in (weight, bias):
        labels.per_channel(tensor, channels)
    labels.needs_channels(known)
    return labels.set(operation.outputs[0], known)


# -- operators on several tensors -------------------------------------------


def _pointwise(labels: Labels, operation: Operation) -> bool:
    tensors = operation.tensors
    known = [labels.own(tensor) for tensor in tensors]
    # A parameter with several long axes, or a buffer, has no labels that
    # could be tied.
    if any(one is None and tensor.numel() > 1
           and labels.name_of(tensor) is not None
           for tensor, one in zip(tensors, known)):
        return False
    result: Tensor | None = None
    for one in known:
        if one is not None:
            result = one if result is None else _meet(labels, result, one)
    if result is None:
        return False
    for tensor, one in zip(tensors, known):
        if one is None and _spans(tensor, result):
            return False
    output = operation.outputs[0]
    return labels.set(
        output,
        result.expand(torch.broadcast_shapes(result.shape, output.shape)))


def _meet(labels: Labels, first: Tensor, second: Tensor) -> Tensor:
    """Tie the labels of two operands; return those of the result."""
    shape = torch.broadcast_shapes(first.shape, second.shape)
    for one, other in ((first, second), (second, first)):
        wide = other.expand(torch.broadcast_shapes(other.shape, shape))
        thin = one.reshape((1, ) * (len(shape) - one.dim()) + one.shape)
        if any(thin.shape[dim] == 1 and shape[dim] > 1 and varies(wide, dim)
               for dim in range(len(shape))):
            # One channel that acts on all others, e.g. a spatial attention
            # map, cannot be removed with any one of them.
            labels.freeze_labels(
                one, f'channel spread over others in {labels.here()}')
            return wide
    labels.tie(first, second)
    return first.expand(shape)


def _spans(tensor: Tensor, known: Tensor) -> bool:
    """Return True if an unlabelled tensor is longer than 1 along channels."""
    offset = known.dim() - tensor.dim()
    return any(size > 1 and varies(known, dim + offset)
               for dim, size in enumerate(tensor.shape) if dim + offset >= 0)


@_rule('baddbmm')
def _added_product(labels: Labels, operation: Operation) -> bool:
    """Count the product, and freeze all that it reads."""
    _count_product(labels, operation.outputs[0].shape,
                   operation.args[1].shape[-1], None, -1)
    return False


@_rule('bmm')
def _product(labels: Labels, operation: Operation) -> bool:
    """``(..., n, k) @ (..., k, m)``: the result keeps the channels of n or m.

    Channels of k are summed where no gate can act, so they are frozen. So are
    channels of the batch axes, and those of n and m if both are of channels.
    """
    output = operation.outputs[0]
    passing: list[tuple[Tensor, int]] = []
    for tensor, dim in zip(operation.tensors, (-2, -1)):
        known = labels.own(tensor)
        channels = None if known is None else vector(known, dim)
        if known is None:
            labels.freeze(tensor, f'{operation.name} in {labels.here()}')
        elif channels is None:
            labels.freeze(tensor,
                          f'{operation.name} over it in {labels.here()}')
        elif varies(channels, 0):
            passing.append((channels, dim))
    channels, way = passing[0] if len(passing) == 1 else (None, -1)
    left, right = operation.args[:2]
    computed_kernel = (
        channels is None and labels.batch.from_inputs([left])
        and not labels.batch.from_inputs([right]))
    _count_product(
        labels, output.shape, left.shape[-1], channels, way,
        _fixed_reason(labels, operation, None) if computed_kernel else '')
    return len(passing) < 2 and labels.set(
        output,
        None if channels is None else spread(channels, output.shape, way))


def _count_product(labels: Labels,
                   shape: torch.Size,
                   summed: int,
                   channels: Tensor | None,
                   dim: int,
                   reason: str = '') -> None:
    """Record the multiply-adds of a product by the shape of its result.

    Args:
        labels (Labels): The labels, to which the product is added in place.
        shape (torch.Size): Shape of the result.
        summed (int): Number of products that are summed to each entry.
        channels (Tensor, optional): Labels along the axis ``dim``.
        dim (int): The axis of the result that may be of channels.
        reason (str): The reason why the outputs are frozen, for a layer.
    """
    if channels is None:
        channels = torch.zeros(shape[dim], dtype=torch.long)
    macs_per_pair = math.prod(shape) // shape[dim] // labels.batch.images
    labels.products.append(
        ActivationProduct(f'product in {labels.here()}', labels.here(),
                          macs_per_pair, summed, channels, labels.in_inference,
                          LayerCall((macs_per_pair, )), reason))


@_rule(*_ATTENTION)
def _attention(labels: Labels, operation: Operation) -> bool:
    """Pass the channels of the values on; freeze those of queries and keys."""
    values = operation.args[2]
    for tensor in operation.tensors:
        if tensor is not values:
            labels.freeze(tensor, f'attention in {labels.here()}')
    known = labels.get(values)
    channels = None if known is None else vector(known, -1)
    output = operation.outputs[0]
    query, key = operation.args[:2]
    _count_product(labels, query.shape[:-1] + key.shape[-2:-1],
                   query.shape[-1], None, -1)
    _count_product(labels, output.shape, key.shape[-2], channels, -1)
    return (known is None or channels is not None) and labels.set(
        output,
        None if channels is None else spread(channels, output.shape, -1))


@_rule('cat', 'stack')
def _join(labels: Labels, operation: Operation) -> bool:
    output = operation.outputs[0]
    parts = []
    for tensor in operation.args[0]:
        known = labels.own(tensor)
        if known is None and labels.name_of(
                tensor) is not None and tensor.dim() and tensor.numel() > 1:
            labels.freeze(tensor, f'{operation.name} in {labels.here()}')
        parts.append(
            torch.zeros((), dtype=torch.long).expand(tensor.shape) if known is
            None else known)
    dim = operation.argument(1, 'dim', 0) % output.dim()
    if operation.name == 'stack':
        # All parts need the same shape, so they keep the same channels.
        for part in parts[1:]:
            labels.tie(parts[0], part)
        return labels.set(output, parts[0].unsqueeze(dim).expand(output.shape))
    if any(varies(part, dim) for part in parts):
        # A vector of channels per part can be joined; parts that vary along
        # a second axis cannot.
        vectors = [
            channels for part in parts
            if (channels := vector(part, dim)) is not None
        ]
        if len(vectors) < len(parts):
            return False
        return labels.set(output,
                          spread(torch.cat(vectors), output.shape, dim))
    return labels.set(output, torch.cat(parts, dim))


# -- operators on one tensor ------------------------------------------------


@_rule('t', 'transpose', 'permute')
def _permute(labels: Labels, operation: Operation) -> bool:
    source, output = operation.args[0], operation.outputs[0]
    name = labels.name_of(source)
    known = labels.own(source)
    if name is not None and known is None:
        # A linear layer transposes its kernel before the product, which has
        # to find the kernel's name.
        if source.dim() == 2 and output.shape == source.shape[::-1]:
            labels.kernels[id(output)] = name
            return True
        return False
    return known is not None and _rearrange(labels, operation, known)


@_source_rule('clone', 'detach', 'alias', '_to_copy', 'contiguous',
              'lift_fresh')
def _copy(labels: Labels, operation: Operation, known: Tensor) -> bool:
    return labels.set(operation.outputs[0], known)


@_source_rule('expand', 'unsqueeze', 'squeeze')
def _rearrange(labels: Labels, operation: Operation, known: Tensor) -> bool:
    """Apply the operator itself to the labels."""
    labels.needs_channels(known)
    return labels.set(
        operation.outputs[0],
        operation.function(known, *operation.args[1:], **operation.kwargs))


@_source_rule('select', 'flip', 'roll')
def _move(labels: Labels, operation: Operation, known: Tensor) -> bool:
    """Apply the operator to the labels unless it moves along channels."""
    labels.needs_channels(known)
    select = operation.name == 'select'
    dims = operation.args[1] if select else operation.args[-1]
    return not any(varies(known, dim)
                   for dim in _as_list(dims)) and (labels.set(
                       operation.outputs[0],
                       operation.function(known, *operation.args[1:])))


@_source_rule('view', '_unsafe_view', 'reshape', '_reshape_alias')
def _reshape(labels: Labels, operation: Operation, known: Tensor) -> bool:
    """Merge axes as they are; split an axis into equal blocks."""
    labels.needs_channels(known)
    shape = operation.outputs[0].shape
    # Labels are reshaped without the axes on which they do not vary, so that
    # nothing of the activation's size is copied.
    small = [1] * len(shape)
    split: list[list[int]] = []
    for old, new in blocks(known.shape, shape):
        if any(varies(known, dim) for dim in old):
            if len(old) > 1 and len(new) > 1:
                return False
            for dim in new:
                small[dim] = shape[dim]
            split.append(new)
        else:
            for dim in old:
                known = known.narrow(dim, 0, 1)
    result = known.reshape(small)
    for new in split:
        # After a split into (outer, inner) only one of the axes can get
        # shorter: the outer one if the inner one holds a single channel, else
        # the inner one, where each block has to keep the same entries.
        for index, dim in enumerate(new[:-1]):
            if any(varies(result, inner) for inner in new[index + 1:]):
                result = labels.tie_along(result, dim)
    return labels.set(operation.outputs[0], result.expand(shape))


@_source_rule('split', 'split_with_sizes')
def _split(labels: Labels, operation: Operation, known: Tensor) -> bool:
    labels.needs_channels(known)
    dim = operation.argument(2, 'dim', 0)
    outputs = operation.outputs
    pieces = known.split([output.shape[dim] for output in outputs], dim)
    if varies(known, dim):
        if len({piece.shape for piece in pieces}) > 1:
            return False
        # A split into equal pieces works on any width if all pieces keep the
        # same entries.
        for piece in pieces:
            labels.tie(pieces[0], piece)
        pieces = (pieces[0], ) * len(pieces)
    return all(map(labels.set, outputs, pieces))


@_source_rule('unbind')
def _unbind(labels: Labels, operation: Operation, known: Tensor) -> bool:
    labels.needs_channels(known)
    dim = operation.argument(1, 'dim', 0)
    return not varies(known, dim) and all(
        labels.set(output, known.select(dim, 0))
        for output in operation.outputs)


@_source_rule('slice')
def _slice(labels: Labels, operation: Operation, known: Tensor) -> bool:
    labels.needs_channels(known)
    output = operation.outputs[0]
    changed = [
        dim for dim in range(known.dim())
        if known.shape[dim] != output.shape[dim]
    ]
    if any(varies(known, dim) for dim in changed):
        return False
    for dim in changed:
        known = known.narrow(dim, 0, 1)
    return labels.set(output, known.expand(output.shape))


@_source_rule('repeat')
def _repeat(labels: Labels, operation: Operation, known: Tensor) -> bool:
    labels.needs_channels(known)
    shape = operation.outputs[0].shape
    times = operation.args[1]
    known = known.reshape((1, ) * (len(shape) - known.dim()) + known.shape)
    times = [
        count if varies(known, dim) else 1 for dim, count in enumerate(times)
    ]
    return labels.set(operation.outputs[0],
                      thinned(known).repeat(times).expand(shape))


@_source_rule('mean', 'sum', 'amax', 'amin', 'max', 'min', 'var', 'std',
              'linalg_vector_norm')
def _reduce(labels: Labels, operation: Operation, known: Tensor) -> bool:
    labels.needs_channels(known)
    place = 2 if operation.name == 'linalg_vector_norm' else 1
    given = operation.argument(place, 'dim')
    dims = ({dim % known.dim()
             for dim in _as_list(given)} or set(range(known.dim())))
    if any(varies(known, dim) for dim in dims):
        return False
    output = operation.outputs[0]
    for dim in sorted(dims, reverse=True):
        known = known.narrow(dim, 0, 1)
        if output.dim() < operation.args[0].dim():
            known = known.squeeze(dim)
    # The second output of max and min holds indices, not channels.
    return labels.set(output, known)


@_source_rule('_softmax', '_log_softmax')
def _softmax(labels: Labels, operation: Operation, known: Tensor) -> bool:
    labels.needs_channels(known)
    return (not varies(known, operation.args[1])
            and labels.set(operation.outputs[0], known))


# Prefixes of operators on the last axes that neither mix channels nor depend
# on their number.
SPATIAL = ('upsample_', '_upsample_', 'max_pool', 'avg_pool', 'adaptive_',
           '_adaptive_', 'mkldnn_adaptive', 'reflection_pad',
           'replication_pad')


def _spatial(labels: Labels, operation: Operation, known: Tensor) -> bool:
    # Their names tell the number of spatial axes, e.g. max_pool2d.
    axes = re.search(r'([123])d', operation.name)
    return axes is not None and _on_last_axes(labels, operation, known,
                                              int(axes[1]))


@_source_rule('constant_pad_nd')
def _pad(labels: Labels, operation: Operation, known: Tensor) -> bool:
    """Give label 0 to the channels that are added; no layer writes them.

    The padding must not be negative along an axis of channels: which channels
    are cut off would depend on their number.
    """
    labels.needs_channels(known)
    output = operation.outputs[0]
    sides = operation.args[1]
    known = thinned(known)
    for last, pair in enumerate(zip(sides[::2], sides[1::2])):
        dim = known.dim() - 1 - last
        if not varies(known, dim):
            known = known.narrow(dim, 0, 1)
        elif min(pair) < 0:
            return False
        else:
            before, after = (
                known.new_zeros(
                    (*known.shape[:dim], size, *known.shape[dim + 1:]))
                for size in pair)
            known = torch.cat([before, known, after], dim)
    return labels.set(output, known.expand(output.shape))


def _on_last_axes(labels: Labels, operation: Operation, known: Tensor,
                  axes: int) -> bool:
    """Keep the labels of the outer axes; the last ones must have none."""
    labels.needs_channels(known)
    last = range(known.dim() - axes, known.dim())
    if any(varies(known, dim) for dim in last):
        return False
    for dim in last:
        known = known.narrow(dim, 0, 1)
    return all(
        labels.set(output, known.expand(output.shape))
        for output in operation.outputs)


@_source_rule('pixel_shuffle')
def _pixel_shuffle(labels: Labels, operation: Operation,
                   known: Tensor) -> bool:
    """``(N, C r^2, H, W) -> (N, C, r H, r W)``: tie the r^2 inputs of each."""
    labels.needs_channels(known)
    channels = vector(known, 1)
    if channels is None:
        return False
    output = operation.outputs[0]
    merged = labels.tie_along(channels.reshape(output.shape[1], -1), 1)
    return labels.set(output, spread(merged[:, 0], output.shape, 1))


@_source_rule('pixel_unshuffle', 'im2col')
def _gather_pixels(labels: Labels, operation: Operation,
                   known: Tensor) -> bool:
    """``(N, C, ...) -> (N, C k, ...)``: repeat each channel's label k times.
    """
    labels.needs_channels(known)
    channels = vector(known, 1)
    if channels is None:
        return False
    output = operation.outputs[0]
    repeated = channels.repeat_interleave(output.shape[1] // len(channels))
    return labels.set(output, spread(repeated, output.shape, 1))


def _as_list(dims: Any) -> list[int]:
    """Return the axes of an operator's argument: none, one or several."""
    if dims is None:
        return []
    return [dims] if isinstance(dims, int) else list(dims)
