"""Whatever is wrong: one line that says what to change, nothing written."""
from __future__ import annotations

import dataclasses
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable

import pytest

pytest.importorskip('mmseg')

import numpy as np
import torch
from mmengine.config import Config
from mmengine.runner import Runner
from PIL import Image

from helpers import TOOLS
from helpers.project import (NAME, Exported, Outcome, Project, Trained,
                             nothing_to_prune, run_tool, tree, unet)


@dataclasses.dataclass(frozen=True)
class World:
    """What a case can build its command line of.

    Args:
        project (Project): Configs and data, as they should be.
        trained (Trained): A gated training.
        dense (Path): Checkpoint of a dense one.
        exported (Exported): What was made of the gated one.
        folder (Path): Of this case; what it writes before is compared with
            what is there after.
    """
    project: Project
    trained: Trained
    dense: Path
    exported: Exported
    folder: Path

    @property
    def out(self) -> Path:
        return self.folder / 'out'

    def export(self,
               *options: object,
               config: Path | None = None,
               checkpoint: Path | None = None) -> list[object]:
        """Arguments of tools/export.py."""
        return [
            config or self.trained.config, checkpoint
            or self.trained.checkpoint, '--out-dir', self.out, *options
        ]

    def test(self,
             *options: object,
             config: Path | None = None,
             checkpoint: Path | None = None) -> list[object]:
        """Arguments of tools/test.py."""
        return [
            config or self.trained.config, checkpoint
            or self.trained.checkpoint, '--work-dir', self.out, *options
        ]

    def train(self,
              *options: object,
              config: Path | None = None) -> list[object]:
        """Arguments of tools/train.py."""
        return [config or self.project.gated, '--work-dir', self.out, *options]

    def set(self, **options: object) -> list[object]:
        """--cfg-options, with __ for a dot."""
        return ['--cfg-options'] + [
            f'{key.replace("__", ".")}={value}'
            for key, value in options.items()
        ]

    def file(self, name: str, content: bytes) -> Path:
        path = self.folder / name
        path.write_bytes(content)
        return path

    def config(self, change: Callable[[Any], dict[str, Any]]) -> Path:
        """The gated config with another model."""
        cfg = self.project.load(self.folder)
        content = cfg.to_dict()
        content['model'] = change(content['model'])
        content.pop('work_dir')
        path = self.folder / 'other.py'
        path.write_text('\n'.join(f'{key} = {value!r}'
                                  for key, value in content.items()))
        return path

    def data(self,
             change: Callable[[Path, str], None],
             split: str = 'train') -> list[object]:
        """--cfg-options for data of which one image of a split is changed.

        Args:
            change (Callable[[Path, str], None]): Gets the data's folder and
                the name of the image.
            split (str): Of the image.
        """
        data = self.folder / 'data'
        shutil.copytree(self.project.folder / 'data', data)
        change(data, self.project.images(split)[0].stem)
        loader = 'train' if split == 'train' else 'test'
        options = {f'{loader}_dataloader__dataset__data_root': data}
        # All in one batch.
        if split == 'train':
            options['train_dataloader__batch_size'] = 8
        return self.set(**options)

    def changed(self, path: Path, edit: Callable[[Any], Any]) -> Path:
        """A copy of a checkpoint with another content."""
        content = torch.load(path, map_location='cpu', weights_only=False)
        edit(content)
        return self.saved(content)

    def saved(self, content: object) -> Path:
        torch.save(content, self.folder / 'c.pth')
        return self.folder / 'c.pth'

    def flipped(self, path: Path) -> Path:
        """A copy of a file with one bit changed, in the middle."""
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        return self.file('c.pth', bytes(content))

    def halved(self, path: Path) -> Path:
        """The first half of a file."""
        content = path.read_bytes()
        return self.file('c.pth', content[:len(content) // 2])

    def moved(self) -> Path:
        """The exported config, without its checkpoint."""
        return self.file('pruned.py', self.exported.config.read_bytes())

    def widths(self, change: Callable[[int], int]) -> Path:
        """The exported config with another number of inputs of one layer."""
        cfg = Config.fromfile(self.exported.config)
        width = next(width for width in cfg.model.gdp.widths.values()
                     if len(width) == 2 and width[1] > 1)
        width[1] = change(width[1])
        cfg.dump(self.folder / 'pruned.py')
        return self.folder / 'pruned.py'

    def interrupted(self, *files: tuple[str, bytes]) -> list[object]:
        """--resume in a work folder with these files."""
        self.out.mkdir()
        for name, content in files:
            (self.out / name).write_bytes(content)
        (self.out / 'last_checkpoint').write_text(str(self.out / 'iter_8.pth'))
        return self.train('--resume')


@dataclasses.dataclass(frozen=True)
class Case:
    """A wrong input and what must be said of it.

    Args:
        tool (str): The command line.
        arguments (Callable[[World], list[object]]): What is passed to it.
        came (str): What came, as the message must name it.
        change (str): What to change, likewise.
    """
    tool: str
    arguments: Callable[[World], list[object]]
    came: str
    change: str


NO_DATA = {
    'train': dict(train_dataloader__dataset__data_root='/nowhere'),
    'test': dict(test_dataloader__dataset__data_root='/nowhere')
}
HOOK = dict(default_hooks__gdp__type='gdp_mmseg.GDPHook')

# What is done to the data, what comes of it, what to change.
SPOILED: dict[str, tuple[Any, str, str]] = {
    'a listed image':
    (lambda *at: _gone('JPEGImages', *at), '.jpg', 'ann_file'),
    'a label map':
    (lambda *at: _gone('SegmentationClass', *at), '.png', 'ann_file'),
    'any image in its list': (lambda *at: _emptied(*at), 'none', 'ann_file'),
}
NOT_THERE = {
    f'{tool} without {what}':
    Case(
        f'{tool}.py',
        lambda w, tool=tool, split=split, spoil=spoil: getattr(w, tool)
        (*w.data(spoil, split)),
        came,
        change)
    for what, (spoil, came, change) in SPOILED.items()
    for tool, split in (('train', 'train'), ('test', 'val'), ('export', 'val'))
}
BROKEN: dict[str, tuple[Callable[[World], Path], str]] = {
    'with a bit flipped':
    (lambda w: w.flipped(w.trained.checkpoint), 'damaged'),
    'that runs code':
    (lambda w: w.saved(dict(state_dict={}, bomb=Path('/'))), 'state_dict'),
}
DAMAGED = {
    f'{tool} a checkpoint {what}':
    Case(
        f'{tool}.py',
        lambda w, tool=tool, spoil=spoil: getattr(w, tool)
        (checkpoint=spoil(w)),
        'c.pth',
        change)
    for tool in ('test', 'export')
    for what, (spoil, change) in BROKEN.items()
}

CASES = {
    # Data.
    'train without data':
    Case('train.py', lambda w: w.train(*w.set(**NO_DATA['train'])), '/nowhere',
         'train_dataloader.dataset.data_root'),
    'test without data':
    Case('test.py', lambda w: w.test(*w.set(**NO_DATA['test'])), '/nowhere',
         'test_dataloader.dataset.data_root'),
    'export without data':
    Case('export.py', lambda w: w.export(*w.set(**NO_DATA['test'])),
         '/nowhere', 'test_dataloader.dataset.data_root'),
    'train with an unreadable image':
    Case('train.py', lambda w: w.train(*w.data(_no_image)), '.jpg', 'image'),
    'test with an unreadable image':
    Case('test.py', lambda w: w.test(*w.data(_no_image, 'val')), '.jpg',
         'image'),
    'export with an unreadable image':
    Case('export.py', lambda w: w.export(*w.data(_no_image, 'val')), '.jpg',
         'image'),
    **NOT_THERE,
    'train with a label that has no class':
    Case('train.py', lambda w: w.train(*w.data(_labelled(77))), '77',
         'num_classes'),
    'train without gates with a label that has no class':
    Case('train.py',
         lambda w: w.train(*w.data(_labelled(77)), config=w.project.dense),
         '77', 'num_classes'),
    'train with labels of another size':
    Case('train.py', lambda w: w.train(*w.data(_labelled(1, (32, 64)))),
         '[1, 32, 64]', 'size of its image'),
    'train with coloured labels':
    Case('train.py', lambda w: w.train(*w.data(_labelled(1, (64, 64, 3)))),
         '[64, 64, 3]', 'class numbers'),
    # Configs.
    **{
        f'{tool} without its config':
        Case(f'{tool}.py', arguments, 'nowhere.py', 'config')
        for tool, arguments in {
            'train': lambda w: w.train(config=w.folder / 'nowhere.py'),
            'test': lambda w: w.test(config=w.folder / 'nowhere.py'),
            'export': lambda w: w.export(config=w.folder / 'nowhere.py'),
            'groups': lambda w: [w.folder / 'nowhere.py'],
        }.items()
    },
    'train on a base that is not there':
    Case('train.py',
         lambda w: w.train(config=w.file('c.py', b"_base_ = './gone.py'")),
         'gone.py', '_base_'),
    'groups of a config without a model':
    Case('groups.py', lambda w: [w.file('c.py', b'lr = 1')], 'c.py', 'model'),
    # Checkpoints.
    'test without its checkpoint':
    Case('test.py', lambda w: w.test(checkpoint=w.folder / 'nowhere.pth'),
         'nowhere.pth', 'path'),
    'export without its checkpoint':
    Case('export.py', lambda w: w.export(checkpoint=w.folder / 'nowhere.pth'),
         'nowhere.pth', 'path'),
    'train from a checkpoint that is not there':
    Case('train.py', lambda w: w.train(*w.set(load_from='/nowhere.pth')),
         '/nowhere.pth', 'path'),
    'export a folder for a checkpoint':
    Case('export.py', lambda w: w.export(checkpoint=w.project.folder),
         'project', 'checkpoint'),
    'export a text file':
    Case('export.py',
         lambda w: w.export(checkpoint=w.file('c.pth', b'Dear diary,')),
         'c.pth', 'checkpoint'),
    'export an empty file':
    Case('export.py', lambda w: w.export(checkpoint=w.file('c.pth', b'')),
         'c.pth', 'checkpoint'),
    'export a truncated checkpoint':
    Case(
        'export.py', lambda w: w.export(
            checkpoint=w.file('c.pth',
                              w.trained.checkpoint.read_bytes()[:200_000])),
        'c.pth', 'truncated'),
    'export a tensor':
    Case('export.py', lambda w: w.export(checkpoint=w.saved(torch.ones(3))),
         'c.pth', 'checkpoint'),
    'export a checkpoint without gates':
    Case('export.py', lambda w: w.export(checkpoint=w.dense), 'none',
         'GDPModel'),
    'export a checkpoint of another model':
    Case('export.py', lambda w: w.export(config=w.config(_wider)),
         'of another shape', 'checkpoint'),
    'export with gates for --dense':
    Case('export.py', lambda w: w.export('--dense', w.trained.checkpoint),
         'with gates', 'the dense training'),
    'export with an export for --dense':
    Case('export.py', lambda w: w.export('--dense', w.exported.checkpoint),
         'of an export', 'the dense training'),
    'export with another model for --dense':
    Case(
        'export.py', lambda w: w.export(
            '--dense',
            w.changed(
                w.dense, lambda content: content['state_dict'].pop(
                    'decode_head.conv_seg.bias'))), '1 are missing',
        'the same training'),
    'export without the checkpoint of --dense':
    Case('export.py', lambda w: w.export('--dense', w.folder / 'nowhere.pth'),
         'nowhere.pth', 'pass'),
    'export with --dense and without an evaluation':
    Case('export.py', lambda w: w.export('--dense', w.dense, '--no-eval'),
         '--no-eval', 'leave one of the two out'),
    'export with the dense config':
    Case('export.py', lambda w: w.export(config=w.project.dense),
         'EncoderDecoder', 'config'),
    **DAMAGED,
    'test half a checkpoint':
    Case('test.py',
         lambda w: w.test(checkpoint=w.halved(w.trained.checkpoint)), 'c.pth',
         'truncated'),
    'train from half a checkpoint':
    Case('train.py',
         lambda w: w.train(*w.set(load_from=w.halved(w.trained.checkpoint))),
         'c.pth', 'truncated'),
    'test a checkpoint of something else':
    Case(
        'test.py', lambda w: w.test(
            checkpoint=w.saved(dict(state_dict=dict(embedding=torch.ones(2))))
        ), 'embedding', 'checkpoint'),
    'export gates of another analysis':
    Case(
        'export.py', lambda w: w.export(
            checkpoint=w.changed(w.trained.checkpoint, _other_groups)),
        'other channels', 'versions'),
    'train from gates of another analysis':
    Case(
        'train.py', lambda w: w.train(*w.set(
            load_from=w.changed(w.trained.checkpoint, _other_groups))),
        'other channels', 'load_from'),
    'train gates from an exported checkpoint':
    Case('train.py',
         lambda w: w.train(*w.set(load_from=w.exported.checkpoint)), 'export',
         'load_from'),
    'export an exported checkpoint':
    Case('export.py', lambda w: w.export(checkpoint=w.exported.checkpoint),
         'none', 'GDPModel'),
    'test an exported config with the gated checkpoint':
    Case('test.py', lambda w: w.test(config=w.exported.config), 'shape',
         'checkpoint'),
    'test an exported config with the dense checkpoint':
    Case('test.py',
         lambda w: w.test(config=w.exported.config, checkpoint=w.dense),
         'shape', 'checkpoint'),
    **{
        f'{tool} a plain model with {what} checkpoint':
        Case(f'{tool}.py', arguments, came, 'config')
        for what, came, path in (
            ('a gated', 'gates', lambda w: w.trained.checkpoint),
            ('an exported', 'exported', lambda w: w.exported.checkpoint),
        )
        for tool, arguments in {
            'test':
            lambda w, path=path: w.test(
                config=w.project.dense, checkpoint=path(w)),
            'train':
            lambda w, path=path: w.train(
                *w.set(load_from=path(w)), config=w.project.dense),
        }.items()
    },
    'test an exported checkpoint with other widths':
    Case(
        'test.py', lambda w: w.test(
            config=w.widths(lambda inputs: inputs - 1),
            checkpoint=w.exported.checkpoint), 'shape', 'export'),
    'test widths that are wider than the network':
    Case(
        'test.py', lambda w: w.test(
            config=w.widths(lambda inputs: 9999),
            checkpoint=w.exported.checkpoint), '9999', 'widths'),
    'test an exported checkpoint with other weights':
    Case(
        'test.py', lambda w: w.test(
            config=w.exported.config,
            checkpoint=w.changed(w.exported.checkpoint, _other_weight)),
        'SHA-256', 'export again'),
    'fine-tune from an exported checkpoint that is gone':
    Case('train.py', lambda w: w.train(config=w.moved()), 'pruned.pth',
         'path'),
    'resume from half a checkpoint alone':
    Case(
        'train.py', lambda w: w.interrupted(
            ('iter_8.pth', w.trained.checkpoint.read_bytes()[:200_000])),
        'iter_8.pth', '--resume'),
    'resume where all checkpoints are gone':
    Case('train.py', lambda w: w.interrupted(), 'missing', '--work-dir'),
    # Numbers.
    'train until the loss is not finite':
    Case(
        'train.py', lambda w: w.train(*w.set(
            optim_wrapper__optimizer__lr=1e30, default_hooks__gdp__patience=2)
                                      ), 'in a row', 'optim_wrapper'),
    # Settings of the gates.
    **{
        f'{tool} at target {goal}':
        Case(f'{tool}.py', arguments, goal, 'gdp.target')
        for goal in ('0', '0.0001', '1', '-0.4', '40')
        for tool, arguments in {
            'train':
            lambda w, goal=goal: w.train(*w.set(model__gdp__target=goal)),
            'groups':
            lambda w, goal=goal: [
                w.project.gated, *w.set(model__gdp__target=goal)
            ],
        }.items()
    },
    'train at a target below what cannot be pruned':
    Case(
        'train.py', lambda w: w.train(*w.set(
            model__gdp__target=0.002, model__gdp__min_keep_ratio=0.2)),
        '0.002', 'cannot be pruned'),
    'train with an unknown setting':
    Case('train.py', lambda w: w.train(*w.set(model__gdp__tagret=0.3)),
         'tagret', 'model.gdp'),
    'groups with an unknown setting':
    Case('groups.py',
         lambda w: [w.project.gated, *w.set(model__gdp__tagret=0.3)], 'tagret',
         'model.gdp'),
    'export with an unknown setting':
    Case('export.py', lambda w: w.export(*w.set(model__gdp__tagret=0.3)),
         'tagret', 'model.gdp'),
    'train with the hook and without gates':
    Case('train.py', lambda w: w.train(*w.set(**HOOK), config=w.project.dense),
         'EncoderDecoder', 'gdp_mmseg.GDPModel'),
    # Models.
    'train a model with nothing to prune':
    Case('train.py', lambda w: w.train(config=w.config(nothing_to_prune)),
         'none', 'prunable'),
    'groups of a model with nothing to prune':
    Case('groups.py', lambda w: [w.config(nothing_to_prune)], 'none',
         'prunable'),
    'train on inputs too small for the network':
    Case(
        'train.py', lambda w: w.train(
            *w.set(model__gdp__input_shape='8,8'), config=w.config(unet)),
        '8, 8', 'input_shape'),
    'groups on inputs too small for the network':
    Case('groups.py',
         lambda w: [w.config(unet), *w.set(model__gdp__input_shape='8,8')],
         '8, 8', 'input_shape'),
    # Output.
    'export into a folder that holds files':
    Case('export.py', lambda w: _occupied(w), 'holds files', '--out-dir'),
    'export onto a file':
    Case(
        'export.py', lambda w:
        [*w.export()[:2], '--out-dir',
         w.file('taken', b'years of work')], 'taken', '--out-dir'),
}


def _no_image(data: Path, name: str) -> None:
    (data / f'JPEGImages/{name}.jpg').write_bytes(b'no image')


def _gone(folder: str, data: Path, name: str) -> None:
    next((data / folder).glob(f'{name}.*')).unlink()


def _emptied(data: Path, name: str) -> None:
    for names in (data / 'ImageSets/Segmentation').iterdir():
        names.write_text('')


def _labelled(label: int, shape: tuple[int, ...] = (64, 64)) -> Any:
    """Change the labels to an array of this shape with one label."""

    def change(data: Path, name: str) -> None:
        pixels = np.full(shape, label, np.uint8)
        path = data / f'SegmentationClass/{name}.png'
        Image.fromarray(pixels).save(path)

    return change


def _other_groups(content: dict[str, Any]) -> None:
    content['meta']['gdp']['analysis']['gate_of_slot'][0][0] = 'other.weight'


def _other_weight(content: dict[str, Any]) -> None:
    content['state_dict']['decode_head.conv_seg.bias'][0] += 1


def _wider(model: dict[str, Any]) -> dict[str, Any]:
    head = dict(model['decode_head'], channels=48)
    return dict(model, decode_head=head)


def _occupied(world: World) -> list[object]:
    world.out.mkdir()
    (world.out / f'{NAME}_pruned.pth').write_bytes(b'an earlier export')
    return world.export()


@pytest.fixture(scope='session')
def dense(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the user's own model."""
    work_dir = tmp_path_factory.mktemp('dense')
    cfg = project.load(work_dir, project.dense)
    cfg.train_cfg.max_iters = 1
    Runner.from_cfg(cfg).train()
    return work_dir / 'iter_1.pth'


@pytest.mark.parametrize('name', CASES)
def test_one_line_says_what_to_change_and_nothing_is_written(
        project: Project, trained: Trained, dense: Path, exported: Exported,
        tmp_path: Path, name: str) -> None:
    folder = tmp_path / 'case'
    folder.mkdir()
    case = CASES[name]
    arguments = case.arguments(
        World(project, trained, dense, exported, folder))
    before = tree(folder)
    outcome = run_tool(case.tool, *arguments, cwd=folder)
    _assert_one_line(case, outcome)
    _assert_intact(before, tree(folder))


def _assert_one_line(case: Case, outcome: Outcome) -> None:
    assert outcome.status != 0
    lines = outcome.stderr.splitlines()
    assert len(lines) == 1, outcome.stderr
    assert lines[0].startswith(f'{case.tool}: error: ')
    assert 'expected' in lines[0] and ', but ' in lines[0]
    assert case.came in lines[0]
    assert case.change in lines[0]


def _assert_intact(before: dict[str, bytes], after: dict[str, bytes]) -> None:
    """What was there still is; nothing new but mmengine's logs in ``out``."""
    assert before.items() <= after.items()
    for path in after.keys() - before.keys():
        assert path.startswith('out') and '.pth' not in path


@pytest.mark.parametrize('name', [
    'train without a listed image',
    'test a checkpoint with a bit flipped',
    'export into a folder that holds files',
])
def test_command_line_in_a_process_of_its_own_ends_alike(
        project: Project, trained: Trained, dense: Path, exported: Exported,
        tmp_path: Path, name: str) -> None:
    case = CASES[name]
    arguments = case.arguments(
        World(project, trained, dense, exported, tmp_path))
    before = tree(tmp_path)
    done = subprocess.run([
        sys.executable, '-W', 'ignore', TOOLS / case.tool,
        *map(str, arguments)
    ],
                          cwd=tmp_path,
                          capture_output=True,
                          text=True)
    _assert_one_line(case, Outcome(done.returncode, done.stderr))
    _assert_intact(before, tree(tmp_path))


@pytest.mark.parametrize('tool, change', [
    ('train', '--resume'),
    ('export', '--out-dir'),
])
def test_full_disk_is_one_line_too(project: Project, trained: Trained,
                                   dense: Path, exported: Exported,
                                   tmp_path: Path, tool: str,
                                   change: str) -> None:
    world = World(project, trained, dense, exported, tmp_path)
    arguments = dict(
        train=world.train(
            *world.set(train_cfg__max_iters=1, model__gdp__gate_travel=0.5)),
        export=world.export())[tool]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        outcome = run_tool(f'{tool}.py', *arguments, cwd=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    case = Case(f'{tool}.py', lambda _: [], 'File too large', change)
    _assert_one_line(case, Outcome(outcome.status, outcome.stderr))
    _assert_intact({}, tree(tmp_path))


def test_grey_image_is_no_error(project: Project, trained: Trained,
                                dense: Path, exported: Exported,
                                tmp_path: Path) -> None:

    def spoil(data: Path, name: str) -> None:
        path = data / f'JPEGImages/{name}.jpg'
        Image.open(path).convert('L').save(path)

    world = World(project, trained, dense, exported, tmp_path)
    outcome = run_tool(
        'train.py',
        *world.train(*world.data(spoil), 'train_cfg.max_iters=1',
                     'model.gdp.gate_travel=0.5'),
        cwd=tmp_path)
    assert outcome.status == 0, outcome.stderr
    assert (tmp_path / 'out/iter_1.pth').is_file()


def test_inputs_are_never_overwritten(trained: Trained, dense: Path,
                                      project: Project,
                                      tmp_path: Path) -> None:
    """An export reads its config and checkpoint, and leaves them alone."""
    before = tree(trained.work_dir), tree(project.folder)
    outcome = run_tool(
        'export.py',
        trained.config,
        trained.checkpoint,
        '--out-dir',
        trained.work_dir,
        cwd=tmp_path)
    assert outcome.status != 0
    assert (tree(trained.work_dir), tree(project.folder)) == before


def test_groups_write_json_only_where_asked(project: Project,
                                            tmp_path: Path) -> None:
    outcome = run_tool('groups.py', project.gated, cwd=tmp_path)
    assert outcome.status == 0, outcome.stderr
    assert tree(tmp_path) == {}
    outcome = run_tool(
        'groups.py',
        project.dense,
        '--json',
        tmp_path / 'groups.json',
        cwd=tmp_path)
    assert outcome.status == 0, outcome.stderr
    assert list(tree(tmp_path)) == ['groups.json']


def test_debugging_shows_the_traceback(
        project: Project, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('GDP_DEBUG', '1')
    with pytest.raises(Exception, match='gdp.target'):
        run_tool(
            'groups.py',
            project.gated,
            '--cfg-options',
            'model.gdp.target=2',
            cwd=tmp_path)
