"""Several processes: one set of gates, and one process that writes.

On CPUs, over gloo. The programs that start processes run once each, because
each of the processes imports all; the other trainings are in forks.
"""
from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip('mmseg')

import torch
from mmengine.config import Config
from mmengine.runner import Runner
from torch import Tensor

from gdp_mmseg.export.export import export
from gdp_mmseg.report.record import read_rows

from helpers import HELPERS, PYTHONPATH, TOOLS
from helpers.project import (WITHOUT_SYNC, Exported, Project, Trained,
                             run_program, run_tool)

ITERATIONS = 12
# The mean over two processes' batches is that over one batch of both, if no
# image counts for another (norms in eval mode or none, no class weights that
# do not add up to the same) and nothing is drawn (dropout, flips).
EXACT = f"""
custom_imports = dict(imports=['helpers.rank_recorder'])
custom_hooks = [dict(type='RankRecorder')]
model = dict(
    backbone=dict(norm_cfg=dict(type='BN'), norm_eval=True),
    decode_head=dict(
        norm_cfg=None,
        dropout_ratio=0.,
        loss_decode=dict(_delete_=True, type='CrossEntropyLoss')),
    auxiliary_head=dict(norm_cfg=None, dropout_ratio=0.))
train_dataloader = dict(
    batch_size=2,
    dataset=dict(pipeline=[
        dict(type='LoadImageFromFile'),
        dict(type='LoadAnnotations'),
        dict(type='PackSegInputs'),
    ]))
train_cfg = dict(max_iters={ITERATIONS}, val_interval={ITERATIONS})
"""
# Over EXACT, for a program that sets the processes up by itself.
JOINED = """
launcher = 'pytorch'
model_wrapper_cfg = dict(
    type='MMDistributedDataParallel', device_ids=None, broadcast_buffers=False)
train_cfg = dict(max_iters=6, val_interval=1000)
model = dict(gdp=dict(gate_travel=4))
"""
# Lines over JOINED.
OTHERS = {
    'costs-that-differ':
    "custom_hooks = [dict(type='RankRecorder', shake=True)]",
    'trainable-gates':
    "custom_hooks = [dict(type='RankRecorder', shake=True)]\n"
    "model = dict(gdp=dict(gate='trainable'))",
    # Norms in eval mode would tell nothing of their channels.
    'scp-gates':
    "custom_hooks = [dict(type='RankRecorder', shake=True)]\n"
    "model = dict(backbone=dict(norm_eval=False), gdp=dict(gate='scp'))",
    'no-takeover':
    "custom_hooks = [dict(type='RankRecorder', shake=True)]\n"
    'model = dict(gdp=dict(takeover=False))',
    'latency':
    "model = dict(gdp=dict(target=dict(_delete_=True, type='latency',"
    ' ratio=0.9)))',
    'accumulation':
    'optim_wrapper = dict(accumulative_counts=2)\n'
    'model = dict(gdp=dict(gate_travel=2))',
    'checkpointing':
    'model = dict(backbone=dict(with_cp=True))\n'
    'model_wrapper_cfg = dict(static_graph=True)',
    'average-of-weights':
    "custom_hooks = [dict(type='RankRecorder'), dict(type='EMAHook')]",
}


def _run_in_two(command: list[Any]) -> str:
    """Run a program that starts two processes; return what they print."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    paths = [PYTHONPATH, os.environ.get('PYTHONPATH', '')]
    folder = Path(sys.executable).parent
    done = subprocess.run([str(one) for one in command],
                          env=dict(
                              os.environ,
                              OMP_NUM_THREADS='1',
                              PORT=str(port),
                              PATH=f'{folder}:{os.environ["PATH"]}',
                              PYTHONPATH=':'.join(filter(None, paths))),
                          stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT,
                          text=True)
    if done.returncode:
        raise RuntimeError(f'status {done.returncode}: {done.stdout[-4000:]}')
    return done.stdout


def _records(folder: Path) -> list[dict[str, Any]]:
    """What :class:`RankRecorder` left, of each process."""
    return [torch.load(folder / f'rank{rank}.pth') for rank in (0, 1)]


def _moved(theta: Tensor) -> bool:
    """Whether gates ``(iterations, G)`` closed, and others did not."""
    return bool((theta[-1] == 0).any()) and bool((theta[-1] > 0).any())


@pytest.fixture(scope='module')
def together(project: Project,
             tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work folder of a training by ``tools/dist_train.sh``."""
    folder = tmp_path_factory.mktemp('together')
    config = project.config('exact', EXACT)
    _run_in_two([TOOLS / 'dist_train.sh', config, 2, '--work-dir', folder])
    return folder


