"""Twelve kinds of model go the whole way, from their config to fine-tuning."""
from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Callable

import pytest
import torch

pytest.importorskip('mmseg')
pytest.importorskip('mmpretrain')
import mmseg
from mmengine.analysis import FlopAnalyzer
from mmengine.config import Config
from torch import nn

from gdp_mmseg.engine.checkpoint import read_checkpoint
from gdp_mmseg.engine.model import find_pruner
from gdp_mmseg.export.export import export
from gdp_mmseg.export.networks import build_networks, load_exported
from gdp_mmseg.surgery.outputs import largest_difference

from helpers import HELPERS
from helpers.project import DENSE, Project, make_demo_data, run_program, train

CONFIGS = Path(mmseg.__file__).parent / '.mim' / 'configs'
ITERATIONS = 8
SIDE = 128
TARGET = 0.6
# Of outputs in single precision.
TOLERANCE = 1e-5
# What mmengine counts beside convolutions, linear layers and products: a
# number of operations for each value, a few percent of a network at most.
PER_VALUE = {
    'batch_norm', 'layer_norm', 'adaptive_avg_pool2d', 'upsample_bilinear2d',
    'upsample_nearest2d'
}

# Models of which SCP can prune too little, and what it lacks there.
WITHOUT_SCP = {
    'MobileNetV3': 'no ReLU behind the batch norm',
    'ConvNeXt + UPerNet': 'no batch norm',
    'SegFormer': 'no batch norm',
    'Twins': 'no batch norm'
}

_UPER: dict[str, Any] = dict(channels=32)
# Config of the installed mmseg, and what makes it small.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    'ResNet + PSPNet':
    ('_base_/models/pspnet_r50-d8.py',
     dict(
         backbone=dict(depth=18, base_channels=8, stem_channels=8),
         decode_head=dict(in_channels=64, channels=16),
         auxiliary_head=dict(in_channels=32, channels=8))),
    # As many branches and fusions as it has, with one block in each; of the
    # modules that repeat, two in a row.
    'HRNet':
    ('_base_/models/fcn_hr18.py',
     dict(
         backbone=dict(
             extra=dict(
                 stage1=dict(num_blocks=(1, )),
                 stage2=dict(num_blocks=(1, 1)),
                 stage3=dict(num_modules=2, num_blocks=(1, 1, 1)),
                 stage4=dict(num_modules=1, num_blocks=(1, 1, 1, 1)))))),
    'UNet': ('_base_/models/fcn_unet_s5-d16.py',
             dict(
                 backbone=dict(base_channels=8),
                 decode_head=dict(in_channels=8, channels=8),
                 auxiliary_head=dict(in_channels=16, channels=8),
                 test_cfg=dict(crop_size=(96, 96), stride=(64, 64)))),
    # Its own head pools windows of 49 x 49: of larger inputs.
    'MobileNetV3': ('_base_/models/lraspp_m-v3-d8.py',
                    dict(
                        backbone=dict(arch='small', out_indices=(12, )),
                        decode_head=dict(
                            type='FCNHead',
                            in_channels=576,
                            in_index=0,
                            channels=16,
                            input_transform=None))),
    'BiSeNetV2': ('_base_/models/bisenetv2.py',
                  dict(decode_head=dict(channels=64))),
    'STDC': ('_base_/models/stdc.py', {}),
    'DDRNet': ('ddrnet/ddrnet_23-slim_in1k-pre_2xb6-120k_'
               'cityscapes-1024x1024.py', {}),
    'ERFNet': ('_base_/models/erfnet_fcn.py', {}),
    'ConvNeXt + UPerNet':
    ('_base_/models/upernet_convnext.py',
     dict(
         backbone=dict(arch='atto'),
         decode_head=dict(in_channels=[40, 80, 160, 320], **_UPER),
         auxiliary_head=dict(in_channels=160, channels=16))),
    'SegFormer': ('_base_/models/segformer_mit-b0.py',
                  dict(decode_head=dict(channels=32))),
    'Swin + UPerNet':
    ('_base_/models/upernet_swin.py',
     dict(
         backbone=dict(
             embed_dims=24, depths=[1, 1, 2,
                                    1], num_heads=[1, 2, 4, 8]),
         decode_head=dict(in_channels=[24, 48, 96, 192], **_UPER),
         auxiliary_head=dict(in_channels=96, channels=16))),
    'Twins':
    ('_base_/models/twins_pcpvt-s_fpn.py',
     dict(
         backbone=dict(embed_dims=[16, 32, 80, 128], depths=[1, 1, 2, 1]),
         neck=dict(in_channels=[16, 32, 80, 128], out_channels=32),
         decode_head=dict(in_channels=[32, 32, 32, 32], channels=32))),
}


