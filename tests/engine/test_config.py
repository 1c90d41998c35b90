"""A model config is taken apart the same way wherever it is needed."""
from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip('mmengine')

from gdp_mmseg.engine.config import ModelConfig, kind_of
from gdp_mmseg.engine.model import build_gated_model, build_pruned_model
from gdp_mmseg.pruner.settings import Target


@pytest.mark.parametrize('kind, found', [
    ('gdp_mmseg.GDPModel', 'gated'),
    ('GDPModel', 'gated'),
    (build_gated_model, 'gated'),
    ('gdp_mmseg.PrunedModel', 'pruned'),
    (build_pruned_model, 'pruned'),
    ('EncoderDecoder', 'dense'),
    ('mmseg.EncoderDecoder', 'dense'),
    ('MyGDPModel', 'dense'),
    (dict, 'dense'),
])
def test_a_type_is_known_by_name_and_as_the_function_itself(
        kind: Any, found: str) -> None:
    assert kind_of(dict(type=kind)) == found


def test_the_users_model_is_what_is_left() -> None:
    model = dict(
        type='gdp_mmseg.GDPModel',
        base='MySegmentor',
        gdp=dict(target=0.3),
        backbone=dict(type='ResNet'),
        decode_head=dict(type='FCNHead'))
    config = ModelConfig.parse(model)
    assert config.ungated == dict(
        type='MySegmentor',
        backbone=dict(type='ResNet'),
        decode_head=dict(type='FCNHead'))
    assert config.settings.target == Target(0.3)


def test_a_pruned_model_stays_pruned_without_gates() -> None:
    model = dict(
        type='gdp_mmseg.PrunedModel',
        base='EncoderDecoder',
        gdp=dict(widths={'backbone.conv1': [3, None]}),
        backbone=dict(type='ResNet'))
    assert ModelConfig.parse(model).ungated == model


def test_no_part_looks_for_pretrained_weights() -> None:
    weights = dict(type='Pretrained', checkpoint='x.pth')
    model = dict(
        type='EncoderDecoder',
        pretrained='x.pth',
        backbone=dict(
            type='TIMMBackbone',
            pretrained=True,
            branches=[dict(init_cfg=[dict(type='Normal'), weights])]),
        neck=dict(
            init_cfg=dict(type='Normal', override=dict(weights, name='fc'))),
        decode_head=dict(init_cfg=weights, loss=dict(init_cfg=None)))
    parts = ModelConfig.parse(model).without_pretrained().parts
    assert parts['pretrained'] is None
    # timm's backbones take True or False.
    assert parts['backbone']['pretrained'] is False
    assert parts['backbone']['branches'][0]['init_cfg'] is None
    assert parts['neck']['init_cfg'] is None
    assert parts['decode_head']['init_cfg'] is None
    # The user's own config is left as it was.
    assert model['decode_head']['init_cfg'] is weights
