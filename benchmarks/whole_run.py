"""Whole trainings of DeepLabV3Plus-R50, dense and gated: time and memory.

    python benchmarks/whole_run.py --size 192 --iterations 40 --rounds 3

Each training is a run of mmengine's runner in a process of its own, on random
images. They take turns after each iteration, so that what else the machine
does slows all of them alike. Prints the process time of the iterations and the
peak memory of each process, or of the tensors on the GPU where there is one.
``benchmarks/speed.py`` has the results in its report.
"""
from __future__ import annotations

import argparse
import multiprocessing
import resource
import tempfile
import time
from multiprocessing.connection import Connection
from statistics import median
from typing import Any, Sequence

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
# What the peak memory is that of, by ``memory`` of the report.
MEMORY = dict(
    cuda='Peak memory of the tensors on the GPU.',
    process='Peak memory of the process, which builds and analyses the model, '
    'too.')
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
        peak (int): Peak memory of the tensors on the GPU in bytes.
    """

    # Before all other hooks; the last of them is :class:`Stop`.
    priority = 0

    def __init__(self, turns: Connection) -> None:
        self.turns = turns
        self.seconds = 0.
        self.peak = 0

    def before_train_iter(self, runner: Runner, *_: Any, **__: Any) -> None:
        """Wait, and start the clock."""
        self.turns.recv()
        self.start = time.process_time()

    def after_train_iter(self, runner: Runner, *_: Any, **__: Any) -> None:
        """Look at the memory before a log forgets its peak."""
        if torch.cuda.is_available():
            self.peak = max(self.peak, torch.cuda.max_memory_allocated())


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


def train(name: str, size: int, iterations: int, turns: Connection) -> None:
    """Train in this process; send its time and peak memory at the end."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        cfg = config_of(RUNS[name], size, iterations, folder)
        runner, clock = Runner.from_cfg(cfg), Clock(turns)
        runner.register_hook(clock)
        runner.register_hook(Stop(clock))
        runner.train()
    peak = clock.peak
    if not torch.cuda.is_available():
        # It varies by some percent from one process to the next.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    turns.send(dict(seconds=clock.seconds, peak_kb=peak / 1e3))


def measure(size: int, iterations: int, rounds: int) -> dict[str, Any]:
    """Train each of :data:`RUNS` in processes of their own, in rounds.

    Returns:
        dict[str, Any]: The conditions, and time and memory of each training
        and round.
    """
    found = [_round(size, iterations) for _ in range(rounds)]
    return dict(
        size=size,
        iterations=iterations,
        target=TARGET,
        memory='cuda' if torch.cuda.is_available() else 'process',
        runs={name: [one[name] for one in found]
              for name in RUNS})


def _round(size: int, iterations: int) -> dict[str, dict[str, float]]:
    """Train each of :data:`RUNS` once; return time and memory of each.

    They take turns after each iteration, so that what else the machine does
    slows all of them alike.
    """
    context = multiprocessing.get_context('spawn')
    ends = {name: context.Pipe() for name in RUNS}
    for name, (_, end) in ends.items():
        context.Process(
            target=train, args=(name, size, iterations, end)).start()
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
    dense = report['runs']['dense']
    rows = [['whole training', 'time / dense', 'goal', 'peak memory / dense']]
    for name, found in report['runs'].items():
        time_ratios, memory_ratios = (
            sorted(one[key] / other[key] for one, other in zip(found, dense))
            for key in ('seconds', 'peak_kb'))
        goal = GOALS.get(name)
        missed = ', missed' if goal and median(time_ratios) > goal else ''
        rows.append([
            name,
            _with_range(time_ratios),
            f'at most {goal:.2f}{missed}' if goal else '-',
            _with_range(memory_ratios)
        ])
    seconds, peak = (
        median(one[key] for one in dense) for key in ('seconds', 'peak_kb'))
    return '\n'.join([
        table(rows), '',
        f'{report["iterations"]} iterations of batch 2 of {report["size"]} x '
        f'{report["size"]} by the runner of mmengine, target '
        f'{report["target"]}; process time of the iterations, one thread, all '
        f'trainings in turn. {MEMORY[report["memory"]]} Median and range of '
        f'{len(dense)} rounds. The dense training took {seconds:.0f} s and '
        f'{peak / 1e6:.2f} GB. With `shrink=False`, closed channels stay in '
        'the model; with `takeover=False`, other channels take over nothing.'
    ])


def _with_range(ratios: Sequence[float]) -> str:
    """Write the median of sorted ratios, and their range."""
    return f'{median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})'


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
