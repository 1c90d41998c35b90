"""A model config, taken apart in one place."""
from __future__ import annotations

import copy
import dataclasses
from typing import Any, Mapping, Sequence

from mmengine.config import Config

from ..pruner.settings import Settings
from ..registry import MODELS

# Names in the registry of the two functions in ``model.py``.
GATED, PRUNED = 'GDPModel', 'PrunedModel'
SCOPE = 'gdp_mmseg'
# Names of an init_cfg that loads weights: in the registry, and of its class.
_PRETRAINED = ('Pretrained', 'PretrainedInit')
# Target of an analysis where a config has no ``gdp``: any will do.
_NO_SETTINGS = dict(target=0.5)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Parts of a model config, with ``GDPModel``, ``PrunedModel`` or neither.

    Args:
        kind (str): ``'gated'``, ``'pruned'`` or ``'dense'``.
        base (Any): Name or class of the user's own model.
        gdp (Mapping[str, Any], optional): Value of the key ``gdp``; None for a
            dense model.
        parts (dict[str, Any]): The rest of the user's config.
    """
    kind: str
    base: Any
    gdp: Mapping[str, Any] | None
    parts: dict[str, Any]

    @classmethod
    def parse(cls, model: Mapping[str, Any]) -> ModelConfig:
        """Take ``cfg.model`` apart; it is left as it is."""
        parts = dict(model)
        kind = kind_of(model)
        base = parts.pop('type', None)
        gdp = None
        if kind != 'dense':
            base, gdp = parts.pop('base', None), parts.pop('gdp', None)
        return cls(kind, base or default_base(parts), gdp, parts)

    @classmethod
    def of(cls, cfg: Config) -> ModelConfig:
        """Take the model of a config apart.

        A preprocessor at the top level of the config, which a runner adds to
        the model, becomes a part of it.
        """
        model = copy.deepcopy(cfg.model)
        if cfg.get('data_preprocessor') is not None:
            model.setdefault('data_preprocessor',
                             copy.deepcopy(cfg.data_preprocessor))
        return cls.parse(model)

    @property
    def settings(self) -> Settings:
        """Settings of the gates; defaults for a model without gates.

        Raises:
            ValueError: If a setting is wrong.
        """
        return Settings.from_config(self.gdp if self.kind ==
                                    'gated' else _NO_SETTINGS)

    @property
    def ungated(self) -> dict[str, Any]:
        """Config of the same model without gates; a pruned one stays pruned.
        """
        if self.kind == 'pruned':
            return dict(
                self.parts,
                type=f'{SCOPE}.{PRUNED}',
                base=self.base,
                gdp=self.gdp)
        return dict(self.parts, type=self.base)

    def input_shape(self) -> tuple[int, ...]:
        """Shape ``(C, H, W)`` of the input at which FLOPs are counted.

        Raises:
            ValueError: If neither settings nor data preprocessor tell it.
        """
        preprocessor = self.parts.get('data_preprocessor') or {}
        size = self.settings.input_shape
        if size is None and isinstance(preprocessor, Mapping):
            size = preprocessor.get('size')
        if (not isinstance(size, Sequence) or len(size) not in (2, 3) or
                not all(isinstance(side, int) and side > 0 for side in size)):
            raise ValueError(
                'gdp.input_shape: expected (H, W) or (C, H, W), or size=(H, '
                f'W) in the data_preprocessor, but got {size}; set '
                'model.gdp.input_shape')
        return self.with_channels(size)

    def with_channels(self, size: Sequence[int]) -> tuple[int, ...]:
        """Return ``(C, H, W)`` of a size ``(H, W)`` or ``(C, H, W)``."""
        channels = (self.parts.get('backbone') or {}).get('in_channels', 3)
        return tuple(size) if len(size) == 3 else (channels, *size)

    def without_pretrained(self) -> ModelConfig:
        """Copy of this config that loads no pretrained weights in any part."""
        parts = copy.deepcopy(self.parts)
        _drop_pretrained_(parts)
        return dataclasses.replace(self, parts=parts)


def kind_of(model: Mapping[str, Any]) -> str:
    """Kind of a model config: ``'gated'``, ``'pruned'`` or ``'dense'``.

    Args:
        model (Mapping[str, Any]): ``cfg.model``; its type is a name with or
            without our scope or, in a lazy config, the function itself.
    """
    kind = model.get('type')
    for name, found in ((GATED, 'gated'), (PRUNED, 'pruned')):
        if kind in (name, f'{SCOPE}.{name}') or (callable(kind)
                                                 and kind is MODELS.get(name)):
            return found
    return 'dense'


def default_base(parts: Mapping[str, Any]) -> str:
    """Usual class of a model that has these parts."""
    if 'decode_head' not in parts and 'head' in parts:
        return 'mmpretrain.ImageClassifier'
    return ('CascadeEncoderDecoder' if isinstance(
        parts.get('decode_head'), Sequence) else 'EncoderDecoder')


def name_of(kind: Any) -> str:
    """Name without a scope of a ``type``, which is a name or a class."""
    name = kind if isinstance(kind, str) else getattr(kind, '__name__', '')
    return name.rpartition('.')[2]


def _drop_pretrained_(part: Any) -> None:
    """Remove every reference to pretrained weights, recursively, in place."""
    if isinstance(part, dict):
        if _loads(part.get('init_cfg')):
            part['init_cfg'] = None
        if part.get('pretrained'):
            # timm's backbones take True or False here, others a path or None.
            part['pretrained'] = (False
                                  if part['pretrained'] is True else None)
        part = list(part.values())
    if isinstance(part, (list, tuple)):
        for one in part:
            _drop_pretrained_(one)


def _loads(init: Any) -> bool:
    """Tell whether an ``init_cfg``, or one of several, loads a file."""
    if isinstance(init, Mapping):
        return (name_of(init.get('type')) in _PRETRAINED
                or _loads(init.get('override')))
    return isinstance(init, (list, tuple)) and any(map(_loads, init))
