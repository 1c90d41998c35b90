"""Tables of how well trainings meet their budget, for docs/results.md."""
from __future__ import annotations

from typing import Any, Collection, Iterable, Sequence

from gdp_mmseg.report.tables import table

from pages import Section

Report = dict[str, Any]

# Largest accepted distance of the final FLOPs from the target.
POINT = 0.01
# Facts that are true of all sections on budgets.
BUDGETS = (
    'Cells: share of the dense FLOPs that the open channels have at the end '
    'of the training; * is more than a point from the target; "least": the '
    'gates cannot save more, so the target is refused; "-": not run.',
    'Half-open gates: share of the gates with an openness between 0.01 and '
    '0.5 at the end, the maximum of the row. Largest step: the largest share '
    'of FLOPs that one iteration removed.')


def budget(report: Report) -> Section:
    """Return the target and the FLOPs reached, by model and iterations."""
    runs, targets = report['runs'], report['targets']
    rows = [[
        'model, iterations', *(f'target {target}' for target in targets),
        'largest error (points)', 'half-open gates', 'largest step (points)'
    ]]
    for iterations in sorted({one['run']['iterations'] for one in runs}):
        for model, least in report['least_flops'].items():
            by_target = {
                one['run']['target']: one
                for one in runs if one['run']['model'] == model
                and one['run']['iterations'] == iterations
            }
            # A model that reaches no target is named all the same.
            if by_target or max(targets) <= least:
                rows.append([
                    f'{model}, {iterations}',
                    *(_reached(by_target.get(target), target, least)
                      for target in targets), *_extremes(by_target.values())
                ])
    missed = sum(error_of(one) > POINT for one in runs)
    return Section(report['title'], [table(rows)], [
        f'{len(runs) - missed} of {len(runs)} runs are within one point of '
        'the target.',
        moved_while_settling(runs), *_multiples(report), *_gate(report),
        *conditions(report)
    ])


def _extremes(runs: Collection[Report]) -> list[str]:
    """Return the last cells of a row of the table of :func:`budget`."""
    if not runs:
        return ['-'] * 3
    return [
        f'{100 * max(map(error_of, runs)):.2f}',
        f'{max(one["half_open"] for one in runs):.2%}',
        f'{100 * max(one["largest_step"] for one in runs):.1f}'
    ]


def _multiples(report: Report) -> list[str]:
    """Return facts about the widths of a report with a multiple."""
    multiple = report.get('multiple', 1)
    if multiple == 1:
        return []
    others = sum(bool(one['other_widths']) for one in report['runs'])
    return [
        f'With `multiple={multiple}`. Runs in which the outputs of a pruned '
        f'layer are no multiple of {multiple}: {others} of '
        f'{len(report["runs"])}.'
    ]


def _gate(report: Report) -> list[str]:
    """Return facts about the gates of a report, if not GDP's."""
    gate = report.get('gate', 'gdp')
    return [] if gate == 'gdp' else [f'With `gate={gate!r}`.']


def _reached(one: Report | None, target: float, least: float) -> str:
    """Return a cell of the table of :func:`budget`."""
    if one is None:
        return f'least {least:.3f}' if target <= least else '-'
    return f'{one["flops"]:.3f}' + (' *' if error_of(one) > POINT else '')


def controllers(report: Report) -> Section:
    """Return the FLOPs that several controllers reach, and their path."""
    runs = report['runs']
    targets = sorted({one['run']['target'] for one in runs})
    rows = [[
        'controller', *(f'target {target}' for target in targets),
        'within a point', 'half-open gates', 'above budget', 'below budget',
        'loss'
    ]]
    for weight in sorted({one['run']['loss_weight'] for one in runs}):
        for name in dict.fromkeys(one['controller'] for one in runs):
            chosen = [
                one for one in runs if one['controller'] == name
                and one['run']['loss_weight'] == weight
            ]
            if chosen:
                label = name if weight == 1 else f'{name}, loss x {weight:g}'
                rows.append([label, *_controller_cells(chosen, targets)])
    models = dict.fromkeys(one['run']['model'] for one in runs)
    lengths = sorted({one['run']['iterations'] for one in runs})
    return Section(report['title'], [table(rows)], [
        f'All rows have the same gate step, models ({", ".join(models)}), '
        'seeds, data order and schedules '
        f'({", ".join(map(str, lengths))} iterations); only the multiplier '
        'differs. Loss x 10 is the same task with a loss in another unit. '
        'Eleven pairs of proportional and integral gains were tried in 200 '
        'iterations of DeepLabV3Plus-ResNet18; 3 and 0.02 was the best.',
        'Above budget, below budget: the largest distance of the held cost '
        'from the budget of the same iteration in the pruning phase, in '
        'points. Loss: mean of the last tenth of the training and over the '
        'runs; the networks differ in the FLOPs that they reached.',
        moved_while_settling(runs), *conditions(report)
    ])


def _controller_cells(runs: list[Report], targets: list[float]) -> list[str]:
    """Return the cells of one row of the table of :func:`controllers`."""
    return [
        *(_range_of(one for one in runs if one['run']['target'] == target)
          for target in targets),
        f'{sum(error_of(one) <= POINT for one in runs)} of {len(runs)}',
        f'{max(one["half_open"] for one in runs):.2%}',
        f'{100 * max(one["above_budget"] for one in runs):.1f}',
        f'{100 * max(one["below_budget"] for one in runs):.1f}',
        f'{sum(one["loss"] for one in runs) / len(runs):.3f}'
    ]


def _range_of(runs: Iterable[Report]) -> str:
    """Return the least and the largest share of FLOPs of some runs."""
    shares = sorted(f'{one["flops"]:.3f}' for one in runs)
    return '-'.join(dict.fromkeys([shares[0], shares[-1]]))


def moved_while_settling(runs: Iterable[Report]) -> str:
    """Return a sentence about the change of FLOPs after the pruning phase."""
    most = max(abs(one['flops'] - one['flops_pruned']) for one in runs)
    return ('From the end of the pruning phase to the end of the training the '
            f'FLOPs changed by {100 * most:.2f} points at most.')


def conditions(report: Report) -> list[str]:
    """Return facts about the trainings of a report and its machine."""
    seeds = sorted({one['run']['seed'] for one in report['runs']})
    size = ' x '.join(map(str, report['input_shape'][2:]))
    return [
        f'Training: {report["data"]}; batch {report["batch_size"]}; '
        f'{report["optimizer"]}; seeds {", ".join(map(str, seeds))}. FLOPs at '
        f'{size}. Warm-up, pruning, settling: {phases(report)}. Models: '
        'small ones of each kind (`benchmarks/small_models.py`).',
        f'Machine: {report["machine"]}; torch {report["torch"]}.',
        f'Report: `reports/{report["file"]}.json`.'
    ]


def phases(report: Report) -> str:
    """Return the lengths of the phases of the gates as a phrase."""
    return f'{listed(report["phases"])} of the training'


def listed(shares: Sequence[float]) -> str:
    """Return the shares of a training that the phases are, as text."""
    return ', '.join(map(str, shares))


def error_of(one: Report) -> float:
    """Return the distance of a run's FLOPs from its target, a share."""
    return abs(one['flops'] - one['run']['target'])
