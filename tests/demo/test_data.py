"""The demo data: same bytes, VOC layout, classes told by outline alone."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from gdp_mmseg.demo import data as demo

SIZE = 64
COUNTS = {'train': 110, 'val': 70}
OBJECTS = range(1, len(demo.CLASSES))
Samples = tuple[NDArray[np.float64], NDArray[np.int64]]


@pytest.fixture(scope='module')
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of 64 x 64 images."""
    folder = tmp_path_factory.mktemp('demo') / 'shapes'
    demo.make_demo_data(folder, **COUNTS, size=SIZE, seed=0)
    return folder


def _make(root: Path, **changes: int) -> None:
    """Make a tiny set."""
    arguments = {'train': 2, 'val': 1, 'size': 48, 'seed': 3, **changes}
    demo.make_demo_data(root, **arguments)


def _digests(root: Path) -> dict[str, str]:
    """Return the hash of every file by its path below ``root``."""
    return {
        str(path.relative_to(root)):
        hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob('*')) if path.is_file()
    }


def _names(root: Path, split: str) -> list[str]:
    """Return the names that a split lists."""
    path = root / 'ImageSets' / 'Segmentation' / f'{split}.txt'
    return path.read_text().split()


def _labels(root: Path, name: str) -> NDArray[np.uint8]:
    """Return the labels of one image, (S, S)."""
    with Image.open(root / 'SegmentationClass' / f'{name}.png') as mask:
        return np.array(mask)


def _mean_colours(root: Path, split: str, painted: bool) -> Samples:
    """Return the mean colour, (N, 3), and class, (N,), of what is seen.

    Args:
        root (Path): the data set.
        split (str): which images.
        painted (bool): whether to take the colours of the mask in place of
            those of the picture.
    """
    colours, classes = [], []
    for name in _names(root, split):
        labels = _labels(root, name)
        with Image.open(root / 'JPEGImages' / f'{name}.jpg') as picture:
            pixels = np.array(picture, dtype=float)
        if painted:
            pixels = demo.voc_palette()[labels].astype(float)
        for label in set(np.unique(labels)) & set(OBJECTS):
            colours.append(pixels[labels == label].mean(axis=0))
            classes.append(label)
    return np.array(colours), np.array(classes)


def _accuracy(root: Path, painted: bool) -> tuple[float, int]:
    """Return how often the nearest mean colour names the class, and N."""
    colours, classes = _mean_colours(root, 'train', painted)
    means = np.stack([colours[classes == c].mean(axis=0) for c in OBJECTS])
    colours, classes = _mean_colours(root, 'val', painted)
    distance = np.linalg.norm(colours[:, None] - means, axis=2)
    guess = distance.argmin(axis=1) + 1
    return float((guess == classes).mean()), len(classes)


def test_same_arguments_give_same_bytes(tmp_path: Path) -> None:
    _make(tmp_path / 'a')
    _make(tmp_path / 'b')
    assert _digests(tmp_path / 'a') == _digests(tmp_path / 'b')


def test_another_seed_gives_other_images(tmp_path: Path) -> None:
    _make(tmp_path / 'a')
    _make(tmp_path / 'b', seed=4)
    one, other = _digests(tmp_path / 'a'), _digests(tmp_path / 'b')
    image = 'JPEGImages/train_00000.jpg'
    assert one.keys() == other.keys() and one[image] != other[image]


def test_larger_set_begins_with_the_smaller(tmp_path: Path) -> None:
    _make(tmp_path / 'a')
    _make(tmp_path / 'b', train=4)
    small, large = _digests(tmp_path / 'a'), _digests(tmp_path / 'b')
    shared = [path for path in small if path.endswith(('jpg', 'png'))]
    assert len(shared) == 6
    assert all(small[path] == large[path] for path in shared)


def test_no_image_is_in_both_splits(root: Path) -> None:
    by_split = [{(root / 'JPEGImages' / f'{name}.jpg').read_bytes()
                 for name in _names(root, split)} for split in COUNTS]
    assert [len(images) for images in by_split] == list(COUNTS.values())
    assert not by_split[0] & by_split[1]


def test_layout_is_that_of_voc(root: Path) -> None:
    names = _names(root, 'train') + _names(root, 'val')
    assert len(names) == len(set(names)) == sum(COUNTS.values())
    files = {f'JPEGImages/{name}.jpg' for name in names}
    files |= {f'SegmentationClass/{name}.png' for name in names}
    files |= {f'ImageSets/Segmentation/{split}.txt' for split in COUNTS}
    assert set(_digests(root)) == files | {'manifest.json'}


