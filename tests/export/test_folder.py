"""Files and folders: whole or not there, whoever else writes."""
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gdp_mmseg.export.folder import check_out_dir, new_folder, writing

# Fills a folder until it is killed.
SLOW = """
import sys, time
from pathlib import Path
from gdp_mmseg.export.folder import new_folder
with new_folder(Path(sys.argv[1])) as partial:
    (partial / 'half').write_text('')
    print('half', flush=True)
    sys.stdin.read()
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def half_way(out_dir: Path) -> subprocess.Popen[str]:
    """A process that has begun to fill a folder, and waits."""
    process = subprocess.Popen(
        [sys.executable, '-c', SLOW, str(out_dir)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == 'half\n'
    return process


@pytest.mark.parametrize('place', ['pair', 'a/b/pair'])
@pytest.mark.parametrize('empty', [False, True])
def test_folder_is_there_when_it_is_filled(tmp_path: Path, place: str,
                                           empty: bool) -> None:
    out_dir = tmp_path / place
    if empty:
        out_dir.mkdir(parents=True)
    with new_folder(out_dir) as partial:
        (partial / 'a').write_text('1')
        assert not (out_dir / 'a').exists()
    assert names(out_dir) == ['a']
    assert names(out_dir.parent) == ['pair']


@pytest.mark.parametrize('error', [ValueError, KeyboardInterrupt])
def test_folder_that_could_not_be_filled_is_not_there(
        tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), new_folder(tmp_path / 'pair') as partial:
        (partial / 'a').write_text('1')
        raise error
    assert names(tmp_path) == []


def test_errors_of_others_pass_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match='no image'):
        with new_folder(tmp_path / 'pair'):
            raise FileNotFoundError('no image')


def test_folder_of_the_living_stays_and_of_the_dead_goes(
        tmp_path: Path) -> None:
    process = half_way(tmp_path / 'pair')
    try:
        left, = names(tmp_path)
        with new_folder(tmp_path / 'pair') as partial:
            assert names(tmp_path) == sorted([left, partial.name])
        assert names(tmp_path) == sorted([left, 'pair'])
    finally:
        process.kill()
        process.wait()
    # It was never asked to stop.
    assert names(tmp_path) == sorted([left, 'pair'])
    (tmp_path / 'pair').rmdir()
    with new_folder(tmp_path / 'pair'):
        pass
    assert names(tmp_path) == ['pair']


def test_folders_of_other_names_stay(tmp_path: Path) -> None:
    (tmp_path / '.pairs.partial-1').mkdir()
    (tmp_path / '.p*r.partial-1').mkdir()
    with new_folder(tmp_path / 'p*r'):
        pass
    assert names(tmp_path) == ['.pairs.partial-1', 'p*r']


def test_first_of_two_wins_and_the_second_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='--out-dir.*holds files'):
        with new_folder(tmp_path / 'pair') as second:
            (second / 'a').write_text('second')
            with new_folder(tmp_path / 'pair') as first:
                (first / 'a').write_text('first')
    assert (tmp_path / 'pair/a').read_text() == 'first'
    assert names(tmp_path) == ['pair']


@pytest.mark.parametrize('place', ['taken/pair', '/proc/pair'])
def test_folder_that_cannot_be_made_is_an_error(tmp_path: Path,
                                                place: str) -> None:
    (tmp_path / 'taken').write_text('years of work')
    with pytest.raises(ValueError, match='--out-dir: expected'):
        with new_folder(tmp_path / place):
            pass
    assert (tmp_path / 'taken').read_text() == 'years of work'


def test_full_disk_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='No space left on device; make room'):
        with writing(tmp_path / 'pair'):
            Path('/dev/full').write_text('a')


def test_folder_that_a_link_names_is_filled(tmp_path: Path) -> None:
    (tmp_path / 'real').mkdir()
    link = tmp_path / 'link'
    link.symlink_to(tmp_path / 'real')
    check_out_dir(link)
    with new_folder(link) as partial:
        (partial / 'a').write_text('1')
    assert link.is_symlink() and names(tmp_path / 'real') == ['a']


def test_folder_that_one_is_in_is_refused(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in (Path('.'), tmp_path):
        with pytest.raises(ValueError, match='is in use'):
            check_out_dir(path)


def test_folder_that_a_config_cannot_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='without an apostrophe'):
        check_out_dir(tmp_path / "user's")


def test_folder_that_is_a_disk_is_refused(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_out_dir(tmp_path)
    monkeypatch.setattr(Path, 'is_mount', lambda _: True)
    with pytest.raises(ValueError, match='is in use'):
        check_out_dir(tmp_path)
