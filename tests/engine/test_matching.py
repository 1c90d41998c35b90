"""A gated checkpoint goes with its own gates and with no others."""
from __future__ import annotations

from pathlib import Path
from typing import Any, Callable

import pytest

pytest.importorskip('mmseg')

import torch
from mmengine.config import Config

from gdp_mmseg.analysis.state import from_state, to_state
from gdp_mmseg.engine import model as models
from gdp_mmseg.engine.matching import check_resume, stored_analysis
from gdp_mmseg.export import networks
from gdp_mmseg.export.export import export
from gdp_mmseg.pruner.settings import Settings

from helpers.project import Project, Trained, run_tool, train
from helpers.toys import SHAPE, TOYS

Change = Callable[[Callable[[dict[str, Any]], None]], Path]


def refused(cfg: Config, checkpoint: Path, tmp_path: Path) -> str:
    """Return the message with which an export refuses a checkpoint."""
    with pytest.raises(ValueError) as error:
        export(cfg, str(checkpoint), tmp_path / 'out', 'x', evaluate=False)
    assert not (tmp_path / 'out').exists()
    return str(error.value)


def test_the_analysis_is_in_the_checkpoint(trained: Trained) -> None:
    meta = torch.load(trained.checkpoint, weights_only=False)['meta']
    pruner = trained.runner.model.gdp
    assert meta['gdp']['gate'] == 'gdp'
    found = from_state(meta['gdp']['analysis'])
    assert found.num_gates == pruner.analysis.num_gates
    assert [group.writers for group in found.groups
            ] == [group.writers for group in pruner.analysis.groups]


def test_gates_without_an_analysis_are_refused(project: Project,
                                               changed: Change,
                                               tmp_path: Path) -> None:
    """They are from a version of before."""
    path = changed(lambda content: content['meta'].pop('gdp'))
    message = refused(project.load(tmp_path), path, tmp_path)
    assert 'was written before gdp_mmseg stored the analysis' in message
    cfg = project.load(tmp_path / 'work', load_from=str(path))
    with pytest.raises(ValueError, match='was written before gdp_mmseg'):
        train(cfg)


def test_another_ignore_is_named_with_both_values(project: Project,
                                                  trained: Trained,
                                                  tmp_path: Path) -> None:
    cfg = project.load(
        tmp_path / 'work',
        load_from=str(trained.checkpoint),
        **{'model.gdp.ignore': ['decode_head']})
    with pytest.raises(ValueError) as error:
        train(cfg)
    message = str(error.value)
    assert "gdp.ignore=['decode_head']" in message
    assert 'gdp.ignore=[]' in message and 'theta' not in message


def test_an_export_with_another_ignore_is_refused(project: Project,
                                                  tmp_path: Path,
                                                  trained: Trained) -> None:
    """The stored analysis is of the modules that the training pruned."""
    cfg = project.load(tmp_path, **{'model.gdp.ignore': ['decode_head']})
    message = refused(cfg, trained.checkpoint, tmp_path)
    assert "gdp.ignore=['decode_head']" in message
    assert 'gdp.ignore=[]' in message


def test_another_gate_method_is_refused(project: Project, changed: Change,
                                        tmp_path: Path) -> None:
    path = changed(lambda content: content['meta']['gdp'].update(gate='scp'))
    message = refused(project.load(tmp_path), path, tmp_path)
    assert "method 'gdp'" in message and "'scp'" in message


@pytest.mark.parametrize('gate, options, fits', [
    ('gdp', None, True),
    ('gdp', {}, True),
    ('scp', {}, False),
    (dict(type='scp', streams=True), dict(streams=True), True),
    (dict(type='scp', streams=True), {}, False),
])
def test_an_analysis_is_taken_for_the_same_method_and_options(
        gate: Any, options: dict[str, Any] | None, fits: bool) -> None:
    """A method may have gates for a part of the channels only."""
    net, analysis = TOYS['residual'].analyse()
    settings = Settings.from_config(dict(target=0.5, gate=gate))
    came = 'gdp' if gate == 'scp' else settings.gate.type
    gates = dict(gate=came, ignore=[], only=None, analysis=to_state(analysis))
    if options is not None:  # Earlier checkpoints have none.
        gates['options'] = options
    found = stored_analysis(gates, settings, SHAPE, net.state_dict())
    assert (found is not None) == fits


def forbidden(*_: Any, **__: Any) -> None:
    raise RuntimeError('expected no second analysis')


def test_an_export_does_not_analyse_again(
        project: Project, trained: Trained, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, 'analyse_model', forbidden)
    report = export(
        project.load(tmp_path),
        str(trained.checkpoint),
        tmp_path / 'out',
        'x',
        evaluate=False)
    assert report.max_rel_diff <= 1e-4


def test_an_export_at_another_size_analyses_again(project: Project,
                                                  trained: Trained,
                                                  tmp_path: Path) -> None:
    cfg = project.load(tmp_path, **{'model.gdp.input_shape': (96, 96)})
    report = export(
        cfg, str(trained.checkpoint), tmp_path / 'out', 'x', evaluate=False)
    assert report.input_shape == [1, 3, 96, 96]
    assert report.share('flops') == pytest.approx(0.4, abs=0.05)


def test_a_resume_does_not_analyse_again(
        project: Project, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [
        project.gated, '--work-dir', tmp_path / 'work', '--cfg-options',
        'default_hooks.checkpoint.interval=2', 'model.gdp.gate_travel=1',
        'train_cfg.max_iters=2'
    ]
    assert run_tool('train.py', *arguments, cwd=tmp_path).status == 0
    monkeypatch.setattr(models, 'analyse_model', forbidden)
    arguments[-1] = 'train_cfg.max_iters=4'
    outcome = run_tool('train.py', *arguments, '--resume', cwd=tmp_path)
    assert outcome.status == 0, outcome.stderr
    assert (tmp_path / 'work/iter_4.pth').is_file()


def test_a_resume_with_another_ignore_is_refused(project: Project,
                                                 tmp_path: Path) -> None:
    arguments = [
        project.gated, '--work-dir', tmp_path / 'work', '--cfg-options',
        'default_hooks.checkpoint.interval=2', 'model.gdp.gate_travel=1',
        'train_cfg.max_iters=2'
    ]
    assert run_tool('train.py', *arguments, cwd=tmp_path).status == 0
    before = (tmp_path / 'work/iter_2.pth').read_bytes()
    arguments[-1] = 'train_cfg.max_iters=4'
    outcome = run_tool(
        'train.py',
        *arguments,
        'model.gdp.ignore=[decode_head]',
        '--resume',
        cwd=tmp_path)
    assert outcome.status != 0
    assert "gdp.ignore=['decode_head']" in outcome.stderr
    assert 'gdp.ignore=[]' in outcome.stderr
    assert (tmp_path / 'work/iter_2.pth').read_bytes() == before
    assert not (tmp_path / 'work/iter_4.pth').exists()


@pytest.mark.parametrize('gated, state, message', [
    (True, {
        'weight': 1
    }, 'a gated training, but got one of a dense .* as load_from'),
    (False, {
        'gdp.gates.theta': 1
    }, 'a dense training, but got one of a gated .* the config that it was'),
])
def test_resume_across_gates_is_refused_with_a_way_that_works(
        trained: Trained, gated: bool, state: dict[str, Any],
        message: str) -> None:
    network = trained.runner.model if gated else torch.nn.Identity()
    with pytest.raises(ValueError, match=message):
        check_resume(network, state)
