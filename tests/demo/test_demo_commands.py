"""Commands of the demo run together, and end together."""
from __future__ import annotations

import time
from pathlib import Path

import pytest

from gdp_mmseg.demo.commands import Command, run_together

WAIT = 'import time; time.sleep(60)'
FAIL = 'raise SystemExit(3)'
# Ends when the other has begun, and not before.
MEET = '''
import os, pathlib, sys, time
mine, other = map(pathlib.Path, sys.argv[1:])
mine.touch()
while not other.exists():
    time.sleep(0.01)
print('threads', os.environ['OMP_NUM_THREADS'])
print('met', end='', flush=True)
print(' the other')
'''

WORK = MEET + 'while time.process_time() < 0.5: pass'


def command(folder: Path, name: str, code: str, seen: list[str], *arguments:
            Path) -> Command:
    """A script of this code, whose lines are collected."""
    script = folder / f'{name}.py'
    script.write_text(code)
    return Command([str(script), *map(str, arguments)], folder / f'{name}.log',
                   seen.append)


def test_commands_run_at_the_same_time_with_one_thread_each(
        tmp_path: Path) -> None:
    one, other = tmp_path / 'one', tmp_path / 'other'
    seen: list[list[str]] = [[], []]
    run_together([
        command(tmp_path, 'a', MEET, seen[0], one, other),
        command(tmp_path, 'b', MEET, seen[1], other, one)
    ])
    assert seen == [['threads 1', 'met the other']] * 2
    assert (tmp_path / 'a.log').read_text() == 'threads 1\nmet the other\n'


def test_processor_time_of_each_command_is_its_own(tmp_path: Path) -> None:
    waiting, working = run_together([
        command(tmp_path, 'a', MEET, [], tmp_path / 'one', tmp_path / 'other'),
        command(tmp_path, 'b', WORK, [], tmp_path / 'other', tmp_path / 'one')
    ])
    assert working - waiting > 0.2


@pytest.mark.parametrize('codes', [(WAIT, FAIL), (FAIL, WAIT)])
def test_failure_of_one_ends_the_other(
        codes: tuple[str, str], tmp_path: Path,
        capsys: pytest.CaptureFixture[str]) -> None:
    start = time.monotonic()
    with pytest.raises(SystemExit) as end:
        run_together([
            command(tmp_path, name, code, [])
            for name, code in zip(('a', 'b'), codes)
        ])
    assert time.monotonic() - start < 30
    assert end.value.code == 2
    failed = tmp_path / f'{"ab"[codes.index(FAIL)]}.log'
    said = capsys.readouterr().err
    assert 'status 3' in said and str(failed) in said
