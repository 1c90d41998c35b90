"""Small models of several kinds, and gated trainings of them on drawn data.

Several benchmarks use them. Each training is a complete one: mmengine's
runner, ``GDPModel`` and ``GDPHook``, on images of 64 x 64 pixels of
``tools/make_demo_data.py``. A training takes a minute or less on one core.
"""
from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import os
import platform
import statistics
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

import mmseg
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import init_default_scope
from mmengine.runner import Runner

from gdp_mmseg.demo.data import CLASSES, PALETTE, make_demo_data
from gdp_mmseg.engine.model import find_pruner
from gdp_mmseg.files import write_json
from gdp_mmseg.gates import METHODS
from gdp_mmseg.pruner.settings import Settings
from gdp_mmseg.report.summary import other_widths

ROOT = Path(__file__).resolve().parents[1]
THEIRS = Path(mmseg.__file__).parent / '.mim' / 'configs' / '_base_' / 'models'
SIDE = 64
BATCH = 4
IMAGES = 64
PHASES = Settings.phases
_BRANCHES = [8, 16, 32, 64]


def _stage(branches: int) -> dict[str, Any]:
    """Return a stage of an HRNet: one module, one block in each branch."""
    return dict(
        num_modules=1,
        num_branches=branches,
        block='BASIC' if branches > 1 else 'BOTTLENECK',
        num_blocks=(1, ) * branches,
        num_channels=tuple(_BRANCHES[:branches]) if branches > 1 else (16, ))


# Config of the installed mmseg, and the changes that make the model small.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    'DeepLabV3Plus-ResNet18':
    ('deeplabv3plus_r50-d8.py',
     dict(
         backbone=dict(
             depth=18,
             stem_channels=16,
             base_channels=16,
             strides=(1, 2, 2, 1),
             dilations=(1, 1, 1, 2)),
         decode_head=dict(
             in_channels=128,
             channels=32,
             dilations=(1, 2, 3),
             c1_in_channels=16,
             c1_channels=8),
         auxiliary_head=dict(in_channels=64, channels=16))),
    'HRNet':
    ('fcn_hr18.py',
     dict(
         backbone=dict(
             extra=dict(
                 stage1=_stage(1),
                 stage2=_stage(2),
                 stage3=_stage(3),
                 stage4=_stage(4))),
         decode_head=dict(in_channels=_BRANCHES, channels=sum(_BRANCHES)))),
    'BiSeNetV2': ('bisenetv2.py',
                  dict(
                      backbone=dict(
                          detail_channels=(16, 16, 32),
                          semantic_channels=(8, 16, 24, 32),
                          bga_channels=32),
                      decode_head=dict(in_channels=32, channels=64),
                      auxiliary_head={
                          str(index): dict(in_channels=width, channels=16)
                          for index, width in enumerate((8, 16, 24, 32))
                      })),
    'SegFormer': ('segformer_mit-b0.py', dict(decode_head=dict(channels=32))),
    'DeepLabV3Plus-MobileNetV2':
    ('deeplabv3plus_r50-d8.py',
     dict(
         backbone=dict(
             _delete_=True,
             type='MobileNetV2',
             widen_factor=0.5,
             strides=(1, 2, 2, 1, 1, 1, 1),
             dilations=(1, 1, 1, 2, 2, 4, 4),
             out_indices=(1, 2, 4, 6)),
         decode_head=dict(
             in_channels=160,
             channels=32,
             dilations=(1, 2, 3),
             c1_in_channels=16,
             c1_channels=8),
         auxiliary_head=dict(in_channels=48, channels=16))),
}


@dataclasses.dataclass(frozen=True)
class Run:
    """Settings of a gated training of a small model.

    Args:
        model (str): A key of :data:`MODELS`.
        target (float): Share of the multiply-adds to keep.
        iterations (int): Length of the training.
        seed (int): Seed of the weights and of the order of the images.
        loss_weight (float): Factor of the task's loss.
        multiple (int): Number of which the widths are to be multiples.
        gate (str): Name of the gate method.
    """
    model: str
    target: float
    iterations: int
    seed: int = 0
    loss_weight: float = 1.
    multiple: int = 1
    gate: str = 'gdp'


