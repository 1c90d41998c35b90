"""GDP and its alternatives at the same cost, training time, data and seeds.

Each run is one training with a folder of its own for log and ``result.json``;
all runs have the same number of iterations. A run is skipped if its row exists
there or in the report, so a report can be completed on another machine. Each
row names the machine and the versions with which it ran:

    python benchmarks/accuracy.py camvid --data-root .../camvid \
        --weights .../resnet18.pth --iterations 800 \
        --report docs/reports/accuracy_camvid_800.json

The alternatives prune at the iteration at which the gates begin to close, and
train on for the rest (see ``one_shot.py``); ``narrow`` prunes before the first
iteration.

All runs start from one dense training (the run ``start``) and prune it, except
``narrow``: that run starts from the pretrained backbone and trains as long as
the start and another run together.
"""
from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Iterator
from unittest import mock

import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner

from gdp_mmseg.engine.forwards import inference_forward
from gdp_mmseg.export.export import export
from gdp_mmseg.files import write_json
from gdp_mmseg.pruner.pruner import Pruner
from gdp_mmseg.report.measure import count_flops, count_parameters
from gdp_mmseg.report.precision import precision_of_training
from gdp_mmseg.report.record import last_metrics

from accuracy_configs import (GATED, PHASES, START_RUN, config_of, folder_of,
                              start_checkpoint, task_of, teacher_checkpoint)
from accuracy_tasks import HELD, TASKS, Task
from accuracy_variants import CHANGES

USUAL = ('dense', 'gdp', 'narrow', 'random', 'l1', 'slimming')
# Only on request: not every target can be met in the head alone, nor with one
# threshold that must leave channels in every layer.
OPTIONAL = ('l1_head', 'slimming_global')
ITERATIONS = 1600
DECAY = dict(PolyLR='polynomial', CosineAnnealingLR='cosine')


