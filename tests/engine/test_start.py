"""What a training starts from, and what weights are taken for whose."""
from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip('mmseg')

import torch
from mmengine.config import Config, ConfigDict
from mmengine.runner import Runner
from mmengine.runner.checkpoint import load_state_dict
from torch import Tensor

from gdp_mmseg.engine.checkpoint import read_checkpoint
from gdp_mmseg.surgery.prune import prune

from helpers.project import Exported, Project, Trained, build, run_tool

# Of a training in which gates close.
ITERATIONS, HALF = 16, 8


@pytest.fixture()
def cli() -> ModuleType:
    from gdp_mmseg.cli import checks
    return checks


@pytest.fixture()
def start(trained: Trained, tmp_path: Path) -> Path:
    """A dense checkpoint."""
    content = torch.load(trained.checkpoint, weights_only=False)
    state = {
        key: value
        for key, value in content['state_dict'].items()
        if not key.startswith('gdp.')
    }
    torch.save(state, tmp_path / 'start.pth')
    return tmp_path / 'start.pth'


def _state(path: Path) -> dict[str, Tensor]:
    return torch.load(path, weights_only=False)['state_dict']


def test_resume_goes_on_with_the_training_that_had_a_start(
        project: Project, start: Path, tmp_path: Path) -> None:
    config = project.config(
        'from_dense', f'load_from = {str(start)!r}\n'
        f'train_cfg = dict(max_iters={ITERATIONS})\n'
        f'default_hooks = dict(checkpoint=dict(interval={HALF}))')
    out = tmp_path / 'out'
    # --resume from the first, as in a queue that restarts what was killed.
    line = ('train.py', config, '--work-dir', out, '--resume')
    assert run_tool(*line, cwd=tmp_path).status == 0
    whole = _state(out / f'iter_{ITERATIONS}.pth')
    assert bool((whole['gdp.gates.closed'] > 0).any())
    (out / f'iter_{ITERATIONS}.pth').unlink()
    (out / 'last_checkpoint').write_text(str(out / f'iter_{HALF}.pth'))
    assert run_tool(*line, cwd=tmp_path).status == 0
    resumed = _state(out / f'iter_{ITERATIONS}.pth')
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)


@pytest.mark.parametrize('resume, chosen, begun, expected', [
    (False, False, True, ('start.pth', False)),
    (True, False, False, ('start.pth', False)),
    (True, False, True, (None, True)),
    (True, True, False, ('start.pth', True)),
    (True, True, True, ('start.pth', True)),
])
def test_resume_is_from_the_work_folder_unless_the_command_line_says(
        resume: bool, chosen: bool, begun: bool, expected: tuple[str | None,
                                                                 bool],
        cli: ModuleType, tmp_path: Path) -> None:
    if begun:
        (tmp_path / 'last_checkpoint').write_text('iter_1.pth')
    cfg = Config(
        dict(resume=resume, load_from='start.pth', work_dir=str(tmp_path)))
    cli.resolve_resume_(cfg, chosen)
    assert (cfg.load_from, cfg.resume) == expected


def test_weights_of_a_fine_tuned_export_are_not_those_of_the_dense(
        project: Project, exported: Exported, cli: ModuleType, tmp_path: Path,
        capsys: pytest.CaptureFixture[str]) -> None:
    cfg = project.load(tmp_path, exported.config)
    cfg.train_cfg.max_iters = 1
    cfg.default_hooks.resume = dict(type='gdp_mmseg.ResumeHook')
    Runner.from_cfg(cfg).train()
    checkpoint = tmp_path / 'iter_1.pth'
    _, meta = read_checkpoint(str(checkpoint))
    assert meta['widths'] == cfg.model.gdp.widths.to_dict()
    cli.verify_checkpoint(str(checkpoint), cfg)
    with pytest.raises(SystemExit):
        cli.verify_checkpoint(str(checkpoint), Config.fromfile(project.dense))
    assert 'exported' in capsys.readouterr().err


def test_gates_are_not_put_on_weights_of_another_width(
        project: Project, exported: Exported) -> None:
    cfg = Config.fromfile(project.gated)
    cfg.model.init_cfg = dict(
        type='Pretrained', checkpoint=str(exported.checkpoint))
    model = build(cfg.model)
    with pytest.raises(ValueError, match='expected backbone.* of the shape'):
        model.init_weights()


def test_gates_go_with_another_number_of_bands_and_classes(
        project: Project, start: Path) -> None:
    cfg = Config.fromfile(project.gated)
    state = torch.load(start, weights_only=True)
    cfg.model.backbone.in_channels = 4
    for head in ('decode_head', 'auxiliary_head'):
        cfg.model[head].num_classes = 7
    cfg.model.init_cfg = dict(type='Pretrained', checkpoint=str(start))
    model = build(cfg.model)
    model.init_weights()
    new = model.state_dict()
    assert torch.equal(new['backbone.layer1.0.conv1.weight'],
                       state['backbone.layer1.0.conv1.weight'])
    assert new['decode_head.conv_seg.weight'].shape[0] == 7


def _half_pruned(project: Project) -> tuple[ConfigDict, dict[str, Tensor]]:
    """Config and weights of the model with every other gate closed."""
    gated: Any = build(Config.fromfile(project.gated).model)
    openness = (torch.arange(gated.gdp.gates.theta.numel()) % 2).float()
    config = Config.fromfile(project.dense).model
    pruned, widths = prune(build(config).eval(), gated.gdp.analysis, openness)
    config.update(type='gdp_mmseg.PrunedModel', gdp=dict(widths=widths))
    return config, pruned.state_dict()


@pytest.mark.parametrize('classes', [3, 7])
def test_pruned_network_takes_other_classes(project: Project,
                                            classes: int) -> None:
    config, whole = _half_pruned(project)
    narrow = whole['decode_head.conv_seg.weight'].shape[1]
    assert config.gdp.widths['decode_head.conv_seg'] == [None, narrow]
    for head in (config.decode_head, config.auxiliary_head):
        head.num_classes = classes
    model: Any = build(config).eval()
    load_state_dict(model, whole)
    new = model.state_dict()
    for key, value in whole.items():
        if 'conv_seg' not in key:
            assert torch.equal(new[key], value), key
    assert new['decode_head.conv_seg.weight'].shape[:2] == (classes, narrow)
    with torch.no_grad():
        outputs = model(torch.zeros(1, 3, 64, 64), mode='tensor')
    assert outputs.shape[1] == classes


def test_pruned_network_refuses_other_hidden_widths(project: Project) -> None:
    config, state = _half_pruned(project)
    state['decode_head.conv_seg.weight'] = torch.zeros(5, 3, 1, 1)
    with pytest.raises(ValueError, match='expected decode_head.conv_seg.weig'):
        load_state_dict(build(config), state)
