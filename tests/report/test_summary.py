"""Channels kept of each part of a network, and the parts that died."""
from __future__ import annotations

import pytest

from gdp_mmseg.report.summary import dead_parts, kept_by_part, part_of

from helpers.stages import network


@pytest.mark.parametrize('module, stage', [
    ('backbone.layer3.5.conv2', 'backbone.layer3'),
    ('backbone.stem.0', 'backbone.stem'),
    ('backbone.layers.11.ffn.layers.0.0', 'backbone.layers.11'),
    ('backbone.stages.1.0.pointwise_conv1', 'backbone.stages.1'),
    ('decode_head.aspp_modules.1.depthwise_conv.conv',
     'decode_head.aspp_modules'),
    ('auxiliary_head.0.convs.0.conv', 'auxiliary_head.0'),
    ('3', '3'),
])
def test_stage_is_a_part_of_a_part(module: str, stage: str) -> None:
    assert part_of(module) == stage


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
