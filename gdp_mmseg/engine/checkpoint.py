"""Checkpoints: read without running code, found whole, written whole.

A checkpoint is a zip archive with a CRC-32 for each tensor. ``torch.load``
does not look at them, so that a flipped bit passes for a weight; what is read
here is held against them first.
"""
from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import io
import json
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any, Callable, ClassVar, Iterator, Mapping

import numpy as np
import torch
from mmengine.fileio import LocalBackend, register_backend
from mmengine.logging import HistoryBuffer
from mmengine.optim import OneCycleParamScheduler
from torch import Tensor, nn

from ..analysis.structure import Analysis
from ..files import write_whole
from ..version import __version__

# What a checkpoint remembers of the packages that made it, by distribution;
# of two with the same import name, the one that is installed.
PACKAGES = ('torch', 'mmengine', 'onedl-mmengine', 'mmsegmentation',
            'onedl-mmsegmentation', 'mmpretrain', 'onedl-mmpretrain')
WHOLE = 'gdp_mmseg.whole'
# In a state dict: the gates, and which of them are closed.
THETA = 'gdp.gates.theta'
CLOSED = 'gdp.gates.closed'


def read_checkpoint(path: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State dict and meta of a checkpoint that mmengine or an export saved.

    A file may also hold nothing but the state dict, and has no meta then.
    Only tensors, plain types and a few of mmengine's own are unpickled.

    Raises:
        ValueError: If it is no whole checkpoint, or another than was written.
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
    """A state dict without the wrapper of several processes.

    mmengine's FlexibleRunner saves that too.
    """
    return {key.removeprefix('module.'): state[key] for key in state}


def _read(path: str) -> Any:
    """Unpickle what is safe to, from a file that is whole."""
    buffers: list[Any] = [
        HistoryBuffer, OneCycleParamScheduler, getattr, np.ndarray, np.dtype,
        *(type(np.dtype(kind)) for kind in ('f8', 'f4', 'i8', 'i4', 'b')),
        *_numpys(np.zeros(1).__reduce__()[0]),
        *_numpys(np.float64(0).__reduce__()[0])
    ]
    try:
        if zipfile.is_zipfile(path):
            _raise_if_damaged(path)
        with torch.serialization.safe_globals(buffers):
            return torch.load(path, map_location='cpu', weights_only=True)
    except FileNotFoundError:
        raise ValueError(
            f'checkpoint: expected a file, but {path} does not exist; pass '
            'the path of a checkpoint') from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError,
            zipfile.BadZipFile) as error:
        code = re.search(r'GLOBAL (\S+)', str(error))
        if code:
            raise ValueError(
                f"checkpoint: expected tensors, plain types and mmengine's "
                f'own, but {path} holds {code[1]} too; if you '
                'trust it, save its state_dict and meta alone') from error
        raise ValueError(
            f'checkpoint: expected a file that mmengine saved, but {path} '
            f'cannot be read ({str(error).partition(chr(10))[0]:.80}); it '
            'may be truncated, damaged or of another kind') from error


def _numpys(function: Any) -> Iterator[Callable[..., Any]]:
    """One of NumPy's under the names that its versions 1 and 2 save it by."""
    for module in ('numpy.core.multiarray', 'numpy._core.multiarray'):
        named: Any = functools.partial(function)
        named.__module__ = module
        named.__qualname__ = function.__name__
        yield named


