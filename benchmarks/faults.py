"""Trainings and exports killed at random points, and what is left of them.

    OMP_NUM_THREADS=1 python benchmarks/faults.py \
        --report docs/reports/faults.json

Each training and each export is a process of its own, and SIGKILL ends it. A
killed training is resumed and compared bit for bit with an uninterrupted one.
Writes the report and, from it, figures in ``docs/reliability.md``, in 15 min.
"""
from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import platform
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from faults_report import markdown
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner

# Imported once, before the forks; the config names it.
import gdp_mmseg.engine.hook  # noqa: F401
from gdp_mmseg.engine.checkpoint import read_checkpoint
from gdp_mmseg.export.export import export
from gdp_mmseg.export.networks import load_exported
from gdp_mmseg.files import write_json
from gdp_mmseg.pruner.schedule import Schedule
from gdp_mmseg.report.tables import Report

from kills import Kill, arm_, export_kills, run, training_kills
from pages import put_between
from small_models import PHASES, Run, add_gate_option, config_of

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


class Losses(Hook):
    """Hook that records losses and sizes of a model in ``losses.jsonl``."""

    def after_train_iter(self,
                         runner: Runner,
                         batch_idx: int,
                         data_batch: Any = None,
                         outputs: Any = None) -> None:
        """Append the iteration, its loss and the number of parameters."""
        size = sum(one.numel() for one in runner.model.parameters())
        with open(Path(runner.work_dir) / 'losses.jsonl', 'a') as file:
            row = [runner.iter + 1, float(outputs['loss']), size]
            file.write(json.dumps(row) + '\n')


def config(work_dir: Path, data: Path, resume: bool) -> Config:
    """Return a training that uses every source of random numbers."""
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
    """Train in this process, which a kill may end."""
    arm_(kill)
    runner = Runner.from_cfg(config(work_dir, data, resume))
    runner.register_hook(Losses())
    runner.train()


def prune(work_dir: Path, data: Path, checkpoint: Path,
          kill: Kill | None) -> None:
    """Export in this process, which a kill may end."""
    arm_(kill)
    export(
        config(work_dir, data, False), str(checkpoint), work_dir / 'pair',
        NAME)


def rows(work_dir: Path) -> int:
    """Return the number of rows of a training's record, its iterations."""
    path = work_dir / 'gates.jsonl'
    # The first line names the groups.
    return path.read_bytes().count(b'\n') - 1 if path.exists() else 0


def killed_training(kills: list[Kill], straight: Path, folder: Path,
                    data: Path, step: float) -> dict[str, Any]:
    """Train, kill, resume until the end, and compare.

    Args:
        kills (list[Kill]): Kills of the processes, one each; one more process
            runs to the end.
        straight (Path): Work folder of the uninterrupted training.
        folder (Path): Work folder of this training.
        data (Path): Folder of the data set.
        step (float): Duration of an iteration in seconds.
    """
    folder.mkdir()
    reached: float = 0

    def is_time(kill: Kill) -> bool:
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
            folder / 'log.txt', kill, is_time)
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
    """Compare the ends of two trainings bit for bit, one result per item."""
    one, other = (
        torch.load(
            path / f'iter_{ITERATIONS}.pth',
            map_location='cpu',
            weights_only=False) for path in (straight, folder))
    gates = [key for key in one['state_dict'] if key.startswith('gdp.')]
    checkpoints = [
        sorted(path.name for path in place.glob('*.pth*'))
        for place in (straight, folder)
    ]
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
        nothing_else_left=checkpoints[0] == checkpoints[1])


