"""Checkpoints: what is damaged, foreign or another's is never taken."""
from __future__ import annotations

import os
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip('mmseg')

import numpy as np
import torch
from mmengine.logging import HistoryBuffer

from gdp_mmseg.engine.checkpoint import (checksum, other_versions,
                                         read_checkpoint, save_exported,
                                         versions)
from gdp_mmseg.engine.whole_files import WholeFileBackend, mend_last_checkpoint

STATE = dict(
    weight=torch.arange(5000.),
    half=torch.ones(3, 2, dtype=torch.bfloat16),
    closed=torch.tensor([True, False]),
    steps=torch.tensor(7))


@pytest.fixture()
def exported(tmp_path: Path) -> Path:
    path = tmp_path / 'pruned.pth'
    palette = np.array([[0, 0, 0]])
    meta = dict(dataset_meta=dict(classes=('a', ), palette=palette), cfg='x')
    save_exported(path, STATE, dict(conv=[2, 3]), meta)
    return path


def test_exported_checkpoint_is_read_as_it_was_written(exported: Path) -> None:
    state, meta = read_checkpoint(str(exported))
    assert all(torch.equal(state[name], STATE[name]) for name in STATE)
    assert meta['widths'] == dict(conv=[2, 3])
    assert meta['dataset_meta'] == dict(classes=('a', ), palette=[[0, 0, 0]])
    assert meta['sha256'] == checksum(STATE)
    assert meta['versions'] == versions()
    assert meta['versions']['torch'] == torch.__version__.partition('+')[0]
    # Nothing of the machine that made it.
    assert 'cfg' not in meta
    assert str(exported.parent).encode() not in exported.read_bytes()


@pytest.mark.parametrize('other', [
    dict(STATE, weight=STATE['weight'] + 1),
    dict(STATE, weight=STATE['weight'].double()),
    dict(STATE, weight=STATE['weight'].reshape(2, -1)),
    dict(STATE, weights=torch.zeros(1)),
    {
        f'{name}_': value
        for name, value in STATE.items()
    },
])
def test_checksum_is_of_names_kinds_shapes_and_bytes(other: Any) -> None:
    assert checksum(other) != checksum(STATE)
    assert checksum(dict(STATE)) == checksum(STATE)


@pytest.mark.parametrize('share', [0., 0.1, 0.5, 0.9, 0.999])
def test_truncated_checkpoint_is_an_error(exported: Path,
                                          share: float) -> None:
    os.truncate(exported, int(exported.stat().st_size * share))
    with pytest.raises(ValueError, match='pruned.pth cannot be read'):
        read_checkpoint(str(exported))


def test_no_flipped_bit_passes_for_a_weight(exported: Path) -> None:
    """It is noticed, or was in none of what is read."""
    content = exported.read_bytes()
    noticed = 0
    for place in range(7, len(content), len(content) // 100):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        exported.write_bytes(flipped)
        try:
            state, _ = read_checkpoint(str(exported))
        except ValueError as error:
            assert 'checkpoint: expected' in str(error)
            noticed += 1
        else:
            assert checksum(state) == checksum(STATE)
    assert noticed > 80


def test_other_weights_than_were_exported_are_an_error(exported: Path) -> None:
    content = torch.load(exported, weights_only=True)
    content['state_dict']['weight'][0] = 1
    torch.save(content, exported)
    with pytest.raises(ValueError, match='SHA-256'):
        read_checkpoint(str(exported))


def test_other_versions_are_named() -> None:
    assert other_versions({}) is None
    assert other_versions(dict(versions=versions())) is None
    then = dict(versions(), torch='1.13.1', mmdeploy='1.0')
    assert other_versions(dict(versions=then)) == (
        f'torch 1.13.1 (here {versions()["torch"]}), mmdeploy 1.0 (here none)')


def _checkpoints(folder: Path, *numbers: int) -> None:
    """Whole ones, the last of them the newest."""
    for age, number in enumerate(numbers):
        path = folder / f'iter_{number}.pth'
        torch.save(dict(state_dict={}, meta=dict(iter=number)), path)
        os.utime(path, (1000 + age, 1000 + age))


@pytest.mark.parametrize(
    'pointed, damaged, expected',
    [
        ('iter_3.pth', [], 'iter_3.pth'),
        # It is where the training was, whatever else is newer.
        ('iter_2.pth', [], 'iter_2.pth'),
        ('iter_3.pth', ['iter_3.pth'], 'iter_2.pth'),
        ('iter_3.pth', ['iter_3.pth', 'iter_2.pth'], 'iter_1.pth'),
        ('iter_4.pth', [], 'iter_3.pth'),
        ('', [], 'iter_3.pth'),
        ('', ['iter_3.pth'], 'iter_2.pth'),
    ])
def test_last_checkpoint_names_the_newest_whole_file(tmp_path: Path,
                                                     pointed: str,
                                                     damaged: list[str],
                                                     expected: str) -> None:
    _checkpoints(tmp_path, 1, 2, 3)
    # No optimizer goes with it.
    torch.save({}, tmp_path / 'best_mIoU_iter_3.pth')
    for name in damaged:
        path = tmp_path / name
        times = path.stat().st_atime, path.stat().st_mtime
        os.truncate(path, path.stat().st_size // 2)
        os.utime(path, times)
    pointer = tmp_path / 'last_checkpoint'
    pointer.write_text(str(tmp_path / pointed) if pointed else '')
    said: list[str] = []
    mend_last_checkpoint(tmp_path, said.append)
    assert pointer.read_text() == str(tmp_path / expected)
    assert len(said) == (pointed != expected)
    assert all(expected in line for line in said)


def test_no_whole_checkpoint_is_an_error(tmp_path: Path) -> None:
    _checkpoints(tmp_path, 1)
    os.truncate(tmp_path / 'iter_1.pth', 10)
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'iter_1.pth'))
    with pytest.raises(ValueError, match='--resume: .*iter_1.pth.*damaged'):
        mend_last_checkpoint(tmp_path, print)


