"""Plots of the gates over a training, and of the widths that they leave.

The figures are made without pyplot: they need no display and do not change
the state of a program that draws with pyplot.
"""
from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Mapping, Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from ..analysis.structure import Group
from .record import read_rows
from .summary import kept_by_group, kept_by_part, kept_share, parts_of

_FONT = 8
# Inches between two labels of an axis.
_LINE = 0.115


def draw_record(record: Path,
                groups: Sequence[Group],
                until: float = math.inf) -> Figure | None:
    """Draw the openness of each group over a training, and its budget.

    Args:
        record (Path): A ``gates.jsonl``; it may be absent.
        groups (Sequence[Group]): Groups of the network that was trained.
        until (float): Last iteration that is drawn.

    Returns:
        Figure, optional: None if there is no such file or no line in it.

    Raises:
        ValueError: If it cannot be read, or belongs to another network.
    """
    rows = read_rows(record, until, groups) if record.is_file() else []
    if not rows:
        return None
    return draw_path([row.iter
                      for row in rows], [row.openness for row in rows],
                     parts_of(groups), [row.budget for row in rows],
                     [row.held_cost for row in rows])


def draw_path(
    iterations: Sequence[int],
    openness: Sequence[Sequence[float]],
    parts: Sequence[str],
    budget: Sequence[float] = (),
    held: Sequence[float] = ()
) -> Figure:
    """Draw the openness of each group over a training, the budget below.

    Args:
        iterations (Sequence[int]): ``(T,)``, at equal distances.
        openness (Sequence[Sequence[float]]): ``(T, S)`` mean openness of each
            group.
        parts (Sequence[str]): ``(S,)`` name of the part of each group.
        budget (Sequence[float]): ``(T,)`` budget, a share of the dense cost;
            empty for no curve.
        held (Sequence[float]): ``(T,)`` cost that was held against it.
    """
    rows = len(dict.fromkeys(parts))
    panel = min(max(0.07 * len(parts), 1.4 * _LINE * rows, 1.5), 12)
    order = _by_part(parts)
    if len(budget):
        figure = _figure(9, panel + 2.1)
        upper, lower = figure.subplots(
            2, 1, sharex=True, gridspec_kw=dict(height_ratios=[panel, 1.2]))
        lower.plot(iterations, budget, color='grey', ls='--', label='budget')
        lower.plot(iterations, held, color='C3', label='cost held against it')
        lower.set_ylim(0, 1.05)
        lower.set_ylabel('share of\nthe cost', fontsize=_FONT)
        lower.legend(fontsize=_FONT, loc='lower left')
        lower.tick_params(labelsize=_FONT)
        lower.grid(alpha=0.3)
    else:
        figure = _figure(9, panel + 0.9)
        upper = lower = figure.subplots()
    plot_gates(
        np.asarray(openness)[:, order], iterations[-1], upper,
        [parts[index] for index in order])
    upper.set_title('openness of each group of channels', fontsize=_FONT + 2)
    if upper is not lower:
        upper.set_xlabel('')
    lower.set_xlabel('iteration', fontsize=_FONT)
    return figure


def plot_gates(openness: Any,
               iterations: int,
               axes: Any,
               parts: Sequence[str] = ()) -> None:
    """Draw the mean openness of each group over a training.

    Args:
        openness (Any): ``(T, S)`` array, at equal distances in time.
        iterations (int): Length of the training.
        axes (Any): matplotlib axes to draw on.
        parts (Sequence[str]): ``(S,)`` name of the part of each group, groups
            of the same part side by side; empty for no names.
    """
    groups = openness.shape[1]
    image = axes.imshow(
        openness.T,
        aspect='auto',
        vmin=0,
        vmax=1,
        cmap='viridis',
        interpolation='nearest',
        extent=(0, iterations, groups - 0.5, -0.5))
    axes.set(xlabel='iteration', ylabel='group, from input to output')
    bar = axes.figure.colorbar(image, ax=axes, label='mean openness')
    if len(parts):
        axes.set_ylabel('groups, by part', fontsize=_FONT)
        axes.tick_params(labelsize=_FONT)
        bar.ax.tick_params(labelsize=_FONT)
        bar.set_label('mean openness', fontsize=_FONT)
        runs = _runs(parts)
        inches = axes.figure.get_figheight() * axes.get_position().height
        axes.set_yticks(
            _places(runs, inches), [name for name, _, _ in runs],
            fontsize=_FONT - 1)
        axes.tick_params(axis='y', length=0)
        for _, first, _ in runs[1:]:
            axes.axhline(first - 0.5, color='white', linewidth=0.8)


