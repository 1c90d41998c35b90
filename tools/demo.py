"""The whole path once, on drawn shapes: train, export, compare, on a CPU.

Draws a small data set, trains DeepLabV3Plus-ResNet50 dense and with gates for
as long, exports the pruned network and compares the three. Leaves
``report.json`` and ``report.png`` in the work folder. Every step is a command
that is printed and that works alone.
"""
from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from gdp_mmseg.cli.checks import load_config
from gdp_mmseg.cli.errors import fail, one_line_errors

from make_demo_data import PALETTE, make_demo_data

ROOT = Path(__file__).resolve().parents[1]
DENSE = ROOT / 'configs' / 'deeplabv3plus_demo.py'
GATED = ROOT / 'configs' / 'gdp_deeplabv3plus_demo.py'
# What the rest takes, in iterations of the dense training: an estimate for
# the time left, corrected by what is measured.
GATED_COST, AROUND = 1.1, 80


class Clock:
    """Prints how far the demo is, with the time left.

    Args:
        iterations (int): Of one training.
    """

    def __init__(self, iterations: int) -> None:
        self.iterations = iterations
        self.work = iterations * (1 + GATED_COST) + AROUND
        self.start = time.monotonic()

    def show(self, stage: str, done: float, text: str = '') -> None:
        """A line; ``done`` is in iterations of the dense training."""
        spent = time.monotonic() - self.start
        left = spent * (self.work - done) / done if done else 0
        remains = f'{left / 60:4.1f} min left' if done else ''
        print(f'[{stage:6}] {text:34} {remains}', flush=True)


def train(config: Path, work_dir: Path, clock: Clock, before: float,
          weight: float) -> None:
    """Run tools/train.py and show its progress.

    Args:
        config (Path): What to train.
        work_dir (Path): Gets log and checkpoint.
        clock (Clock): Prints.
        before (float): Work done before, in iterations of the dense training.
        weight (float): Work of one iteration.
    """
    stage = 'gated' if config == GATED else 'dense'
    log = run([
        'tools/train.py',
        str(config.relative_to(ROOT)), '--work-dir',
        str(work_dir)
    ], work_dir.with_suffix('.log'),
              lambda line: _show_iteration(line, stage, clock, before, weight))
    if not (work_dir / f'iter_{clock.iterations}.pth').exists():
        fail(f'expected tools/train.py to leave iter_{clock.iterations}.pth '
             f'in {work_dir}, but it is not there; read {log}')


def _show_iteration(line: str, stage: str, clock: Clock, before: float,
                    weight: float) -> None:
    found = re.search(r'Iter\(train\) \[ *(\d+)/(\d+)\].* loss: ([\d.]+)',
                      line)
    if found:
        flops = re.search(r'gdp_flops: ([\d.]+)', line)
        text = f'{found[1]:>4}/{found[2]}  loss {float(found[3]):.2f}'
        if flops:
            text += f'  FLOPs {float(flops[1]):.2f}'
        clock.show(stage, before + weight * int(found[1]), text)


