"""Predictions of a dense and a pruned network side by side, on test images.

    python benchmarks/predictions.py RUNS/dense-1.0-0 RUNS/gdp-0.4-0 \
        --report docs/reports/predictions_camvid.json

Both folders are runs of benchmarks/accuracy.py with the same data. Draws the
picture for docs/results.md, ``docs/predictions_camvid.png`` here, of images at
equal distances in the list of the test set.
"""
from __future__ import annotations

import argparse
import io
import json
from pathlib import Path
from typing import Any, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmseg.registry import DATASETS
from PIL import Image

from gdp_mmseg.demo.picture import predict
from gdp_mmseg.files import write_json, write_whole

from accuracy_tasks import TASKS

NUMBER = 4
# A palette of this length makes the file a third as large.
COLOURS = 256
Pictures = Sequence[tuple[str, Sequence[Any]]]


def parse_args() -> argparse.Namespace:
    """Parse the flags of the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('dense', type=Path, help='folder of a dense run')
    parser.add_argument('pruned', type=Path, help='folder of a run with gates')
    parser.add_argument('--images', type=int, default=NUMBER, help='how many')
    parser.add_argument(
        '--report',
        type=Path,
        required=True,
        help='file for what the picture shows; its name is that of the '
        'picture, in the folder above')
    args = parser.parse_args()
    for folder in (args.dense, args.pruned):
        if not (folder / 'result.json').exists():
            parser.error('expected the folder of a finished run of benchmarks/'
                         f'accuracy.py, with result.json, but got {folder}; '
                         'choose a finished run')
    if not (args.pruned / 'pair/gdp_pruned.py').exists():
        parser.error('expected a run with gates, with the folder pair, but '
                     f'got {args.pruned}; choose a run such as gdp-0.4-0')
    dense, pruned = (
        next((folder / 'training').glob('*.py')).stem
        for folder in (args.dense, args.pruned))
    if dense != pruned or TASKS[dense].scope != 'mmseg':
        parser.error('expected two runs on the same segmentation data, but '
                     f'got {dense} and {pruned}; choose two of one comparison')
    return args


def main() -> None:
    """Predict, draw the picture and write its report."""
    args = parse_args()
    dense, pruned = (
        json.loads((folder / 'result.json').read_text())
        for folder in (args.dense, args.pruned))
    config, = (args.dense / 'training').glob('*.py')
    task = TASKS[config.stem]
    cfg = Config.fromfile(config)
    init_default_scope(cfg.default_scope)
    dataset = DATASETS.build(cfg.test_dataloader.dataset)
    chosen = [
        dataset.get_data_info(index * len(dataset) // args.images)
        for index in range(args.images)
    ]
    images = [info['img_path'] for info in chosen]
    columns = [
        ('image', [*map(_read, images)]),
        ('label', [_read(info['seg_map_path']) for info in chosen]),
        (f'dense\n{task.metric_name} {dense["score"]:.1f}',
         predict(config,
                 args.dense / f'training/iter_{dense["iterations"]}.pth',
                 images)),
        (f'pruned, {pruned["macs"]:.0%} of the FLOPs\n{task.metric_name} '
         f'{pruned["score"]:.1f}',
         predict(args.pruned / 'pair/gdp_pruned.py',
                 args.pruned / 'pair/gdp_pruned.pth', images)),
    ]
    file = args.report.parent.parent / f'{args.report.stem}.png'
    write_whole(file, draw(columns, **dataset.metainfo))
    keys = ('method', 'target', 'seed', 'iterations', 'start_score', 'score')
    write_json(
        args.report,
        dict(
            title=task.title,
            metric=task.metric_name,
            test=task.test,
            images=[Path(image).stem for image in images],
            dense={key: dense[key]
                   for key in keys},
            pruned={key: pruned[key]
                    for key in keys}))
    print(f'wrote {file}')


def _read(path: str) -> Any:
    """Read an image ``(H, W, 3)`` or the classes of its pixels ``(H, W)``."""
    return np.array(Image.open(path))


def draw(columns: Pictures, classes: Sequence[str],
         palette: Sequence[Sequence[int]], **_: Any) -> bytes:
    """Draw columns of pictures and a legend of the classes.

    Args:
        columns (Pictures): Title of each column, and its pictures: images
            ``(H, W, 3)`` or classes ``(H, W)``.
        classes (Sequence[str]): Names of the classes.
        palette (Sequence[Sequence[int]]): Their colours.

    Returns:
        bytes: Content of a PNG file.
    """
    colours = np.full((256, 3), 255, np.uint8)  # white: not labelled
    colours[:len(palette)] = palette
    height, width = columns[0][1][0].shape[:2]
    rows = len(columns[0][1])
    figure = Figure(
        figsize=(10, 2.5 * height / width * rows + 1.2), layout='constrained')
    grid = figure.subplots(rows, len(columns), squeeze=False)
    for column, (title, pictures) in enumerate(columns):
        grid[0, column].set_title(title, fontsize=10)
        for axes, picture in zip(grid[:, column], pictures):
            axes.imshow(picture if picture.ndim == 3 else colours[picture])
            axes.set_axis_off()
    figure.legend(
        handles=[
            Patch(facecolor=np.divide(colour, 255), label=name)
            for name, colour in zip(classes, palette)
        ] + [Patch(facecolor='w', edgecolor='grey', label='not labelled')],
        loc='outside lower center',
        ncols=6,
        fontsize=9)
    content = io.BytesIO()
    figure.savefig(content, dpi=100, format='png')
    small = io.BytesIO()
    Image.open(content).convert('RGB').quantize(COLOURS).save(
        small, 'PNG', optimize=True)
    return small.getvalue()


if __name__ == '__main__':
    main()
