"""Speed and memory of training, analysis and export.

    python benchmarks/speed.py --report docs/reports/speed.json

Writes the report and, from it, ``docs/speed.md``. Times are process times of
one thread. A ratio is measured in several processes of its own, in which dense
and gated steps alternate, and take turns in being the first. Peak memory is
the median of several fresh processes for each network.
"""
from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import whole_run
import widths
from step_models import CONFIGS, ROOT, build, load, optimizer_of, outputs_of
from torch import nn

from gdp_mmseg.engine.config import ModelConfig
from gdp_mmseg.engine.matching import gate_meta
from gdp_mmseg.engine.model import analyse_config
from gdp_mmseg.export.export import export
from gdp_mmseg.files import write_json
from gdp_mmseg.gates import METHODS
from gdp_mmseg.pruner.schedule import Schedule
from gdp_mmseg.report.tables import table

# Pairs of steps of each network for one of the first network.
PAIRS = {'DeepLabV3Plus-ResNet50': 1, 'DeepLabV3Plus-MobileNetV2': 12}
# Length of the training that the steps are a part of, in iterations; that of
# the VOC config.
TRAINING = 20000
# Processes of which the median of the peak memory is taken.
PEAKS = 3
# Processes for the training steps of each network.
PROCESSES = 8
# Settings of glibc for training steps: freed memory stays with the process.
# How much goes back to the system and is fetched again differs from step to
# step, by more than the gates cost.
KEPT_MEMORY = {
    f'MALLOC_{name}_': str(2**32)
    for name in ('TRIM_THRESHOLD', 'MMAP_THRESHOLD')
}
# Quantity, its key in the report, our goal, the unit of both.
ROWS = (
    ('build and group analysis at 512 x 512', 'analysis_s', 5, ' s'),
    ('gated / dense training step, peak memory of the process', 'memory_ratio',
     1.05, ''),
    ('export without evaluation', 'export_s', 15, ' s'),
)
# Goal for the time of a training step over that of a dense one, by gate.
GOALS = dict(gdp=1.02, trainable=1.05, scp=1.05)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: int,
         size: int, iteration: int) -> float:
    """Return the seconds of one training step, including the gates' step."""
    inputs = torch.randn(batch, 3, size, size)
    start = time.process_time()
    optimizer.zero_grad()
    sum(output.square().mean()
        for output in outputs_of(model, inputs)).backward()
    pruner: Any = getattr(model, 'gdp', None)
    if pruner is not None:
        # The step does most work in the pruning phase.
        begin = pruner.schedule.phases[0] + 0.1
        pruner.step_(begin + iteration / TRAINING, TRAINING)
    optimizer.step()
    return time.process_time() - start


def step_seconds(config: Path, batch: int, size: int, rounds: int, gate: str,
                 gated_first: bool) -> list[list[float]]:
    """Return the seconds of a dense and of a gated step, by round.

    Where gates rest in some steps, a round has as many that a share of them
    does, and the mean of their seconds.
    """
    models: dict[bool, Any] = {
        gated: build(gated, gate, config)
        for gated in (gated_first, not gated_first)
    }
    optimizers = {
        gated: optimizer_of(model)
        for gated, model in models.items()
    }
    period = models[True].gdp.schedule.period(TRAINING)
    found = []
    for index in range(rounds * period + 2):
        seconds = [0., 0.]
        for gated in (False, True) if index % 2 else (True, False):
            seconds[gated] = step(models[gated], optimizers[gated], batch,
                                  size, index)
        found.append(seconds)
    found = found[2:]
    return [[
        statistics.mean(seconds)
        for seconds in zip(*found[begin:begin + period])
    ] for begin in range(0, len(found), period)]


def measure_steps(gate: str, batch: int, size: int,
                  rounds: int) -> dict[str, list[list[float]]]:
    """Return :func:`step_seconds` of all networks, of the first if not GDP.

    Each is measured in processes of its own, because the memory that another
    network has left in pieces would make its steps slower. They are several,
    because where a network lies in memory makes its steps slower or faster by
    some percent, in all of a process.
    """
    measured = [*PAIRS.items()][:len(PAIRS) if gate == 'gdp' else 1]
    found: dict[str, list[list[float]]] = {}
    for network, share in measured:
        flags = ('--steps', network, '--gate', gate, '--batch', batch,
                 '--size', size, '--rounds', max(rounds * share // PROCESSES,
                                                 1))
        found[network] = []
        for process in range(PROCESSES):
            found[network] += json.loads(
                in_fresh_process(*flags, '--gated-first', process % 2,
                                 **KEPT_MEMORY))
    return found