def test_gates_are_the_same_in_each_process(together: Path) -> None:
    one, other = _records(together)
    assert len(one['theta']) == ITERATIONS and _moved(one['theta'])
    assert torch.equal(one['theta'], other['theta'])
    assert torch.equal(one['gain'], other['gain'])
    assert one['sizes'] == other['sizes']
    assert one['sizes'][-1] < one['sizes'][0]


def test_two_processes_do_what_one_does_with_both_batches(
        together: Path, project: Project, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = project.load(tmp_path, project.config('exact', EXACT))
    cfg.train_dataloader.batch_size *= 2
    Runner.from_cfg(cfg).train()
    expected = torch.load(tmp_path / 'rank0.pth')['theta']
    theta = _records(together)[0]['theta']
    # The very gates close at the very step.
    assert torch.equal(theta == 0, expected == 0)
    assert torch.allclose(theta, expected, atol=1e-3)


def test_one_of_the_processes_writes(together: Path) -> None:
    assert [row.iter for row in read_rows(together / 'gates.jsonl')
            ] == list(range(1, ITERATIONS + 1))
    assert len(list(together.glob('*.pth'))) == 1 + 2  # the records
    assert len(list(together.glob('*/*.log'))) == 1


def test_two_processes_evaluate_and_export_what_one_does(
        together: Path, project: Project, tmp_path: Path) -> None:
    report = export(
        project.load(tmp_path, project.config('exact', EXACT)),
        str(together / f'iter_{ITERATIONS}.pth'), tmp_path / 'pair', 'exact')
    assert report.max_rel_diff <= 1e-5
    assert report.reached == pytest.approx(0.4, abs=0.02)
    scalars = next(together.glob('*/vis_data/scalars.json')).read_text()
    logged = json.loads(scalars.splitlines()[-1])
    assert logged['mIoU'] == pytest.approx(
        report.network('gated').metrics['mIoU'], abs=0.01)
    assert report.network('gated').metrics['mIoU'] == report.network(
        'pruned').metrics['mIoU'] > 0


@pytest.fixture(scope='module')
def others(project: Project,
           tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The work folders of trainings in two processes."""
    exact = project.config('exact', EXACT)
    joined = project.config('joined', JOINED, exact)
    configs = {
        name: project.config(name, lines, joined)
        for name, lines in OTHERS.items()
    }
    folder = tmp_path_factory.mktemp('others')
    run_program(
        HELPERS / 'train_each.py',
        folder / 'store',
        *configs.values(),
        cwd=folder)
    return {name: path.with_suffix('') for name, path in configs.items()}


@pytest.mark.parametrize('name', OTHERS)
def test_gates_stay_the_same_in_each_process(others: dict[str, Path],
                                             name: str) -> None:
    one, other = _records(others[name])
    assert _moved(one['theta'])
    assert torch.equal(one['theta'], other['theta'])
    # The Phi of SCP, and so the norms.
    assert torch.equal(one['gain'], other['gain'])
    assert torch.equal(one['weights'], other['weights'])


def test_one_process_measures_the_latency_for_all(
        others: dict[str, Path]) -> None:
    one, other = _records(others['latency'])
    assert bool(one['shares'].any())
    assert torch.equal(one['shares'], other['shares'])


def test_dist_test_gives_the_reports_miou(exported: Exported,
                                          tmp_path: Path) -> None:
    """With the options that the refusal of SyncBN names."""
    _run_in_two([
        TOOLS / 'dist_test.sh', exported.config, exported.checkpoint, 2,
        '--work-dir', tmp_path / 'out', '--cfg-options',
        *(f'{key}={value}' for key, value in WITHOUT_SYNC.items())
    ])
    metrics = json.loads(next((tmp_path / 'out').glob('*/*.json')).read_text())
    assert metrics['mIoU'] == pytest.approx(
        exported.report.network('pruned').metrics['mIoU'], abs=0.005)


def test_synced_norms_on_cpus_are_refused(project: Project,
                                          tmp_path: Path) -> None:
    outcome = run_tool(
        'train.py', project.gated, '--launcher', 'pytorch', cwd=tmp_path)
    options = ' '.join(f'{key}={value}' for key, value in WITHOUT_SYNC.items())
    assert outcome.status == 2
    assert outcome.stderr == (
        'train.py: error: expected norms that work on CPUs, but got SyncBN, '
        f'which needs a GPU for each process; pass --cfg-options {options}\n')


def test_synced_norms_go_all_the_way_in_one_process(
        trained: Trained, exported: Exported) -> None:
    """mmengine takes others in their place; the configs keep their names."""
    for path in (trained.config, exported.config):
        cfg = Config.fromfile(path)
        assert cfg.model.backbone.norm_cfg.type == 'SyncBN'
    assert exported.report.max_rel_diff <= 1e-5
    inputs = torch.randn(1, 3, 64, 64)
    gated = trained.runner.model.eval()
    with torch.no_grad():
        expected = gated(inputs, mode='tensor')
        got = exported.model()(inputs, mode='tensor')
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-4)


# -- slurm ------------------------------------------------------------------


def _program(folder: Path, name: str, line: str) -> None:
    """A shell program of one line."""
    path = folder / name
    path.write_text(f'#!/usr/bin/env bash\n{line}\n')
    path.chmod(0o755)


@pytest.mark.parametrize('name, arguments', [
    ('train', ['config.py']),
    ('test', ['config.py', 'checkpoint.pth']),
])
def test_slurm_is_asked_for_the_processes(name: str, arguments: list[str],
                                          tmp_path: Path) -> None:
    _program(tmp_path, 'srun', 'printf "%s\\n" "$@"')
    lines = subprocess.run(
        ['bash', TOOLS / f'slurm_{name}.sh', 'part', 'job', *arguments, '-x'],
        env=dict(
            os.environ,
            PATH=f'{tmp_path}:{os.environ["PATH"]}',
            GPUS='2',
            GPUS_PER_NODE='1',
            SRUN_ARGS='--quiet --exclusive'),
        capture_output=True,
        text=True,
        check=True).stdout.splitlines()
    assert lines == [
        '-p', 'part', '--job-name=job', '--gres=gpu:1', '--ntasks=2',
        '--ntasks-per-node=1', '--cpus-per-task=5', '--kill-on-bad-exit=1',
        '--quiet', '--exclusive', 'python', '-u',
        str(TOOLS / f'{name}.py'), *arguments, '--launcher=slurm', '-x'
    ]


def test_slurms_launcher_trains(project: Project, tmp_path: Path,
                                monkeypatch: pytest.MonkeyPatch) -> None:
    """One task of one, on a node without the GPU that mmengine asks for."""
    _program(tmp_path, 'scontrol', 'echo 127.0.0.1')
    monkeypatch.setattr(torch.cuda, 'set_device', lambda _: None)
    for key, value in dict(
            PATH=f'{tmp_path}:{os.environ["PATH"]}',
            SLURM_PROCID=0,
            SLURM_NTASKS=1,
            SLURM_LOCALID=0,
            SLURM_NODELIST='node[1-1]',
            MASTER_PORT=0).items():
        monkeypatch.setenv(key, str(value))
    options = dict(
        WITHOUT_SYNC, **{
            'env_cfg.dist_cfg.backend': 'gloo',
            'model_wrapper_cfg.type': 'MMDistributedDataParallel',
            'model_wrapper_cfg.device_ids': None,
            'train_cfg.max_iters': 2,
            'model.gdp.gate_travel': 1
        })
    try:
        outcome = run_tool(
            'train.py',
            project.gated,
            '--launcher',
            'slurm',
            '--work-dir',
            tmp_path / 'out',
            '--cfg-options',
            *(f'{key}={value}' for key, value in options.items()),
            cwd=tmp_path)
    finally:
        torch.distributed.destroy_process_group()
    assert outcome.status == 0, outcome.stderr
    assert [row.iter
            for row in read_rows(tmp_path / 'out/gates.jsonl')] == [1, 2]
