"""First screen of docs/results.md, and the README's table of comparisons."""
from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any, Sequence

from matplotlib.figure import Figure

from gdp_mmseg.pruner.schedule import Schedule
from gdp_mmseg.report.tables import table

from accuracy_report import (COLOURS, WITHOUT_TAKEOVER, draw_dense,
                             draw_method, has_other_phases,
                             is_without_takeover, network_of, phases_of,
                             short_name)
from accuracy_scores import (GATES, LABELS, beside, differences, gate_of,
                             mean_and_interval, mean_and_spread, targets_of,
                             values_of)
from budget_report import listed

Report = dict[str, Any]

# Targets of the README's table, the preferred one first.
README_TARGETS = (0.4, 0.5)
OTHER = 'best other alternative'
PLOT = 'accuracy_overview.png'


def overview(reports: Sequence[Report]) -> list[str]:
    """Return where GDP stands on all networks: a sentence, table and plot."""
    rows = [[
        'network and data', 'iterations', 'phases', 'FLOPs', 'dense', 'GDP',
        'GDP minus dense (95 % interval; pairs)', OTHER
    ]]
    compared = [(report, target) for report in reports
                for target in reversed(targets_of(report, 'gdp'))]
    for report, target in compared:
        rows.append([
            *_place(report, target),
            mean_and_spread(beside(report, 'gdp', target)),
            mean_and_spread(values_of(report, 'gdp', target)),
            mean_and_interval(differences(report, 'gdp', target)),
            best_alternative(report, target)
        ])
    return [
        standing(reports), '',
        table(rows), '',
        '- Scores: mean ± standard deviation (seeds) of the mIoU, or of the '
        'accuracy on CIFAR-10. Dense: the network trained on for as long '
        'without pruning, from the start that GDP has. FLOPs: share of its '
        'multiply-adds of one image. ResNet18, ResNet50 and MobileNetV2 are '
        'backbones of DeepLabV3Plus.',
        '- GDP minus dense: mean difference of runs with the same seed, data '
        'order and start, and its interval by the paired t test. **Three '
        'seeds are few**: the interval has 4.3 standard errors to each side '
        'with three pairs, 12.7 with two. Where it includes 0, the difference '
        'may be chance.',
        '- Phases: shares of the training that are warm-up, pruning and '
        f'settling; the default is {listed(Schedule.phases)}.',
        *(f'- {fact}' for fact in _without_takeover(reports)), '',
        'The three gates, where they were compared:', '',
        table(_gates(compared)), '',
        f'![Scores over FLOPs on each network]({PLOT})', ''
    ]


def _without_takeover(reports: Sequence[Report]) -> list[str]:
    """Name the reports of GDP without takeover in a sentence, if any are."""
    found = [report for report in reports if is_without_takeover(report)]
    return _naming(WITHOUT_TAKEOVER, found, reports)


def _other_phases(reports: Sequence[Report]) -> list[str]:
    """Name the reports with other phases than the default in sentences."""
    found: dict[str, list[Report]] = {}
    for report in filter(has_other_phases, reports):
        found.setdefault(phases_of(report), []).append(report)
    return [
        fact for phases, those in found.items() for fact in _naming(
            f'Gates with `phases=({phases})`, not the default', those, reports)
    ]


def _naming(fact: str, some: Sequence[Report],
            reports: Sequence[Report]) -> list[str]:
    """Return a sentence on some of the reports, if there are any."""
    names = [
        f'{short_name(report)} ({report["iterations"]} iterations)'
        for report in some
    ]
    on = '' if len(names) == len(reports) else f': {", ".join(names)}'
    return [f'{fact}{on}.'] if names else []


def _place(report: Report, target: float) -> list[str]:
    """Return network and data, iterations, phases and FLOPs of a row."""
    return [
        short_name(report),
        str(report['iterations']),
        phases_of(report), f'{target:g}'
    ]


def _gates(compared: Sequence[tuple[Report, float]]) -> list[list[str]]:
    """Return the rows of the comparisons with more gates than GDP's."""
    rows = [[
        'network and data', 'iterations', 'phases', 'FLOPs', *GATES.values()
    ]]
    for report, target in compared:
        scores = [values_of(report, gate, target) for gate in GATES]
        if sum(map(bool, scores)) > 1:
            rows.append(
                [*_place(report, target), *map(mean_and_spread, scores)])
    return rows


