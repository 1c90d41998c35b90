"""Widths of a pruned network, and how a dense network is narrowed to them.

The format of the widths is described in ``prune.py``.
"""
from __future__ import annotations

from typing import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from ..analysis.structure import Analysis
from .constant import Constant

Width = Sequence[int | None]
Widths = dict[str, Width]
# Axes along which a tensor was cut, by the tensor's name; None means all
# axes, and the name may be that of a module for all its tensors.
Fitting = dict[str, tuple[int, ...] | None]


def apply_widths_(model: nn.Module, widths: Mapping[str, Width]) -> Fitting:
    """Narrow the modules of a dense model to given widths, in place.

    Parameters keep their first channels; their values are to be loaded later.

    Args:
        model (nn.Module): The dense model.
        widths (Mapping[str, Width]): The widths of the pruned model.

    Returns:
        Fitting: The tensors that were cut, and the axes.

    Raises:
        ValueError: If the model lacks one of the modules or parameters, or it
            is narrower than its width.
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
        width = whole_width(name, part, given)
        fitting.update(_fitting(name, part, given))
        if isinstance(part, nn.Parameter):
            setattr(parent, leaf, _narrowed(part, *width))
        elif isinstance(part, (_BatchNorm, nn.GroupNorm)):
            # PyTorch's norms refuse to be built or trained without channels.
            if width[0]:
                _narrow_norm_(part, width[0])
            else:
                setattr(parent, leaf, nn.Identity())
        elif 0 in width:
            setattr(parent, leaf, Constant(part, width[0]))
        else:
            _narrow_layer_(part, width)
    return fitting


def whole_width(name: str, part: nn.Module | nn.Parameter,
                width: Width) -> list[int]:
    """Replace None in a width by the size of the part.

    Raises:
        ValueError: If the part is narrower, or another kind of module.
    """
    dense = _dense_width(name, part)
    whole = [old if new is None else new for new, old in zip(width, dense)]
    if len(width) != len(dense) or any(not 0 <= new <= old
                                       for new, old in zip(whole, dense)):
        raise ValueError(f'widths: expected {name} to be at most '
                         f'{dense}, but got {list(width)}; the widths '
                         'belong to another config')
    return whole


def _dense_width(name: str, part: nn.Module | nn.Parameter) -> list[int]:
    """Return the width of a part as it is.

    Raises:
        ValueError: If the part is of a kind that has no width.
    """
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
                     f'{type(part).__name__}; the widths belong to another '
                     'config')


def _fitting(name: str, part: nn.Module | nn.Parameter,
             width: Width) -> Fitting:
    """Return the tensors of a part that were cut, and the axes."""
    axes = tuple(axis for axis, size in enumerate(width) if size is not None)
    if isinstance(part, nn.Parameter):
        return {name: axes}
    if None not in width:
        return {name: None}
    # Widths begin with the outputs, a transposed kernel with the inputs.
    if isinstance(part, _ConvNd) and part.transposed:
        axes = tuple(1 - axis for axis in axes)
    outputs = () if width[0] is None else (0, )
    return {f'{name}.weight': axes, f'{name}.bias': outputs}


def _narrow_layer_(layer: nn.Linear | _ConvNd, width: Sequence[int]) -> None:
    """Narrow a convolution or linear layer in place."""
    set_sizes_(layer, width)
    outputs, inputs = width[:2]
    groups = getattr(layer, 'groups', 1)
    sizes = [outputs, inputs // groups]
    if isinstance(layer, _ConvNd) and layer.transposed:
        sizes = [inputs, outputs // groups]
    for name, parameter in list(layer.named_parameters(recurse=False)):
        setattr(
            layer, name,
            _narrowed(parameter, *(sizes if name == 'weight' else [outputs])))


def _narrow_norm_(norm: _BatchNorm | nn.GroupNorm, channels: int) -> None:
    """Narrow a norm in place."""
    set_sizes_(norm, [channels])
    for name, parameter in norm.named_parameters():
        setattr(norm, name, _narrowed(parameter, channels))
    for name, buffer in norm.named_buffers():
        # num_batches_tracked is a scalar.
        if buffer.dim():
            setattr(norm, name, _first(buffer, channels))


def set_sizes_(part: nn.Module, width: Sequence[int]) -> None:
    """Set the numbers of channels that a module remembers, in place.

    Args:
        part (nn.Module): Convolution, linear layer, batch norm or group norm.
        width (Sequence[int]): Its whole width.
    """
    if isinstance(part, nn.Linear):
        part.out_features, part.in_features = width
    elif isinstance(part, _ConvNd):
        part.out_channels, part.in_channels = width[:2]
        part.groups = width[2] if len(width) > 2 else 1
    elif isinstance(part, nn.GroupNorm):
        # Whole groups are removed: the size of a group stays the same.
        part.num_groups = part.num_groups * width[0] // part.num_channels
        part.num_channels = width[0]
    elif isinstance(part, _BatchNorm):
        part.num_features = width[0]


def _narrowed(parameter: nn.Parameter, *sizes: int) -> nn.Parameter:
    """Return a smaller parameter that is trained if the old one is."""
    return nn.Parameter(_first(parameter, *sizes), parameter.requires_grad)


def _first(tensor: Tensor, *sizes: int) -> Tensor:
    """Copy the first entries of a tensor along its first axes."""
    return tensor.detach()[tuple(slice(size) for size in sizes)].clone()


def widths_of(model: nn.Module, analysis: Analysis,
              state: Mapping[str, Tensor]) -> Widths:
    """Return the widths of all modules that are narrower in a state dict."""
    dense = dict([*model.named_parameters(), *model.named_buffers()])
    blocks = {layer.name for layer in analysis.layers if layer.blockwise}
    widths: Widths = {}
    for name in dict.fromkeys(name for name, _ in analysis.gate_of_slot):
        shape = state[name].shape
        if shape == dense[name].shape:
            continue
        owner, _, leaf = name.rpartition('.')
        module = model.get_submodule(owner)
        if isinstance(module, (_ConvNd, nn.Linear)):
            if leaf == 'weight':
                gated = [(name, axis) in analysis.gate_of_slot
                         for axis in (0, 1)]
                widths[owner] = _layer_widths(module, shape, gated, owner
                                              in blocks)
        elif isinstance(module, (_BatchNorm, nn.GroupNorm)):
            widths[owner] = [shape[0]]
        else:
            widths[name] = [
                size if (name, axis) in analysis.gate_of_slot else None
                for axis, size in enumerate(shape)
            ]
    return widths


def _layer_widths(layer: nn.Linear | _ConvNd, kernel: torch.Size,
                  gated: Sequence[bool], blocks: bool) -> Width:
    """Return the widths of a layer, given the shape of its pruned kernel.

    Args:
        layer (nn.Linear | _ConvNd): The dense layer.
        kernel (torch.Size): Shape ``(C_out, C_in / groups, ...)``, or
            ``(C_in, C_out / groups, ...)`` if transposed.
        gated (Sequence[bool]): Whether each of the kernel's first two axes
            has gates.
        blocks (bool): True if whole groups were removed, False if channels
            of each group were.
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
