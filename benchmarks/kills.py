"""Processes that are killed at a chosen point, for benchmarks/faults.py."""
from __future__ import annotations

import builtins
import dataclasses
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any, Callable

import mmengine.hooks.checkpoint_hook

import gdp_mmseg.files

SECONDS_BETWEEN_LOOKS = 1e-3


@dataclasses.dataclass(frozen=True)
class Kill:
    """The moment at which a process is killed.

    Args:
        when (str): ``'running'``, at any time; ``'saving'``, while it writes
            a file; ``'pointing'``, while it writes ``last_checkpoint``;
            ``'renamed'``, right after it renamed something.
        count (int): Number of rows of ``gates.jsonl``, of files written, or
            of files renamed before the kill.
        share (float): Share of the iteration, of the file's bytes or, for an
            export that runs, of its time before the kill.
    """
    when: str
    count: int
    share: float


def training_kills(number: int, seed: int, iterations: int,
                   saved_every: int) -> list[list[Kill]]:
    """Draw the kills of each training; one training in three gets two.

    Args:
        number (int): Number of trainings.
        seed (int): Seed of the draws.
        iterations (int): Length of each training.
        saved_every (int): Iterations between two checkpoints.
    """
    draw = random.Random(seed)
    kinds = ['running'] * 5 + ['saving'] * 3 + ['pointing']

    def one(when: str) -> Kill:
        last = (iterations if when == 'running' else iterations // saved_every)
        # A resume repairs files as well, so it may write fewer: minus one.
        return Kill(when, draw.randrange(last - 1), draw.random())

    return [[
        one(kinds[(index + again) % len(kinds)])
        for again in range(1 + (index % 3 == 0))
    ] for index in range(number)]


def export_kills(number: int, seed: int) -> list[Kill]:
    """Draw the kills of the exports, half of them while they run."""
    draw = random.Random(seed)
    kinds = ['running', 'saving', 'running', 'renamed']
    # An export writes two files, checkpoint and report; it renames both, and
    # the folder.
    return [
        Kill(when, draw.randrange(3 if when == 'renamed' else 2),
             draw.random())
        for when in (kinds[index % len(kinds)] for index in range(number))
    ]


def arm_(kill: Kill | None) -> None:
    """Let this process kill itself while it writes a file, in place."""
    if kill is None or kill.when == 'running':
        return
    if kill.when == 'renamed':
        os.replace = _deadly_replace(kill)
        return
    module: Any = (
        gdp_mmseg.files
        if kill.when == 'saving' else mmengine.hooks.checkpoint_hook)
    module.open = _deadly_open(kill)


class _HalfFile:
    """A file that takes a share of its content and then kills the process."""

    def __init__(self, file: Any, share: float) -> None:
        self.file = file
        self.share = share

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def write(self, content: Any) -> None:
        """Write the first part of the content; never return."""
        self.file.write(content[:int(len(content) * self.share)])
        self.file.flush()
        os.kill(os.getpid(), signal.SIGKILL)


def _deadly_open(kill: Kill) -> Callable[..., Any]:
    """Return an ``open`` whose file kills the process after ``count`` files.
    """
    written = 0

    def open_(path: Any, mode: str = 'r', **options: Any) -> Any:
        nonlocal written
        file = builtins.open(path, mode, **options)
        written += 1
        return _HalfFile(file, kill.share) if written > kill.count else file

    return open_


def _deadly_replace(kill: Kill) -> Callable[..., None]:
    """Return an ``os.replace`` that kills the process after ``count`` files.
    """
    renamed = 0
    rename = os.replace

    def replace(*paths: Any) -> None:
        nonlocal renamed
        rename(*paths)
        renamed += 1
        if renamed > kill.count:
            os.kill(os.getpid(), signal.SIGKILL)

    return replace


def run(work: Callable[[], None],
        log: Path,
        kill: Kill | None = None,
        is_time: Callable[[Kill], bool] = lambda kill: False) -> int:
    """Run a function in a process of its own and kill it.

    Args:
        work (Callable[[], None]): The function; it calls :func:`arm_`.
        log (Path): File that gets the output of the process.
        kill (Kill, optional): Moment of the kill. Defaults to None: the
            process runs to its end.
        is_time (Callable[[Kill], bool]): Test whether the moment of a
            ``'running'`` kill has come, called again and again.

    Returns:
        int: Exit status, negative if a signal ended the process.

    Raises:
        RuntimeError: If the process fails by itself.
    """

    def quietly() -> None:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (sys.stdout, sys.stderr):
            os.dup2(output, stream.fileno())
        work()

    # A forked process need not import everything again.
    process = multiprocessing.get_context('fork').Process(target=quietly)
    process.start()
    while kill is not None and kill.when == 'running' and process.is_alive():
        if is_time(kill):
            process.kill()
        time.sleep(SECONDS_BETWEEN_LOOKS)
    process.join()
    status = process.exitcode
    if status is None or status > 0:
        raise RuntimeError(f'a process ended with status {status}; see {log}')
    return status
