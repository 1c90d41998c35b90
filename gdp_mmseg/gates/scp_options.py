"""Options of ``gate=dict(type='scp', ...)`` and their checks."""
from __future__ import annotations

import math
from typing import Any, Mapping

# Defaults of the official code: tau, k, c, T and s.
TAU, SHARPNESS, THRESHOLD, TEMPERATURE, SPREAD = 0.05, 20., 0.95, 0.5, 2.


def check_options(options: Mapping[str, Any]) -> None:
    """Check the values of some options of SCP.

    Raises:
        ValueError: If one is out of its range.
    """
    for name, value in options.items():
        if name == 'streams':
            if not isinstance(value, bool):
                raise ValueError('gdp.gate.streams: expected True or '
                                 f'False, but got {value!r}')
            continue
        least = 'at least 0' if name in ('s', 'penalty') else 'above 0'
        most = ' and below 1' if name == 'threshold' else ''
        if (not isinstance(value, (int, float)) or isinstance(value, bool)
                or not math.isfinite(value) or value < 0
                or (value == 0 and least == 'above 0')
                or (value >= 1 and most)):
            raise ValueError(f'gdp.gate.{name}: expected a number {least}'
                             f'{most}, but got {value!r}')
    given = {'threshold', 'penalty'} & {*options}
    if len(given) == 1:
        raise ValueError(
            f'gdp.gate.{given.pop()}: expected both threshold and penalty,'
            " which are the paper's own objective, but got one of them; "
            'set the other too, or leave both out')
