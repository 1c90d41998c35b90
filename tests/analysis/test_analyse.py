"""Who shares a channel, what is frozen and why."""
from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from torch import nn

from gdp_mmseg.analysis.analyse import analyse
from gdp_mmseg.analysis.structure import Analysis

from helpers.toys import (BACKBONES, SHAPE, TOYS, Net, block, conv, deeplab,
                          resnet, run)

HEAD = (48, 512, 256)  # channels of c1, of the decode head, of the auxiliary


def touched(analysis: Analysis) -> Counter[tuple[int, frozenset[str]]]:
    """Size and modules of every group."""
    return Counter(
        (len(group.gates), frozenset(group.writers) | frozenset(group.readers))
        for group in analysis.groups)


@pytest.mark.parametrize('name', TOYS)
def test_toy_shares_channels_as_drawn(name: str) -> None:
    toy = TOYS[name]
    analysis = toy.analyse()[1]
    assert touched(analysis) == Counter(
        (size, frozenset(modules.split())) for size, modules in toy.groups)
    assert analysis.num_gates == sum(size for size, _ in toy.groups)


@pytest.mark.parametrize('name', TOYS)
def test_every_gate_is_in_one_group_and_on_an_axis(name: str) -> None:
    analysis = TOYS[name].analyse()[1]
    everyone = torch.arange(analysis.num_gates)
    members = torch.cat([group.gates for group in analysis.groups])
    assert torch.equal(members.sort().values, everyone)
    for gates in analysis.gate_of_slot.values():
        assert gates.min() >= -1 and gates.max() < analysis.num_gates
    assert torch.equal(
        torch.cat([*analysis.gate_of_slot.values()
                   ]).unique(sorted=True)[-analysis.num_gates:], everyone)


@pytest.mark.parametrize('name',
                         [name for name, toy in TOYS.items() if toy.frozen])
def test_frozen_channels_name_their_operator(name: str) -> None:
    toy = TOYS[name]
    analysis = toy.analyse()[1]
    for module, reason in toy.frozen.items():
        said = [
            frozen.reason for frozen in analysis.frozen
            if module in frozen.writers
        ]
        assert any(reason in one for one in said), (module, said)


def test_operator_outside_of_all_modules_is_placed_in_the_model() -> None:
    reasons = [
        frozen.reason
        for frozen in TOYS['fourier transform'].analyse()[1].frozen
    ]
    assert any(reason.endswith(' in the model') for reason in reasons), reasons


@pytest.mark.parametrize('name', TOYS)
def test_outputs_of_the_model_are_frozen(name: str) -> None:
    net, analysis = TOYS[name].analyse()
    last = [
        part for part, module in net.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
    ][-1]
    layer, = (layer for layer in analysis.layers if layer.name == last)
    assert bool((layer.outputs < 0).all())


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('name', ['residual', 'PReLU', 'called twice'])
def test_analysis_leaves_the_model_as_it_is(name: str, training: bool) -> None:
    toy = TOYS[name]
    net = toy.build().train(training)
    net.get_submodule('head' if isinstance(net, Net) else '0').eval()
    state = copy.deepcopy(net.state_dict())
    flags = [module.training for module in net.modules()]
    analyse(net, toy.shape, run)
    assert list(net.state_dict()) == list(state)
    assert all(
        torch.equal(tensor, state[key])
        for key, tensor in net.state_dict().items())
    assert [module.training for module in net.modules()] == flags
    assert all(tensor.device.type == 'cpu' for tensor in net.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks
                   for module in net.modules())


@pytest.mark.parametrize('shape', [(4, 8, 8), (3, 8), (3, ), (3, 1, 1)])
def test_impossible_input_shape_is_named(shape: tuple[int, ...]) -> None:
    net = nn.Sequential(*block(3, 4, padding=0), conv(4, 2, padding=0))
    with pytest.raises(ValueError, match='input_shape'):
        analyse(net, shape, run)


@pytest.mark.parametrize('net', [
    nn.Sequential(nn.ReLU(), nn.AvgPool2d(2)),
    nn.Sequential(nn.BatchNorm2d(3)),
])
def test_net_without_convolutions_is_refused(net: nn.Module) -> None:
    with pytest.raises(ValueError, match='no convolution'):
        analyse(net, SHAPE, run)


