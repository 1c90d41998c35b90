"""Output folders of an export, which are complete or absent."""
from __future__ import annotations

import contextlib
import glob
import os
import shutil
import tempfile
from pathlib import Path
from typing import Iterator


def check_out_dir(out_dir: Path) -> None:
    """Check that a folder is new, or empty and replaceable.

    Raises:
        ValueError: If it is not.
    """
    if out_dir.exists() and not out_dir.is_dir():
        raise ValueError(f'--out-dir: expected a folder, but got the file '
                         f'{out_dir}; choose another')
    if out_dir.is_dir() and any(out_dir.iterdir()):
        raise ValueError(f'--out-dir: expected an empty or new folder, but '
                         f'{out_dir} holds files; choose another')
    if "'" in str(out_dir.resolve()):
        raise ValueError('--out-dir: expected a path without an apostrophe, '
                         'because mmengine cannot read a config that names '
                         f'its folder otherwise, but got {out_dir}; choose '
                         'another')
    if out_dir.is_mount() or out_dir.resolve() == Path.cwd():
        raise ValueError(f'--out-dir: expected a folder that can be replaced '
                         f'as a whole, but {out_dir} is in use; choose a new '
                         'one in it')


@contextlib.contextmanager
def new_folder(out_dir: Path) -> Iterator[Path]:
    """Make a folder to fill, which becomes ``out_dir`` when it is complete.

    Until then it is named ``.<name>.partial-*`` and lies beside ``out_dir``. A
    process that is killed leaves it behind, and the next one that writes the
    same ``out_dir`` removes it. A lock, which ends with the process, tells
    whether a folder is still in use.

    Args:
        out_dir (Path): New or empty; nothing that it holds is overwritten.

    Raises:
        ValueError: If the folder cannot be made, or another came first.
    """
    # Replace the folder that a link points to, not the link.
    out_dir = out_dir.resolve()
    anchor = next(folder for folder in out_dir.parents if folder.is_dir())
    prefix = f'.{out_dir.name}.partial-'
    with contextlib.ExitStack() as held:
        # Otherwise another process could remove a folder before it is locked.
        with writing(out_dir), _locked(anchor, wait=True):
            for left in anchor.glob(f'{glob.escape(prefix)}*'):
                with _locked(left) as abandoned:
                    if abandoned:
                        shutil.rmtree(left, ignore_errors=True)
            partial = Path(tempfile.mkdtemp(prefix=prefix, dir=anchor))
            held.callback(shutil.rmtree, partial, ignore_errors=True)
            held.enter_context(_locked(partial))
        yield partial
        with writing(out_dir):
            partial.chmod(0o755)
            out_dir.parent.mkdir(parents=True, exist_ok=True)
            # Renaming fails if the folder is not empty any more.
            partial.replace(out_dir)


@contextlib.contextmanager
def writing(out_dir: Path) -> Iterator[None]:
    """Turn an error of writing into one that names the folder.

    Raises:
        ValueError: If something cannot be written.
    """
    try:
        yield
    except OSError as error:
        # Another process may have filled the folder in the meantime.
        check_out_dir(out_dir)
        raise ValueError(
            f'--out-dir: expected to write {out_dir}, but got: '
            f'{error.strerror or error}; make room there, or choose another'
        ) from error


@contextlib.contextmanager
def _locked(folder: Path, wait: bool = False) -> Iterator[bool]:
    """Hold a folder for this process alone; yield whether that worked."""
    # Windows has no fcntl, and only an export needs it.
    import fcntl
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        free = True
    # Another process holds it, or the file system has no locks.
    except OSError:
        free = False
    try:
        yield free
    finally:
        os.close(handle)
