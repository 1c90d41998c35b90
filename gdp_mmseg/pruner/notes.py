"""Messages on targets that gates cannot meet, or have missed."""
from __future__ import annotations

from ..analysis.reasons import frozen_by_kind
from ..analysis.structure import Analysis
from .settings import Settings

# Difference from the target above which logs and exports say so: a point.
_MISSED = 0.01


def refusal(settings: Settings, analysis: Analysis, least: float) -> str:
    """Compose the error on a target below what cannot be pruned.

    Args:
        settings (Settings): Settings with the target.
        analysis (Analysis): The analysis of the model.
        least (float): Share of the dense cost that no gate can save.
    """
    multiple = settings.multiple
    cause, way = '', ''
    if multiple > 1:
        cause, way = f' with gdp.multiple={multiple}', ', lower gdp.multiple'
    return (f'gdp.target: expected more than {least:.4g}, because '
            f'{100 * least:.4g}% of the {settings.target.resource} cannot be '
            f'pruned{cause}, but got {settings.target.ratio}; raise '
            f'gdp.target{way}, or let more be pruned by gdp.ignore, gdp.only '
            'and gdp.min_keep_ratio; gdp-mmseg groups lists the layers '
            f'without a gate and why{_main_reason(analysis)}')


def _main_reason(analysis: Analysis) -> str:
    """Add why most of the channels without a gate have none."""
    kinds = frozen_by_kind(
        (row.reason, row.channels) for row in analysis.frozen)
    if not kinds:
        return ''
    reason, channels = kinds[0]
    return f' (for {channels} channels: {reason})'


def on_target(settings: Settings, single: float, most: float) -> str | None:
    """Compose a note on a target that whole groups or blocks may miss.

    Args:
        settings (Settings): Settings with the target.
        single (float): Share of the dense cost with one gate, or one block,
            in each group.
        most (float): Share with all whole blocks, 1 without blocks.

    Returns:
        str, optional: None if the target lies between the two.
    """
    target, multiple = settings.target, settings.multiple
    if target.ratio > most + _MISSED:
        return (f'gdp.target is {target.ratio}, but with widths in multiples '
                f'of {multiple} at most {most:.2g} of the {target.resource} '
                'are left; lower gdp.multiple or gdp.target')
    if target.ratio > single:
        return None
    what, advice = 'single channel', 'a much higher gdp.target'
    if multiple > 1:
        what = f'single block of gdp.multiple={multiple} channels'
        advice = 'a lower gdp.multiple or a higher gdp.target'
    return (f'gdp.target is {target.ratio}, but with a {what} in each group '
            f'{single:.2g} of the {target.resource} are left: whole groups '
            'will close, or the target will be missed; a useful network '
            f'needs {advice}')


def on_miss(settings: Settings, left: float, is_free: bool) -> str | None:
    """Compose a note on a network that misses the target.

    Args:
        settings (Settings): Settings with the target.
        left (float): Share of the dense cost that is left in it.
        is_free (bool): Whether options of the gates leave the cost free.

    Returns:
        str, optional: None if it is within one percentage point.
    """
    target, multiple = settings.target, settings.multiple
    if abs(left - target.ratio) <= _MISSED:
        return None
    reason = (
        'the pruning phase is not over, or was too short for this target, '
        'or the last channels of groups cost more than it allows'
        if left > target.ratio else
        'it was trained to a lower target, or large groups closed as a whole')
    if multiple > 1:
        reason += (f', or blocks of gdp.multiple={multiple} channels are too '
                   'large to meet it, and a lower gdp.multiple does')
    if is_free:
        reason = 'the options of gdp.gate do not hold it'
    return (f'{left:.4f} of the {target.resource} are left, but gdp.target'
            f' is {target.ratio}: {reason}')
