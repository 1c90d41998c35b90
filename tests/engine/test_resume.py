"""Nothing lost, nothing wrong: resume, losses, labels, saving."""
from __future__ import annotations

import logging
import os
import random
import resource
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Iterator

import pytest

pytest.importorskip('mmseg')

import numpy as np
import torch
from mmengine.config import Config
from mmengine.hooks import CheckpointHook, Hook
from mmengine.registry import LOOPS
from mmengine.runner import IterBasedTrainLoop, Runner
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample
from torch import Tensor, nn

from gdp_mmseg.engine.checkpoint import read_checkpoint
from gdp_mmseg.engine.resume import (ResumeHook, check_labels, random_state,
                                     set_random_state)

from helpers.project import (Project, Recorder, Trained, build_runner,
                             run_tool, train)

# Short trainings, with a checkpoint at every second iteration.
ITERATIONS, PHASES = 16, (0.25, 0.5, 0.25)
SETTLED = round(ITERATIONS * (PHASES[0] + PHASES[1]))
# In the warm-up, in the pruning phase, at its end, while settling.
STOPS = (2, 8, SETTLED, 14)


@LOOPS.register_module()
class OldLoop(IterBasedTrainLoop):
    """Skips as mmengine 0.10.7 does: it loads what it skips, and drops it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.dataloader_iterator = _Endless(self.dataloader)

    def run(self) -> Any:
        self.runner.call_hook('before_train')
        self.runner.call_hook('before_train_epoch')
        for _ in range(self._iter):
            next(self.dataloader_iterator)
        while self._iter < self._max_iters:
            self.runner.model.train()
            self.run_iter(next(self.dataloader_iterator))
            if self._iter % self.val_interval == 0:
                self.runner.val_loop.run()
        self.runner.call_hook('after_train_epoch')
        self.runner.call_hook('after_train')
        return self.runner.model


class _Endless:

    def __init__(self, loader: Any) -> None:
        self.iterator = iter(loader)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return next(self.iterator)


def _config(project: Project, work_dir: Path, loop: str) -> Config:
    """All that draws random numbers, and a validation at each checkpoint."""
    cfg = project.load(work_dir)
    cfg.model.gdp.phases = PHASES
    # Drawn by each of the three.
    cfg.train_dataloader.dataset.pipeline[2:2] = [
        dict(type='RandomCrop', crop_size=(48, 48)),
        dict(type='PhotoMetricDistortion'),
    ]
    cfg.model.decode_head.dropout_ratio = 0.5
    cfg.default_hooks.checkpoint.interval = 2
    cfg.val_dataloader.dataset.indices = 1
    if loop == 'EpochBasedTrainLoop':
        # Two iterations each.
        cfg.train_cfg = dict(
            type=loop, max_epochs=ITERATIONS // 2, val_interval=1)
        cfg.train_dataloader.sampler.type = 'DefaultSampler'
        cfg.default_hooks.checkpoint.update(by_epoch=True, interval=1)
        # Each of its states and averages loses channels, too.
        cfg.optim_wrapper.optimizer = dict(type='AdamW', lr=1e-3)
        cfg.custom_hooks = [dict(type='EMAHook', momentum=0.2)]
    else:
        cfg.train_cfg.update(type=loop, max_iters=ITERATIONS, val_interval=2)
    return cfg


def _name(loop: str, iteration: int) -> str:
    return (f'epoch_{iteration // 2}.pth'
            if loop == 'EpochBasedTrainLoop' else f'iter_{iteration}.pth')


class Losses(Hook):
    """The loss of each iteration."""

    def __init__(self) -> None:
        self.values: dict[int, float] = {}

    def after_train_iter(self,
                         runner: Runner,
                         batch_idx: int,
                         data_batch: Any = None,
                         outputs: Any = None) -> None:
        self.values[runner.iter + 1] = float(outputs['loss'])


def _train(cfg: Config) -> dict[int, float]:
    """Train; return the losses."""
    runner, losses = build_runner(cfg), Losses()
    runner.register_hook(losses)
    runner.train()
    return losses.values


Straight = Callable[[str], tuple[Path, dict[int, float]]]


@pytest.fixture(scope='module')
def straight(project: Project,
             tmp_path_factory: pytest.TempPathFactory) -> Straight:
    """Work folder and losses of trainings without interruption, by loop."""
    done: dict[str, tuple[Path, dict[int, float]]] = {}

    def run(loop: str) -> tuple[Path, dict[int, float]]:
        if loop not in done:
            folder = tmp_path_factory.mktemp(loop)
            done[loop] = folder, _train(_config(project, folder, loop))
        return done[loop]

    return run


def _content(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location='cpu', weights_only=False)


def _same(one: Any, other: Any) -> bool:
    """Bit for bit, through dicts and lists."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(
            _same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    return one == other


