"""Surgery: absorb the gates, remove the closed channels, set the widths.

A pruned network computes exactly what the gated one does. It is described by
its *widths*, a map from a module's name to ``[C_out, C_in]`` (convolution,
linear layer), ``[C_out, C_in, groups]`` (grouped convolution) or ``[C]``
(batch norm, group norm); a parameter of any other module is listed by its own
name with its shape. ``None`` stands for an axis without a gate, whose size is
that of the config, so that a pruned network can still get another number of
classes; grouped convolutions always have numbers. A module without channels
is replaced: a batch norm by the identity, a layer by :class:`Constant`.
"""
from __future__ import annotations

from typing import Any, Mapping

import torch
from torch import Tensor, nn

from ..analysis.liveness import kept_channels, kept_slots
from ..analysis.structure import Analysis
from ..analysis.tracer import clone_model, copy_model
from ..gates.lookup import slot_values
from ..gates.scaling import along
from .widths import Widths, apply_widths_, whole_width, widths_of


def prune(model: nn.Module, analysis: Analysis,
          openness: Tensor) -> tuple[nn.Module, Widths]:
    """Copy a model without its closed channels; the outputs stay the same.

    Args:
        model (nn.Module): The model that was analysed, without gates. It
            stays unchanged.
        analysis (Analysis): The analysis of the model.
        openness (Tensor): ``(G,)`` openness of the gates.

    Returns:
        tuple[nn.Module, Widths]: The pruned model and its widths.

    Raises:
        ValueError: If a weight or buffer is not finite.
    """
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f'expected finite weights, but got nan or inf in '
                             f'{name}; export an earlier checkpoint')
    pruned, widths = cut(model, analysis, openness)
    # The cut shares unchanged tensors with the model; to train one of the two
    # must not change the other.
    pruned = clone_model(pruned)
    if not model.training:
        # Modules that compute a tensor from their parameters in train() still
        # hold the one of the dense model.
        pruned.eval()
    return pruned, widths


def cut(model: nn.Module, analysis: Analysis,
        openness: Tensor) -> tuple[nn.Module, Widths]:
    """Prune like :func:`prune`, but share unchanged tensors with the model.
    """
    keep = kept_channels(analysis, openness)
    dense = {name: tensor.detach() for name, tensor in _tensors(model).items()}
    state = take(dense, analysis, keep)
    absorb_(state, analysis, openness, keep)
    widths = widths_of(model, analysis, state)
    _fold_constants_(model, analysis, state, widths)
    # Tensors that are replaced below need no data in the copy.
    empty = {
        id(tensor)
        for name, tensor in _tensors(model).items()
        if state[name] is not dense[name]
    }
    pruned = copy_model(
        model, lambda tensor: torch.empty_like(tensor, device='meta')
        if id(tensor) in empty else tensor)
    apply_widths_(pruned, widths)
    for name, tensor in _tensors(pruned).items():
        if tensor.is_meta:
            _assign_(pruned, name, state[name])
    return pruned, widths


def take(tensors: Mapping[str, Tensor],
         analysis: Analysis,
         keep: Tensor,
         present: Tensor | None = None) -> dict[str, Tensor]:
    """Select the slots of kept gates along all axes of some tensors.

    Weights, gradients, momenta and averages are all maps from the name of a
    parameter to a tensor of its shape; one function cuts them all.

    Args:
        tensors (Mapping[str, Tensor]): Tensors by the name of the parameter
            or buffer whose shape they have; not all need be there.
        analysis (Analysis): The analysis of the model.
        keep (Tensor): ``(G,)`` bool, gates whose slots are kept.
        present (Tensor, optional): ``(G,)`` bool, gates whose slots the
            tensors still have. Defaults to all gates: dense tensors.

    Returns:
        dict[str, Tensor]: The same names. Tensors that lose nothing are the
        given ones.
    """
    taken = dict(tensors)
    for (name, axis), gates in analysis.gate_of_slot.items():
        kept = kept_slots(gates, keep)
        if present is not None:
            kept = kept[kept_slots(gates, present)]
        if name in taken and not kept.all():
            whole = taken[name]
            slots = kept.nonzero().flatten().to(whole.device)
            taken[name] = whole.index_select(
                axis, slots).contiguous(memory_format=_format_of(whole))
    return taken


