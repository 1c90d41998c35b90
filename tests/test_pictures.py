"""What the gates did: by part, in pictures, in the log and in the report."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from gdp_mmseg.analysis.analyse import analyse
from gdp_mmseg.analysis.liveness import kept_channels
from gdp_mmseg.analysis.structure import Analysis
from gdp_mmseg.report.plots import draw_path, draw_widths, pixels
from gdp_mmseg.report.summary import dead_parts, kept_by_part, part_of

from project import Exported, Project, Trained, train
from toys import SHAPE, Net, block, branch, last, run

pytest_plugins = ['project']

WHITE = 255


class Stages(nn.Sequential):
    """A stem and two stages of a residual block each, as in a backbone."""

    def __init__(self) -> None:

        def residual(net: Any, x: Tensor) -> Tensor:
            return net.down(x) + net.branch(x)

        def stage() -> Net:
            return Net(
                residual, down=nn.Conv2d(6, 6, 1), branch=branch(6, 4, 6))

        super().__init__()
        self.backbone = nn.Sequential()
        self.backbone.stem = block(3, 6)
        self.backbone.layer1 = stage()
        self.backbone.layer2 = stage()
        self.head = last(6)


def network(*closed: str) -> tuple[Analysis, Tensor]:
    """Its groups, and which channels stay if what these write is closed."""
    analysis = analyse(Stages(), SHAPE, run)
    openness = torch.ones(analysis.num_gates)
    for group in analysis.groups:
        if any(name in closed for name in group.writers):
            openness[group.gates] = 0
    return analysis, kept_channels(analysis, openness)


@pytest.mark.parametrize('module, stage', [
    ('backbone.layer3.5.conv2', 'backbone.layer3'),
    ('backbone.stem.0', 'backbone.stem'),
    ('backbone.layers.11.ffn.layers.0.0', 'backbone.layers.11'),
    ('backbone.stages.1.0.pointwise_conv1', 'backbone.stages.1'),
    ('decode_head.aspp_modules.1.depthwise_conv.conv',
     'decode_head.aspp_modules'),
    ('auxiliary_head.0.convs.0.conv', 'auxiliary_head.0'),
    ('3', '3'),
])
def test_stage_is_a_part_of_a_part(module: str, stage: str) -> None:
    assert part_of(module) == stage


def test_channels_are_counted_by_stage() -> None:
    analysis, keep = network('backbone.layer1.branch.0')
    found = [(part.name, part.channels, part.kept)
             for part in kept_by_part(analysis.groups, keep)]
    assert found == [('backbone.stem', 6, 6), ('backbone.layer1', 10, 6),
                     ('backbone.layer2', 10, 10)]


@pytest.mark.parametrize('closed, dead', [
    ([], []),
    (['backbone.layer1.branch.0'], ['backbone.layer1.branch']),
    (['backbone.layer1.branch.0', 'backbone.layer2.branch.0'
      ], ['backbone.layer1.branch', 'backbone.layer2.branch']),
    (['backbone.layer1.branch.3'], [
        'backbone.stem', 'backbone.layer1', 'backbone.layer2: down',
        'backbone.layer2.branch: 0'
    ]),
])
def test_largest_parts_that_died_are_named(closed: list[str],
                                           dead: list[str]) -> None:
    assert dead_parts(*network(*closed)) == dead


def is_drawn(image: np.ndarray) -> bool:
    return (image.ndim == 3 and image.shape[2] == 3 and image.dtype == np.uint8
            and 0.02 < float((image < WHITE).mean()) < 0.98)


@pytest.mark.parametrize('stages', [
    ['backbone.layer1'],
    ['backbone.layer1', 'head.a', 'backbone.layer1', 'head.a'],
    [f'backbone.layers.{index}' for index in range(40)],
])
@pytest.mark.parametrize('budget', [[], [1., 0.4]])
def test_pictures_have_pixels_and_names(stages: list[str],
                                        budget: list[float]) -> None:
    path = draw_path([10, 20], [[0.9] * len(stages), [0.1] * len(stages)],
                     stages, budget, budget)
    widths = draw_widths([0.5] * len(stages), stages, 'half of all')
    assert is_drawn(pixels(path)) and is_drawn(pixels(widths))
    names = list(dict.fromkeys(stages))
    labels = [text.get_text() for text in path.axes[0].get_yticklabels()]
    assert labels == names
    labels = [text.get_text() for text in widths.axes[0].get_xticklabels()]
    assert labels == names


@pytest.mark.parametrize('figure, axis', [('path', 'y'), ('widths', 'x')])
def test_names_do_not_cover_each_other(figure: str, axis: str) -> None:
    stages = ['backbone.layer1'] * 30 + [f'head.{index}' for index in range(6)]
    drawn = draw_path([1, 2], [[0.5] * 36] *
                      2, stages) if figure == 'path' else draw_widths(
                          [0.5] * 36, stages, '')
    pixels(drawn)
    labels = getattr(drawn.axes[0], f'get_{axis}ticklabels')()
    boxes = [label.get_window_extent() for label in labels]
    assert len(boxes) == 7
    assert not any(one.overlaps(other) for one, other in zip(boxes, boxes[1:]))


def test_drawing_leaves_pyplot_alone() -> None:
    pyplot = pytest.importorskip('matplotlib.pyplot')
    backend, figures = matplotlib.get_backend(), pyplot.get_fignums()
    pixels(draw_widths([0.5], ['backbone.layer1'], 'title'))
    assert matplotlib.get_backend() == backend
    assert pyplot.get_fignums() == figures


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
    for name in ('show_gates', 'tell_end'):
        monkeypatch.setattr(
            hook, name, lambda *_, name=name, **__: calls.append(name))
    for main in (False, True):
        monkeypatch.setattr(hook, 'is_main_process', lambda: main)
        hook.GDPHook().after_train(trained.runner)
        assert calls == ['show_gates', 'tell_end'] * main


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
    line = [line for line in log.splitlines() if 'GDP: asked for' in line][-1]
    pruner = trained.runner.model.gdp
    keep = pruner.channels() > 0
    for part in kept_by_part(pruner.analysis.groups, keep):
        assert f'{part.name} {part.kept / part.channels:.0%}' in line
    for part in dead_parts(pruner.analysis, keep) or ['died: nothing']:
        assert part in line


def test_report_shows_stages_and_deaths_and_the_path(exported: Exported,
                                                     trained: Trained) -> None:
    pruner = trained.runner.model.gdp
    report, text = exported.report, (exported.folder / 'report.md').read_text()
    keep = pruner.channels() > 0
    assert report['dead'] == dead_parts(pruner.analysis, keep)
    assert sum(part['kept'] for part in report['parts']) == int(keep.sum())
    assert 'backbone.layer1' in [part['name'] for part in report['parts']]
    for part in report['parts']:
        assert f'| {part["name"]} ' in text
    assert all(f'- {part}\n' in text for part in report['dead'])
    assert report['gates_picture'] == 'gates.png'
    assert '](gates.png)' in text
    assert is_drawn(
        np.asarray(Image.open(exported.folder / 'gates.png').convert('RGB')))


@pytest.mark.parametrize('record, said', [
    (None, ''),
    ('', ''),
    ('{"iter": 1, "fl', 'no picture of the gates'),
    ('{"iter": 1, "flops": 1.0, "openness": [0.5]}', 'another training'),
    ('{"iter": 99, "flops": 1.0, "openness": [0.5, 0.5, 0.5]}', ''),
])
def test_export_needs_no_record_of_the_gates(record: str | None, said: str,
                                             tmp_path: Path) -> None:
    from gdp_mmseg.export.export import draw_record
    groups, _ = network()
    path = tmp_path / 'gates.jsonl'
    if record is not None:
        path.write_text(record)
    lines: list[str] = []
    assert draw_record(tmp_path, path, groups, 10, lines.append) is None
    assert not (tmp_path / 'gates.png').exists()
    assert (said in lines[0]) if said else not lines


def test_path_until_the_checkpoint_is_drawn_also_without_a_budget(
        tmp_path: Path) -> None:
    from gdp_mmseg.engine.monitor import path_figure
    analysis, _ = network()
    rows = [
        dict(iter=number, flops=1., openness=[0.5] * len(analysis.groups))
        for number in (10, 20, 30)
    ]
    path = tmp_path / 'gates.jsonl'
    path.write_text('\n'.join(map(json.dumps, rows)))
    figure = path_figure(path, analysis.groups, until=20)
    assert figure is not None
    image = figure.axes[0].images[0]
    assert image.get_array().shape == (len(analysis.groups), 2)
    assert image.get_extent()[1] == 20
