"""Scores of the rows of benchmarks/accuracy.py: spread and paired differences.

A row is one training; its name in a report is ``method-target-seed``.
"""
from __future__ import annotations

import math
import re
import statistics
from typing import Any, Sequence

from scipy import stats

Report = dict[str, Any]

# Gates, by the first part of the names of their methods.
GATES = dict(gdp='GDP', scp='SCP', trainable='Trainable gate')
LABELS = dict(
    **GATES,
    narrow='narrower network, from the beginning',
    random='random channels',
    l1='L1 norm',
    l1_head='L1 norm, decode head only',
    slimming='Network Slimming, same share of each layer',
    slimming_global='Network Slimming, one threshold for all',
    gdp_min_keep='GDP, min_keep_ratio 0.1',
    gdp_slow='GDP, pruning for 0.6, settling for 0.3',
    gdp_plain='GDP, gains independent of the group size')


def rows_of(report: Report, method: str, target: float) -> list[Report]:
    """Return the rows of all seeds that met the target."""
    return [
        row for row in report['rows'] if row['method'] == method
        and row['target'] == target and row['score'] is not None
    ]


def values_of(report: Report,
              method: str,
              target: float,
              key: str = 'score') -> list[float]:
    """Return a value of the rows of all seeds that met the target."""
    return [row[key] for row in rows_of(report, method, target)]


def beside(report: Report,
           method: str,
           target: float,
           base: str = 'dense') -> list[float]:
    """Return the scores of a base's runs that start where a method's do.

    Args:
        report (Report): Report with the rows of both.
        method (str): Name of the method.
        target (float): Its target.
        base (str): Name of the base, at the same target unless it is the
            dense network. Defaults to ``'dense'``.
    """
    starts = {
        row.get('start_score')
        for row in rows_of(report, method, target)
    }
    return [
        row['score'] for row in _base_rows(report, base, target)
        if row.get('start_score') in starts
    ]


def targets_of(report: Report, *methods: str) -> list[float]:
    """Return the targets below 1 of some methods, or of all, in order."""
    return sorted({
        row['target']
        for row in report['rows']
        if row['target'] < 1 and (not methods or row['method'] in methods)
    })


def gate_of(method: str) -> str | None:
    """Return the gate of a method, a key of ``GATES``; None without gates."""
    name = re.split('[_+]', method)[0]
    return name if name in GATES else None


def mean_and_spread(values: Sequence[float]) -> str:
    """Return ``mean ± standard deviation (number)``."""
    if not values:
        return '-'
    mean, deviation = mean_and_deviation(values)
    spread = f' ± {deviation:.2f}' if len(values) > 1 else ''
    return f'{mean:.2f}{spread} ({len(values)})'


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and standard deviation; the latter is 0 for one value."""
    return (statistics.mean(values),
            statistics.stdev(values) if len(values) > 1 else 0.)


def differences(report: Report,
                method: str,
                target: float,
                base: str = 'dense') -> list[float]:
    """Return the scores of a method minus those of another one, run by run.

    Two runs make a pair if they have the same seed, which is the same order of
    the data, and the same start.

    Args:
        report (Report): Report with the rows of both.
        method (str): Name of the first method.
        target (float): Its target.
        base (str): Name of the second one, at the same target unless it is
            the dense network. Defaults to ``'dense'``.
    """
    others = {
        _pairing(row): row['score']
        for row in _base_rows(report, base, target)
    }
    return [
        row['score'] - others[_pairing(row)]
        for row in rows_of(report, method, target) if _pairing(row) in others
    ]


def _base_rows(report: Report, base: str, target: float) -> list[Report]:
    return rows_of(report, base, 1. if base == 'dense' else target)


def _pairing(row: Report) -> tuple[int, float | None]:
    """Return what two runs of a pair have in common."""
    return row['seed'], row.get('start_score')


def mean_and_interval(values: Sequence[float]) -> str:
    """Return ``mean (interval; number)``.

    Args:
        values (Sequence[float]): Differences of pairs. The interval is that
            of the paired t test, 95 %.
    """
    if not values:
        return '-'
    mean, deviation = mean_and_deviation(values)
    number = len(values)
    if number == 1:
        return f'{mean:+.2f} (1)'
    half = stats.t.ppf(0.975, number - 1) * deviation / math.sqrt(number)
    return (f'{mean:+.2f} ({mean - half:+.2f} to {mean + half:+.2f}; '
            f'{number})')
