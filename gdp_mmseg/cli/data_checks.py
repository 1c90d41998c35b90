"""Checks of the files that a config's datasets name, before anything runs.

Only datasets that read their lists with the code of a known library are
checked, and only files that a transform of such a library reads. All else may
be right in a way that is not known here, and is left to the runner.
``GDP_CHECKS=0`` in the environment switches all these checks off.
"""
from __future__ import annotations

import inspect
import os
import os.path as osp
import re
from pathlib import Path
from typing import Any, Iterator, Mapping, Sequence

from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS, TRANSFORMS, init_default_scope

from .checks import is_remote, nodes
from .errors import fail
from .names import find_class

SPLITS = ('train', 'val', 'test')
LIBRARIES = ('mmengine', 'mmcv', 'mmseg', 'mmpretrain')
# Methods that decide which files a dataset reads. If a user overrides one, the
# paths in the config may mean anything.
LISTING = ('full_init', 'load_data_list', 'get_data_info', '_join_prefix')
# Fields of a data info: what each names, and a part of the names of the
# transforms that read it.
READ = {
    'img_path': ('image', 'ImageFromFile'),
    'seg_map_path': ('label map', 'Annotation')
}
SKIP = 'or skip this check with GDP_CHECKS=0'


def check_paths(cfg: Config, splits: Sequence[str] = SPLITS) -> None:
    """Fail if a dataset of a config lacks a file.

    Folders are listed, no image is opened.

    Args:
        cfg (Config): A config with the usual ``<split>_dataloader`` keys.
            Wrapped datasets (RepeatDataset, ConcatDataset ...) are followed.
        splits (Sequence[str]): Names of the dataloaders that will be used.
    """
    if os.environ.get('GDP_CHECKS') == '0':
        return
    init_default_scope(cfg.get('default_scope') or 'mmseg')
    for split in splits:
        loader = cfg.get(f'{split}_dataloader')
        if isinstance(loader, dict):
            key = f'{split}_dataloader.dataset'
            for key, dataset in _datasets(key, loader.get('dataset')):
                _check_dataset(key, dataset)


def _datasets(key: str, node: Any) -> Iterator[tuple[str, dict]]:
    """Yield the unwrapped datasets in ``node``, each with its key."""
    if not isinstance(node, dict):
        return
    children = {'dataset': node.get('dataset')}
    several = node.get('datasets')
    if isinstance(several, (list, tuple)):
        children |= {f'datasets.{i}': child for i, child in enumerate(several)}
    inner = {
        name: child
        for name, child in children.items() if isinstance(child, dict)
    }
    if not inner:
        yield key, node
    for name, child in inner.items():
        yield from _datasets(f'{key}.{name}', child)


def _check_dataset(key: str, dataset: dict) -> None:
    """Fail if a folder or list of a dataset is missing, then check its files.
    """
    if not _is_local(dataset) or not _is_known(dataset):
        return
    paths = _paths(dataset)
    for name, path in paths.items():
        if not is_remote(path) and not osp.exists(path):
            fail(f'expected data at {key}.{name}, but got {path}, which does '
                 f'not exist; pass --cfg-options {key}.{name}=..., change the '
                 f'config, {SKIP}')
    # A list may also be a folder; images are then found in another way.
    if 'ann_file' not in paths or osp.isfile(paths['ann_file']):
        _check_listed(key, dataset)


def _is_known(dataset: Mapping[str, Any]) -> bool:
    """Tell whether a dataset lists its files with the code of a library.

    A dataset that downloads its files itself is not known: nothing needs to be
    there.
    """
    kind = find_class(DATASETS, dataset.get('type'))
    if not (isinstance(kind, type) and issubclass(kind, BaseDataset)
            and all(_library(getattr(kind, name)) for name in LISTING)):
        return False
    download = inspect.signature(kind).parameters.get('download')
    return download is None or not dataset.get('download', download.default)


def _library(code: Any) -> bool:
    """Tell whether a class or a function is one of a known library."""
    return code.__module__.partition('.')[0] in LIBRARIES


def _is_local(settings: Mapping[str, Any]) -> bool:
    """Tell whether a dataset or a transform reads the local disk."""
    backends = [(settings.get(key) or {}).get('backend', 'local')
                for key in ('backend_args', 'file_client_args')]
    return set(backends) <= {'local', 'disk'}


def _paths(dataset: Mapping[str, Any]) -> dict[str, str]:
    """Return the paths that a dataset names, by their keys.

    ``data_root`` comes first because it is wrong most often.
    """
    root = str(dataset.get('data_root') or '')
    prefix = dataset.get('data_prefix') or {}
    relative = {'ann_file': dataset.get('ann_file')}
    if isinstance(prefix, Mapping):
        relative |= {
            f'data_prefix.{name}': path
            for name, path in prefix.items()
            if name != 'seg_map_path' or _reads(dataset, name)
        }
    else:
        relative['data_prefix'] = prefix
    paths = {'data_root': root} if root else {}
    return paths | {
        name: osp.join(root, path)
        for name, path in relative.items()
        if path and isinstance(path, (str, Path))
    }


def _check_listed(key: str, dataset: dict) -> None:
    """Fail if there is no image, or one without its file or its labels."""
    fields = [field for field in READ if _reads(dataset, field)]
    try:
        built = DATASETS.build(dataset)
        infos = [built.get_data_info(index) for index in range(len(built))]
    except FileNotFoundError as error:
        fail(f'expected the files of {key}, but got no {error.filename}; add '
             f'it, change data_root or data_prefix of {key}, {SKIP}')
    except Exception as error:
        # Errors of NumPy, when mmengine stores an empty list of images, and of
        # mmpretrain. Others, of any type, come from code that the runner will
        # call in the same way: they are reported there.
        if re.search('at least one array|Found 0 files', str(error)):
            fail(f'expected images in {key}, but got none; change its '
                 f'ann_file, data_prefix or img_suffix, {SKIP}')
        return
    folders: dict[str, set[str]] = {}
    for field in fields:
        paths = [
            path for path in (info.get(field) for info in infos)
            if isinstance(path, str) and not is_remote(path)
        ]
        gone = [path for path in paths if not _is_listed(path, folders)]
        if gone:
            fail(f'expected a file for each {READ[field][0]} of {key}, but '
                 f'got none for {len(gone)} of {len(paths)} ({gone[0]} first);'
                 ' add the files, take the names from the list (ann_file), '
                 f'change the suffix, {SKIP}')


def _reads(dataset: Mapping[str, Any], field: str) -> bool:
    """Tell whether a known transform reads the files of a field.

    A dataset without a pipeline is read elsewhere, and counts.
    """
    return 'pipeline' not in dataset or any(
        _is_reader(step, READ[field][1])
        for _, step in nodes('pipeline', dataset['pipeline']))


def _is_reader(step: Mapping[str, Any], word: str) -> bool:
    """Tell whether a transform is a library's own, with a word in its name."""
    kind = find_class(TRANSFORMS, step.get('type'))
    return (isinstance(kind, type) and word in kind.__name__ and _library(kind)
            and _is_local(step))


def _is_listed(path: str, folders: dict[str, set[str]]) -> bool:
    """Tell whether a file exists; ``folders`` caches the listed folders."""
    folder, name = osp.split(path)
    if folder not in folders:
        folders[folder] = (
            set(os.listdir(folder)) if osp.isdir(folder) else set())
    return name in folders[folder]
