"""Report of an export: networks, what was kept, and its tables.

All numbers of ``report.json``, ``report.md`` and the printed table come from
one :class:`Report`. FLOPs are multiply-adds of one image.
"""
from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Mapping, Sequence

from ..files import write_json
from .deployment import Deployment
from .summary import GroupRow, Part, kept_share

# Metrics that stand for a whole evaluation, best known first.
_HEADLINES = ('mIoU', 'accuracy/top1')
# FLOPs below which a table counts them in millions: of fewer billions, two
# decimals tell too little.
_LARGE = 5e8
# Resources that a target can be about besides FLOPs, in whole sentences.
_RESOURCES = dict(
    params='Parameters that inference reads',
    latency='Latency of the layers, by the fit made before the training')


@dataclasses.dataclass(frozen=True)
class NetworkRow:
    """Size, speed and quality of one network.

    Args:
        name (str): ``'dense'``, ``'gated'`` or ``'pruned'``.
        flops (int): Multiply-adds of one image at the report's input shape.
        params (int): Number of all parameters.
        latency_ms (dict[str, float]): Milliseconds of one forward pass, by
            runtime and device, e.g. ``'pytorch cpu'``.
        metrics (dict[str, float], optional): Scalar metrics under the names
            that the evaluator gives them; None if it was not evaluated.
        training_minutes (float, optional): Processor time of its training;
            None if it is not known.
    """
    name: str
    flops: int
    params: int
    latency_ms: dict[str, float]
    metrics: dict[str, float] | None = None
    training_minutes: float | None = None


@dataclasses.dataclass(frozen=True)
class Report:
    """Result of an export.

    Args:
        name (str): Name of the config.
        target (float): Share of the resource that was to be kept.
        target_type (str): ``'flops'``, ``'params'`` or ``'latency'``.
        reached (float): Share of that resource that was kept.
        phases (list[float]): Shares of warm-up, pruning and settling.
        input_shape (list[int]): ``(N, C, H, W)`` at which FLOPs and latency
            are taken.
        networks (list[NetworkRow]): Dense, gated and pruned network.
        parts (list[Part]): Channels kept in each part of the network.
        dead (list[str]): Parts of which at most a constant is left.
        groups (list[GroupRow]): Channels kept in each group.
        max_rel_diff (float): Largest difference between the outputs of the
            gated and the pruned network, relative to the largest output.
        compared_on (str): Inputs on which they were compared.
        torch (str): Version of torch.
        gdp_mmseg (str): Version of this package.
        gates_picture (str, optional): File name of the picture of the gates.
        deployment (Deployment, optional): ONNX file and what it was measured
            by; None without one.
    """
    name: str
    target: float
    target_type: str
    reached: float
    phases: list[float]
    input_shape: list[int]
    networks: list[NetworkRow]
    parts: list[Part]
    dead: list[str]
    groups: list[GroupRow]
    max_rel_diff: float
    compared_on: str
    torch: str
    gdp_mmseg: str
    gates_picture: str | None = None
    deployment: Deployment | None = None

    def network(self, name: str) -> NetworkRow:
        """Return the row of a network by its name."""
        return next(row for row in self.networks if row.name == name)

    def with_metrics(
            self, metrics: Mapping[str, Mapping[str, float]
                                   | None]) -> Report:
        """Return a copy with the metrics of some networks, by name."""
        return dataclasses.replace(
            self,
            networks=[
                dataclasses.replace(row, metrics=dict(found)) if
                (found := metrics.get(row.name)) is not None else row
                for row in self.networks
            ])

    def with_training_minutes(self, minutes: Mapping[str, float]) -> Report:
        """Return a copy with the time of some trainings, by network."""
        return dataclasses.replace(
            self,
            networks=[
                dataclasses.replace(
                    row,
                    training_minutes=minutes.get(row.name,
                                                 row.training_minutes))
                for row in self.networks
            ])

    @property
    def metric(self) -> str | None:
        """Name of the metric that tables show; None without an evaluation."""
        names = [name for row in self.networks for name in row.metrics or ()]
        known = [name for name in _HEADLINES if name in names]
        return next(iter(known + names), None)

    def share(self, field: str) -> float:
        """Pruned network's ``'flops'`` or ``'params'`` over the dense one's.
        """
        pruned, dense = (
            getattr(self.network(name), field) for name in ('pruned', 'dense'))
        return float(pruned / dense)

    def latency_share(self) -> float:
        """Pruned network's latency over the dense one's, first runtime."""
        dense, pruned = (
            next(iter(self.network(name).latency_ms.values()))
            for name in ('dense', 'pruned'))
        return pruned / dense

    def shares(self) -> dict[str, float]:
        """Pruned network's FLOPs, parameters and latencies over the dense's.
        """
        dense, pruned = (self.network(name) for name in ('dense', 'pruned'))
        shares = dict(
            FLOPs=self.share('flops'), parameters=self.share('params'))
        for runtime, time in pruned.latency_ms.items():
            shares[f'latency, {runtime}'] = time / dense.latency_ms[runtime]
        return shares

    def write(self, path: Path) -> None:
        """Write the report as JSON: a complete file or none."""
        write_json(path, dataclasses.asdict(self))

    @classmethod
    def read(cls, path: Path) -> Report:
        """Read a report that :meth:`write` wrote."""
        return cls.parse(json.loads(path.read_text()))

    @classmethod
    def parse(cls, content: Mapping[str, Any]) -> Report:
        """Take a report from a mapping, which may have other keys too."""
        rows = dict(networks=NetworkRow, parts=Part, groups=GroupRow)
        fields = {
            field.name: content[field.name]
            for field in dataclasses.fields(cls) if field.name in content
        }
        for key, row in rows.items():
            fields[key] = [row(**one) for one in fields[key]]
        if fields.get('deployment') is not None:
            fields['deployment'] = Deployment.parse(fields['deployment'])
        return cls(**fields)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Format a markdown table; the first row is its head.

    The first column is aligned to the left, all others to the right.

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