def standing(reports: Sequence[Report]) -> str:
    """Return a sentence that says where GDP stands against dense."""
    found = [(report, target, statistics.mean(gaps))
             for report, target in longest(reports)
             if (gaps := differences(report, 'gdp', target))]
    below = sum(gap < 0 for *_, gap in found)
    distances = '; '.join(
        f'at {wanted:g} of the FLOPs ' +
        ', '.join(f'{abs(gap):.2f} {"below" if gap < 0 else "above"} '
                  f'({short_name(report)})'
                  for report, target, gap in found if target == wanted)
        for wanted in dict.fromkeys(target for _, target, _ in found))
    return ('**GDP is below the dense network that was trained on for as '
            f'long, on {below} of {len(found)} networks: {distances}.** '
            'Shorter trainings and lower targets are in the table too.')


def longest(reports: Sequence[Report]) -> list[tuple[Report, float]]:
    """Return the longest comparison of each data set, and its target."""
    found: dict[str, tuple[Report, float]] = {}
    for report in sorted(reports, key=lambda report: report['iterations']):
        for target in README_TARGETS:
            if values_of(report, 'dense', 1.) and values_of(
                    report, 'gdp', target):
                found[report['data']] = report, target
                break
    return list(found.values())


def best_method(report: Report, target: float) -> str | None:
    """Return the alternative without gates that scores best at a target."""
    means = {
        method: statistics.mean(values)
        for method in LABELS if gate_of(method) is None and (
            values := values_of(report, method, target))
    }
    return max(means, key=lambda method: means[method], default=None)


def best_alternative(report: Report, target: float) -> str:
    """Return score and name of the best alternative without gates."""
    method = best_method(report, target)
    if method is None:
        return '-'
    scores = mean_and_spread(values_of(report, method, target))
    return f'{scores}, {LABELS[method]}'


def readme_table(reports: Sequence[Report]) -> str:
    """Return the README's table: the longest runs of each data set."""
    compared = longest(reports)
    shown = [report for report, _ in compared]
    gates = [
        name for name in GATES if any(
            values_of(report, name, target) for report, target in compared)
    ]
    cells = [[
        'on real images', 'score', 'dense', 'FLOPs',
        *(GATES[name] for name in gates), 'best alternative'
    ]]
    for report, target in compared:
        cells.append([
            network_of(report), report['metric'],
            mean_and_spread(beside(report, 'gdp', target)), f'{target:g}',
            *(mean_and_spread(values_of(report, name, target))
              for name in gates),
            best_alternative(report, target)
        ])
    facts = [
        'FLOPs: share of those of the dense network.',
        'Mean and standard deviation (number of seeds).',
        *_without_takeover(shown), *_other_phases(shown),
        '[All results](docs/results.md).'
    ]
    return f'{table(cells)}\n\n{" ".join(facts)}'


def plot_overview(reports: Sequence[Report], folder: Path) -> None:
    """Draw the longest comparison of each network, one panel each."""
    compared = [report for report, _ in longest(reports)]
    columns = min(max(len(compared), 1), 3)
    rows = math.ceil(max(len(compared), 1) / columns)
    figure = Figure(figsize=(3.4 * columns, 3.3 * rows), layout='constrained')
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in grid[len(compared):]:
        axes.set_axis_off()
    for axes, report in zip(grid, compared):
        draw_dense(axes, report)
        for gate, label in GATES.items():
            draw_method(axes, report, [(gate, target)
                                       for target in targets_of(report, gate)],
                        label, COLOURS[gate])
        best = [(method, target) for target in targets_of(report)
                if (method := best_method(report, target))]
        draw_method(axes, report, best, OTHER, 'grey')
        axes.set(
            title=short_name(report),
            xlabel='share of the dense FLOPs',
            ylabel=report['metric'],
            xlim=(0, 1))
    handles = {
        label: handle
        for axes in grid
        for handle, label in zip(*axes.get_legend_handles_labels())
    }
    labels = [
        label for label in ('dense', *GATES.values(), OTHER)
        if label in handles
    ]
    figure.legend([handles[label] for label in labels],
                  labels,
                  loc='outside lower center',
                  ncols=len(handles))
    figure.savefig(folder / PLOT, dpi=100)
