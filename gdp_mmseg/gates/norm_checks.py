"""Groups of channels whose batch norms tell a gate method enough, or why not.
"""
from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..analysis.structure import Analysis, ReadPoint
from ..analysis.tracer import copy_model


def with_evidence(analysis: Analysis, model: nn.Module,
                  streams: bool) -> Analysis:
    """Freeze the groups that no batch norm tells enough of.

    Args:
        analysis (Analysis): Analysis of the model.
        model (nn.Module): The model, which stays unchanged.
        streams (bool): See :func:`refusal`.

    Raises:
        ValueError: If no group is left.
    """
    useless = _useless_norms(analysis, model)
    reasons = {}
    for index, group in enumerate(analysis.groups):
        norms = [norm for point in group.read_points for norm in point.norms]
        reason = refusal(group.read_points, streams) or next(
            (useless[norm] for norm in norms if norm in useless), None)
        if reason is not None:
            reasons[index] = reason
    left = analysis.without(reasons)
    if not left.num_gates:
        shown = '; '.join(f'{row.channels} channels: {row.reason}'
                          for row in left.frozen[len(analysis.frozen):][:3])
        raise ValueError(
            'gdp.gate: expected channels behind a batch norm and a ReLU for '
            f"type='scp', but got none ({shown}); use gate='gdp'")
    return left


def refusal(points: tuple[ReadPoint, ...], streams: bool) -> str | None:
    """Return the reason why read points are no evidence, if so.

    Args:
        points (tuple[ReadPoint, ...]): Read points of a group.
        streams (bool): Whether sums and other activation functions than a
            ReLU are evidence.
    """
    for point in points:
        if point.reason:
            return point.reason
    if not points:
        return 'no batch norm (in an analysis of an earlier version)'
    if streams:
        return None
    advice = "gate=dict(type='scp', streams=True) gives it a gate"
    if any(point.summed for point in points) or len(points) > 1 and any(
            point.of_sum for point in points):
        return f'part of a sum ({advice})'
    if any(point.activation != 'relu' for point in points):
        return f'no ReLU behind the batch norm ({advice})'
    return None


def _useless_norms(analysis: Analysis, model: nn.Module) -> dict[str, str]:
    """Return the norms that do not train, and the reason for each."""
    names = {
        norm
        for group in analysis.groups
        for point in group.read_points
        for norm in point.norms
    }
    # A backbone may freeze its norms in train(), which may compute tensors.
    copied = copy_model(
        model, lambda tensor: torch.empty_like(tensor, device='meta')).train()
    found = {}
    for name in names:
        norm = copied.get_submodule(name)
        if not isinstance(norm, _BatchNorm) or not norm.affine:
            found[name] = f'batch norm without scale and offset ({name})'
        elif not (norm.weight.requires_grad and norm.bias.requires_grad):
            found[name] = f'frozen batch norm ({name}: requires_grad=False)'
        elif not norm.training:
            found[name] = f'frozen batch norm ({name}: eval mode in training)'
    return found
