"""What the command lines share: one clear line where a traceback would be.

An error names what was expected, what came, and what to pass or change. It
goes to stderr, and the exit status is 2, as argparse does it.
"""
from __future__ import annotations

import contextlib
import errno
import os
import os.path as osp
import sys
import traceback
from pathlib import Path
from typing import Any, Iterator, NoReturn, Sequence

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.registry import DATASETS, init_default_scope
from PIL import UnidentifiedImageError

ROOT = Path(__file__).resolve().parents[1]
OURS = (ROOT / 'gdp_mmseg', ROOT / 'tools')
SPLITS = ('train', 'val', 'test')
MENDABLE = (ValueError, FileNotFoundError, FloatingPointError, KeyError)
NO_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS,
              errno.EACCES, errno.EPERM)


def fail(message: str) -> NoReturn:
    """End the program with one line on stderr and exit status 2."""
    line = ' '.join(message.split())
    print(f'{osp.basename(sys.argv[0])}: error: {line}', file=sys.stderr)
    raise SystemExit(2)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn errors that the user can mend into :func:`fail`.

    A context manager, and as ``@one_line_errors()`` a decorator. Taken are
    those that gdp_mmseg or tools raise, also when mmengine's registry has
    wrapped them, and of others those about files and data; any other error
    keeps its traceback. With GDP_DEBUG=1 in the environment all do.
    """
    try:
        yield
    except Exception as error:
        line = _line(error)
        if line is None or os.environ.get('GDP_DEBUG') == '1':
            raise
        fail(line)


def _line(error: Exception) -> str | None:
    """What an error says to the user, None if it is for a developer."""
    cause = _our_cause(error)
    if cause is not None:
        # str() of a KeyError is the repr of its message.
        return str(cause.args[0] if isinstance(cause, KeyError) else cause)
    last = (str(error).splitlines() or [''])[-1]
    if isinstance(error, UnidentifiedImageError) or (isinstance(
            error, AssertionError) and 'failed to load image' in str(error)):
        # Pillow's and mmcv's errors for an image that they cannot read.
        return (f'expected readable images, but got: {last}; replace the '
                'file, or take it from the list')
    if isinstance(error, OSError) and error.errno in NO_WRITING:
        return ('expected to read and write files, but got: '
                f'{error.strerror} ({error.filename or "while writing"}); '
                'make room, or choose another folder; --resume goes on from '
                'the last checkpoint')
    if isinstance(error, IndexError) and 'out of bounds' in str(error):
        # torch's error for a label without a class, on a CPU.
        return (f'expected labels below num_classes, but got: {last}; change '
                'num_classes of the heads, or reduce_zero_label')
    return None


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


def verify_checkpoint(path: str, cfg: Config) -> None:
    """Fail if a local one is not whole, or gated or exported for a plain one.

    Of those, mmengine would load what fits into the plain model, and log the
    rest: channels that were closed are open, or weights random.

    Says if other versions made it. It is read twice then, here and by
    mmengine, which does not look at the checksums, and runs what a file says
    if it holds more than numbers.
    """
    check_checkpoint(path)
    if _is_remote(path):
        return
    from gdp_mmseg.engine.checkpoint import (THETA, other_versions,
                                             read_checkpoint)
    state, meta = read_checkpoint(path)
    if 'gdp' not in cfg.model and (THETA in state or 'widths' in meta):
        came, config = (('an exported one',
                         'that was exported with it') if 'widths' in meta else
                        ('one with gates', 'that it was trained with'))
        fail(f'expected a checkpoint of a plain {cfg.model.get("type")}, but '
             f'got {came}, {path}; pass the config {config}')
    changed = other_versions(meta)
    if changed:
        print(f'note: {path} was made with other versions: {changed}')


def go_on(cfg: Config, chosen: bool) -> None:
    """Let ``--resume`` go on with this training; changes ``cfg``.

    mmengine resumes from ``load_from``, if a config has one. That is where the
    training began, unless the command line names it.

    Args:
        cfg (Config): Gets no ``load_from`` if there is something to go on
            from in its ``work_dir``, and no ``resume`` if not.
        chosen (bool): Whether the command line names ``load_from``.
    """
    if cfg.resume and cfg.get('load_from') and not chosen:
        if osp.isfile(osp.join(cfg.work_dir, 'last_checkpoint')):
            cfg.load_from = None
        else:
            cfg.resume = False
            print(f'note: nothing to resume in {cfg.work_dir}; starting from '
                  f'{cfg.load_from}')


def verify_start(cfg: Config) -> None:
    """Verify what a training starts from: ``load_from``, or an export."""
    start = cfg.get('load_from')
    if (not start and not cfg.resume
            and cfg.model.get('type') == 'gdp_mmseg.PrunedModel'):
        start = (cfg.model.get('init_cfg') or {}).get('checkpoint')
    if start:
        verify_checkpoint(start, cfg)


def add_resume_hook_(cfg: Config) -> None:
    """Give a training the hook that GDPHook is one of, if it has none."""
    from gdp_mmseg.engine.compat import hooks_of, resumes_exactly
    if not any(map(resumes_exactly, hooks_of(cfg))):
        cfg.merge_from_dict(
            {'default_hooks.gdp_resume': dict(type='gdp_mmseg.ResumeHook')})


def check_paths(cfg: Config, splits: Sequence[str] = SPLITS) -> None:
    """Fail if a dataset of a config lacks a file.

    Folders are listed, no image is opened.

    Args:
        cfg (Config): A config with the usual ``<split>_dataloader`` keys;
            wrapped datasets (RepeatDataset, ConcatDataset ...) are followed.
        splits (Sequence[str]): The dataloaders that will be used.
    """
    init_default_scope(cfg.get('default_scope') or 'mmseg')
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
        if prefix and (name != 'seg_map_path' or _reads_labels(dataset)):
            paths[f'data_prefix.{name}'] = osp.join(root, prefix)
    for name, path in paths.items():
        if path and not _is_remote(path) and not osp.exists(path):
            fail(f'expected data at {key}.{name}, but got {path}, which does '
                 f'not exist; pass --cfg-options {key}.{name}=... or change '
                 'the config')
    # A loader that the config lacks is an empty dict here.
    if 'type' in dataset and osp.isfile(paths.get('ann_file', __file__)):
        _check_listed(key, dataset)


def _check_listed(key: str, dataset: dict) -> None:
    """Fail if there is no image, or one without its file or its labels."""
    try:
        built = DATASETS.build(dataset)
    except ValueError as error:
        # NumPy's error for a data set of nothing, as mmengine stores it.
        if 'at least one array' not in str(error):
            raise
        fail(f'expected images in {key}, but got none; change its ann_file, '
             'data_prefix or img_suffix')
    folders: dict[str, set[str]] = {}
    read = {'img_path': 'image'}
    if _reads_labels(dataset):
        read['seg_map_path'] = 'label map'
    for field, what in read.items():
        paths = [
            path for path in (built.get_data_info(index).get(field)
                              for index in range(len(built)))
            if isinstance(path, str) and not _is_remote(path)
        ]
        gone = [path for path in paths if not _is_listed(path, folders)]
        if gone:
            fail(f'expected a file for each {what} of {key}, but got none for '
                 f'{len(gone)} of {len(paths)} ({gone[0]} first); add the '
                 'files, or take the names from the list (ann_file), or '
                 'change the suffix')


def _reads_labels(dataset: dict) -> bool:
    """Whether a pipeline loads what mmseg calls annotations."""
    from gdp_mmseg.engine.compat import name_of
    return 'pipeline' not in dataset or any(
        'Annotation' in name_of(node.get('type'))
        for _, node in _nodes('pipeline', dataset['pipeline']))


def _is_listed(path: str, folders: dict[str, set[str]]) -> bool:
    """Whether a file is there; ``folders`` remembers what was listed."""
    folder, name = osp.split(path)
    if folder not in folders:
        folders[folder] = (
            set(os.listdir(folder)) if osp.isdir(folder) else set())
    return name in folders[folder]


def _is_remote(path: str) -> bool:
    return '://' in path


def _our_cause(error: BaseException | None) -> BaseException | None:
    """Return the first error of a chain that our code raised, if any."""
    while error is not None and not _is_ours(error):
        error = error.__cause__ or error.__context__
    return error


def _is_ours(error: BaseException) -> bool:
    """Tell whether our code raised an error that the user can mend."""
    if not isinstance(error, MENDABLE):
        return False
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    return any(
        Path(raised_in).resolve().is_relative_to(folder) for folder in OURS)
