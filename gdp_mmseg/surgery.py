"""Surgery: absorb the gates, cut the closed channels, set widths.

A pruned network computes exactly what the gated one does. It is described by
its *widths*: module name to ``[C_out, C_in]`` (convolution, linear layer),
``[C_out, C_in, groups]`` (grouped convolution), ``[C]`` (batch norm, group
norm) or, for a parameter of another module, parameter name to shape. Axes that
have no gate are ``None``, but for grouped convolutions: as wide as the config
makes them, so that a pruned network can get another number of classes. A
module without channels is replaced: a batch norm by the identity, a layer by
:class:`Constant`.
"""
from __future__ import annotations

import copy
from typing import Any, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from .analysis.liveness import kept_channels, kept_slots
from .analysis.structure import Groups
from .analysis.tracer import copy_model
from .gates.layers import along, slot_values

Width = Sequence[int | None]
Widths = dict[str, Width]
# Of a tensor that only the weights of a network of the same widths fit into,
# or a module of such tensors; None are all axes.
Fitting = dict[str, tuple[int, ...] | None]


class Constant(nn.Module):
    """What is left of a layer that reads, or writes, no channel.

    Source: GDP (ICCV 2021), section 3: of a residual branch whose gates are
    all zero, the constant of its last batch norm stays as a bias.

    Args:
        layer (nn.Module): The layer that it stands for.
        channels (int): ``C_out``, may be 0.

    Examples:
        >>> left = Constant(nn.Conv2d(4, 2, 3, stride=2, padding=1), 2)
        >>> left(torch.ones(1, 0, 8, 8)).shape
        torch.Size([1, 2, 4, 4])
    """

    def __init__(self, layer: nn.Linear | _ConvNd, channels: int) -> None:
        super().__init__()
        # Kernel size, stride, padding of both sides with what is added to the
        # output, along each spatial axis; none for a linear layer.
        self.windows: list[tuple[int, int, int]] | None = None
        self.transposed = isinstance(layer, _ConvNd) and layer.transposed
        if isinstance(layer, _ConvNd):
            self.windows = [
                (dilation * (size - 1) + 1, step, around - added)
                for size, step, dilation, around, added in zip(
                    layer.kernel_size, layer.stride, layer.dilation,
                    _total_padding(layer), layer.output_padding)
            ]
        self.bias: nn.Parameter | None = None
        if channels:
            self.bias = nn.Parameter(layer.weight.new_zeros(channels))

    def forward(self, inputs: Tensor) -> Tensor:
        """The bias at every position: ``(N, C_in, ...) -> (N, C_out, ...)``.
        """
        channels = (
            inputs.new_empty(0)
            if self.bias is None else self.bias.to(inputs.dtype))
        # Cloned, because what follows may work in place.
        if self.windows is None:
            return channels.expand(*inputs.shape[:-1], -1).clone()
        size = [(length - 1) * step - around + window if self.transposed else
                (length + around - window) // step + 1
                for length, (window, step,
                             around) in zip(inputs.shape[2:], self.windows)]
        return channels.reshape(-1, *(1 for _ in size)).expand(
            len(inputs), -1, *size).clone()


def _total_padding(layer: _ConvNd) -> list[int]:
    """Padding of each spatial axis, both sides together."""
    if layer.padding == 'same':
        return [
            dilation * (size - 1)
            for dilation, size in zip(layer.dilation, layer.kernel_size)
        ]
    if layer.padding == 'valid':
        return [0 for _ in layer.kernel_size]
    return [2 * int(side) for side in layer.padding]


def prune(model: nn.Module, groups: Groups,
          openness: Tensor) -> tuple[nn.Module, Widths]:
    """A small copy of a model that computes what the gated model computes.

    Args:
        model (nn.Module): The model that was analysed, without gates; left as
            it is.
        groups (Groups): What the analysis found.
        openness (Tensor): ``(G,)`` the gates' openness.

    Returns:
        tuple[nn.Module, Widths]: The pruned model and its widths.

    Raises:
        ValueError: If a number in the model is not finite.
    """
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f'expected finite weights, but got nan or inf in '
                             f'{name}; export an earlier checkpoint')
    pruned, widths = cut(model, groups, openness)
    return copy.deepcopy(pruned), widths


