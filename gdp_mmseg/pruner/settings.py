"""Settings of ``gdp=dict(...)`` in a config, checked in one place."""
from __future__ import annotations

import dataclasses
import math
from typing import Any, Mapping, Sequence

from torch import nn

from ..analysis.spelling import did_you_mean
from ..analysis.structure import Analysis
from ..cost.latency import STOPWATCHES
from ..gates import METHODS, GateMethod
from ..gates.gdp import check_epsilon
from .schedule import Schedule

# Resources that a target can be about, and their names in messages.
COSTS = dict(flops='FLOPs', params='parameters', latency='latency')
# A pruning phase in which a gate can close in fewer steps is short: its gain
# is a mean over some tens of steps.
_STEPS_TO_CLOSE = 10
# Smallest target: far below any network of use.
_LEAST_TARGET = 0.001


@dataclasses.dataclass(frozen=True)
class Target:
    """The resource to budget and the share of it to keep.

    Args:
        ratio (float): Share of the dense cost to keep, in [0.001, 1). A
            target is met within one percentage point, so that less would be
            no network at all.
        type (str): ``'flops'``, ``'params'`` or ``'latency'``.
        runtime (str): Runtime in which the layers are timed for a latency, a
            key of :data:`gdp_mmseg.cost.latency.STOPWATCHES`.

    Raises:
        ValueError: If a value is out of its range.
    """
    ratio: float
    type: str = 'flops'
    runtime: str = 'torch'

    def __post_init__(self) -> None:
        if self.type not in [*COSTS]:
            raise ValueError(f'gdp.target.type: expected one of {[*COSTS]}, '
                             f'but got {self.type!r}' +
                             did_you_mean(self.type, COSTS))
        if not isinstance(self.ratio,
                          (int, float)) or not _LEAST_TARGET <= self.ratio < 1:
            key = 'gdp.target' if self.type == 'flops' else 'gdp.target.ratio'
            raise ValueError(f'{key}: expected the share of '
                             f'{COSTS[self.type]} to keep, in '
                             f'[{_LEAST_TARGET}, 1), '
                             f'but got {self.ratio!r}')

        if self.runtime not in [*STOPWATCHES]:
            raise ValueError('gdp.target.runtime: expected one of '
                             f'{[*STOPWATCHES]}, but got {self.runtime!r}' +
                             did_you_mean(self.runtime, STOPWATCHES))
        if self.runtime != 'torch' and self.type != 'latency':
            raise ValueError(
                "gdp.target.runtime: expected type='latency' with it, but got "
                f'type={self.type!r}; leave runtime out')

    @classmethod
    def from_config(cls, config: Any) -> Target:
        """Read ``target=0.4`` or ``target=dict(type='params', ratio=0.4)``.

        A latency may name its ``runtime`` too.

        Raises:
            ValueError: If a key is unknown or missing, or a value is out of
                its range.
        """
        if isinstance(config, Target):
            return config
        if not isinstance(config, Mapping):
            return cls(config)
        if {*config} - {'runtime'} != {'type', 'ratio'}:
            raise ValueError(
                f'gdp.target: expected dict(type=..., ratio=...), but got '
                f'{dict(config)}; change the keys of gdp.target')
        return cls(**config)

    @property
    def resource(self) -> str:
        """Name of the resource in messages, e.g. ``'FLOPs'``."""
        place = '' if self.runtime == 'torch' else f' in {self.runtime}'
        return COSTS[self.type] + place