def parse_args() -> argparse.Namespace:
    """Parse the flags of the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('data', choices=TASKS)
    parser.add_argument('--data-root', type=Path, required=True)
    parser.add_argument(
        '--weights', type=Path, required=True, help='file of the backbone')
    parser.add_argument(
        '--work-dir', type=Path, default=Path('work_dirs/accuracy'))
    parser.add_argument(
        '--methods',
        nargs='+',
        default=USUAL,
        type=_method,
        help=f'of {list(dict.fromkeys([*USUAL, *OPTIONAL, *GATED]))}, and for '
        f'dense and gates with changes of {list(CHANGES)}, as in gdp+ema')
    parser.add_argument(
        '--targets', nargs='+', type=float, default=[0.4, 0.25, 0.5])
    parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2])
    parser.add_argument('--iterations', type=int, default=ITERATIONS)
    parser.add_argument(
        '--start',
        type=int,
        help='length of the dense training that all runs start from, in '
        'iterations; by default that of the data set')
    parser.add_argument(
        '--lr',
        type=float,
        help='learning rate after the start; by default that of the data set')
    parser.add_argument(
        '--hold',
        type=float,
        help='share of the training after the start that keeps its learning '
        'rate, which then falls linearly; by default that of the data set')
    parser.add_argument(
        '--tune',
        action='store_true',
        help='train on three quarters of the training images and evaluate on '
        'the rest, to choose settings on them')
    parser.add_argument(
        '--jobs', type=int, default=1, help='runs at the same time')
    parser.add_argument(
        '--report', type=Path, required=True, help='file for all rows')
    parser.add_argument(
        '--one', help=argparse.SUPPRESS)  # name of a run for this process
    args = parser.parse_args()
    task = task_of(args)
    args.start = args.start or task.start
    args.lr = args.lr or task.lr_after_start
    args.hold = task.hold if args.hold is None else args.hold
    return args


def _method(text: str) -> str:
    """Check the name of a method with its changes, if it has any."""
    base, *changes = text.split('+')
    known = [*USUAL, *OPTIONAL, *GATED]
    if base not in known or not {*changes} <= {*CHANGES}:
        raise argparse.ArgumentTypeError(
            f'expected one of {list(dict.fromkeys(known))}, with changes of '
            f'{list(CHANGES)}, as in gdp+ema, but got {text!r}')
    return text


def plan(args: argparse.Namespace) -> Iterator[str]:
    """Yield the names of the runs, ``method-target-seed``, seed by seed."""
    for seed, target, method in itertools.product(args.seeds, args.targets,
                                                  args.methods):
        if not method.startswith('dense'):
            yield f'{method}-{target}-{seed}'
        elif target == args.targets[0]:
            yield f'{method}-1.0-{seed}'


def _can_start(args: argparse.Namespace, name: str) -> bool:
    """Tell whether a run has what it needs of other runs."""
    method, _, seed = name.split('-')
    return not any(CHANGES[change].teacher
                   for change in method.split('+')[1:]) or teacher_checkpoint(
                       args, int(seed)).exists()


def run(args: argparse.Namespace, name: str, folder: Path) -> dict[str, Any]:
    """Train, prune and evaluate one run; return its row.

    ``score`` of the row is None if the method cannot meet the target.
    """
    method, target, seed = name.split('-')
    task = task_of(args)
    cfg = config_of(args, method, float(target), int(seed))
    iterations = cfg.train_cfg.max_iters
    cfg.work_dir = str(folder / 'training')
    init_default_scope(task.scope)
    start = time.time()
    runner = Runner.from_cfg(cfg)
    # The same sums in a quarter less time on CPUs.
    runner.model.to(memory_format=torch.channels_last)
    shape = (1, 3, *cfg.crop_size)
    dense_flops = count_flops(runner.model, shape, inference_forward)
    refusal: tuple[type[Exception], ...] = ()
    base = method.split('+')[0]
    if base not in ('start', 'dense', *GATED):
        from one_shot import OutOfReach, PruneOnce
        refusal = (OutOfReach, )
        begin = 0 if method == 'narrow' else round(PHASES[0] * args.iterations)
        runner.register_hook(
            PruneOnce(method, float(target), begin, shape, int(seed),
                      task.whole))
    plain = (
        mock.patch.object(Pruner, '_scarcity', lambda *_: 1.)
        if base == 'gdp_plain' else contextlib.nullcontext())
    row = dict(
        method=method,
        target=float(target),
        seed=int(seed),
        iterations=iterations,
        start_score=(score_of(task,
                              start_checkpoint(args).parent)
                     if cfg.load_from else None),
        **place())
    try:
        with plain:
            runner.train()
    except refusal as error:
        print(error)
        return dict(row, score=None)
    row.update(minutes=(time.time() - start) / 60)
    if base in GATED:
        report = export(cfg, str(folder / f'training/iter_{iterations}.pth'),
                        folder / 'pair', 'gdp')
        g = runner.model.gdp.gates.openness()
        return dict(
            row,
            macs=report.share('flops'),
            params=report.share('params'),
            score=(report.network('pruned').metrics or {})[task.metric],
            score_gated=(report.network('gated').metrics or {})[task.metric],
            max_rel_diff=report.max_rel_diff,
            half_open=float(((g > 0.01) & (g < 0.5)).float().mean()),
            groups=[dataclasses.asdict(row) for row in report.groups])
    dense_params = count_parameters(Runner.build_model(runner, cfg.model))
    return dict(
        row,
        score=score_of(task, folder / 'training'),
        macs=count_flops(runner.model, shape, inference_forward) / dense_flops,
        params=count_parameters(runner.model) / dense_params)


def score_of(task: Task, work_dir: Path) -> float:
    """Return the score of the last evaluation in a work folder."""
    return last_metrics(work_dir, [task.metric])[task.metric]


def run_apart(name: str, folder: Path) -> subprocess.Popen[bytes]:
    """Start one run in a process of its own that writes a log."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / 'log.txt', 'w') as log:
        return subprocess.Popen(
            [sys.executable, '-W', 'ignore', *sys.argv, '--one', name],
            stdout=log,
            stderr=subprocess.STDOUT)


def conditions(args: argparse.Namespace) -> dict[str, Any]:
    """Return the conditions that all runs of a report share."""
    task = task_of(args)
    cfg = config_of(args, 'dense', 1., 0)
    optimizer = cfg.optim_wrapper.optimizer
    return dict(
        title=f'{task.title}: GDP and the alternatives, {args.iterations} '
        'iterations',
        data=args.data,
        metric=task.metric_name,
        weights=task.weights,
        weights_sha256=hashlib.sha256(args.weights.read_bytes()).hexdigest(),
        train='three quarters of: ' * args.tune + task.train,
        test='the other quarter of these images' if args.tune else task.test,
        notes=list((HELD, ) if args.hold else task.notes),
        start=args.start,
        iterations=args.iterations,
        flags=_unusual_flags(args),
        batch_size=cfg.train_dataloader.batch_size,
        crop=list(cfg.crop_size),
        optimizer=f'{optimizer.type}, lr {optimizer.lr:g} '
        f'(start: {lr_of_start(args)}), '
        f'{_decay(args, cfg)} decay',
        phases=list(PHASES),
        **place())


