"""Sections of docs/guide.md: what the reports say about a choice."""
from __future__ import annotations

import statistics
from typing import Any, Iterable, Mapping, Sequence

from gdp_mmseg.pruner.schedule import Schedule
from gdp_mmseg.report import tables

from accuracy_report import network_of, phases_of
from accuracy_scores import (beside, differences, mean_and_interval,
                             mean_and_spread, targets_of, values_of)
from accuracy_variants import SHORT
from budget_report import POINT, error_of, phases

Report = dict[str, Any]

# Reports that have trainings with other phases too, and where these start.
_COMPARED = {
    'phases': 'from scratch',
    'accuracy_camvid_400_default': 'from a trained network',
}
# Reports without which the guide cannot be written.
NEEDED = frozenset({'accuracy_camvid_800', 'budget', 'demo', *_COMPARED})


def guide_sections(reports: Mapping[str, Report]) -> dict[str, str]:
    """Return the text of each generated section, by its mark.

    Args:
        reports (Mapping[str, Report]): Reports by the names of their files,
            without the suffix.
    """
    accuracy = {
        name: report
        for name, report in reports.items() if name.startswith('accuracy')
    }
    return dict(
        targets=_targets(accuracy),
        budget=_budget(reports['budget']),
        length=_length(accuracy),
        start=_start(accuracy, reports['demo']),
        phases=_phases(reports),
        latency=_latency(reports['demo']))


def _targets(reports: Mapping[str, Report]) -> str:
    """Return the distance from dense by network, length and target."""
    metrics = ' or '.join(
        dict.fromkeys(report['metric'] for report in reports.values()))
    rows = [[
        'network and data', 'iterations', 'phases', 'FLOPs', 'parameters',
        f'dense {metrics}', f'pruned {metrics}', 'difference'
    ]]
    for report in reports.values():
        for target in targets_of(report, 'gdp'):
            params = values_of(report, 'gdp', target, 'params')
            rows.append([
                network_of(report),
                str(report['iterations']),
                phases_of(report), f'{target:g}',
                f'{statistics.mean(params):.2f}',
                mean_and_spread(beside(report, 'gdp', target)),
                mean_and_spread(values_of(report, 'gdp', target)),
                _difference(report, target)
            ])
    return '\n'.join([
        tables.table(rows), '',
        f'FLOPs and parameters are shares of the dense network. {metrics}: '
        'mean and standard deviation, with the number of seeds in brackets. '
        'All of these networks were trained before they were pruned; '
        '`iterations` is the length of the gated training. The dense network '
        'was trained for the same number of further iterations, from the same '
        'start. Difference: '
        'mean over the seeds that both have.', '',
        _sources(reports)
    ])


def _budget(report: Report) -> str:
    """Return how well small trainings from scratch met their target."""
    runs = report['runs']
    met = sum(error_of(one) <= POINT for one in runs)
    lengths = sorted({one['run']['iterations'] for one in runs})
    least = ' '.join(
        f'The gates of {model} cannot save more than {1 - least:.1%} of its '
        'FLOPs there, so lower targets are refused.'
        for model, least in report['least_flops'].items()
        if least > min(report['targets']))
    seeds = {one['run']['seed'] for one in runs}
    return (
        f'{met} of {len(runs)} small trainings ended within one percentage '
        f'point of their target, at most {100 * max(map(error_of, runs)):.2f} '
        f'points away: {len(report["least_flops"])} networks at the targets '
        f'{", ".join(map(str, report["targets"]))} and at '
        f'{" and ".join(map(str, lengths))} iterations, from scratch, on '
        f'{report["data"]}; {len(seeds)} seed. {least}\n\n'
        'Source: `reports/budget.json`; conditions: [results.md](results.md).')


