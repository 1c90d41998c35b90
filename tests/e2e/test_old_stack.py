"""The whole way of a user of the original mm stack, tool by tool.

Each tool runs in a process of its own, which has imported nothing of this
package before. ``make test-old-stack`` runs these tests.
"""
from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip('mmseg')

import mmseg
import torch

from helpers import TOOLS
from helpers.project import ITERATIONS, Exported, Project, run_program

STOCK = Path(mmseg.__file__).parent / '.mim/tools'
KILLED = ITERATIONS // 2 + 2
INTERRUPTED = f"""
custom_imports = dict(imports=['helpers.kill_at'])
custom_hooks = [dict(type='KillAt', iteration={KILLED})]
default_hooks = dict(checkpoint=dict(interval={ITERATIONS // 2}))
"""
RESUME_HOOK = {'default_hooks.resume.type': 'gdp_mmseg.ResumeHook'}
API = {
    'init_model':
    'from mmseg.apis import init_model as load',
    # It loads a checkpoint before it builds the model.
    'MMSegInferencer':
    'import gdp_mmseg.engine\nfrom mmseg.apis import MMSegInferencer as load',
}
BOTH = pytest.mark.parametrize('tools', [TOOLS, STOCK], ids=['our', 'stock'])

pytestmark = pytest.mark.skipif(
    mmseg.__version__ != '1.2.2',
    reason='the original mm stack, by `make test-old-stack`')


def _train(folder: Path,
           config: Path,
           *more: str,
           tools: Path = TOOLS,
           **options: Any) -> str:
    """Train to a work folder; return what was printed."""
    changed = [f'{key}={value}' for key, value in options.items()]
    return run_program(
        tools / 'train.py',
        config,
        '--work-dir',
        folder,
        *more,
        *(['--cfg-options', *changed] if changed else []),
        cwd=folder.parent)


def _miou(config: Path, checkpoint: Path, folder: Path, tools: Path) -> float:
    """Test a checkpoint; return the mIoU that was printed."""
    printed = run_program(
        tools / 'test.py',
        config,
        checkpoint,
        '--work-dir',
        folder,
        cwd=folder.parent)
    return float(printed.rpartition('mIoU: ')[2].split()[0])


