"""Pictures of the gates: pixels, names, and nothing of pyplot."""
from __future__ import annotations

import matplotlib
import pytest
import torch
from torch import Tensor

from gdp_mmseg.analysis.structure import Group
from gdp_mmseg.report.plots import draw_path, draw_shares, draw_widths, pixels

from helpers.stages import is_drawn


def half_kept(stages: list[str]) -> tuple[list[Group], Tensor]:
    """Groups of two channels in each of some stages, and half of them."""
    groups = [
        Group(
            torch.tensor([2 * index, 2 * index + 1]),
            (f'{stage}.conv_' + 'x' * index, ), (), True)
        for index, stage in enumerate(stages)
    ]
    return groups, torch.arange(2 * len(stages)) % 2 > 0


@pytest.mark.parametrize('stages', [
    ['backbone.layer1'],
    ['backbone.layer1', 'backbone.layer2', 'backbone.layer1', 'head.a'],
    [f'backbone.layers.{index}' for index in range(12)],
])
@pytest.mark.parametrize('budget', [[], [1., 0.4]])
def test_pictures_have_pixels_and_names(stages: list[str],
                                        budget: list[float]) -> None:
    path = draw_path([10, 20], [[0.9] * len(stages), [0.1] * len(stages)],
                     stages, budget, budget)
    widths = draw_widths(*half_kept(stages), 'half of all')
    assert is_drawn(pixels(path)) and is_drawn(pixels(widths))
    names = list(dict.fromkeys(stages))
    labels = [text.get_text() for text in path.axes[0].get_yticklabels()]
    assert labels == names
    labels = [text.get_text() for text in widths.axes[0].get_xticklabels()]
    assert labels == [f'{name}  50%' for name in names]


@pytest.mark.parametrize('figure, axis', [('path', 'y'), ('widths', 'x')])
def test_names_do_not_cover_each_other(figure: str, axis: str) -> None:
    stages = ['backbone.layer1'] * 30 + [f'head.{index}' for index in range(6)]
    drawn = draw_path([1, 2], [[0.5] * 36] *
                      2, stages) if figure == 'path' else draw_widths(
                          *half_kept(stages), '')
    pixels(drawn)
    labels = getattr(drawn.axes[0], f'get_{axis}ticklabels')()
    boxes = [label.get_window_extent() for label in labels]
    assert len(boxes) == 7
    assert not any(one.overlaps(other) for one, other in zip(boxes, boxes[1:]))


def test_line_of_a_part_is_weighted_by_channels() -> None:
    """A group of 90 channels keeps a third, one of 10 all of them."""
    groups = [
        Group(torch.arange(90), ('layer1.0', ), (), True),
        Group(torch.arange(90, 100), ('layer1.1', ), (), True),
        Group(torch.arange(100, 110), ('layer2.0', ), (), True)
    ]
    axes, = draw_widths(groups, torch.arange(110) >= 60, '').axes
    heights = [one.get_height() for one in axes.patches]
    assert heights == pytest.approx([1 / 3, 1, 1])
    lines = [one.get_segments()[0][0][1] for one in axes.collections]
    assert lines == pytest.approx([0.4, 1])
    labels = [text.get_text() for text in axes.get_xticklabels()]
    assert labels == ['layer1  40%', 'layer2  100%']


def test_drawing_leaves_pyplot_alone() -> None:
    pyplot = pytest.importorskip('matplotlib.pyplot')
    backend, figures = matplotlib.get_backend(), pyplot.get_fignums()
    pixels(draw_widths(*half_kept(['backbone.layer1']), 'title'))
    assert matplotlib.get_backend() == backend
    assert pyplot.get_fignums() == figures


def test_shares_are_bars_as_long_as_they_are() -> None:
    shares = {'FLOPs': 0.4, 'latency, torch': 1.25}
    axes = draw_shares(shares, 'title').axes[0]
    assert [bar.get_width() for bar in axes.patches] == [0.4, 1.25]
    assert [text.get_text() for text in axes.get_yticklabels()] == [*shares]
    assert axes.get_xlim()[1] > 1.25
