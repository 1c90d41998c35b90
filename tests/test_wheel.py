"""Source distribution and wheel: complete, and right away from the clone."""
from __future__ import annotations

import configparser
import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from helpers import ROOT

LEFT_OUT = ('.*', 'build', 'dist', 'data', 'work_dirs', '*.egg-info',
            '__pycache__')
IN_MIM = 'gdp_mmseg/.mim'
TOOLS = {
    f'{name}.py'
    for name in ('check', 'demo', 'export', 'groups', 'make_demo_data', 'test',
                 'to_onnx', 'train')
} | {
    f'{kind}_{name}.sh'
    for kind in ('dist', 'slurm')
    for name in ('test', 'train')
}
# Runs command lines one after the other in one process, which saves imports.
RUN_EACH = '''
import contextlib, io, json, sys
from gdp_mmseg.__main__ import main
done = []
for arguments in json.loads(sys.argv[1]):
    sys.argv = ['gdp-mmseg', *arguments]
    status, out, err = 0, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            status = end.code
    done.append((status, out.getvalue(), err.getvalue()))
import gdp_mmseg
print(json.dumps([gdp_mmseg.__file__, done]))
'''
# Options over the gated config, and what the line must say.
MISTAKES = {
    'model.gdp.tagret=0.3': ("got 'tagret'", "did you mean 'target'?"),
    'model.gdp.target=40': ('gdp.target', 'got 40'),
    'model.gdp.target=1e-6': ('gdp.target', 'got 1e-06'),
    'model.gdp.ignore=decode_head': ('gdp.ignore', "got 'decode_head'"),
    'model.gdp.ignore=[decode_haed]': ('ignore', "mean 'decode_head'?"),
    'model.gdp.phases=[0.5,0.5,0.5]': ('gdp.phases', 'add up to 1'),
    'model.type=gdp_mmseg.GDPModle':
    ('model.type', "did you mean 'gdp_mmseg.GDPModel'?"),
    'model.base=EncoderDecodr':
    ('model.base', "did you mean 'EncoderDecoder'?"),
    'default_hooks.gdp.type=gdp_mmseg.GDPHok':
    ('default_hooks.gdp.type', "did you mean 'gdp_mmseg.GDPHook'?"),
    'default_hooks.gdp.type=LoggerHook': ('got none', 'gdp_mmseg.GDPHook'),
    'model.backbone.type=ResNetV1cc': ('type', "did you mean 'ResNetV1c'?"),
}


@pytest.fixture(scope='module')
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked source distribution."""
    folder = tmp_path_factory.mktemp('sources')
    clone = folder / 'clone'
    shutil.copytree(ROOT, clone, ignore=shutil.ignore_patterns(*LEFT_OUT))
    for name in ('.ci', '.pre-commit-config.yaml'):
        path = ROOT / name
        if path.exists():
            copy: Any = shutil.copytree if path.is_dir() else shutil.copy
            copy(path, clone / name)
    subprocess.run([sys.executable, 'setup.py', '-q', 'sdist'],
                   cwd=clone,
                   check=True,
                   capture_output=True)
    archive, = (clone / 'dist').iterdir()
    with tarfile.open(archive) as file:
        file.extractall(folder, filter='data')
    return folder / archive.name.removesuffix('.tar.gz')


@pytest.fixture(scope='module')
def installed(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked wheel that is built of the source distribution."""
    folder = tmp_path_factory.mktemp('wheel')
    subprocess.run([
        sys.executable, '-m', 'pip', 'wheel', '--quiet', '--no-deps',
        '--no-build-isolation', '--no-index', '--wheel-dir', folder, sources
    ],
                   check=True,
                   capture_output=True)
    wheel, = folder.iterdir()
    zipfile.ZipFile(wheel).extractall(folder / 'installed')
    return folder / 'installed'


def files(folder: Path, *patterns: str) -> set[str]:
    """Files below a folder, relative to it."""
    return {
        str(path.relative_to(folder))
        for pattern in patterns
        for path in folder.glob(pattern) if path.is_file()
    }


