"""Networks of an export, built from a config and a checkpoint."""
from __future__ import annotations

from pathlib import Path
from typing import Any, Mapping

from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn

from ..analysis.tracer import clone_model
from ..engine.bare import without_random_weights
from ..engine.checkpoint import read_checkpoint
from ..engine.config import ModelConfig
from ..engine.matching import (THETA, check_gate_meta, check_gates,
                               stored_analysis)
from ..engine.model import add_gates_, analyse_model, find_pruner
from ..surgery.saved import load_strictly


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
    with without_random_weights():
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
                                    settings.only, settings.gate)
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
    with without_random_weights():
        model = revert_sync_batchnorm(MODELS.build(cfg.model))
    state, _ = read_checkpoint(str(folder / f'{name}_pruned.pth'))
    load_strictly(model, state)
    return model.eval()


def enter_scope(cfg: Config) -> None:
    """Resolve type names in a config as the tools of its library do."""
    init_default_scope(cfg.get('default_scope') or 'mmseg')
