"""Whole trainings of DeepLabV3Plus-R50, dense and gated: time and memory.

    python benchmarks/whole_run.py --size 192 --iterations 40 --rounds 3

Each training is a run of mmengine's runner in a process of its own, on random
images. They take turns after each iteration, so that what else the machine
does slows all of them alike. Prints the process time of the iterations and,
from further trainings that end early, the peak memory of each process, or of
the tensors on the GPU where there is one. ``benchmarks/speed.py`` has the
results in its report.
"""
from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import tempfile
import time
from multiprocessing.connection import Connection
from statistics import median
from typing import Any
from unittest import mock

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import DATASETS
from mmengine.runner import Runner
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample
from step_models import load
from torch.utils.data import Dataset

from gdp_mmseg.engine.config import ModelConfig
from gdp_mmseg.report.tables import table

TARGET = 0.4
SHORT = (0.1, 0.2, 0.7)
# Settings of the gates in each training; None for a dense one.
RUNS: dict[str, dict[str, Any] | None] = {
    'dense': None,
    'phases 0.1, 0.2, 0.7': dict(phases=SHORT),
    'phases 0.1, 0.2, 0.7, shrink=False': dict(phases=SHORT, shrink=False),
    'default phases': dict(),
    'default phases, shrink=False': dict(shrink=False),
    'default phases, takeover=False': dict(takeover=False),
}
# Share of a training in which the peak memory is reached: that is before
# channels leave, so early in the pruning phase.
MEMORY_SHARE = 0.6
# What the peak memory is that of, by ``memory`` of the report.
MEMORY = dict(
    cuda='tensors on the GPU',
    process='process, which builds and analyses the model, too')
# glibc then gives all but small tensors back to the system when they are
# freed. Else the peak of a process varies by some percent, and not with what
# it needs. Steps take longer, so times are measured apart.
GIVE_BACK = dict(MALLOC_MMAP_THRESHOLD_='131072')
# Processes that begin anew, with the environment of their start.
_CONTEXT = multiprocessing.get_context('spawn')
# Our goals for the time, over that of the dense training.
GOALS = {'phases 0.1, 0.2, 0.7': 0.7, 'default phases': 1.0}


