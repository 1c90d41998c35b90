"""What does not go with gates is refused at the start, in one line."""
from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable

import pytest

pytest.importorskip('mmseg')

from mmengine._strategy.deepspeed import MMDeepSpeedEngineWrapper
from mmengine.config import Config
from mmengine.model import MMFullyShardedDataParallel
from mmengine.runner import Runner
from torch import nn

from gdp_mmseg.engine.compat import (SPLITTING, check_config, check_runner,
                                     moves_gates, resumes_exactly)
from gdp_mmseg.engine.hook import GDPHook
from gdp_mmseg.engine.resume import ResumeHook

from helpers.project import Project, Trained, run_tool

STRATEGIES = [name for name in SPLITTING if name.endswith('Strategy')]


def _sharded(model: nn.Module) -> nn.Module:
    """FSDP's wrapper, which cannot be made without a GPU, unmade."""
    wrapper = MMFullyShardedDataParallel.__new__(MMFullyShardedDataParallel)
    nn.Module.__init__(wrapper)
    wrapper._fsdp_wrapped_module = model
    return wrapper


def _refused(project: Project, folder: Path, *options: str) -> str:
    """What stderr gets when options over the gated config are refused."""
    outcome = run_tool(
        'train.py',
        project.gated,
        '--work-dir',
        folder / 'out',
        '--cfg-options',
        *options,
        cwd=folder)
    assert outcome.status == 2
    assert not (folder / 'out').exists()
    return outcome.stderr


@pytest.mark.parametrize('name', SPLITTING)
def test_what_splits_the_gates_is_refused_before_anything_is_built(
        name: str, project: Project, tmp_path: Path) -> None:
    key = 'strategy' if name in STRATEGIES else 'model_wrapper_cfg'
    runner = 'FlexibleRunner' if key == 'strategy' else 'Runner'
    assert _refused(
        project, tmp_path, f'runner_type={runner}', f'{key}.type={name}'
    ) == ('train.py: error: GDPHook: expected each process to hold the whole '
          f'model, but got {name}; change {key}: one process, DDPStrategy or '
          'MMDistributedDataParallel go with gates\n')


@pytest.mark.parametrize('accumulated, said', [
    (1, '3 of 4 iterations (75%); train for at least 11 iterations'),
    (2, 'steps of the optimizer, of 2 iterations each'),
])
def test_too_short_training_is_refused_before_anything_is_built(
        accumulated: int, said: str, project: Project, tmp_path: Path) -> None:
    message = _refused(project, tmp_path,
                       f'train_cfg.max_iters={4 * accumulated}',
                       f'optim_wrapper.accumulative_counts={accumulated}')
    assert message.startswith('train.py: error: gdp.phases: expected')
    assert said in message


def test_too_short_training_by_epochs_is_refused_by_the_hook(
        project: Project, tmp_path: Path) -> None:
    cfg = project.load(tmp_path)
    cfg.train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=1)
    with pytest.raises(ValueError, match='gdp.phases: .* at least 11 iterat'):
        Runner.from_cfg(cfg).train()


def test_short_pruning_phase_is_warned_of(trained: Trained) -> None:
    log = next(trained.work_dir.glob('*/*.log')).read_text()
    assert 'the pruning phase is short with 24 of 32 iterations' in log


def test_target_below_one_channel_in_each_group_is_warned_of(
        project: Project, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr('gdp_mmseg.engine.hook.log_start', stop)
    cfg = project.load(tmp_path)
    cfg.model.gdp.target = 1e-3
    with pytest.raises(KeyboardInterrupt):
        Runner.from_cfg(cfg).train()
    log = next(tmp_path.glob('*/*.log')).read_text()
    assert 'WARNING - GDP: gdp.target is 0.001, but with a single' in log


def test_gates_without_their_hook_are_refused(project: Project) -> None:
    cfg = Config.fromfile(project.gated)
    cfg.custom_hooks = [cfg.default_hooks.pop('gdp')]
    assert check_config(cfg) is None
    cfg.custom_hooks = []
    with pytest.raises(ValueError, match='GDPHook'):
        check_config(cfg)


@pytest.mark.parametrize('kind, moves, resumes', [
    ('gdp_mmseg.GDPHook', True, True),
    ('GDPHook', True, True),
    (GDPHook, True, True),
    ('gdp_mmseg.ResumeHook', False, True),
    (ResumeHook, False, True),
    ('CheckpointHook', False, False),
    (None, False, False),
])
def test_hooks_are_known_by_name_and_by_class(kind: Any, moves: bool,
                                              resumes: bool) -> None:
    hook = dict(type=kind)
    assert (moves_gates(hook), resumes_exactly(hook)) == (moves, resumes)
    assert not resumes_exactly(None)


def test_a_model_without_gates_may_be_split(project: Project) -> None:
    cfg = Config.fromfile(project.dense)
    cfg.strategy = dict(type='FSDPStrategy')
    assert check_config(cfg) is None


@pytest.mark.parametrize('wrap, name', [
    (_sharded, 'MMFullyShardedDataParallel'),
    (lambda model: MMDeepSpeedEngineWrapper(model=model),
     'MMDeepSpeedEngineWrapper'),
    (nn.DataParallel, 'DataParallel'),
])
def test_a_wrapper_that_splits_the_gates_is_refused(wrap: Callable[[nn.Module],
                                                                   Any],
                                                    name: str) -> None:
    """Whoever built it: other tools than ours do not look first."""
    runner = SimpleNamespace(
        model=wrap(nn.Linear(2, 2)), optim_wrapper=None, cfg=Config())
    with pytest.raises(ValueError) as error:
        check_runner(runner)
    assert f'but got {name}; change strategy' in str(error.value)


def test_an_optimizer_that_asks_for_the_loss_is_refused(
        project: Project, tmp_path: Path) -> None:
    cfg = project.load(tmp_path)
    cfg.optim_wrapper.optimizer = dict(type='LBFGS', lr=0.1)
    with pytest.raises(ValueError) as error:
        Runner.from_cfg(cfg).train()
    assert str(error.value) == (
        'GDPHook: expected an optimizer that steps once for each gradient, '
        'but got LBFGS, which asks for the loss again; change '
        'optim_wrapper.optimizer.type')


@pytest.mark.usefixtures('process_group')
@pytest.mark.parametrize('options, message', [
    ({
        'model.backbone.with_cp': True
    }, 'but got static_graph=False; set model_wrapper_cfg='),
    ({
        'activation_checkpointing': ['backbone.layer3']
    }, 'but got static_graph=False; set model_wrapper_cfg='),
    ({
        'model.backbone.with_cp': True,
        'model_wrapper_cfg.static_graph': True,
        'optim_wrapper.accumulative_counts': 2
    },
     'but got accumulative_counts=2; set optim_wrapper.accumulative_counts=1'),
])
def test_checkpointing_in_several_processes_needs_a_static_graph(
        options: dict[str, Any], message: str, project: Project,
        tmp_path: Path) -> None:
    cfg = project.load_for_processes(tmp_path, **options)
    with pytest.raises(ValueError) as error:
        Runner.from_cfg(cfg).train()
    assert message in str(error.value)
    assert '\n' not in str(error.value)
