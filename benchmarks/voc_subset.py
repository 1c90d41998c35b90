"""DeepLabV3Plus-MobileNetV2 on a Pascal VOC 2012 subset: dense against gated.

Trains both for as long, from the same pretrained backbone and seed, exports
the gated one, and writes a report that ``benchmarks/results.py`` turns into
``docs/results.md``. Trainings that are done are not run again.

    python benchmarks/voc_subset.py --data-root .../VOCdevkit/VOC2012 \
        --weights .../mobilenet_v2.pth --report docs/reports/voc_subset.json
"""
from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from mmengine.config import Config

from gdp_mmseg.report import write_json

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = dict(
    dense=ROOT / 'benchmarks/configs/voc_subset.py',
    gdp=ROOT / 'benchmarks/configs/gdp_voc_subset.py')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        '--data-root',
        type=Path,
        required=True,
        help='folder with JPEGImages, SegmentationClass, '
        'SegmentationClassAug, ImageSets/Segmentation')
    parser.add_argument(
        '--weights',
        type=Path,
        required=True,
        help='ImageNet weights of the backbone, mmseg keys')
    parser.add_argument(
        '--work-dir', type=Path, default=Path('work_dirs/voc_subset'))
    parser.add_argument('--iterations', type=int, default=2000)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--report', type=Path, required=True)
    return parser.parse_args()


def options(args: argparse.Namespace) -> list[str]:
    """Command line settings that both trainings share."""
    root, iterations = args.data_root.resolve(), args.iterations
    return [
        '--cfg-options',
        f'train_dataloader.dataset.datasets.0.data_root={root}',
        f'train_dataloader.dataset.datasets.1.data_root={root}',
        f'val_dataloader.dataset.data_root={root}',
        f'test_dataloader.dataset.data_root={root}',
        'model.backbone.init_cfg.type=Pretrained',
        f'model.backbone.init_cfg.checkpoint={args.weights.resolve()}',
        f'train_cfg.max_iters={iterations}',
        f'train_cfg.val_interval={iterations}',
        f'param_scheduler.0.end={iterations}',
        f'default_hooks.checkpoint.interval={iterations}',
        f'randomness.seed={args.seed}'
    ]


def run(*command: Any) -> None:
    """Run one of our tools; its failure is ours."""
    print('$ python', *command, flush=True)
    subprocess.run([sys.executable, '-W', 'ignore', *map(str, command)],
                   cwd=ROOT,
                   check=True)


def last_metrics(work_dir: Path) -> dict[str, float]:
    """What the training's last evaluation logged."""
    for scalars in sorted(work_dir.glob('*/vis_data/scalars.json'))[::-1]:
        rows = [json.loads(line) for line in scalars.read_text().splitlines()]
        rows = [row for row in rows if 'mIoU' in row]
        if rows:
            return rows[-1]
    raise ValueError(f'expected a finished training in {work_dir}, but its '
                     'logs hold no mIoU; delete the folder and run again')


def main() -> None:
    args = parse_args()
    folder = args.work_dir.resolve()
    last = f'iter_{args.iterations}.pth'
    for name, config in CONFIGS.items():
        if not (folder / name / last).exists():
            run('tools/train.py', config, '--work-dir', folder / name,
                *options(args))
    if not (folder / 'export' / 'report.json').exists():
        run('tools/export.py', CONFIGS['gdp'], folder / 'gdp' / last,
            '--out-dir', folder / 'export', *options(args))
    report = json.loads((folder / 'export' / 'report.json').read_text())
    cfg = Config.fromfile(CONFIGS['gdp'])
    lists = {
        name:
        len((args.data_root / 'ImageSets/Segmentation' /
             f'{name}.txt').read_text().split())
        for name in ('train', 'aug', 'val')
    }
    report.update(
        miou_dense=last_metrics(folder / 'dense')['mIoU'],
        title='DeepLabV3Plus-MobileNetV2, Pascal VOC 2012 subset',
        train=f'train.txt ({lists["train"]}) and aug.txt ({lists["aug"]}) of '
        'the subset',
        test=f'val.txt of the subset ({lists["val"]} images), short side 257',
        crop=list(cfg.crop_size),
        batch_size=cfg.train_dataloader.batch_size,
        iterations=args.iterations,
        seeds=[args.seed],
        precision='bfloat16 autocast in training, float32 in evaluation',
        machine=f'{platform.machine()}, {report["device"]}, 2 cores')
    write_json(args.report, report)


if __name__ == '__main__':
    main()
