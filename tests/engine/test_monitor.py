"""What the gates did: by part, in pictures, in the log and in the report."""
from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip('mmseg')

import numpy as np
from PIL import Image

from gdp_mmseg.report.plots import draw_record
from gdp_mmseg.report.summary import dead_parts, kept_by_part

from helpers.project import Exported, Project, Trained, train
from helpers.stages import is_drawn, network


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


def test_tensorboard_gets_pictures_at_the_interval(project: Project,
                                                   tmp_path: Path) -> None:
    pytest.importorskip('tensorboard')
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
    for name in ('gdp_budget', 'gdp_held_cost'):
        assert len(events.Scalars(name)) == 3


def test_only_the_main_process_draws(trained: Trained,
                                     monkeypatch: pytest.MonkeyPatch) -> None:
    from gdp_mmseg.engine import hook
    calls: list[str] = []
    for name in ('show_gates', 'log_summary'):
        monkeypatch.setattr(
            hook, name, lambda *_, name=name, **__: calls.append(name))
    for main in (False, True):
        monkeypatch.setattr(hook, 'is_main_process', lambda: main)
        hook.GDPHook().after_train(trained.runner)
        assert calls == ['show_gates', 'log_summary'] * main


def test_record_says_what_was_asked_and_got(trained: Trained) -> None:
    pruner = trained.runner.model.gdp
    rows = [
        json.loads(line) for line in (trained.work_dir /
                                      'gates.jsonl').read_text().splitlines()
    ]
    assert rows[0]['budget'] == pytest.approx(1)
    assert rows[0]['held_cost'] == pytest.approx(1)
    assert rows[-1]['budget'] == pytest.approx(pruner.settings.target.ratio)
    assert rows[-1]['held_cost'] == pytest.approx(rows[-1]['flops'], abs=0.02)


def test_log_ends_with_what_is_kept_and_what_died(trained: Trained) -> None:
    log = next(trained.work_dir.glob('*/*.log')).read_text()
    line = [line for line in log.splitlines() if 'channels kept: ' in line][-1]
    pruner = trained.runner.model.gdp
    keep = pruner.channels() > 0
    for part in kept_by_part(pruner.analysis.groups, keep):
        assert f'{part.name} {part.kept / part.channels:.0%}' in line
    for part in dead_parts(pruner.analysis, keep) or ['removed parts: none']:
        assert part in line


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
    (ROW % (1, [0.5]), 'another training'),
    (ROW % (99, [0.5, 0.5, 0.5]), ''),
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
    openness = [0.5] * len(analysis.groups)
    path = tmp_path / 'gates.jsonl'
    path.write_text('\n'.join(ROW % (number, openness)
                              for number in (10, 20, 30)))
    figure = draw_record(path, analysis.groups, until=20)
    assert figure is not None
    image = figure.axes[0].images[0]
    assert image.get_array().shape == (len(analysis.groups), 2)
    assert image.get_extent()[1] == 20
