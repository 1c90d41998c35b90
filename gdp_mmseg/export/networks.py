"""Networks of an export, built from a config and a checkpoint."""
from __future__ import annotations

from pathlib import Path
from typing import Mapping

from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn

from ..engine.checkpoint import read_checkpoint
from ..engine.config import split_config, without_pretrained
from ..engine.model import build_base_model


def build_gated(cfg: Config, state: Mapping[str, Tensor]) -> nn.Module:
    """The gated model of a config, with a checkpoint in it, in eval mode.

    Raises:
        ValueError: If the config has no gates, or the checkpoint is of
            another model.
    """
    if cfg.model.get('type') != 'gdp_mmseg.GDPModel':
        raise ValueError(
            "config: expected model.type='gdp_mmseg.GDPModel', but got "
            f"{cfg.model.get('type')!r}; pass the config of the gated "
            'training')
    if not any(key.startswith('gdp.') for key in state):
        raise ValueError('checkpoint: expected one with gates, but it has '
                         'none; pass one that was trained with GDPModel and '
                         'GDPHook')
    gated = revert_sync_batchnorm(MODELS.build(without_pretrained(cfg)))
    load_strictly(gated, state)
    return gated.eval()


def build_dense(cfg: Config, state: Mapping[str, Tensor]) -> nn.Module:
    """The same model without gates, in eval mode."""
    base, _, model = split_config(without_pretrained(cfg))
    dense = revert_sync_batchnorm(build_base_model(base, model))
    load_strictly(dense, {
        key: value
        for key, value in state.items() if not key.startswith('gdp.')
    })
    return dense.eval()


def load_strictly(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load strictly, with one line for an error."""
    wanted = model.state_dict()
    other = [
        key for key in wanted
        if key not in state or state[key].shape != wanted[key].shape
    ]
    extra = [key for key in state if key not in wanted]
    if other or extra:
        raise ValueError(
            'checkpoint: expected the weights of the config\'s model, but '
            f'{len(other)} are missing or of another shape and {len(extra)} '
            f'have no place ({(other + extra)[0]} first); pass the checkpoint '
            'and the config of the same training')
    model.load_state_dict(state)


def load_exported(folder: Path, name: str) -> nn.Module:
    """Build the pruned model from its two files, in eval mode.

    Raises:
        ValueError: If they do not fit together.
    """
    cfg = Config.fromfile(folder / f'{name}_pruned.py')
    enter_scope(cfg)
    model = revert_sync_batchnorm(MODELS.build(cfg.model))
    state, _ = read_checkpoint(str(folder / f'{name}_pruned.pth'))
    load_strictly(model, state)
    return model.eval()


def enter_scope(cfg: Config) -> None:
    """Let type names in a config mean what they mean to its tools."""
    init_default_scope(cfg.get('default_scope') or 'mmseg')