@pytest.mark.parametrize('loop, stop', [
    *(('IterBasedTrainLoop', stop) for stop in STOPS),
    ('OldLoop', 8),
    ('EpochBasedTrainLoop', 8),
])
def test_resume_goes_on_as_if_nothing_had_happened(straight: Straight,
                                                   project: Project,
                                                   tmp_path: Path, loop: str,
                                                   stop: int) -> None:
    """Killed an iteration after it saved at ``stop``, while it wrote a row."""
    whole, losses = straight(loop)
    shutil.copy(whole / _name(loop, stop), tmp_path)
    (tmp_path / 'last_checkpoint').write_text(
        str(tmp_path / _name(loop, stop)))
    rows = (whole / 'gates.jsonl').read_text().splitlines()
    # The first line names the groups.
    (tmp_path / 'gates.jsonl').write_text('\n'.join(rows[:stop + 2]) +
                                          '\n{"iter": 1')
    cfg = _config(project, tmp_path, loop)
    cfg.resume = True
    # Whatever was drawn in the meantime.
    torch.manual_seed(stop)
    random.seed(stop)
    np.random.seed(stop)
    resumed = _train(cfg)
    expected, got = (
        _content(folder / _name(loop, ITERATIONS))
        for folder in (whole, tmp_path))
    assert _same(expected['state_dict'], got['state_dict'])
    assert _same(expected['optimizer'], got['optimizer'])
    assert _same(expected.get('ema_state_dict'), got.get('ema_state_dict'))
    assert bool(expected['meta']['gdp']['cut'].any())
    assert _same(expected['meta']['random_state'], got['meta']['random_state'])
    assert list(resumed) == list(range(stop + 1, ITERATIONS + 1))
    assert resumed.items() <= losses.items()
    assert (tmp_path /
            'gates.jsonl').read_bytes() == (whole /
                                            'gates.jsonl').read_bytes()


def test_record_of_another_network_is_refused_and_kept(straight: Straight,
                                                       project: Project,
                                                       tmp_path: Path) -> None:
    whole, _ = straight('IterBasedTrainLoop')
    shutil.copy(whole / 'iter_14.pth', tmp_path)
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'iter_14.pth'))
    other = '{"groups": [{"writers": ["backbone.other"], "channels": 3}]}\n'
    (tmp_path / 'gates.jsonl').write_text(other)
    cfg = _config(project, tmp_path, 'IterBasedTrainLoop')
    cfg.resume = True
    with pytest.raises(ValueError, match='group 0 is backbone.other') as error:
        _train(cfg)
    assert 'move the file away' in str(error.value)
    assert (tmp_path / 'gates.jsonl').read_text() == other


def test_random_numbers_continue_from_a_state_that_is_plain(
        tmp_path: Path) -> None:

    def draw() -> list[float]:
        return [
            random.random(),
            random.gauss(0, 1),
            np.random.rand(),
            np.random.randn(),
            float(torch.rand(()))
        ]

    # Half of a pair of normal numbers is waiting in both.
    random.gauss(0, 1), np.random.randn()
    torch.save(random_state(), tmp_path / 'state.pth')
    expected = draw()
    set_random_state(torch.load(tmp_path / 'state.pth', weights_only=True))
    assert draw() == expected


