"""Pruned models in files: tensors, widths and a checksum of the tensors."""
from __future__ import annotations

import collections
import hashlib
import io
import pickle
import zipfile
from pathlib import Path
from typing import Any, Mapping

import torch
from torch import Tensor, nn

from ..analysis.tracer import clone_model
from ..files import raise_if_damaged, write_whole
from ..version import __version__
from .outputs import first_line
from .widths import Width, Widths, apply_widths_

# What :func:`load_whole` raises for a file that it cannot read.
UNREADABLE = (pickle.UnpicklingError, RuntimeError, EOFError, OSError,
              zipfile.BadZipFile)


def save_pruned(pruned: nn.Module, widths: Widths, path: str | Path) -> None:
    """Save a pruned model; the file is complete or absent.

    ``torch.load(path, weights_only=True)`` reads it: ``state_dict`` holds the
    tensors, ``meta`` the widths.

    Args:
        pruned (nn.Module): The pruned model.
        widths (Widths): Its widths.
        path (str | Path): File to write.

    Raises:
        OSError: If it cannot be written. An earlier file is left unchanged.
    """
    write_whole(path, saved_bytes(pruned.state_dict(), widths, {}))


def load_pruned(model: nn.Module, path: str | Path) -> nn.Module:
    """Copy a dense model, narrowed to a pruned one, and load its weights.

    Args:
        model (nn.Module): Model of the same code as the one that was pruned,
            without gates. It stays unchanged.
        path (str | Path): File of :func:`save_pruned`, or the ``.pth`` file
            of an export of the same mm model.

    Returns:
        nn.Module: The pruned model, in the mode of the dense one.

    Raises:
        ValueError: If the file is damaged, or belongs to another model.
    """
    try:
        content = load_whole(path)
        meta, state = content['meta'], content['state_dict']
        widths, digest = meta['widths'], meta['sha256']
    except (KeyError, TypeError, *UNREADABLE) as error:
        raise ValueError(
            'path: expected a file of save_pruned or of an export, but '
            f'{path} cannot be read as one ({first_line(error)})') from error
    if digest != checksum(state):
        raise ValueError(f'path: expected the tensors that were saved in '
                         f'{path}, but got others; save them again')
    pruned = clone_model(model)
    apply_widths_(pruned, widths)
    load_strictly(pruned, state)
    return pruned


def load_whole(path: str | Path) -> Any:
    """Load a file onto the CPU, without running code, if it is undamaged.

    ``torch.load`` does not check the bytes of a tensor.

    Args:
        path (str | Path): File that ``torch.save`` wrote.

    Raises:
        Exception: One of :data:`UNREADABLE`.
    """
    if zipfile.is_zipfile(path):
        raise_if_damaged(path)
    return torch.load(path, map_location='cpu', weights_only=True)


def saved_bytes(state: Mapping[str, Tensor], widths: Mapping[str, Width],
                meta: Mapping[str, Any]) -> bytes:
    """Compose the content of a file that holds a pruned model.

    Args:
        state (Mapping[str, Tensor]): State dict of the pruned model.
        widths (Mapping[str, Width]): Its widths.
        meta (Mapping[str, Any]): Further plain values to save.
    """
    content = io.BytesIO()
    torch.save(
        dict(
            meta=dict(
                meta,
                gdp_mmseg=__version__,
                sha256=checksum(state),
                widths=widths),
            state_dict=state), content)
    return content.getvalue()


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
            f'{source}: expected the weights of this model, but '
            f'{len(missing)} are missing or of another shape and {len(extra)} '
            f'have no place ({(missing + extra)[0]} first); pass the '
            'checkpoint and the config of the same training')


def checksum(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of a state dict: names, dtypes, shapes and bytes, in order.

    Examples:
        >>> one = dict(weight=torch.zeros(2))
        >>> checksum(one) == checksum(dict(weight=torch.zeros(2)))
        True
        >>> checksum(one) == checksum(dict(weight=torch.tensor([0., 1e-9])))
        False
    """
    digest = hashlib.sha256()
    for name, value in state.items():
        digest.update(f'{name} {value.dtype} {list(value.shape)};'.encode())
        plain = value.detach().cpu().contiguous().reshape(-1)
        digest.update(plain.view(torch.uint8).numpy().data)
    return digest.hexdigest()