def put_back(tensors: Mapping[str, Tensor], analysis: Analysis,
             keep: Tensor) -> dict[str, Tensor]:
    """Undo :func:`take`, with zeros in the slots that it left out.

    Args:
        tensors (Mapping[str, Tensor]): What :func:`take` returned.
        analysis (Analysis): The analysis of the model.
        keep (Tensor): ``(G,)`` bool, gates whose slots the tensors have.

    Returns:
        dict[str, Tensor]: The same names. Tensors that lack nothing are the
        given ones.
    """
    dense = dict(tensors)
    for (name, axis), gates in analysis.gate_of_slot.items():
        kept = kept_slots(gates, keep)
        if name in dense and not kept.all():
            narrow = dense[name]
            slots = kept.nonzero().flatten().to(narrow.device)
            shape = list(narrow.shape)
            shape[axis] = len(gates)
            dense[name] = narrow.new_zeros(shape).index_copy_(
                axis, slots,
                narrow).contiguous(memory_format=_format_of(narrow))
    return dense


def _format_of(tensor: Tensor) -> torch.memory_format:
    """Order of the axes in memory; layers that read another one are slower."""
    for axes, last in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if (tensor.dim() == axes and not tensor.is_contiguous()
                and tensor.is_contiguous(memory_format=last)):
            return last
    return torch.contiguous_format


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers by each of their names.

    A model's own code may rename or drop keys of its state dict, and check
    versions that a plain dict has lost. The surgery works on the tensors
    themselves, so that none of this concerns it.
    """
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False))
    }


def _assign_(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace the data of a parameter or buffer in place."""
    owner, _, leaf = name.rpartition('.')
    module = model.get_submodule(owner)
    old = getattr(module, leaf)
    if isinstance(old, nn.Parameter):
        tensor = nn.Parameter(tensor, old.requires_grad)
    setattr(module, leaf, tensor)


def absorb_(state: dict[str, Tensor], analysis: Analysis, openness: Tensor,
            keep: Tensor) -> None:
    """Multiply the kernels of a state dict by their gates, in place.

    Args:
        state (dict[str, Tensor]): The state dict, in which kernels are
            replaced.
        analysis (Analysis): The analysis of the model.
        openness (Tensor): ``(G,)`` openness of the gates.
        keep (Tensor): ``(G,)`` bool, gates whose slots the kernels still
            have.
    """
    for layer in analysis.gated_layers():
        kernel = state[layer.kernel]
        slots = layer.inputs[kept_slots(layer.inputs, keep)]
        scale = slot_values(openness.detach().to(kernel),
                            slots.to(kernel.device))
        # An unchanged kernel stays the same object and is not copied.
        if bool((scale != 1).any()):
            state[layer.kernel] = kernel * along(scale, kernel, layer.axis)


def _fold_constants_(model: nn.Module, analysis: Analysis,
                     state: dict[str, Tensor], widths: Widths) -> None:
    """Fold batch norms into the biases of layers without inputs, in place.

    The folded constant is a parameter that fine-tuning can train. A batch
    norm that reads a constant in training mode would subtract it and lose it.
    """
    for layer, width in list(widths.items()):
        if 0 not in width or len(width) < 2 or f'{layer}.weight' not in state:
            continue
        kernel = state[f'{layer}.weight']
        outputs = whole_width(layer, model.get_submodule(layer), width)[0]
        bias = state.get(f'{layer}.bias', kernel.new_zeros(outputs))
        norm = analysis.norms.get(layer, '')
        if outputs and f'{norm}.running_mean' in state:
            module: Any = model.get_submodule(norm)
            mean, var, scale, shift = (
                state[f'{norm}.{name}'].double()
                for name in ('running_mean', 'running_var', 'weight', 'bias'))
            # In double precision, because it is computed only once.
            bias = (shift + scale * (bias.double() - mean) /
                    (var + module.eps).sqrt()).to(kernel)
            widths[norm] = [0]
        state[f'{layer}.bias'] = bias