def comparison(report: Report) -> str:
    """Table of the networks: metric, FLOPs, parameters and latencies.

    It has the time of the trainings, too, if the report knows one.
    """
    metric = report.metric
    runtimes = list(
        dict.fromkeys(runtime for row in report.networks
                      for runtime in row.latency_ms))

    most = max(row.flops for row in report.networks)
    unit, size = ('GFLOPs', 1e9) if most >= _LARGE else ('MFLOPs', 1e6)

    timed = any(row.training_minutes is not None for row in report.networks)

    def number(value: float | None, digits: int) -> str:
        return '-' if value is None else f'{value:.{digits}f}'

    def cells(row: NetworkRow) -> list[str]:
        return [
            row.name,
            number((row.metrics or {}).get(metric or ''), 2),
            number(row.flops / size, 2),
            number(row.params / 1e6, 2),
            *(number(row.latency_ms.get(runtime), 1) for runtime in runtimes),
            *([number(row.training_minutes, 2)] if timed else [])
        ]

    # A single runtime needs no name: the report's page tells it.
    headers = [
        'latency (ms)' if len(runtimes) == 1 else f'latency, {runtime} (ms)'
        for runtime in runtimes
    ] + ['training (CPU min)'] * timed
    return table(
        [['network', metric or 'metric', unit, 'params (M)', *headers],
         *map(cells, report.networks)])


def markdown(report: Report) -> str:
    """Format a report as a page for a reader."""
    _, channels, height, width = report.input_shape
    target = f' (target {report.target})'
    by_flops = report.target_type == 'flops'
    of_resource = [] if by_flops else [
        f'{_RESOURCES[report.target_type]}: {report.reached:.4f} of '
        f'the dense network\'s{target}.'
    ]
    picture = [] if report.gates_picture is None else [
        '![Openness of each group over the training, budget and held cost]'
        f'({report.gates_picture})', ''
    ]
    dead = ['No part was removed as a whole.'] if not report.dead else [
        'Removed parts, of which at most a constant is left:', '',
        *(f'- {part}' for part in report.dead)
    ]
    return '\n'.join([
        f'# {report.name}', '',
        comparison(report), '',
        f'FLOPs (multiply-adds of one {channels} x {height} x {width} input): '
        f'{report.share("flops"):.4f} of the dense network\'s'
        f'{target if by_flops else ""}.', *of_resource,
        'Largest difference between the outputs of the gated and the pruned '
        f'network, relative to the largest output: {report.max_rel_diff:.1e} '
        f'on {report.compared_on}.',
        'Latency: median of alternating runs of one forward pass, '
        f'{", ".join(report.networks[0].latency_ms)}, torch {report.torch}. '
        'Only the ratio can be compared with other machines.', '',
        *_deployed(report), '## Gates', '', *picture,
        table([['part', 'channels', 'kept', 'kept share'],
               *(_kept(row.name, row)
                 for row in report.parts)]), '', *dead, '', '## Groups', '',
        table([['group (written by)', 'channels', 'kept', 'kept share'],
               *(_kept(_writers(row), row) for row in report.groups)]), ''
    ])


def _deployed(report: Report) -> list[str]:
    """Section on the ONNX file, the shares, and the slowest layers."""
    deployment = report.deployment
    if deployment is None:
        return []
    whole = sum(row.pruned_ms for row in deployment.layers)
    rows = [[
        row.name, f'{row.pruned_ms / whole:.1%}',
        f'{row.pruned_ms / row.dense_ms:.2f}' if row.dense_ms else '-',
        '-' if row.work is None else f'{row.work:.2f}'
    ] for row in deployment.layers]
    return [
        '## Deployment', '',
        deployment.onnx.sentence(), '',
        f'![Pruned over dense network]({deployment.picture})', '',
        table([['quantity', 'pruned / dense'],
               *([name, f'{share:.3f}']
                 for name, share in report.shares().items())]), '',
        'Latency of one image, from the input to outputs of its size, '
        f'{deployment.threads} thread{"s" * (deployment.threads > 1)}. Where '
        'it fell less than the FLOPs, these layers of the pruned network tell '
        'why (measured one by one in PyTorch):', '',
        table([[
            'layers of the pruned network', 'share of its time',
            'time, pruned / dense', 'FLOPs, pruned / dense'
        ], *rows]), ''
    ]


def _kept(name: str, row: Part | GroupRow) -> list[str]:
    """Cells of a part or group: its channels, and those that were kept."""
    return [name, str(row.channels), str(row.kept), f'{kept_share(row):.0%}']


def _writers(row: GroupRow) -> str:
    """First writer of a group, and the number of the others."""
    more = len(row.writers) - 1
    return row.writers[0] + (f' and {more} more' if more else '')


def scalar_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Select the metrics that are single numbers.

    Evaluators may also return lists, tables and texts, e.g. of each class.
    """
    found = {}
    for name, value in metrics.items():
        try:
            found[name] = float(value)
        except (TypeError, ValueError):
            continue
    return found
