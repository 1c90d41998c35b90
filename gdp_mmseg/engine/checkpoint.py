"""Content of checkpoints: read without running code, and verified.

A checkpoint is a zip archive with a CRC-32 for each tensor. ``torch.load``
does not check them, so that a flipped bit would pass for a weight. Files that
are read here are checked first.
"""
from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path
from typing import Any, Iterator, Mapping

import numpy as np
from torch import Tensor

from ..files import write_whole
from ..surgery.saved import UNREADABLE, checksum, load_whole, saved_bytes
from ..version import __version__
from .safe_types import allow_mmengine_types

# Distributions whose versions a checkpoint records. Of two with the same
# import name, the installed one is recorded.
PACKAGES = ('torch', 'mmengine', 'onedl-mmengine', 'mmsegmentation',
            'onedl-mmsegmentation', 'mmpretrain', 'onedl-mmpretrain')


def read_checkpoint(path: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint that mmengine or an export saved.

    Only tensors, plain types and a few types of mmengine's are unpickled.

    Args:
        path (str): Path of the file. It may also hold a state dict alone.

    Returns:
        tuple[dict[str, Tensor], dict[str, Any]]: State dict without the
        prefix of a wrapper, and meta (empty if there is none).

    Raises:
        ValueError: If it is no complete checkpoint, or differs from the one
            that was written.
    """
    content = _read(path)
    if isinstance(content, dict) and content and all(
            isinstance(value, Tensor) for value in content.values()):
        content = dict(state_dict=content)
    state = content.get('state_dict') if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(
            isinstance(value, Tensor) for value in state.values()):
        raise ValueError(
            f"checkpoint: expected a 'state_dict' of tensors in {path}, but "
            f'got none; pass a checkpoint that the training saved')
    meta = content.get('meta') or {}
    if meta.get('sha256') not in (None, checksum(state)):
        raise ValueError(
            f'checkpoint: expected the weights that were exported in {path}, '
            f'but got others (SHA-256 {checksum(state)[:8]} for '
            f'{meta["sha256"][:8]}); export again, or take the copy that it '
            'was made from')
    return unwrapped(state), meta


def unwrapped(state: Mapping[str, Any]) -> dict[str, Any]:
    """Remove the prefix ``module.`` of a wrapped model from a state dict.

    mmengine's FlexibleRunner saves the wrapper of several processes too.
    """
    return {key.removeprefix('module.'): state[key] for key in state}


def _read(path: str) -> Any:
    """Load a complete file, unpickling nothing but known types."""
    allow_mmengine_types()
    try:
        return load_whole(path)
    except FileNotFoundError:
        raise ValueError(
            f'checkpoint: expected a file, but {path} does not exist; pass '
            'the path of a checkpoint') from None
    except UNREADABLE as error:
        code = re.search(r'GLOBAL (\S+)', str(error))
        if code:
            raise ValueError(
                f"checkpoint: expected tensors, plain types and mmengine's "
                f'own types, but {path} also holds {code[1]}; if you '
                'trust it, save its state_dict and meta alone') from error
        raise ValueError(
            f'checkpoint: expected a file that mmengine saved, but {path} '
            f'cannot be read ({str(error).partition(chr(10))[0]:.80}); it '
            'may be truncated, damaged or of another kind') from error


def versions() -> dict[str, str]:
    """Versions of the packages that a result depends on."""
    found = dict(gdp_mmseg=__version__)
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    return found


def other_versions(meta: Mapping[str, Any]) -> str | None:
    """List the packages whose versions differ from those of a checkpoint.

    Args:
        meta (Mapping[str, Any]): Meta of the checkpoint.

    Returns:
        str, optional: Names with both versions; None if all are the same.
    """
    then, now = meta.get('versions') or {}, versions()
    changed = [
        f'{name} {then[name]} (here {now.get(name, "none")})' for name in then
        if then[name] != now.get(name)
    ]
    return ', '.join(changed) or None


def save_exported(path: Path, state: Mapping[str, Tensor],
                  widths: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
    """Write a pruned checkpoint that holds tensors and plain types only.

    Args:
        path (Path): File to write.
        state (Mapping[str, Tensor]): State dict of the pruned model.
        widths (Mapping[str, Any]): Widths of the pruned model.
        meta (Mapping[str, Any]): Meta of the gated checkpoint.

    Raises:
        OSError: If it cannot be written.
    """
    described = dict(
        versions=versions(),
        dataset_meta=plain(meta.get('dataset_meta') or {}))
    write_whole(path, saved_bytes(state, widths, described))


def plain(value: Any) -> Any:
    """Turn a value into plain types, recursively.

    ``torch.load(weights_only=True)`` reads the result. Arrays become lists,
    named tuples become tuples, and keys become strings. An object of another
    kind becomes its text.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        kind = list if isinstance(value, list) else tuple
        return kind(plain(item) for item in value)
    if isinstance(value, (np.ndarray, np.generic)):
        return plain(value.tolist())
    if value is None or isinstance(
            value, Tensor) or type(value) in (bool, int, float, str, bytes):
        return value
    return str(value)


def not_plain(value: Any, key: str) -> Iterator[str]:
    """Yield the keys of the objects that :func:`plain` turns into text.

    Args:
        value (Any): A value that will be saved.
        key (str): Its key; those of inner values are added with dots.

    Examples:
        >>> list(not_plain(dict(a=[1, None], b=[print]), 'metainfo'))
        ['metainfo.b.0']
    """
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from not_plain(item, f'{key}.{name}')
    elif isinstance(value, (list, tuple, set, frozenset)):
        for index, item in enumerate(value):
            yield from not_plain(item, f'{key}.{index}')
    elif not isinstance(
            value, (np.ndarray, np.generic)) and plain(value) is not value:
        yield key