def test_images_and_masks_have_the_size_and_palette(root: Path) -> None:
    for name in _names(root, 'val'):
        with Image.open(root / 'JPEGImages' / f'{name}.jpg') as picture:
            assert (picture.mode, picture.size) == ('RGB', (SIZE, SIZE))
        with Image.open(root / 'SegmentationClass' / f'{name}.png') as mask:
            assert (mask.mode, mask.size) == ('P', (SIZE, SIZE))
            colours = np.array(mask.getpalette()).reshape(-1, 3)
        assert colours[:len(demo.CLASSES)].tolist() == demo.PALETTE


def test_palette_is_that_of_voc() -> None:
    palette = demo.voc_palette()
    assert demo.PALETTE == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0]]
    assert palette[20].tolist() == [0, 64, 128]  # the last class of VOC
    assert palette[demo.BORDER].tolist() == [224, 224, 192]


def test_labels_are_classes_or_border_and_all_occur(root: Path) -> None:
    seen: set[int] = set()
    for name in _names(root, 'train') + _names(root, 'val'):
        found = set(np.unique(_labels(root, name)).tolist())
        assert found & set(OBJECTS), f'{name} shows no object'
        seen |= found
    assert seen == {*range(len(demo.CLASSES)), demo.BORDER}


def test_border_parts_every_two_classes(root: Path) -> None:
    for name in _names(root, 'val'):
        labels = _labels(root, name)
        for a, b in ((labels[1:], labels[:-1]), (labels[:,
                                                        1:], labels[:, :-1])):
            apart = a != b
            assert np.all((a == demo.BORDER)[apart]
                          | (b == demo.BORDER)[apart])


def test_shares_sum_to_one_and_no_class_is_rare(root: Path) -> None:
    shares = demo.pixel_shares(root)
    assert sum(shares.values()) == pytest.approx(1)
    objects = [shares[demo.CLASSES[c]] for c in OBJECTS]
    assert max(objects) < 3 * min(objects)
    assert sum(objects) > 0.15


def test_colour_suggests_a_class_and_does_not_tell(root: Path) -> None:
    accuracy, count = _accuracy(root, painted=False)
    chance = 1 / len(OBJECTS)
    # Four standard deviations of a guesser's hit rate.
    margin = 4 * (chance * (1 - chance) / count)**0.5
    assert count >= 100
    assert chance + margin < accuracy < 0.95


def test_colour_would_tell_if_classes_had_colours(root: Path) -> None:
    assert _accuracy(root, painted=True)[0] == 1.0


def test_second_run_does_nothing(tmp_path: Path,
                                 monkeypatch: pytest.MonkeyPatch) -> None:
    _make(tmp_path / 'set')
    before = _digests(tmp_path / 'set')
    monkeypatch.setattr(demo, 'draw', None)  # drawing again would raise
    _make(tmp_path / 'set')
    assert _digests(tmp_path / 'set') == before


def test_only_the_set_is_left_beside(tmp_path: Path) -> None:
    _make(tmp_path / 'deep' / 'set')
    assert [p.name for p in (tmp_path / 'deep').iterdir()] == ['set']


def test_failed_run_leaves_nothing(tmp_path: Path,
                                   monkeypatch: pytest.MonkeyPatch) -> None:

    def fail(*_: object) -> None:
        raise RuntimeError('disk full')

    monkeypatch.setattr(demo, 'draw', fail)
    with pytest.raises(RuntimeError, match='disk full'):
        _make(tmp_path / 'set')
    assert not list(tmp_path.iterdir())


def test_foreign_folder_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / 'mine.txt').write_text('precious')
    with pytest.raises(FileExistsError, match='expected .* but got no read'):
        _make(tmp_path)
    assert list(_digests(tmp_path)) == ['mine.txt']


@pytest.mark.parametrize('change', [{
    'train': 3
}, {
    'val': 2
}, {
    'size': 64
}, {
    'seed': 4
}])
def test_set_of_other_arguments_is_refused(tmp_path: Path,
                                           change: dict[str, int]) -> None:
    _make(tmp_path / 'set')
    with pytest.raises(FileExistsError, match='change `root`'):
        _make(tmp_path / 'set', **change)


def test_incomplete_set_is_refused(tmp_path: Path) -> None:
    _make(tmp_path / 'set')
    (tmp_path / 'set' / 'JPEGImages' / 'val_00000.jpg').unlink()
    with pytest.raises(FileExistsError, match='lacks 1 files'):
        _make(tmp_path / 'set')


@pytest.mark.parametrize('name, value', [('train', 0), ('val', 0),
                                         ('size', 31), ('seed', -1)])
def test_too_small_a_number_is_refused(tmp_path: Path, name: str,
                                       value: int) -> None:
    with pytest.raises(ValueError, match=f'{name}.*but got {value}'):
        _make(tmp_path / 'set', **{name: value})
    assert not list(tmp_path.iterdir())
