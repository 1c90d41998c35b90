"""Checkpoints and the models that they belong to."""
from __future__ import annotations

import functools
from typing import Any, Mapping

import torch
from torch import Tensor, nn

from ..analysis.state import first_difference, fits, from_state, to_state
from ..analysis.structure import Analysis
from ..pruner.pruner import Pruner
from ..pruner.settings import Settings
from ..surgery.widths import Fitting
from .checkpoint import other_versions, unwrapped

# Names in a state dict: the gates, and the mask of those that are closed.
THETA = 'gdp.gates.theta'
CLOSED = 'gdp.gates.closed'


def gate_meta(pruner: Pruner) -> dict[str, Any]:
    """Describe the gates of a model in plain types, for a checkpoint's meta.

    Args:
        pruner (Pruner): Pruner of the model.

    Returns:
        dict[str, Any]: The gate method and its options, the modules that the
        settings keep out of the pruning, and the whole analysis.
    """
    gate = pruner.settings.gate
    return dict(
        _kept_out(pruner.settings),
        gate=gate.type,
        options=dict(gate.options),
        analysis=to_state(pruner.analysis))


def _kept_out(settings: Settings) -> dict[str, Any]:
    """Settings that decide which modules are pruned, in plain types."""
    return dict(
        ignore=[*settings.ignore],
        only=None if settings.only is None else [*settings.only])


def stored_analysis(gates: Mapping[str, Any] | None, settings: Settings,
                    shape: tuple[int, ...],
                    tensors: Mapping[str, Tensor]) -> Analysis | None:
    """Take the analysis of a checkpoint if it is the one of a model.

    Args:
        gates (Mapping[str, Any], optional): What :func:`gate_meta` returned,
            or None.
        settings (Settings): Settings of the model.
        shape (tuple[int, ...]): Shape ``(C, H, W)`` at which its FLOPs are
            counted.
        tensors (Mapping[str, Tensor]): State dict of the dense model.

    Returns:
        Analysis, optional: None if the model must be analysed, because
        another model, size or choice of modules was.
    """
    kept_out = _kept_out(settings)
    if gates is None or any(gates[key] != kept_out[key] for key in kept_out):
        return None
    # A method may have gates for a part of the channels only.
    if (gates['gate'] != settings.gate.type
            or gates.get('options', {}) != dict(settings.gate.options)):
        return None
    analysis = from_state(gates['analysis'])
    same = analysis.input_shape[1:] == shape and fits(analysis, tensors)
    return analysis if same else None


def check_gates(pruner: Pruner, state: Mapping[str, Any],
                meta: Mapping[str, Any]) -> int | None:
    """Check that the gates of a checkpoint are those of a model.

    Args:
        pruner (Pruner): Pruner of the model that the checkpoint is loaded
            into.
        state (Mapping[str, Any]): State dict of the checkpoint, unwrapped.
        meta (Mapping[str, Any]): Its meta.

    Returns:
        int, optional: Number of gates that are closed in the checkpoint; None
        if it has no gates.

    Raises:
        ValueError: If it has other gates, or is of a pruned model.
    """
    if 'widths' in meta:
        raise ValueError(
            'checkpoint: expected the weights of a model with all its '
            'channels, but got those of an export; use them with the config '
            'beside them, or change load_from')
    if THETA not in state:
        return None
    check_gate_meta(meta)
    gates = meta['gdp']
    settings = pruner.settings
    if gates['gate'] != settings.gate.type:
        raise ValueError(
            f'checkpoint: expected gates of the method '
            f'{settings.gate.type!r}, as in gdp.gate, but got those of '
            f'{gates["gate"]!r}; change '
            'gdp.gate or the checkpoint')
    module = first_difference(from_state(gates['analysis']), pruner.analysis)
    if module is not None:
        raise ValueError(_other_analysis(pruner, gates, meta, module))
    if len(state[THETA]) != pruner.analysis.num_gates:
        raise ValueError(
            f'checkpoint: expected {pruner.analysis.num_gates} gates, as in '
            f'its own analysis, but got {len(state[THETA])}; it was changed '
            'after the training; change load_from to another checkpoint')
    return int((state[CLOSED] > 0).sum())


def check_gate_meta(meta: Mapping[str, Any]) -> None:
    """Check that a gated checkpoint has the analysis of its gates.

    Raises:
        ValueError: If an early development version wrote it, or another
            program removed its meta.
    """
    if 'analysis' not in (meta.get('gdp') or {}):
        raise ValueError(
            'checkpoint: expected gates together with their analysis in its '
            'meta, but got gates alone; it was written before gdp_mmseg '
            'stored the analysis in checkpoints, and cannot be used any more; '
            'train it again')