class Poison(Hook):
    """Makes the loss not a number from an iteration on."""

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def before_train_iter(self, runner: Runner, *_: Any, **__: Any) -> None:
        if runner.iter + 1 >= self.iteration:
            runner.model.decode_head.loss_decode.loss_weight = float('nan')


@pytest.mark.parametrize('patience, last, came', [
    (3, 12, 'got nan in 3 iterations in a row, the last of them 12'),
    (99, 12, 'finite weights to save, but got nan or inf in'),
])
def test_loss_that_is_not_finite_ends_at_the_last_good_checkpoint(
        project: Project, tmp_path: Path, patience: int, last: int,
        came: str) -> None:
    """From iteration 10 on; weights too, by the user's own optimizer."""
    cfg = project.load(tmp_path)
    cfg.default_hooks.checkpoint.update(interval=4, max_keep_ckpts=1)
    cfg.default_hooks.gdp.patience = patience
    runner, recorder = build_runner(cfg), Recorder()
    runner.register_hook(Poison(10))
    runner.register_hook(recorder)
    with pytest.raises(FloatingPointError) as error:
        runner.train()
    good = tmp_path / 'iter_8.pth'
    message = str(error.value)
    assert came in message
    assert f'the last good checkpoint is {good}: ' in message
    assert '--resume' in message
    assert runner.iter + 1 == last
    assert [path.name for path in tmp_path.glob('iter_*')] == [good.name]
    assert (tmp_path / 'last_checkpoint').read_text() == str(good)
    # The gates are where they were, and that was counted.
    assert not bool(torch.isnan(recorder.theta[-1]).any())
    for history in (recorder.theta, recorder.gain, recorder.gain_square):
        assert all(torch.equal(history[8], one) for one in history[9:])
    assert recorder.observed[8:] == [9] * len(recorder.observed[8:])
    assert runner.message_hub.get_info('gdp_skipped') == last - 9


def test_without_a_checkpoint_the_advice_names_none(project: Project,
                                                    tmp_path: Path) -> None:
    """Also where another training left one."""
    (tmp_path / 'last_checkpoint').write_text('iter_20000.pth')
    cfg = project.load(tmp_path)
    cfg.default_hooks.gdp.patience = 1
    runner = Runner.from_cfg(cfg)
    runner.register_hook(Poison(2))
    with pytest.raises(FloatingPointError, match='no good checkpoint') as end:
        runner.train()
    assert 'iter_20000' not in str(end.value)


def test_a_finite_loss_ends_the_count(tmp_path: Path) -> None:
    hook = ResumeHook(patience=3)
    runner: Any = SimpleNamespace(
        iter=0, work_dir=tmp_path, logger=logging.getLogger('none'))

    def see(loss: float) -> None:
        hook.after_train_iter(runner, 0, None, dict(loss=torch.tensor(loss)))

    for loss in (float('nan'), float('inf'), 1., float('-inf'), float('nan')):
        see(loss)
    with pytest.raises(FloatingPointError, match='3 iterations in a row'):
        see(float('nan'))


class FullDisk(Hook):
    """No file can be longer than a few kilobytes from an iteration on."""

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def before_train_iter(self, runner: Runner, *_: Any, **__: Any) -> None:
        if runner.iter + 1 == self.iteration:
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))


