"""Whatever is wrong: one line that says what to change, nothing written."""
from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any, Callable

import pytest
import torch
from mmengine.runner import Runner

from project import (NAME, Project, Trained, nothing_to_prune, run_tool, tree,
                     unet)

pytest_plugins = ['project']


@dataclasses.dataclass(frozen=True)
class World:
    """What a case can build its command line of.

    Args:
        project (Project): Configs and data, as they should be.
        trained (Trained): A gated training.
        dense (Path): Checkpoint of a dense one.
        folder (Path): Of this case; what it writes before is compared with
            what is there after.
    """
    project: Project
    trained: Trained
    dense: Path
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

    def spoiled_data(self, split: str) -> Path:
        """The data with one image that is none."""
        data = self.folder / 'data'
        shutil.copytree(self.project.folder / 'data', data)
        image = self.project.images(split)[0].name
        (data / 'JPEGImages' / image).write_bytes(b'no image')
        return data


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
    Case(
        'train.py', lambda w: w.train(*w.set(
            train_dataloader__dataset__data_root=w.spoiled_data('train'),
            train_dataloader__batch_size=8)), '.jpg', 'image'),
    'test with an unreadable image':
    Case(
        'test.py', lambda w: w.test(*w.set(
            test_dataloader__dataset__data_root=w.spoiled_data('val'))),
        '.jpg', 'image'),
    'export with an unreadable image':
    Case(
        'export.py', lambda w: w.export(*w.set(
            test_dataloader__dataset__data_root=w.spoiled_data('val'))),
        '.jpg', 'image'),
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
    Case('export.py', lambda w: w.export(checkpoint=_saved(w, torch.ones(3))),
         'c.pth', 'checkpoint'),
    'export a checkpoint without gates':
    Case('export.py', lambda w: w.export(checkpoint=w.dense), 'none',
         'GDPModel'),
    'export a checkpoint of another model':
    Case('export.py', lambda w: w.export(config=w.config(_wider)),
         'of another shape', 'checkpoint'),
    'export with the dense config':
    Case('export.py', lambda w: w.export(config=w.project.dense),
         'EncoderDecoder', 'config'),
    # Settings of the gates.
    **{
        f'{tool} at target {goal}':
        Case(f'{tool}.py', arguments, goal, 'gdp.target')
        for goal in ('0', '1', '1.5', '-0.4', '40')
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
    Case('train.py', lambda w: w.train(*w.set(model__gdp__target=1e-6)),
         '1e-06', 'gdp.target'),
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


def _saved(world: World, content: object) -> Path:
    torch.save(content, world.folder / 'c.pth')
    return world.folder / 'c.pth'


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
        project: Project, trained: Trained, dense: Path, tmp_path: Path,
        name: str) -> None:
    case = CASES[name]
    folder = tmp_path / 'case'
    folder.mkdir()
    arguments = case.arguments(World(project, trained, dense, folder))
    before = tree(folder)
    outcome = run_tool(case.tool, *arguments, cwd=folder)
    assert outcome.status != 0
    lines = outcome.stderr.splitlines()
    assert len(lines) == 1, outcome.stderr
    assert lines[0].startswith(f'{case.tool}: error: ')
    assert 'expected' in lines[0] and ', but ' in lines[0]
    assert case.came in lines[0]
    assert case.change in lines[0]
    assert _but_logs(tree(folder)) == _but_logs(before)


def _but_logs(content: dict[str, bytes]) -> dict[str, bytes]:
    """Without the log that mmengine opens before it builds the model."""
    return {
        path: data
        for path, data in content.items()
        if path.endswith('.pth') or not path.startswith('out')
    }


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