def equal(first: Any, second: Any) -> bool:
    """Compare nested dicts and sequences with tensors in them."""
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(
            equal(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(equal, first, second))
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    return bool(first == second)


def losses(folder: Path) -> dict[int, list[float]]:
    """Return loss and size at each iteration, as the last process had them."""
    lines = (folder / 'losses.jsonl').read_text().splitlines()
    return {row[0]: row[1:] for row in map(json.loads, lines)}


def narrowed(folder: Path) -> int:
    """Return how often channels left a training."""
    return len({size for _, size in losses(folder).values()}) - 1


def killed_export(kill: Kill, folder: Path, data: Path, checkpoint: Path,
                  seconds: float) -> dict[str, Any]:
    """Export, kill, and look at what is left.

    An export that ends before its kill is repeated with an earlier kill.

    Args:
        kill (Kill): Moment of the kill.
        folder (Path): Folder that gets the export as ``pair``.
        data (Path): Folder of the data set.
        checkpoint (Path): Gated checkpoint.
        seconds (float): Duration of an export.
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
    """Tell whether a folder is a whole export, which loads and is verified."""
    if {path.name for path in out_dir.iterdir()} != FILES:
        return False
    report = Report.read(out_dir / 'report.json')
    # Both raise an error for damaged files.
    load_exported(out_dir, NAME)
    _, meta = read_checkpoint(str(out_dir / f'{NAME}_pruned.pth'))
    return 'sha256' in meta and report.max_rel_diff <= 1e-4


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return the measured part of the report."""
    data, straight = folder / 'data', folder / 'straight'
    straight.mkdir()
    start = time.monotonic()
    run(
        functools.partial(train, straight, data, False, None),
        straight / 'log.txt')
    # At least the duration of an iteration: a kill may hit any part of it.
    step = (time.monotonic() - start) / ITERATIONS
    trainings = []
    if args.only == 'exports':
        trainings = json.loads(args.report.read_text())['trainings']
    for index, kills in enumerate(
            training_kills(0 if trainings else args.kills, args.seed,
                           ITERATIONS, SAVED_EVERY)):
        trainings.append(
            killed_training(kills, straight, folder / f'training{index}', data,
                            step))
        print(json.dumps(trainings[-1]), flush=True)
    checkpoint = straight / f'iter_{ITERATIONS}.pth'
    return dict(
        narrowed=narrowed(straight),
        trainings=trainings,
        **measure_exports(args, folder / 'exports', data, checkpoint))


def measure_exports(args: argparse.Namespace, place: Path, data: Path,
                    checkpoint: Path) -> dict[str, Any]:
    """Return the part of the report about exports, made in ``place``."""
    place.mkdir()

    def whole() -> float:
        start = time.monotonic()
        run(
            functools.partial(prune, place, data, checkpoint, None),
            place / 'log.txt')
        return time.monotonic() - start

    seconds = whole()
    remove_complete(place)
    exports = []
    for kill in export_kills(args.kills, args.seed):
        exports.append(killed_export(kill, place, data, checkpoint, seconds))
        print(json.dumps(exports[-1]), flush=True)
    whole()
    remove_complete(place)
    return dict(
        exports=exports,
        left_by_killed_exports=len(list(place.glob('.*'))),
        export_seconds=seconds)


def remove_complete(place: Path) -> None:
    """Remove the export that nothing interrupted.

    Raises:
        RuntimeError: If it is not complete.
    """
    if not is_complete(place / 'pair'):
        raise RuntimeError(f'expected a complete export in {place}')
    shutil.rmtree(place / 'pair')


def main() -> None:
    """Measure, write the report and, from it, the section of the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('--report', type=Path, required=True)
    parser.add_argument(
        '--kills', type=int, default=25, help='number of kills of each kind')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument(
        '--only',
        choices=['exports'],
        help='part to measure again; the rest of the report is kept')
    add_gate_option(parser)
    args = parser.parse_args()
    torch.set_num_threads(1)
    global RUN  # The processes are forks of this one.
    RUN = dataclasses.replace(RUN, gate=args.gate)
    with tempfile.TemporaryDirectory() as folder:
        cfg = config_of(RUN, Path(folder) / 'data')
        report = dict(
            model=RUN.model,
            gate=RUN.gate,
            iterations=ITERATIONS,
            saved_every=SAVED_EVERY,
            batch_size=cfg.train_dataloader.batch_size,
            seed=args.seed,
            machine=f'{platform.machine()}, 1 of {os.cpu_count()} CPU cores',
            torch=torch.__version__,
            **measure(args, Path(folder)))
    args.report.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.report, report)
    print(markdown(report))
    if args.report.resolve().parent == ROOT / 'docs' / 'reports':
        put_between(PAGE, args.report.stem, markdown(report))


if __name__ == '__main__':
    main()
