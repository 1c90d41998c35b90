"""Small but odd mmsegmentation projects, drawn by a seed.

Each project is a config with a model of a few layers and a data set in
memory. :func:`helpers.odd_check.check` runs one.
"""
from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

from mmengine.config import Config

from helpers.odd_layers import BLOCKS

ITERATIONS = 10
PHASES = (0., 0.75, 0.25)
TRICKS = ('edge head in loss', 'contrast in loss', 'refinement in predict',
          'affinity in predict', 'several passes', 'teacher', 'mean teacher',
          'average predicts', 'init_weights of parts')
SHAPES = {
    'four bands': (4, 32, 32),
    'one band': (1, 32, 32),
    'odd size': (3, 31, 37),
}
NORMS = {'SyncBN': 'SyncBN', 'GroupNorm': 'GN', 'no norm': 'none'}
METAINFO = {'arrays in metainfo': 'arrays', 'objects in metainfo': 'objects'}
CONTAINERS = ('dict', 'list', 'tuple')
PROPERTIES = (*BLOCKS, *TRICKS, *SHAPES, *NORMS, *METAINFO,
              *(f'outputs in a {kind}' for kind in CONTAINERS),
              'unsorted ModuleDict', 'no init_cfg', 'init_weights overwrites',
              'backbone of plain torch', 'dropout in inference', 'binary head',
              'list of auxiliary heads', 'head reads all maps', 'stock head',
              'torch data set', 'path in config', 'no evaluator', 'clipping')


@dataclasses.dataclass(frozen=True)
class Project:
    """A drawn project.

    Args:
        seed (int): The same seed gives the same project.
        properties (frozenset[str]): Those of :data:`PROPERTIES` that it has.
        config (Config): Config of its gated training.
    """
    seed: int
    properties: frozenset[str]
    config: Config


