"""What mmsegmentation ships works on both configs, from anywhere."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip('mmseg')

import mmseg
import numpy as np
import torch
from mmengine.registry import init_default_scope
from mmseg.apis import MMSegInferencer, inference_model, init_model

from helpers.project import Exported, Project, Trained, run_program, run_tool

# Installed with the package, for `mim`.
STOCK = Path(mmseg.__file__).parent / '.mim/tools'


def _metrics(work_dir: Path) -> dict[str, Any]:
    """What a test loop left in its folder."""
    return json.loads(next(work_dir.glob('*/*.json')).read_text())


def _state(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(
        path, map_location='cpu', weights_only=False)['state_dict']


def test_stock_test_gives_the_reports_miou(exported: Exported,
                                           tmp_path: Path) -> None:
    run_program(
        STOCK / 'test.py',
        exported.config,
        exported.checkpoint,
        '--work-dir',
        tmp_path / 'out',
        cwd=tmp_path)
    metrics = _metrics(tmp_path / 'out')
    assert metrics['mIoU'] == pytest.approx(
        exported.report.network('pruned').metrics['mIoU'], abs=0.005)


def test_stock_train_trains_the_gated_config(project: Project,
                                             tmp_path: Path) -> None:
    run_program(
        STOCK / 'train.py',
        project.gated,
        '--work-dir',
        tmp_path / 'out',
        '--cfg-options',
        'train_cfg.max_iters=2',
        'model.gdp.gate_travel=1',
        cwd=tmp_path)
    assert 'gdp.gates.theta' in _state(tmp_path / 'out/iter_2.pth')
    assert (tmp_path / 'out/gates.jsonl').is_file()


def test_stock_train_fine_tunes_from_the_exported_weights(
        exported: Exported, tmp_path: Path) -> None:
    """At a rate of zero the weights stay what they were at the start."""
    run_program(
        STOCK / 'train.py',
        exported.config,
        '--work-dir',
        tmp_path / 'out',
        '--cfg-options',
        'train_cfg.max_iters=2',
        'optim_wrapper.optimizer.lr=0.',
        cwd=tmp_path)
    start, end = _state(exported.checkpoint), _state(tmp_path /
                                                     'out/iter_2.pth')
    assert list(start) == list(end)
    parameters = [name for name, _ in exported.model().named_parameters()]
    assert parameters
    assert all(torch.equal(start[name], end[name]) for name in parameters)
    # It did run: the running means are of the new batches.
    means = [name for name in start if name.endswith('running_mean')]
    assert not all(torch.equal(start[name], end[name]) for name in means)


def test_fine_tuning_learns_and_resumes(exported: Exported,
                                        tmp_path: Path) -> None:
    for iterations, more in ((2, []), (4, ['--resume'])):
        outcome = run_tool(
            'train.py',
            exported.config,
            '--work-dir',
            tmp_path / 'out',
            *more,
            '--cfg-options',
            f'train_cfg.max_iters={iterations}',
            cwd=tmp_path)
        assert outcome.status == 0, outcome.stderr
    start, end = _state(exported.checkpoint), _state(tmp_path /
                                                     'out/iter_4.pth')
    weight = 'decode_head.conv_seg.weight'
    assert not torch.equal(start[weight], end[weight])


def test_our_test_gives_the_reports_miou(exported: Exported, trained: Trained,
                                         tmp_path: Path) -> None:
    for which, config, checkpoint in (('pruned', exported.config,
                                       exported.checkpoint),
                                      ('gated', trained.config,
                                       trained.checkpoint)):
        outcome = run_tool(
            'test.py',
            config,
            checkpoint,
            '--work-dir',
            tmp_path / which,
            cwd=tmp_path)
        assert outcome.status == 0, outcome.stderr
        assert _metrics(tmp_path / which)['mIoU'] == pytest.approx(
            exported.report.network(which).metrics['mIoU'], abs=0.005)


@pytest.mark.parametrize('of', ['exported', 'trained'])
def test_time_augmentation_runs(of: str, request: pytest.FixtureRequest,
                                tmp_path: Path) -> None:
    pair: Exported | Trained = request.getfixturevalue(of)
    outcome = run_tool(
        'test.py',
        pair.config,
        pair.checkpoint,
        '--tta',
        '--work-dir',
        tmp_path / 'out',
        '--out',
        tmp_path / 'masks',
        cwd=tmp_path)
    assert outcome.status == 0, outcome.stderr
    assert 0 < _metrics(tmp_path / 'out')['mIoU'] <= 100
    assert len(list((tmp_path / 'masks').glob('*.png'))) == 4


@pytest.mark.skipif(
    mmseg.__version__ == '1.2.2',
    reason='its get_flops.py passes both of two exclusive arguments')
def test_stock_get_flops_reads_the_exported_config(exported: Exported,
                                                   tmp_path: Path) -> None:
    output = run_program(
        STOCK / 'analysis_tools/get_flops.py',
        exported.config,
        '--shape',
        64,
        64,
        cwd=tmp_path)
    assert 'Flops' in output and 'Input shape: (64, 64)' in output


def test_prediction_of_one_image_is_that_of_the_gated_model(
        exported: Exported, trained: Trained, project: Project, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    gated = init_model(
        str(trained.config), str(trained.checkpoint), device='cpu')
    pruned = init_model(
        str(exported.config), str(exported.checkpoint), device='cpu')
    assert pruned.dataset_meta == gated.dataset_meta
    inferencer = MMSegInferencer(
        str(exported.config), str(exported.checkpoint), device='cpu')
    seen = set()
    for image in map(str, project.images()):
        expected = inference_model(gated, image)
        got = inference_model(pruned, image)
        logits = expected.seg_logits.data
        worst = (got.seg_logits.data - logits).abs().max()
        assert float(worst / logits.abs().max()) <= 1e-4
        labels = got.pred_sem_seg.data
        assert torch.equal(labels, expected.pred_sem_seg.data)
        called = inferencer(image, return_datasamples=False)
        assert np.array_equal(called['predictions'], labels[0].numpy())
        seen |= set(labels.unique().tolist())
    # Else all of the above would hold of any network.
    assert len(seen) > 1
    init_default_scope('mmseg')