def in_fresh_process(*flags: object, **environment: str) -> str:
    """Return what this file prints last in a process of its own."""
    command = [sys.executable, '-W', 'ignore', __file__, *map(str, flags)]
    done = subprocess.run(
        command,
        check=True,
        text=True,
        stdout=subprocess.PIPE,
        env=os.environ | environment)
    return done.stdout.splitlines()[-1]


def peak_memory(gated: bool, batch: int, size: int) -> int:
    """Return the peak memory of two steps in this process, in kilobytes."""
    model = build(gated)
    optimizer = optimizer_of(model)
    for index in range(2):
        step(model, optimizer, batch, size, index)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def memory(batch: int, size: int) -> dict[str, Any]:
    """Return the peak memory of dense and gated steps, and their ratio.

    Each is a median: how much freed memory a process keeps differs by a tenth
    from one to the next.
    """
    dense, gated = (
        statistics.median_low(
            int(
                in_fresh_process('--peak', int(one), '--batch', batch,
                                 '--size', size)) for _ in range(PEAKS))
        for one in (False, True))
    return dict(memory_kb=[dense, gated], memory_ratio=gated / dense)


def export_seconds() -> float:
    """Return the seconds of an export of an untrained gated network."""
    cfg = load()
    model: Any = build(True)
    gates = model.gdp.gates
    with torch.no_grad():
        gates.theta.mul_(torch.rand(len(gates.theta)) > 0.5)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / 'gated.pth'
        meta = dict(gdp=gate_meta(model.gdp))
        torch.save(dict(state_dict=model.state_dict(), meta=meta), checkpoint)
        start = time.process_time()
        export(
            cfg,
            str(checkpoint),
            Path(folder) / 'out',
            'speed',
            evaluate=False,
            progress=lambda line: None)
        return time.process_time() - start


def analysis_seconds() -> float:
    """Return the seconds of an analysis of the VOC config."""
    cfg = load()
    start = time.process_time()
    analyse_config(ModelConfig.of(cfg))
    return time.process_time() - start


def markdown(report: dict[str, Any]) -> str:
    """Return the page of a report."""
    rows = [['DeepLabV3Plus-ResNet50', 'measured', 'goal']]
    for name, key, goal, unit in ROWS:
        missed = ', missed' if report[key] > goal else ''
        rows.append([
            name, f'{report[key]:#.3g}{unit}', f'at most {goal}{unit}{missed}'
        ])
    size = f'{report["size"]} x {report["size"]}'
    period = Schedule(rests=True).period(TRAINING)
    return '\n'.join([
        '# Speed and memory', '',
        'Generated by `python benchmarks/speed.py --report '
        'docs/reports/speed.json`; the training steps of each gate were '
        'measured anew with `--gate GATE`.', '',
        table(rows), '',
        table(_step_rows(report['steps'])), '',
        f'Training steps: batch {report["batch"]} of {size}, float32, '
        'without loading of data, gates in the pruning phase; medians over '
        'pairs of a dense and a gated step in several processes for each '
        'row, with the quartiles in brackets. The steps are those of a '
        f'training of {TRAINING:,} iterations, in which the gates of GDP move '
        f'in one of {period} steps and rest in between: a pair of GDP is the '
        f'mean of {period} steps of each network. glibc was told to keep '
        'freed memory, whose return to the system takes a random part of a '
        'step. The difference is what gates cost in each step; it hardly '
        'depends on the size of the images. Times are process times of one '
        'thread.', '',
        whole_run.markdown(report['whole']), '',
        widths.markdown(report['widths']), '',
        f'{report["machine"]}, torch {report["torch"]}.', ''
    ])