@DATASETS.register_module()
class RandomImages(Dataset):
    """Images of noise, with labels of noise in squares of 8 x 8.

    Args:
        size (int): Height and width of an image.
        number (int): Number of images. Defaults to 64.
    """

    metainfo: dict[str, Any] = {}

    def __init__(self, size: int, number: int = 64) -> None:
        self.size = size
        self.number = number

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> dict[str, Any]:
        draw = torch.Generator().manual_seed(index)
        size = self.size
        image = torch.randint(256, (3, size, size), generator=draw)
        squares = torch.randint(21, (1, size // 8, size // 8), generator=draw)
        labels = squares.repeat_interleave(8, 1).repeat_interleave(8, 2)
        sample = SegDataSample(gt_sem_seg=PixelData(data=labels))
        return dict(inputs=image.to(torch.uint8), data_samples=sample)


class Clock(Hook):
    """Hook that waits for its turn and takes the process time of iterations.

    Args:
        turns (Connection): Connection to the process that gives the turns.

    Attributes:
        seconds (float): Process time of all iterations.
    """

    # Before all other hooks; the last of them is :class:`Stop`.
    priority = 0

    def __init__(self, turns: Connection) -> None:
        self.turns = turns
        self.seconds = 0.

    def before_train_iter(self, runner: Runner, *_: Any, **__: Any) -> None:
        """Wait, and start the clock."""
        self.turns.recv()
        self.start = time.process_time()


class Stop(Hook):
    """Hook that stops a :class:`Clock` after an iteration.

    Args:
        clock (Clock): The clock.
    """

    priority = 100

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def after_train_iter(self, runner: Runner, *_: Any, **__: Any) -> None:
        """Stop the clock, and pass the turn on."""
        self.clock.seconds += time.process_time() - self.clock.start
        self.clock.turns.send(self.clock.seconds)


class Memory(Hook):
    """Hook that looks at the memory before a log forgets its peak.

    It ends the training when the peak has been reached.

    Attributes:
        peak (int): Peak memory in bytes, of the tensors on the GPU if there
            is one, else of the process.
    """

    priority = 0
    peak = 0

    def after_train_iter(self, runner: Runner, *_: Any, **__: Any) -> None:
        """Look at the memory."""
        runner.train_loop.stop_training = (
            runner.iter + 1 >= MEMORY_SHARE * runner.max_iters)
        self.peak = max(
            self.peak,
            torch.cuda.max_memory_allocated() if torch.cuda.is_available() else
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def config_of(gdp: dict[str, Any] | None, size: int, iterations: int,
              work_dir: str) -> Config:
    """Return the config of a training.

    Args:
        gdp (dict[str, Any], optional): Settings of the gates; None for a
            dense training.
        size (int): Height and width of an image.
        iterations (int): Length of the training.
        work_dir (str): Folder for its log.
    """
    cfg = load()
    cfg.model.data_preprocessor.size = (size, size)
    if gdp is None:
        cfg.model = ModelConfig.of(cfg).ungated
        cfg.default_hooks.pop('gdp')
    else:
        cfg.model.gdp = dict(target=TARGET, input_shape=(size, size), **gdp)
    cfg.train_dataloader = dict(
        batch_size=2,
        num_workers=0,
        sampler=dict(type='InfiniteSampler', shuffle=True),
        dataset=dict(type='RandomImages', size=size))
    cfg.train_cfg = dict(
        type='IterBasedTrainLoop',
        max_iters=iterations,
        val_interval=iterations + 1)
    for key in ('val', 'test'):
        for part in ('dataloader', 'cfg', 'evaluator'):
            cfg.pop(f'{key}_{part}', None)
    cfg.default_hooks.checkpoint.interval = iterations + 1
    cfg.default_hooks.checkpoint.save_last = False
    # Trials of algorithms take memory of their own.
    cfg.env_cfg.cudnn_benchmark = False
    cfg.merge_from_dict(
        dict(work_dir=work_dir, log_level='WARNING', randomness=dict(seed=0)))
    return cfg


def train(name: str, size: int, iterations: int, *hooks: Hook) -> None:
    """Train in this process."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        runner = Runner.from_cfg(
            config_of(RUNS[name], size, iterations, folder))
        for hook in hooks:
            runner.register_hook(hook)
        runner.train()


def train_in_turns(name: str, size: int, iterations: int,
                   turns: Connection) -> None:
    """Train in this process; send the time at the end."""
    clock = Clock(turns)
    train(name, size, iterations, clock, Stop(clock))
    turns.send(clock.seconds)


def train_once(name: str, size: int, iterations: int, end: Connection) -> None:
    """Train in this process; send the peak memory at the end."""
    memory = Memory()
    train(name, size, iterations, memory)
    end.send(memory.peak)


def measure(size: int, iterations: int, rounds: int) -> dict[str, Any]:
    """Train each of :data:`RUNS` in processes of their own, in rounds.

    Returns:
        dict[str, Any]: The conditions, the peak memory of each training, and
        the time of each in each round.
    """
    peaks = {name: _peak(name, size, iterations) for name in RUNS}
    found = [_round(size, iterations) for _ in range(rounds)]
    return dict(
        size=size,
        iterations=iterations,
        target=TARGET,
        memory='cuda' if torch.cuda.is_available() else 'process',
        peaks=peaks,
        runs={name: [one[name] for one in found]
              for name in RUNS})


def _peak(name: str, size: int, iterations: int) -> int:
    """Peak memory of a training in bytes."""
    ours, end = _CONTEXT.Pipe()
    process = _CONTEXT.Process(
        target=train_once, args=(name, size, iterations, end))
    with mock.patch.dict(os.environ, GIVE_BACK):
        process.start()
    end.close()
    peak: int = ours.recv()
    process.join()
    return peak


def _round(size: int, iterations: int) -> dict[str, float]:
    """Train each of :data:`RUNS` once; return the time of each.

    They take turns after each iteration, so that what else the machine does
    slows all of them alike.
    """
    ends = {name: _CONTEXT.Pipe() for name in RUNS}
    for name, (_, end) in ends.items():
        _CONTEXT.Process(
            target=train_in_turns, args=(name, size, iterations, end)).start()
        # A training that fails then ends the wait for its turn.
        end.close()
    for _ in range(iterations):
        for name, (turns, _) in ends.items():
            turns.send(None)
            turns.recv()
    return {name: turns.recv() for name, (turns, _) in ends.items()}


def markdown(report: dict[str, Any]) -> str:
    """Return the section of ``docs/speed.md``.

    Args:
        report (dict[str, Any]): Result of :func:`measure`.
    """
    dense, peaks = report['runs']['dense'], report['peaks']
    rows = [['whole training', 'time / dense', 'goal', 'peak memory / dense']]
    for name, found in report['runs'].items():
        ratios = sorted(one / other for one, other in zip(found, dense))
        goal = GOALS.get(name)
        missed = ', missed' if goal and median(ratios) > goal else ''
        rows.append([
            name,
            f'{median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})',
            f'at most {goal:.2f}{missed}' if goal else '-',
            f'{peaks[name] / peaks["dense"]:.3f}'
        ])
    is_missed = any(peaks[name] > peaks['dense'] for name in GOALS)
    return '\n'.join([
        table(rows), '',
        f'{report["iterations"]} iterations of batch 2 of {report["size"]} x '
        f'{report["size"]} by the runner of mmengine, target '
        f'{report["target"]}; process time of the iterations, one thread, all '
        f'trainings in turn. Median and range of {len(dense)} rounds. Peak '
        f'memory of the {MEMORY[report["memory"]]}, in trainings of their own '
        f'that end after {MEMORY_SHARE:.0%}. The dense training took '
        f'{median(dense):.0f} s and {peaks["dense"] / 1e9:.2f} GB. With '
        '`shrink=False`, closed channels stay in the model; with '
        '`takeover=False`, other channels take over nothing.' +
        ' Our goal for the peak memory, at most that of the dense training, '
        'is missed.' * is_missed
    ])


def main() -> None:
    """Measure and print the section of the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('--size', type=int, default=192)
    parser.add_argument('--iterations', type=int, default=40)
    parser.add_argument('--rounds', type=int, default=3)
    args = parser.parse_args()
    print(markdown(measure(args.size, args.iterations, args.rounds)))


if __name__ == '__main__':
    main()