def run(command: list[str], log: Path, see: Any) -> Path:
    """Run one of our tools, its output into a log, each line shown to see."""
    print('$ python ' + ' '.join(command), flush=True)
    with open(log, 'w') as file, subprocess.Popen(
        [sys.executable, '-W', 'ignore', *command],
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        for line in process.stdout:
            file.write(line)
            see(line.rstrip())
    if process.returncode:
        fail(f'expected {command[0]} to succeed, but it ended with status '
             f'{process.returncode}; read {log}')
    return log


def predict(config: Path, checkpoint: Path, images: list[str]) -> list[Any]:
    """Class of each pixel, ``(H, W)`` for each image, by mmseg's own API."""
    from mmseg.apis import inference_model, init_model
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter('ignore')
        model = init_model(str(config), str(checkpoint), device='cpu')
        return [
            inference_model(model, image).pred_sem_seg.data[0].numpy()
            for image in images
        ]


def draw(folder: Path, report: dict[str, Any], data_root: Path) -> None:
    """``report.png``: predictions side by side, the gates' path below."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    import numpy as np
    import torch
    from PIL import Image

    from gdp_mmseg.report.plots import plot_gates
    from gdp_mmseg.report.record import read_gates
    exported = folder / 'export' / f'{GATED.stem}_pruned'
    names = (data_root / 'ImageSets/Segmentation/val.txt').read_text().split()
    names = names[::len(names) // 4][:4]
    images = [str(data_root / 'JPEGImages' / f'{name}.jpg') for name in names]
    masks = [
        np.array(Image.open(data_root / 'SegmentationClass' / f'{name}.png'))
        for name in names
    ]
    columns: list[tuple[str, list[Any]]] = [
        ('input', [np.array(Image.open(image)) for image in images]),
        ('truth', masks)
    ]
    networks = (('dense', DENSE, next((folder / 'dense').glob('iter_*.pth'))),
                ('pruned', exported.with_suffix('.py'),
                 exported.with_suffix('.pth')))
    for title, config, checkpoint in networks:
        columns.append((title, predict(config, checkpoint, images)))
    colours = np.full((256, 3), 255, np.uint8)
    colours[:len(PALETTE)] = PALETTE

    figure = plt.figure(figsize=(11, 6.2), layout='constrained')
    left, right = figure.subfigures(
        1, 2, squeeze=False, width_ratios=[1, 1.05])[0]
    grid = left.subplots(len(names), len(columns))
    for row in range(len(names)):
        for column, (title, pictures) in enumerate(columns):
            axes = grid[row][column]
            picture = pictures[row]
            axes.imshow(picture if picture.ndim == 3 else colours[picture])
            axes.set_axis_off()
            if row == 0:
                miou = report.get(f'miou_{title}')
                axes.set_title(
                    title if miou is None else f'{title}\nmIoU {miou:.1f}',
                    fontsize=10)
    iterations, flops, openness = read_gates(folder / 'gdp' / 'gates.jsonl')
    upper, lower = right.subplots(2, 1, height_ratios=[1, 2])
    upper.plot(iterations, flops)
    upper.axhline(report['target'], linestyle=':', color='grey')
    upper.set(xlim=(0, iterations[-1]), ylim=(0, 1.02), ylabel='FLOPs / dense')
    upper.set_title('whole channels left, and the target', fontsize=10)
    plot_gates(torch.tensor(openness), iterations[-1], lower)
    figure.savefig(folder / 'report.png', dpi=110)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        '--work-dir', type=Path, default=Path('work_dirs/demo'))
    return parser.parse_args()


@one_line_errors()
def main() -> None:
    args = parse_args()
    from gdp_mmseg.files import write_json
    from gdp_mmseg.report.record import last_miou
    from gdp_mmseg.report.tables import comparison
    folder = args.work_dir.resolve()
    cfg = load_config(str(GATED))
    iterations = cfg.train_cfg.max_iters
    data_root = ROOT / cfg.train_dataloader.dataset.data_root
    clock = Clock(iterations)
    folder.mkdir(parents=True, exist_ok=True)
    # What an earlier demo left, by name: never more than that.
    for name in ('dense', 'gdp', 'export'):
        shutil.rmtree(folder / name, ignore_errors=True)
    clock.show('data', 0, 'drawing shapes')
    make_demo_data(data_root, train=600, val=160, size=128, seed=0)
    train(DENSE, folder / 'dense', clock, AROUND / 3, 1)
    train(GATED, folder / 'gdp', clock, AROUND / 3 + iterations, GATED_COST)
    run([
        'tools/export.py',
        str(GATED.relative_to(ROOT)),
        str(folder / 'gdp' / f'iter_{iterations}.pth'), '--out-dir',
        str(folder / 'export')
    ], folder / 'export.log',
        lambda line: clock.show('export', clock.work - AROUND / 3, line)
        if line.startswith(('comparing', 'evaluating')) else None)
    report = json.loads((folder / 'export' / 'report.json').read_text())
    report.update(
        miou_dense=last_miou(folder / 'dense'),
        title='DeepLabV3Plus-ResNet50 on drawn shapes',
        train='600 drawn images of 128 x 128, 3 classes, seed 0',
        test='160 drawn images of 128 x 128',
        crop=list(cfg.crop_size),
        batch_size=cfg.train_dataloader.batch_size,
        iterations=iterations,
        seeds=[cfg.randomness.seed],
        precision='bfloat16 autocast in training, float32 in evaluation',
        machine=f'{platform.machine()}, {os.cpu_count()} CPU cores')
    write_json(folder / 'report.json', report)
    clock.show('report', clock.work, 'drawing report.png')
    draw(folder, report, data_root)
    print()
    print(comparison(report))
    print(f'\nFLOPs left: {report["macs_pruned"] / report["macs_dense"]:.3f} '
          f'(asked for {report["target"]}); gated and pruned outputs differ '
          f'by {report["max_rel_diff"]:.0e} of the largest\n'
          f'{folder / "report.json"}\n{folder / "report.png"}')


if __name__ == '__main__':
    main()
