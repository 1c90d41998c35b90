"""Pictures of the gates: pixels, names, and nothing of pyplot."""
from __future__ import annotations

import matplotlib
import pytest

from gdp_mmseg.report.plots import draw_path, draw_widths, pixels

from helpers.stages import is_drawn


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
