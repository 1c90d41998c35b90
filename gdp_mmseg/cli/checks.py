"""Configs and checkpoints of the command lines: read, verified, completed."""
from __future__ import annotations

import argparse
import os.path as osp
from pathlib import Path
from typing import Any, Iterator

import torch
from mmengine.config import Config, DictAction
from mmengine.device import get_device

from ..engine.config import ModelConfig, kind_of
from .errors import fail
from .names import check_model_names


def add_cfg_options(parser: argparse.ArgumentParser) -> None:
    """Add the flag ``--cfg-options``, for :func:`load_config`."""
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        help='settings that override the config, as key=value')


def load_config(path: str, options: dict[str, Any] | None = None) -> Config:
    """Read a config file, merge ``--cfg-options``, check model and gates.

    Raises:
        ValueError: If a setting of the gates is wrong.
    """
    check_config_file(path)
    try:
        cfg = Config.fromfile(path)
    except FileNotFoundError as error:
        fail(f'expected the files that {path} is based on, but got: {error}; '
             'change its _base_')
    cfg.merge_from_dict(options or {})
    if 'model' not in cfg:
        fail(f'expected a config with a model, but {path} has none; pass the '
             'config of a training')
    check_model_names(cfg)
    if kind_of(cfg.model) == 'gated':
        # The settings are checked here, before anything is built.
        ModelConfig.of(cfg).settings
    return cfg


def check_config_file(path: str) -> None:
    """Fail if a config file does not exist."""
    if not osp.isfile(path):
        fail(f'expected a config file, but got {path}, which does not exist; '
             'pass the path of a config')


def check_checkpoint(path: str) -> None:
    """Fail if a checkpoint is neither a file nor a remote address."""
    if not is_remote(path) and not osp.isfile(path):
        fail(f'expected a checkpoint file, but got {path}, which does not '
             'exist; pass or change its path')


def verify_checkpoint(path: str, cfg: Config) -> None:
    """Fail if a local checkpoint is damaged or belongs to another model.

    A checkpoint with gates and an exported one are refused for a plain model:
    mmengine would load the weights that fit and log the rest, so that closed
    channels would be open, or weights random. A checkpoint that other versions
    of the packages made is only noted.

    The file is read twice, here and by mmengine, because mmengine does not
    compare the checksums, and executes code from a file that holds more than
    numbers.

    Args:
        path (str): File or remote address; a remote one is not read.
        cfg (Config): Config of the model that will load the checkpoint.
    """
    check_checkpoint(path)
    # Allows the types of mmengine's checkpoints, for remote ones too.
    from ..engine.checkpoint import other_versions, read_checkpoint
    if is_remote(path):
        return
    from ..engine.matching import THETA
    state, meta = read_checkpoint(path)
    if kind_of(cfg.model) == 'dense' and (THETA in state or 'widths' in meta):
        came, config = (('an exported one',
                         'that was exported with it') if 'widths' in meta else
                        ('one with gates', 'that it was trained with'))
        fail(f'expected a checkpoint of a plain {cfg.model.get("type")}, but '
             f'got {came}, {path}; pass the config {config}')
    changed = other_versions(meta)
    if changed:
        print(f'note: {path} was made with other versions: {changed}')


def resolve_resume_(cfg: Config, chosen: bool) -> None:
    """Decide between ``--resume`` and ``load_from``; changes ``cfg`` in place.

    A resume of mmengine starts from ``load_from`` if the config has one. That
    is the start of the training, not its last state, unless the user named it
    for this run.

    Args:
        cfg (Config): Loses ``load_from`` if its ``work_dir`` has a checkpoint
            to resume from, and ``resume`` if it has none.
        chosen (bool): True if the command line names ``load_from``.
    """
    if cfg.resume and cfg.get('load_from') and not chosen:
        if osp.isfile(osp.join(cfg.work_dir, 'last_checkpoint')):
            cfg.load_from = None
        else:
            cfg.resume = False
            print(f'note: nothing to resume in {cfg.work_dir}; starting from '
                  f'{cfg.load_from}')


def verify_start(cfg: Config) -> None:
    """Verify the checkpoint that a training starts from, if it has one."""
    start = cfg.get('load_from')
    if not start and not cfg.resume and kind_of(cfg.model) == 'pruned':
        start = (cfg.model.get('gdp') or {}).get('checkpoint')
    if start:
        verify_checkpoint(start, cfg)


def gates_to_resume(cfg: Config) -> dict[str, Any] | None:
    """Read the gates of the checkpoint that a training resumes from.

    Args:
        cfg (Config): Config of a training, after :func:`resolve_resume_`.

    Returns:
        dict[str, Any], optional: See
        :func:`gdp_mmseg.engine.matching.gate_meta`. None if the training does
        not resume, or its checkpoint is damaged or has no gates, which the
        resume itself handles.
    """
    from ..engine.checkpoint import read_checkpoint
    from ..engine.whole_files import pointed_checkpoint
    pointed = pointed_checkpoint(Path(cfg.work_dir)) if cfg.resume else None
    if pointed is None or not osp.isfile(pointed[0]):
        return None
    try:
        gates = read_checkpoint(pointed[0])[1].get('gdp') or {}
        return gates if 'analysis' in gates else None
    except ValueError:
        return None


def add_resume_hook_(cfg: Config) -> None:
    """Add ``ResumeHook`` to a config in place, unless it has such a hook."""
    from ..engine.compat import hooks_of, resumes_exactly
    if not any(map(resumes_exactly, hooks_of(cfg))):
        cfg.merge_from_dict(
            {'default_hooks.gdp_resume': dict(type='gdp_mmseg.ResumeHook')})


def join_processes_(cfg: Config, launcher: str) -> None:
    """Connect processes without GPUs over gloo; changes ``cfg`` in place.

    mmengine requires a GPU for each process.

    Args:
        cfg (Config): Gets a ``model_wrapper_cfg`` without device ids.
        launcher (str): Value of ``--launcher``; only ``'pytorch'`` on a
            machine without GPUs has an effect.
    """
    if launcher != 'pytorch' or get_device() != 'cpu':
        return
    synced = [
        f'{key}.type=BN' for key, node in nodes('model', cfg.model)
        if node.get('type') in ('SyncBN', 'MMSyncBN')
    ]
    if synced:
        fail('expected norms that work on CPUs, but got SyncBN, which needs '
             'a GPU for each process; pass --cfg-options ' + ' '.join(synced))
    cfg.model_wrapper_cfg = dict(
        dict(
            type='MMDistributedDataParallel',
            broadcast_buffers=False,
            find_unused_parameters=cfg.get('find_unused_parameters', False)),
        **(cfg.get('model_wrapper_cfg') or {}),
        device_ids=None)
    torch.distributed.init_process_group('gloo')


def nodes(key: str, node: Any) -> Iterator[tuple[str, dict]]:
    """Yield all mappings in a nested ``node``, each with its dotted key."""
    if isinstance(node, (list, tuple)):
        node = dict(enumerate(node))
    elif isinstance(node, dict):
        yield key, node
    else:
        return
    for name, child in node.items():
        yield from nodes(f'{key}.{name}', child)


def is_remote(path: str | Path) -> bool:
    """Tell whether a path is an address such as ``https://...``."""
    return '://' in str(path)