def _other_analysis(pruner: Pruner, gates: Mapping[str, Any],
                    meta: Mapping[str, Any], module: str) -> str:
    """Message for a checkpoint with gates on other channels."""
    kept_out, options = _kept_out(
        pruner.settings), pruner.settings.gate.options
    wanted = [(key, ours, gates[key]) for key, ours in kept_out.items()]
    wanted.append(('gate', dict(options), gates.get('options', {})))
    for key, ours, theirs in wanted:
        if theirs != ours:
            return (f'checkpoint: expected one that was trained with gdp.{key}'
                    f'={ours}, as in the config, but got one with gdp.{key}='
                    f'{theirs}; change gdp.{key} or the checkpoint')
    other = other_versions(meta)
    return ('checkpoint: expected the gates of this model, but got gates on '
            f'other channels ({module} first); change load_from, the model, '
            'or the versions it was trained with' +
            (f': {other}' if other else ''))


def check_resume(network: nn.Module, state: Mapping[str, Any]) -> None:
    """Check that a training resumes from one with gates if it has gates.

    The states of the optimizers do not fit otherwise.

    Args:
        network (nn.Module): Model of the training that resumes.
        state (Mapping[str, Any]): State dict of the checkpoint.

    Raises:
        ValueError: If only one of the two has gates.
    """
    gated = isinstance(getattr(network, 'gdp', None), Pruner)
    came = THETA in unwrapped(state)
    if gated != came:
        kinds = ('a dense', 'a gated')
        # A dense network does not take gated weights: closed channels would
        # be open.
        advice = (
            'to start from its weights, pass it as load_from, without '
            '--resume and to another work_dir' if gated else
            'pass the config that it was trained with, or another work_dir')
        raise ValueError(
            f'--resume: expected a checkpoint of {kinds[gated]} training, but '
            f'got one of {kinds[came]} training; {advice}')


def fitting_of(analysis: Analysis) -> Fitting:
    """Return the tensors that must fit when a gated model loads a state dict.

    Weights of a head may be loaded in part, from a network for other classes.
    Weights of a backbone that fit only in part are a mistake.
    """
    axes: Fitting = dict(gdp=None)
    for name, axis in analysis.gate_of_slot:
        if name.startswith('backbone.'):
            axes[name] = (*(axes.get(name) or ()), axis)
    return axes


def refuse_others_(network: nn.Module, fitting: Fitting) -> None:
    """Make a network refuse state dicts of another network, in place.

    mmengine loads what fits and logs the rest, which leaves random weights in
    place. That is right for fine-tuning, and wrong for gates and widths.

    Args:
        network (nn.Module): Gated or pruned model.
        fitting (Fitting): Tensors, or modules of such tensors, that must fit
            or be absent; see :data:`gdp_mmseg.surgery.widths.Fitting`.
    """
    network._register_load_state_dict_pre_hook(
        functools.partial(_refuse, _by_key(network, fitting)),
        with_module=True)


def keep_own_(state: dict[str, Tensor], network: nn.Module,
              fitting: Fitting) -> list[str]:
    """Put a network's own tensors where others have another shape, in place.

    mmengine would leave them out of the loading, and log them line by line.
    Gates that a state dict lacks are added in the same way.

    Args:
        state (dict[str, Tensor]): State dict that the network will load.
        network (nn.Module): The network.
        fitting (Fitting): See :func:`refuse_others_`.

    Returns:
        list[str]: Names of the modules that keep tensors of their own, but
        for those of the gates.

    Raises:
        ValueError: If a tensor that must fit does not.
    """
    came = {key.removeprefix('module.'): key for key in state}
    own = network.state_dict()
    _refuse(
        _by_key(network, fitting), network, {
            name: state[key]
            for name, key in came.items()
        }, '')
    modules: dict[str, None] = {}
    for name, value in own.items():
        if name not in came and name.startswith('gdp.'):
            state[name] = value
        elif name in came and state[came[name]].shape != value.shape:
            state[came[name]] = value
            modules[name.rpartition('.')[0]] = None
    return list(modules)


def _by_key(network: nn.Module, fitting: Fitting) -> Fitting:
    """Spread the axes of modules over the keys of a state dict."""
    found: Fitting = {}
    for key in network.state_dict():
        name = key
        while name and name not in fitting:
            name = name.rpartition('.')[0]
        if name:
            found[key] = fitting[name]
    return found


def _refuse(fitting: Fitting, network: nn.Module, state: Mapping[str, Tensor],
            prefix: str, *_: Any) -> None:
    """Raise a ValueError if a state dict is of another network."""
    wanted = network.state_dict()
    if state and not any(prefix + key in state for key in wanted):
        raise ValueError(
            'checkpoint: expected weights of the model in the config, but got '
            f'none of its {len(wanted)}, and others ({next(iter(state))} '
            'first); pass the checkpoint and the config of the same training')
    for key in filter(wanted.__contains__, fitting):
        came = state.get(prefix + key)
        if came is not None and not _fits(came.shape, wanted[key].shape,
                                          fitting[key]):
            raise ValueError(
                f'checkpoint: expected {key} of the shape in the config, '
                f'{list(wanted[key].shape)}, but got {list(came.shape)}; pass '
                'the checkpoint and the config of the same training or export')


def _fits(came: torch.Size, wanted: torch.Size,
          axes: tuple[int, ...] | None) -> bool:
    """Compare two shapes along some axes; None stands for all axes."""
    if axes is None or len(came) != len(wanted):
        return came == wanted
    return all(came[axis] == wanted[axis] for axis in axes)
