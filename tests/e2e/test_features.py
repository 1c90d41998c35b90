"""What mmengine can do to a training, gates go through with it.

Each feature goes the whole way: real steps of mmengine's runner, until some
gates are closed, then an export, which compares the outputs.
"""
from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, Callable

import pytest

pytest.importorskip('mmseg')

import torch
from mmengine.config import Config
from mmengine.optim import OptimWrapper
from mmengine.optim.optimizer import amp_optimizer_wrapper
from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from mmseg.models import SegDataPreProcessor
from torch import Tensor, nn

from gdp_mmseg.engine.hook import GDPHook
from gdp_mmseg.engine.model import find_pruner
from gdp_mmseg.export.export import export
from gdp_mmseg.gates.gdp import GDPGates
from gdp_mmseg.pruner.pruner import Pruner

from helpers.project import (PHASES, TARGET, WITHOUT_SYNC, Project, Recorder,
                             build_runner, train)

# Of these, 9 are in the pruning phase.
ITERATIONS = 12

# A quarter of the backbone and one dilation: compilers look at each layer.
SHALLOW: dict[str, Any] = {
    'model.backbone.num_stages': 1,
    'model.backbone.out_indices': (0, ),
    'model.backbone.strides': (1, ),
    'model.backbone.dilations': (1, ),
    'model.decode_head.in_channels': 16,
    'model.decode_head.in_index': 0,
    'model.decode_head.dilations': (1, ),
    'model.auxiliary_head': None,
}


def _optimizer(kind: str, **options: Any) -> dict[str, Any]:
    return {
        'optim_wrapper.optimizer':
        dict(options, _delete_=True, type=kind, lr=1e-3)
    }


EPOCHS: dict[str, Any] = {
    'train_cfg':
    dict(
        _delete_=True,
        type='EpochBasedTrainLoop',
        max_epochs=ITERATIONS // 2,
        val_interval=100),
    'train_dataloader.sampler':
    dict(_delete_=True, type='DefaultSampler', shuffle=True),
    'default_hooks.checkpoint':
    dict(_delete_=True, type='CheckpointHook', interval=100),
}
LOADER_PROCESSES = {
    'test_dataloader.num_workers': 1,
    'test_dataloader.prefetch_factor': 4,
    'test_dataloader.timeout': 60
}
FEATURES: dict[str, dict[str, Any]] = {
    'bfloat16': {
        'optim_wrapper.type': 'gdp_mmseg.BFloat16OptimWrapper'
    },
    'accumulation': {
        'optim_wrapper.accumulative_counts': 2
    },
    'average-of-weights': {
        'custom_hooks': [dict(type='EMAHook', momentum=0.2)]
    },
    'average-of-buffers': {
        'custom_hooks':
        [dict(type='EMAHook', momentum=0.2, update_buffers=True)]
    },
    'clipping-one-cycle-parameter-groups': {
        'optim_wrapper.clip_grad':
        dict(max_norm=0.1),
        'optim_wrapper.paramwise_cfg':
        dict(
            custom_keys={'backbone': dict(lr_mult=0.1, decay_mult=2.)},
            norm_decay_mult=0.),
        'param_scheduler': [
            dict(
                type='OneCycleLR',
                eta_max=0.01,
                total_steps=ITERATIONS,
                by_epoch=False)
        ]
    },
    'epochs': EPOCHS,
    'fused-optimizer': _optimizer('AdamW', fused=True, weight_decay=0.1),
    'foreach-optimizer-loader-processes': {
        **_optimizer('AdamW', foreach=True, weight_decay=0.1),
        **LOADER_PROCESSES
    },
    'frozen-stages-with_cp': {
        'model.backbone.frozen_stages': 2,
        'model.backbone.norm_eval': True,
        'model.backbone.with_cp': True
    },
    'activation_checkpointing': {
        'activation_checkpointing': ['backbone.layer3', 'decode_head']
    },
    'efficient_conv_bn_eval': {
        **WITHOUT_SYNC, 'model.backbone.norm_eval': True,
        'efficient_conv_bn_eval': ['backbone']
    },
    'FlexibleRunner': {
        'runner_type': 'FlexibleRunner',
        'strategy': dict(type='SingleDeviceStrategy')
    },
    'closed-channels-stay': {
        'model.gdp.shrink': False
    },
    'optimizer-of-other-states': _optimizer('TorchAdafactor'),
    'no-takeover': {
        'model.gdp.takeover': False
    },
}
# Features with which closed channels do not leave while the model trains.
KEEPING = ('efficient_conv_bn_eval', 'closed-channels-stay',
           'optimizer-of-other-states')
