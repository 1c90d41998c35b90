"""The picture of the demo: predictions side by side, gates over training."""
from __future__ import annotations

import contextlib
import io
import warnings
from pathlib import Path
from typing import Any, Sequence

from .data import PALETTE

IMAGES = 4


def draw(path: Path, data_root: Path,
         networks: Sequence[tuple[str, float | None, Path,
                                  Path]], gates: Path, target: float) -> None:
    """Draw predictions of some networks, and the openness of the gates.

    Args:
        path (Path): File of the picture.
        data_root (Path): Folder of the demo data.
        networks (Sequence[tuple]): Title, mIoU in percent, config and
            checkpoint of each network.
        gates (Path): Record ``gates.jsonl`` of the gated training.
        target (float): Share of the FLOPs to keep.
    """
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    import numpy as np
    import torch
    from PIL import Image

    from ..report.plots import plot_gates
    from ..report.record import read_rows
    names = (data_root / 'ImageSets/Segmentation/val.txt').read_text().split()
    names = names[::len(names) // IMAGES][:IMAGES]
    images = [str(data_root / 'JPEGImages' / f'{name}.jpg') for name in names]
    masks = [
        np.array(Image.open(data_root / 'SegmentationClass' / f'{name}.png'))
        for name in names
    ]
    columns: list[tuple[str, list[Any]]] = [
        ('input', [np.array(Image.open(image)) for image in images]),
        ('truth', masks)
    ]
    for title, miou, config, checkpoint in networks:
        if miou is not None:
            title += f'\nmIoU {miou:.1f}'
        columns.append((title, predict(config, checkpoint, images)))

    figure = plt.figure(figsize=(11, 6.2), layout='constrained')
    left, right = figure.subfigures(
        1, 2, squeeze=False, width_ratios=[1, 1.05])[0]
    _show(left.subplots(len(names), len(columns)), columns)
    rows = read_rows(gates)
    iterations = [row.iter for row in rows]
    upper, lower = right.subplots(2, 1, height_ratios=[1, 2])
    upper.plot(iterations, [row.flops for row in rows])
    upper.axhline(target, linestyle=':', color='grey')
    upper.set(xlim=(0, iterations[-1]), ylim=(0, 1.02), ylabel='FLOPs / dense')
    upper.set_title('FLOPs of the open channels, and the target', fontsize=10)
    plot_gates(
        torch.tensor([row.openness for row in rows]), iterations[-1], lower)
    figure.savefig(path, dpi=110)


def _show(grid: Any, columns: Sequence[tuple[str, list[Any]]]) -> None:
    """Show one picture in each cell of a grid, masks in their colours."""
    import numpy as np
    colours = np.full((256, 3), 255, np.uint8)
    colours[:len(PALETTE)] = PALETTE
    for column, (title, pictures) in enumerate(columns):
        for row, picture in enumerate(pictures):
            axes = grid[row][column]
            axes.imshow(picture if picture.ndim == 3 else colours[picture])
            axes.set_axis_off()
        grid[0][column].set_title(title, fontsize=10)


def predict(config: Path, checkpoint: Path, images: list[str]) -> list[Any]:
    """Predict the class of each pixel with mmseg's own API.

    Returns:
        list[Any]: An array ``(H, W)`` for each image.
    """
    import torch
    from mmseg.apis import inference_model, init_model

    # Several threads would spin while another process has the cores.
    torch.set_num_threads(1)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter('ignore')
        model = init_model(str(config), str(checkpoint), device='cpu')
        return [
            inference_model(model, image).pred_sem_seg.data[0].numpy()
            for image in images
        ]
