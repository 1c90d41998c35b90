"""Targets of parameters and of latency: trained, resumed, exported."""
from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Callable

import pytest

pytest.importorskip('mmseg')

import torch
from mmengine.config import Config
from torch import Tensor

from gdp_mmseg.analysis.structure import Layer
from gdp_mmseg.engine.model import find_pruner
from gdp_mmseg.export.export import export
from gdp_mmseg.pruner import pruner as pruner_module
from gdp_mmseg.report.tables import Report

from helpers.project import NAME, Project, Trained, train


def times(layers: list[Layer], device: torch.device, *_: Any) -> Tensor:
    """A device on which layers of all kernel sizes take as long."""
    return torch.tensor([[1., 0., 0.01, 0.001]] * len(layers))


@dataclasses.dataclass(frozen=True)
class Measured:
    """A training to a target of latency.

    Args:
        trained (Trained): See there.
        calls (list[int]): One for each time that layers were measured.
    """
    trained: Trained
    calls: list[int]


def load(project: Project, work_dir: Path, kind: str) -> Config:
    cfg = project.load(work_dir)
    cfg.model.gdp.target = dict(type=kind, ratio=0.6)
    return cfg


def never(*_: Any) -> Tensor:
    raise AssertionError('measured, where nothing is to be trained')


def trained_to(kind: str, project: Project, work_dir: Path) -> Trained:
    cfg = load(project, work_dir, kind)
    runner, recorder = train(cfg)
    return Trained(project.gated, work_dir / 'iter_32.pth', work_dir, runner,
                   recorder)


@pytest.fixture(scope='module')
def by_params(project: Project,
              tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return trained_to('params', project, tmp_path_factory.mktemp('params'))


@pytest.fixture(scope='module')
def by_latency(project: Project,
               tmp_path_factory: pytest.TempPathFactory) -> Measured:
    calls: list[int] = []

    def in_inference(*arguments: Any) -> Tensor:
        calls.append(len(calls))
        return times(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pruner_module, 'measure', in_inference)
        folder = tmp_path_factory.mktemp('latency')
        return Measured(trained_to('latency', project, folder), calls)


def logged(trained: Trained) -> list[str]:
    log = next(trained.work_dir.glob('*/*.log')).read_text()
    return [line for line in log.splitlines() if 'Iter(train)' in line]


def report_of(trained: Trained, out_dir: Path, kind: str,
              project: Project) -> tuple[Report, str, list[str]]:
    lines: list[str] = []
    export(
        load(project, trained.work_dir, kind),
        str(trained.checkpoint),
        out_dir,
        NAME,
        evaluate=False,
        progress=lines.append)
    return (Report.read(out_dir / 'report.json'),
            (out_dir / 'report.md').read_text(), lines)


def test_both_costs_are_logged_if_they_differ(by_params: Trained,
                                              trained: Trained) -> None:
    assert all('gdp_flops: ' in line and 'gdp_cost: ' in line
               for line in logged(by_params))
    assert all('gdp_flops: ' in line and 'gdp_cost: ' not in line
               for line in logged(trained))


def test_report_says_what_the_target_is_about(project: Project,
                                              by_params: Trained,
                                              tmp_path: Path) -> None:
    report, text, lines = report_of(by_params, tmp_path / 'out', 'params',
                                    project)
    assert report.target == 0.6 and report.target_type == 'params'
    share = find_pruner(by_params.runner.model)
    assert report.reached == pytest.approx(float(share.cost(share.channels())))
    assert report.reached == pytest.approx(0.6, abs=0.02)
    assert f'{report.reached:.4f}' in text
    assert 'Parameters that inference reads' in text
    assert not [line for line in lines if line.startswith('note')]


def test_missed_target_is_noted_by_its_own_cost(
        project: Project, by_params: Trained, tmp_path: Path,
        changed_gates: Callable[[Trained], Trained]) -> None:
    lines = report_of(
        changed_gates(by_params), tmp_path / 'out', 'params', project)[2]
    note, = (line for line in lines if line.startswith('note'))
    assert 'of the parameters are left, but gdp.target is 0.6' in note


@pytest.fixture()
def changed_gates(tmp_path: Path) -> Callable[[Trained], Trained]:
    """A training whose gates are all open."""

    def change(trained: Trained) -> Trained:
        content = torch.load(trained.checkpoint, weights_only=False)
        state = content['state_dict']
        state['gdp.gates.theta'].fill_(1)
        state['gdp.gates.closed'].fill_(False)
        path = tmp_path / 'open.pth'
        torch.save(content, path)
        return dataclasses.replace(trained, checkpoint=path)

    return change


def test_latency_is_measured_once_and_kept(
        project: Project, by_latency: Measured, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody who loads the checkpoint measures: not export, not resume."""
    assert len(by_latency.calls) == 1
    monkeypatch.setattr(pruner_module, 'measure', never)
    trained = by_latency.trained
    pruner = find_pruner(trained.runner.model)
    report, text, _ = report_of(trained, tmp_path / 'out', 'latency', project)
    assert report.reached == pytest.approx(
        float(pruner.cost(pruner.channels())), abs=1e-6)
    assert report.reached == pytest.approx(0.6, abs=0.02)
    assert report.target_type == 'latency' and 'Latency of the' in text
    cfg = load(project, tmp_path / 'resumed', 'latency')
    cfg.load_from, cfg.resume = str(trained.checkpoint), True
    cfg.train_cfg.max_iters = 33
    resumed = find_pruner(train(cfg)[0].model)
    assert torch.equal(resumed.cost.shares, pruner.cost.shares)