def _raise_if_damaged(path: str | Path) -> None:
    """Hold each part of an archive against its CRC-32.

    Raises:
        OSError: If the file cannot be read.
        BadZipFile: If it is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except OSError:
        raise
    # Damaged bytes fail in as many ways as an archive has fields.
    except Exception as error:
        raise zipfile.BadZipFile(f'a damaged archive: {error}') from error
    if damaged is not None:
        raise zipfile.BadZipFile(f'the bytes of {damaged} are not those that '
                                 'were written')


def checksum(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of a state dict: its names, kinds, shapes and bytes, in order.

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


def fingerprint(analysis: Analysis) -> str:
    """SHA-256 of which gate acts on which channel.

    A vector of gates means nothing to a model that was analysed otherwise,
    also where the number of gates is the same.
    """
    digest = hashlib.sha256()
    for group in analysis.groups:
        digest.update(
            json.dumps([group.writers, group.readers,
                        group.gates.tolist()]).encode())
    for layer in analysis.gated_layers():
        digest.update(json.dumps([layer.name, layer.inputs.tolist()]).encode())
    return digest.hexdigest()


def closed_gates(analysis: Analysis, state: Mapping[str, Any],
                 meta: Mapping[str, Any]) -> int | None:
    """How many gates of a checkpoint are closed, None if it has no gates.

    Args:
        analysis (Analysis): Of the model that it is loaded into.
        state (Mapping[str, Any]): State dict of the checkpoint, unwrapped.
        meta (Mapping[str, Any]): Its meta.

    Raises:
        ValueError: If its gates are not those of the model.
    """
    if 'widths' in meta:
        raise ValueError(
            'checkpoint: expected the weights of a model with all its '
            'channels, but got those of an export; use them with the config '
            'beside them, or change load_from')
    theta = state.get(THETA)
    if theta is None:
        return None
    if len(theta) != analysis.num_gates or meta.get('groups') not in (
            None, fingerprint(analysis)):
        other = other_versions(meta)
        raise ValueError(
            f'checkpoint: expected the {analysis.num_gates} gates of this '
            f'model, but got {len(theta)} that stand for other channels; '
            'change load_from, the model, or the versions it was trained with'
            + (f': {other}' if other else ''))
    return int((state[CLOSED] > 0).sum())


def refuse_others_(network: nn.Module, fitting: Mapping[str, tuple[int, ...]
                                                        | None]) -> None:
    """Let a network refuse state dicts of another one, in place.

    mmengine loads what fits and logs the rest, which leaves random weights
    behind. That is right for fine-tuning and wrong for gates and widths.

    Args:
        network (nn.Module): With gates, or pruned.
        fitting (Mapping[str, tuple[int, ...] | None]): What must fit, or be
            absent: names of tensors, or of modules of them, and along which
            axes; None are all.
    """
    inside = {
        key: axes
        for name, axes in fitting.items()
        for key in network.state_dict()
        if key == name or key.startswith(f'{name}.')
    }
    network._register_load_state_dict_pre_hook(
        functools.partial(_refuse, inside), with_module=True)


def _refuse(fitting: Mapping[str, tuple[int, ...] | None], network: nn.Module,
            state: Mapping[str, Tensor], prefix: str, *_: Any) -> None:
    """Raise a ValueError if a state dict is of another network."""
    wanted = network.state_dict()
    if state and not any(prefix + key in state for key in wanted):
        raise ValueError(
            'checkpoint: expected weights of the model in the config, but got '
            f'none of its {len(wanted)}, and others ({next(iter(state))} '
            'first); pass the checkpoint and the config of the same training')
    for key in filter(wanted.__contains__, fitting):
        came = state.get(prefix + key)
        if came is not None and not _fits(came.shape, wanted[key].shape,
                                          fitting[key]):
            raise ValueError(
                f'checkpoint: expected {key} of the shape in the config, '
                f'{list(wanted[key].shape)}, but got {list(came.shape)}; pass '
                'the checkpoint and the config of the same training or export')


def _fits(came: torch.Size, wanted: torch.Size,
          axes: tuple[int, ...] | None) -> bool:
    """Whether two shapes are equal along some axes; None are all."""
    if axes is None or len(came) != len(wanted):
        return came == wanted
    return all(came[axis] == wanted[axis] for axis in axes)


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
    """Say which packages a checkpoint was made with other versions of."""
    then, now = meta.get('versions') or {}, versions()
    changed = [
        f'{name} {then[name]} (here {now.get(name, "none")})' for name in then
        if then[name] != now.get(name)
    ]
    return ', '.join(changed) or None


def save_exported(path: Path, state: Mapping[str, Tensor],
                  widths: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
    """Write a pruned checkpoint, of tensors and plain types only.

    Args:
        path (Path): Where.
        state (Mapping[str, Tensor]): The pruned model's.
        widths (Mapping[str, Any]): Its widths.
        meta (Mapping[str, Any]): Of the checkpoint that it is made from.

    Raises:
        OSError: If it cannot be written.
    """
    content = io.BytesIO()
    torch.save(
        dict(
            meta=dict(
                gdp_mmseg=__version__,
                versions=versions(),
                sha256=checksum(state),
                widths=widths,
                dataset_meta=plain(meta.get('dataset_meta') or {})),
            state_dict=state), content)
    write_whole(path, content.getvalue())


def plain(value: Any) -> Any:
    """Plain types only, which ``weights_only=True`` loads."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(plain(item) for item in value)
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    return value


