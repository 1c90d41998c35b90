"""Kill trainings and exports at random points: is anything lost, or wrong?

    OMP_NUM_THREADS=1 python benchmarks/faults.py \
        --report docs/reports/faults.json

Each training and each export is a process of its own, and SIGKILL ends it. A
killed training is resumed, and compared bit for bit with one that nothing
interrupted. Writes the report and, from it, the figures in
``docs/reliability.md``; a quarter of an hour on one core.
"""
from __future__ import annotations

import argparse
import builtins
import dataclasses
import functools
import json
import multiprocessing
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, Callable

import mmengine.hooks.checkpoint_hook
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner

# Imported once, before the forks; the config names it.
import gdp_mmseg.engine.hook  # noqa: F401
import gdp_mmseg.files
from gdp_mmseg.engine.checkpoint import read_checkpoint
from gdp_mmseg.export.export import export
from gdp_mmseg.export.networks import load_exported
from gdp_mmseg.files import write_json
from gdp_mmseg.pruner.schedule import Schedule
from gdp_mmseg.report.tables import table

from results import put_between
from small_models import PHASES, Run, config_of

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / 'docs' / 'reliability.md'
ITERATIONS = 60
SAVED_EVERY = 5
RUN = Run('DeepLabV3Plus-ResNet18', target=0.4, iterations=ITERATIONS)
NAME = 'faults'
FILES = {
    f'{NAME}_pruned.py', f'{NAME}_pruned.pth', 'gates.png', 'report.json',
    'report.md'
}


@dataclasses.dataclass(frozen=True)
class Kill:
    """When a process is killed.

    Args:
        when (str): ``'running'``, at any time; ``'saving'``, while it writes
            a file; ``'pointing'``, while it writes ``last_checkpoint``;
            ``'renamed'``, right after it renamed something.
        count (int): Rows of ``gates.jsonl``, files written, or renamed,
            before that.
        share (float): Of the iteration, or of the file's bytes; of an export
            that runs, of its time.
    """
    when: str
    count: int
    share: float


class Losses(Hook):
    """Writes the loss of each iteration."""

    def after_train_iter(self,
                         runner: Runner,
                         batch_idx: int,
                         data_batch: Any = None,
                         outputs: Any = None) -> None:
        """Append a row."""
        with open(Path(runner.work_dir) / 'losses.jsonl', 'a') as file:
            row = [runner.iter + 1, float(outputs['loss'])]
            file.write(json.dumps(row) + '\n')


def config(work_dir: Path, data: Path, resume: bool) -> Config:
    """A training that draws random numbers wherever one can."""
    cfg = config_of(RUN, data)
    dataset = cfg.train_dataloader.dataset
    dataset.pipeline.insert(3, dict(type='PhotoMetricDistortion'))
    held_out = dict(
        dataset,
        ann_file='ImageSets/Segmentation/val.txt',
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations'),
            dict(type='PackSegInputs')
        ])
    for split, loop in (('val', 'ValLoop'), ('test', 'TestLoop')):
        cfg[f'{split}_dataloader'] = dict(
            batch_size=1,
            num_workers=0,
            sampler=dict(type='DefaultSampler', shuffle=False),
            dataset=held_out)
        cfg[f'{split}_evaluator'] = dict(type='IoUMetric')
        cfg[f'{split}_cfg'] = dict(type=loop)
    cfg.train_cfg.val_interval = 2 * SAVED_EVERY
    cfg.default_hooks.checkpoint = dict(
        type='CheckpointHook',
        by_epoch=False,
        interval=SAVED_EVERY,
        max_keep_ckpts=1)
    cfg.default_hooks.gdp.interval = 1
    cfg.work_dir = str(work_dir)
    cfg.resume = resume
    return cfg


def train(work_dir: Path, data: Path, resume: bool, kill: Kill | None) -> None:
    """What the process of a training does."""
    arm(kill)
    runner = Runner.from_cfg(config(work_dir, data, resume))
    runner.register_hook(Losses())
    runner.train()


def prune(work_dir: Path, data: Path, checkpoint: Path,
          kill: Kill | None) -> None:
    """What the process of an export does."""
    arm(kill)
    export(
        config(work_dir, data, False), str(checkpoint), work_dir / 'pair',
        NAME)


