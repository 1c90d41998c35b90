"""What an export reports: sizes, latency, tables, pictures."""
from __future__ import annotations

import copy
import json
import statistics
import time
from pathlib import Path
from typing import Any, Callable, Mapping, Sequence

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .files import write_whole


def count_macs(model: nn.Module, input_shape: tuple[int, ...]) -> int:
    """Multiply-adds of one forward pass in ``tensor`` mode.

    Counted by torch's own counter, which knows nothing of this project.

    Args:
        model (nn.Module): An mm model; a copy is run, without data where its
            forward asks for none.
        input_shape (tuple[int, ...]): ``(N, C, H, W)``.
    """
    for device in ('meta', 'cpu'):
        shadow = copy.deepcopy(model).to(device).eval()
        try:
            # The others of a CPU the counter does not know.
            with torch.no_grad(), sdpa_kernel(
                    SDPBackend.MATH), FlopCounterMode(
                        display=False) as counter:
                shadow(torch.zeros(input_shape, device=device), mode='tensor')
            break
        except Exception:  # the model's own, of any kind
            if device == 'cpu':
                raise
    return counter.get_total_flops() // 2


def count_parameters(model: nn.Module) -> int:
    """All parameters of a model, those that only training uses included."""
    return sum(parameter.numel() for parameter in model.parameters())


def last_miou(work_dir: Path) -> float:
    """mIoU, in percent, of the last evaluation that a training logged."""
    scalars = sorted(work_dir.glob('*/vis_data/scalars.json'))[-1]
    rows = [json.loads(line) for line in scalars.read_text().splitlines()]
    return float([row['mIoU'] for row in rows if 'mIoU' in row][-1])


def paired_latency_ms(models: Sequence[nn.Module],
                      input_shape: tuple[int, ...],
                      repeats: int = 7,
                      seconds: float = 6.) -> list[float]:
    """Median time of a forward pass of each model, measured in turn.

    The models alternate, so that a machine that slows down slows all of them:
    the ratios hold where the times do not.

    Args:
        models (Sequence[nn.Module]): mm models on one device, in eval mode.
        input_shape (tuple[int, ...]): ``(N, C, H, W)``.
        repeats (int): Timed rounds at most, after one that is not timed.
        seconds (float): No third timed round starts after this.

    Returns:
        list[float]: Milliseconds.
    """
    device = next(models[0].parameters()).device
    inputs = torch.rand(input_shape, device=device)

    def once(model: nn.Module) -> float:
        if device.type == 'cuda':
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        model(inputs, mode='tensor')
        if device.type == 'cuda':
            torch.cuda.synchronize(device)
        return (time.perf_counter() - start) * 1e3

    end = time.perf_counter() + seconds
    runs: list[list[float]] = []
    with torch.no_grad():
        while len(runs) <= 2 or (len(runs) <= repeats
                                 and time.perf_counter() < end):
            runs.append([once(model) for model in models])
    runs = runs[1:]
    return [statistics.median(times) for times in zip(*runs)]


def write_json(path: Path, content: Any) -> None:
    """Write to a temporary name, then rename: never half a file."""
    write_whole(path, (json.dumps(content, indent=1) + '\n').encode())


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
    stages = [['part', 'channels', 'kept', 'kept share']]
    for stage in report['stages']:
        stages.append([
            stage['name'],
            str(stage['channels']),
            str(stage['kept']), f'{stage["kept"] / stage["channels"]:.0%}'
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
        table(stages), '', *dead, '', '## Groups', '',
        table(groups), ''
    ])


def read_gates(path: Path) -> tuple[list[int], list[float], list[list[float]]]:
    """Read the ``gates.jsonl`` of a training.

    Returns:
        tuple: ``(T,)`` iterations, ``(T,)`` shares of FLOPs, ``(T, S)`` mean
        openness of each group.
    """
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return ([row['iter'] for row in rows], [row['flops'] for row in rows],
            [row['openness'] for row in rows])


def read_budget(path: Path) -> tuple[list[float], list[float]]:
    """Read the ``gates.jsonl`` of a training.

    Returns:
        tuple: ``(T,)`` budgets asked for, and what was held against them;
        none of a record that does not say.
    """
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    if not all('asked' in row for row in rows):
        return [], []
    return [row['asked'] for row in rows], [row['got'] for row in rows]


Progress = Callable[[str], None]
