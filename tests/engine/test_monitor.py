"""What the gates did: by part, in pictures, in the log and in the report."""
from __future__ import annotations

import copy
import dataclasses
import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip('mmseg')

import numpy as np
from mmengine.config import Config
from PIL import Image

from gdp_mmseg.analysis.structure import FrozenChannels
from gdp_mmseg.engine import monitor
from gdp_mmseg.pruner.schedule import Schedule
from gdp_mmseg.report.plots import draw_record
from gdp_mmseg.report.record import (GateRow, append_row, begin_record,
                                     read_rows)
from gdp_mmseg.report.summary import dead_parts, kept_by_part, kept_share

from helpers.project import TARGET, Exported, Project, Trained, train
from helpers.stages import is_drawn, network


@pytest.mark.usefixtures('rendered_pictures')
def test_local_backend_gets_pictures_at_the_end(project: Project,
                                                tmp_path: Path) -> None:
    cfg = project.load(tmp_path)
    cfg.train_cfg.max_iters = 3
    # One visualizer of a name is kept by mmengine.
    cfg.visualizer.name = 'local_only'
    train(cfg)
    for name in ('gdp_openness', 'gdp_widths'):
        files = list(tmp_path.glob(f'*/vis_data/vis_image/{name}_*'))
        assert [path.name for path in files] == [f'{name}_3.png']
        assert is_drawn(np.asarray(Image.open(files[0])))


@pytest.mark.usefixtures('rendered_pictures')
def test_tensorboard_gets_pictures_at_the_interval(project: Project,
                                                   tmp_path: Path) -> None:
    pytest.importorskip('tensorboard', reason='TensorBoard is not installed')
    from tensorboard.backend.event_processing import event_accumulator
    cfg = project.load(tmp_path)
    cfg.train_cfg.max_iters = 3
    cfg.default_hooks.gdp.picture_interval = 2
    cfg.visualizer.vis_backends = [dict(type='TensorboardVisBackend')]
    # One visualizer of a name is kept by mmengine.
    cfg.visualizer.name = 'tensorboard_only'
    train(cfg)
    events = event_accumulator.EventAccumulator(
        str(next(tmp_path.glob('*/vis_data'))),
        size_guidance=dict(images=0, scalars=0))
    events.Reload()
    for name in ('gdp_openness', 'gdp_widths'):
        assert [image.step for image in events.Images(name)] == [2, 3]
    for name in ('flops', 'flops_by_openness', 'budget', 'held_cost',
                 'multiplier', 'undecided'):
        found = events.Scalars(f'gdp_{name}')
        assert [one.step for one in found] == [1, 2, 3]
    assert events.Scalars('gdp_flops')[0].value == 1
    # The last step of the pruning phase has the target for its budget.
    assert events.Scalars('gdp_budget')[-1].value == pytest.approx(TARGET)


def test_only_the_main_process_draws(trained: Trained,
                                     monkeypatch: pytest.MonkeyPatch) -> None:
    from gdp_mmseg.engine import hook
    calls: list[str] = []
    for name in ('show_gates', 'log_summary', 'log_export'):
        monkeypatch.setattr(
            hook, name, lambda *_, name=name, **__: calls.append(name))
    for main in (False, True):
        monkeypatch.setattr(hook, 'is_main_process', lambda: main)
        hook.GDPHook().after_train(trained.runner)
        assert calls == ['show_gates', 'log_summary', 'log_export'] * main


def test_record_says_what_was_asked_and_got(trained: Trained) -> None:
    pruner = trained.runner.model.gdp
    rows = read_rows(
        trained.work_dir / 'gates.jsonl', groups=pruner.analysis.groups)
    assert rows[0].budget == pytest.approx(1)
    assert rows[0].held_cost == pytest.approx(1)
    assert rows[-1].budget == pytest.approx(pruner.settings.target.ratio)
    assert rows[-1].held_cost == pytest.approx(rows[-1].flops, abs=0.02)


def messages(work_dir: Path) -> list[str]:
    """Messages of this package in the newest log of a training."""
    log = max(work_dir.glob('*/*.log')).read_text()
    found = re.split(r'^\d{4}/\d\d/\d\d .* - mmengine - [A-Z]+ - ', log, 0,
                     re.M)
    return [one for one in found if one.startswith('GDP: ')]