def cut(model: nn.Module, groups: Groups,
        openness: Tensor) -> tuple[nn.Module, Widths]:
    """:func:`prune`, but what did not change is the model's own."""
    keep = kept_channels(groups, openness)
    dense = model.state_dict()
    state = dict(dense)
    for (name, axis), gates in groups.axes.items():
        kept = kept_slots(gates, keep)
        if not kept.all():
            slots = kept.nonzero().flatten().to(state[name].device)
            state[name] = state[name].index_select(axis, slots)
    absorb_(state, groups, openness, keep)
    widths = _widths(model, groups, state)
    _fold_constants_(model, groups, state, widths)
    # What changed is not copied first.
    empty = {
        id(tensor)
        for name, tensor in model.state_dict(keep_vars=True).items()
        if state[name] is not dense[name]
    }
    pruned = copy_model(
        model, lambda tensor: torch.empty_like(tensor, device='meta')
        if id(tensor) in empty else tensor)
    apply_widths_(pruned, widths)
    pruned.load_state_dict(
        {
            name: state[name]
            for name, tensor in pruned.state_dict().items() if tensor.is_meta
        },
        strict=False,
        assign=True)
    return pruned, widths


def absorb_(state: dict[str, Tensor], groups: Groups, openness: Tensor,
            keep: Tensor) -> None:
    """Multiply the gates into the kernels that read them, in place.

    Args:
        state (dict[str, Tensor]): A state dict; kernels are replaced.
        groups (Groups): What the analysis found.
        openness (Tensor): ``(G,)``.
        keep (Tensor): ``(G,)`` bool, the gates whose slots the kernels have.
    """
    for layer in groups.readers():
        kernel = state[layer.kernel]
        slots = layer.inputs[kept_slots(layer.inputs, keep)]
        scale = slot_values(openness.detach().to(kernel),
                            slots.to(kernel.device))
        if bool((scale != 1).any()):
            state[layer.kernel] = kernel * along(scale, kernel, layer.axis)


def apply_widths_(model: nn.Module, widths: Mapping[str, Width]) -> Fitting:
    """Give the modules of a dense model the widths of a pruned one, in place.

    The parameters become the first channels of what they were; what they hold
    is to be loaded.

    Args:
        model (nn.Module): Dense.
        widths (Mapping[str, Width]): See the top of this file.

    Returns:
        Fitting: The tensors that were cut, and where.

    Raises:
        ValueError: If the model has no such module, or it is narrower.
    """
    fitting: Fitting = {}
    for name, given in widths.items():
        owner, _, leaf = name.rpartition('.')
        try:
            parent = model.get_submodule(owner)
            part = getattr(parent, leaf)
        except AttributeError:
            raise ValueError(
                f'widths: expected names of the model, but got {name!r}; the '
                'widths belong to another config') from None
        width = _whole_width(name, part, given)
        fitting.update(_fitting(name, part, given))
        if isinstance(part, nn.Parameter):
            setattr(parent, leaf, _narrowed(part, *width))
        elif isinstance(part, (_BatchNorm, nn.GroupNorm)):
            if width[0]:
                _set_norm_width_(part, width[0])
            else:
                setattr(parent, leaf, nn.Identity())
        elif 0 in width:
            setattr(parent, leaf, Constant(part, width[0]))
        else:
            _set_layer_widths_(part, *width)
    return fitting


def _whole_width(name: str, part: nn.Module | nn.Parameter,
                 width: Width) -> list[int]:
    """A width without None; an error if it cannot be that of this part."""
    dense = _dense_width(name, part)
    whole = [old if new is None else new for new, old in zip(width, dense)]
    if len(width) != len(dense) or any(not 0 <= new <= old
                                       for new, old in zip(whole, dense)):
        raise ValueError(f'widths: expected {name} to be at most '
                         f'{dense}, but got {list(width)}; the widths '
                         'belong to another config')
    return whole


def _dense_width(name: str, part: nn.Module | nn.Parameter) -> list[int]:
    """The width of a part that nothing was cut of; an error if it has none."""
    if isinstance(part, nn.Parameter):
        return list(part.shape)
    if isinstance(part, _BatchNorm):
        return [part.num_features]
    if isinstance(part, nn.GroupNorm):
        return [part.num_channels]
    if isinstance(part, nn.Linear):
        return [part.out_features, part.in_features]
    if isinstance(part, _ConvNd):
        sizes = [part.out_channels, part.in_channels]
        return sizes + ([part.groups] if part.groups > 1 else [])
    raise ValueError(f'widths: expected {name} to be a convolution, '
                     'linear layer, norm or parameter, but got '
                     f'{type(part).__name__}')


def _fitting(name: str, part: nn.Module | nn.Parameter,
             width: Width) -> Fitting:
    """Where the tensors of a part were cut."""
    axes = tuple(axis for axis, size in enumerate(width) if size is not None)
    if isinstance(part, nn.Parameter):
        return {name: axes}
    if None not in width:
        return {name: None}
    if isinstance(part, _ConvNd) and part.transposed:
        axes = tuple(1 - axis for axis in axes)
    outputs = () if width[0] is None else (0, )
    return {f'{name}.weight': axes, f'{name}.bias': outputs}