def pointed_checkpoint(folder: Path) -> tuple[str, int] | None:
    """What ``last_checkpoint`` of a work folder says, and when it was written.

    mmengine writes it after the checkpoint that it names.
    """
    pointer = folder / 'last_checkpoint'
    if not pointer.is_file():
        return None
    return pointer.read_text().strip(), pointer.stat().st_mtime_ns


def mend_last_checkpoint(folder: Path, warn: Callable[[str], None]) -> None:
    """Let ``last_checkpoint`` name a whole file, which a resume starts from.

    A process that is killed while it saves leaves half a file, or an empty
    ``last_checkpoint``; a full disk likewise. The newest whole checkpoint
    takes its place then.

    Args:
        folder (Path): Work folder of a training.
        warn (Callable[[str], None]): Gets a line if something was mended.

    Raises:
        ValueError: If a checkpoint is named, and no whole one is there.
    """
    found = pointed_checkpoint(folder)
    if found is None or '://' in found[0]:
        return
    named = Path(found[0]) if found[0] else folder
    wrong = _what_is_wrong(named)
    if found[0] and (wrong is None or named.is_dir()):
        return
    others = sorted(
        {
            path
            for place in (folder, named.parent)
            for path in place.glob('*.pth')
            # Has no optimizer to go on with.
            if not path.name.startswith('best_')
        },
        key=lambda path: path.stat().st_mtime_ns,
        reverse=True)
    whole = next((path for path in others if not _what_is_wrong(path)), None)
    came = f'{named.name} ({wrong})' if found[0] else 'an empty file'
    if whole is None:
        raise ValueError(
            f'--resume: expected a whole checkpoint in {folder}, but '
            f'last_checkpoint names {came}, and there is no other; train '
            'without --resume, or into another --work-dir')
    write_whole(folder / 'last_checkpoint', str(whole).encode())
    warn(f'GDP: expected a whole checkpoint in {folder}, but last_checkpoint '
         f'names {came}; resuming from {whole.name}, the newest whole one')


def _what_is_wrong(path: Path) -> str | None:
    """What is wrong with a checkpoint file, None if it is whole."""
    try:
        _raise_if_damaged(path)
    except FileNotFoundError:
        return 'missing'
    except (OSError, zipfile.BadZipFile) as error:
        return f'damaged: {error}'
    return None


@register_backend(WHOLE)
class WholeFileBackend(LocalBackend):
    """Local files that are there as a whole or not at all.

    mmengine's CheckpointHook removes a checkpoint that is one too many before
    it writes the next: a kill in between would leave none. Here it goes when
    the next is complete.
    """

    _outdated: ClassVar[list[str]] = []

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write a whole file; then remove what was to be removed."""
        Path(filepath).parent.mkdir(parents=True, exist_ok=True)
        write_whole(filepath, obj)
        while self._outdated:
            outdated = Path(self._outdated.pop())
            if outdated.resolve() != Path(filepath).resolve():
                outdated.unlink(missing_ok=True)

    def remove(self, filepath: str | Path) -> None:
        """Remove a file when the next one is written."""
        self._outdated.append(str(filepath))
