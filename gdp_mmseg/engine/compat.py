"""Features of mmengine that gates do not work with, refused at the start."""
from __future__ import annotations

import inspect
import math
from typing import Any, Mapping

import torch
from mmengine.config import Config
from mmengine.model import MMDistributedDataParallel, is_model_wrapper
from torch import nn

from ..pruner.settings import Settings
from .config import ModelConfig, kind_of, name_of
from .hooked import ADD_HOOK

# These split the parameters over the processes, or the model into parts that
# are averaged separately. Each process must hold, and average, all gates.
SPLITTING = ('FSDPStrategy', 'DeepSpeedStrategy', 'ColossalAIStrategy',
             'MMFullyShardedDataParallel', 'MMSeparateDistributedDataParallel')


def check_config(cfg: Config) -> None:
    """Refuse a gated training that could only fail after its set-up.

    Args:
        cfg (Config): Config of a training, gated or not.

    Raises:
        ValueError: If it is gated and would split the gates, move none, or is
            too short for them.
    """
    if kind_of(cfg.model) != 'gated':
        return
    if not any(map(moves_gates, hooks_of(cfg))):
        raise ValueError(
            'GDPModel: expected the hook that moves its gates, but got none; '
            f'{ADD_HOOK}')
    for key in ('strategy', 'model_wrapper_cfg'):
        name = name_of((cfg.get(key) or {}).get('type'))
        if name in SPLITTING:
            raise ValueError(_whole_model(name, key))
    settings = ModelConfig.of(cfg).settings
    # The length of a training by epochs depends on its data.
    iterations = (cfg.get('train_cfg') or {}).get('max_iters')
    if iterations:
        wrapper = cfg.get('optim_wrapper') or {}
        check_length(settings, iterations, wrapper.get('accumulative_counts',
                                                       1))


def compiles(cfg: Config) -> bool:
    """Tell whether mmengine compiles the model."""
    return cfg.get('compile') not in (None, False)


def check_length(settings: Settings, iterations: int,
                 accumulated: int) -> str | None:
    """Check the length of a training (see :meth:`Settings.check_length`).

    Args:
        settings (Settings): Settings of the gates.
        iterations (int): Length of the training.
        accumulated (int): Number of iterations for each step.
    """
    unit = ('iterations' if accumulated == 1 else
            f'steps of the optimizer, of {accumulated} iterations each')
    return settings.check_length(math.ceil(iterations / accumulated), unit)


def hooks_of(cfg: Config) -> list[Any]:
    """List the default and custom hooks of a config."""
    return [
        *(cfg.get('default_hooks') or {}).values(),
        *(cfg.get('custom_hooks') or [])
    ]


def moves_gates(hook: Any) -> bool:
    """Tell whether a hook of a config is the one that moves the gates."""
    return _is_a('GDPHook', hook)


def resumes_exactly(hook: Any) -> bool:
    """Tell whether a hook of a config is a ``ResumeHook`` or ``GDPHook``."""
    return moves_gates(hook) or _is_a('ResumeHook', hook)


def _is_a(name: str, hook: Any) -> bool:
    """Compare by the end of the name: ``MyGDPHook`` counts as ``GDPHook``."""
    return (isinstance(hook, Mapping)
            and name_of(hook.get('type')).endswith(name))


def check_runner(runner: Any) -> None:
    """Refuse a runner whose training would not move the gates correctly.

    Args:
        runner (Runner | FlexibleRunner): Runner at the start of its training.

    Raises:
        ValueError: If its model is wrapped in a way that splits the gates, or
            its optimizer does not step once for each gradient.
    """
    model, wrapper = runner.model, runner.optim_wrapper
    distributed = isinstance(model, MMDistributedDataParallel)
    if not distributed and (not isinstance(model, nn.Module)
                            or is_model_wrapper(model)):
        raise ValueError(
            _whole_model(
                type(model).__name__, 'strategy or model_wrapper_cfg'))
    optimizer = getattr(wrapper, 'optimizer', None)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError('GDPHook: expected one optimizer, but got '
                         f'{type(wrapper).__name__}; set one optim_wrapper '
                         'for all parameters')
    closure = inspect.signature(optimizer.step).parameters.get('closure')
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError('GDPHook: expected an optimizer that steps once for '
                         f'each gradient, but got {type(optimizer).__name__}, '
                         'which asks for the loss again; change '
                         'optim_wrapper.optimizer.type')
    if distributed and _checkpoints(runner):
        _check_checkpointing(model, accumulated_gradients(wrapper))


def accumulated_gradients(optim_wrapper: Any) -> int:
    """Number of iterations for each step of the optimizer."""
    return getattr(optim_wrapper, '_accumulative_counts', 1)


def _whole_model(kind: str, key: str) -> str:
    return ('GDPHook: expected each process to hold the whole model, but got '
            f"{kind}; change {key}: one process, DDPStrategy or "
            'MMDistributedDataParallel go with gates')


def _checkpoints(runner: Any) -> bool:
    """Tell whether activations are computed again in the backward pass."""
    return bool(runner.cfg.get('activation_checkpointing')) or any(
        getattr(module, 'with_cp', False) for module in runner.model.modules())


def _check_checkpointing(model: MMDistributedDataParallel,
                         iterations: int) -> None:
    """Refuse activation checkpointing where DDP would lose gradients.

    Each checkpointed part passes a gradient of its own to the gates. Unless
    the graph is static, DDP takes the first of them for the last. A static
    graph cannot accumulate gradients over iterations.
    """
    if not model.static_graph:
        raise ValueError(
            'GDPHook: expected a static graph for activation checkpointing in '
            'several processes, but got static_graph=False; set '
            "model_wrapper_cfg=dict(type='MMDistributedDataParallel', "
            'static_graph=True), or no with_cp or activation_checkpointing')
    if iterations > 1:
        raise ValueError(
            'GDPHook: expected a step of the optimizer in each iteration for '
            'activation checkpointing in several processes, but got '
            f'accumulative_counts={iterations}; set '
            'optim_wrapper.accumulative_counts=1, or no with_cp or '
            'activation_checkpointing')
