"""Run programs, each in a process that has torch and mmengine imported.

Reads a JSON object a line from stdin: ``program``, the words of a command line
without the interpreter; ``cwd``; ``env``; ``output``, a file that gets what
the program prints. Writes its exit status a line to stdout. Each program runs
in a fork of this process, which has never imported what is tested.
"""
from __future__ import annotations

import contextlib
import json
import logging
import os
import runpy
import sys
import traceback
from typing import Any

import matplotlib.figure  # noqa: F401
import mmengine.runner  # noqa: F401
import scipy.sparse.csgraph  # noqa: F401
import torch

from helpers.light import spare_time_

# mmpretrain needs it, and takes a second to import it.
with contextlib.suppress(ImportError):
    import torchvision  # noqa: F401


def main() -> None:
    torch.set_num_threads(1)
    # Nor are pages copied to which only a collection would write.
    spare_time_()
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            run(**request)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def run(program: list[str], cwd: str, env: dict[str, str],
        output: str) -> None:
    """Run a program as ``python PROGRAM`` does, and leave this process."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
    os.dup2(1, 2)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = program
    sys.path[0] = os.path.dirname(program[0])
    status: Any = 0
    try:
        runpy.run_path(program[0], run_name='__main__')
    except SystemExit as end:
        status = end.code or 0
        if not isinstance(status, int):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        traceback.print_exc()
        status = 1
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == '__main__':
    main()
