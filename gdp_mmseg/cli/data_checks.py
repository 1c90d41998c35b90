"""Checks of the files that a config's datasets name, before anything runs."""
from __future__ import annotations

import os
import os.path as osp
from typing import Iterator, Sequence

from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope

from .checks import is_remote, nodes
from .errors import fail

SPLITS = ('train', 'val', 'test')


def check_paths(cfg: Config, splits: Sequence[str] = SPLITS) -> None:
    """Fail if a dataset of a config lacks a file.

    Folders are listed, no image is opened.

    Args:
        cfg (Config): A config with the usual ``<split>_dataloader`` keys.
            Wrapped datasets (RepeatDataset, ConcatDataset ...) are followed.
        splits (Sequence[str]): Names of the dataloaders that will be used.
    """
    init_default_scope(cfg.get('default_scope') or 'mmseg')
    for split in splits:
        loader = cfg.get(f'{split}_dataloader') or {}
        for key, dataset in _datasets(f'{split}_dataloader', loader):
            _check_dataset(key, dataset)


def _datasets(key: str, node: dict) -> Iterator[tuple[str, dict]]:
    """Yield the unwrapped datasets below ``node``, each with its key."""
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
    """Fail if a folder or list of a dataset is missing, then check its files.

    ``data_root`` comes first because it is wrong most often.
    """
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
        if path and not is_remote(path) and not osp.exists(path):
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
        # NumPy's error when mmengine stores an empty list of images.
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
            if isinstance(path, str) and not is_remote(path)
        ]
        gone = [path for path in paths if not _is_listed(path, folders)]
        if gone:
            fail(f'expected a file for each {what} of {key}, but got none for '
                 f'{len(gone)} of {len(paths)} ({gone[0]} first); add the '
                 'files, or take the names from the list (ann_file), or '
                 'change the suffix')


def _reads_labels(dataset: dict) -> bool:
    """Tell whether a pipeline loads annotations, in mmseg's sense."""
    from ..engine.compat import name_of
    return 'pipeline' not in dataset or any(
        'Annotation' in name_of(node.get('type'))
        for _, node in nodes('pipeline', dataset['pipeline']))


def _is_listed(path: str, folders: dict[str, set[str]]) -> bool:
    """Tell whether a file exists; ``folders`` caches the listed folders."""
    folder, name = osp.split(path)
    if folder not in folders:
        folders[folder] = (
            set(os.listdir(folder)) if osp.isdir(folder) else set())
    return name in folders[folder]
