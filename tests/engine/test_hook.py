"""GDPHook: the gates move when, and only when, the optimizer steps."""
from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip('mmseg')

import torch
from mmengine.hooks import EMAHook
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS
from mmengine.runner import IterBasedTrainLoop, Runner
from torch import Tensor, nn

from gdp_mmseg.engine.hook import averages
from gdp_mmseg.engine.model import find_pruner
from gdp_mmseg.export.export import export
from gdp_mmseg.pruner.pruner import Pruner
from gdp_mmseg.report.record import read_rows

from helpers.project import (ITERATIONS, PHASES, TARGET, Project, Recorder,
                             Trained, build, train)
from helpers.reads import reads_of

WARM = round(ITERATIONS * PHASES[0])
SETTLED = round(ITERATIONS * (PHASES[0] + PHASES[1]))
OVERFLOWS = (1, 10)
# Modules at work in each iteration, but for the checks of labels and loss: the
# labels are on the host still, and mmengine has read the loss itself.
STEP = ('gdp_mmseg.gates', 'gdp_mmseg.cost', 'gdp_mmseg.pruner',
        'gdp_mmseg.analysis.liveness', 'gdp_mmseg.engine.hook',
        'gdp_mmseg.engine.monitor')


@OPTIM_WRAPPERS.register_module()
class OverflowingOptimWrapper(OptimWrapper):
    """mmengine's AmpOptimWrapper, on a CPU, with overflows at OVERFLOWS."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.scaler = torch.amp.GradScaler('cpu', init_scale=2.**8)
        self.calls = 0

    def backward(self, loss: Tensor, **arguments: Any) -> None:
        if self.calls in OVERFLOWS:
            loss = loss * float('inf')
        self.calls += 1
        self.scaler.scale(loss).backward(**arguments)
        self._inner_count += 1

    def step(self, **arguments: Any) -> None:
        self.scaler.step(self.optimizer)
        self.scaler.update()


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class TwoOptimizers:
    """One for the backbone, one for the head."""

    def __init__(self, **_: Any) -> None:
        pass

    def __call__(self, model: nn.Module) -> OptimWrapperDict:
        return OptimWrapperDict(
            **{
                name: OptimWrapper(
                    torch.optim.SGD(part.parameters(), lr=0.01))
                for name, part in (('backbone', model.backbone),
                                   ('head', model.decode_head))
            })


def _share(pruner: Pruner, theta: Tensor) -> float:
    """FLOPs of the open channels, over the dense ones."""
    return float(pruner.cost((theta > 0).float()))


def _same(one: Tensor, other: Tensor) -> bool:
    return bool(torch.equal(one, other))


def test_users_optimizer_holds_theta_but_never_moves_or_decays_it(
        trained: Trained) -> None:
    optimizer = trained.runner.optim_wrapper.optimizer
    group = optimizer.param_groups[0]
    assert group['weight_decay'] > 0 and group['momentum'] > 0
    theta = trained.runner.model.gdp.gates.theta
    assert any(parameter is theta for parameter in group['params'])
    # No momentum of theta was ever made, that of the weights was.
    assert theta not in optimizer.state
    weight = trained.runner.model.backbone.stem[0].weight
    assert 'momentum_buffer' in optimizer.state[weight]


@pytest.mark.parametrize('optimizer', [
    dict(type='AdamW', lr=1e-3, weight_decay=0.5),
    dict(type='SGD', lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    dict(type='RMSprop', lr=1e-3, weight_decay=0.1, momentum=0.9),
])
def test_no_optimizer_moves_a_still_gate(project: Project, tmp_path: Path,
                                         optimizer: dict[str, Any]) -> None:
    cfg = project.load(tmp_path)
    cfg.optim_wrapper.optimizer = optimizer
    cfg.train_cfg.max_iters = 3
    cfg.model.gdp.phases = (0.9, 0.1, 0.)
    _, recorder = train(cfg)
    for theta in recorder.theta:
        assert _same(theta, torch.ones_like(theta))


def test_theta_has_no_gradient_after_a_step(trained: Trained) -> None:
    assert len(trained.recorder.grads) == ITERATIONS
    assert trained.recorder.grads == [None] * ITERATIONS


def test_warmup_does_not_move_gates_but_observes_them(
        trained: Trained) -> None:
    recorder = trained.recorder
    for theta in recorder.theta[:WARM]:
        assert _same(theta, torch.ones_like(theta))
    assert recorder.observed[:WARM] == list(range(1, WARM + 1))
    assert float(recorder.gain_square[0].max()) > 0


def test_pruning_moves_gates(trained: Trained) -> None:
    theta = trained.recorder.theta
    assert not _same(theta[WARM - 1], theta[SETTLED - 1])
    assert bool((theta[SETTLED - 1] == 0).any())
    assert bool((theta[SETTLED - 1] > 0).any())


def test_settling_does_not_move_gates(trained: Trained) -> None:
    recorder = trained.recorder
    assert len(recorder.theta[SETTLED:]) > 1
    for theta in recorder.theta[SETTLED:]:
        assert _same(theta, recorder.theta[SETTLED - 1])
    assert set(recorder.observed[SETTLED:]) == {SETTLED}


def test_closed_gates_stay_closed(trained: Trained) -> None:
    theta = trained.recorder.theta
    for before, after in zip(theta, theta[1:]):
        assert bool((after[before == 0] == 0).all())


def test_training_ends_at_the_target_by_whole_channels(
        trained: Trained) -> None:
    pruner = trained.runner.model.gdp
    share = _share(pruner, trained.recorder.theta[-1])
    assert TARGET - 0.02 <= share <= TARGET + 0.02
    # What the openness says agrees: no gate is left half open.
    by_openness = float(pruner.cost(pruner.gates.openness()))
    assert by_openness == pytest.approx(share, abs=0.02)


def test_checkpoint_carries_the_gates(trained: Trained) -> None:
    state = torch.load(
        trained.checkpoint, map_location='cpu',
        weights_only=False)['state_dict']
    gates = trained.runner.model.gdp.gates
    assert _same(state['gdp.gates.theta'], gates.theta.detach().cpu())
    assert int(state['gdp.gates.observed']) == SETTLED
    assert float(state['gdp.gates.epsilon']) == pytest.approx(
        float(gates.epsilon))


def test_path_of_the_gates_is_recorded(trained: Trained) -> None:
    path = trained.work_dir / 'gates.jsonl'
    first, *rows = map(json.loads, path.read_text().splitlines())
    pruner = trained.runner.model.gdp
    assert first['groups'] == [
        dict(writers=list(group.writers), channels=len(group.gates))
        for group in pruner.analysis.groups
    ]
    assert all(
        set(row) == {'iter', 'flops', 'budget', 'held_cost', 'openness'}
        for row in rows)
    assert [row['iter'] for row in rows] == list(range(1, ITERATIONS + 1))
    assert rows[0]['flops'] == 1
    assert rows[-1]['flops'] == pytest.approx(
        _share(pruner, trained.recorder.theta[-1]))
    for row in rows:
        assert len(row['openness']) == len(pruner.analysis.groups)
        assert all(0 <= value <= 1 for value in row['openness'])
    assert [dataclasses.asdict(row) for row in read_rows(path)] == rows


def test_share_of_flops_is_logged_with_the_losses(trained: Trained) -> None:
    log = next(trained.work_dir.glob('*/*.log')).read_text()
    lines = [line for line in log.splitlines() if 'Iter(train)' in line]
    assert len(lines) == ITERATIONS
    for line in lines:
        for name in ('flops', 'flops_by_openness', 'undecided', 'multiplier'):
            assert f'gdp_{name}: ' in line


def test_interval_is_that_of_the_record(project: Project,
                                        tmp_path: Path) -> None:
    cfg = project.load(tmp_path)
    cfg.default_hooks.gdp.interval = 4
    cfg.train_cfg.max_iters = 10
    train(cfg)
    assert [row.iter for row in read_rows(tmp_path / 'gates.jsonl')] == [4, 8]


def test_a_new_training_starts_a_new_record(project: Project,
                                            tmp_path: Path) -> None:
    cfg = project.load(tmp_path)
    cfg.train_cfg.max_iters = 2
    for _ in range(2):
        train(copy.deepcopy(cfg))
        assert [row.iter
                for row in read_rows(tmp_path / 'gates.jsonl')] == [1, 2]


# A fused optimizer unscales by itself and is called at overflows too.
@pytest.mark.parametrize('fused', [False, True])
def test_skipped_step_leaves_the_gates_untouched(project: Project,
                                                 tmp_path: Path,
                                                 fused: bool) -> None:
    cfg = project.load(tmp_path)
    cfg.optim_wrapper.type = 'OverflowingOptimWrapper'
    cfg.optim_wrapper.optimizer.fused = fused
    # Both overflows are among them, and gates that move after the last one.
    cfg.train_cfg.max_iters = ITERATIONS // 2
    _, recorder = train(cfg)
    steps = [index not in OVERFLOWS for index in range(ITERATIONS // 2)]
    for index in range(1, SETTLED // 2):
        for history in (recorder.theta, recorder.gain, recorder.gain_square):
            same = _same(history[index], history[index - 1])
            if not steps[index]:
                assert same
        moved = recorder.observed[index] - recorder.observed[index - 1]
        assert moved == steps[index]
    assert all(gain.isfinite().all() for gain in recorder.gain)
    assert recorder.grads == [None] * (ITERATIONS // 2)


@pytest.mark.parametrize('fused', [False, True])
def test_gates_see_unscaled_gradients(project: Project, trained: Trained,
                                      tmp_path: Path, fused: bool) -> None:
    cfg = project.load(tmp_path)
    cfg.optim_wrapper.type = 'OverflowingOptimWrapper'
    cfg.optim_wrapper.optimizer.fused = fused
    cfg.train_cfg.max_iters = 1
    _, recorder = train(cfg)
    expected = trained.recorder.gain[0]
    scale = float(expected.abs().max())
    assert scale > 0
    assert torch.allclose(recorder.gain[0], expected, atol=1e-4 * scale)


def test_accumulated_gradients_make_one_gate_step(project: Project,
                                                  tmp_path: Path) -> None:
    cfg = project.load(tmp_path)
    cfg.optim_wrapper.accumulative_counts = 2
    cfg.train_cfg.max_iters = ITERATIONS // 2
    _, recorder = train(cfg)
    settled = SETTLED // 2
    # The optimizer steps at every second iteration.
    assert recorder.observed[:settled] == [(index + 1) // 2
                                           for index in range(settled)]
    for index in range(0, ITERATIONS // 2, 2):
        before = recorder.theta[index - 1] if index else torch.ones_like(
            recorder.theta[0])
        assert _same(recorder.theta[index], before)


def test_training_by_epochs_ends_at_the_target_too(project: Project,
                                                   tmp_path: Path) -> None:
    cfg = project.load(tmp_path)
    cfg.train_cfg = dict(
        type='EpochBasedTrainLoop', max_epochs=10, val_interval=100)
    cfg.train_dataloader.sampler = dict(type='DefaultSampler', shuffle=True)
    cfg.default_hooks.checkpoint = dict(type='CheckpointHook', interval=100)
    runner, recorder = train(cfg)
    assert runner.max_iters == len(recorder.theta) == 20
    share = _share(runner.model.gdp, recorder.theta[-1])
    assert TARGET - 0.03 <= share <= TARGET + 0.02


def test_resumed_training_goes_on_where_it_stopped(project: Project,
                                                   tmp_path: Path) -> None:
    half = ITERATIONS // 2
    stop = project.load(tmp_path)
    stop.default_hooks.checkpoint.interval = half

    class Stop(Recorder):

        def after_train_iter(self, runner: Runner, *args: Any,
                             **kwargs: Any) -> None:
            super().after_train_iter(runner, *args, **kwargs)
            if runner.iter + 1 == half:
                raise KeyboardInterrupt

    runner, first = Runner.from_cfg(stop), Stop()
    runner.register_hook(first)
    with pytest.raises(KeyboardInterrupt):
        runner.train()
    cfg = project.load(tmp_path)
    cfg.resume = True
    runner, second = train(cfg)
    assert len(second.theta) == ITERATIONS - half
    assert second.observed[0] == first.observed[-1] + 1
    assert bool((first.theta[-1] == 0).any())
    for theta in second.theta:
        assert bool((theta[first.theta[-1] == 0] == 0).all())
    share = _share(runner.model.gdp, second.theta[-1])
    assert TARGET - 0.02 <= share <= TARGET + 0.02
    assert [row.iter for row in read_rows(tmp_path / 'gates.jsonl')
            ] == list(range(1, ITERATIONS + 1))


def test_hook_without_gates_is_an_error(project: Project,
                                        tmp_path: Path) -> None:
    hook = dict(gdp=dict(type='gdp_mmseg.GDPHook'))
    cfg = project.load(tmp_path, project.dense, default_hooks=hook)
    with pytest.raises(ValueError) as error:
        Runner.from_cfg(cfg).train()
    message = str(error.value)
    assert message.startswith('expected a model with gates')
    assert 'but got EncoderDecoder' in message
    assert 'gdp_mmseg.GDPModel' in message


def test_several_optimizers_are_an_error(project: Project,
                                         tmp_path: Path) -> None:
    cfg = project.load(tmp_path)
    cfg.optim_wrapper = dict(constructor='TwoOptimizers')
    cfg.param_scheduler = None
    with pytest.raises(ValueError) as error:
        Runner.from_cfg(cfg).train()
    message = str(error.value)
    assert message.startswith('GDPHook: expected one optimizer')
    assert 'but got OptimWrapperDict' in message
    assert 'optim_wrapper' in message.partition(';')[2]


def test_gates_are_found_behind_a_model_wrapper(project: Project,
                                                tmp_path: Path) -> None:
    model = build(project.load(tmp_path).model)
    assert find_pruner(model) is model.gdp
    assert find_pruner(nn.DataParallel(model)) is model.gdp


@pytest.fixture(scope='module')
def averaged(project: Project,
             tmp_path_factory: pytest.TempPathFactory) -> tuple[Runner, Path]:
    """A training whose weights mmengine's EMAHook averages."""
    work_dir = tmp_path_factory.mktemp('averaged')
    cfg = project.load(work_dir)
    cfg.custom_hooks = [dict(type='EMAHook', momentum=0.2)]
    runner, _ = train(cfg)
    return runner, work_dir / f'iter_{ITERATIONS}.pth'


