"""Records of a training: ``gates.jsonl`` and the logged evaluations.

The first line of ``gates.jsonl`` names the groups of channels:
``{"groups": [{"writers": ["backbone.stem.0"], "channels": 16}, ...]}``. Each
further line is a :class:`GateRow`, whose ``openness`` has one number for each
of these groups, in the same order.
"""
from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, Sequence

from ..analysis.structure import Group
from ..files import write_whole

# Name of the record in the work folder of a training.
RECORD = 'gates.jsonl'


@dataclasses.dataclass(frozen=True)
class GateRow:
    """One line of a record after the first.

    Args:
        iter (int): Number of iterations that are over.
        flops (float): Share of the dense FLOPs, by whole channels.
        budget (float): Share of the dense cost that was allowed.
        held_cost (float): Cost that was held against the budget.
        openness (list[float]): ``(S,)`` mean openness of each group.
    """
    iter: int
    flops: float
    budget: float
    held_cost: float
    openness: list[float]


def begin_record(path: Path, groups: Sequence[Group], iteration: int) -> None:
    """Write the first line of a record, and keep what a resume goes on from.

    Truncated lines and those after the iteration are removed.

    Args:
        path (Path): The record; it may be absent.
        groups (Sequence[Group]): Groups of the network that is trained.
        iteration (int): Number of iterations that are over. At 0 a new
            training begins, and no earlier line is kept.

    Raises:
        ValueError: If a training would resume, and the record belongs to
            another one. The record is left as it is.
    """
    lines = path.read_text().splitlines() if path.is_file() else []
    kept: list[str] = []
    if iteration and lines:
        try:
            _check_groups(_groups_of(lines[0]), _named(groups))
        except ValueError as error:
            raise ValueError(
                f'{path}: expected the record of the training that resumes, '
                f'but got {error}; move the file away, or choose another '
                'work_dir') from error
        kept = [line for line in lines[1:] if _iteration(line) <= iteration]
    first = json.dumps(dict(groups=_named(groups)))
    write_whole(path, ''.join(f'{line}\n' for line in [first, *kept]).encode())


def append_row(path: Path, row: GateRow) -> None:
    """Append a line to a record."""
    with open(path, 'a') as file:
        file.write(json.dumps(dataclasses.asdict(row)) + '\n')


def read_rows(path: Path,
              until: float = math.inf,
              groups: Sequence[Group] | None = None) -> list[GateRow]:
    """Read the lines of a record up to an iteration.

    Args:
        path (Path): A ``gates.jsonl``.
        until (float): Last iteration that is read.
        groups (Sequence[Group], optional): Groups that the record must have.

    Raises:
        ValueError: If a line is not one of a record, or the record has other
            groups.
    """
    first, *lines = path.read_text().splitlines() or ['']
    if not first and not lines:
        return []
    try:
        names = _groups_of(first)
        if groups is not None:
            _check_groups(names, _named(groups))
        rows = [GateRow(**json.loads(line)) for line in lines]
        for row in rows:
            if len(row.openness) != len(names):
                raise ValueError(f'{len(row.openness)} numbers for '
                                 f'{len(names)} groups at iteration '
                                 f'{row.iter}')
    except (TypeError, ValueError) as error:
        raise ValueError(f'expected the record of this training in {path}, '
                         f'but got {error}') from error
    return [row for row in rows if row.iter <= until]


def _named(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Writers and number of channels of each group, as in a record."""
    return [
        dict(writers=list(group.writers), channels=len(group.gates))
        for group in groups
    ]


def _groups_of(first: str) -> list[dict[str, Any]]:
    """Groups that the first line of a record names.

    Raises:
        ValueError: If it names none.
    """
    try:
        return [
            dict(writers=list(group['writers']), channels=group['channels'])
            for group in json.loads(first)['groups']
        ]
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            f'a first line that names no groups ({first[:40]!r}); '
            'another version of gdp_mmseg wrote it, or it is '
            'damaged') from None


def _check_groups(came: list[dict[str, Any]], wanted: list[dict[str,
                                                                Any]]) -> None:
    """Check that a record has the groups of a network.

    Raises:
        ValueError: If it has others; names the first of them.
    """
    for index, (one, other) in enumerate(zip(came, wanted)):
        if one != other:
            raise ValueError(f'another training\'s, whose group {index} is '
                             f'{_title(one)} and not {_title(other)}')
    if len(came) != len(wanted):
        raise ValueError(f'another training\'s, with {len(came)} groups and '
                         f'not {len(wanted)}')


def _title(group: dict[str, Any]) -> str:
    """First writer of a group and its number of channels."""
    return f'{group["writers"][0]} ({group["channels"]} channels)'


def _iteration(line: str) -> float:
    """Iteration of one line; infinity if the line is truncated."""
    try:
        return float(json.loads(line)['iter'])
    except ValueError:
        return math.inf


def last_metrics(work_dir: Path, names: Sequence[str]) -> dict[str, float]:
    """Read the last value of some metrics that a training logged.

    Args:
        work_dir (Path): Work folder of an mmengine training.
        names (Sequence[str]): Names of the metrics, e.g. ``'mIoU'``.

    Returns:
        dict[str, float]: Value of each metric that was logged.
    """
    logs = sorted(work_dir.glob('*/vis_data/scalars.json'))
    found: dict[str, float] = {}
    for line in logs[-1].read_text().splitlines() if logs else ():
        row = json.loads(line)
        found.update({name: row[name] for name in names if name in row})
    return found
