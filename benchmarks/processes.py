"""Gated training in two processes, compared with one process.

The one process trains on the batches of both; SCP is not compared with it,
because it needs norms in training mode, and these tell the two apart. Runs
``tools/dist_train.sh`` and ``tools/train.py`` on CPUs, exports the checkpoint
of the two processes, and writes a report and its section of
``docs/reliability.md``. Takes a minute on two cores.

    python benchmarks/processes.py --report docs/reports/processes.json
"""
from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor

from gdp_mmseg.engine.model import find_pruner
from gdp_mmseg.export.export import export
from gdp_mmseg.files import write_json
from gdp_mmseg.gates.scp import SCPGates

from pages import put_between
from small_models import ROOT, Run, add_gate_option, config_of

RUN = Run('DeepLabV3Plus-ResNet18', target=0.4, iterations=60)
PAGE = ROOT / 'docs' / 'reliability.md'


@HOOKS.register_module()
class GateRecorder(Hook):
    """Hook that records the gates of each process after each iteration."""

    # Runs after the hook that moves the gates.
    priority = 'LOWEST'

    def __init__(self) -> None:
        self.states: list[Tensor] = []

    def after_train_iter(self, runner: Runner, *_: Any, **__: Any) -> None:
        """Record theta, or the openness of gates that do not move theta."""
        gates = find_pruner(runner.model).gates
        state = (
            gates.openness() if isinstance(gates, SCPGates) else gates.theta)
        # The step of the gates changes theta in place, so a copy is needed.
        self.states.append(state.detach().cpu().clone())

    def after_train(self, runner: Runner) -> None:
        """Write the recorded states ``(T, G)`` into the work folder."""
        torch.save(
            torch.stack(self.states),
            record_file(Path(runner.work_dir), get_rank()))


def record_file(work_dir: Path, rank: int) -> Path:
    """Return the file of what a process recorded."""
    return work_dir / f'gates{rank}.pth'


def exact_config(folder: Path, gate: str) -> Config:
    """Return a training in which two batches equal one batch of both.

    The loss of both is the mean of the two only with norms in eval mode or no
    norms, and without random draws: no dropout, no flips. SCP gates get norms
    in training mode, the only ones that tell of them.
    """
    norm_cfg, is_scp = dict(type='BN'), gate == 'scp'
    cfg = config_of(dataclasses.replace(RUN, gate=gate), folder / 'data')
    cfg.model.backbone.update(norm_cfg=norm_cfg, norm_eval=not is_scp)
    for head in (cfg.model.decode_head, cfg.model.auxiliary_head):
        head.update(norm_cfg=norm_cfg if is_scp else None, dropout_ratio=0.)
    pipeline = cfg.train_dataloader.dataset.pipeline
    cfg.train_dataloader.dataset.pipeline = [
        step for step in pipeline if step.type != 'RandomFlip'
    ]
    cfg.default_hooks.checkpoint = dict(
        type='CheckpointHook', by_epoch=False, interval=RUN.iterations)
    cfg.custom_imports = dict(imports=['processes'])
    cfg.custom_hooks = [dict(type='GateRecorder')]
    return cfg


def run(command: list[Any]) -> None:
    """Run one of our tools with this folder on its path.

    Raises:
        subprocess.CalledProcessError: If the tool fails.
    """
    paths = [str(ROOT), str(Path(__file__).parent)]
    programs = Path(sys.executable).parent
    subprocess.run([str(part) for part in command],
                   env=dict(
                       os.environ,
                       OMP_NUM_THREADS='1',
                       PATH=f'{programs}:{os.environ["PATH"]}',
                       PYTHONPATH=':'.join(paths)),
                   check=True)


