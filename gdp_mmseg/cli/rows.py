"""Rows of checked models as text: cells of a table, or one printed line."""
from __future__ import annotations

from typing import Any

from ..analysis.reasons import frozen_by_kind

# Text of a row's status in tables.
STATUS = dict(
    works='works',
    part='works, part frozen',
    refused='refused',
    unbuilt='cannot be built here',
    wrong='FAULTY')
# Characters of an error in a cell.
LONGEST_REASON = 200
COLUMNS = ('status', 'prunable channels', 'prunable FLOPs',
           'random weights, fp32', 'random weights, fp64', 'as built, fp32',
           'analysis (s)', 'peak (GiB)', 'frozen channels, or error')


def cells_of(row: dict[str, Any]) -> list[str]:
    """Return the text of a row in each of ``COLUMNS``."""
    numbers = [''] * 7
    if row.get('rel_diff') is not None:
        numbers = [
            f'{row["prunable_channels"]:.0%}', f'{row["prunable_macs"]:.0%}',
            f'{row["rel_diff"]:.0e}',
            _double(row),
            _built(row), f'{row["seconds"]:.1f}', f'{row["peak_gib"]:.1f}'
        ]
    return [
        STATUS[row['status']], *numbers, row['reason'][:LONGEST_REASON]
        or _operators(row['frozen'])
    ]


def _double(row: dict[str, Any]) -> str:
    """Return the difference in double precision, if there is one."""
    difference = row['rel_diff_fp64']
    return 'does not run' if difference is None else f'{difference:.0e}'


def _built(row: dict[str, Any]) -> str:
    """Return the difference with the built weights, and its bound."""
    text = f'{row["rel_diff_built"]:.0e}'
    if 'rounding' in row:
        text += f' (rounding: {row["rounding"]:.0e})'
    return text


def _operators(frozen: list[dict[str, Any]]) -> str:
    """Return the frozen channels by operator, the largest number first."""
    counts = frozen_by_kind((row['reason'], row['channels']) for row in frozen)
    return ', '.join(f'{reason} ({count})' for reason, count in counts)


def show(row: dict[str, Any]) -> None:
    """Print a row on one line, without its empty cells."""
    print(
        f'{row["config"]}:',
        '; '.join(f'{column}: {cell}'
                  for column, cell in zip(COLUMNS, cells_of(row)) if cell))