def draw_widths(groups: Sequence[Group], keep: Tensor, title: str) -> Figure:
    """Draw the share of the channels that each group and each part keeps.

    Args:
        groups (Sequence[Group]): Groups of the network.
        keep (Tensor): ``(G,)`` bool, the gates whose channels are kept.
        title (str): Title of the figure.
    """
    parts = parts_of(groups)
    shares = {
        part.name: kept_share(part)
        for part in kept_by_part(groups, keep)
    }
    of_groups = [kept_share(row) for row in kept_by_group(groups, keep)]
    order = _by_part(parts)
    kept = np.asarray(of_groups)[order]
    runs = _runs([parts[index] for index in order])
    width = min(max(6, 0.1 * len(kept), 1.5 * _LINE * len(runs)), 24)
    figure = _figure(width + 1, 4.2)
    axes = figure.subplots()
    for index, (name, first, end) in enumerate(runs):
        axes.bar(
            range(first, end),
            kept[first:end],
            width=0.9,
            color=f'C{index % 2}',
            edgecolor='none')
        # A group that keeps nothing has no visible bar.
        dead = [place for place in range(first, end) if kept[place] == 0]
        axes.plot(dead, [0.01] * len(dead), 'x', color='black', markersize=4)
        axes.hlines(shares[name], first - 0.5, end - 0.5, color='black')
    axes.tick_params(labelsize=_FONT)
    axes.set_xticks(
        _places(runs, width),
        [f'{name}  {shares[name]:.0%}' for name, _, _ in runs],
        fontsize=_FONT - 1,
        rotation=90)
    axes.tick_params(axis='x', length=0)
    axes.set(xlim=(-0.8, len(kept) - 0.2), ylim=(0, 1.02))
    axes.set_ylabel('kept share of the channels', fontsize=_FONT)
    axes.set_xlabel(
        'groups, by the part that writes them; line: share of the part, '
        'cross: none kept',
        fontsize=_FONT)
    axes.set_title(title, fontsize=_FONT + 2)
    return figure


def draw_shares(shares: Mapping[str, float], title: str) -> Figure:
    """Draw the pruned network's share of each quantity as a bar.

    Args:
        shares (Mapping[str, float]): Pruned over dense, by quantity.
        title (str): Title of the figure.
    """
    figure = _figure(7, 0.9 + 0.34 * len(shares))
    axes = figure.subplots()
    colours = ['C0' if 'latency' in name else 'grey' for name in shares]
    bars = axes.barh(range(len(shares)), [*shares.values()], color=colours)
    axes.bar_label(
        bars, [f'{share:.3f}' for share in shares.values()],
        padding=3,
        fontsize=_FONT)
    axes.set_yticks(range(len(shares)), [*shares], fontsize=_FONT)
    axes.invert_yaxis()
    axes.axvline(1, color='black', linewidth=0.8)
    axes.set_xlim(0, max(1.1, *(1.15 * share for share in shares.values())))
    axes.tick_params(labelsize=_FONT)
    axes.set_xlabel('pruned over dense network', fontsize=_FONT)
    axes.set_title(title, fontsize=_FONT + 2)
    return figure


def pixels(figure: Figure) -> np.ndarray:
    """Render a figure as RGB, uint8 ``(H, W, 3)``."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=110, layout='constrained')
    # Without a canvas a figure cannot be measured or saved.
    FigureCanvasAgg(figure)
    return figure


def _by_part(parts: Sequence[str]) -> list[int]:
    """Indices of the groups, those of the same part side by side."""
    place = {name: index for index, name in enumerate(dict.fromkeys(parts))}
    return sorted(range(len(parts)), key=lambda index: place[parts[index]])


def _runs(parts: Sequence[str]) -> list[tuple[str, int, int]]:
    """Name, first index and end of each run of the same part."""
    starts = [
        index for index, name in enumerate(parts)
        if index == 0 or parts[index - 1] != name
    ]
    ends = [*starts[1:], len(parts)]
    return [(parts[first], first, end) for first, end in zip(starts, ends)]


def _places(runs: Sequence[tuple[str, int, int]],
            inches: float) -> list[float]:
    """Positions of the labels of runs: the middles, moved apart.

    One pass moves labels up until they do not overlap; the other moves them
    back down from the end of the axis.
    """
    end = runs[-1][2]
    gap = _LINE * end / inches
    places = [(first + end - 1) / 2 for _, first, end in runs]
    for index in range(1, len(places)):
        places[index] = max(places[index], places[index - 1] + gap)
    places[-1] = min(places[-1], max(end - 1, gap * (len(places) - 1)))
    for index in reversed(range(len(places) - 1)):
        places[index] = min(places[index], places[index + 1] - gap)
    return places
