"""Files that are complete or absent."""
from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any


def write_json(path: Path, content: Any) -> None:
    """Write JSON to a file that is complete or absent."""
    write_whole(path, (json.dumps(content, indent=1) + '\n').encode())


def write_whole(path: str | Path, content: bytes) -> None:
    """Write bytes to a file that is complete or absent.

    The content goes to a temporary name first and is flushed to the disk;
    then the file is renamed.

    Raises:
        OSError: If it cannot be written. An earlier file is left unchanged.
    """
    partial = Path(f'{path}.partial')
    try:
        with open(partial, 'wb') as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def raise_if_damaged(path: str | Path) -> None:
    """Check each part of a zip archive against its CRC-32.

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