@pytest.fixture(scope='session')
def project(libraries: None,
            tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Drawn data of 128 x 128, and a training on it, for any model."""
    folder = tmp_path_factory.mktemp('models')
    make_demo_data(folder / 'data', train=4, val=2, size=SIDE, seed=0)
    text = DENSE.replace('DATA_ROOT', repr(str(folder / 'data')), 1)
    dense = folder / 'dense.py'
    dense.write_text(text.replace('ITERATIONS', str(ITERATIONS)))
    return Project(folder, dense, dense)


def model_config(name: str) -> dict[str, Any]:
    """A small model of a kind, without pretrained weights."""
    path, changes = MODELS[name]
    cfg = Config.fromfile(CONFIGS / path)
    cfg.merge_from_dict(dict(model=changes))
    model = cfg.model.to_dict()
    model['pretrained'] = None
    model['backbone'].pop('init_cfg', None)
    model['data_preprocessor'] = dict(
        model.get('data_preprocessor')
        or dict(type='SegDataPreProcessor', bgr_to_rgb=True),
        size=(SIDE, SIDE))
    heads = [model['decode_head'], model.get('auxiliary_head') or []]
    for head in heads:
        for one in head if isinstance(head, list) else [head]:
            losses = one['loss_decode']
            for loss in losses if isinstance(losses, list) else [losses]:
                loss.pop('class_weight', None)
            if one['type'] != 'STDCHead':
                one['num_classes'] = 5
    return model


def flops_by_mmengine(network: nn.Module) -> int:
    """Multiply-adds by mmengine's counter, without those for each value."""
    analyzer = FlopAnalyzer(network, (torch.randn(1, 3, SIDE, SIDE), ))
    analyzer.unsupported_ops_warnings(False)
    # What mmengine's table and mmseg's tool show; one trace serves both.
    whole, operators = analyzer.total(), analyzer.by_operator()
    per_value = sum(operators[name] for name in PER_VALUE)
    assert whole == sum(operators.values())
    assert per_value <= 0.05 * whole
    return int(whole - per_value)


@pytest.mark.parametrize('name', MODELS)
def test_model_goes_the_whole_way(name: str, project: Project, tmp_path: Path,
                                  gate_of: Callable[[int], str]) -> None:
    key = re.sub(r'\W+', '_', name).lower()
    gate = gate_of([*MODELS].index(name))
    cfg = Config.fromfile(project.dense)
    cfg.model = model_config(name)
    cfg.train_dataloader.batch_size = 2
    cfg.optim_wrapper.optimizer.lr = 0.01
    cfg.dump(project.folder / f'{key}.py')
    gated_path = project.config(
        f'gdp_{key}', 'model = dict(type="gdp_mmseg.GDPModel", gdp=dict('
        f'target={TARGET}, phases=(0., 0.75, 0.25), gate_travel=6, '
        f'gate="{gate}"))\n'
        'default_hooks = dict(gdp=dict(type="gdp_mmseg.GDPHook"))',
        project.folder / f'{key}.py')

    gated_cfg = project.load(tmp_path / 'work', gated_path)
    if gate == 'scp' and name in WITHOUT_SCP:
        with pytest.raises(ValueError, match=WITHOUT_SCP[name]):
            train(gated_cfg)
        return
    runner, _ = train(gated_cfg)
    pruner = find_pruner(runner.model)
    assert float(pruner.cost(pruner.channels())) <= TARGET + 0.05
    assert bool((pruner.gates.openness() == 0).any())

    checkpoint = tmp_path / 'work' / f'iter_{ITERATIONS}.pth'
    report = export(
        gated_cfg, str(checkpoint), tmp_path / 'pair', key, evaluate=False)
    assert report.max_rel_diff <= TOLERANCE
    assert report.network('pruned').flops < report.network('dense').flops

    torch.manual_seed(0)
    inputs = torch.randn(2, 3, SIDE, SIDE)
    torch.save(inputs, tmp_path / 'inputs.pt')
    dense, gated = build_networks(gated_cfg, *read_checkpoint(str(checkpoint)))
    pruned = load_exported(tmp_path / 'pair', key)
    assert flops_by_mmengine(dense) == report.network('dense').flops
    assert flops_by_mmengine(pruned) == report.network('pruned').flops
    with torch.no_grad():
        wanted = gated(inputs, mode='tensor')
    said = run_program(
        HELPERS / 'reload_pruned.py',
        tmp_path / 'pair' / f'{key}_pruned.py',
        tmp_path / 'pair' / f'{key}_pruned.pth',
        tmp_path / 'inputs.pt',
        tmp_path / 'outputs.pt',
        tmp_path / 'tuned',
        cwd=tmp_path)
    got = torch.load(tmp_path / 'outputs.pt', weights_only=True)
    wanted, got = ([one] if isinstance(one, torch.Tensor) else one
                   for one in (wanted, got))
    assert largest_difference(got, wanted) <= TOLERANCE
    moved, all_of_it = map(int, re.findall(r'moved (\d+) of (\d+)', said)[0])
    assert moved > all_of_it / 2
