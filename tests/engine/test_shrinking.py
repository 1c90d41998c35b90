"""Closed channels leave while it trains, and files stay dense."""
from __future__ import annotations

import copy
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip('mmseg')

import torch
from mmengine.hooks import Hook
from mmengine.model import MMDistributedDataParallel
from mmengine.runner import Runner
from torch import Tensor, nn

from gdp_mmseg.analysis.liveness import kept_channels
from gdp_mmseg.engine.matching import gate_meta
from gdp_mmseg.engine.model import find_pruner, known_gates
from gdp_mmseg.engine.shrinking import ShrinkHook
from gdp_mmseg.surgery.shrink import Shrinkage

from helpers.project import ITERATIONS, Project, Trained, build, build_runner
from helpers.toys import all_outputs

INPUTS = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def shapes(state: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in state.items()}


def test_model_gets_smaller_only_while_it_trains(trained: Trained) -> None:
    sizes = trained.recorder.sizes
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) > 3 and sizes[-1] < 0.6 * sizes[0]
    parameters = trained.runner.model.parameters()
    assert sum(one.numel() for one in parameters) == sizes[0]
    assert all(one.requires_grad for one in parameters)
    log = next(trained.work_dir.glob('*/*.log')).read_text()
    assert log.count('channels have left the training') == len(set(sizes)) - 1


def test_checkpoint_is_dense_and_says_what_had_left(trained: Trained) -> None:
    content = torch.load(
        trained.checkpoint, map_location='cpu', weights_only=True)
    model = build(trained.runner.cfg.model)
    assert shapes(content['state_dict']) == shapes(model.state_dict())
    closed = content['state_dict']['gdp.gates.closed'] > 0
    assert torch.equal(content['meta']['gdp']['cut'], closed)
    states = content['optimizer']['state']
    # The weights are numbered in their order; theta is the last one.
    for index, parameter in enumerate(list(model.parameters())[:-1]):
        assert states[index]['momentum_buffer'].shape == parameter.shape


class Outputs(Hook):
    """Outputs of the model, in eval mode, after the last iteration."""

    def after_train_iter(self, runner: Runner, *_: Any, **__: Any) -> None:
        if runner.iter + 1 == runner.max_iters:
            model = copy.deepcopy(runner.model).eval()
            self.numbers = sum(one.numel() for one in model.parameters())
            with torch.no_grad():
                self.outputs = model(INPUTS, mode='tensor')


def test_dense_checkpoint_computes_what_the_small_model_did(
        project: Project, tmp_path: Path) -> None:
    cfg = project.load(tmp_path, **{'train_cfg.max_iters': 12})
    runner, hook = build_runner(cfg), Outputs()
    runner.register_hook(hook)
    runner.train()
    model = build(cfg.model).eval()
    state = torch.load(tmp_path / 'iter_12.pth', weights_only=True)
    model.load_state_dict(state['state_dict'])
    assert hook.numbers < sum(one.numel() for one in model.parameters())
    with torch.no_grad():
        for dense in (model, runner.model.eval()):
            torch.testing.assert_close(
                dense(INPUTS, mode='tensor'),
                hook.outputs,
                rtol=1e-4,
                atol=1e-4)


OPTIMIZERS = dict(
    SGD=dict(lr=1e-4, momentum=0.9, weight_decay=1e-3),
    AdamW=dict(lr=1e-4, weight_decay=0.1))


def trained_alone(model: Any, optimizer: str,
                  cut: bool) -> tuple[list[float], list[Tensor], int]:
    """Losses of a training, outputs of its average, numbers at its end."""
    model, steps = copy.deepcopy(model).double().train(), 8
    pruner = find_pruner(model)
    average = copy.deepcopy(model)
    trains = getattr(torch.optim, optimizer)(model.parameters(),
                                             **OPTIMIZERS[optimizer])
    narrowed = [Shrinkage(one, pruner.analysis) for one in (model, average)]
    losses = []
    for index in range(steps):
        trains.zero_grad()
        loss = sum((one - 0.1).square().mean()
                   for one in all_outputs(model, INPUTS.double()))
        loss.backward()
        pruner.step_(index / steps, steps)
        trains.step()
        losses.append(float(loss.detach()))
        with torch.no_grad():
            for one, other in zip(average.parameters(), model.parameters()):
                one.lerp_(other, 0.2)
            for one, other in zip(average.buffers(), model.buffers()):
                one.copy_(other)
        if cut and index % 2:
            keep = kept_channels(pruner.analysis, pruner.gates.openness())
            narrowed[0].narrow_(keep, trains)
            narrowed[1].narrow_(keep)
    numbers = sum(one.numel() for one in model.parameters())
    with torch.no_grad():
        return losses, all_outputs(average.eval(), INPUTS.double()), numbers


@pytest.mark.parametrize('optimizer', OPTIMIZERS)
def test_gates_weights_and_averages_are_those_of_the_uncut_training(
        trained: Trained, optimizer: str) -> None:
    """In double precision, at steps that amplify no difference."""
    config = copy.deepcopy(trained.runner.cfg.model)
    # Dropout draws a number for each channel.
    config.decode_head.dropout_ratio = 0.
    config.auxiliary_head.dropout_ratio = 0.
    config.gdp.update(gate_travel=3., phases=(0.1, 0.6, 0.3))
    with known_gates(gate_meta(find_pruner(trained.runner.model))):
        model = build(config)
    whole, averaged, dense = trained_alone(model, optimizer, cut=False)
    losses, narrow, numbers = trained_alone(model, optimizer, cut=True)
    assert numbers < 0.7 * dense
    assert losses == pytest.approx(whole, rel=1e-9)
    for one, other in zip(narrow, averaged):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


class _Flexible:
    """A runner of another class than mmengine's Runner."""

    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)


@pytest.mark.parametrize('wrapped, cfg, reason', [
    (True, {}, 'FlexibleRunner does not wrap'),
    (False, dict(efficient_conv_bn_eval=['backbone']),
     'efficient_conv_bn_eval does not work'),
    (False, {}, 'a trial step of Broken fails'),
])
def test_reason_for_closed_channels_that_stay_is_logged_once(
        trained: Trained, wrapped: bool, cfg: dict[str, Any], reason: str,
        caplog: pytest.LogCaptureFixture) -> None:
    model = copy.deepcopy(trained.runner.model)

    class Broken(torch.optim.SGD):

        def step(self, closure: Any = None) -> None:
            raise RuntimeError('no')

    wrapper = MMDistributedDataParallel.__new__(MMDistributedDataParallel)
    nn.Module.__init__(wrapper)
    wrapper.module = model
    logger = logging.getLogger('shrinking')
    runner: Any = _Flexible(
        model=wrapper if wrapped else model,
        cfg=cfg,
        iter=0,
        max_iters=ITERATIONS,
        hooks=[],
        logger=logger,
        optim_wrapper=SimpleNamespace(
            optimizer=Broken(model.parameters(), lr=0.1)))
    hook = ShrinkHook()
    with caplog.at_level(logging.WARNING, logger.name):
        hook.before_train(runner)
        for runner.iter in range(ITERATIONS):
            hook.before_train_iter(runner, 0)
    assert len(caplog.messages) == 1
    assert reason in caplog.messages[0]
    assert 'gdp=dict(shrink=False)' in caplog.messages[0]
