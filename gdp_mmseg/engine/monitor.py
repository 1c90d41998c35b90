"""What the gates did, for a reader: while a model trains, and afterwards."""
from __future__ import annotations

import math
from pathlib import Path
from typing import Sequence

from matplotlib.figure import Figure
from mmengine.runner import Runner

from ..analysis.structure import Group
from ..pruner.pruner import Pruner
from ..pruner.settings import COSTS
from ..report.plots import draw_path, draw_widths, pixels
from ..report.record import read_budget, read_gates
from ..report.summary import dead_parts, kept_by_part, part_of

RECORD = 'gates.jsonl'


def show_gates(runner: Runner, pruner: Pruner, step: int) -> None:
    """Give the runner's visualizer a picture of openness, and of widths.

    Args:
        runner (Runner): Its backends get the images ``gdp_openness`` and
            ``gdp_widths``.
        pruner (Pruner): Of its model.
        step (int): Iterations that are over.
    """
    analysis = pruner.analysis.groups
    channels = pruner.channels()
    target = pruner.settings.target
    title = (f'{float(channels.mean()):.0%} of the channels kept; '
             f'{COSTS[target.type]}: asked for {target.ratio:.3f}, '
             f'got {float(pruner.cost(channels)):.3f}')
    widths = draw_widths(
        [float(channels[group.gates].mean()) for group in analysis],
        _parts(analysis), title)
    runner.visualizer.add_image('gdp_widths', pixels(widths), step)
    path = path_figure(Path(runner.work_dir) / RECORD, analysis)
    if path is not None:
        runner.visualizer.add_image('gdp_openness', pixels(path), step)


def log_summary(runner: Runner, pruner: Pruner) -> None:
    """Log what is kept of each stage, and what died."""
    channels = pruner.channels()
    keep = channels.cpu() > 0
    target = pruner.settings.target
    kept = ', '.join(f'{part.name} {part.kept / part.channels:.0%}'
                     for part in kept_by_part(pruner.analysis.groups, keep))
    runner.logger.info(
        f'GDP: asked for {target.ratio:.4f} of the {COSTS[target.type]}, got '
        f'{float(pruner.cost(channels)):.4f}; channels kept: {kept}; died: '
        f'{"; ".join(dead_parts(pruner.analysis, keep)) or "nothing"}')


def path_figure(record: Path,
                groups: Sequence[Group],
                until: float = math.inf) -> Figure | None:
    """The picture of a ``gates.jsonl``.

    Args:
        record (Path): Of a training of the same network.
        groups (Sequence[Group]): Of the network.
        until (float): Iterations of the training that count.

    Returns:
        Figure, optional: None if there is no such file, or nothing in it.

    Raises:
        ValueError: If it cannot be read, or is of another network.
    """
    if not record.is_file():
        return None
    iterations, _, openness = read_gates(record)
    number = sum(iteration <= until for iteration in iterations)
    if not number:
        return None
    if any(len(row) != len(groups) for row in openness):
        raise ValueError(
            f'expected the openness of {len(groups)} groups in {record}, but '
            f'got {len(openness[0])}; it is of another training')
    budget, held = read_budget(record)
    return draw_path(iterations[:number], openness[:number], _parts(groups),
                     budget[:number], held[:number])


def _parts(groups: Sequence[Group]) -> list[str]:
    return [part_of(group.writers[0]) for group in groups]
