"""Commands of the demo, run at the same time with their output in logs."""
from __future__ import annotations

import contextlib
import dataclasses
import os
import resource
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Callable, Iterator, Sequence, TextIO

from ..cli.errors import fail

SECONDS_BETWEEN_LOOKS = 0.2


@dataclasses.dataclass(frozen=True)
class Command:
    """A Python program with its arguments.

    Args:
        arguments (list[str]): Command line of the interpreter.
        log (Path): File that gets its output.
        see (Callable[[str], None]): Gets each line of the output.
    """
    arguments: list[str]
    log: Path
    see: Callable[[str], None]

    def __str__(self) -> str:
        return shlex.join(['python', *self.arguments])


@dataclasses.dataclass
class _Running:
    """A command that was started, and the part of its log not yet seen."""
    command: Command
    process: subprocess.Popen[str]
    output: TextIO
    rest: str = ''
    seconds: float = 0.

    def poll(self) -> int | None:
        """Return the exit status, if the command has ended."""
        # Its processor time is known when it is asked for after its end.
        before = _seconds_of_children()
        status = self.process.poll()
        self.seconds += _seconds_of_children() - before
        return status

    def look(self) -> None:
        """Pass new lines of the log on."""
        *lines, self.rest = (self.rest + self.output.read()).split('\n')
        for line in lines:
            self.command.see(line)


def _seconds_of_children() -> float:
    """Return the processor time of all processes that were waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run_together(commands: Sequence[Command]) -> list[float]:
    """Run commands at the same time, one thread each, until all have ended.

    If one fails, the others are ended and the program ends with one line that
    names the log.

    Returns:
        list[float]: Processor time of each command in seconds.
    """
    with contextlib.ExitStack() as stack:
        running = [
            stack.enter_context(_started(command)) for command in commands
        ]
        while True:
            # Asked before the log is read: its end is not missed.
            states = [one.poll() for one in running]
            for one, status in zip(running, states):
                one.look()
                if status:
                    fail(f'expected {one.command} to succeed, but it ended '
                         f'with status {status}; read {one.command.log}')
            if None not in states:
                return [one.seconds for one in running]
            time.sleep(SECONDS_BETWEEN_LOOKS)


@contextlib.contextmanager
def _started(command: Command) -> Iterator[_Running]:
    """Start a command; end it at the exit if it still runs."""
    print(f'$ {command}', flush=True)
    # With several threads each, a process that waits for a busy core lets all
    # its threads spin, and takes ten times as long.
    environment = dict(
        os.environ,
        OMP_NUM_THREADS='1',
        MKL_NUM_THREADS='1',
        PYTHONUNBUFFERED='1')
    with open(command.log, 'w') as log, open(command.log) as output, \
            subprocess.Popen(
                [sys.executable, '-W', 'ignore', *command.arguments],
                env=environment,
                text=True,
                stdout=log,
                stderr=subprocess.STDOUT) as process:
        try:
            yield _Running(command, process, output)
        finally:
            if process.poll() is None:
                process.terminate()