@pytest.fixture()
def any_size() -> Iterator[None]:
    """The limit of this process, set back."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_full_disk_costs_no_earlier_checkpoint(project: Project,
                                               tmp_path: Path,
                                               any_size: None) -> None:
    cfg = project.load(tmp_path)
    cfg.default_hooks.checkpoint.update(interval=4, max_keep_ckpts=1)
    runner = Runner.from_cfg(cfg)
    runner.register_hook(FullDisk(5))
    with pytest.raises(OSError):
        runner.train()
    assert [path.name for path in tmp_path.glob('*.pth*')] == ['iter_4.pth']
    assert _content(tmp_path / 'iter_4.pth')['meta']['iter'] == 4
    assert (tmp_path / 'last_checkpoint').read_text().endswith('iter_4.pth')


@pytest.mark.parametrize('keep', [1, 2])
def test_no_more_checkpoints_are_kept_than_asked(project: Project,
                                                 tmp_path: Path,
                                                 keep: int) -> None:
    cfg = project.load(tmp_path)
    cfg.train_cfg.max_iters = 8
    cfg.default_hooks.checkpoint.update(interval=2, max_keep_ckpts=keep)
    train(cfg)
    assert {path.name
            for path in tmp_path.glob('*.pth*')
            } == {f'iter_{number}.pth'
                  for number in (6, 8)[-keep:]}


def test_users_own_way_of_saving_stays(project: Project,
                                       tmp_path: Path) -> None:
    cfg = project.load(tmp_path)
    cfg.train_cfg.max_iters = 1
    cfg.default_hooks.checkpoint.backend_args = dict(backend='local')
    runner, _ = train(cfg)
    hook = next(
        hook for hook in runner.hooks if isinstance(hook, CheckpointHook))
    assert hook.backend_args == dict(backend='local')
    assert (tmp_path / 'iter_1.pth').is_file()


def test_resume_passes_over_a_damaged_checkpoint(project: Project,
                                                 straight: Straight,
                                                 tmp_path: Path) -> None:
    """By mmengine's runner, as its own tools resume."""
    whole, losses = straight('IterBasedTrainLoop')
    for number in (10, 12):
        shutil.copy(whole / f'iter_{number}.pth', tmp_path)
    os.truncate(tmp_path / 'iter_12.pth', 100_000)
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'iter_12.pth'))
    cfg = _config(project, tmp_path, 'IterBasedTrainLoop')
    cfg.resume = True
    resumed = _train(cfg)
    assert list(resumed) == list(range(11, ITERATIONS + 1))
    assert resumed.items() <= losses.items()


@pytest.mark.parametrize('source, expected', [
    ('dense', 'the checkpoint has no gates; all of them start open'),
    ('trained', 'are closed, and stay closed'),
])
def test_log_says_what_becomes_of_the_gates(project: Project, trained: Trained,
                                            tmp_path: Path, source: str,
                                            expected: str) -> None:
    content = _content(trained.checkpoint)
    closed = content['state_dict']['gdp.gates.theta'] == 0
    if source == 'dense':
        content = dict(
            state_dict={
                key: value
                for key, value in content['state_dict'].items()
                if not key.startswith('gdp.')
            })
    torch.save(content, tmp_path / 'start.pth')
    cfg = project.load(tmp_path, load_from=str(tmp_path / 'start.pth'))
    cfg.train_cfg.max_iters = 4
    runner, recorder = train(cfg)
    log = next(tmp_path.glob('*/*.log')).read_text()
    line = next(line for line in log.splitlines() if expected in line)
    if source == 'dense':
        assert bool((recorder.theta[0] == 1).all())
    else:
        closed_now = int(closed.sum())
        assert f'{closed_now} gates of the checkpoint are closed' in line
        assert bool((recorder.theta[-1][closed] == 0).all())