def test_log_starts_with_the_gates_and_explains_its_scalars(
        trained: Trained) -> None:
    pruner = trained.runner.model.gdp
    said = messages(trained.work_dir)
    start = next(one for one in said if ' gates in ' in one)
    explained = said[said.index(start) + 1]
    assert f'{pruner.analysis.num_gates} gates in' in start
    assert 'target 0.4 of the FLOPs' in start
    # The channels of both heads.
    assert re.search(r'^ +21 layer for training only$', start, re.M)
    assert re.search(r'^ +5 output of the model$', start, re.M)
    assert start.splitlines()[-1].endswith(
        f'gdp-mmseg groups {trained.config}')
    log = max(trained.work_dir.glob('*/*.log')).read_text()
    logged = {*re.findall(r'  (gdp_\w+): ', log)}
    assert len(logged) >= 6
    assert {*re.findall(r'^ +(gdp_\w+) +\w', explained, re.M)} == logged


def test_many_reasons_are_a_short_list(project: Project,
                                       trained: Trained) -> None:
    """The largest first, in lines of a page's width."""
    pruner = copy.copy(trained.runner.model.gdp)
    pruner.analysis = dataclasses.replace(
        pruner.analysis,
        frozen=tuple(
            FrozenChannels(f'kind_{index} in backbone.layers.{module}', (
                f'backbone.layers.{module}', ), 2**index) for index in range(8)
            for module in range(3)))
    said: list[str] = []
    runner: Any = SimpleNamespace(
        cfg=Config(), logger=SimpleNamespace(info=said.append))
    monitor.log_start(runner, pruner)
    lines = said[0].splitlines()
    assert max(map(len, said[0].splitlines() + said[1].splitlines())) <= 100
    reasons = [line.split() for line in lines if 'kind_' in line]
    assert reasons == [[str(3 * 2**index), f'kind_{index}']
                       for index in (7, 6, 5, 4, 3)]
    assert 'and 3 more reasons' in said[0]
    # A config that was made in Python has no path.
    assert said[0].endswith('gdp-mmseg groups CONFIG')


def test_log_names_each_phase_when_it_begins(trained: Trained) -> None:
    log = max(trained.work_dir.glob('*/*.log')).read_text()
    found = re.findall(
        r'GDP: (\S+) phase, iterations (\d+) to (\d+) of 32\n'
        r'(?:.*\n)+?.*Iter\(train\) \[ ?(\d+)/32\]', log)
    assert found == [('warm-up', '1', '4', '1'), ('pruning', '5', '28', '5'),
                     ('settling', '29', '32', '29')]


def test_resumed_training_names_its_phase(project: Project,
                                          tmp_path: Path) -> None:
    cfg = project.load(tmp_path)
    cfg.train_cfg.max_iters = 3
    cfg.model.gdp.phases = [0.3, 0.6, 0.1]
    cfg.default_hooks.checkpoint.interval = 2
    train(copy.deepcopy(cfg))
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'iter_2.pth'))
    cfg.resume = True
    cfg.visualizer.name = 'resumed'
    cfg.experiment_name = 'resumed'
    train(cfg)
    phases = [one for one in messages(tmp_path) if ' phase, ' in one]
    assert phases == [
        'GDP: pruning phase, iterations 2 to 3 of 3, resumed at 3\n'
        '    The budget falls from 1 to 0.4 of the FLOPs, and gates close to '
        'meet it.\n'
    ]


@pytest.mark.parametrize('phases', [(0.35, 0.5, 0.15), (0., 1., 0.),
                                    (0.1, 0.2, 0.7)])
@pytest.mark.parametrize('length', [1, 7, 32, 20000])
def test_iterations_of_phases_are_those_of_the_schedule(
        phases: tuple[float, float, float], length: int) -> None:
    schedule = Schedule(phases)
    reached = 0
    for phase in ('warmup', 'pruning', 'settling'):
        first, last = monitor.iterations_of(schedule, phase, length)
        assert first == reached + 1
        assert last >= reached
        for iteration in {first, last} if last >= first else ():
            assert schedule.phase_at((iteration - 1) / length) == phase
        reached = last
    assert reached == length