def test_source_distribution_has_what_tests_and_checks_need(
        sources: Path) -> None:
    needed = files(ROOT, '*.md', '*.cfg', 'Makefile',
                   '.pre-commit-config.yaml', '.ci/*', 'requirements/*',
                   'docs/*.*', 'docs/*/*.json', 'examples/*.py',
                   'configs/**/*.*', 'tools/*.*', 'benchmarks/**/*.py',
                   'tests/**/*.py', 'gdp_mmseg/**/*.py')
    needed = {name for name in needed if '__pycache__' not in name}
    assert {'tests/conftest.py', 'tests/helpers/project.py'} <= needed
    assert needed - files(sources, '**/*') == set()


def test_wheel_has_package_configs_and_tools_for_mim(installed: Path) -> None:
    assert files(installed, '*/**/*.py') >= files(ROOT, 'gdp_mmseg/**/*.py')
    assert (installed / 'gdp_mmseg' / 'py.typed').is_file()
    mim = installed / IN_MIM
    assert files(mim / 'tools', '*') == TOOLS
    assert files(mim, 'configs/**/*') == {
        name
        for name in files(ROOT, 'configs/**/*') if '__pycache__' not in name
    }
    assert (mim / 'model-index.yml').is_file()
    assert not (ROOT / IN_MIM).exists()


def test_wheel_names_its_command(installed: Path) -> None:
    entry_points = configparser.ConfigParser()
    entry_points.read(next(installed.glob('*.dist-info/entry_points.txt')))
    assert dict(entry_points['console_scripts']) == {
        'gdp-mmseg': 'gdp_mmseg.__main__:main'
    }


def test_metadata_has_no_empty_line(installed: Path) -> None:
    text = next(installed.glob('*.dist-info/METADATA')).read_text()
    head = text.partition('\n\n')[0].splitlines()
    fields = [line.partition(': ') for line in head]
    assert len(fields) > 10 and all(value for _, _, value in fields)


def test_index_of_models_has_each_config(installed: Path) -> None:
    yaml = pytest.importorskip('yaml')
    mim = installed / IN_MIM
    listed = [
        model['Config']
        for path in yaml.safe_load((mim /
                                    'model-index.yml').read_text())['Import']
        for model in yaml.safe_load((mim / path).read_text())['Models']
    ]
    configs = files(mim, 'configs/*.py') - {'configs/drop_in_template.py'}
    assert sorted(listed) == sorted(configs)


def test_relative_links_become_absolute_where_the_repository_is_known(
        monkeypatch: pytest.MonkeyPatch) -> None:
    import setuptools
    given: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, 'setup', given.update)
    setup: dict[str, Any] = {'__file__': str(ROOT / 'setup.py')}
    exec((ROOT / 'setup.py').read_text(), setup)
    setup['URL'] = 'https://github.com/someone/gdp_mmseg'
    text = setup['long_description']()
    assert ('(https://raw.githubusercontent.com/someone/gdp_mmseg/main/docs/'
            'demo.png)') in text
    assert ('(https://github.com/someone/gdp_mmseg/blob/main/docs/models.md)'
            in text)
    assert '](docs/' not in text and '](https://arxiv.org' in text


def test_mistakes_are_one_line_each_away_from_the_clone(
        installed: Path, request: pytest.FixtureRequest,
        tmp_path: Path) -> None:
    pytest.importorskip('mmseg')
    from helpers.project import run_program
    gated = request.getfixturevalue('project').gated
    program = installed / 'run_each.py'
    program.write_text(RUN_EACH)
    options = [
        'train',
        str(gated), '--work-dir',
        str(tmp_path / 'out'), '--cfg-options'
    ]
    lines = [[*options, mistake] for mistake in MISTAKES]
    # These two neither train nor hold a budget.
    lines += [[command, str(gated), '--cfg-options', mistake]
              for command in ('groups', 'check') for mistake in MISTAKES
              if 'hook' not in mistake and '1e-6' not in mistake]
    printed = run_program(program, json.dumps(lines), cwd=tmp_path)
    where, done = json.loads(printed.splitlines()[-1])
    assert Path(where).parent == installed / 'gdp_mmseg'
    for arguments, (status, _, stderr) in zip(lines, done, strict=True):
        assert status == 2 and stderr.count('\n') == 1, (arguments, stderr)
        assert stderr.startswith(f'gdp-mmseg {arguments[0]}: error: ')
        for part in MISTAKES[arguments[-1]]:
            assert part in stderr
    assert 'Config:' not in ''.join(out for _, out, _ in done)
