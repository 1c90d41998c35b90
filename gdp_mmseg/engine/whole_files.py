"""Checkpoint files that are complete or absent, and the pointer to them."""
from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Callable, ClassVar

from mmengine.fileio import LocalBackend, register_backend

from ..files import raise_if_damaged, write_whole

WHOLE = 'gdp_mmseg.whole'


def pointed_checkpoint(folder: Path) -> tuple[str, int] | None:
    """Read ``last_checkpoint`` of a work folder.

    mmengine writes this file after the checkpoint that it names.

    Returns:
        tuple[str, int], optional: Its content and the time it was written, in
        nanoseconds; None if there is no such file.
    """
    pointer = folder / 'last_checkpoint'
    if not pointer.is_file():
        return None
    return pointer.read_text().strip(), pointer.stat().st_mtime_ns


def mend_last_checkpoint(folder: Path, warn: Callable[[str], None]) -> None:
    """Make ``last_checkpoint`` name a complete file, in place.

    A resume starts from the file that it names. A process that is killed
    while it saves, and a full disk, leave half a file or an empty
    ``last_checkpoint``. Then the newest complete checkpoint is named instead.

    Args:
        folder (Path): Work folder of a training.
        warn (Callable[[str], None]): Called with a line if another file is
            named than before.

    Raises:
        ValueError: If there is a ``last_checkpoint``, but no complete
            checkpoint.
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
            # mmengine saves these without an optimizer.
            if not path.name.startswith('best_')
        },
        key=lambda path: path.stat().st_mtime_ns,
        reverse=True)
    whole = next((path for path in others if not _what_is_wrong(path)), None)
    came = f'{named.name} ({wrong})' if found[0] else 'an empty file'
    if whole is None:
        raise ValueError(
            f'--resume: expected a complete checkpoint in {folder}, but '
            f'last_checkpoint names {came}, and there is no other; train '
            'without --resume, or into another --work-dir')
    write_whole(folder / 'last_checkpoint', str(whole).encode())
    warn('GDP: expected a complete checkpoint in '
         f'{folder}, but last_checkpoint names {came}; resuming from '
         f'{whole.name}, the newest complete one')


def _what_is_wrong(path: Path) -> str | None:
    """Describe the damage of a checkpoint file; None if it is complete."""
    try:
        raise_if_damaged(path)
    except FileNotFoundError:
        return 'missing'
    except (OSError, zipfile.BadZipFile) as error:
        return f'damaged: {error}'
    return None


@register_backend(WHOLE)
class WholeFileBackend(LocalBackend):
    """Backend for local files that are complete or absent.

    mmengine's CheckpointHook removes an outdated checkpoint before it writes
    the next one, so that a kill in between would leave none. Here the
    outdated one is removed when the next one in its folder is complete.
    """

    # mmengine makes a new backend for each call, so the class remembers the
    # outdated files, by folder.
    _outdated: ClassVar[dict[Path, set[Path]]] = {}

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write a complete file, then remove the outdated ones beside it."""
        path = Path(filepath).resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, obj)
        for outdated in self._outdated.pop(path.parent, set()) - {path}:
            outdated.unlink(missing_ok=True)

    def remove(self, filepath: str | Path) -> None:
        """Remember a file that the next one in its folder replaces."""
        path = Path(filepath).resolve()
        self._outdated.setdefault(path.parent, set()).add(path)

    @classmethod
    def forget(cls, folder: Path) -> None:
        """Forget the outdated files that another training left in a folder."""
        cls._outdated.pop(folder.resolve(), None)
