"""Records of a training: ``gates.jsonl`` and the logged evaluations."""
from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Sequence

from ..files import write_whole

# Name of the record in the work folder of a training.
RECORD = 'gates.jsonl'


@dataclasses.dataclass(frozen=True)
class GateRow:
    """One line of a record.

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


def append_row(path: Path, row: GateRow) -> None:
    """Append a line to a record."""
    with open(path, 'a') as file:
        file.write(json.dumps(dataclasses.asdict(row)) + '\n')


def read_rows(path: Path, until: float = math.inf) -> list[GateRow]:
    """Read the lines of a record up to an iteration.

    Args:
        path (Path): A ``gates.jsonl``.
        until (float): Last iteration that is read.

    Raises:
        ValueError: If a line is not one of a record.
    """
    try:
        rows = [
            GateRow(**json.loads(line))
            for line in path.read_text().splitlines()
        ]
    except (TypeError, ValueError) as error:
        raise ValueError(f'expected the lines of a gated training in {path}, '
                         f'but got: {error}') from error
    return [row for row in rows if row.iter <= until]


def drop_rows_after(path: Path, iteration: int) -> None:
    """Remove truncated lines and those after an iteration, in place.

    Args:
        path (Path): A record; it may be absent.
        iteration (int): Last iteration whose line is kept.
    """
    if not path.is_file():
        return
    kept = [
        line for line in path.read_text().splitlines()
        if _iteration(line) <= iteration
    ]
    write_whole(path, ''.join(f'{line}\n' for line in kept).encode())


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
