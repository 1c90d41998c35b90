"""Settings of ``gdp=dict(...)`` in a config, checked in one place."""
from __future__ import annotations

import dataclasses
from typing import Any, Mapping

from .schedule import Schedule

# What a target can be about, in words.
COSTS = dict(flops='FLOPs', params='parameters', latency='latency')


@dataclasses.dataclass(frozen=True)
class Target:
    """What to keep how much of.

    Args:
        ratio (float): Share of the dense cost to keep, in (0, 1).
        type (str): ``'flops'``, ``'params'`` or ``'latency'``.
    """
    ratio: float
    type: str = 'flops'

    @classmethod
    def from_config(cls, config: Any) -> Target:
        """Read ``target=0.4`` or ``target=dict(type='params', ratio=0.4)``.

        Raises:
            ValueError: If a key is unknown or missing, or a value is out of
                its range.
        """
        if not isinstance(config, Mapping):
            config = dict(type='flops', ratio=config)
            key = 'gdp.target'
        elif set(config) != {'type', 'ratio'}:
            raise ValueError(
                f'gdp.target: expected dict(type=..., ratio=...), but got '
                f'{dict(config)}; change the keys of gdp.target')
        else:
            key = 'gdp.target.ratio'
        if config['type'] not in [*COSTS]:
            raise ValueError(f'gdp.target.type: expected one of {[*COSTS]}, '
                             f'but got {config["type"]!r}')
        ratio = config['ratio']
        if not isinstance(ratio, (int, float)) or not 0 < ratio < 1:
            raise ValueError(f'{key}: expected the share of '
                             f'{COSTS[config["type"]]} to keep, in (0, 1), '
                             f'but got {ratio!r}')
        return cls(ratio, config['type'])


@dataclasses.dataclass(frozen=True)
class Settings:
    """The keys of ``gdp=dict(...)`` in a config.

    Args:
        target (Target): What to keep; in a config a number, the share of the
            dense multiply-adds, or ``dict(type=..., ratio=...)``.
        input_shape (tuple[int, ...], optional): ``(H, W)`` or ``(C, H, W)``
            at which multiply-adds are counted. Defaults to ``size`` of the
            model's data preprocessor.
        phases (tuple[float, float, float]): Shares of the training that are
            warm-up, pruning and settling.
        epsilon (tuple[float, float]): At the start and end of the pruning
            phase.
        gate_travel (float): Distance that a theta, 1 at the start, can move
            in the pruning phase.
        close_below (float): Openness under which a gate closes for good.
        min_keep_ratio (float): Least share of the channels of each group
            that stays.
        ignore (tuple[str, ...]): Names or patterns (``*``, ``?``) of modules
            of which nothing may change.
        only (tuple[str, ...], optional): Names or patterns of modules; no
            others lose channels of their own. Defaults to all.
    """
    target: Target
    input_shape: tuple[int, ...] | None = None
    phases: tuple[float, float, float] = (0.35, 0.5, 0.15)
    epsilon: tuple[float, float] = (0.1, 1e-4)
    gate_travel: float = 8.
    close_below: float = 1e-2
    min_keep_ratio: float = 0.
    ignore: tuple[str, ...] = ()
    only: tuple[str, ...] | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | None) -> Settings:
        """Read ``gdp=dict(...)``.

        Raises:
            ValueError: If a key is unknown or missing, or a value is out of
                its range.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        config = {} if config is None else config
        if not isinstance(config, Mapping) or 'target' not in config or any(
                key not in known for key in config):
            came = list(config) if isinstance(config, Mapping) else config
            raise ValueError(
                f'gdp: expected dict(target=...) with any of {known[1:]}, but '
                f'got {came}; change the keys of model.gdp')
        plain: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in config.items()
        }
        plain['target'] = Target.from_config(config['target'])
        settings = cls(**plain)
        for name in ('gate_travel', 'close_below'):
            value = getattr(settings, name)
            if not isinstance(value, (int, float)) or value <= 0:
                raise ValueError(f'gdp.{name}: expected a number above 0, '
                                 f'but got {value!r}')
        least = settings.min_keep_ratio
        if not isinstance(least, (int, float)) or not 0 <= least < 1:
            raise ValueError(
                'gdp.min_keep_ratio: expected the least share of the '
                "channels of each group, in [0, 1), but got "
                f'{least!r}')
        for name in ('ignore', 'only'):
            value = getattr(settings, name)
            if value is not None and (not isinstance(value, tuple) or not all(
                    isinstance(item, str) for item in value)):
                raise ValueError(f"gdp.{name}: expected a list of names or "
                                 "patterns of modules, e.g. ['decode_head'], "
                                 f'but got {value!r}')
        Schedule(settings.phases, settings.epsilon)
        if settings.close_below >= 1:
            raise ValueError('gdp.close_below: expected less than 1, the '
                             'openness at the start, but got '
                             f'{settings.close_below}')
        return settings
