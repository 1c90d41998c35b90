"""mmpretrain's classifiers go the same way as mmseg's models."""
from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip('mmpretrain')

import numpy as np
import torch
from mmengine.config import Config
from PIL import Image

from gdp_mmseg.engine.model import find_pruner
from gdp_mmseg.export.export import export
from gdp_mmseg.export.networks import load_exported

from helpers.project import train

CONFIG = """
default_scope = 'mmpretrain'
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='gdp_mmseg.CIFARResNet', depth=8, channels=(8, 16, 32)),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead', num_classes=2, in_channels=32,
        loss=dict(type='CrossEntropyLoss', loss_weight=1.0)))
data_preprocessor = dict(
    num_classes=2, mean=[127.] * 3, std=[64.] * 3, to_rgb=False)
dataset = dict(
    type='CustomDataset', data_prefix=DATA, with_label=True,
    pipeline=[dict(type='LoadImageFromFile'), dict(type='PackInputs')])
train_dataloader = dict(
    batch_size=4, num_workers=0, dataset=dataset,
    sampler=dict(type='DefaultSampler', shuffle=True))
val_dataloader = train_dataloader
test_dataloader = train_dataloader
val_evaluator = dict(type='Accuracy', topk=(1, ))
test_evaluator = val_evaluator
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.02, momentum=0.9))
train_cfg = dict(by_epoch=True, max_epochs=8, val_interval=8)
val_cfg = dict()
test_cfg = dict()
default_hooks = dict(checkpoint=dict(type='CheckpointHook', interval=8))
randomness = dict(seed=0)
"""

DROP_IN = """
_base_ = './classifier.py'
model = dict(
    type='gdp_mmseg.GDPModel', base=_base_.model.type,
    gdp=dict(target=0.5, input_shape=(32, 32), phases=(0., 0.75, 0.25)))
default_hooks = dict(gdp=dict(type='gdp_mmseg.GDPHook'))
"""


@pytest.fixture()
def config(tmp_path: Path) -> Config:
    """A classifier of dark and light images, gated."""
    generator = np.random.default_rng(0)
    for name, level in (('dark', 60), ('light', 190)):
        folder = tmp_path / 'data' / name
        folder.mkdir(parents=True)
        for index in range(16):
            noise = generator.normal(level, 40, (32, 32, 3))
            Image.fromarray(noise.clip(0, 255).astype(np.uint8)).save(
                folder / f'{index}.png')
    (tmp_path / 'classifier.py').write_text(
        CONFIG.replace('DATA', repr(str(tmp_path / 'data'))))
    (tmp_path / 'gated.py').write_text(DROP_IN)
    cfg = Config.fromfile(tmp_path / 'gated.py')
    cfg.work_dir = str(tmp_path / 'work')
    return cfg


def _without_gates(checkpoint: Path) -> Path:
    """A checkpoint of the same weights as a dense training would save it."""
    content = torch.load(checkpoint, weights_only=False)
    weights = {
        name: value
        for name, value in content['state_dict'].items()
        if not name.startswith('gdp.')
    }
    path = checkpoint.with_name('dense.pth')
    torch.save(dict(meta={}, state_dict=weights), path)
    return path


def test_classifier_is_trained_exported_and_evaluated(config: Config,
                                                      tmp_path: Path) -> None:
    runner, _ = train(config)
    pruner = find_pruner(runner.model)
    assert bool((pruner.gates.openness() == 0).any())
    report = export(
        config,
        str(tmp_path / 'work/epoch_8.pth'),
        tmp_path / 'pair',
        'gated',
        dense_checkpoint=str(_without_gates(tmp_path / 'work/epoch_8.pth')))
    assert report.max_rel_diff <= 1e-5
    assert report.network(
        'pruned').flops <= 0.53 * report.network('dense').flops
    accuracy = report.network('pruned').metrics['accuracy/top1']
    assert accuracy == report.network('gated').metrics['accuracy/top1'] > 80
    assert report.network('dense').metrics['accuracy/top1'] > 80
    page = (tmp_path / 'pair/report.md').read_text()
    assert '| network | accuracy/top1 | MFLOPs |' in page
    assert 'mIoU' not in page
    pruned = load_exported(tmp_path / 'pair', 'gated')
    assert type(pruned).__name__ == 'ImageClassifier'
    from mmpretrain import get_model
    loaded = get_model(
        Config.fromfile(tmp_path / 'pair/gated_pruned.py'),
        str(tmp_path / 'pair/gated_pruned.pth')).eval()
    inputs = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(
            loaded(inputs, mode='tensor'), pruned(inputs, mode='tensor'))
