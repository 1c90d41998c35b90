"""Tables and plots of benchmarks/accuracy.py, for docs/results.md."""
from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any, Iterable, Sequence

from matplotlib import colormaps
from matplotlib.figure import Figure

from gdp_mmseg.report.tables import table

from budget_report import phases

Report = dict[str, Any]

# Targets of the README's table, the preferred one first.
README_TARGETS = (0.4, 0.5)
# Gates, by the first part of the names of their methods.
GATES = dict(gdp='GDP', scp='SCP', trainable='Trainable gate')
LABELS = dict(
    **GATES,
    narrow='narrower network, from the beginning',
    random='random channels',
    l1='L1 norm',
    l1_head='L1 norm, decode head only',
    slimming='Network Slimming, same share of each layer',
    slimming_global='Network Slimming, one threshold for all',
    gdp_min_keep='GDP, min_keep_ratio 0.1',
    gdp_slow='GDP, pruning for 0.6, settling for 0.3',
    gdp_plain='GDP, gains independent of the group size')
# The ten dark colours of the map first, then their light neighbours.
COLOURS = [
    colormaps['tab20'](2 * index % 20 + index // 10)
    for index in range(len(LABELS))
]
# Explanations of some methods, printed where one of them ran.
NOTES = (
    (('narrow', ),
     'The narrower network does not start from the dense one, but from the '
     'backbone; it loses channels at random, and trains for {total} '
     'iterations with the learning rates of the start.'),
    (('slimming', 'slimming_global'),
     'Network Slimming adds 1e-4 |gamma| to the loss until it prunes, here '
     'for {begin} iterations, in which a scale hardly moves: it is a ranking '
     'by |gamma|. Its authors train with the penalty from the first '
     'iteration.'),
    (('slimming_global', ),
     'With one threshold for all, Torch-Pruning keeps a layer whole that '
     'would lose all its channels.'))


def accuracy(report: Report) -> list[str]:
    """Return the mean and the spread of the score, by method and target."""
    rows = report['rows']
    targets = sorted({row['target'] for row in rows if row['target'] < 1})
    cells = [[report['metric'], *(f'FLOPs {target:g}' for target in targets)]]
    ran = {row['method'] for row in rows}
    for method in filter(ran.__contains__, LABELS):
        cells.append([
            LABELS[method],
            *(_cell(report, method, target) for target in targets)
        ])
    return [
        f'Dense: {mean_and_spread(values_of(report, "dense", 1.))}. The dense '
        'network and all rows start from one dense network, trained for '
        f'{report["start"]} iterations from a pretrained backbone '
        f'({report["weights"]}): {_starts(rows)}.', '',
        table(cells), '',
        f'![{report["metric"]} over FLOPs]({plot_name(report)})', '',
        *_training(report, ran), *_below_dense(report, targets),
        *_pruning(report),
        f'- Training: {report["train"]}. Evaluation: {report["test"]}.',
        f'- Command: `python benchmarks/accuracy.py {report["data"]} '
        f'--iterations {report["iterations"]}{report.get("flags", "")} '
        '--methods '
        f'{" ".join(sorted(ran - {"start"}))} --targets '
        f'{" ".join(map(str, targets))} --data-root DATA --weights BACKBONE '
        f'--report REPORT`; SHA-256 of BACKBONE: '
        f'{report["weights_sha256"][:16]}.'
    ]


def _training(report: Report, ran: set[str]) -> list[str]:
    """Return list items about the training and the alternatives."""
    total = report['start'] + report['iterations']
    begin = round(report['phases'][0] * report['iterations'])
    notes = ''.join(f' {note.format(total=total, begin=begin)}'
                    for methods, note in NOTES if ran.intersection(methods))
    return [
        '- Mean and standard deviation over seeds, with the number of seeds '
        f'in brackets. All rows: {report["iterations"]} iterations of batch '
        f'{report["batch_size"]}, crop {report["crop"][0]} x '
        f'{report["crop"][1]}, {report["optimizer"]}; {report["precision"]}; '
        'the same data order and evaluation. Seeds change the training after '
        'the start.',
        '- The alternatives remove the same share of channels of every '
        f'layer, by rank within it (Torch-Pruning {report["torch_pruning"]}), '
        'unless their row says otherwise. They do so at the iteration at '
        f'which the gates begin to close ({report["phases"][0]:.0%}), and '
        'train on. Out of reach: more than 95% of the channels would have to '
        f'go.{notes}'
    ]


def _pruning(report: Report) -> list[str]:
    """Return list items about the settings and the results of the gates."""
    rows = [
        row for row in report['rows']
        if row['score'] is not None and row['method'] in LABELS
    ]
    families = {
        label: found
        for name, label in GATES.items()
        if (found := [row for row in rows if gate_of(row['method']) == name])
    }
    others = [row for row in rows if gate_of(row['method']) is None]
    distances = [
        f'{label} {_off_target(found)} points'
        for label, found in families.items()
    ] + ([f'the alternatives {_off_target(others)}'] if others else [])
    gated = [row for found in families.values() for row in found]
    apart = max(abs(row['score'] - row['score_gated']) for row in gated)
    notes = ' '.join(report.get('notes', ()))
    return [
        f'- {notes} Their optimizer starts anew when they prune.',
        f'- Warm-up, pruning, settling of GDP: {phases(report)}.',
        f'- FLOPs reached minus target: {", ".join(distances)}.',
        f'- {_and([*families])}: the {report["metric"]} before and after the '
        f'export differs by {apart:.2f} at most; gates with an openness '
        'between 0.01 and 0.5 at the end: '
        f'{max(row["half_open"] for row in gated):.2%} at most.'
    ]


def gate_of(method: str) -> str | None:
    """Return the gate of a method, a key of ``GATES``; None without gates."""
    name = method.partition('_')[0]
    return name if name in GATES else None


def _and(words: Sequence[str]) -> str:
    """Join words as in a sentence."""
    *most, last = words
    return f'{", ".join(most)} and {last}' if most else last


def _below_dense(report: Report, targets: Iterable[float]) -> list[str]:
    """Return list items about the distance of GDP from dense, where known."""
    dense = values_of(report, 'dense', 1.)
    lines = []
    for target in targets:
        gdp = values_of(report, 'gdp', target)
        if min(len(dense), len(gdp)) > 1:
            below = statistics.mean(dense) - statistics.mean(gdp)
            spread = math.hypot(statistics.stdev(dense), statistics.stdev(gdp))
            lines.append(
                f'- GDP at {target:g} is {below:.2f} below dense; the '
                'standard deviation of such a difference of two runs is '
                f'{spread:.2f}.')
    return lines


def _starts(rows: list[Report]) -> str:
    """Return the score of the networks that rows start from.

    The usual start comes first. Runs on another machine had one of their own.
    """
    names: dict[float, list[str]] = {}
    for row in rows:
        name = f'`{row["method"]}-{row["target"]}-{row["seed"]}`'
        if row['start_score'] and row['score'] is not None:
            names.setdefault(row['start_score'], []).append(name)
    usual, *others = sorted(names, key=lambda score: -len(names[score]))
    return f'{usual:.2f}' + ''.join(
        f'; {", ".join(names[score])} started from a second training of it: '
        f'{score:.2f}' for score in others)


def _cell(report: Report, method: str, target: float) -> str:
    """Return a cell of the table of :func:`accuracy`."""
    if any(row['method'] == method and row['target'] == target
           and row['score'] is None for row in report['rows']):
        return 'out of reach'
    return mean_and_spread(values_of(report, method, target))


def values_of(report: Report,
              method: str,
              target: float,
              key: str = 'score') -> list[float]:
    """Return a value of the rows of all seeds that met the target."""
    return [
        row[key] for row in report['rows'] if row['method'] == method
        and row['target'] == target and row['score'] is not None
    ]


def mean_and_spread(values: Sequence[float]) -> str:
    """Return ``mean +- standard deviation (number)``."""
    if not values:
        return '-'
    mean, deviation = _mean_and_deviation(values)
    spread = f' ± {deviation:.2f}' if len(values) > 1 else ''
    return f'{mean:.2f}{spread} ({len(values)})'


def _mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and standard deviation; the latter is 0 for one value."""
    return (statistics.mean(values),
            statistics.stdev(values) if len(values) > 1 else 0.)


def _off_target(rows: list[Report]) -> str:
    """Return the range of the distances of FLOPs from the target, in points.
    """
    points = [100 * (row['macs'] - row['target']) for row in rows]
    return f'{min(points):+.1f} to {max(points):+.1f}'


def readme_table(reports: Iterable[Report]) -> str:
    """Return the README's table: the longest runs of each data set."""
    longest: dict[str, tuple[Report, float]] = {}
    for report in sorted(reports, key=lambda report: report['iterations']):
        for target in README_TARGETS:
            if values_of(report, 'dense', 1.) and values_of(
                    report, 'gdp', target):
                longest[report['data']] = report, target
                break
    gates = [
        name for name in GATES if any(
            values_of(report, name, target)
            for report, target in longest.values())
    ]
    cells = [[
        'on real images', 'score', 'dense', 'FLOPs',
        *(GATES[name] for name in gates), 'best alternative'
    ]]
    for report, target in longest.values():
        others = [(statistics.mean(values), mean_and_spread(values), label)
                  for method, label in LABELS.items()
                  if gate_of(method) is None and (
                      values := values_of(report, method, target))]
        cells.append([
            report['title'].partition(':')[0], report['metric'],
            mean_and_spread(values_of(report, 'dense', 1.)), f'{target:g}',
            *(mean_and_spread(values_of(report, name, target))
              for name in gates), ', '.join(max(others)[1:]) if others else '-'
        ])
    return (f'{table(cells)}\n\nFLOPs: share of those of the dense network. '
            'Mean and standard deviation (number of seeds); '
            '[all results](docs/results.md).')


def plot_name(report: Report) -> str:
    """Return the file name of a report's plot."""
    return f'accuracy_{report["data"]}_{report["iterations"]}.png'


def plot_accuracy(report: Report, folder: Path) -> None:
    """Draw the score over FLOPs with its spread, and dense as a band."""
    figure = Figure(figsize=(6, 4), layout='constrained')
    axes = figure.subplots()
    dense = values_of(report, 'dense', 1.)
    if dense:
        mean, deviation = _mean_and_deviation(dense)
        axes.axhspan(mean - deviation, mean + deviation, color='k', alpha=0.1)
        axes.axhline(
            mean, color='k', linestyle='--', linewidth=1, label='dense')
    for index, (method, name) in enumerate(LABELS.items()):
        targets = sorted({
            row['target']
            for row in report['rows']
            if row['method'] == method and row['score'] is not None
        })
        if not targets:
            continue
        means, deviations = zip(
            *(_mean_and_deviation(values_of(report, method, target))
              for target in targets))
        axes.errorbar(
            [
                statistics.mean(values_of(report, method, target, 'macs'))
                for target in targets
            ],
            means,
            deviations,
            label=name,
            color=COLOURS[index],  # a method has one colour in all plots
            marker='o',
            linewidth=3 if method == 'gdp' else 1,
            capsize=3)
    axes.set(
        xlabel='share of the dense multiply-adds',
        ylabel=report['metric'],
        xlim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(fontsize='small')
    figure.savefig(folder / plot_name(report), dpi=120)
