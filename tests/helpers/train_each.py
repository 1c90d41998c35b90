"""Train one config after the other, in all processes: CONFIG ...

The work folder of each is named after it, beside it. Imports are paid once.
"""
from __future__ import annotations

import sys
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.runner import Runner


def main() -> None:
    torch.distributed.init_process_group('gloo')
    for path in map(Path, sys.argv[1:]):
        cfg = Config.fromfile(path)
        cfg.work_dir = str(path.with_suffix(''))
        Runner.from_cfg(cfg).train()


if __name__ == '__main__':
    main()