def test_layers_of_another_shape_are_named_in_one_line(project: Project,
                                                       trained: Trained,
                                                       tmp_path: Path) -> None:
    """A checkpoint of a dense training for two classes less."""
    state = {
        key: value[:3] if '.conv_seg.' in key else value
        for key, value in _content(trained.checkpoint)['state_dict'].items()
        if not key.startswith('gdp.')
    }
    torch.save(dict(state_dict=state), tmp_path / 'start.pth')
    cfg = project.load(tmp_path, load_from=str(tmp_path / 'start.pth'))
    cfg.train_cfg.max_iters = 1
    cfg.optim_wrapper.optimizer.lr = 0.
    runner, _ = train(cfg)
    log = next(tmp_path.glob('*/*.log')).read_text()
    lines = [line for line in log.splitlines() if 'begin anew' in line]
    assert len(lines) == 1
    assert ('decode_head.conv_seg, auxiliary_head.conv_seg begin anew'
            in lines[0])
    assert 'size mismatch' not in log and 'missing keys' not in log
    loaded = runner.model.state_dict()
    name = 'backbone.stem.0.weight'
    assert torch.equal(loaded[name], state[name])


def _other_number(content: dict[str, Any]) -> None:
    state = content['state_dict']
    state['gdp.gates.theta'] = state['gdp.gates.theta'][:-1]


def _other_meaning(content: dict[str, Any]) -> None:
    """As another version of mmseg, or of torch, might order them."""
    first, second = content['meta']['gdp']['analysis']['groups'][:2]
    first['writers'], second['writers'] = second['writers'], first['writers']
    content['meta']['versions']['torch'] = '1.13.1'


@pytest.mark.parametrize('change, named', [
    (_other_number, 'gates, as in its own analysis, but got'),
    (_other_meaning, 'torch 1.13.1 (here '),
])
def test_gates_of_another_analysis_are_an_error(project: Project, changed: Any,
                                                tmp_path: Path, change: Any,
                                                named: str) -> None:
    start = changed(change)
    cfg = project.load(tmp_path / 'out', load_from=str(start))
    with pytest.raises(ValueError) as error:
        Runner.from_cfg(cfg).train()
    assert named in str(error.value) and 'load_from' in str(error.value)


def _sample(labels: Tensor) -> Any:
    sample = SegDataSample(metainfo=dict(seg_map_path='masks/7.png'))
    sample.gt_sem_seg = PixelData()
    # Also of a shape that PixelData would refuse.
    object.__setattr__(sample.gt_sem_seg, 'data', labels)
    return sample


def _labels(*values: int) -> Tensor:
    labels = torch.zeros(1, 4, 4, dtype=torch.long)
    labels.view(-1)[:len(values)] = torch.tensor(values)
    return labels


def _check(labels: Tensor, **head: Any) -> None:
    model: Any = nn.Module()
    model.decode_head = nn.Module()
    for key, value in head.items():
        setattr(model.decode_head, key, value)
    check_labels(
        model,
        dict(inputs=[torch.zeros(3, 4, 4)], data_samples=[_sample(labels)]))


@pytest.mark.parametrize('labels, head', [
    (_labels(0, 4, 255), dict(num_classes=5)),
    (_labels(0, 4, 9), dict(num_classes=5, ignore_index=9)),
    (_labels(0, 1), dict(num_classes=1)),
    (_labels(99), dict()),
    (torch.zeros(1, 8, 8, dtype=torch.long), dict(num_classes=5)),
    (torch.zeros(1, 2, 2, dtype=torch.long), dict(num_classes=5)),
    (torch.zeros(1, 21, 22, dtype=torch.long), dict(num_classes=5)),
])
def test_labels_that_can_be_learned_pass(labels: Tensor,
                                         head: dict[str, Any]) -> None:
    assert _check(labels, **head) is None


@pytest.mark.parametrize('labels, came', [
    (_labels(0, 5), 'classes up to 4, or 255 for none, but got 5'),
    (_labels(0, 254, 255), 'but got 254'),
    (_labels(-1), 'but got -1'),
    (torch.zeros(1, 4, 5, dtype=torch.long), 'but got [1, 4, 5]'),
    (torch.zeros(4, 4, 3, dtype=torch.long), 'but got [4, 4, 3]'),
    (torch.zeros(3, 4, 4, dtype=torch.long), 'but got [3, 4, 4]'),
    (torch.zeros(1, 8, 6, dtype=torch.long), 'but got [1, 8, 6]'),
])
def test_labels_that_cannot_be_learned_are_an_error(labels: Tensor,
                                                    came: str) -> None:
    with pytest.raises(ValueError) as error:
        _check(labels, num_classes=5)
    assert came in str(error.value) and 'masks/7.png' in str(error.value)


