"""Records of a training: ``gates.jsonl`` and the evaluations."""
from __future__ import annotations

import json
import math
from pathlib import Path

from ..files import write_whole


def last_miou(work_dir: Path) -> float:
    """mIoU, in percent, of the last evaluation that a training logged."""
    scalars = sorted(work_dir.glob('*/vis_data/scalars.json'))[-1]
    rows = [json.loads(line) for line in scalars.read_text().splitlines()]
    return float([row['mIoU'] for row in rows if 'mIoU' in row][-1])


def read_gates(path: Path) -> tuple[list[int], list[float], list[list[float]]]:
    """Read the ``gates.jsonl`` of a training.

    Returns:
        tuple: ``(T,)`` iterations, ``(T,)`` shares of FLOPs, ``(T, S)`` mean
        openness of each group.
    """
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return ([row['iter'] for row in rows], [row['flops'] for row in rows],
            [row['openness'] for row in rows])


def read_budget(path: Path) -> tuple[list[float], list[float]]:
    """Read the ``gates.jsonl`` of a training.

    Returns:
        tuple: ``(T,)`` budgets asked for, and what was held against them;
        none of a record that does not say.
    """
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    if not all('budget' in row for row in rows):
        return [], []
    return [row['budget'] for row in rows], [row['held_cost'] for row in rows]


def drop_rows_after(path: Path, iteration: int) -> None:
    """Keep the rows of a record up to an iteration, each whole, in place.

    Args:
        path (Path): Holds a JSON object with ``iter`` in each line; may be
            absent.
        iteration (int): The last that is kept.
    """
    if not path.is_file():
        return
    kept = [
        line for line in path.read_text().splitlines()
        if _iteration(line) <= iteration
    ]
    write_whole(path, ''.join(f'{line}\n' for line in kept).encode())


def _iteration(line: str) -> float:
    """Of a row; infinite if it was cut short."""
    try:
        return float(json.loads(line)['iter'])
    except ValueError:
        return math.inf
