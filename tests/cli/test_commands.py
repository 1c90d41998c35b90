"""Commands of the package: their list, their names in messages, their help."""
from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip('mmseg')

import gdp_mmseg
from gdp_mmseg.__main__ import COMMANDS, main

from helpers import ROOT, TOOLS
from helpers.project import Project

PACKAGE = ROOT / 'gdp_mmseg'
LIGHT = '''
import sys
from gdp_mmseg.__main__ import main
try:
    main()
finally:
    heavy = {'torch', 'mmengine', 'mmseg'} & set(sys.modules)
    assert not heavy, heavy
'''


def python(*arguments: object) -> subprocess.CompletedProcess[str]:
    """A Python process on this package."""
    return subprocess.run([sys.executable, *map(str, arguments)],
                          cwd=ROOT,
                          capture_output=True,
                          text=True)


def test_help_lists_the_commands_without_a_library() -> None:
    done = python('-c', LIGHT, '--help')
    assert done.returncode == 0, done.stderr
    lines = [line.split()[0] for line in done.stdout.splitlines() if line]
    assert set(COMMANDS) <= set(lines)


@pytest.mark.parametrize('name, end', [
    ('exporrt', "but got exporrt; did you mean 'export'?\n"),
    ('xyz', 'but got xyz\n'),
])
def test_unknown_command_is_one_line_at_once(name: str, end: str) -> None:
    done = python('-c', LIGHT, name)
    assert done.returncode == 2
    assert done.stderr.count('\n') == 1 and done.stderr.endswith(end)
    assert done.stderr.startswith('gdp-mmseg: error: expected a command, one ')


def test_module_names_itself_as_it_was_called() -> None:
    done = python('-m', 'gdp_mmseg')
    assert done.returncode == 2
    assert done.stderr.startswith('python -m gdp_mmseg: error: ')


def test_error_is_the_only_line_also_behind_the_libraries_warnings(
        project: Project) -> None:
    """The model is built first, which imports all of mmsegmentation."""
    done = python('-m', 'gdp_mmseg', 'groups', project.gated, '--cfg-options',
                  'model.gdp.ignore=[decode_haed]')
    assert done.returncode == 2
    assert done.stderr.count('\n') == 1, done.stderr
    assert "did you mean 'decode_head'?" in done.stderr


@pytest.mark.parametrize('name', ['files', 'export', 'cli.errors'])
def test_module_without_a_command_says_so(name: str) -> None:
    done = python('-m', f'gdp_mmseg.{name}', '--help')
    assert done.returncode == 1
    assert done.stderr == (f'gdp_mmseg.{name} is no command; python -m '
                           'gdp_mmseg --help lists the commands\n')


def test_every_module_that_can_be_run_is_known_as_a_command() -> None:
    runnable = {
        '.'.join(path.relative_to(ROOT).with_suffix('').parts)
        for path in PACKAGE.rglob('*.py')
        if "if __name__ == '__main__':" in path.read_text()
    }
    assert runnable == {*gdp_mmseg._COMMANDS}


@pytest.mark.parametrize('name', COMMANDS)
def test_command_shows_its_flags_and_names_itself(
        name: str, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, 'argv', ['bin/gdp-mmseg', name, '--help'])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f'usage: gdp-mmseg {name} [-h]')
    monkeypatch.setattr(sys, 'argv', ['bin/gdp-mmseg', name, '--no-flag'])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert f'gdp-mmseg {name}: error: ' in capsys.readouterr().err


def test_error_about_a_file_names_the_command(
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, 'argv', ['gdp-mmseg', 'groups', 'absent.py'])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert capsys.readouterr().err == (
        'gdp-mmseg groups: error: expected a config file, but got absent.py, '
        'which does not exist; pass the path of a config\n')


@pytest.mark.parametrize('name', COMMANDS)
def test_tool_is_the_same_command(name: str, monkeypatch: pytest.MonkeyPatch,
                                  capsys: pytest.CaptureFixture[str]) -> None:
    shown = {}
    # A file named onnx.py would be imported in place of the package.
    tool = dict(onnx='to_onnx').get(name, name)
    for path, usage in ((TOOLS / f'{tool}.py', f'usage: {tool}.py '),
                        (PACKAGE / '__main__.py',
                         f'usage: python -m gdp_mmseg {name} ')):
        arguments = [name] if path.name == '__main__.py' else []
        monkeypatch.setattr(sys, 'argv', [str(path), *arguments, '--help'])
        with pytest.raises(SystemExit) as end:
            if arguments:
                runpy.run_module('gdp_mmseg', run_name='__main__')
            else:
                runpy.run_path(str(path), run_name='__main__')
        assert end.value.code == 0
        text = capsys.readouterr().out
        assert text.startswith(usage)
        shown[usage] = text.partition('\n\n')[2]
    first, other = shown.values()
    assert first == other != ''


@pytest.mark.parametrize('name', ['groups', 'check', 'train', 'export'])
def test_module_of_a_command_is_the_command(
        name: str, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    path = PACKAGE / 'cli' / f'{name}.py'
    monkeypatch.setattr(sys, 'argv', [str(path), '--help'])
    with pytest.raises(SystemExit) as end:
        runpy.run_module(f'gdp_mmseg.cli.{name}', run_name='__main__')
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith(f'usage: {name}.py ')


def test_demo_finds_its_configs() -> None:
    from gdp_mmseg.demo.demo import DENSE, GATED
    assert DENSE.is_file() and GATED.is_file()
    assert DENSE.parent == Path(ROOT, 'configs')
