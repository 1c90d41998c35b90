"""Gates shown to an mmengine runner's logger and visualizer."""
from __future__ import annotations

from pathlib import Path

from mmengine.runner import Runner

from ..pruner.pruner import Pruner
from ..report.plots import draw_record, draw_widths, pixels
from ..report.record import RECORD
from ..report.summary import dead_parts, kept_by_part, parts_of


def show_gates(runner: Runner, pruner: Pruner, step: int) -> None:
    """Give the runner's visualizer a picture of openness and one of widths.

    Args:
        runner (Runner): Its backends get the images ``gdp_openness`` and
            ``gdp_widths``.
        pruner (Pruner): Pruner of the runner's model.
        step (int): Number of iterations that are over.
    """
    groups = pruner.analysis.groups
    channels = pruner.channels()
    target = pruner.settings.target
    title = (f'{float(channels.mean()):.0%} of the channels kept; '
             f'{float(pruner.cost(channels)):.3f} of the {target.resource} '
             f'(target {target.ratio:.3f})')
    widths = draw_widths(
        [float(channels[group.gates].mean()) for group in groups],
        parts_of(groups), title)
    runner.visualizer.add_image('gdp_widths', pixels(widths), step)
    path = draw_record(Path(runner.work_dir) / RECORD, groups)
    if path is not None:
        runner.visualizer.add_image('gdp_openness', pixels(path), step)


def log_summary(runner: Runner, pruner: Pruner) -> None:
    """Log what was kept of each part, and whether the target is missed."""
    channels = pruner.channels()
    keep = channels.cpu() > 0
    target = pruner.settings.target
    kept = ', '.join(f'{part.name} {part.kept / part.channels:.0%}'
                     for part in kept_by_part(pruner.analysis.groups, keep))
    runner.logger.info(
        f'GDP: {float(pruner.cost(channels)):.4f} of the {target.resource} '
        f'are left (target {target.ratio:.4f}); channels kept: {kept}; '
        'removed parts: '
        f'{"; ".join(dead_parts(pruner.analysis, keep)) or "none"}')
    note = pruner.note_on(float(pruner.cost(channels)))
    if note:
        runner.logger.warning(f'GDP: {note}')