# With a process group, which has one process here.
FEATURES_OF_PROCESSES: dict[str, dict[str, Any]] = {
    'accumulation': {
        'optim_wrapper.accumulative_counts': 2
    },
    'find_unused_parameters': {
        'model_wrapper_cfg.find_unused_parameters': True
    },
    'broadcast_buffers': {
        'model_wrapper_cfg.broadcast_buffers': True
    },
    'checkpointing': {
        'model.backbone.with_cp': True,
        'model_wrapper_cfg.static_graph': True
    },
    'ZeroRedundancyOptimizer':
    _optimizer('ZeroRedundancyOptimizer', optimizer_type='AdamW'),
    'FlexibleRunner': {
        'runner_type':
        'FlexibleRunner',
        'strategy':
        dict(
            type='DDPStrategy',
            model_wrapper=dict(
                type='MMDistributedDataParallel', device_ids=None))
    },
}
KEEPING_OF_PROCESSES = ('ZeroRedundancyOptimizer', 'FlexibleRunner')


def _train(cfg: Config) -> tuple[Any, Recorder]:
    """:func:`project.train`, by the runner that the config asks for."""
    if 'runner_type' not in cfg:
        return train(cfg)
    runner, recorder = build_runner(cfg, RUNNERS.build), Recorder()
    runner.register_hook(recorder)
    runner.train()
    return runner, recorder


def _export(project: Project, folder: Path, **options: Any) -> dict[str, Any]:
    return export(
        project.load(folder, **options),
        str(next(folder.glob('*.pth'))),
        folder / 'pair',
        'name',
        evaluate=False)


def _check_the_whole_way(runner: Any, report: dict[str, Any]) -> None:
    """Some gates are closed, some open, as asked; the export is exact."""
    closed = find_pruner(runner.model).gates.is_closed()
    assert bool(closed.any()) and not bool(closed.all())
    assert report.max_rel_diff <= 1e-5
    assert report.reached == pytest.approx(TARGET, abs=0.05)


def _short(**options: Any) -> dict[str, Any]:
    return {'train_cfg.max_iters': ITERATIONS, **options}


@pytest.mark.parametrize('name', FEATURES)
def test_training_goes_on_to_an_export(name: str, project: Project,
                                       tmp_path: Path,
                                       gate_of: Callable[[int], str]) -> None:
    # SCP has no gates on norms that are frozen.
    frozen = 'model.backbone.norm_eval' in FEATURES[name]
    # An average has what a takeover knows, too.
    of_gdp = name in ('average-of-buffers', 'no-takeover')
    gate = 'gdp' if of_gdp else gate_of(
        0 if frozen else [*FEATURES].index(name))
    options = _short(**FEATURES[name], **{'model.gdp.gate': gate})
    if frozen and gate == 'scp':
        with pytest.raises(ValueError, match='frozen batch norm'):
            _train(project.load(tmp_path, **options))
        return
    runner, recorder = _train(project.load(tmp_path, **options))
    assert len(recorder.theta) == runner.max_iters == ITERATIONS
    assert (recorder.sizes[-1] == recorder.sizes[0]) == (name in KEEPING)
    _check_the_whole_way(runner, _export(project, tmp_path, **options))


@pytest.mark.usefixtures('process_group')
@pytest.mark.parametrize('name', FEATURES_OF_PROCESSES)
def test_distributed_training_goes_on_to_an_export(
        name: str, project: Project, tmp_path: Path,
        gate_of: Callable[[int], str]) -> None:
    gate = {
        'model.gdp.gate': gate_of([*FEATURES_OF_PROCESSES].index(name) + 1)
    }
    options = _short(**FEATURES_OF_PROCESSES[name], **gate)
    runner, recorder = _train(project.load_for_processes(tmp_path, **options))
    assert (recorder.sizes[-1] == recorder.sizes[0]) == (
        name in KEEPING_OF_PROCESSES)
    _check_the_whole_way(runner,
                         _export(project, tmp_path, **WITHOUT_SYNC, **gate))


@pytest.fixture()
def amp_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """mmengine's AmpOptimWrapper, which refuses a CPU that could do it."""
    module = amp_optimizer_wrapper
    monkeypatch.setattr(module, 'is_cuda_available', lambda: True)
    monkeypatch.setattr(module, 'GradScaler',
                        functools.partial(torch.amp.GradScaler, 'cpu'))


@pytest.mark.usefixtures('amp_on_a_cpu')
@pytest.mark.parametrize('clip, fused', [(None, False),
                                         (dict(max_norm=1.), True)])
def test_mixed_precision_goes_on_to_an_export(
        clip: dict[str, Any] | None, fused: bool, project: Project,
        tmp_path: Path, gate_of: Callable[[int], str]) -> None:
    """The loss scale is too large at first: steps are skipped."""
    gate = {'model.gdp.gate': gate_of(int(fused))}
    options = _short(
        **_optimizer('AdamW', fused=fused), **{
            'optim_wrapper.type': 'AmpOptimWrapper',
            'optim_wrapper.loss_scale': dict(init_scale=2.**127),
            'model.decode_head.loss_decode.loss_weight': 16 / 6000,
            'optim_wrapper.clip_grad': clip,
            **gate
        })
    runner, recorder = _train(project.load(tmp_path, **options))
    skipped = next(index for index, seen in enumerate(recorder.observed)
                   if seen)
    assert 0 < skipped < ITERATIONS
    assert recorder.observed[0] == 0
    assert all(gain.isfinite().all() for gain in recorder.gain)
    _check_the_whole_way(runner, _export(project, tmp_path, **gate))


