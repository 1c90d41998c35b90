"""What the command lines share: one clear line where a traceback would be.

An error names what was expected, what came, and what to pass or change. It
goes to stderr, and the exit status is 2, as argparse does it.
"""
from __future__ import annotations

import contextlib
import os
import os.path as osp
import sys
import traceback
from pathlib import Path
from typing import Any, Iterator, NoReturn, Sequence

import torch
from mmengine.config import Config
from mmengine.device import get_device
from PIL import UnidentifiedImageError

ROOT = Path(__file__).resolve().parents[1]
OURS = (ROOT / 'gdp_mmseg', ROOT / 'tools')
SPLITS = ('train', 'val', 'test')


def fail(message: str) -> NoReturn:
    """End the program with one line on stderr and exit status 2."""
    line = ' '.join(message.split())
    print(f'{osp.basename(sys.argv[0])}: error: {line}', file=sys.stderr)
    raise SystemExit(2)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn the errors that our code raises into :func:`fail`.

    A context manager, and as ``@one_line_errors()`` a decorator. Only a
    ValueError, FileNotFoundError or KeyError raised in gdp_mmseg or tools
    is taken, also when mmengine's registry has wrapped it; any other error
    keeps its traceback. With GDP_DEBUG=1 in the environment all do.
    """
    try:
        yield
    except (AssertionError, UnidentifiedImageError) as error:
        # mmcv's and Pillow's errors for an image that they cannot read.
        if 'image' not in str(error) or os.environ.get('GDP_DEBUG') == '1':
            raise
        fail(f'expected readable images, but got: '
             f'{str(error).splitlines()[-1]}; replace the file, or take it '
             'from the list')
    except (ValueError, FileNotFoundError, KeyError) as error:
        cause = _our_cause(error)
        if cause is None or os.environ.get('GDP_DEBUG') == '1':
            raise
        # str() of a KeyError is the repr of its message.
        fail(str(cause.args[0] if isinstance(cause, KeyError) else cause))


def load_config(path: str, options: dict[str, Any] | None = None) -> Config:
    """Read a config file and merge ``--cfg-options`` into it."""
    if not osp.isfile(path):
        fail(f'expected a config file, but got {path}, which does not exist; '
             'pass the path of a config')
    try:
        cfg = Config.fromfile(path)
    except FileNotFoundError as error:
        fail(f'expected the files that {path} is based on, but got: {error}; '
             'change its _base_')
    cfg.merge_from_dict(options or {})
    if 'model' not in cfg:
        fail(f'expected a config with a model, but {path} has none; pass the '
             'config of a training')
    return cfg


def check_checkpoint(path: str) -> None:
    """Fail if a checkpoint is neither a file nor a remote address."""
    if not _is_remote(path) and not osp.isfile(path):
        fail(f'expected a checkpoint file, but got {path}, which does not '
             'exist; pass or change its path')


def check_paths(cfg: Config, splits: Sequence[str] = SPLITS) -> None:
    """Fail if a dataset of a config names a path that does not exist.

    Args:
        cfg (Config): A config with the usual ``<split>_dataloader`` keys;
            wrapped datasets (RepeatDataset, ConcatDataset ...) are followed.
        splits (Sequence[str]): The dataloaders that will be used.
    """
    for split in splits:
        loader = cfg.get(f'{split}_dataloader') or {}
        for key, dataset in _datasets(f'{split}_dataloader', loader):
            _check_dataset(key, dataset)


def join_processes_(cfg: Config, launcher: str) -> None:
    """Let processes without GPUs work together, over gloo; changes ``cfg``.

    mmengine by itself asks for a GPU of each process.

    Args:
        cfg (Config): Gets a ``model_wrapper_cfg`` that goes without.
        launcher (str): As it was passed; of ``'pytorch'`` only.
    """
    if launcher != 'pytorch' or get_device() != 'cpu':
        return
    synced = [
        f'{key}.type=BN' for key, node in _nodes('model', cfg.model)
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


def _nodes(key: str, node: Any) -> Iterator[tuple[str, dict]]:
    """Yield all mappings in ``node``, with their keys."""
    if isinstance(node, (list, tuple)):
        node = dict(enumerate(node))
    elif isinstance(node, dict):
        yield key, node
    else:
        return
    for name, child in node.items():
        yield from _nodes(f'{key}.{name}', child)


def _datasets(key: str, node: dict) -> Iterator[tuple[str, dict]]:
    """Yield the unwrapped datasets below ``node``, with their keys."""
    children = [('dataset', node.get('dataset'))]
    children += [(f'datasets.{index}', child)
                 for index, child in enumerate(node.get('datasets', ()))]
    inner = [(name, child) for name, child in children
             if isinstance(child, dict)]
    if not inner:
        yield key, node
    for name, child in inner:
        yield from _datasets(f'{key}.{name}', child)


def _check_dataset(key: str, dataset: dict) -> None:
    """Check ``data_root`` first: it is what is wrong most often."""
    backend = (dataset.get('backend_args') or {}).get('backend', 'local')
    if backend != 'local':
        return
    root = dataset.get('data_root') or ''
    paths = {'data_root': root}
    if dataset.get('ann_file'):
        paths['ann_file'] = osp.join(root, dataset['ann_file'])
    for name, prefix in (dataset.get('data_prefix') or {}).items():
        if prefix:
            paths[f'data_prefix.{name}'] = osp.join(root, prefix)
    for name, path in paths.items():
        if path and not _is_remote(path) and not osp.exists(path):
            fail(f'expected data at {key}.{name}, but got {path}, which does '
                 f'not exist; pass --cfg-options {key}.{name}=... or change '
                 'the config')


def _is_remote(path: str) -> bool:
    return '://' in path


def _our_cause(error: BaseException | None) -> BaseException | None:
    """Return the first error of a chain that our code raised, if any."""
    while error is not None and not _is_ours(error):
        error = error.__cause__ or error.__context__
    return error


def _is_ours(error: BaseException) -> bool:
    """Tell whether our code raised an error that the user can mend."""
    if not isinstance(error, (ValueError, FileNotFoundError, KeyError)):
        return False
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    return any(
        Path(raised_in).resolve().is_relative_to(folder) for folder in OURS)