class Watch(Hook):
    """Hook that records cost, budget and loss of each iteration."""

    # Runs after the hook that moves the gates.
    priority = 'LOWEST'

    def __init__(self) -> None:
        self.flops: list[float] = []
        self.excess: list[float] = []
        self.losses: list[float] = []
        self.end: dict[str, Any] = {}

    def after_train_iter(self,
                         runner: Runner,
                         batch_idx: int,
                         data_batch: Any = None,
                         outputs: dict[str, Any] | None = None) -> None:
        """Record the share of FLOPs that a pruned model would have."""
        pruner = find_pruner(runner.model)
        progress = runner.iter / runner.max_iters
        with torch.no_grad():
            openness = pruner.gates.openness()
            self.flops.append(float(pruner.cost(pruner.channels())))
            if pruner.schedule.phase_at(progress) == 'pruning':
                figures = pruner.figures(progress)
                self.excess.append(figures.held_cost - figures.budget)
        self.losses.append(float((outputs or {})['loss']))
        self.end = dict(
            half_open=float(
                ((openness > 0.01) & (openness < 0.5)).float().mean()),
            other_widths=other_widths(pruner.analysis,
                                      pruner.channels().cpu() > 0,
                                      pruner.settings.multiple),
            multiplier=float(pruner.gates.multiplier))


def add_gate_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--gate`` to the options of a benchmark, in place."""
    parser.add_argument(
        '--gate',
        choices=METHODS,
        default='gdp',
        help='gate method (default: gdp)')


def train_once(run: Run,
               folder: Path,
               controller: str = 'exact solve') -> dict[str, Any]:
    """Return the result of :func:`train`, from the folder if it is there.

    Args:
        run (Run): Settings of the training.
        folder (Path): Folder of data and results.
        controller (str): Name of the controller of the multiplier, which
            distinguishes trainings of the same run.
    """
    name = '_'.join(
        [controller, *(str(value) for value in dataclasses.astuple(run))])
    path = folder / 'runs' / f'{name}.json'
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, dict(train(run, folder), controller=controller))
        print(path.read_text().replace('\n', ''), flush=True)
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def conditions() -> dict[str, Any]:
    """Return the conditions that all trainings share, for a report."""
    return dict(
        data=f'{IMAGES} drawn images of {SIDE} x {SIDE}, '
        f'{len(CLASSES) - 1} classes and background',
        batch_size=BATCH,
        phases=PHASES,
        optimizer='AdamW, lr 1e-3, polynomial decay, float32, no pretraining',
        input_shape=[1, 3, SIDE, SIDE],
        machine=f'{platform.machine()}, {torch.get_num_threads()} of '
        f'{os.cpu_count()} CPU cores',
        torch=torch.__version__)


def least_flops(name: str, gate: str = 'gdp') -> float:
    """Return the share of a model's FLOPs that stays if all gates close."""
    pruner = find_pruner(
        MMENGINE_MODELS.build(gated_model(Run(name, 0.99, 1, gate=gate))))
    pruner.gates.close_(torch.ones(len(pruner.gates.theta), dtype=torch.bool))
    return float(pruner.cost(pruner.channels()))