def arm(kill: Kill | None) -> None:
    """Let this process kill itself in the middle of writing."""
    if kill is None or kill.when == 'running':
        return
    written = 0

    class HalfFile:
        """Writes a share of what it is given, and that is the last it does."""

        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: Any) -> None:
            pass

        def write(self, content: Any) -> None:
            self.file.write(content[:int(len(content) * kill.share)])
            self.file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    def open_(path: Any, mode: str = 'r', **options: Any) -> Any:
        nonlocal written
        file = builtins.open(path, mode, **options)
        written += 1
        return HalfFile(file) if written > kill.count else file

    def replace(*paths: Any) -> None:
        nonlocal written
        rename(*paths)
        written += 1
        if written > kill.count:
            os.kill(os.getpid(), signal.SIGKILL)

    if kill.when == 'renamed':
        rename, os.replace = os.replace, replace
        return
    module: Any = (
        gdp_mmseg.files
        if kill.when == 'saving' else mmengine.hooks.checkpoint_hook)
    module.open = open_


def run(work: Callable[[], None], log: Path, kill: Kill | None,
        until: Callable[[Kill], bool]) -> int:
    """Run something in a process and kill it.

    Args:
        work (Callable[[], None]): What it does.
        log (Path): Gets what it prints.
        kill (Kill, optional): When; if None, it runs to its end.
        until (Callable[[Kill], bool]): Asked, while it runs, whether it is
            time to kill it.

    Returns:
        int: Exit status, negative if a signal was the end.
    """

    def quietly() -> None:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (sys.stdout, sys.stderr):
            os.dup2(output, stream.fileno())
        work()

    # Forked, so that nothing is imported twice.
    process = multiprocessing.get_context('fork').Process(target=quietly)
    process.start()
    while kill is not None and kill.when == 'running' and process.is_alive():
        if until(kill):
            process.kill()
        time.sleep(1e-3)
    process.join()
    status = process.exitcode
    if status is None or status > 0:
        raise RuntimeError(f'a process ended with status {status}; see {log}')
    return status


def rows(work_dir: Path) -> int:
    """How far a training got, by its record."""
    path = work_dir / 'gates.jsonl'
    return path.read_bytes().count(b'\n') if path.exists() else 0