def test_log_ends_with_what_is_kept_and_what_died(trained: Trained) -> None:
    text = next(
        one for one in messages(trained.work_dir) if 'channels kept: ' in one)
    assert max(map(len, text.splitlines())) <= 100
    pruner = trained.runner.model.gdp
    keep = pruner.channels() > 0
    for part in kept_by_part(pruner.analysis.groups, keep):
        assert f'{part.name} {kept_share(part):.0%}' in text
    for part in dead_parts(pruner.analysis, keep) or ['removed parts: none']:
        assert part in text


def test_log_ends_with_a_command_that_can_be_copied(trained: Trained,
                                                    tmp_path: Path) -> None:
    text = messages(trained.work_dir)[-1]
    _, _, command = text.partition('\n\n')
    assert shlex.split(command.replace('\\\n', '')) == [
        'gdp-mmseg', 'export',
        str(trained.config),
        str(trained.checkpoint), '--out-dir',
        str(trained.work_dir / 'exported')
    ]


def test_command_has_words_for_what_is_not_known(tmp_path: Path) -> None:
    (tmp_path / 'exported').mkdir()
    said: list[str] = []
    runner: Any = SimpleNamespace(
        cfg=Config(),
        work_dir=str(tmp_path),
        logger=SimpleNamespace(info=said.append))
    monitor.log_export(runner, None)
    assert 'gdp-mmseg export CONFIG \\\n    CHECKPOINT \\\n' in said[0]
    # An export needs a new folder.
    assert said[0].rstrip().endswith(f'--out-dir {tmp_path / "exported_2"}')


def test_report_shows_stages_and_deaths_and_the_path(exported: Exported,
                                                     trained: Trained) -> None:
    pruner = trained.runner.model.gdp
    report, text = exported.report, (exported.folder / 'report.md').read_text()
    keep = pruner.channels() > 0
    assert report.dead == dead_parts(pruner.analysis, keep)
    assert sum(part.kept for part in report.parts) == int(keep.sum())
    assert 'backbone.layer1' in [part.name for part in report.parts]
    for part in report.parts:
        assert f'| {part.name} ' in text
    assert all(f'- {part}\n' in text for part in report.dead)
    assert report.gates_picture == 'gates.png'
    assert '](gates.png)' in text
    assert is_drawn(
        np.asarray(Image.open(exported.folder / 'gates.png').convert('RGB')))


ROW = ('{"iter": %s, "flops": 1.0, "budget": 1.0, "held_cost": 1.0, '
       '"openness": %s}')


@pytest.mark.parametrize('record, said', [
    (None, ''),
    ('', ''),
    ('{"iter": 1, "fl', 'no picture of the gates'),
    (ROW % (1, [0.5]), 'names no groups'),
    ('{"groups": []}', 'with 0 groups and not 5'),
])
def test_export_needs_no_record_of_the_gates(record: str | None, said: str,
                                             tmp_path: Path) -> None:
    from gdp_mmseg.export.export import _with_picture
    analysis, _ = network()
    path = tmp_path / 'gates.jsonl'
    if record is not None:
        path.write_text(record)
    lines: list[str] = []
    report = object()
    assert _with_picture(report, tmp_path, path, analysis, 10,
                         lines.append) is report  # type: ignore[arg-type]
    assert not (tmp_path / 'gates.png').exists()
    assert (said in lines[0]) if said else not lines


def test_path_until_the_checkpoint_is_drawn(tmp_path: Path) -> None:
    analysis, _ = network()
    path = tmp_path / 'gates.jsonl'
    begin_record(path, analysis.groups, 0)
    for number in (10, 20, 30):
        append_row(path,
                   GateRow(number, 1., 1., 1., [0.5] * len(analysis.groups)))
    assert draw_record(path, analysis.groups, until=5) is None
    figure = draw_record(path, analysis.groups, until=20)
    assert figure is not None
    image = figure.axes[0].images[0]
    assert image.get_array().shape == (len(analysis.groups), 2)
    assert image.get_extent()[1] == 20
