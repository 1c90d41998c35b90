"""Networks of an export, built from a config and a checkpoint."""
from __future__ import annotations

import collections
from pathlib import Path
from typing import Any, Mapping

from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn

from ..analysis.tracer import clone_model
from ..engine.checkpoint import read_checkpoint
from ..engine.config import ModelConfig
from ..engine.matching import (THETA, check_gate_meta, check_gates,
                               stored_analysis)
from ..engine.model import add_gates_, analyse_model, find_pruner


def build_networks(cfg: Config, state: Mapping[str, Tensor],
                   meta: Mapping[str, Any]) -> tuple[nn.Module, nn.Module]:
    """Build the dense and the gated network of a gated checkpoint.

    The analysis comes from the checkpoint, so nothing is traced again, unless
    the config counts FLOPs at another input size than the training did.

    Args:
        cfg (Config): Config of the gated training.
        state (Mapping[str, Tensor]): State dict of the checkpoint.
        meta (Mapping[str, Any]): Its meta.

    Returns:
        tuple[nn.Module, nn.Module]: Network without gates and with gates, on
        the CPU in eval mode.

    Raises:
        ValueError: If the config has no gates, or the checkpoint belongs to
            another model.
    """
    config = ModelConfig.of(cfg).without_pretrained()
    if config.kind != 'gated':
        raise ValueError(
            "config: expected model.type='gdp_mmseg.GDPModel', but got "
            f"{cfg.model.get('type')!r}; pass the config of the gated "
            'training')
    if THETA not in state:
        raise ValueError('checkpoint: expected one with gates, but it has '
                         'none; pass one that was trained with GDPModel and '
                         'GDPHook')
    check_gate_meta(meta)
    dense = revert_sync_batchnorm(MODELS.build(config.ungated))
    load_strictly(dense, {
        key: value
        for key, value in state.items() if not key.startswith('gdp.')
    })
    settings, shape = config.settings, config.input_shape()
    analysis = stored_analysis(meta['gdp'], settings, shape,
                               dense.state_dict())
    if analysis is None:
        analysis, _ = analyse_model(dense, shape, settings.ignore,
                                    settings.only)
    gated = add_gates_(clone_model(dense), analysis, settings)
    check_gates(find_pruner(gated), state, meta)
    load_strictly(gated, state)
    return dense.eval(), gated.eval()


def load_dense(dense: nn.Module, path: str) -> nn.Module:
    """Load the checkpoint of a dense training into a copy of its model.

    Args:
        dense (nn.Module): The config's model without gates.
        path (str): Checkpoint, the value of ``--dense``.

    Returns:
        nn.Module: The copy, in eval mode.

    Raises:
        ValueError: If the checkpoint has gates, or is of another model.
    """
    state, meta = read_checkpoint(path)
    if THETA in state or 'widths' in meta:
        came = 'with gates' if THETA in state else 'of an export'
        raise ValueError(
            '--dense: expected the checkpoint of a training without gates, '
            f'but got one {came}, {path}; pass the one of the dense training, '
            'or leave --dense out')
    network = clone_model(dense)
    load_strictly(network, state, f'--dense {path}')
    return network.eval()


def load_strictly(model: nn.Module,
                  state: Mapping[str, Tensor],
                  source: str = 'checkpoint') -> None:
    """Load a state dict that must fit, with one line for an error.

    Args:
        model (nn.Module): The model, whose weights are replaced.
        state (Mapping[str, Tensor]): Weights for all of it.
        source (str): Name of their source in the error.

    Raises:
        ValueError: If a tensor is missing, has another shape or no place.
    """
    wanted: Any = model.state_dict()
    shapes = [
        key for key in wanted
        if key in state and state[key].shape != wanted[key].shape
    ]
    missing, extra = shapes, list[str]()
    if not shapes:
        # Modules look up their version there; a plain dict has none.
        loaded = collections.OrderedDict(state)
        loaded._metadata = wanted._metadata  # type: ignore
        # Some modules drop or add keys when they load; only they know which.
        result = model.load_state_dict(loaded, strict=False)
        missing = [key for key in result.missing_keys if key not in state]
        extra = list(result.unexpected_keys)
    if missing or extra:
        raise ValueError(
            f'{source}: expected the weights of the config\'s model, but '
            f'{len(missing)} are missing or of another shape and {len(extra)} '
            f'have no place ({(missing + extra)[0]} first); pass the '
            'checkpoint and the config of the same training')


def load_exported(folder: Path, name: str) -> nn.Module:
    """Build the pruned network from its two files, in eval mode.

    Args:
        folder (Path): Folder of an export.
        name (str): Name of the gated config.

    Raises:
        ValueError: If the files do not fit together.
    """
    cfg = Config.fromfile(folder / f'{name}_pruned.py')
    enter_scope(cfg)
    model = revert_sync_batchnorm(MODELS.build(cfg.model))
    state, _ = read_checkpoint(str(folder / f'{name}_pruned.pth'))
    load_strictly(model, state)
    return model.eval()


def enter_scope(cfg: Config) -> None:
    """Resolve type names in a config as the tools of its library do."""
    init_default_scope(cfg.get('default_scope') or 'mmseg')
