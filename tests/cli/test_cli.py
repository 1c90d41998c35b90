"""Command lines: flags, paths and one line for each error."""
from __future__ import annotations

import argparse
import ast
import importlib.util
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any, Callable

import pytest

from helpers import ROOT

mmengine = pytest.importorskip('mmengine')
pytest.importorskip('mmseg')

from mmengine.config import Config
from mmengine.registry import init_default_scope

from gdp_mmseg.cli.test import (check_evaluator, check_tta,
                                trigger_visualization_hook)

PACKAGE = ROOT / 'gdp_mmseg'


def load(path: Path) -> ModuleType:
    """Import a script as ``python <path>`` would find its neighbours."""
    spec = importlib.util.spec_from_file_location(f'tool_{path.stem}', path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def flags(path: Path) -> list[str]:
    """Return the ``add_argument`` calls of a script, without their help."""
    calls = []
    for node in ast.walk(ast.parse(path.read_text())):
        if (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
                and node.func.attr == 'add_argument'):
            node.keywords = [
                keyword for keyword in node.keywords if keyword.arg != 'help'
            ]
            calls.append(ast.unparse(node))
    return calls


@pytest.mark.parametrize('name', ['train.py', 'test.py'])
def test_tools_have_the_flags_of_mmseg(name: str) -> None:
    import mmseg
    theirs = Path(mmseg.__file__).parent / '.mim' / 'tools' / name
    if not theirs.exists():
        pytest.skip(f'this mmseg was installed without its tools: {theirs}')
    assert flags(PACKAGE / 'cli' / name) == flags(theirs) != []


@pytest.mark.parametrize('name, arguments, named', [
    ('train.py', ['no_config.py'], 'no_config.py'),
    ('test.py', ['no_config.py', 'no.pth'], 'no_config.py'),
    ('test.py', ['configs/deeplabv3plus_demo.py', 'no.pth'], 'no.pth'),
    ('train.py', [
        'configs/deeplabv3plus_voc.py', '--cfg-options',
        'train_dataloader.dataset.datasets.0.data_root=no_folder'
    ], 'train_dataloader.dataset.datasets.0.data_root'),
])
def test_a_wrong_path_ends_with_one_line(
        name: str, arguments: list[str], named: str,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv('LOCAL_RANK', '0')
    tool = load(ROOT / 'tools' / name)
    monkeypatch.setattr(sys, 'argv', [name, *arguments])
    with pytest.raises(SystemExit) as end:
        tool.main()
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert error.count('\n') == 1
    assert 'expected' in error and 'but got' in error and named in error


def dataset(root: Path) -> dict:
    """Return a data set in VOC layout below ``root``."""
    return dict(
        type='PascalVOCDataset',
        data_root=str(root),
        ann_file='train.txt',
        data_prefix=dict(img_path='images', seg_map_path='masks'))


@pytest.mark.parametrize('wrap, prefix', [
    (lambda inner: inner, ''),
    (lambda inner: dict(type='RepeatDataset', times=2, dataset=inner),
     'dataset.'),
    (lambda inner: dict(type='ConcatDataset', datasets=[inner]),
     'datasets.0.'),
])
@pytest.mark.parametrize(
    'missing',
    ['ann_file', 'data_prefix.img_path', 'data_prefix.seg_map_path', None])
def test_check_paths_names_what_is_missing(
        wrap: Callable[[dict], dict], prefix: str, missing: str | None,
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    made = {
        'ann_file': 'train.txt',
        'data_prefix.img_path': 'images',
        'data_prefix.seg_map_path': 'masks'
    }
    for key, name in made.items():
        if key != missing:
            (tmp_path / name).mkdir()
    cfg = mmengine.Config(
        dict(train_dataloader=dict(dataset=wrap(dataset(tmp_path)))))
    from gdp_mmseg.cli import data_checks as cli
    if missing is None:
        assert cli.check_paths(cfg) is None
        return
    with pytest.raises(SystemExit):
        cli.check_paths(cfg)
    key = f'train_dataloader.dataset.{prefix}{missing}='
    assert f'--cfg-options {key}' in capsys.readouterr().err


def test_labels_that_nothing_reads_need_not_be_there(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ('train.txt', 'images'):
        (tmp_path / name).mkdir()
    unread = dataset(tmp_path)
    unread['pipeline'] = [dict(type='LoadImageFromFile')]
    cfg = mmengine.Config(dict(test_dataloader=dict(dataset=unread)))
    from gdp_mmseg.cli import data_checks as cli
    assert cli.check_paths(cfg) is None
    unread['pipeline'].append(dict(type='LoadAnnotations'))
    with pytest.raises(SystemExit):
        cli.check_paths(
            mmengine.Config(dict(test_dataloader=dict(dataset=unread))))


def raise_wrapped(cli: ModuleType) -> None:
    """Raise our error as a registry passes it on."""
    try:
        cli.check_target(-1)
    except ValueError as error:
        raise ValueError(f'class `GDPModel`: {error}') from error


@pytest.fixture
def cli() -> ModuleType:
    """The shared code, plus a function that raises as ours do."""
    from gdp_mmseg.cli import errors
    module = ModuleType('gdp_mmseg.engine.model')
    module.__dict__['one_line_errors'] = errors.one_line_errors
    source = ('def check_target(target):\n'
              "    raise ValueError('expected target > 0,\\n'\n"
              "                     f'but got {target}; change gdp.target')\n")
    exec(compile(source, str(PACKAGE / 'model.py'), 'exec'), module.__dict__)
    return module


def test_our_error_is_one_line_even_when_wrapped(
        cli: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end, cli.one_line_errors():
        raise_wrapped(cli)
    assert end.value.code == 2
    assert capsys.readouterr().err.endswith(
        ': error: expected target > 0, but got -1; change gdp.target\n')


def test_debugging_keeps_the_traceback(
        cli: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('GDP_DEBUG', '1')
    with pytest.raises(ValueError), cli.one_line_errors():
        raise_wrapped(cli)


def test_errors_of_others_keep_their_traceback(cli: ModuleType) -> None:
    with pytest.raises(ValueError), cli.one_line_errors():
        int('no number')


@pytest.mark.parametrize('kind, drawn', [
    ('VisualizationHook', dict(enable=True, out_dir='shown', interval=1)),
    ('SegVisualizationHook', dict(draw=True)),
])
def test_predictions_are_drawn_by_the_hook_of_each_library(
        kind: str, drawn: dict[str, Any]) -> None:
    cfg = Config(
        dict(default_hooks=dict(visualization=dict(type=kind)), visualizer={}))
    args = argparse.Namespace(show=False, show_dir='shown', wait_time=1.)
    hook = trigger_visualization_hook(cfg, args).default_hooks.visualization
    assert hook == dict(drawn, type=kind)
    assert cfg.visualizer == ({} if 'out_dir' in drawn else dict(
        save_dir='shown'))


def test_options_that_a_classifier_lacks_are_an_error(
        capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip('mmpretrain')
    init_default_scope('mmseg')
    check_evaluator(dict(type='IoUMetric'))
    with pytest.raises(SystemExit):
        check_evaluator(dict(type='mmpretrain.Accuracy'))
    assert 'for --out, such as IoUMetric, but' in capsys.readouterr().err
    check_tta(Config(dict(tta_pipeline=[], tta_model={})))
    with pytest.raises(SystemExit):
        check_tta(Config(dict(tta_pipeline=[])))
    assert 'got no tta_model; add it' in capsys.readouterr().err


@pytest.mark.parametrize('error, shown', [
    (None, 'the config\n'),
    (TypeError('a bug'), 'the config\n'),
    (SystemExit(2), ''),
])
def test_output_before_an_error_for_the_user_is_dropped(
        error: BaseException | None, shown: str,
        capsys: pytest.CaptureFixture[str]) -> None:
    from gdp_mmseg.cli.errors import held_output
    with pytest.raises(type(error)) if error else nullcontext():
        with held_output():
            print('the config')
            kept = sys.stdout
            assert capsys.readouterr().out == ''
            if error:
                raise error
    assert capsys.readouterr().out == shown
    if error is None:
        print('the training', file=kept)
        assert capsys.readouterr().out == 'the training\n'


def test_output_before_our_error_is_dropped(
        cli: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    from gdp_mmseg.cli.errors import held_output
    with pytest.raises(SystemExit), cli.one_line_errors(), held_output():
        print('the config')
        raise_wrapped(cli)
    assert capsys.readouterr().out == ''