class _Draw:
    """Random choices, each recorded as a property."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.properties: set[str] = set()

    def one(self, choices: Any, probability: float) -> str:
        """Choose one property, or none (an empty name)."""
        name = self.random.choice(list(choices))
        return self.take(name) if self.random.random() < probability else ''

    def some(self, choices: Any, most: int) -> list[str]:
        """Choose a few different properties."""
        number = self.random.randint(0, most)
        return [
            self.take(name)
            for name in self.random.sample(list(choices), number)
        ]

    def take(self, name: str) -> str:
        """Record a property and return it."""
        self.properties.add(name)
        return name


def draw(seed: int) -> Project:
    """Draw a project."""
    one = _Draw(seed)
    bands, *size = SHAPES.get(one.one(SHAPES, 0.6), (3, 32, 32))
    norm = NORMS.get(one.one(NORMS, 0.5), 'BN')
    blocks = [
        (one.take(kind), one.random.choice([6, 8, 12, 16]))
        for kind in one.random.sample(list(BLOCKS), one.random.randint(3, 5))
    ]
    classes = 2 if one.one(['binary head'], 0.15) else 3
    kind = one.random.choice(['segmentor', 'segmentor', 'lean', 'tasks'])
    backbone = _backbone(one, bands, blocks, norm)
    widths = [channels for _, channels in blocks]
    if kind == 'tasks':
        # Predictions of several tasks have no binary form here.
        one.properties.discard('binary head')
        classes = 3
        model = _tasks(one, classes, widths)
    else:
        model = _segmentor(one, kind, classes, widths)
    gdp: dict[str, Any] = dict(
        target=one.random.choice([0.5, 0.6, 0.7]),
        phases=PHASES,
        gate_travel=PHASES[1] * ITERATIONS)
    if bands != 3 or one.random.random() < 0.2:
        gdp['input_shape'] = (bands, *size)
    model = dict(
        type='gdp_mmseg.GDPModel',
        base=model.pop('type'),
        gdp=gdp,
        data_preprocessor=dict(
            type='SegDataPreProcessor',
            # One value stands for all bands.
            mean=[90.],
            std=[50.],
            seg_pad_val=255,
            size=tuple(size)),
        backbone=backbone,
        **model)
    config = _config(one, model, dict(bands=bands, size=size, classes=classes))
    return Project(seed, frozenset(one.properties), Config(config))


def _backbone(one: _Draw, bands: int, blocks: list[Any],
              norm: str) -> dict[str, Any]:
    if one.one(['backbone of plain torch'], 0.3):
        return dict(type='LeanNet', bands=bands, layers=blocks, norm=norm)
    backbone = dict(type='OddNet', in_channels=bands, blocks=blocks, norm=norm)
    if one.one(['init_weights overwrites'], 0.3):
        backbone['overwrites'] = True
    return backbone


def _tasks(one: _Draw, classes: int, widths: list[int]) -> dict[str, Any]:
    container = one.random.choice(CONTAINERS)
    one.take(f'outputs in a {container}')
    one.take('no init_cfg')
    heads = dict(segment=classes, depth=1)
    if one.one(['unsorted ModuleDict'], 0.7):
        heads = dict(segment=classes, b_edges=2, a_depth=1)
    return dict(
        type='Tasks', heads=heads, width=widths[-1], container=container)


def _segmentor(one: _Draw, kind: str, classes: int,
               widths: list[int]) -> dict[str, Any]:
    model = dict(
        type='LeanSegmentor',
        decode_head=_head(one, classes, widths),
        train_cfg=dict(),
        test_cfg=dict(mode='whole'))
    if one.one(['list of auxiliary heads'], 0.3):
        model['auxiliary_head'] = [
            _fcn(classes, widths, index, 'binary head' in one.properties)
            for index in (1, 2)
        ]
    if kind == 'lean':
        one.take('no init_cfg')
        return model
    return dict(
        model,
        type='OddSegmentor',
        tricks=one.some(TRICKS, 3),
        widths=[widths[0], widths[-1]])


def _fcn(classes: int, widths: list[int], index: int,
         binary: bool) -> dict[str, Any]:
    return dict(
        type='FCNHead',
        in_channels=widths[index],
        in_index=index,
        channels=8,
        num_convs=1,
        concat_input=False,
        norm_cfg=dict(type='BN'),
        **_classes(classes, binary))


def _classes(classes: int, binary: bool) -> dict[str, Any]:
    options: dict[str, Any] = dict(
        num_classes=classes,
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=binary))
    return dict(options, out_channels=1, threshold=0.5) if binary else options


def _head(one: _Draw, classes: int, widths: list[int]) -> dict[str, Any]:
    binary = 'binary head' in one.properties
    if one.one(['stock head'], 0.2):
        return _fcn(classes, widths, len(widths) - 1, binary)
    head = dict(type='OddHead', channels=8, **_classes(classes, binary))
    if one.one(['dropout in inference'], 0.25):
        head['dropped'] = True
    if one.one(['head reads all maps'], 0.3):
        return dict(
            head,
            in_channels=widths,
            in_index=list(range(len(widths))),
            input_transform='resize_concat')
    return dict(head, in_channels=widths[-1], in_index=len(widths) - 1)


def _config(one: _Draw, model: dict[str, Any],
            images: dict[str, Any]) -> dict[str, Any]:
    dataset = dict(
        images,
        type='MMEngineImages',
        meta=METAINFO.get(one.one(METAINFO, 0.5), 'lists'))
    if one.one(['torch data set'], 0.5):
        dataset['type'] = 'TorchImages'
    if one.one(['path in config'], 0.3):
        dataset['root'] = Path('images')
    loader = dict(
        batch_size=2,
        num_workers=0,
        sampler=dict(type='DefaultSampler', shuffle=False),
        dataset=dict(dataset, number=4))
    config: dict[str, Any] = dict(
        default_scope='mmseg',
        custom_imports=dict(imports=['helpers.odd_models']),
        model=model,
        train_dataloader=dict(
            loader,
            batch_size=4,
            sampler=dict(type='InfiniteSampler', shuffle=True),
            dataset=dict(dataset, number=8)),
        test_dataloader=loader,
        optim_wrapper=dict(
            type='OptimWrapper',
            optimizer=one.random.choice([
                dict(type='SGD', lr=0.02, momentum=0.9, weight_decay=0.01),
                dict(type='AdamW', lr=1e-3)
            ])),
        train_cfg=dict(type='IterBasedTrainLoop', max_iters=ITERATIONS),
        test_cfg=dict(type='TestLoop'),
        test_evaluator=dict(type='IoUMetric', iou_metrics=['mIoU']),
        default_hooks=dict(
            logger=dict(type='LoggerHook', interval=ITERATIONS),
            checkpoint=dict(
                type='CheckpointHook', by_epoch=False, interval=ITERATIONS),
            gdp=dict(type='gdp_mmseg.GDPHook')),
        log_processor=dict(by_epoch=False),
        log_level='WARNING',
        randomness=dict(seed=one.random.randrange(1000)))
    if one.one(['clipping'], 0.3):
        config['optim_wrapper']['clip_grad'] = dict(max_norm=1.)
    if one.one(['no evaluator'], 0.2):
        del config['test_cfg'], config['test_evaluator']
        del config['test_dataloader']
    return config
