"""A model config, taken apart in one place."""
from __future__ import annotations

import copy
from typing import Any, Mapping, Sequence

from mmengine.config import Config, ConfigDict

from ..pruner.settings import Settings
from .compat import name_of


def default_base(model: Mapping[str, Any]) -> str:
    """The usual class for a model config."""
    if 'decode_head' not in model and 'head' in model:
        return 'mmpretrain.ImageClassifier'
    return ('CascadeEncoderDecoder' if isinstance(
        model.get('decode_head'), Sequence) else 'EncoderDecoder')


def input_shape_of(settings: Settings, model: Mapping[str,
                                                      Any]) -> tuple[int, ...]:
    """``(C, H, W)`` at which a model's multiply-adds are counted.

    Raises:
        ValueError: If neither the settings nor the data preprocessor say it.
    """
    preprocessor = model.get('data_preprocessor') or {}
    size = settings.input_shape
    if size is None and isinstance(preprocessor, Mapping):
        size = preprocessor.get('size')
    if (not isinstance(size, Sequence) or len(size) not in (2, 3)
            or not all(isinstance(side, int) and side > 0 for side in size)):
        raise ValueError(
            'gdp.input_shape: expected (H, W) or (C, H, W), or size=(H, W) in '
            f'the data_preprocessor, but got {size}; set '
            'model.gdp.input_shape')
    channels = (model.get('backbone') or {}).get('in_channels', 3)
    return tuple(size) if len(size) == 3 else (channels, *size)


def model_config(cfg: Config) -> ConfigDict:
    """A copy of a config's model, with the preprocessor that a runner adds."""
    model = copy.deepcopy(cfg.model)
    if cfg.get('data_preprocessor') is not None:
        model.setdefault('data_preprocessor',
                         copy.deepcopy(cfg.data_preprocessor))
    return model


def split_config(
        model: Mapping[str,
                       Any]) -> tuple[str | None, Settings, dict[str, Any]]:
    """Take a model config apart, with ``GDPModel`` or without.

    Args:
        model (Mapping[str, Any]): ``cfg.model``.

    Returns:
        tuple[str | None, Settings, dict[str, Any]]: What to build the model
        without gates of (see :func:`build_base_model`): its class and the
        rest of the config; between them the gates' settings, those of half
        the FLOPs if it has none. An exported model is one without gates.

    Raises:
        ValueError: If a setting is wrong.
    """
    plain = dict(model)
    base, gdp = plain.pop('type'), None
    if base == 'gdp_mmseg.GDPModel':
        base, gdp = plain.pop('base', None), plain.pop('gdp', None)
    return base, Settings.from_config(gdp or dict(target=0.5)), plain


# An init_cfg by the registry's name, or by its class.
PRETRAINED = ('Pretrained', 'PretrainedInit')


def without_pretrained(cfg: Config) -> ConfigDict:
    """A model config that looks for no pretrained weights, in no part."""
    model = model_config(cfg)
    _drop_pretrained_(model)
    return model


def _drop_pretrained_(part: Any) -> None:
    """Of a part of a config and all that is in it, in place."""
    if isinstance(part, dict):
        init = part.get('init_cfg')
        for one in init if isinstance(init, Sequence) else [init]:
            if one and name_of(one.get('type')) in PRETRAINED:
                part['init_cfg'] = None
        if part.get('pretrained'):
            part['pretrained'] = None
        part = list(part.values())
    if isinstance(part, (list, tuple)):
        for one in part:
            _drop_pretrained_(one)
