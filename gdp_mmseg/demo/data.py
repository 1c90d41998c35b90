"""A small semantic segmentation data set in Pascal VOC layout, for demos.

The same arguments give the same bytes (with the same releases of numpy and
Pillow).

    python -m gdp_mmseg.demo.data data/shapes --train 400 --val 80
"""
from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from .shapes import BORDER, CLASSES, Bytes, draw

MIN_SIZE = 32

_FORMAT = 'gdp_mmseg demo data, version 2'
_SPLITS = ('train', 'val')


def voc_palette() -> Bytes:
    """Return the colour map of Pascal VOC, (256, 3).

    Bit k of the three channels comes from the bits 3k, 3k+1 and 3k+2 of the
    index, most significant first (VOC devkit, ``VOClabelcolormap``).
    """
    index = np.arange(256)
    palette = np.zeros((256, 3), dtype=np.uint8)
    for bit in range(8):
        for channel in range(3):
            on = (index >> (3 * bit + channel)) & 1
            palette[:, channel] |= (on << (7 - bit)).astype(np.uint8)
    return palette


PALETTE: list[list[int]] = voc_palette()[:len(CLASSES)].tolist()


def make_demo_data(root: Path, *, train: int, val: int, size: int,
                   seed: int) -> None:
    """Write the data set to ``root``, unless it is there already.

    It is written to a folder beside ``root`` and then renamed, so that
    ``root`` never holds half a set. Image i of a split depends on ``seed``,
    ``size`` and i alone: a larger set begins with the smaller one.

    Args:
        root (Path): folder to make; its parents are made too.
        train (int): number of training images, at least 1.
        val (int): number of validation images, at least 1.
        size (int): side of the square images in pixels, at least 32.
        seed (int): seed of all random draws, at least 0.

    Raises:
        ValueError: if a number is below its least value.
        FileExistsError: if ``root`` exists and is not the complete set that
            these arguments make.
    """
    least = {'train': 1, 'val': 1, 'size': MIN_SIZE, 'seed': 0}
    manifest: dict[str, object] = {'format': _FORMAT}
    for name, value in zip(least, (train, val, size, seed)):
        if value < least[name]:
            raise ValueError(f'expected {name} of at least {least[name]}, '
                             f'but got {value}; change `{name}`')
        manifest[name] = value
    root = Path(root)
    names = {
        split: [f'{split}_{i:05d}' for i in range(count)]
        for split, count in zip(_SPLITS, (train, val))
    }
    if root.exists():
        _check_is(root, manifest, names)
        return
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
            prefix=f'.{root.name}-', dir=root.parent) as scratch:
        folder = Path(scratch) / 'set'
        _write(folder, names, size, seed)
        text = json.dumps(manifest, indent=2) + '\n'
        (folder / 'manifest.json').write_text(text)
        folder.rename(root)


def _files(root: Path, name: str) -> tuple[Path, Path]:
    """Return where the picture and the labels of one image lie."""
    return (root / 'JPEGImages' / f'{name}.jpg',
            root / 'SegmentationClass' / f'{name}.png')


def _list_file(root: Path, split: str) -> Path:
    """Return where the names of a split are listed."""
    return root / 'ImageSets' / 'Segmentation' / f'{split}.txt'


def _check_is(root: Path, manifest: dict[str, object],
              names: dict[str, list[str]]) -> None:
    """Raise FileExistsError unless ``root`` holds this very set."""
    try:
        found = json.loads((root / 'manifest.json').read_text())
    except (OSError, ValueError):
        found = 'no readable manifest.json'
    expected = [_list_file(root, split) for split in names]
    for split in names:
        for name in names[split]:
            expected.extend(_files(root, name))
    lacking = [path for path in expected if not path.is_file()]
    if found == manifest and lacking:
        found = f'a set that lacks {len(lacking)} files, such as {lacking[0]}'
    if found != manifest:
        raise FileExistsError(
            f'expected {root} to be absent or to hold the demo data '
            f'{manifest}, but got {found}; change `root`, or remove that '
            'folder')


def _write(root: Path, names: dict[str, list[str]], size: int,
           seed: int) -> None:
    """Draw and save every image of every split."""
    for folder in ('JPEGImages', 'SegmentationClass',
                   'ImageSets/Segmentation'):
        (root / folder).mkdir(parents=True)
    palette = voc_palette().ravel().tolist()
    for number, split in enumerate(names):
        for i, name in enumerate(names[split]):
            rng = np.random.default_rng([seed, number, i])
            pixels, labels = draw(rng, size)
            picture_file, label_file = _files(root, name)
            Image.fromarray(pixels).save(picture_file, quality=92)
            mask = Image.fromarray(labels)
            mask.putpalette(palette)
            mask.save(label_file)
        lines = ''.join(f'{name}\n' for name in names[split])
        _list_file(root, split).write_text(lines)


def pixel_shares(root: Path) -> dict[str, float]:
    """Return the share of all pixels per class, and of the border."""
    counts = np.zeros(256, dtype=np.int64)
    for path in sorted((root / 'SegmentationClass').glob('*.png')):
        with Image.open(path) as mask:
            counts += np.bincount(np.asarray(mask).ravel(), minlength=256)
    shares = counts / counts.sum()
    named = {name: float(shares[i]) for i, name in enumerate(CLASSES)}
    return {**named, 'border': float(shares[BORDER])}


def main() -> None:
    """Make the data set and print what share each class has."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or '').split('\n')[0])
    parser.add_argument('root', type=Path, help='folder to make')
    parser.add_argument('--train', type=int, default=400, help='images')
    parser.add_argument('--val', type=int, default=80, help='images')
    parser.add_argument('--size', type=int, default=128, help='side, pixels')
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    make_demo_data(
        args.root,
        train=args.train,
        val=args.val,
        size=args.size,
        seed=args.seed)
    for name, share in pixel_shares(args.root).items():
        print(f'{name:<12}{share:7.2%} of pixels')


if __name__ == '__main__':
    main()
