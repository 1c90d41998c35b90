"""Data checks refuse what is known to be missing, and nothing else."""
from __future__ import annotations

from pathlib import Path
from typing import Any, Iterator

import pytest

pytest.importorskip('mmseg')

from mmcv.transforms import BaseTransform, LoadImageFromFile
from mmengine.config import Config
from mmengine.registry import DATASETS, TRANSFORMS
from mmseg.datasets import BaseSegDataset
from torch.utils.data import Dataset

from gdp_mmseg.cli.data_checks import check_paths
from gdp_mmseg.cli.errors import one_line_errors

LOAD = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations')]


class PlainDataset(Dataset):
    """A dataset with none of mmengine's methods."""

    def __init__(self, ann_file: str) -> None:
        self.names = Path(ann_file).read_text().split()

    def __len__(self) -> int:
        return len(self.names)


class VolumeDataset(BaseSegDataset):
    """Slices of one file with paths such as ``file::number``."""

    def load_data_list(self) -> list[dict]:
        return [dict(img_path='all.npz::0', seg_map_path='all.npz::0')]


class MountedDataset(BaseSegDataset):
    """A dataset that raises an error of the type of a wrong setting."""

    def load_data_list(self) -> list[dict]:
        raise ValueError('the share is not mounted')


class LoadSlice(BaseTransform):
    """A reader of paths that are no files."""

    def transform(self, results: dict) -> dict:
        return results


class LoadRaw(LoadImageFromFile):
    """A reader of images that a user wrote."""


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """Register the classes above by their names."""
    kinds = {
        DATASETS: (PlainDataset, VolumeDataset, MountedDataset),
        TRANSFORMS: (LoadSlice, LoadRaw)
    }
    for registry, classes in kinds.items():
        for kind in classes:
            registry.register_module(module=kind, force=True)
    yield
    for registry, classes in kinds.items():
        for kind in classes:
            registry.module_dict.pop(kind.__name__)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with a list of one image, its image and its label map."""
    for folder, suffix in (('images', 'jpg'), ('masks', 'png')):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f'a.{suffix}').touch()
    (tmp_path / 'train.txt').write_text('a\n')
    return tmp_path


def segments(root: Path, **changes: Any) -> dict[str, Any]:
    """A dataset in VOC layout, with changes."""
    return dict(
        dict(
            type='BaseSegDataset',
            data_root=str(root),
            ann_file='train.txt',
            img_suffix='.jpg',
            seg_map_suffix='.png',
            data_prefix=dict(img_path='images', seg_map_path='masks'),
            pipeline=LOAD), **changes)


def classes(root: Path, **changes: Any) -> dict[str, Any]:
    """mmpretrain's dataset of labelled images, with changes."""
    pytest.importorskip('mmpretrain')
    return dict(
        dict(
            type='mmpretrain.CustomDataset',
            data_root=str(root),
            ann_file='',
            data_prefix='images',
            with_label=False,
            pipeline=[dict(type='LoadImageFromFile')]), **changes)


def check(dataset: Any, scope: str = 'mmseg') -> None:
    check_paths(
        Config(
            dict(default_scope=scope, train_dataloader=dict(dataset=dataset))),
        ['train'])


def refusal(dataset: Any, capsys: pytest.CaptureFixture[str]) -> str:
    """Return the message of the check for a dataset that it refuses."""
    with pytest.raises(SystemExit):
        check(dataset)
    return capsys.readouterr().err


def test_prefix_may_be_a_string(root: Path,
                                capsys: pytest.CaptureFixture[str]) -> None:
    check(classes(root))
    said = refusal(classes(root, data_prefix='gone'), capsys)
    assert 'train_dataloader.dataset.data_prefix=' in said and 'gone' in said


