"""Misspelt names: one line, the key, the nearest name."""
from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip('mmseg')

from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from gdp_mmseg.cli.names import (check_model_names, check_training_names,
                                 unknown_name)

CASES: dict[str, tuple[dict[str, Any], str, str]] = {
    'hook': (dict(default_hooks=dict(gdp=dict(type='gdp_mmseg.GDPHok'))),
             'default_hooks.gdp.type', 'gdp_mmseg.GDPHook'),
    'custom hook': (dict(custom_hooks=[dict(type='EMAHok')]),
                    'custom_hooks.0.type', 'EMAHook'),
    'wrapper': (dict(optim_wrapper=dict(type='OptimWraper')),
                'optim_wrapper.type', 'OptimWrapper'),
    'optimizer': (dict(optim_wrapper=dict(optimizer=dict(type='SDG'))),
                  'optim_wrapper.optimizer.type', 'SGD'),
    'scheduler': (dict(param_scheduler=dict(type='PolyLr')),
                  'param_scheduler.0.type', 'PolyLR'),
    'dataset':
    (dict(train_dataloader=dict(dataset=dict(type='BaseSegDatset'))),
     'train_dataloader.dataset.type', 'BaseSegDataset'),
    'transform': (dict(
        train_dataloader=dict(dataset=dict(pipeline=[dict(
            type='RandomFlp')]))), 'train_dataloader.dataset.pipeline.0.type',
                  'RandomFlip'),
}


@pytest.mark.parametrize('name', CASES)
def test_misspelt_name_is_reported_with_its_key(name: str) -> None:
    parts, key, meant = CASES[name]
    with pytest.raises(ValueError) as error:
        check_training_names(Config(parts))
    assert str(error.value).startswith(f'{key}: expected a name in the ')
    assert str(error.value).endswith(f'; did you mean {meant!r}?')


@pytest.mark.parametrize('model, key, meant', [
    (dict(type='gdp_mmseg.GDPModle'), 'type', 'gdp_mmseg.GDPModel'),
    (dict(type='gdp_mseg.GDPModel'), 'type', 'gdp_mmseg.GDPModel'),
    (dict(type='GDPModel'), 'type', 'gdp_mmseg.GDPModel'),
    (dict(type='EncoderDecodr'), 'type', 'EncoderDecoder'),
    (dict(type='gdp_mmseg.GDPModel',
          base='EncoderDecodr'), 'base', 'EncoderDecoder'),
])
def test_misspelt_model_is_reported_with_its_key(model: dict[str, Any],
                                                 key: str, meant: str) -> None:
    with pytest.raises(ValueError) as error:
        check_model_names(Config(dict(model=model)))
    assert str(error.value).startswith(f'model.{key}: expected a name in the ')
    assert f'did you mean {meant!r}?' in str(error.value)


def test_base_of_a_dense_model_is_its_own() -> None:
    model = dict(type='EncoderDecoder', base='anything')
    assert check_model_names(Config(dict(model=model))) is None


def test_known_names_and_classes_pass() -> None:
    cfg = Config(
        dict(
            default_hooks=dict(logger=dict(interval=1), gdp=None),
            custom_hooks=[dict(type='gdp_mmseg.GDPHook')],
            # Without a type it is an OptimWrapper.
            optim_wrapper=dict(optimizer=dict(type='SGD', lr=1.)),
            param_scheduler=[dict(type='PolyLR')]))
    assert check_training_names(cfg) is None
    assert check_training_names(Config({})) is None


@pytest.mark.parametrize('wrapped', [False, True])
def test_name_that_a_registry_misses_is_found_in_its_error(
        wrapped: bool) -> None:
    init_default_scope('mmseg')
    try:
        try:
            MODELS.build(dict(type='ResNetV1cc'))
        except KeyError as error:
            if not wrapped:
                raise
            # What mmengine 0.10.7 makes of it.
            raise KeyError(f'class `EncoderDecoder` in a.py: {error}')
    except KeyError as error:
        assert unknown_name(error) == (
            'type: expected a name in the model registry, but got '
            "'ResNetV1cc'; did you mean 'ResNetV1c'?")


def test_other_errors_are_not_about_names() -> None:
    assert unknown_name(KeyError('classes')) is None
    assert unknown_name(None) is None