def _length(reports: Mapping[str, Report]) -> str:
    """Return the distance from dense by the length of the training."""
    rows = [[
        'network and data', 'dense training', 'gated training', 'phases',
        'ratio', 'difference at 0.4'
    ]]
    reports = {
        name: report
        for name, report in reports.items()
        if 0.4 in targets_of(report, 'gdp')
    }
    rows += [[
        network_of(report),
        str(report['start']),
        str(report['iterations']),
        phases_of(report),
        f'{report["iterations"] / report["start"]:.2f}',
        _difference(report, 0.4),
    ] for report in reports.values()]
    return '\n'.join([
        tables.table(rows), '',
        f'Iterations of batch {_one(reports, "batch_size")}; the numbers of '
        'seeds are those of the first table. The dense training began with a '
        'backbone that was trained on ImageNet.', '',
        _sources(reports)
    ])


def _start(reports: Mapping[str, Report], demo: Report) -> str:
    """Return what is known of a start from scratch and from a checkpoint."""
    rows = [[
        'network and data', 'total iterations', 'trained, then pruned to 0.4',
        'narrow from the beginning'
    ]]
    compared = {
        name: report
        for name, report in reports.items()
        if values_of(report, 'narrow', 0.4)
    }
    rows += [[
        network_of(report),
        str(report['start'] + report['iterations']),
        mean_and_spread(values_of(report, 'gdp', 0.4)),
        mean_and_spread(values_of(report, 'narrow', 0.4)),
    ] for report in compared.values()]
    dense, _, pruned = _networks(demo)
    return '\n'.join([
        f'- **From scratch**: {demo["title"]}, {demo["iterations"]} '
        f'iterations each, {len(demo["seeds"])} seed: dense '
        f'{dense.metrics["mIoU"]:.2f} mIoU, pruned to '
        f'{demo["reached"]:.2f} of the FLOPs {pruned.metrics["mIoU"]:.2f}. '
        f'Warm-up, pruning, settling: {phases(demo)}. Source: '
        '`reports/demo.json`.',
        '- **From a trained network**: the first table. A narrow network that '
        'is trained from the ImageNet backbone for as many iterations in '
        'total was far worse. It lost random channels of that backbone:', '',
        tables.table(rows), '',
        _sources(compared)
    ])


def _phases(reports: Mapping[str, Report]) -> str:
    """Return trainings with the default phases and with others."""
    rows = [[
        'training', 'phases', 'mIoU at 0.4 of the FLOPs',
        'minus the default (95 % interval; pairs)'
    ]]
    short = 'gdp+short', 0.4
    for name, start in _COMPARED.items():
        report = reports[name]
        training = (f'{network_of(report)}, {report["iterations"]} iterations '
                    f'{start}')
        rows += [
            [
                training,
                str(Schedule.phases),
                mean_and_spread(beside(report, *short, 'gdp')), '-'
            ],
            [
                training,
                str(SHORT),
                mean_and_spread(values_of(report, *short)),
                mean_and_interval(differences(report, *short, 'gdp'))
            ],
        ]
    return '\n'.join([
        tables.table(rows), '',
        'Mean and standard deviation, with the number of trainings in '
        'brackets. Pairs have the same seed, order of the data and start; '
        'their interval is that of the paired t test.', '',
        _sources(_COMPARED)
    ])


def _latency(demo: Report) -> str:
    """Return the share of the latency beside that of the FLOPs."""
    report = tables.Report.parse(demo)
    size = ' x '.join(map(str, report.input_shape[2:]))
    return (f'{demo["title"]}: {report.share("flops"):.2f} of the FLOPs took '
            f'{report.latency_share():.2f} of the time, on a CPU '
            f'({demo["machine"]}) at {size}. Source: `reports/demo.json`.')


def _difference(report: Report, target: float) -> str:
    """Return the mean score of GDP minus dense, over the seeds of both."""
    found = differences(report, 'gdp', target)
    return f'{statistics.mean(found):+.2f}' if found else '-'


def _one(reports: Mapping[str, Report], key: str) -> Any:
    """Return what all reports have in common."""
    value, = {report[key] for report in reports.values()}
    return value


def _networks(demo: Report) -> Sequence[Any]:
    return tables.Report.parse(demo).networks


def _sources(names: Iterable[str]) -> str:
    """Return a line with the names of the report files."""
    files = ', '.join(f'`reports/{name}.json`' for name in names)
    return f'Source: {files}; conditions: [results.md](results.md).'