def training_kills(number: int, seed: int) -> list[list[Kill]]:
    """For each training when it is killed, one in three of them twice."""
    draw = random.Random(seed)
    kinds = ['running'] * 5 + ['saving'] * 3 + ['pointing']

    def one(when: str) -> Kill:
        last = (ITERATIONS if when == 'running' else ITERATIONS // SAVED_EVERY)
        # Files are mended too, so that a resumed one may write fewer.
        return Kill(when, draw.randrange(last - 1), draw.random())

    return [[
        one(kinds[(index + again) % len(kinds)])
        for again in range(1 + (index % 3 == 0))
    ] for index in range(number)]


def killed_training(kills: list[Kill], straight: Path, folder: Path,
                    data: Path, step: float) -> dict[str, Any]:
    """Train, be killed, resume to the end; compare.

    Args:
        kills (list[Kill]): One for each process but the last.
        straight (Path): Work folder of a training that was not interrupted.
        folder (Path): Work folder of this one.
        data (Path): Data set.
        step (float): Seconds of an iteration.
    """
    folder.mkdir()
    reached: float = 0

    def until(kill: Kill) -> bool:
        nonlocal reached
        if rows(folder) < kill.count:
            reached = time.monotonic()
        return (rows(folder) >= kill.count
                and time.monotonic() - reached >= kill.share * step)

    ends = []
    for index, kill in enumerate([*kills, None]):
        pointer = folder / 'last_checkpoint'
        start = pointer.read_text() if pointer.exists() else None
        status = run(
            functools.partial(train, folder, data, index > 0, kill),
            folder / 'log.txt', kill, until)
        if kill is not None:
            schedule = Schedule(PHASES)
            ends.append(
                dict(
                    when=kill.when,
                    killed=status == -signal.SIGKILL,
                    iteration=rows(folder),
                    phase=schedule.phase_at(rows(folder) / ITERATIONS)))
        elif start is not None:
            ends[-1]['pointer'] = Path(start).name
    return dict(ends=ends, **compare(straight, folder))


def compare(straight: Path, folder: Path) -> dict[str, bool]:
    """Bit for bit: what a training ended with."""
    one, other = (
        torch.load(
            path / f'iter_{ITERATIONS}.pth',
            map_location='cpu',
            weights_only=False) for path in (straight, folder))
    gates = [key for key in one['state_dict'] if key.startswith('gdp.')]

    def equal(first: Any, second: Any) -> bool:
        if isinstance(first, dict):
            return first.keys() == second.keys() and all(
                equal(first[key], second[key]) for key in first)
        if isinstance(first, (list, tuple)):
            return len(first) == len(second) and all(map(equal, first, second))
        if isinstance(first, torch.Tensor):
            return torch.equal(first, second)
        return bool(first == second)

    return dict(
        gates=len(gates) > 0 and all(
            torch.equal(one['state_dict'][key], other['state_dict'][key])
            for key in gates),
        weights=equal(one['state_dict'], other['state_dict']),
        optimizer=equal(one['optimizer'], other['optimizer']),
        random_numbers=equal(one['meta']['random_state'],
                             other['meta']['random_state']),
        losses=losses(straight) == losses(folder),
        record=(straight /
                'gates.jsonl').read_bytes() == (folder /
                                                'gates.jsonl').read_bytes(),
        nothing_else_left=sorted(path.name
                                 for path in folder.glob('*.pth*')) == sorted(
                                     path.name
                                     for path in straight.glob('*.pth*')))


def losses(folder: Path) -> dict[int, float]:
    """Of each iteration, as the last process that came to it had it."""
    lines = (folder / 'losses.jsonl').read_text().splitlines()
    return dict(map(json.loads, lines))


def killed_export(kill: Kill, folder: Path, data: Path, checkpoint: Path,
                  seconds: float) -> dict[str, Any]:
    """Export, be killed, look at what is there.

    If it ends before its time has come, it is done again, and killed sooner.

    Args:
        kill (Kill): When.
        folder (Path): Where to export to ``pair``.
        data (Path): Data set.
        checkpoint (Path): What is exported.
        seconds (float): How long an export takes.
    """
    start = time.monotonic()
    status = run(
        functools.partial(prune, folder, data, checkpoint,
                          kill), folder / 'log.txt', kill,
        lambda one: time.monotonic() - start >= one.share * seconds)
    out_dir = folder / 'pair'
    left = 'nothing'
    if out_dir.exists():
        left = 'complete' if is_complete(out_dir) else 'half a result'
        shutil.rmtree(out_dir)
    if status == 0:
        sooner = dataclasses.replace(kill, share=kill.share * 0.8)
        return killed_export(sooner, folder, data, checkpoint, seconds)
    return dict(
        when=kill.when,
        count=kill.count,
        seconds=time.monotonic() - start,
        left=left)


def is_complete(out_dir: Path) -> bool:
    """Whether a folder is a whole result, which loads and is verified."""
    if {path.name for path in out_dir.iterdir()} != FILES:
        return False
    report = json.loads((out_dir / 'report.json').read_text())
    # Both raise where they find something wrong.
    load_exported(out_dir, NAME)
    _, meta = read_checkpoint(str(out_dir / f'{NAME}_pruned.pth'))
    return 'sha256' in meta and report['max_rel_diff'] <= 1e-4


def export_kills(number: int, seed: int) -> list[Kill]:
    """Half of them at any time, the others when files come to be."""
    draw = random.Random(seed)
    kinds = ['running', 'saving', 'running', 'renamed']
    # Checkpoint and report are written; these and the folder are renamed.
    return [
        Kill(when, draw.randrange(3 if when == 'renamed' else 2),
             draw.random())
        for when in (kinds[index % len(kinds)] for index in range(number))
    ]


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Everything that the report holds."""
    data, straight = folder / 'data', folder / 'straight'
    straight.mkdir()
    start = time.monotonic()
    run(
        functools.partial(train, straight, data, False, None),
        straight / 'log.txt', None, lambda _: False)
    # An iteration, or more; a kill may come in any part of it.
    step = (time.monotonic() - start) / ITERATIONS
    trainings = []
    if args.only == 'exports':
        trainings = json.loads(args.report.read_text())['trainings']
    for index, kills in enumerate(
            training_kills(0 if trainings else args.kills, args.seed)):
        trainings.append(
            killed_training(kills, straight, folder / f'training{index}', data,
                            step))
        print(json.dumps(trainings[-1]), flush=True)
    checkpoint = straight / f'iter_{ITERATIONS}.pth'
    place = folder / 'exports'
    place.mkdir()

    def whole() -> float:
        start = time.monotonic()
        run(
            functools.partial(prune, place, data, checkpoint, None),
            place / 'log.txt', None, lambda _: False)
        return time.monotonic() - start

    seconds = whole()
    assert_complete(place)
    exports = []
    for kill in export_kills(args.kills, args.seed):
        exports.append(killed_export(kill, place, data, checkpoint, seconds))
        print(json.dumps(exports[-1]), flush=True)
    whole()
    assert_complete(place)
    return dict(
        trainings=trainings,
        exports=exports,
        left_by_killed_exports=len(list(place.glob('.*'))),
        export_seconds=seconds)


def assert_complete(place: Path) -> None:
    """An export that was not killed is complete; make room for the next."""
    if not is_complete(place / 'pair'):
        raise RuntimeError(f'expected a complete export in {place}')
    shutil.rmtree(place / 'pair')


def markdown(report: dict[str, Any]) -> str:
    """The report for a reader."""
    trainings, exports = report['trainings'], report['exports']
    checks = [key for key in trainings[0] if key != 'ends']
    ends = [end for one in trainings for end in one['ends'] if end['killed']]
    right = sum(all(one[key] for key in checks) for one in trainings)
    kept = sum(one['left'] != 'half a result' for one in exports)
    cells = [['', 'warm-up', 'pruning', 'settling']]
    for when, what in (('running', 'at any time of an iteration'),
                       ('saving', 'while writing a checkpoint'),
                       ('pointing', 'while writing `last_checkpoint`')):
        phases = Counter(end['phase'] for end in ends if end['when'] == when)
        cells.append([
            what, *(str(phases[phase])
                    for phase in ('warmup', 'pruning', 'settling'))
        ])
    lefts = Counter(one['left'] for one in exports)
    return '\n'.join([
        f'{right} of {len(trainings)} killed trainings end as the one that '
        'nothing interrupted, bit for bit: gates, weights, optimizer, random '
        'numbers, the loss of every iteration, `gates.jsonl`. Kills, '
        f'{len(ends)} in all, by phase:', '',
        table(cells), '',
        f'{kept} of {len(exports)} killed exports leave nothing '
        f'({lefts["nothing"]}) or a complete result ({lefts["complete"]}) '
        'that loads, with the right checksum: killed at any time, while '
        'writing a file, or right after renaming one. After the last, '
        'one that was not killed left '
        f'{report["left_by_killed_exports"]} temporary folders of all the '
        'others.', '',
        f'{report["model"]}, {report["iterations"]} iterations of batch '
        f'{report["batch_size"]} with dropout, random flips and colours, a '
        f'checkpoint every {SAVED_EVERY} (`max_keep_ckpts=1`), validation '
        f'every {2 * SAVED_EVERY}; SIGKILL, seed {report["seed"]}. '
        f'{report["machine"]}, torch {report["torch"]}. Report: '
        '`reports/faults.json`, by `python benchmarks/faults.py --report '
        'docs/reports/faults.json`.'
    ])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('--report', type=Path, required=True)
    parser.add_argument('--kills', type=int, default=25, help='of each kind')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument(
        '--only', choices=['exports'], help='keep the rest of the report')
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        cfg = config_of(RUN, Path(folder) / 'data')
        report = dict(
            model=RUN.model,
            iterations=ITERATIONS,
            batch_size=cfg.train_dataloader.batch_size,
            seed=args.seed,
            machine=f'{platform.machine()}, 1 of {os.cpu_count()} CPU cores',
            torch=torch.__version__,
            **measure(args, Path(folder)))
    args.report.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.report, report)
    print(markdown(report))
    if args.report.resolve() == ROOT / 'docs' / 'reports' / 'faults.json':
        put_between(PAGE, 'faults', markdown(report))


if __name__ == '__main__':
    main()
