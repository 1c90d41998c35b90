"""The house: one version, arrows one way, configs and command lines."""
from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Callable

import pytest

mmengine = pytest.importorskip('mmengine')
pytest.importorskip('mmseg')

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / 'gdp_mmseg'
MODULES = sorted(path.stem for path in PACKAGE.glob('*.py'))
CONFIGS = sorted(path.name for path in (ROOT / 'configs').glob('*.py'))
PRUNED = [name for name in CONFIGS if name.startswith('gdp_')]

# Which modules of the package each module may import.
ARROWS: dict[str, set[str]] = {
    'version': set(),
    'gate': set(),
    'schedule': set(),
    'kernel': {'gate'},
    'labels': set(),
    'operators': {'labels'},
    'trace': {'labels', 'operators'},
    'groups': {'labels', 'trace'},
    'lively': {'trace'},
    'proof': {'gate', 'groups', 'kernel', 'lively', 'surgery', 'trace'},
    'cost': {'groups'},
    'latency': {'groups', 'labels'},
    'surgery': {'groups', 'kernel', 'trace'},
    'registry': set(),
    'amp': {'registry'},
    'files': set(),
    'checkpoint': {'files', 'groups', 'version'},
    'guard': {'checkpoint', 'registry'},
    'report': {'cost', 'files', 'groups', 'surgery'},
    'stages': {'groups', 'kernel'},
    'pictures': set(),
    'diary': {'groups', 'pruner', 'pictures', 'report', 'stages'},
    'pruner': {'cost', 'gate', 'groups', 'latency', 'schedule', 'surgery'},
    'model': {
        'checkpoint', 'groups', 'kernel', 'proof', 'pruner', 'registry',
        'surgery'
    },
    'support': set(),
    'hook': {
        'checkpoint', 'cost', 'diary', 'files', 'gate', 'guard', 'latency',
        'model', 'pruner', 'registry', 'support'
    },
    'export': {
        'checkpoint', 'cost', 'diary', 'files', 'groups', 'model', 'proof',
        'pruner', 'report', 'stages', 'support', 'surgery', 'version'
    },
    '__init__': set(MODULES) - {'__init__'},
}
# What serves plain PyTorch models imports no mm package.
LIBRARIES: dict[str, set[str]] = {
    'version': set(),
    'files': set(),
    'gate': {'torch'},
    'schedule': set(),
    'kernel': {'torch'},
    'pruner': {'torch'},
    'labels': {'torch'},
    'operators': {'torch'},
    'trace': {'torch'},
    'lively': {'torch'},
    'proof': {'torch'},
    'groups': {'torch', 'scipy', 'numpy'},
    'cost': {'torch'},
    'latency': {'torch', 'scipy', 'numpy'},
    'surgery': {'torch'},
    'stages': {'torch'},
    'pictures': {'matplotlib', 'numpy'},
}


def imports(module: str) -> tuple[set[str], set[str]]:
    """Return the package's own modules and the libraries a module imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse((PACKAGE / f'{module}.py').read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = 'gdp_mmseg' if node.level else node.module or ''
            if node.level and node.module:
                base = f'{base}.{node.module}'
            names |= ({f'{base}.{alias.name}'
                       for alias in node.names}
                      if base == 'gdp_mmseg' else {base})
    own = {name.split('.')[1] for name in names if 'gdp_mmseg.' in name}
    libraries = {name.split('.')[0] for name in names}
    return own & set(MODULES), (
        libraries - sys.stdlib_module_names - {'gdp_mmseg'})


def load(path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Import a script as ``python <path>`` would find its neighbours."""
    monkeypatch.syspath_prepend(str(path.parent))
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


def test_version_is_written_once() -> None:
    from gdp_mmseg.version import __version__
    reported = subprocess.run([sys.executable, 'setup.py', '--version'],
                              cwd=ROOT,
                              capture_output=True,
                              text=True,
                              check=True).stdout.split()[-1]
    writers = [
        path.name for path in [*PACKAGE.glob('*.py'), ROOT / 'setup.py']
        if '__version__ =' in path.read_text()
    ]
    assert reported == __version__
    assert writers == ['version.py']
    assert f'[{__version__}]' in (ROOT / 'CHANGELOG.md').read_text()


@pytest.mark.parametrize('module', MODULES)
def test_arrows_point_one_way(module: str) -> None:
    own, libraries = imports(module)
    assert module in ARROWS, f'add {module} to ARROWS'
    assert own <= ARROWS[module]
    assert libraries <= LIBRARIES.get(module, libraries)


def test_arrows_have_no_cycle() -> None:
    below = {name: set(arrows) for name, arrows in ARROWS.items()}
    while below:
        leaves = {name for name, arrows in below.items() if not arrows}
        assert leaves, f'a cycle among {sorted(below)}'
        below = {
            name: arrows - leaves
            for name, arrows in below.items() if name not in leaves
        }


@pytest.mark.parametrize('name', CONFIGS)
def test_config_parses(name: str) -> None:
    cfg = mmengine.Config.fromfile(ROOT / 'configs' / name)
    assert cfg.model.type in ('EncoderDecoder', 'gdp_mmseg.GDPModel')
    assert cfg.train_dataloader and cfg.test_dataloader and cfg.train_cfg


@pytest.mark.parametrize('name', PRUNED)
def test_drop_in_adds_a_model_type_and_a_hook_only(name: str) -> None:
    dense = mmengine.Config.fromfile(ROOT / 'configs' /
                                     name.removeprefix('gdp_')).to_dict()
    pruned = mmengine.Config.fromfile(ROOT / 'configs' / name).to_dict()
    assert pruned['model'].pop('gdp') and pruned['default_hooks'].pop('gdp')
    pruned['model']['type'] = dense['model']['type']
    assert pruned == dense


def test_base_model_type_can_be_named_in_a_drop_in(tmp_path: Path) -> None:
    template = (ROOT / 'configs' / 'drop_in_template.py').read_text()
    assert '# base=_base_.model.type' in template
    changed = tmp_path / 'config.py'
    changed.write_text(
        template.replace('# base=', 'base=').replace(
            './deeplabv3plus_voc.py',
            str(ROOT / 'configs' / 'deeplabv3plus_voc.py')))
    assert mmengine.Config.fromfile(changed).model.base == 'EncoderDecoder'


def test_demo_config_names_the_classes_that_are_drawn(
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / 'tools'))
    import make_demo_data
    cfg = mmengine.Config.fromfile(ROOT / 'configs/deeplabv3plus_demo.py')
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        assert loader.dataset.metainfo.classes == make_demo_data.CLASSES
        assert loader.dataset.metainfo.palette == make_demo_data.PALETTE
    assert cfg.model.decode_head.num_classes == len(make_demo_data.CLASSES)


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
    tool = load(ROOT / 'tools' / name, monkeypatch)
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