def _step_rows(
        steps: dict[str, dict[str, list[list[float]]]]) -> list[list[str]]:
    """Rows of the table of training steps, by network and gate method."""
    rows = [[
        'training step', 'gate', 'pairs', 'gated / dense', 'goal', 'difference'
    ]]
    for network, by_gate in steps.items():
        for gate, pairs in by_gate.items():
            ratios = [gated / dense for dense, gated in pairs]
            missed = statistics.median(ratios) > GOALS[gate]
            rows.append([
                network, gate,
                str(len(pairs)),
                _spread(ratios, '.3f'),
                f'at most {GOALS[gate]}{", missed" * missed}',
                _spread([1e3 * (gated - dense)
                         for dense, gated in pairs], '.0f') + ' ms'
            ])
    return rows


def _spread(values: list[float], form: str) -> str:
    """Median and quartiles as text."""
    low, middle, high = (
        format(value, form) for value in statistics.quantiles(values))
    return f'{middle} ({low} to {high})'


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measure all but other gate methods; return the report."""
    # Measured first: on Linux, a process starts with the peak of its parent.
    whole = whole_run.measure(args.whole_size, args.iterations,
                              args.whole_rounds)
    peaks = memory(args.batch, args.size)
    steps = measure_steps('gdp', args.batch, args.size, args.rounds)
    return dict(
        whole=whole,
        analysis_s=analysis_seconds(),
        steps={
            network: dict(gdp=pairs)
            for network, pairs in steps.items()
        },
        **peaks,
        export_s=export_seconds(),
        widths=widths.measure(args.width_rounds),
        batch=args.batch,
        size=args.size,
        torch=torch.__version__,
        machine=f'{platform.machine()}, {os.cpu_count()} CPU cores')


def parse_args() -> argparse.Namespace:
    """Parse the flags of the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('--report', type=Path)
    parser.add_argument('--batch', type=int, default=2)
    parser.add_argument('--size', type=int, default=256)
    parser.add_argument(
        '--rounds',
        type=int,
        default=2 * PROCESSES,
        help='pairs of training steps of the first network')
    parser.add_argument(
        '--whole-size',
        type=int,
        default=192,
        help='size of the images of whole trainings')
    parser.add_argument(
        '--iterations', type=int, default=40, help='length of whole trainings')
    parser.add_argument(
        '--whole-rounds', type=int, default=3, help='number of them')
    parser.add_argument(
        '--gate',
        choices=METHODS,
        help='measure only the training step with this gate method, and put '
        'it into the report')
    parser.add_argument(
        '--width-rounds',
        type=int,
        default=7,
        help='training steps of each network of other widths')
    parser.add_argument(
        '--only',
        choices=('memory', 'widths'),
        help='measure only the peak memory of training steps, or their time '
        'at other widths, and put it into the report')
    parser.add_argument('--peak', type=int, help=argparse.SUPPRESS)
    parser.add_argument('--steps', help=argparse.SUPPRESS)
    parser.add_argument('--gated-first', type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.report is None and args.peak is None and args.steps is None:
        parser.error('the following arguments are required: --report')
    return args


def main() -> None:
    """Measure, write the report and, from it, the page."""
    args = parse_args()
    torch.set_num_threads(1)
    if args.peak is not None:
        print(peak_memory(bool(args.peak), args.batch, args.size))
        return
    if args.steps is not None:
        pairs = step_seconds(CONFIGS[args.steps], args.batch, args.size,
                             args.rounds, args.gate, bool(args.gated_first))
        print(json.dumps(pairs))
        return
    if not args.only and not args.gate:
        args.report.parent.mkdir(parents=True, exist_ok=True)
        write_(args.report, measure(args))
        return
    report = json.loads(args.report.read_text())
    if args.only == 'memory':
        report.update(memory(report['batch'], report['size']))
    if args.only == 'widths':
        report['widths'] = widths.measure(args.width_rounds)
    if args.gate:
        steps = measure_steps(args.gate, report['batch'], report['size'],
                              args.rounds)
        for network, pairs in steps.items():
            report['steps'][network][args.gate] = pairs
    write_(args.report, report)


def write_(path: Path, report: dict[str, Any]) -> None:
    """Write the report and, from it, the page."""
    write_json(path, report)
    (ROOT / 'docs' / 'speed.md').write_text(
        markdown(json.loads(path.read_text())))


if __name__ == '__main__':
    main()