def test_averaged_copy_follows_its_own_gates(
        averaged: tuple[Runner, Path]) -> None:
    runner, _ = averaged
    hook = next(hook for hook in runner.hooks if isinstance(hook, EMAHook))
    source = copy.deepcopy(hook.src_model).eval()
    average = copy.deepcopy(hook.ema_model.module).eval()
    inputs = torch.randn(1, 3, 64, 64)

    def outputs(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return model(inputs, mode='tensor')

    of_source, of_average = outputs(source), outputs(average)
    assert average.gdp is not source.gdp
    with torch.no_grad():
        average.gdp.gates.theta.zero_()
    assert _same(outputs(source), of_source)
    changed = outputs(average)
    assert not torch.allclose(changed, of_average)
    with torch.no_grad():
        source.gdp.gates.theta.zero_()
    assert not torch.allclose(outputs(source), of_source)
    assert _same(outputs(average), changed)


def test_averaged_gates_are_closed_where_the_source_is(
        averaged: tuple[Runner, Path]) -> None:
    runner, _ = averaged
    hook = next(hook for hook in runner.hooks if isinstance(hook, EMAHook))
    closed = hook.src_model.gdp.gates.openness() == 0
    assert bool(closed.any())
    average = hook.ema_model.module.gdp.gates.openness()
    assert float(average[closed].max()) == 0


def test_averaged_gates_go_on_in_another_training_as_they_are(
        averaged: tuple[Runner, Path]) -> None:
    pruner, = copy.deepcopy(averages(averaged[0]))
    before = pruner.gates.openness()
    pruner.begin_(0., ITERATIONS)
    assert float(pruner.gates.epsilon) == pytest.approx(0.1)
    assert torch.allclose(pruner.gates.openness(), before, atol=1e-5)


def test_averaged_checkpoint_exports_at_the_target(project: Project,
                                                   averaged: tuple[Runner,
                                                                   Path],
                                                   tmp_path: Path) -> None:
    """Its ``state_dict`` is that of the average."""
    report = export(
        project.load(tmp_path),
        str(averaged[1]),
        tmp_path / 'pair',
        'averaged',
        evaluate=False)
    share = report.network('pruned').flops / report.network('dense').flops
    assert share <= TARGET + 0.02


def test_an_iteration_reads_once_from_the_device(
        project: Project, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = project.load(tmp_path)
    cfg.train_cfg.max_iters = 10
    cfg.default_hooks.gdp.interval = 1
    # Where channels leave, about ten times in a training, more is read.
    cfg.model.gdp.shrink = False
    run_iter, reads = IterBasedTrainLoop.run_iter, []

    def watched(loop: IterBasedTrainLoop, batch: Any) -> None:
        with reads_of(*STEP) as found:
            run_iter(loop, batch)
        reads.append(found)

    monkeypatch.setattr(IterBasedTrainLoop, 'run_iter', watched)
    runner, _ = train(cfg)
    schedule = find_pruner(runner.model).schedule
    # Steps of a takeover, two dozen in a training, read more.
    others = [
        index for index in range(10) if not schedule.is_takeover(index, 10)
    ]
    expected = [
        schedule.phase_at(index / 10) != 'settling' for index in others
    ]
    assert [len(reads[index]) for index in others] == expected
    assert 0 < sum(expected) < len(expected) < 10


def test_training_leaves_the_optimizer_as_it_was(project: Project,
                                                 tmp_path: Path) -> None:
    """A second training with the same optimizer steps the gates once."""
    cfg = project.load(tmp_path)
    cfg.train_cfg.max_iters = 4
    cfg.optim_wrapper.clip_grad = dict(max_norm=1.)
    first, _ = train(copy.deepcopy(cfg))
    clip, steps = first.optim_wrapper.clip_func, []
    pruner = find_pruner(first.model)
    pruner.step_ = lambda *_: steps.append(1)
    second = Runner(
        model=first.model,
        work_dir=str(tmp_path / 'second'),
        train_dataloader=copy.deepcopy(cfg.train_dataloader),
        train_cfg=dict(cfg.train_cfg),
        optim_wrapper=first.optim_wrapper,
        default_hooks=dict(cfg.default_hooks),
        default_scope='mmseg')
    second.train()
    assert len(steps) == 4
    assert second.optim_wrapper.clip_func is clip
    assert clip is torch.nn.utils.clip_grad_norm_


@pytest.mark.parametrize('key, value, message', [
    ('note', '{{ fileBasename }}', 'at note .* comes back as another'),
    ('gdp_exported', True, 'to prune further, train the gated config again'),
])
def test_config_is_checked_before_the_training(project: Project,
                                               tmp_path: Path, key: str,
                                               value: Any,
                                               message: str) -> None:
    """An export could not write it, or it is one of an export."""
    cfg = project.load(tmp_path)
    cfg.train_cfg.max_iters = 1
    cfg[key] = value
    with pytest.raises(ValueError, match=message):
        train(cfg)
    assert not list(tmp_path.glob('*.pth'))
