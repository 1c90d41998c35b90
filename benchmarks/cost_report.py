"""Sections on latency and on the time of trainings, for docs/results.md."""
from __future__ import annotations

import statistics
from typing import Any, Iterable, Sequence

from gdp_mmseg.report import tables

from budget_report import phases
from pages import Section

Report = dict[str, Any]


def networks(report: Report) -> Section:
    """Return the table of dense, gated and pruned, and its conditions."""
    exported = tables.Report.parse(report)
    size = ' x '.join(map(str, exported.input_shape[2:]))
    shares = ', '.join(f'{name.removeprefix("latency, ")} {share:.2f}'
                       for name, share in exported.shares().items()
                       if name.startswith('latency'))
    return Section(f'Accuracy over latency: {report["title"]}', [
        tables.comparison(exported)
    ], [
        'Pruned over dense: FLOPs '
        f'{exported.share("flops"):.3f} (target {exported.target}), latency '
        f'{shares}, at {size}; medians of alternating runs. On another '
        'machine only the ratios are comparable.',
        f'Training: {report["train"]}; {report["iterations"]} iterations of '
        f'batch {report["batch_size"]}, crop '
        f'{report["crop"][0]} x {report["crop"][1]}, seeds '
        f'{", ".join(map(str, report["seeds"]))}; {report["precision"]}; '
        f'warm-up, pruning, settling: {phases(report)}. Dense and gated have '
        'the same start, data order, schedule and iterations. Evaluation: '
        f'{report["test"]}.',
        'Largest difference between the outputs of the gated and the pruned '
        f'network, relative to the largest output: '
        f'{report["max_rel_diff"]:.0e} on {report["compared_on"]}.',
        f'Machine: {report["machine"]}; torch {report["torch"]}. Report: '
        f'`reports/{report["file"]}.json`.'
    ])


def latency_elsewhere(latency: Report | None) -> str:
    """Return which latencies there are of the networks without a score."""
    if latency is None:
        return 'No other report has an accuracy and a latency.'
    ratios = [
        ratio for row in latency['rows'] for ratio in row['latency'].values()
    ]
    return ('No other report has an accuracy and a latency. The page on '
            '[latency](latency.md) has networks without a training, from '
            'which channels were removed at random: at 0.4 of the FLOPs they '
            f'took {min(ratios):.2f} to {max(ratios):.2f} of the dense time.')


def equal_time(demo: Report | None, speed: Report | None,
               comparisons: Sequence[Report]) -> Section:
    """Return how many iterations GDP makes in the time of dense ones."""
    facts = [
        'No comparison at equal time was trained: all comparisons have equal '
        'iterations.'
    ]
    for training, iterations, share in [*_demo(demo), *_whole(speed)]:
        facts.append(
            f'{training}: {iterations} gated iterations took {share:.2f} of '
            'the process time of as many dense ones; in the time of the dense '
            f'training, {iterations / share:.0f} would fit.')
    longer = [
        statistics.median(gdp) > statistics.median(dense)
        for report in comparisons if (gdp := _minutes(report, 'gdp')) and (
            dense := _minutes(report, 'dense'))
    ]
    facts.append(
        'The minutes in the reports of the comparisons do not tell: other '
        'runs may have shared the machine, and those of dense trainings '
        'include an evaluation. By them, the median training with GDP took '
        'longer than the dense one in '
        f'{sum(longer)} of {len(longer)} comparisons.')
    return Section('Equal time', [], facts)


def _minutes(report: Report, method: str) -> list[float]:
    """Return the minutes of all trainings of a method."""
    return [
        row['minutes'] for row in report['rows']
        if row['method'] == method and row['score'] is not None
    ]


def _demo(demo: Report | None) -> Iterable[tuple[str, int, float]]:
    """Yield name, iterations and share of the dense time of the demo."""
    if demo is not None:
        dense, gated, _ = tables.Report.parse(demo).networks
        if dense.training_minutes and gated.training_minutes:
            yield (demo['title'], demo['iterations'],
                   gated.training_minutes / dense.training_minutes)


def _whole(speed: Report | None) -> Iterable[tuple[str, int, float]]:
    """Yield the same of the whole trainings in the report on speed."""
    whole = (speed or {}).get('whole')
    if whole is not None:
        runs = dict(whole['runs'])
        dense = runs.pop('dense')
        for name, found in runs.items():
            share = statistics.median(one / other
                                      for one, other in zip(found, dense))
            yield (f'DeepLabV3Plus-ResNet50 on random images, {name}',
                   whole['iterations'], share)