def test_compiled_training_is_the_plain_one(
        project: Project, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    """What mmengine compiles calls the gated layers; no step of the gates."""
    # It would be compiled again for each image's name.
    monkeypatch.setattr(SegDataPreProcessor, 'forward',
                        torch.compiler.disable(SegDataPreProcessor.forward))
    step, traced = Pruner.step_, []

    def step_(pruner: Pruner, *arguments: Any) -> Any:
        traced.append(torch.compiler.is_compiling())
        return step(pruner, *arguments)

    monkeypatch.setattr(Pruner, 'step_', step_)
    torch._dynamo.reset()
    frames = torch._dynamo.utils.counters['frames']
    options: dict[str, Any] = {'train_cfg.max_iters': 4, **SHALLOW}
    # What compiled layers read is not observed.
    _, plain = train(
        project.load(tmp_path / 'plain', **options,
                     **{'model.gdp.takeover': False}))
    assert frames['ok'] == 0
    options['compile'] = dict(backend='eager')
    # A layer of another size is another compilation; the first few tell.
    with torch._dynamo.config.patch(recompile_limit=2):
        runner, compiled = train(project.load(tmp_path, **options))
    assert frames['ok'] > 0
    torch._dynamo.reset()
    log, = tmp_path.glob('*/*.log')
    assert 'other channels take over nothing' in log.read_text()
    assert traced == [False] * 8
    for one, other in zip(compiled.theta, plain.theta):
        assert torch.allclose(one, other, atol=1e-4)
    theta = runner.model.gdp.gates.theta
    assert bool((theta == 0).any()) and bool((theta > 0).any())
    assert _export(project, tmp_path, **SHALLOW).max_rel_diff <= 1e-5


# -- accumulation -----------------------------------------------------------


def test_gates_travel_as_far_with_fewer_steps(
        project: Project, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest step goes the travel over the steps of the phase."""
    step, longest = GDPGates.step_, []

    def step_(gates: GDPGates, cost: Any, budget: float, lr: float, *others:
              Any) -> Any:
        longest.append(lr)
        return step(gates, cost, budget, lr, *others)

    monkeypatch.setattr(GDPGates, 'step_', step_)
    options = {
        'train_cfg.max_iters': 24,
        'optim_wrapper.accumulative_counts': 4,
        'model.gdp.gate_travel': 3.
    }
    train(project.load(tmp_path, **options))
    # The last of the six steps is in the settling phase.
    assert longest == pytest.approx([3. / (6 * PHASES[1])] * 5)


# -- clipping ---------------------------------------------------------------


class Weights(nn.Module):
    """A weight, and the gates."""

    def __init__(self, theta: nn.Parameter) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.theta = theta


def test_gates_count_for_nothing_in_a_norm(project: Project,
                                           tmp_path: Path) -> None:
    """(3, 4) is clipped to the norm 1, as if the gates had no gradient."""
    cfg = project.load(tmp_path)
    cfg.optim_wrapper.clip_grad = dict(max_norm=1.)
    runner = Runner.from_cfg(cfg)
    theta = runner.model.gdp.gates.theta
    weights = Weights(theta)
    runner.optim_wrapper = OptimWrapper(
        torch.optim.SGD(weights.parameters(), lr=1.),
        clip_grad=dict(max_norm=1.))
    runner._train_loop = runner.build_train_loop(cfg.train_cfg)
    GDPHook().before_train(runner)
    seen: list[Tensor] = []
    runner.model.gdp.step_ = lambda *_: seen.append(theta.grad.clone())
    weights.weight.grad = torch.tensor([3., 4.])
    theta.grad = torch.full_like(theta, 100.)
    runner.optim_wrapper.step()
    assert torch.allclose(weights.weight.detach(), torch.tensor([-0.6, -0.8]))
    assert len(seen) == 1
    assert torch.equal(seen[0], torch.full_like(theta, 100.))
    norm = runner.message_hub.get_scalar('train/grad_norm').current()
    assert norm == pytest.approx(5.)


@pytest.mark.parametrize(
    'clip', [dict(max_norm=1e-4),
             dict(type='value', clip_value=1e-6)])
def test_clipping_leaves_what_the_gates_see(clip: dict[str,
                                                       Any], project: Project,
                                            tmp_path: Path) -> None:
    options: dict[str, Any] = {'train_cfg.max_iters': 1}
    _, plain = train(project.load(tmp_path / 'plain', **options))
    options['optim_wrapper.clip_grad'] = clip
    _, clipped = train(project.load(tmp_path, **options))
    assert float(plain.gain[0].abs().max()) > 0
    assert torch.equal(clipped.gain[0], plain.gain[0])
