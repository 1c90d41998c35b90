"""Channels kept of each part of a network, and the parts that died."""
from __future__ import annotations

from typing import Sequence

import pytest
import torch

from gdp_mmseg.analysis.structure import Group
from gdp_mmseg.report.summary import (dead_parts, kept_by_group, kept_by_part,
                                      kept_share, parts_of)

from helpers.stages import network


def named(*writers: str) -> list[Group]:
    """Groups of eight channels, by their writers."""
    return [Group(torch.arange(8), (name, ), (), True) for name in writers]


def stages(pattern: str, numbers: Sequence[int]) -> list[str]:
    """Two convolutions in each stage; ``{}`` is its number."""
    return [
        f'{pattern.format(number)}.{conv}' for number in numbers
        for conv in ('0.conv1', '1.conv1')
    ]


HEAD = [
    'decode_head.aspp_modules.0.conv', 'decode_head.aspp_modules.1.conv',
    'decode_head.bottleneck.conv'
]


@pytest.mark.parametrize('pattern, stem', [
    ('backbone.layer{}', 'backbone.conv1'),
    ('backbone.timm_model.layer{}', 'backbone.timm_model.conv1'),
    ('backbone.timm_model.stages_{}', 'backbone.timm_model.stem_0'),
    ('backbone.timm_model.blocks.{}', 'backbone.timm_model.conv_stem'),
    ('backbone.model.backbone.stages.{}.blocks', 'backbone.model.neck.0'),
    ('backbone.layers.{}', 'backbone.patch_embed.projection'),
    ('network.layer{}', 'network.conv1'),
    ('network.net.trunk.block{}', 'network.net.stem.0'),
    ('backbone.dense{}', 'backbone.transition_1'),
])
def test_each_stage_of_a_wrapped_backbone_is_a_part(pattern: str,
                                                    stem: str) -> None:
    writers = [stem, *stages(pattern, range(1, 5))]
    head = [*HEAD, 'auxiliary_head.convs.0.conv']
    level = len(pattern.partition('{')[0].split('.'))
    names = parts_of(named(*writers, *head))
    expected = [f'{pattern.partition("{")[0]}{number}' for number in '1234']
    assert list(dict.fromkeys(names[1:9])) == expected
    assert all(len(name.split('.')) == level for name in expected)
    assert names[9:] == [
        'decode_head.aspp_modules', 'decode_head.aspp_modules',
        'decode_head.bottleneck', 'auxiliary_head.convs'
    ]
    assert len({*names}) <= 12


@pytest.mark.parametrize(
    'writers, parts',
    [
        (['3'], ['3']),
        (['0', '3', '6'], ['0', '3', '6']),
        (['head.convs.0.conv'], ['head.convs']),
        # Classifier alone, wrapped or not.
        (stages('layer{}', [1, 2]), ['layer1', 'layer2']),
        (stages('network.layer{}',
                [1, 2]), ['network.layer1', 'network.layer2']),
        # Two encoders.
        (stages('backbone.a.layer{}', [1, 2]) +
         stages('backbone.b.layer{}', [1, 2]) + HEAD, [
             'backbone.a.layer1', 'backbone.a.layer2', 'backbone.b.layer1',
             'backbone.b.layer2', 'decode_head.aspp_modules',
             'decode_head.bottleneck'
         ]),
        # Heads of a cascade.
        (stages('backbone.layer{}', [1, 2]) +
         ['decode_head.0.conv.0', 'decode_head.1.conv.0'], [
             'backbone.layer1', 'backbone.layer2', 'decode_head.0',
             'decode_head.1'
         ]),
        # Numbers in a few names only.
        (['net.conv1', 'net.conv2', *stages('net.body.stage{}', range(5))], [
            'net.conv1', 'net.conv2', *(f'net.body.stage{one}'
                                        for one in range(5))
        ]),
    ])
def test_parts_are_stages_and_parts_of_heads(writers: list[str],
                                             parts: list[str]) -> None:
    assert list(dict.fromkeys(parts_of(named(*writers)))) == parts


def test_many_numbered_modules_are_parts_in_ranges() -> None:
    names = parts_of(named(*stages('backbone.vit.blocks.{}', range(23))))
    parts = list(dict.fromkeys(names))
    assert parts[:2] == ['backbone.vit.blocks.0-1', 'backbone.vit.blocks.2-3']
    assert parts[-1] == 'backbone.vit.blocks.22'
    assert len(parts) == 12
    assert [names.count(part) for part in parts] == [4] * 11 + [2]


def test_share_of_a_part_is_weighted_by_channels() -> None:
    large, small = torch.arange(90), torch.arange(90, 100)
    groups = [
        Group(large, ('layer1.0', ), (), True),
        Group(small, ('layer1.1', ), (), True),
        Group(torch.arange(100, 110), ('layer2.0', ), (), True)
    ]
    keep = torch.arange(110) >= 60
    part, _ = kept_by_part(groups, keep)
    assert (part.channels, part.kept) == (100, 40)
    # And not the mean of 1/3 and 1.
    assert kept_share(part) == 0.4
    assert [kept_share(row)
            for row in kept_by_group(groups, keep)] == [1 / 3, 1, 1]


def test_channels_are_counted_by_stage() -> None:
    analysis, keep = network('backbone.layer1.branch.0')
    found = [(part.name, part.channels, part.kept)
             for part in kept_by_part(analysis.groups, keep)]
    assert found == [('backbone.stem', 6, 6), ('backbone.layer1', 10, 6),
                     ('backbone.layer2', 10, 10)]


@pytest.mark.parametrize('closed, dead', [
    ([], []),
    (['backbone.layer1.branch.0'], ['backbone.layer1.branch']),
    (['backbone.layer1.branch.0', 'backbone.layer2.branch.0'
      ], ['backbone.layer1.branch', 'backbone.layer2.branch']),
    (['backbone.layer1.branch.3'], [
        'backbone.stem', 'backbone.layer1', 'backbone.layer2: down',
        'backbone.layer2.branch: 0'
    ]),
])
def test_largest_parts_that_died_are_named(closed: list[str],
                                           dead: list[str]) -> None:
    assert dead_parts(*network(*closed)) == dead