def test_net_without_hidden_channels_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match='2 channels: output of the model'):
        analyse(nn.Sequential(conv(3, 2)), SHAPE, run)


def test_forward_that_asks_for_values_is_analysed() -> None:
    net = Net(
        lambda net, x: net.head(
            y if (y := net.stem(x)).sum() > 1e9 else 2 * y),
        stem=block(3, 4),
        head=conv(4, 2))
    # The sum over all channels is an operator that needs all of them.
    with pytest.raises(ValueError, match='sum'):
        analyse(net, SHAPE, run)
    net.run = lambda net, x: net.head(
        y if (y := net.stem(x)) is not None and x.sum() > 1e9 else 2 * y)
    assert touched(analyse(net, SHAPE, run)) == {
        (4, frozenset({'stem.0', 'head'})): 1
    }


def test_norm_of_a_layer_is_the_one_that_alone_reads_it() -> None:
    net, analysis = TOYS['residual'].analyse()
    assert analysis.norms == {
        'stem.0': 'stem.1',
        'branch.0': 'branch.1',
        'branch.3': 'branch.4'
    }


def training_net() -> nn.Module:
    """A stem, an inference head and an auxiliary one of two layers."""
    return Net(
        lambda net, x: net.head(net.stem(x)),
        stem=block(3, 4),
        head=conv(4, 2),
        extra=nn.Sequential(*block(4, 5), conv(5, 2)))


def test_what_only_training_runs_is_gated_at_its_input_alone() -> None:
    analysis = analyse(training_net(), SHAPE, run,
                       lambda net, x: net.extra(net.stem(x)))
    assert touched(analysis) == {
        (4, frozenset({'stem.0', 'head', 'extra.0'})): 1
    }
    assert {
        layer.name: layer.in_inference
        for layer in analysis.layers
    } == {
        'stem.0': True,
        'head': True,
        'extra.0': False,
        'extra.3': False
    }
    assert any('extra.0 is for training only' in frozen.reason
               for frozen in analysis.frozen)


# -- DeepLabV3Plus ---------------------------------------------------------


def segmentor(backbone: str | None, **heads: int) -> nn.Module:
    from gdp_mmseg.engine.model import build_base_model
    torch.manual_seed(0)
    return build_base_model(
        None,
        deeplab(
            BACKBONES[backbone] if backbone else resnet('ResNetV1c', 50, 64),
            **heads))


def analysed(net: nn.Module, size: int) -> Analysis:
    from gdp_mmseg.engine.model import analyse_model
    return analyse_model(net, (3, size, size))[0]


def head_channels(low: int, channels: int) -> list[int]:
    """Image pool and 4 branches of ASPP; concat; two separable layers."""
    return [channels] * 5 + [channels, low] + [channels] * 2


def resnet_channels(depth: int, width: int, deep_stem: bool) -> list[int]:
    """Stem; in each stage the stream, and the inside of each block."""
    stem = [width // 2, width // 2, width] if deep_stem else [width]
    blocks = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}[depth]
    inside, expansion = (2, 4) if depth == 50 else (1, 1)
    sizes = list(stem)
    for stage, number in enumerate(blocks):
        planes = width << stage
        # Without a downsample path the first stage continues the stem.
        if stage or depth == 50:
            sizes.append(planes * expansion)
        sizes += [planes] * inside * number
    return sizes


def sizes(analysis: Analysis) -> Counter[int]:
    return Counter(len(group.gates) for group in analysis.groups)


@pytest.mark.usefixtures('mmseg_scope')
def test_deeplab_resnet50_at_full_width_has_15664_gates_in_48_groups() -> None:
    low, channels, auxiliary = HEAD
    analysis = analysed(
        segmentor(
            None, low=low, channels=channels, auxiliary=auxiliary, classes=21),
        512)
    expected = resnet_channels(50, 64, True) + head_channels(low, channels)
    assert sizes(analysis) == Counter(expected)
    assert (analysis.num_gates, len(analysis.groups)) == (15664, 48)
    assert analysis.num_gates == sum(expected)


