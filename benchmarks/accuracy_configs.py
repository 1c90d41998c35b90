"""Configs and folders of the runs of benchmarks/accuracy.py."""
from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config

from gdp_mmseg.files import write_whole
from gdp_mmseg.pruner.schedule import Schedule

from accuracy_tasks import TASKS, Task
from accuracy_variants import CHANGES, hold_

HERE = Path(__file__).resolve().parent
# Phases of the gates: those that a user gets.
PHASES = Schedule.phases
# Gates and their variants, each with the settings that it needs.
GATED: dict[str, dict[str, Any]] = dict(
    gdp={},
    gdp_min_keep=dict(min_keep_ratio=0.1),
    gdp_slow=dict(phases=(0.1, 0.6, 0.3)),
    gdp_plain={},  # Pruner._scarcity is patched away
    scp=dict(gate='scp'),
    trainable=dict(gate='trainable'))
START_RUN = 'start-1.0-0'


def task_of(args: argparse.Namespace) -> Task:
    """Return the network and the data set that the flags choose."""
    return TASKS[args.data]


def folder_of(args: argparse.Namespace, name: str) -> Path:
    """Return the folder of a run; runs of all lengths share the start."""
    length = args.start if name == START_RUN else args.iterations
    unusual = args.start != task_of(args).start
    start = f'-from-{args.start}' if unusual else ''
    start += '-tune' if args.tune else ''
    if name != START_RUN and (args.lr,
                              args.hold) != (task_of(args).lr_after_start,
                                             task_of(args).hold):
        start += f'-lr-{args.lr:g}-hold-{args.hold:g}'
    folder: Path = args.work_dir / f'{args.data}{start}-{length}' / name
    return folder


def start_checkpoint(args: argparse.Namespace) -> Path:
    """Return the checkpoint that all runs start from."""
    return folder_of(args, START_RUN) / f'training/iter_{args.start}.pth'


def teacher_checkpoint(args: argparse.Namespace, seed: int) -> Path:
    """Return the checkpoint of the dense network that was trained on."""
    folder = folder_of(args, f'dense-1.0-{seed}').resolve()
    return folder / f'training/iter_{args.iterations}.pth'


def config_of(args: argparse.Namespace, method: str, target: float,
              seed: int) -> Config:
    """Return the config of one run's training."""
    cfg = Config.fromfile(HERE / f'configs/{args.data}.py')
    task = task_of(args)
    _set_data_(cfg, args)
    pretrained = dict(
        type='Pretrained', checkpoint=str(args.weights.resolve()))
    cfg.model.backbone.init_cfg = pretrained
    if task.head:
        cfg.model.head.init_cfg = dict(
            type='Normal',
            layer='Linear',
            std=0.01,
            override=dict(pretrained, name='fc', prefix=task.head))
    iterations = dict(
        start=args.start,
        narrow=args.start + args.iterations).get(method, args.iterations)
    cfg.randomness = dict(seed=seed)
    cfg.train_cfg.update(max_iters=iterations, val_interval=iterations)
    cfg.param_scheduler[0].end = iterations
    cfg.default_hooks.checkpoint.interval = iterations
    if method not in ('start', 'narrow'):
        cfg.load_from = str(start_checkpoint(args))
        cfg.optim_wrapper.optimizer.lr = args.lr
        cfg.optim_wrapper.paramwise_cfg = None
        if args.hold:
            hold_(cfg, args.hold)
    base, *changes = method.split('+')
    if base in GATED:
        cfg.model.update(
            type='gdp_mmseg.GDPModel',
            gdp=dict(
                dict(target=target, phases=PHASES, input_shape=cfg.crop_size),
                **GATED[base]))
        # The export evaluates the network.
        cfg.train_cfg.val_begin = iterations + 1
        cfg.default_hooks.gdp = dict(type='gdp_mmseg.GDPHook')
    for name in changes:
        CHANGES[name].apply_(cfg, teacher_checkpoint(args, seed))
    return cfg


def _set_data_(cfg: Config, args: argparse.Namespace) -> None:
    """Set folder, split and loaders of the data of a config, in place."""
    workers = task_of(args).workers
    root = str(args.data_root.resolve())
    train = cfg.train_dataloader.dataset
    train = train.get('datasets', [train])
    for dataset in train:
        dataset.data_root = root
    for loader in (cfg.val_dataloader, cfg.test_dataloader):
        loader.dataset.data_root = root
    if torch.cuda.is_available():
        # It would search anew for each size of the images in evaluation.
        cfg.env_cfg.cudnn_benchmark = False
        for loader in (cfg.train_dataloader, cfg.val_dataloader,
                       cfg.test_dataloader):
            loader.update(num_workers=workers, persistent_workers=workers > 0)
    if args.tune:
        _hold_out_(cfg, train[0], folder_of(args, 'images'))


def _hold_out_(cfg: Config, train: Any, folder: Path) -> None:
    """Evaluate on a quarter of the training images, without them in training.

    Args:
        cfg (Config): Config of the training, changed in place.
        train (Any): Data set in it whose images are divided.
        folder (Path): Folder for the two lists of images.
    """
    if 'split' in train:
        train.split = 'three_quarters'
        for loader in (cfg.val_dataloader, cfg.test_dataloader):
            loader.dataset.split = 'quarter'
        return
    names = (Path(train.data_root) / train.ann_file).read_text().split()
    folder.mkdir(parents=True, exist_ok=True)
    for part, chosen in (('train', [
            name for index, name in enumerate(names) if index % 4
    ]), ('test', names[::4])):
        write_whole(folder / f'{part}.txt',
                    ('\n'.join(chosen) + '\n').encode())
    train.ann_file = str((folder / 'train.txt').resolve())
    for loader in (cfg.val_dataloader, cfg.test_dataloader):
        loader.dataset.ann_file = str((folder / 'test.txt').resolve())