def _state(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(
        path, map_location='cpu', weights_only=False)['state_dict']


def _same(path: Path, other: Path) -> bool:
    one, two = _state(path), _state(other)
    return list(one) == list(two) and all(
        torch.equal(one[name], two[name]) for name in one)


@pytest.fixture(scope='module')
def way(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for all of it."""
    return tmp_path_factory.mktemp('way')


@pytest.fixture(scope='module')
def straight(project: Project, way: Path) -> Path:
    """A checkpoint of our train.py, never interrupted."""
    _train(way / 'straight', project.gated)
    return way / f'straight/iter_{ITERATIONS}.pth'


@pytest.fixture(scope='module')
def killed(project: Project, way: Path) -> Path:
    """The work folder of a training that was killed half way."""
    config = project.config('killed', INTERRUPTED)
    with pytest.raises(RuntimeError, match='status -9'):
        _train(way / 'killed', config)
    assert (way / f'killed/iter_{ITERATIONS // 2}.pth').is_file()
    return way / 'killed'


@pytest.fixture(scope='module')
def pair(project: Project, straight: Path, way: Path) -> Exported:
    """What our export.py wrote."""
    run_program(
        TOOLS / 'export.py',
        project.gated,
        straight,
        '--out-dir',
        way / 'pair',
        cwd=way)
    return Exported(way / 'pair')


@BOTH
def test_resume_by_this_train_py_is_the_straight_training(
        tools: Path, project: Project, straight: Path, killed: Path,
        tmp_path: Path) -> None:
    shutil.copytree(killed, tmp_path / 'out')
    _train(tmp_path / 'out', project.gated, '--resume', tools=tools)
    assert _same(tmp_path / f'out/iter_{ITERATIONS}.pth', straight)


@BOTH
def test_load_from_a_dense_checkpoint_of_the_stock_train_py(
        tools: Path, project: Project, tmp_path: Path) -> None:
    """At a rate of zero the weights stay what they were at the start."""
    # A dense training that knows nothing of this package.
    _train(
        tmp_path / 'dense',
        project.dense,
        tools=STOCK,
        **{'train_cfg.max_iters': 2})
    dense = tmp_path / 'dense/iter_2.pth'
    options = {
        'load_from': dense,
        'train_cfg.max_iters': 12,
        'optim_wrapper.optimizer.lr': 0.,
        # Channels that leave are zero in a checkpoint, and those that stay
        # take over what they told.
        'model.gdp.shrink': False,
        'model.gdp.takeover': False
    }
    _train(tmp_path / 'gated', project.gated, tools=tools, **options)
    start, end = _state(dense), _state(tmp_path / 'gated/iter_12.pth')
    kernels = [name for name in start if start[name].dim() == 4]
    assert kernels and 'gdp.gates.theta' in end
    assert all(torch.equal(start[name], end[name]) for name in kernels)


@BOTH
def test_gated_checkpoint_by_this_test_py(tools: Path, project: Project,
                                          straight: Path, pair: Exported,
                                          tmp_path: Path) -> None:
    expected = pair.report.network('gated').metrics['mIoU']
    got = _miou(project.gated, straight, tmp_path / 'out', tools)
    assert got == pytest.approx(expected, abs=0.005)


@BOTH
def test_exported_pair_by_this_test_py(tools: Path, pair: Exported,
                                       tmp_path: Path) -> None:
    expected = pair.report.network('pruned').metrics['mIoU']
    got = _miou(pair.config, pair.checkpoint, tmp_path / 'out', tools)
    assert got == pytest.approx(expected, abs=0.005)


def test_export_reaches_the_target_without_loss(pair: Exported) -> None:
    dense, gated, pruned = map(pair.report.network,
                               ('dense', 'gated', 'pruned'))
    assert pruned.flops / dense.flops == pytest.approx(0.4, abs=0.01)
    assert pruned.metrics['mIoU'] == pytest.approx(
        gated.metrics['mIoU'], abs=0.005)


@BOTH
def test_fine_tuning_resuming_and_testing_by_these_tools(
        tools: Path, pair: Exported, tmp_path: Path) -> None:
    for iterations, more in ((2, []), (4, ['--resume'])):
        printed = _train(
            tmp_path / 'out',
            pair.config,
            *more,
            tools=tools,
            **{'train_cfg.max_iters': iterations})
    assert 'resumed epoch: 0, iter: 2' in printed
    tuned = tmp_path / 'out/iter_4.pth'
    weight = 'decode_head.conv_seg.weight'
    assert not torch.equal(
        _state(tuned)[weight],
        _state(pair.checkpoint)[weight])
    assert 0 < _miou(pair.config, tuned, tmp_path / 'test', tools) <= 100


@BOTH
def test_dense_training_resumes_by_this_train_py(tools: Path, project: Project,
                                                 tmp_path: Path) -> None:
    # Our tool adds the hook by itself.
    hook = {} if tools == TOOLS else RESUME_HOOK
    for iterations, more in ((2, []), (4, ['--resume'])):
        options = {'train_cfg.max_iters': iterations, **hook}
        printed = _train(
            tmp_path / 'out', project.dense, *more, tools=tools, **options)
    assert 'resumed epoch: 0, iter: 2' in printed
    assert (tmp_path / 'out/iter_4.pth').is_file()


@pytest.mark.parametrize('lines', API.values(), ids=API)
def test_mmseg_api_reads_a_gated_checkpoint(lines: str, project: Project,
                                            straight: Path,
                                            tmp_path: Path) -> None:
    program = tmp_path / 'load.py'
    program.write_text(f'''
{lines}
loaded = load({str(project.gated)!r}, {str(straight)!r}, device='cpu')
model = getattr(loaded, 'model', loaded)
print('classes', len(model.dataset_meta['classes']))
''')
    assert 'classes 5' in run_program(program, cwd=tmp_path)