@pytest.mark.parametrize('pointed', [None, 's3://bucket/iter_3.pth'])
def test_what_is_not_here_is_left_alone(tmp_path: Path,
                                        pointed: str | None) -> None:
    _checkpoints(tmp_path, 1)
    pointer = tmp_path / 'last_checkpoint'
    if pointed is not None:
        pointer.write_text(pointed)
    mend_last_checkpoint(tmp_path, print)
    assert pointer.exists() == (pointed is not None)
    assert pointed is None or pointer.read_text() == pointed


def test_a_file_is_removed_when_the_next_is_there(tmp_path: Path) -> None:
    backend = WholeFileBackend()
    old, new = tmp_path / 'a/iter_1.pth', tmp_path / 'a/iter_2.pth'
    backend.put(b'1', old)
    backend.remove(old)
    (tmp_path / 'a/iter_2.pth.partial').symlink_to('/dev/full')
    with pytest.raises(OSError):
        WholeFileBackend().put(b'2', new)
    assert old.read_bytes() == b'1' and not new.exists()
    WholeFileBackend().put(b'2', new)
    assert not old.exists() and new.read_bytes() == b'2'


def test_a_file_that_is_written_anew_is_not_removed(tmp_path: Path) -> None:
    backend = WholeFileBackend()
    path = tmp_path / 'iter_1.pth'
    for content in (b'1', b'2'):
        backend.put(content, path)
        backend.remove(path)
    backend.put(b'3', path)
    assert path.read_bytes() == b'3'


def test_a_file_outlives_a_training_that_ended_before_the_next(
        tmp_path: Path) -> None:
    """What one training left to remove is nothing to another."""
    kept, other = tmp_path / 'a/iter_1.pth', tmp_path / 'b/iter_1.pth'
    WholeFileBackend().put(b'1', kept)
    WholeFileBackend().remove(kept)
    WholeFileBackend().put(b'2', other)
    assert kept.exists()
    WholeFileBackend.forget(kept.parent)
    WholeFileBackend().put(b'3', tmp_path / 'a/iter_2.pth')
    assert kept.exists()


def test_foreign_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / 'c.pth'
    path.write_bytes(b'Dear diary,')
    with pytest.raises(ValueError, match=re.escape(str(path))):
        read_checkpoint(str(path))


@pytest.mark.parametrize('there, here', [(b'numpy.core', b'numpy._core'),
                                         (b'numpy._core', b'numpy.core')])
def test_log_buffers_of_other_versions_of_numpy_are_read(
        there: bytes, here: bytes, tmp_path: Path) -> None:
    buffer = HistoryBuffer([1., 2.], [1, 1])
    state = dict(weight=torch.ones(2))
    torch.save(
        dict(
            state_dict=state,
            message_hub=dict(loss=buffer, last=np.float64(1))),
        tmp_path / 'saved.pth')
    with zipfile.ZipFile(tmp_path / 'saved.pth') as saved, zipfile.ZipFile(
            tmp_path / 'other.pth', 'w') as other:
        for name in saved.namelist():
            content = saved.read(name)
            if name.endswith('data.pkl'):
                assert b'numpy._core' in content or b'numpy.core' in content
                content = content.replace(here, there)
            other.writestr(name, content)
    read, _ = read_checkpoint(str(tmp_path / 'other.pth'))
    assert torch.equal(read['weight'], state['weight'])


def test_state_dict_alone_is_a_checkpoint(tmp_path: Path) -> None:
    torch.save({'module.weight': torch.ones(2)}, tmp_path / 'saved.pth')
    state, meta = read_checkpoint(str(tmp_path / 'saved.pth'))
    assert list(state) == ['weight'] and meta == {}