@pytest.mark.usefixtures('mmseg_scope')
@pytest.mark.parametrize('name, expected', [
    ('ResNet-50', resnet_channels(50, 8, True)),
    ('ResNet-18', resnet_channels(18, 8, False)),
    ('ResNet-18-v1c', resnet_channels(18, 8, True)),
])
def test_deeplab_resnet_groups_follow_the_architecture(
        name: str, expected: list[int]) -> None:
    analysis = analysed(segmentor(name), 64)
    assert sizes(analysis) == Counter(expected + head_channels(6, 16))
    streams = [
        group for group in analysis.groups
        if 'auxiliary_head.convs.0.conv' in group.readers
    ]
    assert len(streams) == 1
    assert all(
        writer.startswith('backbone.layer3') for writer in streams[0].writers)


@pytest.mark.usefixtures('mmseg_scope')
def test_deeplab_mobilenet_groups_follow_the_architecture() -> None:
    net = segmentor('MobileNetV2')
    analysis = analysed(net, 64)
    stream, inside = [net.backbone.conv1.out_channels], []
    for stage in net.backbone.layers:
        for index, layer in enumerate(getattr(net.backbone, stage)):
            # The hidden channels, and the stream unless it continues.
            if len(layer.conv) == 3:
                inside.append(layer.conv[0].out_channels)
            if not layer.use_res_connect:
                stream.append(layer.conv[-1].out_channels)
    assert sizes(analysis) == Counter(stream + inside + head_channels(6, 16))


@pytest.mark.usefixtures('mmseg_scope')
@pytest.mark.parametrize('name', BACKBONES)
def test_auxiliary_head_keeps_its_own_channels_and_costs_nothing(
        name: str) -> None:
    analysis = analysed(segmentor(name), 64)
    frozen = {writer: row for row in analysis.frozen for writer in row.writers}
    assert frozen['auxiliary_head.convs.0.conv'].channels == 10
    assert 'training only' in frozen['auxiliary_head.convs.0.conv'].reason
    assert {layer.name
            for layer in analysis.layers if not layer.in_inference
            } == {'auxiliary_head.convs.0.conv', 'auxiliary_head.conv_seg'}
    assert all(not writer.startswith('auxiliary_head')
               for group in analysis.groups for writer in group.writers)


@pytest.mark.usefixtures('mmseg_scope')
@pytest.mark.parametrize('name', BACKBONES)
def test_only_outputs_and_the_auxiliary_head_are_frozen(name: str) -> None:
    analysis = analysed(segmentor(name), 64)
    assert {writer
            for row in analysis.frozen
            for writer in row.writers} == {
                'decode_head.conv_seg', 'auxiliary_head.convs.0.conv',
                'auxiliary_head.conv_seg'
            }


@pytest.mark.usefixtures('mmseg_scope')
def test_analysis_leaves_a_segmentor_as_it_is() -> None:
    net = segmentor('ResNet-18').train()
    state = copy.deepcopy(net.state_dict())
    flags = [module.training for module in net.modules()]
    analysed(net, 64)
    assert list(net.state_dict()) == list(state)
    assert all(
        torch.equal(tensor, state[key])
        for key, tensor in net.state_dict().items())
    assert [module.training for module in net.modules()] == flags


@pytest.mark.usefixtures('mmseg_scope')
def test_segmentor_refuses_an_impossible_shape_by_name() -> None:
    from gdp_mmseg.engine.model import analyse_model
    with pytest.raises(ValueError, match='input_shape'):
        analyse_model(segmentor('ResNet-18'), (4, 64, 64))


@pytest.mark.usefixtures('mmseg_scope')
def test_groups_do_not_depend_on_the_size_of_the_input() -> None:
    net = segmentor('ResNet-18')
    assert touched(analysed(net, 64)) == touched(analysed(net, 97))


class _ReadInLossOnly(nn.Sequential):
    """Has two layers that no traced forward runs."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1))
        self.edges = nn.Conv2d(4, 5, 1)
        self.more = nn.Linear(4, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self[1](self[0](x))


def test_layers_that_no_traced_forward_runs_are_named() -> None:
    frozen = analyse(_ReadInLossOnly(), (3, 8, 8), run).frozen[-1]
    assert frozen.writers == ('edges', 'more') and frozen.channels == 11
    assert 'no traced forward runs edges, more: ' in frozen.reason


def test_channels_that_padding_adds_to_are_counted() -> None:
    analysis = TOYS['zero-padded shortcut'].analyse()[1]
    padded, = (
        frozen for frozen in analysis.frozen
        if frozen.reason == 'joined with channels of no layer')
    assert padded.writers == ('branch.3', ) and padded.channels == 2
