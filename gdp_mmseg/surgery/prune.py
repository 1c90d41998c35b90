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
from typing import Any

import torch
from torch import Tensor, nn

from ..analysis.liveness import kept_channels, kept_slots
from ..analysis.structure import Analysis
from ..analysis.tracer import copy_model
from ..gates.layers import along, slot_values
from .widths import Widths, apply_widths_, whole_width, widths_of


def prune(model: nn.Module, analysis: Analysis,
          openness: Tensor) -> tuple[nn.Module, Widths]:
    """A small copy of a model that computes what the gated model computes.

    Args:
        model (nn.Module): The model that was analysed, without gates; left as
            it is.
        analysis (Analysis): What the analysis found.
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
    pruned, widths = cut(model, analysis, openness)
    return copy.deepcopy(pruned), widths


def cut(model: nn.Module, analysis: Analysis,
        openness: Tensor) -> tuple[nn.Module, Widths]:
    """:func:`prune`, but what did not change is the model's own."""
    keep = kept_channels(analysis, openness)
    dense = model.state_dict()
    state = dict(dense)
    for (name, axis), gates in analysis.gate_of_slot.items():
        kept = kept_slots(gates, keep)
        if not kept.all():
            slots = kept.nonzero().flatten().to(state[name].device)
            state[name] = state[name].index_select(axis, slots)
    absorb_(state, analysis, openness, keep)
    widths = widths_of(model, analysis, state)
    _fold_constants_(model, analysis, state, widths)
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


def absorb_(state: dict[str, Tensor], analysis: Analysis, openness: Tensor,
            keep: Tensor) -> None:
    """Multiply the gates into the kernels that read them, in place.

    Args:
        state (dict[str, Tensor]): A state dict; kernels are replaced.
        analysis (Analysis): What the analysis found.
        openness (Tensor): ``(G,)``.
        keep (Tensor): ``(G,)`` bool, the gates whose slots the kernels have.
    """
    for layer in analysis.gated_layers():
        kernel = state[layer.kernel]
        slots = layer.inputs[kept_slots(layer.inputs, keep)]
        scale = slot_values(openness.detach().to(kernel),
                            slots.to(kernel.device))
        if bool((scale != 1).any()):
            state[layer.kernel] = kernel * along(scale, kernel, layer.axis)


def _fold_constants_(model: nn.Module, analysis: Analysis,
                     state: dict[str, Tensor], widths: Widths) -> None:
    """Layers that read nothing: their norm's constant becomes their bias.

    Folded, it is a parameter that fine-tuning can train; a batch norm that
    sees a constant in training mode would lose its mean.
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
            bias = (shift + scale * (bias.double() - mean) /
                    (var + module.eps).sqrt()).to(kernel)
            widths[norm] = [0]
        state[f'{layer}.bias'] = bias
