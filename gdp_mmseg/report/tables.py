"""What an export reports: sizes, latency, tables, pictures."""
from __future__ import annotations

from typing import Any, Callable, Mapping, Sequence


def table(rows: Sequence[Sequence[str]]) -> str:
    """A markdown table; the first row is its head, numbers to the right.

    Examples:
        >>> print(table([['network', 'mIoU'], ['dense', '61.2']]))
        | network | mIoU |
        |:--------|-----:|
        | dense   | 61.2 |
    """
    widths = [max(map(len, column)) for column in zip(*rows)]

    def line(row: Sequence[str]) -> str:
        first, *rest = [
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths))
        ]
        return '| ' + ' | '.join([first, *rest]) + ' |'

    rule = '|:' + '-' * (widths[0] + 1) + '|' + ''.join(
        '-' * (width + 1) + ':|' for width in widths[1:])
    return '\n'.join([line(rows[0]), rule, *map(line, rows[1:])])


def comparison(report: Mapping[str, Any]) -> str:
    """Dense, gated, pruned: mIoU, GFLOPs, parameters, latency."""

    def row(name: str, size: str) -> list[str]:
        latency = report.get(f'latency_ms_{name}')
        value = report.get(f'miou_{name}')
        return [
            name, '-' if value is None else f'{value:.2f}',
            f'{report[f"macs_{size}"] / 1e9:.2f}',
            f'{report[f"params_{size}"] / 1e6:.2f}',
            '-' if latency is None else f'{latency:.1f}'
        ]

    return table([
        ['network', 'mIoU', 'GFLOPs', 'params (M)', 'latency (ms)'],
        row('dense', 'dense'),
        row('gated', 'dense'),
        row('pruned', 'pruned'),
    ])


# What else a target can be about.
_COSTS = dict(
    params='Parameters that inference reads',
    latency='Latency of the layers, by the fit made before the training')


def markdown(report: Mapping[str, Any]) -> str:
    """``report.json`` for a reader."""
    _, channels, height, width = report['input_shape']
    share = report['macs_pruned'] / report['macs_dense']
    asked = f', asked for {report["target"]}'
    by_flops = report['target_type'] == 'flops'
    of_cost = [] if by_flops else [
        f'{_COSTS[report["target_type"]]}: {report["cost_pruned"]:.4f} of '
        f'the dense network\'s{asked}.'
    ]
    picture = ([] if report['gates_picture'] is None else [
        f'![Openness of each group over the training, asked against got]'
        f'({report["gates_picture"]})', ''
    ])
    parts = [['part', 'channels', 'kept', 'kept share']]
    for part in report['parts']:
        parts.append([
            part['name'],
            str(part['channels']),
            str(part['kept']), f'{part["kept"] / part["channels"]:.0%}'
        ])
    dead = ['Nothing died.'] if not report['dead'] else [
        'Died: what is left of each is at most a constant.', '',
        *(f'- {part}' for part in report['dead'])
    ]
    groups = [['group (written by)', 'channels', 'kept', 'kept share']]
    for group in report['groups']:
        more = len(group['writers']) - 1
        groups.append([
            group['writers'][0] + (f' and {more} more' if more else ''),
            str(group['channels']),
            str(group['kept']), f'{group["kept"] / group["channels"]:.0%}'
        ])
    return '\n'.join([
        f'# {report["name"]}', '',
        comparison(report), '',
        f'FLOPs (multiply-adds of one {channels} x {height} x {width} input): '
        f'{share:.4f} of the dense ones{asked if by_flops else ""}.', *of_cost,
        f'Largest difference between the outputs of the gated and the pruned '
        f'network, relative to the largest output: '
        f'{report["max_rel_diff"]:.1e} on {report["compared_on"]}.',
        f'Latency: median of alternating runs on {report["device"]}, '
        f'torch {report["torch"]}; only the ratio travels to another '
        'machine.', '', '## What the gates did', '', *picture,
        table(parts), '', *dead, '', '## Groups', '',
        table(groups), ''
    ])


Progress = Callable[[str], None]
