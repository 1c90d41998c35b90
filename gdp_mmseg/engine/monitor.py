"""Gates shown to an mmengine runner's logger and visualizer."""
from __future__ import annotations

import bisect
import itertools
import os.path as osp
import shlex
import textwrap
from pathlib import Path
from typing import Any, Sequence

from mmengine.runner import Runner

from ..analysis.reasons import frozen_by_kind
from ..pruner.figures import HALF_OPEN, Figures
from ..pruner.pruner import Pruner
from ..pruner.schedule import Schedule
from ..report.plots import draw_record, draw_widths, pixels
from ..report.record import RECORD
from ..report.summary import (dead_parts, kept_by_part, kept_share,
                              note_on_widths)

# Most reasons that the start of the log gives for channels without a gate.
_REASONS = 5
_COLUMNS = 100
_NO_BREAK = '\u00a0'
_PHASES = dict(warmup='warm-up', pruning='pruning', settling='settling')


def scalars(pruner: Pruner, figures: Figures) -> dict[str, float]:
    """Shares of the cost and state of the gates, for the log.

    Args:
        pruner (Pruner): Pruner of the model.
        figures (Figures): State of its gates.

    Returns:
        dict[str, float]: Value of each scalar that :func:`log_start`
        explains.
    """
    return {name: getattr(figures, name) for name in _meanings(pruner)}


def _meanings(pruner: Pruner) -> dict[str, str]:
    """Meaning of each scalar, in a few words."""
    resource = pruner.settings.target.resource
    low, high = HALF_OPEN
    found = dict(
        flops='share of the FLOPs in channels that are not closed',
        flops_by_openness='the same, each channel counted by its openness',
        budget=f'share of the {resource} that is allowed; falls from 1 to '
        f'{pruner.settings.target.ratio}',
        held_cost='cost held to the budget: between its shares by openness '
        'and by channels',
        multiplier=pruner.gates.MULTIPLIER,
        undecided=f'share of the gates with an openness between {low} and '
        f'{high}')
    if pruner.cost is not pruner.flops:
        found['cost'] = f'share of the {resource} in channels not closed'
    return found


def log_start(runner: Runner, pruner: Pruner) -> None:
    """Log the gates, the target, what cannot be pruned, and the scalars."""
    analysis, target = pruner.analysis, pruner.settings.target
    size = ' x '.join(map(str, analysis.input_shape[1:]))
    found = frozen_by_kind(
        (row.reason, row.channels) for row in analysis.frozen)
    # A command is copied from the log as one line.
    command = shlex.join(['gdp-mmseg', 'groups',
                          _config_of(runner)]).replace(' ', _NO_BREAK)
    _log(
        runner, f'{analysis.num_gates} gates in {len(analysis.groups)} groups;'
        f' target {target.ratio} of the {target.resource}', [
            f'The dense network has {pruner.flops.dense / 1e9:.3g} GFLOPs '
            f'(multiply-adds) at {size}.', 'Channels without a gate:',
            *(f'{channels:8} {reason}'
              for reason, channels in found[:_REASONS]),
            *([f'         and {len(found) - _REASONS} more reasons']
              if len(found) > _REASONS else []),
            f'All groups and reasons: {command}'
        ])
    meanings = _meanings(pruner)
    width = max(map(len, meanings)) + len('gdp_')
    _log(runner, 'scalars of this log', [
        f'{"gdp_" + name:{width}} {meaning}'
        for name, meaning in meanings.items()
    ])


def log_phase(runner: Runner, pruner: Pruner, phase: str) -> None:
    """Log a phase that begins, or in which a training resumes.

    Args:
        runner (Runner): Runner before an iteration of the phase.
        pruner (Pruner): Pruner of its model.
        phase (str): ``'warmup'``, ``'pruning'`` or ``'settling'``.
    """
    target = pruner.settings.target
    first, last = iterations_of(pruner.schedule, phase, runner.max_iters)
    resumed = (f', resumed at {runner.iter + 1}' if runner.iter +
               1 > first else '')
    meaning = dict(
        warmup='The gates do not move.',
        pruning=f'The budget falls from 1 to {target.ratio} of the '
        f'{target.resource}, and gates close to meet it.',
        settling='The gates are fixed, and the weights adapt to them.')[phase]
    _log(
        runner, f'{_PHASES[phase]} phase, iterations {first} to {last} of '
        f'{runner.max_iters}{resumed}', [meaning])


