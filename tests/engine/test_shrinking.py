"""Closed channels leave while it trains, and files stay dense."""
from __future__ import annotations

import copy
import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip('mmseg')

import torch
from mmengine.config import ConfigDict
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


def test_channels_leave_when_others_have_taken_over(trained: Trained) -> None:
    sizes = trained.recorder.sizes
    behind = [bool((left > 0.01).any()) for left in trained.recorder.left]
    cuts = [
        index for index, (before, after) in enumerate(zip(sizes, sizes[1:]))
        if after < before
    ]
    assert cuts and any(behind)
    assert not any(behind[index] for index in cuts)


def test_checkpoint_is_dense_and_says_what_had_left(trained: Trained) -> None:
    content = torch.load(
        trained.checkpoint, map_location='cpu', weights_only=True)
    model = build(trained.runner.cfg.model)
    assert shapes(content['state_dict']) == shapes(model.state_dict())
    closed = content['state_dict']['gdp.gates.closed'] > 0
    cut = content['meta']['gdp']['cut']
    assert not (cut & ~closed).any()
    for group in find_pruner(model).analysis.groups:
        # Widths are multiples of 8, by closed channels that stay.
        kept = int((~closed[group.gates]).sum())
        assert int((~cut[group.gates]).sum()) == min(
            math.ceil(kept / 8) * 8, len(group.gates))
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


def trained_alone(model: Any, inputs: Tensor, optimizer: str,
                  cut: bool) -> tuple[list[float], list[Tensor], int]:
    """Losses of a training, outputs of its average, numbers at its end.

    In the middle of it, a whole group closes if one can.
    """
    model, steps = copy.deepcopy(model).double().train(), 8
    pruner = find_pruner(model)
    whole = torch.zeros(pruner.analysis.num_gates, dtype=torch.bool)
    for group in pruner.analysis.groups[:4]:
        whole[group.gates] = group.can_be_empty
    average = copy.deepcopy(model)
    trains = getattr(torch.optim, optimizer)(model.parameters(),
                                             **OPTIMIZERS[optimizer])
    narrowed = [Shrinkage(one, pruner.analysis) for one in (model, average)]
    losses = []
    for index in range(steps):
        trains.zero_grad()
        loss = sum(
            (one - 0.1).square().mean() for one in all_outputs(model, inputs))
        loss.backward()
        pruner.step_(index / steps, steps)
        trains.step()
        losses.append(float(loss.detach()))
        with torch.no_grad():
            for one, other in zip(average.parameters(), model.parameters()):
                one.lerp_(other, 0.2)
            for one, other in zip(average.buffers(), model.buffers()):
                one.copy_(other)
        if index == steps // 2:
            for one in (model, average):
                find_pruner(one).gates.close_(whole)
        takeover = pruner.takeover
        if cut and index % 2 and not (takeover and takeover.is_behind()):
            keep = kept_channels(pruner.analysis, pruner.gates.openness())
            narrowed[0].narrow_(keep, trains)
            narrowed[1].narrow_(keep)
            if takeover is not None:
                takeover.narrow_(keep)
    numbers = sum(one.numel() for one in model.parameters())
    with torch.no_grad():
        return losses, all_outputs(average.eval(), inputs), numbers


def check_cut_training(model: Any, optimizer: str, side: int = 32) -> None:
    """Check losses and average of a training against those of an uncut one.

    In double precision, at steps that amplify no difference.
    """
    inputs = INPUTS[..., :side, :side].double()
    whole, averaged, dense = trained_alone(model, inputs, optimizer, cut=False)
    losses, narrow, numbers = trained_alone(model, inputs, optimizer, cut=True)
    assert numbers < 0.8 * dense
    assert losses == pytest.approx(whole, rel=1e-9)
    for one, other in zip(narrow, averaged):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


def small_model(backbone: dict[str, Any], norm: dict[str, Any],
                channels: tuple[int, int], **gdp: Any) -> Any:
    """A small gated model with two heads, on the last outputs ``channels``."""

    def head(index: int) -> dict[str, Any]:
        return dict(
            type='FCNHead',
            in_channels=channels[index],
            in_index=index,
            channels=8,
            num_convs=1,
            concat_input=False,
            dropout_ratio=0.,
            num_classes=4,
            norm_cfg=norm)

    torch.manual_seed(0)
    return build(
        dict(
            type='gdp_mmseg.GDPModel',
            base='EncoderDecoder',
            data_preprocessor=dict(type='SegDataPreProcessor', size=(32, 32)),
            backbone=dict(norm_cfg=norm, **backbone),
            decode_head=head(1),
            auxiliary_head=head(0),
            test_cfg=ConfigDict(mode='whole'),
            gdp=dict(
                target=0.7, gate_travel=3., phases=(0.1, 0.6, 0.3), **gdp)))


@pytest.mark.parametrize('takeover', [False, True])
def test_inverted_residuals_train_as_if_uncut(takeover: bool) -> None:
    """Depthwise layers, and blocks that lose all that they add."""
    model = small_model(
        dict(
            type='MobileNetV2',
            widen_factor=0.25,
            strides=(1, 2, 2, 1, 1, 1, 1),
            out_indices=(4, 6)),
        dict(type='BN'), (24, 80),
        takeover=takeover)
    check_cut_training(model, 'SGD')


def test_grouped_blocks_with_group_norms_train_as_if_uncut() -> None:
    model = small_model(
        dict(
            type='ResNeXt',
            depth=50,
            num_stages=2,
            strides=(1, 2),
            dilations=(1, 1),
            out_indices=(0, 1),
            groups=4,
            base_width=16,
            stem_channels=16,
            base_channels=16), dict(type='GN', num_groups=8), (64, 128))
    check_cut_training(model, 'AdamW')


def test_residual_blocks_and_branches_train_as_if_uncut(
        trained: Trained) -> None:
    config = copy.deepcopy(trained.runner.cfg.model)
    # Dropout draws a number for each channel.
    config.decode_head.dropout_ratio = 0.
    config.auxiliary_head.dropout_ratio = 0.
    config.gdp.update(gate_travel=3., phases=(0.1, 0.6, 0.3))
    with known_gates(gate_meta(find_pruner(trained.runner.model))):
        model = build(config)
    check_cut_training(model, 'AdamW', side=64)


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