def train(run: Run, folder: Path) -> dict[str, Any]:
    """Train and measure how the share of FLOPs falls.

    Args:
        run (Run): Settings of the training.
        folder (Path): Folder that holds ``data``, or gets it.

    Returns:
        dict[str, Any]: ``flops_pruned`` and ``flops``, the share of FLOPs of
        the open channels at the end of the pruning phase and of the training;
        ``largest_step``, the largest share that one iteration removed;
        ``half_open``, the share of gates with an openness in (0.01, 0.5) at
        the end; ``other_widths``, the pruned layers whose width is no
        multiple; ``above_budget`` and ``below_budget``, the largest distances
        of the held cost from the budget in the pruning phase; ``loss``, the
        mean of the last tenth of the training; and the ``run``.
    """
    watch = Watch()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as work_dir:
        cfg = config_of(run, folder / 'data')
        cfg.work_dir = work_dir
        runner = Runner.from_cfg(cfg)
        runner.register_hook(watch)
        runner.train()
    flops = torch.tensor(watch.flops)
    # Number of the first iteration of the settling phase, counted from 0.
    settled = math.ceil((PHASES[0] + PHASES[1]) * run.iterations - 1e-6)
    return dict(
        run=dataclasses.asdict(run),
        flops_pruned=float(flops[settled - 1]),
        flops=float(flops[-1]),
        largest_step=float((flops[:-1] - flops[1:]).max()),
        above_budget=max(watch.excess),
        below_budget=-min(watch.excess),
        loss=statistics.mean(watch.losses[-run.iterations // 10:]) /
        run.loss_weight,
        seconds=time.perf_counter() - start,
        **watch.end)


def _model(name: str) -> dict[str, Any]:
    """Return the config of a small model without gates."""
    path, changes = MODELS[name]
    cfg = Config.fromfile(THEIRS / path)
    init_default_scope('mmseg')
    cfg.merge_from_dict(dict(model=copy.deepcopy(changes)))
    model = cfg.model.to_dict()
    model['pretrained'] = None
    model['data_preprocessor'] = dict(cfg.data_preprocessor, size=(SIDE, SIDE))
    for head in _heads(model):
        head['num_classes'] = len(CLASSES)
    return model


def _heads(model: dict[str, Any]) -> list[dict[str, Any]]:
    """Return all heads of a model's config."""
    auxiliary = model.get('auxiliary_head') or []
    return [
        model['decode_head'],
        *(auxiliary if isinstance(auxiliary, list) else [auxiliary])
    ]


def gated_model(run: Run) -> dict[str, Any]:
    """Return the config of the model of a run, with gates."""
    model = _model(run.model)
    for head in _heads(model):
        head['loss_decode']['loss_weight'] *= run.loss_weight
    model.update(
        base=model['type'],
        type='gdp_mmseg.GDPModel',
        gdp=dict(
            target=run.target,
            gate=run.gate,
            phases=PHASES,
            multiple=run.multiple))
    return model


def config_of(run: Run, data: Path) -> Config:
    """Return the config of a training; draw ``data`` if it is missing."""
    make_demo_data(data, train=IMAGES, val=1, size=SIDE, seed=0)
    dataset = dict(
        type='BaseSegDataset',
        data_root=str(data),
        ann_file='ImageSets/Segmentation/train.txt',
        img_suffix='.jpg',
        seg_map_suffix='.png',
        data_prefix=dict(
            img_path='JPEGImages', seg_map_path='SegmentationClass'),
        metainfo=dict(classes=CLASSES, palette=PALETTE),
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations'),
            dict(type='RandomFlip', prob=0.5),
            dict(type='PackSegInputs')
        ])
    return Config(
        dict(
            default_scope='mmseg',
            experiment_name=uuid.uuid4().hex,
            model=gated_model(run),
            train_dataloader=dict(
                batch_size=BATCH,
                num_workers=0,
                sampler=dict(type='InfiniteSampler', shuffle=True),
                dataset=dataset),
            optim_wrapper=dict(
                type='OptimWrapper',
                optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.01)),
            param_scheduler=[
                dict(
                    type='PolyLR',
                    power=0.9,
                    eta_min=1e-5,
                    end=run.iterations,
                    by_epoch=False)
            ],
            train_cfg=dict(
                type='IterBasedTrainLoop', max_iters=run.iterations),
            default_hooks=dict(
                logger=dict(type='LoggerHook', interval=run.iterations),
                checkpoint=None,
                gdp=dict(type='gdp_mmseg.GDPHook', interval=run.iterations)),
            log_processor=dict(by_epoch=False),
            log_level='ERROR',
            randomness=dict(seed=run.seed)))
