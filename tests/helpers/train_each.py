"""Train one config after the other, in two processes: STORE CONFIG ...

The work folder of each is named after it, beside it. Both processes are forks
of this one, so imports are paid once; STORE is the file in which they meet.
"""
from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner
from mmseg.utils import register_all_modules

from helpers.project import remember_analyses_


def main() -> None:
    store, *paths = sys.argv[1:]
    register_all_modules(init_default_scope=False)
    torch.multiprocessing.start_processes(
        train_each, (store, paths), nprocs=2, start_method='fork')


def train_each(rank: int, store: str, paths: list[str]) -> None:
    """Train all configs in one of the processes."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2')
    torch.distributed.init_process_group(
        'gloo', init_method=f'file://{store}', rank=rank, world_size=2)
    remember_analyses_(pytest.MonkeyPatch())
    for path in map(Path, paths):
        cfg = Config.fromfile(path)
        cfg.work_dir = str(path.with_suffix(''))
        Runner.from_cfg(cfg).train()


if __name__ == '__main__':
    main()