def _check_classifier(label: Any) -> None:
    structures = pytest.importorskip('mmpretrain.structures')
    model: Any = nn.Module()
    model.head = nn.Module()
    model.head.num_classes = 5
    sample = structures.DataSample(metainfo=dict(img_path='cats/7.png'))
    check_labels(model, dict(data_samples=[sample.set_gt_label(label)]))


@pytest.mark.parametrize('label', [0, 4, [1, 3]])
def test_classes_that_a_head_has_pass(label: Any) -> None:
    assert _check_classifier(label) is None


@pytest.mark.parametrize('label', [5, -1, [0, 7]])
def test_classes_that_a_head_lacks_are_an_error(label: Any) -> None:
    with pytest.raises(ValueError, match='up to 4, but got .*cats/7.png'):
        _check_classifier(label)


def test_check_of_the_labels_can_be_switched_off(
        monkeypatch: pytest.MonkeyPatch) -> None:
    runner: Any = SimpleNamespace(model=nn.Module())
    runner.model.decode_head = nn.Module()
    runner.model.decode_head.num_classes = 2
    batch = dict(
        inputs=[torch.zeros(3, 4, 4)], data_samples=[_sample(_labels(7))])
    with pytest.raises(ValueError, match='skip this check with GDP_CHECKS=0'):
        ResumeHook().before_train_iter(runner, 0, batch)
    monkeypatch.setenv('GDP_CHECKS', '0')
    assert ResumeHook().before_train_iter(runner, 0, batch) is None


def test_training_without_gates_resumes_exactly_too(project: Project,
                                                    tmp_path: Path) -> None:
    """By the hook that tools/train.py adds; dropout is what it draws."""
    ends = []
    for name, stops in (('whole', [6]), ('resumed', [3, 6])):
        work_dir = tmp_path / name
        for stop in stops:
            outcome = run_tool(
                'train.py',
                project.dense,
                '--work-dir',
                work_dir,
                *(['--resume'] if stop == 6 and len(stops) == 2 else []),
                '--cfg-options',
                f'train_cfg.max_iters={stop}',
                'param_scheduler.0.end=6',
                cwd=tmp_path)
            assert outcome.status == 0, outcome.stderr
        ends.append(_content(work_dir / 'iter_6.pth')['state_dict'])
    assert _same(*ends)


def test_weights_in_the_wrapper_of_processes_are_looked_at_too(
        tmp_path: Path) -> None:
    """As mmengine's FlexibleRunner saves them."""
    model = nn.Linear(2, 2)
    nn.init.constant_(model.weight, float('nan'))
    runner: Any = SimpleNamespace(model=model, iter=7, work_dir=str(tmp_path))
    state = {
        f'module.{key}': value
        for key, value in model.state_dict().items()
    }
    with pytest.raises(FloatingPointError, match='weight after iteration 8'):
        ResumeHook().before_save_checkpoint(runner,
                                            dict(state_dict=state, meta={}))


def test_metainfo_that_is_saved_as_text_is_named(project: Project,
                                                 tmp_path: Path) -> None:
    cfg = project.load(tmp_path)
    cfg.train_cfg.max_iters = 1
    cfg.train_dataloader.dataset.metainfo.maps = dict(root=Path('maps'))
    train(cfg)
    log = next(tmp_path.glob('*/*.log')).read_text()
    assert 'at metainfo.maps.root of the training set, but got' in log
    _, meta = read_checkpoint(str(tmp_path / 'iter_1.pth'))
    assert meta['dataset_meta']['maps'] == dict(root='maps')