def _set_layer_widths_(layer: nn.Linear | _ConvNd,
                       outputs: int,
                       inputs: int,
                       groups: int = 1) -> None:
    """Convolution or linear layer."""
    sizes = [outputs, inputs // groups]
    if isinstance(layer, nn.Linear):
        layer.in_features, layer.out_features = inputs, outputs
    else:
        layer.in_channels, layer.out_channels = inputs, outputs
        layer.groups = groups
        if layer.transposed:
            sizes = [inputs, outputs // groups]
    for name, parameter in list(layer.named_parameters(recurse=False)):
        setattr(
            layer, name,
            _narrowed(parameter, *(sizes if name == 'weight' else [outputs])))


def _set_norm_width_(norm: _BatchNorm | nn.GroupNorm, channels: int) -> None:
    if isinstance(norm, nn.GroupNorm):
        norm.num_groups = norm.num_groups * channels // norm.num_channels
        norm.num_channels = channels
    else:
        norm.num_features = channels
    for name, parameter in norm.named_parameters():
        setattr(norm, name, _narrowed(parameter, channels))
    for name, buffer in norm.named_buffers():
        if buffer.dim():
            setattr(norm, name, _first(buffer, channels))


def _narrowed(parameter: nn.Parameter, *sizes: int) -> nn.Parameter:
    """A parameter of smaller sizes, trained if the old one is."""
    return nn.Parameter(_first(parameter, *sizes), parameter.requires_grad)


def _first(tensor: Tensor, *sizes: int) -> Tensor:
    """A copy of the first entries of a tensor along its first axes."""
    return tensor.detach()[tuple(slice(size) for size in sizes)].clone()


def _widths(model: nn.Module, groups: Groups,
            state: Mapping[str, Tensor]) -> Widths:
    """Widths of all modules that became narrower."""
    dense = dict([*model.named_parameters(), *model.named_buffers()])
    blocks = {layer.name for layer in groups.layers if layer.blocks}
    widths: Widths = {}
    for name in dict.fromkeys(name for name, _ in groups.axes):
        shape = state[name].shape
        if shape == dense[name].shape:
            continue
        owner, _, leaf = name.rpartition('.')
        module = model.get_submodule(owner)
        if isinstance(module, (_ConvNd, nn.Linear)):
            if leaf == 'weight':
                gated = [(name, axis) in groups.axes for axis in (0, 1)]
                widths[owner] = _layer_widths(module, shape, gated, owner
                                              in blocks)
        elif isinstance(module, (_BatchNorm, nn.GroupNorm)):
            widths[owner] = [shape[0]]
        else:
            widths[name] = [
                size if (name, axis) in groups.axes else None
                for axis, size in enumerate(shape)
            ]
    return widths


def _layer_widths(layer: nn.Linear | _ConvNd, kernel: torch.Size,
                  gated: Sequence[bool], blocks: bool) -> Width:
    """Widths of a layer whose kernel has got this shape.

    Args:
        layer (nn.Linear | _ConvNd): The dense one.
        kernel (torch.Size): ``(C_out, C_in / groups, ...)``, or ``(C_in,
            C_out / groups, ...)`` if transposed.
        gated (Sequence[bool]): Whether its first two axes have gates.
        blocks (bool): Whether whole groups went, or channels of each.
    """
    if isinstance(layer, nn.Linear) or layer.groups == 1:
        sizes = [size if one else None for size, one in zip(kernel, gated)]
        turned = isinstance(layer, _ConvNd) and layer.transposed
        return sizes[::-1] if turned else sizes
    if blocks:
        groups = kernel[0] * layer.groups // layer.weight.shape[0]
        return [
            size * groups // layer.groups
            for size in (layer.out_channels, layer.in_channels)
        ] + [groups]
    return [kernel[0], kernel[1] * layer.groups, layer.groups]


def _fold_constants_(model: nn.Module, groups: Groups,
                     state: dict[str, Tensor], widths: Widths) -> None:
    """Layers that read nothing: their norm's constant becomes their bias.

    Folded, it is a parameter that fine-tuning can train; a batch norm that
    sees a constant in training mode would lose its mean.
    """
    for layer, width in list(widths.items()):
        if 0 not in width or len(width) < 2 or f'{layer}.weight' not in state:
            continue
        kernel = state[f'{layer}.weight']
        outputs = _whole_width(layer, model.get_submodule(layer), width)[0]
        bias = state.get(f'{layer}.bias', kernel.new_zeros(outputs))
        norm = groups.norms.get(layer, '')
        if outputs and f'{norm}.running_mean' in state:
            module: Any = model.get_submodule(norm)
            mean, var, scale, shift = (
                state[f'{norm}.{name}'].double()
                for name in ('running_mean', 'running_var', 'weight', 'bias'))
            bias = (shift + scale * (bias.double() - mean) /
                    (var + module.eps).sqrt()).to(kernel)
            widths[norm] = [0]
        state[f'{layer}.bias'] = bias