def _unusual_flags(args: argparse.Namespace) -> str:
    """Return the flags that differ from what the data set has by itself."""
    task = task_of(args)
    usual = dict(start=task.start, lr=task.lr_after_start, hold=task.hold)
    flags = [
        f' --{name} {getattr(args, name):g}' for name, value in usual.items()
        if getattr(args, name) != value
    ]
    return ''.join(flags + [' --tune'] * args.tune)


def _decay(args: argparse.Namespace, cfg: Config) -> str:
    """Describe how the learning rate falls."""
    if args.hold:
        return f'held for {args.hold:g} of the training, then linear'
    return DECAY[cfg.param_scheduler[0].type]


def place() -> dict[str, str]:
    """Return conditions that may differ between the rows of a report."""
    machine = f'{platform.machine()}, one of {os.cpu_count()} CPU cores'
    if torch.cuda.is_available():
        machine = torch.cuda.get_device_name()
    try:
        torch_pruning = version('torch_pruning')
    except PackageNotFoundError:  # only the alternatives need it
        torch_pruning = ''
    return dict(
        machine=machine,
        torch=torch.__version__,
        torch_pruning=torch_pruning,
        precision=precision_of_training())


def lr_of_start(args: argparse.Namespace) -> str:
    """Return the learning rate of the start as text, and its backbone's."""
    wrapper = config_of(args, 'start', 1., 0).optim_wrapper
    lr = wrapper.optimizer.lr
    keys = wrapper.get('paramwise_cfg', {}).get('custom_keys', {})
    if 'backbone' not in keys:
        return f'{lr:g}'
    return f'{lr:g}, backbone {lr * keys.backbone.lr_mult:g}'


def known_rows(report: Path, shared: dict[str, Any]) -> dict[str, Any]:
    """Return the rows of an earlier report by the names of their runs.

    A row that does not say where it ran, ran where its report was made.

    Raises:
        SystemExit: If that report was made under other conditions.
    """
    if not report.exists():
        return {}
    content = json.loads(report.read_text())
    rows = content.pop('rows')
    for key, value in shared.items():
        if content.get(key, value) != value and key not in place():
            sys.exit(f'--report: expected {key} {value!r} as in this run, but '
                     f'{report} has {content[key]!r}; choose another file')
    made = {key: content[key] for key in place()}
    known: dict[str, Any] = {}
    for row in rows:
        name = name_of(row)
        if name in known:  # from another start
            name += f' from {row.get("start_score")}'
        known[name] = dict(made, **row)
    return known


def name_of(row: dict[str, Any]) -> str:
    """Return the name of the run of a row."""
    return f'{row["method"]}-{row["target"]}-{row["seed"]}'


def main() -> None:
    """Run all that is missing, and write the report after each run."""
    args = parse_args()
    if args.one:
        folder = folder_of(args, args.one)
        write_json(folder / 'result.json', run(args, args.one, folder))
        return
    shared = conditions(args)
    rows = known_rows(args.report, shared)

    def collect() -> None:
        for name in [START_RUN, *plan(args)]:
            path = folder_of(args, name) / 'result.json'
            if name not in rows and path.exists():
                rows[name] = dict(place(), **json.loads(path.read_text()))
        write_json(args.report,
                   dict(shared, rows=[rows[name] for name in sorted(rows)]))

    if not start_checkpoint(args).exists():
        folder = folder_of(args, START_RUN)
        if run_apart(START_RUN, folder).wait():
            sys.exit('expected the dense start to train, but it failed; read '
                     f'{folder / "log.txt"}')
    collect()
    waiting = [name for name in plan(args) if name not in rows]
    for name in waiting:
        dense = f'dense-1.0-{name.split("-")[2]}'
        if not _can_start(args, name) and dense not in waiting:
            sys.exit(f'--methods: expected dense with {name}, because it '
                     'distils from it; add dense')
    running: dict[str, subprocess.Popen[bytes]] = {}
    failed = []
    while waiting or running:
        ready = [name for name in waiting if _can_start(args, name)]
        for name in ready[:args.jobs - len(running)]:
            waiting.remove(name)
            print(f'{time.strftime("%H:%M")} {name}', flush=True)
            running[name] = run_apart(name, folder_of(args, name))
        time.sleep(2)
        for name, process in list(running.items()):
            if process.poll() is not None:
                del running[name]
                if process.returncode:
                    failed.append(str(folder_of(args, name) / 'log.txt'))
                collect()
    if failed:
        sys.exit('expected all runs to succeed, but got failed ones; read '
                 f'{", ".join(failed)}')


if __name__ == '__main__':
    main()
