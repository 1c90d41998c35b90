"""A file is whole, or what it was before."""
from __future__ import annotations

import os
from pathlib import Path

import pytest

from gdp_mmseg.files import write_whole


def test_file_that_cannot_be_written_is_what_it_was(tmp_path: Path) -> None:
    path = tmp_path / 'a'
    write_whole(path, b'1')
    (tmp_path / 'a.partial').symlink_to('/dev/full')
    with pytest.raises(OSError):
        write_whole(path, b'2')
    assert path.read_bytes() == b'1'
    assert os.listdir(tmp_path) == ['a']
    write_whole(path, b'2')
    assert path.read_bytes() == b'2'
