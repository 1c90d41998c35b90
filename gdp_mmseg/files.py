"""Files and folders that are there as a whole or not at all."""
from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_json(path: Path, content: Any) -> None:
    """Write to a temporary name, then rename: never half a file."""
    write_whole(path, (json.dumps(content, indent=1) + '\n').encode())


def write_whole(path: str | Path, content: bytes) -> None:
    """Write to a temporary name, to the disk, then rename.

    Raises:
        OSError: If it cannot be written; what was there before still is.
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