def test_folders_may_be_path_objects(
        root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = dict(img_path=Path('images'), seg_map_path=Path('masks'))
    check(segments(root, data_root=root, data_prefix=folders))
    said = refusal(
        segments(
            root,
            data_root=root,
            data_prefix=dict(folders, img_path=Path('gone'))), capsys)
    assert 'data_prefix.img_path' in said and str(root / 'gone') in said


@pytest.mark.parametrize('download', [{}, dict(download=True)])
def test_dataset_that_downloads_itself_needs_no_folder(download: dict[str,
                                                                      Any],
                                                       tmp_path: Path) -> None:
    pytest.importorskip('mmpretrain')
    check(
        dict(
            type='mmpretrain.CIFAR10',
            data_root=str(tmp_path / 'cifar10'),
            split='train',
            pipeline=[],
            **download))
    assert list(tmp_path.iterdir()) == []


def test_dataset_that_may_not_download_needs_its_folder(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip('mmpretrain')
    said = refusal(
        dict(
            type='mmpretrain.CIFAR10',
            data_root=str(tmp_path / 'cifar10'),
            split='train',
            pipeline=[],
            download=False), capsys)
    assert 'data_root=' in said and str(tmp_path / 'cifar10') in said


def test_folders_of_classes_need_images(
        root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labelled = classes(root, data_prefix='classes', with_label=True)
    folder = root / 'classes/cat'
    folder.mkdir(parents=True)
    assert 'expected images in train_dataloader.dataset' in refusal(
        labelled, capsys)
    (folder / 'a.jpg').touch()
    check(labelled)


def test_split_of_a_dataset_needs_its_folder(
        root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip('mmpretrain')
    imagenet = dict(
        type='mmpretrain.ImageNet',
        data_root=str(root),
        split='train',
        pipeline=[dict(type='LoadImageFromFile')])
    assert f'got no {root / "train"}; add it' in refusal(imagenet, capsys)


def test_plain_dataset_is_not_asked_for_data_infos(root: Path) -> None:
    check(dict(type='PlainDataset', ann_file=str(root / 'train.txt')))
    check(dict(type=PlainDataset, ann_file=str(root / 'train.txt')))


def test_images_inside_one_file_are_not_looked_for(root: Path) -> None:
    check(
        segments(
            root, type='VolumeDataset', pipeline=[dict(type='LoadSlice')]))


@pytest.mark.parametrize('step', [
    dict(type='LoadSlice'),
    dict(type='LoadRaw'),
    dict(type='LoadImageFromFile', backend_args=dict(backend='lmdb')),
])
def test_images_that_an_unknown_reader_reads_are_not_looked_for(
        step: dict[str, Any], root: Path,
        capsys: pytest.CaptureFixture[str]) -> None:
    (root / 'images/a.jpg').unlink()
    check(segments(root, pipeline=[step]))
    assert 'a.jpg' in refusal(segments(root), capsys)


@pytest.mark.parametrize('kind', ['MountedDataset', 'NoSuchDataset'])
def test_errors_of_a_dataset_are_left_to_the_runner(kind: str,
                                                    root: Path) -> None:
    check(segments(root, type=kind))


def test_wrong_argument_of_a_known_dataset_is_left_to_the_runner(
        root: Path) -> None:
    check(segments(root, no_such_argument=1))


@pytest.mark.parametrize('name, gone', [('data_root', 'nowhere'),
                                        ('ann_file', 'nowhere.txt')])
def test_checks_can_be_switched_off(
        name: str, gone: str, root: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    wrong = segments(root, **{name: gone})
    said = refusal(wrong, capsys)
    assert f'{name}=' in said and 'GDP_CHECKS=0' in said
    monkeypatch.setenv('GDP_CHECKS', '0')
    check(wrong)


@pytest.mark.parametrize('loader', [None, [], object()])
def test_loaders_of_another_kind_are_not_checked(loader: Any) -> None:
    cfg = Config(dict(default_scope='mmseg'))
    cfg._cfg_dict['train_dataloader'] = loader
    check_paths(cfg, ['train'])


def test_built_dataset_is_not_checked(root: Path) -> None:
    cfg = Config(dict(default_scope='mmseg'))
    cfg._cfg_dict['train_dataloader'] = dict(
        dataset=PlainDataset(str(root / 'train.txt')))
    check_paths(cfg, ['train'])


def build_wrong(root: Path, **changes: Any) -> None:
    """Build a dataset as a runner does, with the command line around it."""
    with one_line_errors():
        DATASETS.build(segments(root, **changes))


def test_error_of_a_dataset_is_one_line(
        root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_wrong(root, type='MountedDataset')
    said = capsys.readouterr().err
    assert said.count('\n') == 1 and 'but got' in said
    assert 'MountedDataset' in said and 'the share is not mounted' in said


def test_bug_in_a_dataset_keeps_its_traceback(
        root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError):
        build_wrong(root, no_such_argument=1)
    monkeypatch.setenv('GDP_DEBUG', '1')
    with pytest.raises(ValueError, match='not mounted'):
        build_wrong(root, type='MountedDataset')


@pytest.mark.parametrize('module, ours', [('gdp_mmseg.engine.hook', True),
                                          ('gdp_mmseg_tools.hook', False),
                                          ('somewhere.else', False)])
def test_error_is_ours_by_its_module_wherever_it_is_installed(
        module: str, ours: bool, capsys: pytest.CaptureFixture[str]) -> None:
    namespace = dict(__name__=module)
    exec("def fail():\n    raise ValueError('expected 1, but got 2')",
         namespace)
    fail: Any = namespace['fail']
    with pytest.raises(SystemExit if ours else ValueError), one_line_errors():
        fail()
    assert ('expected 1, but got 2' in capsys.readouterr().err) is ours
