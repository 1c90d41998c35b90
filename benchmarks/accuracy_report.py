"""Sections and plots of benchmarks/accuracy.py, for docs/results.md."""
from __future__ import annotations

import re
import statistics
from collections import Counter
from pathlib import Path
from typing import Any, Callable, Sequence

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gdp_mmseg.pruner.schedule import Schedule
from gdp_mmseg.report.tables import table

from accuracy_scores import (GATES, LABELS, differences, gate_of,
                             mean_and_deviation, mean_and_interval,
                             mean_and_spread, rows_of, targets_of, values_of)
from accuracy_variants import CHANGES
from budget_report import listed, phases
from pages import Section

Report = dict[str, Any]

# The ten dark colours of the map first, then their light neighbours.
COLOURS = {
    method: colormaps['tab20'](2 * index % 20 + index // 10)
    for index, method in enumerate(LABELS)
}
# Base of a change: the same method without it.
_NO_CHANGE = 'no change'
WITHOUT_TAKEOVER = 'GDP with `takeover=False`, the default at that time'
# Facts that are true of all comparisons.
COMPARED = (
    'All rows of a section start from one dense network and train on for '
    'equally many iterations, with the same order of the data and the same '
    'evaluation. Seeds change the training after the start.',
    'GDP, SCP and the trainable gate close gates while they train. The '
    'alternatives prune once, when the gates begin to close, and train on '
    'with a new optimizer. They remove the same share of channels of every '
    'layer, by rank within it, unless their row says otherwise. Out of reach: '
    'more than 95% of the channels would have to go.',
    'The narrower network starts from the pretrained backbone, of which it '
    'lost channels at random, and trains as long as the start and another row '
    'together.',
    'Network Slimming adds 1e-4 |gamma| to the loss until it prunes, too '
    'short a time to move a scale: it is a ranking by |gamma|. Its authors '
    'train with the penalty from the first iteration. With one threshold for '
    'all, Torch-Pruning keeps a layer whole that would lose all its channels.',
    'The commands also need `--data-root DATA --weights BACKBONE --report '
    'REPORT`; SHA-256 is that of BACKBONE.')


def network_of(report: Report) -> str:
    """Return the names of network and data, the first part of a title."""
    name: str = report['title'].partition(':')[0]
    return name


def short_name(report: Report) -> str:
    """Return the names of network and data without what most have."""
    return re.sub('DeepLabV3Plus-|a subset of |JPEG images of ', '',
                  network_of(report))


def accuracy(report: Report) -> Section:
    """Return the section of one comparison."""
    return Section(
        title_of(report), [
            _scores(report), '', f'![{report["metric"]} over FLOPs]'
            f'({plot_name(report)})', *changes(report)
        ], [*_training(report), _source(report)])


def title_of(report: Report) -> str:
    """Return network, data and length of a comparison."""
    return (f'{network_of(report)}, {report["iterations"]} iterations' +
            f', phases {phases_of(report)}' * has_other_phases(report) +
            ', on held-out training images' * is_held_out(report))


def is_held_out(report: Report) -> bool:
    """Tell whether scores are those of images held out of the training."""
    return ('--tune' in report.get('flags', '')
            or report['file'].startswith('tuning'))


def phases_of(report: Report) -> str:
    """Return the phases of the gates of a comparison."""
    return listed(report['phases'])


def has_other_phases(report: Report) -> bool:
    """Tell whether the phases of the gates are not the default."""
    return tuple(report['phases']) != Schedule.phases


def is_without_takeover(report: Report) -> bool:
    """Tell whether GDP was trained before takeover was its default."""
    return not report.get('takeover', True)


def _scores(report: Report) -> str:
    """Return the table of the scores, target by target."""
    ran = {row['method'] for row in report['rows']}
    targets = reversed(targets_of(report, *LABELS))
    return _table(report, ['dense'], [
        ('dense', 'dense', 1.),
        *((_label(report, method), method, target) for target in targets
          for method in filter(ran.__contains__, LABELS)),
    ])


def changes(report: Report) -> list[str]:
    """Return a table of changes to the training, if a report has any."""
    names = sorted({
        method
        for row in report['rows']
        if '+' in (method := row['method']) and method.startswith(('dense+',
                                                                   'gdp+'))
    })
    bases = [('dense', 1.),
             *(('gdp', target) for target in targets_of(report, *names))]
    rows = [(_label(report, method), method, target) for base, target in bases
            for method in (base, *names) if method.split('+')[0] == base]
    return [
        '', 'One change at a time:', '',
        _table(report, [_NO_CHANGE, 'dense'], rows)
    ] if names else []


def _label(report: Report, method: str) -> str:
    """Return a method and the changes to its training as text.

    It says, too, if rows of a newer report are from before takeover.
    """
    base, *names = method.split('+')
    before = any(not row.get('takeover', True) for row in report['rows']
                 if row['method'] == method)
    return ', '.join([
        LABELS.get(base, base), *(CHANGES[name].label for name in names),
        *['takeover=False'] * before
    ])


def _table(report: Report, bases: Sequence[str],
           rows: Sequence[tuple[str, str, float]]) -> str:
    """Return a table of scores and of their differences to bases.

    Args:
        report (Report): Report with the scores.
        bases (Sequence[str]): ``'dense'``, ``'no change'`` or both.
        rows (Sequence[tuple[str, str, float]]): Label, method and target of
            each row; left out if it did not run.
    """
    cells = [['training', 'FLOPs', report['metric']]]
    for base in bases:
        cells[0].append(f'minus {base} (95 % interval; pairs)')
    for label, method, target in rows:
        if score := _cell(report, method, target):
            cells.append([label, f'{target:g}', score])
            own = method.split('+')[0]
            for base in bases:
                of_change = base == _NO_CHANGE
                is_base = method == own if of_change else own == base
                cells[-1].append(
                    mean_and_interval([] if is_base else differences(
                        report, method, target, own if of_change else base)))
    return table(cells)


def _cell(report: Report, method: str, target: float) -> str:
    """Return the score of a method, if it ran and could meet the target."""
    values = values_of(report, method, target)
    ran = any(row['method'] == method and row['target'] == target
              for row in report['rows'])
    return mean_and_spread(values) if values else 'out of reach' * ran


def tried(report: Report) -> Section:
    """Return the section of changes that were tried one by one."""
    return Section(
        f'{title_of(report)}: changes to the training' +
        ' without takeover' * is_without_takeover(report),
        changes(report)[3:], [
            'Runs with the same seed have the same start and the same order '
            'of the data.' + ' These scores chose the learning rate of later '
            'comparisons.' * is_held_out(report), *_training(report),
            f'Machine: {places(report)}. Report: '
            f'`reports/{report["file"]}.json`.'
        ])


def _training(report: Report) -> list[str]:
    """Return facts about the training and the data."""
    return [
        f'Start: {report["start"]} iterations from pretrained weights '
        f'({report["weights"]}){_starts(report)}. Then '
        f'{report["iterations"]} of batch {report["batch_size"]}, crop '
        f'{report["crop"][0]} x {report["crop"][1]}, '
        f'{report["optimizer"]}.', ' '.join([
            f'Training: {report["train"]}. Evaluation: {report["test"]}.',
            *report.get('notes', ())
        ]), *[f'{WITHOUT_TAKEOVER}.'] * is_without_takeover(report),
        f'Warm-up, pruning, settling of the gates: {phases(report)}. '
        f'{report["precision"].capitalize()}.'
    ]


def _source(report: Report) -> str:
    """Return file, machine and command of a report."""
    methods = {row['method'] for row in report['rows']} - {'start'}
    return (f'`reports/{report["file"]}.json`, {places(report)}: `python '
            f'benchmarks/accuracy.py {report["data"]} --iterations '
            f'{report["iterations"]}{report.get("flags", "")} --methods '
            f'{" ".join(sorted(methods))} --targets '
            f'{" ".join(map(str, targets_of(report)))}`, SHA-256 '
            f'{report["weights_sha256"][:16]}.')


def checks(reports: Sequence[Report]) -> str:
    """Return how exact the pruning of all comparisons was."""
    rows = [
        row for report in reports for row in report['rows']
        if row['score'] is not None and row['target'] < 1
    ]
    gated = [row for row in rows if gate_of(row['method'])]
    off, off_others = (
        max((100 * abs(row['macs'] - row['target'])
             for row in rows if bool(gate_of(row['method'])) == has_gates),
            default=0.) for has_gates in (True, False))
    apart = max(abs(row['score'] - row['score_gated']) for row in gated)
    undecided = max(row['half_open'] for row in gated)
    return (f'The worst of all {len(gated)} trainings with gates: FLOPs '
            f'{off:.1f} points from the target ({off_others:.1f} with the '
            f'alternatives); score {apart:.2f} apart before and after the '
            f'export; {undecided:.2%} of the gates undecided, with an '
            'openness between 0.01 and 0.5 at the end.')


def _starts(report: Report) -> str:
    """Return the scores of the networks that rows start from, if known."""
    rows = [
        row for row in report['rows']
        if row.get('start_score') and row['score'] is not None
    ]
    scores = _groups(rows, lambda row: row['start_score'])
    return ''.join(
        f', {report["metric"]} {score:.2f}' if not index else
        f'; {names} started from another training of it: {score:.2f}'
        for index, (score, names) in enumerate(scores))


def places(report: Report) -> str:
    """Return where most rows ran, and which rows ran elsewhere."""

    def place(row: Report) -> str:
        machine, torch, torch_pruning, precision = (
            row.get(key, report[key])
            for key in ('machine', 'torch', 'torch_pruning', 'precision'))
        pruning = f', Torch-Pruning {torch_pruning}' if torch_pruning else ''
        other = f', {precision}' if precision != report['precision'] else ''
        return f'{machine}, torch {torch}{pruning}{other}'

    (usual, _), *others = _groups(report['rows'], place)
    return usual + ''.join(f'; {names}: {place}' for place, names in others)


def _groups(rows: Sequence[Report],
            key: Callable[[Report], Any]) -> list[tuple[Any, str]]:
    """Return each value that rows have and their names, most rows first."""
    found: dict[Any, list[Report]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return [(value, _names(found[value], rows))
            for value in sorted(found, key=lambda value: -len(found[value]))]


def _names(some: Sequence[Report], rows: Sequence[Report]) -> str:
    """Return the names of some rows, and the seeds that are among them.

    Rows that differ in their seeds alone have one name, as in ``gdp-0.4-0/1``.
    """
    of_some, of_all = (
        Counter(row['seed'] for row in found) for found in (some, rows))
    whole = [seed for seed in of_some if of_some[seed] == of_all[seed]]
    seeds: dict[str, list[str]] = {}
    for row in some:
        if row['seed'] not in whole:
            seeds.setdefault(f'{row["method"]}-{row["target"]}',
                             []).append(str(row['seed']))
    return ', '.join([
        *(f'`{run}-{"/".join(found)}`' for run, found in seeds.items()),
        *(f'seed {seed}' for seed in whole)
    ])


def plot_name(report: Report) -> str:
    """Return the file name of a report's plot."""
    return f'{report["file"]}.png'


def plot_accuracy(report: Report, folder: Path) -> None:
    """Draw the score over FLOPs with its spread, and dense as a band."""
    figure = Figure(figsize=(8, 4), layout='constrained')
    axes = figure.subplots()
    draw_dense(axes, report)
    for method, name in LABELS.items():
        draw_method(axes, report, [(method, target)
                                   for target in targets_of(report, method)],
                    name, COLOURS[method])
    axes.set(
        xlabel='share of the dense multiply-adds',
        ylabel=report['metric'],
        xlim=(0, 1))
    figure.legend(loc='outside right upper', fontsize='small')
    figure.savefig(folder / plot_name(report), dpi=120)


def draw_dense(axes: Axes, report: Report) -> None:
    """Draw the score of the dense network and its spread as a band."""
    axes.grid(alpha=0.3)
    dense = values_of(report, 'dense', 1.)
    if dense:
        mean, deviation = mean_and_deviation(dense)
        axes.axhspan(mean - deviation, mean + deviation, color='k', alpha=0.1)
        axes.axhline(
            mean, color='k', linestyle='--', linewidth=1, label='dense')


def draw_method(axes: Axes, report: Report, points: Sequence[tuple[str,
                                                                   float]],
                label: str, colour: Any) -> None:
    """Draw mean and spread over FLOPs of some methods at some targets."""
    found = [(values_of(report, *point, 'macs'), values_of(report, *point))
             for point in points if rows_of(report, *point)]
    if found:
        means, deviations = zip(*(mean_and_deviation(scores)
                                  for _, scores in found))
        one_method = len({method for method, _ in points}) == 1
        axes.errorbar([statistics.mean(shares) for shares, _ in found],
                      means,
                      deviations,
                      label=label,
                      color=colour,
                      marker='o',
                      linestyle='-' if one_method else 'none',
                      linewidth=3 if label == GATES['gdp'] else 1,
                      capsize=3)