@dataclasses.dataclass(frozen=True)
class Gate:
    """The gate method and its options.

    Args:
        type (str): Name of the method, a key of
            :data:`gdp_mmseg.gates.METHODS`.
        options (Mapping[str, Any]): Values of some of the method's
            ``OPTIONS``.

    Raises:
        ValueError: If the method or an option is unknown, or a value is out of
            its range.
    """
    type: str = 'gdp'
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.type not in [*METHODS]:
            raise ValueError(f'gdp.gate: expected one of {[*METHODS]}, but '
                             f'got {self.type!r}' +
                             did_you_mean(self.type, METHODS))
        known = METHODS[self.type].OPTIONS
        for key in self.options:
            if key not in known:
                others = [
                    name for name, method in METHODS.items()
                    if key in method.OPTIONS
                ]
                raise ValueError(
                    f'gdp.gate: expected type={self.type!r} with '
                    f'{"any of " + str([*known]) if known else "no options"}, '
                    f'but got {key!r}' + (f', an option of {others}' if others
                                          else did_you_mean(key, known)))
        METHODS[self.type].check_options(self.options)

    @classmethod
    def from_config(cls, config: Any) -> Gate:
        """Read ``gate='gdp'`` or ``gate=dict(type='gdp', ...)``.

        Raises:
            ValueError: If the method or an option is unknown, or a value is
                out of its range.
        """
        if isinstance(config, Gate):
            return config
        if not isinstance(config, Mapping):
            return cls(config)
        if 'type' not in config:
            raise ValueError('gdp.gate: expected dict(type=..., ...), but got '
                             f'{dict(config)}; add type, one of {[*METHODS]}')
        options = dict(config)
        return cls(options.pop('type'), options)

    def admitted(self, analysis: Analysis, model: nn.Module) -> Analysis:
        """Freeze the groups of a model that the method has no gates for.

        Raises:
            ValueError: If no gate is left.
        """
        return METHODS[self.type].admitted(analysis, model, **self.options)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a gated model: the keys of ``gdp=dict(...)`` in a config.

    Args:
        target (Target): The resource to budget and the share of it to keep.
            A config gives a number, the share of the dense FLOPs, or
            ``dict(type=..., ratio=...)``.
        input_shape (tuple[int, ...], optional): ``(H, W)`` or ``(C, H, W)``
            at which FLOPs are counted. Defaults to ``size`` of the model's
            data preprocessor.
        gate (Gate): The gate method. A config gives its name, or
            ``dict(type=..., ...)`` with options of the method.
        phases (tuple[float, float, float]): Shares of the training that are
            warm-up, pruning and settling.
        epsilon (tuple[float, float]): Softness of the gates at the start and
            at the end of the pruning phase.
        gate_travel (float): Distance that a theta, 1 at the start, can move
            in the pruning phase.
        close_below (float): Openness at which a gate closes for good.
        min_keep_ratio (float): Least share of the channels of each group
            that stays.
        ignore (tuple[str, ...]): Names or patterns (``*``, ``?``) of modules
            that must not change.
        only (tuple[str, ...], optional): Names or patterns of the modules
            that may lose channels of their own. Defaults to all.
        multiple (int): Number of which each group keeps a multiple of
            channels, e.g. 4, with which a runtime is faster.
        shrink (bool): Whether closed channels leave the model while an
            mmengine runner trains it, which saves time and memory. Defaults
            to True.
        takeover (bool): Whether other channels take over what a closing gate
            lets through less (see :mod:`gdp_mmseg.gates.takeover`). Defaults
            to True.

    Raises:
        ValueError: If a value is out of its range.
    """
    target: Target
    input_shape: tuple[int, ...] | None = None
    gate: Gate = Gate()
    phases: tuple[float, float, float] = Schedule.phases
    epsilon: tuple[float, float] = (0.1, 1e-4)
    gate_travel: float = 8.
    close_below: float = 1e-2
    min_keep_ratio: float = 0.
    ignore: tuple[str, ...] = ()
    only: tuple[str, ...] | None = None
    multiple: int = 1
    shrink: bool = True
    takeover: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.target, Target):
            raise ValueError('gdp.target: expected a Target, but got '
                             f'{self.target!r}; pass Target(ratio), or use '
                             'Settings.from_config')
        if not isinstance(self.gate, Gate):
            raise ValueError(f'gdp.gate: expected a Gate, but got '
                             f'{self.gate!r}; pass Gate(name), or use '
                             'Settings.from_config')
        self._check_owners()
        # Their constructors check the values.
        Schedule(self.phases)
        check_epsilon(self.epsilon)
        for name in ('gate_travel', 'close_below'):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or value <= 0:
                raise ValueError(f'gdp.{name}: expected a number above 0, '
                                 f'but got {value!r}')
        if self.close_below >= 1:
            raise ValueError('gdp.close_below: expected less than 1, the '
                             'openness at the start, but got '
                             f'{self.close_below}')
        if not isinstance(self.min_keep_ratio,
                          (int, float)) or not 0 <= self.min_keep_ratio < 1:
            raise ValueError('gdp.min_keep_ratio: expected the least share of '
                             'the channels of each group, in [0, 1), but got '
                             f'{self.min_keep_ratio!r}')
        if (not isinstance(self.multiple, int)
                or isinstance(self.multiple, bool) or self.multiple < 1):
            raise ValueError('gdp.multiple: expected a whole number of '
                             'channels above 0, e.g. 4, but got '
                             f'{self.multiple!r}')
        for name in ('ignore', 'only'):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, tuple) or not all(
                    isinstance(item, str) for item in value)):
                raise ValueError(f'gdp.{name}: expected a list of names or '
                                 "patterns of modules, e.g. ['decode_head'], "
                                 f'but got {value!r}')
        for name in ('shrink', 'takeover'):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f'gdp.{name}: expected True or False, but '
                                 f'got {getattr(self, name)!r}')

    def _check_owners(self) -> None:
        """Check that no setting of another gate method was set.

        Raises:
            ValueError: If one was.
        """
        defaults = {
            field.name: field.default
            for field in dataclasses.fields(self)
        }
        for name, method in METHODS.items():
            for key in method.SETTINGS:
                if (key not in METHODS[self.gate.type].SETTINGS
                        and getattr(self, key) != defaults[key]):
                    raise ValueError(
                        f'gdp.{key}: expected it with gate={name!r} only, but '
                        f'got gate={self.gate.type!r}; remove gdp.{key}')

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | None) -> Settings:
        """Read ``gdp=dict(...)``.

        Raises:
            ValueError: If a key is unknown or missing, or a value is out of
                its range.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        config = {} if config is None else config
        if isinstance(config, Mapping) and 'widths' in config:
            raise ValueError(
                'gdp: expected the settings of a network with all its '
                'channels, but got the widths of an exported one; to prune '
                'further, train the gated config again with load_from=its '
                'last checkpoint and a lower gdp.target')
        _check_keys(config, known)
        plain: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in config.items()
        }
        plain['target'] = Target.from_config(config['target'])
        if 'gate' in config:
            plain['gate'] = Gate.from_config(config['gate'])
        return cls(**plain)

    def check_length(self, steps: int, unit: str = 'steps') -> str | None:
        """Check that the pruning phase is long enough for the gates.

        Args:
            steps (int): Number of steps of the optimizer in the training.
            unit (str): Name of a step in the message. Defaults to 'steps'.

        Returns:
            str, optional: A note on a phase that is short for good results;
            None for one that is not.

        Raises:
            ValueError: If a gate could close in a single step, before its
                gain is known.
        """
        travel, share = self.gate_travel, self.phases[1]
        # A quotient that is a whole number may be rounded up.
        least, enough = (
            math.ceil(number * travel / share - 1e-6)
            for number in (1, _STEPS_TO_CLOSE))
        found = f'{steps * share:.3g} of {steps} {unit} ({share:.0%})'
        if steps < least:
            raise ValueError(
                f'gdp.phases: expected a pruning phase of at least {travel:g} '
                f'{unit} (gdp.gate_travel), because in fewer a single one of '
                f'them could close every gate, but got {found}; train for at '
                f'least {least} {unit}, better {enough}')
        if steps < enough:
            return (f'the pruning phase is short with {found}, because gates '
                    f'can close in fewer than {_STEPS_TO_CLOSE} of them; '
                    f'{enough} {unit} in all, or more, would be better')
        return None

    def build_gates(self, analysis: Analysis) -> GateMethod:
        """Make the gates of a model by the method that ``gate`` names."""
        method = METHODS[self.gate.type]
        own = {name: getattr(self, name) for name in method.SETTINGS}
        return method.of(analysis, **own, **self.gate.options)


def _check_keys(config: Any, known: Sequence[str]) -> None:
    """Check the keys of ``gdp=dict(...)``, of which ``target`` is required.

    Raises:
        ValueError: If it is no mapping, or has an unknown key or no target.
    """
    if not isinstance(config, Mapping):
        raise ValueError(f'gdp: expected dict(target=...), but got {config}; '
                         'change model.gdp')
    for key in config:
        if key not in known:
            raise ValueError(
                f'gdp: expected dict(target=...) with any of {[*known[1:]]}, '
                f'but got {key!r}; change the keys of model.gdp' +
                did_you_mean(key, known))
    if 'target' not in config:
        raise ValueError(
            'gdp: expected dict(target=...), the share of the FLOPs to keep, '
            f'but got {[*config]}; set model.gdp.target')