def iterations_of(schedule: Schedule, phase: str,
                  iterations: int) -> tuple[int, int]:
    """First and last iteration of a phase, counted from 1.

    Args:
        schedule (Schedule): Schedule of the training.
        phase (str): ``'warmup'``, ``'pruning'`` or ``'settling'``.
        iterations (int): Length of the training.
    """
    names = [*_PHASES]

    def place(iteration: int) -> int:
        return names.index(schedule.phase_at(iteration / iterations))

    first, end = (
        bisect.bisect_left(range(iterations), one, key=place)
        for one in (names.index(phase), names.index(phase) + 1))
    return first + 1, end


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
    widths = draw_widths(groups, channels.cpu() > 0, title)
    runner.visualizer.add_image('gdp_widths', pixels(widths), step)
    path = draw_record(Path(runner.work_dir) / RECORD, groups)
    if path is not None:
        runner.visualizer.add_image('gdp_openness', pixels(path), step)


def log_summary(runner: Runner, pruner: Pruner) -> None:
    """Log what was kept of each part, and whether the target is missed."""
    channels = pruner.channels()
    keep = channels.cpu() > 0
    target = pruner.settings.target
    # No line breaks between a name and its number.
    kept = ', '.join(f'{part.name}{_NO_BREAK}{kept_share(part):.0%}'
                     for part in kept_by_part(pruner.analysis.groups, keep))
    dead = '; '.join(dead_parts(pruner.analysis, keep)) or 'none'
    _log(
        runner, f'{float(pruner.cost(channels)):.4f} of the '
        f'{target.resource} are left (target {target.ratio:.4f})', [
            f'channels kept: {kept}', f'removed parts: {dead}',
            *pruner.gates.outcome()
        ])
    notes = (pruner.note_on(float(pruner.cost(channels))),
             note_on_widths(pruner.analysis, keep, pruner.settings.multiple))
    for note in filter(None, notes):
        runner.logger.warning(f'GDP: {note}')


def log_export(runner: Runner, checkpoint: str | None) -> None:
    """Log the command that exports the pruned network.

    Args:
        runner (Runner): Runner at the end of a training.
        checkpoint (str, optional): Last checkpoint that it saved.
    """
    work_dir = Path(runner.work_dir).resolve()
    names = itertools.chain(['exported'], (f'exported_{index}'
                                           for index in itertools.count(2)))
    out_dir = next(work_dir / name for name in names
                   if not (work_dir / name).exists())
    words: list[Any] = [[
        'gdp-mmseg', 'export', _config_of(runner)
    ], ['CHECKPOINT' if checkpoint is None else osp.abspath(checkpoint)],
                        ['--out-dir', str(out_dir)]]
    # Paths are long: a shell joins the lines.
    command = ' \\\n    '.join(map(shlex.join, words))
    runner.logger.info('GDP: the next command, which exports the pruned '
                       'network\n    (with the same --cfg-options as the '
                       f'training, if there were any):\n\n    {command}\n')


def _config_of(runner: Runner) -> str:
    """Path of the config file, or a word that takes its place."""
    return getattr(runner.cfg, 'filename', None) or 'CONFIG'


def _log(runner: Runner, head: str, lines: Sequence[str]) -> None:
    """Log a message of several lines; long ones are wrapped."""
    wrapped = [
        textwrap.fill(
            line,
            _COLUMNS,
            initial_indent=' ' * 4,
            subsequent_indent=' ' * 8,
            break_long_words=False,
            break_on_hyphens=False) for line in lines
    ]
    text = '\n'.join([f'GDP: {head}', *wrapped])
    runner.logger.info(text.replace(_NO_BREAK, ' '))
