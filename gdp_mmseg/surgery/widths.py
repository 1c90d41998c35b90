"""Widths of a pruned network, and a dense network narrowed to them."""
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
# Of a tensor that only the weights of a network of the same widths fit into,
# or a module of such tensors; None are all axes.
Fitting = dict[str, tuple[int, ...] | None]


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
        width = whole_width(name, part, given)
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


def whole_width(name: str, part: nn.Module | nn.Parameter,
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


def widths_of(model: nn.Module, analysis: Analysis,
              state: Mapping[str, Tensor]) -> Widths:
    """Widths of all modules that became narrower."""
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