def measure(folder: Path, gate: str) -> dict[str, Any]:
    """Train in two processes and in one, export, and compare."""
    path = folder / 'config.py'
    cfg = exact_config(folder, gate)
    cfg.dump(path)
    # The hook is registered in this process already.
    for key in ('custom_imports', 'custom_hooks'):
        cfg.pop(key)
    batch = cfg.train_dataloader.batch_size
    two, one = folder / 'two', folder / 'one'
    run([ROOT / 'tools' / 'dist_train.sh', path, 2, '--work-dir', two])
    first, second = (torch.load(record_file(two, rank)) for rank in (0, 1))
    found = dict(
        gates=first.shape[1],
        closed=int((first[-1] <= 0).sum()),
        equal_in_both=int((first == second).all(1).sum()))
    if gate != 'scp':
        run([
            sys.executable, ROOT / 'tools' / 'train.py', path, '--work-dir',
            one, '--cfg-options', f'train_dataloader.batch_size={2 * batch}'
        ])
        alone = torch.load(record_file(one, 0))
        found.update(
            same_closed_as_alone=int(((first <= 0) == (alone
                                                       <= 0)).all(1).sum()),
            theta_apart=float((first - alone).abs().max()))
    report = export(
        cfg,
        str(two / f'iter_{RUN.iterations}.pth'),
        folder / 'pair',
        'config',
        evaluate=False)
    return dict(
        model=RUN.model,
        gate=gate,
        target=RUN.target,
        iterations=RUN.iterations,
        batch_size=batch,
        **found,
        flops=report.share('flops'),
        max_rel_diff=report.max_rel_diff,
        compared_on=report.compared_on,
        machine=f'{platform.machine()}, {os.cpu_count()} CPU cores, gloo',
        torch=torch.__version__)


def markdown(report: dict[str, Any]) -> str:
    """Return the section of the page."""
    steps, gate = report['iterations'], report.get('gate', 'gdp')
    if gate == 'scp':
        return (f'With `gate={gate!r}`, all {report["gates"]} gates are equal '
                f'in both processes after {report["equal_in_both"]} of '
                f'{steps} iterations, with norms in training mode, and '
                f'{report["closed"]} of them are closed at the end. Report: '
                f'`reports/processes_{gate}.json`.')
    if gate != 'gdp':
        return (f'With `gate={gate!r}`, theta is equal in both processes '
                f'after {report["equal_in_both"]} of {steps} iterations, and '
                'a single process has the same gates closed after '
                f'{report["same_closed_as_alone"]} of them. Report: '
                f'`reports/processes_{gate}.json`.')
    return (
        f'Two processes by `tools/dist_train.sh`: theta of all '
        f'{report["gates"]} gates is equal in both, bit for bit, after '
        f'{report["equal_in_both"]} of {steps} iterations. A single process '
        f'with batches twice as large has the same gates closed after '
        f'{report["same_closed_as_alone"]} of {steps} iterations, '
        f'{report["closed"]} gates at the end; its theta differs by '
        f'{report["theta_apart"]:.0e} at most, as each process '
        'observes some of the positions in its own images for the takeover. '
        'The export of the two '
        f'processes\' checkpoint keeps {report["flops"]:.3f} of the FLOPs '
        f'(target {report["target"]}); the outputs of the gated and the '
        f'pruned network differ by {report["max_rel_diff"]:.0e} of the '
        f'largest output on '
        f'{report["compared_on"]}.\n\n'
        f'{report["model"]}, {steps} iterations of batch '
        f'{report["batch_size"]} in each process, with norms in eval mode or '
        'none, no dropout and no flips: only then do two batches and one '
        'batch of both give the same sums. '
        f'{report["machine"]}, torch {report["torch"]}. '
        'Report: `reports/processes.json`, by `python benchmarks/processes.py '
        '--report docs/reports/processes.json`.')


def main() -> None:
    """Measure, write the report and, from it, the section of the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('--report', type=Path, required=True)
    add_gate_option(parser)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = measure(Path(folder), args.gate)
    write_json(args.report, report)
    print(json.dumps(report, indent=1))
    if args.report.resolve().parent == ROOT / 'docs' / 'reports':
        put_between(PAGE, args.report.stem, markdown(report))


if __name__ == '__main__':
    main()
