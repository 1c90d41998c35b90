"""The network for CIFAR-10, its shortcuts, and the weights it can load."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip('mmengine')

import torch
from mmengine.registry import MODELS, init_default_scope

from gdp_mmseg.analysis.analyse import analyse
from gdp_mmseg.engine.cifar_resnet import CIFARBlock, CIFARResNet
from gdp_mmseg.surgery.prune import prune

from helpers.toys import Net, gated, last, open_gates, randomise_, run


@pytest.mark.parametrize('depth, parameters', [(20, 269_072), (56, 852_368),
                                               (110, 1_727_312)])
def test_network_has_the_size_of_the_paper(depth: int,
                                           parameters: int) -> None:
    network = CIFARResNet(depth)
    assert sum(p.numel() for p in network.parameters()) == parameters
    with torch.no_grad():
        features, = network(torch.zeros(2, 3, 32, 32))
    assert features.shape == (2, 64, 8, 8)


@pytest.mark.parametrize('depth', [2, 18, 34])
def test_depth_without_whole_blocks_is_an_error(depth: int) -> None:
    with pytest.raises(ValueError, match=f'6 n \\+ 2.*but got {depth}'):
        CIFARResNet(depth)


def test_shortcut_takes_every_second_pixel_and_pads_channels() -> None:
    block = CIFARBlock(2, 6, stride=2).eval()
    torch.nn.init.zeros_(block.conv2.weight)
    images = torch.rand(1, 2, 4, 4)
    outputs = block(images)
    assert torch.equal(outputs[:, 2:4], images[:, :, ::2, ::2])
    assert outputs[:, :2].abs().max() == outputs[:, 4:].abs().max() == 0
    assert not [
        name for name, _ in block.named_parameters() if 'short' in name
    ]


def test_stream_loses_channels_and_stays_exact() -> None:
    network = Net(
        lambda net, x: net.head(net.body(x)[0]),
        body=CIFARResNet(8),
        head=last(64))
    network = randomise_(network).double().eval()
    analysis = analyse(network, (3, 32, 32), run)
    sizes = {group.writers[0]: len(group.gates) for group in analysis.groups}
    assert sizes == {
        'body.conv1': 16,
        'body.layer1.0.conv1': 16,
        'body.layer2.0.conv1': 32,
        'body.layer3.0.conv1': 64
    }
    open_ = torch.arange(analysis.num_gates) % 3 > 0
    gates = open_gates(open_).double()
    pruned: Any = prune(network, analysis, gates.openness())[0]
    # Every third channel of the stream closed, but none that is padded.
    assert pruned.body.layer1[0].conv2.out_channels == 10
    assert pruned.body.layer3[0].conv2.out_channels == 58
    assert pruned.head.in_channels == 58
    images = torch.randn(2, 3, 32, 32, dtype=torch.double)
    with torch.no_grad():
        left = pruned(images)
        wanted = gated(network, analysis, gates)(images)
    assert float((left - wanted).abs().max() / wanted.abs().max()) <= 1e-12


def test_file_of_weights_fills_backbone_and_head(tmp_path: Path) -> None:
    pytest.importorskip('mmpretrain')
    init_default_scope('mmpretrain')
    source = CIFARResNet(8)
    weights = dict(source.state_dict())
    weights['linear.weight'] = torch.randn(5, 64)
    weights['linear.bias'] = torch.randn(5)
    torch.save(weights, tmp_path / 'weights.pth')
    pretrained = dict(
        type='Pretrained', checkpoint=str(tmp_path / 'weights.pth'))
    model: Any = MODELS.build(
        dict(
            type='ImageClassifier',
            backbone=dict(
                type='gdp_mmseg.CIFARResNet', depth=8, init_cfg=pretrained),
            neck=dict(type='GlobalAveragePooling'),
            head=dict(
                type='LinearClsHead',
                num_classes=5,
                in_channels=64,
                init_cfg=dict(
                    type='Normal',
                    layer='Linear',
                    std=0.01,
                    override=dict(pretrained, name='fc', prefix='linear')))))
    model.init_weights()
    found = model.state_dict()
    for name, value in weights.items():
        key = name.replace(
            'linear', 'head.fc') if ('linear' in name) else f'backbone.{name}'
        assert torch.equal(found[key], value), name
