"""Phases of the gates in trainings from scratch, on the demo's drawn shapes.

Trains the gated network of ``gdp-mmseg demo`` with each choice of phases and
each seed, and writes a report after each training. Finished trainings are not
repeated. ``benchmarks/results.py`` makes a table of it for ``docs/guide.md``.

    python benchmarks/phases.py --report docs/reports/phases.json
"""
from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import torch

from gdp_mmseg.cli.checks import load_config
from gdp_mmseg.demo.commands import Command, run_together
from gdp_mmseg.demo.demo import (GATED, called, checkpoint_of, conditions,
                                 draw_data)
from gdp_mmseg.files import write_json
from gdp_mmseg.pruner.schedule import Schedule
from gdp_mmseg.report.record import RECORD, last_metrics, read_rows

from accuracy_variants import SHORT

# By the names that ``accuracy.py`` has for them.
PHASES = {'gdp': Schedule.phases, 'gdp+short': SHORT}


def train(method: str, seed: int, work_dir: Path,
          shared: dict[str, Any]) -> dict[str, Any]:
    """Train once, unless that was done before; return a row of the report.

    Args:
        method (str): Key of :data:`PHASES`.
        seed (int): Seed of the training.
        work_dir (Path): Folder of all trainings.
        shared (dict): Conditions of the report.
    """
    target, iterations = shared['target'], shared['iterations']
    name = f'{method}-{target}-{seed}'
    if not checkpoint_of(work_dir, name, iterations).exists():
        work_dir.mkdir(parents=True, exist_ok=True)
        run_together([
            Command(
                called('train', GATED, '--work-dir', work_dir / name,
                       '--cfg-options', f'randomness.seed={seed}',
                       f'model.gdp.phases={list(PHASES[method])}'),
                log=work_dir / f'{name}.log',
                see=lambda line: None)
        ])
    return dict(
        method=method,
        target=target,
        seed=seed,
        macs=read_rows(work_dir / name / RECORD)[-1].flops,
        score=last_metrics(work_dir / name, ['mIoU'])['mIoU'])


def main() -> None:
    """Train all that is missing, and write the report after each training."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('--report', type=Path, required=True)
    parser.add_argument(
        '--work-dir', type=Path, default=Path('work_dirs/phases'))
    parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2])
    args = parser.parse_args()
    cfg = load_config(str(GATED))
    draw_data(cfg)
    shared = dict(
        conditions(cfg),
        metric='mIoU',
        target=cfg.model.gdp.target,
        seeds=args.seeds,
        torch=torch.__version__)
    rows = []
    for seed, method in itertools.product(args.seeds, PHASES):
        rows.append(train(method, seed, args.work_dir, shared))
        write_json(args.report, dict(shared, rows=rows))


if __name__ == '__main__':
    main()
