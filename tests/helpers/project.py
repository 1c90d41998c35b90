"""A user's tiny mmsegmentation project, drawn and trained in seconds.

A pytest plugin, loaded by ``tests/conftest.py`` where mmsegmentation is
installed. It asserts nothing, so PYTEST_DONT_REWRITE.
"""
from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import gc
import io
import itertools
import json
import os
import runpy
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping, Sequence

import pytest
import torch
from matplotlib.figure import Figure
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from mmseg.utils import register_all_modules
from torch import Tensor, nn
from yapf.yapflib import yapf_api

from gdp_mmseg.analysis.structure import Analysis
from gdp_mmseg.demo.data import make_demo_data
from gdp_mmseg.engine import model as models
from gdp_mmseg.engine import monitor
from gdp_mmseg.engine.model import find_pruner
from gdp_mmseg.export import export as exporting
from gdp_mmseg.export.networks import load_exported
from gdp_mmseg.pruner.settings import Gate, Settings
from gdp_mmseg.report.tables import Report

from helpers import HELPERS, PYTHONPATH, TOOLS

FORMAT_CODE = yapf_api.FormatCode
# What draws the gates, for a training and for an export.
DRAWING = [(monitor, 'draw_widths', monitor.draw_widths),
           (monitor, 'draw_record', monitor.draw_record),
           (exporting, 'draw_record', exporting.draw_record)]
TARGET = 0.4
ITERATIONS = 32
# In iterations 4, 24, 4.
PHASES = (0.125, 0.75, 0.125)
NAME = 'my_gdp_config'

# DeepLabV3Plus on a ResNet-18 with a quarter of its channels.
DENSE = """
default_scope = 'mmseg'
crop_size = (64, 64)
norm_cfg = dict(type='SyncBN', requires_grad=True)
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(
        type='SegDataPreProcessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
        size=crop_size),
    pretrained=None,
    backbone=dict(
        type='ResNetV1c',
        depth=18,
        stem_channels=16,
        base_channels=16,
        num_stages=4,
        out_indices=(0, 1, 2, 3),
        strides=(1, 2, 2, 1),
        dilations=(1, 1, 1, 2),
        norm_cfg=norm_cfg),
    decode_head=dict(
        type='DepthwiseSeparableASPPHead',
        in_channels=128,
        in_index=3,
        channels=32,
        dilations=(1, 2, 3),
        c1_in_channels=16,
        c1_channels=8,
        num_classes=5,
        norm_cfg=norm_cfg,
        align_corners=False,
        # Or so short a training calls everything background. The sum of four
        # images' weights is about 6000: the mean of mmseg 1.2.2 takes no class
        # weights where labels are 255.
        loss_decode=dict(
            type='CrossEntropyLoss',
            class_weight=[0.2, 1., 1., 1., 1.],
            reduction='sum',
            loss_weight=1 / 6000)),
    auxiliary_head=dict(
        type='FCNHead',
        in_channels=64,
        in_index=2,
        channels=16,
        num_convs=1,
        concat_input=False,
        num_classes=5,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', loss_weight=0.4)),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'))
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
dataset = dict(
    type='BaseSegDataset',
    data_root=DATA_ROOT,
    img_suffix='.jpg',
    seg_map_suffix='.png',
    data_prefix=dict(img_path='JPEGImages', seg_map_path='SegmentationClass'),
    metainfo=dict(
        classes=('background', 'disc', 'triangle', 'ring', 'cross'),
        palette=[[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0],
                 [0, 0, 128]]))
tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='TestTimeAug',
        transforms=[[
            dict(type='Resize', scale_factor=ratio, keep_ratio=True)
            for ratio in (0.5, 1.0)
        ], [dict(type='LoadAnnotations')], [dict(type='PackSegInputs')]])
]
train_dataloader = dict(
    batch_size=4,
    num_workers=0,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        ann_file='ImageSets/Segmentation/train.txt',
        pipeline=train_pipeline,
        **dataset))
val_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        ann_file='ImageSets/Segmentation/val.txt',
        pipeline=test_pipeline,
        **dataset))
test_dataloader = val_dataloader
val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='SGD', lr=0.05, momentum=0.9, weight_decay=0.01))
param_scheduler = [dict(type='PolyLR', power=0.9, eta_min=0., by_epoch=False)]
train_cfg = dict(
    type='IterBasedTrainLoop', max_iters=ITERATIONS, val_interval=1000)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=1, log_metric_by_epoch=False),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=1000),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    visualization=dict(type='SegVisualizationHook'))
env_cfg = dict(
    cudnn_benchmark=False,
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    dist_cfg=dict(backend='nccl'))
vis_backends = [dict(type='LocalVisBackend')]
visualizer = dict(
    type='SegLocalVisualizer', vis_backends=vis_backends, name='visualizer')
log_processor = dict(by_epoch=False)
log_level = 'INFO'
randomness = dict(seed=0)
tta_model = dict(type='SegTTAModel')
"""

# SyncBN needs GPUs where there are several processes.
WITHOUT_SYNC = {
    f'model.{part}.norm_cfg.type': 'BN'
    for part in ('backbone', 'decode_head', 'auxiliary_head')
}

# The README's lines.
DROP_IN = """
_base_ = './my_config.py'
model = dict(type='gdp_mmseg.GDPModel', gdp=dict(target=TARGET))
default_hooks = dict(gdp=dict(type='gdp_mmseg.GDPHook'))
"""

# What makes sense of a training this short.
SHORT = """
_base_ = './drop_in.py'
model = dict(gdp=dict(phases=PHASES))
default_hooks = dict(gdp=dict(interval=1))
"""


@MODELS.register_module()
class NothingToPrune(nn.Module):
    """A backbone without a convolution."""

    def forward(self, inputs: Tensor) -> list[Tensor]:
        return [inputs]


@dataclasses.dataclass(frozen=True)
class Project:
    """A folder with data and configs.

    Args:
        folder (Path): Holds ``data`` and the configs.
        dense (Path): The config that the user had before.
        gated (Path): The one over it.
    """
    folder: Path
    dense: Path
    gated: Path

    def config(self, name: str, text: str, base: Path | None = None) -> Path:
        """Write a config over another (the gated one), of Python lines."""
        path = self.folder / f'{name}.py'
        path.write_text(f"_base_ = './{(base or self.gated).name}'\n{text}\n")
        return path

    def load(self,
             work_dir: Path,
             path: Path | None = None,
             **options: Any) -> Config:
        """Read a config (the gated one), with options over it."""
        cfg = Config.fromfile(path or self.gated)
        cfg.merge_from_dict(options)
        cfg.work_dir = str(work_dir)
        return cfg

    def load_for_processes(self,
                           work_dir: Path,
                           path: Path | None = None,
                           **options: Any) -> Config:
        """Read a config for processes that work together on a CPU."""
        cfg = self.load(work_dir, path, **WITHOUT_SYNC, launcher='pytorch')
        cfg.model_wrapper_cfg = dict(
            type='MMDistributedDataParallel',
            broadcast_buffers=False,
            device_ids=None)
        cfg.merge_from_dict(options)
        return cfg

    def images(self, split: str = 'val') -> list[Path]:
        """The images that a split lists."""
        names = self.folder / f'data/ImageSets/Segmentation/{split}.txt'
        return [
            self.folder / f'data/JPEGImages/{name}.jpg'
            for name in names.read_text().split()
        ]


class Recorder(Hook):
    """What the gates were after each iteration, and what is left behind."""

    # After all others.
    priority = 'LOWEST'

    def __init__(self) -> None:
        self.theta: list[Tensor] = []
        self.gain: list[Tensor] = []
        self.gain_square: list[Tensor] = []
        self.observed: list[int] = []
        self.grads: list[Tensor | None] = []
        self.sizes: list[int] = []
        # Openness of closed gates that nothing has taken over yet.
        self.left: list[Tensor] = []

    def after_train_iter(self, runner: Runner, *_: Any, **__: Any) -> None:
        pruner = find_pruner(runner.model)
        gates, takeover = pruner.gates, pruner.takeover
        # The theta of SCP is not used.
        moving = gates.openness() if hasattr(gates, 'score') else gates.theta
        self.theta.append(moving.detach().clone())
        # SCP has no gains, but Phi, masks and a number of steps.
        gain, square, observed = ((gates.score, gates.mask, gates.step_number)
                                  if hasattr(gates, 'score') else
                                  (gates.gain, gates.gain_square,
                                   gates.observed))
        self.gain.append(gain.clone())
        self.gain_square.append(square.clone())
        self.observed.append(int(observed))
        self.grads.append(gates.theta.grad)
        self.sizes.append(
            sum(one.numel() for one in runner.model.parameters()))
        if takeover is not None:
            self.left.append(takeover.level * gates.is_closed())


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a gated training left.

    Args:
        config (Path): That it was trained with.
        checkpoint (Path): That mmengine's CheckpointHook saved at its end.
        work_dir (Path): Its folder.
        runner (Runner): That ran it.
        recorder (Recorder): That watched it.
    """
    config: Path
    checkpoint: Path
    work_dir: Path
    runner: Runner
    recorder: Recorder


@dataclasses.dataclass(frozen=True)
class Exported:
    """What ``tools/export.py`` wrote."""
    folder: Path

    @property
    def config(self) -> Path:
        return self.folder / f'{NAME}_pruned.py'

    @property
    def checkpoint(self) -> Path:
        return self.folder / f'{NAME}_pruned.pth'

    @property
    def report(self) -> Report:
        return Report.read(self.folder / 'report.json')

    def model(self) -> nn.Module:
        """The pruned model with its weights, in eval mode."""
        return load_exported(self.folder, NAME)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a command line ended."""
    status: int
    stderr: str


def nothing_to_prune(model: Mapping[str, Any]) -> dict[str, Any]:
    """A model config whose only layer is the classifier."""
    return _plain_fcn(model, dict(type='NothingToPrune'), 3, 0)


def with_two_heads(model: dict[str, Any]) -> dict[str, Any]:
    """Return the config of a model with two decode heads: FCN, then OCR."""
    common = dict(
        in_channels=128,
        in_index=3,
        channels=16,
        num_classes=5,
        norm_cfg=dict(type='BN'),
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss'))
    heads = [
        dict(type='FCNHead', num_convs=1, concat_input=False, **common),
        dict(type='OCRHead', ocr_channels=16, **common)
    ]
    return dict(model, num_stages=2, decode_head=heads)


def unet(model: Mapping[str, Any]) -> dict[str, Any]:
    """A model config whose inputs must be a multiple of 16."""
    backbone = dict(type='UNet', base_channels=4, norm_cfg=dict(type='BN'))
    return _plain_fcn(model, backbone, 4, 1)


def _plain_fcn(model: Mapping[str, Any], backbone: dict[str, Any],
               channels: int, convolutions: int) -> dict[str, Any]:
    head = dict(
        type='FCNHead',
        in_channels=channels,
        in_index=-1,
        channels=channels,
        num_convs=convolutions,
        concat_input=False,
        num_classes=5,
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss'))
    return dict(
        model, backbone=backbone, decode_head=head, auxiliary_head=None)


def build(model: Mapping[str, Any]) -> nn.Module:
    """Build a model config as mmsegmentation's tools do."""
    init_default_scope('mmseg')
    return MODELS.build(model)


def _fit_travel_(cfg: Config) -> None:
    """Let gates travel less in a training that is too short for them."""
    gdp, iterations = cfg.model.get('gdp'), cfg.train_cfg.get('max_iters')
    if gdp and 'target' in gdp and iterations:
        steps = iterations / cfg.optim_wrapper.get('accumulative_counts', 1)
        pruning = gdp.get('phases', Settings.phases)[1] * steps
        gdp.gate_travel = min(
            gdp.get('gate_travel', Settings.gate_travel), pruning)


# What a model was built of, and analyses of this process by all that they
# depend on.
_PARTS: weakref.WeakKeyDictionary[nn.Module, str] = (
    weakref.WeakKeyDictionary())
_ANALYSES: dict[Any, tuple[Analysis, float]] = {}
_BUILD, _ANALYSE, _VERIFY = (models.build_base_model, models.analyse_model,
                             models.verify)


def _build_base(base: Any, parts: Mapping[str, Any]) -> nn.Module:
    """Build a model without gates, and remember what it was built of."""
    network = _BUILD(base, parts)
    _PARTS[network] = repr((base, parts))
    return network


def _analyse_once(
    network: nn.Module,
    shape: tuple[int, ...],
    ignore: Sequence[str] = (),
    only: Sequence[str] | None = None,
    gate: Gate = Gate()
) -> tuple[Analysis, float]:
    """Analyse each model once a process."""
    arguments = shape, ignore, only, gate
    if network not in _PARTS or models.verify is not _VERIFY:
        return _ANALYSE(network, *arguments)
    # An analysis serves all gate methods that have gates for all channels.
    method = gate if gate.type == 'scp' else None
    shapes = [tensor.shape for tensor in network.state_dict().values()]
    # A test, or a pruned config, may have changed what was built.
    key = _PARTS[network], repr((network, shapes, shape, ignore, only, method))
    if key not in _ANALYSES:
        _ANALYSES[key] = _ANALYSE(network, *arguments)
    return copy.deepcopy(_ANALYSES[key])


def build_runner(
        cfg: Config,
        build: Callable[[Config], Runner] = Runner.from_cfg) -> Runner:
    """Build the runner of a config, in which gates travel far enough."""
    _fit_travel_(cfg)
    return build(cfg)


def train(cfg: Config) -> tuple[Runner, Recorder]:
    """Train what a config says, with a recorder."""
    runner, recorder = build_runner(cfg), Recorder()
    runner.register_hook(recorder)
    runner.train()
    return runner, recorder


def run_tool(name: str, *arguments: object, cwd: Path) -> Outcome:
    """Run one of our command lines, in this process to save the imports.

    Only stderr is caught: mmengine's loggers keep the stdout they were made
    with.
    """
    stderr = io.StringIO()
    with _as_program(TOOLS / name, [str(one) for one in arguments], cwd), \
            contextlib.redirect_stderr(stderr):
        try:
            runpy.run_path(str(TOOLS / name), run_name='__main__')
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
    return Outcome(status, stderr.getvalue())


@contextlib.contextmanager
def _as_program(path: Path, arguments: list[str], cwd: Path) -> Iterator[None]:
    argv, environment = sys.argv, dict(os.environ)
    sys.argv = [str(path), *arguments]
    try:
        with contextlib.chdir(cwd):
            yield
    finally:
        sys.argv = argv
        os.environ.clear()
        os.environ.update(environment)


def run_program(path: Path, *arguments: object, cwd: Path) -> str:
    """Run a Python program in a process of its own; return its output.

    Of this package, that process has imported nothing before.

    Raises:
        RuntimeError: If it fails; shows the end of its output.
    """
    server = _fork_server()
    assert server.stdin is not None and server.stdout is not None
    with tempfile.NamedTemporaryFile('r', errors='replace') as output:
        request = dict(
            program=[str(path), *map(str, arguments)],
            cwd=str(cwd),
            env=dict(os.environ, OMP_NUM_THREADS='1'),
            output=output.name)
        print(json.dumps(request), file=server.stdin, flush=True)
        status = server.stdout.readline().strip()
        printed = output.read()
    if status != '0':
        raise RuntimeError(
            f'{path.name} ended with status {status}: {printed[-2000:]}')
    return printed


@functools.cache
def _fork_server() -> subprocess.Popen[str]:
    """A process that saves each program the imports; it ends with this one."""
    return subprocess.Popen(
        [sys.executable, '-W', 'ignore', HELPERS / 'fork_server.py'],
        env=dict(os.environ, OMP_NUM_THREADS='1', PYTHONPATH=PYTHONPATH),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True)


def tree(folder: Path) -> dict[str, bytes]:
    """Content of every file below a folder; folders are empty."""
    return {
        str(path.relative_to(folder)):
        path.read_bytes() if path.is_file() else b''
        for path in sorted(folder.rglob('*'))
        if '__pycache__' not in path.parts
    }


@pytest.fixture()
def process_group(tmp_path: Path,
                  monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process, as the only one of a group."""
    monkeypatch.setenv('LOCAL_RANK', '0')
    torch.distributed.init_process_group(
        'gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@contextlib.contextmanager
def written_for(reader: bool) -> Iterator[None]:
    """Have configs formatted and pictures rendered as for a reader, or not.

    Each training and each export writes some of both, which takes as long as
    the training itself here.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            yapf_api, 'FormatCode',
            FORMAT_CODE if reader else lambda text, **_: (text, True))
        for module, name, draw in DRAWING:
            patch.setattr(module, name, draw if reader else _emptied(draw))
        yield


def _emptied(draw: Callable[..., Figure | None]) -> Callable[..., Any]:
    """A function that draws a figure and takes all out of it."""

    def drawn(*args: Any, **options: Any) -> Figure | None:
        figure = draw(*args, **options)
        if figure is not None:
            figure.clear()
        return figure

    return drawn


@pytest.fixture(scope='session', autouse=True)
def plain_files() -> Iterator[None]:
    """Nobody reads the configs and pictures of most tests."""
    with written_for(False):
        yield


@pytest.fixture()
def rendered_pictures() -> Iterator[None]:
    """A training gives its visualizer the pictures themselves."""
    with written_for(True):
        yield


def remember_analyses_(patch: pytest.MonkeyPatch) -> None:
    """Have no gated model analysed twice, whatever builds it."""
    patch.setattr(models, 'build_base_model', _build_base)
    patch.setattr(models, 'analyse_model', _analyse_once)


@pytest.fixture(scope='session', autouse=True)
def remembered_analyses() -> Iterator[None]:
    """Most tests train the same model."""
    with pytest.MonkeyPatch.context() as patch:
        remember_analyses_(patch)
        yield


@pytest.fixture(scope='session', autouse=True)
def distinct_runners() -> Iterator[None]:
    """Two runners of one second share no log, as they do by mmengine."""
    set_up, numbers = Runner.setup_env, itertools.count()

    def setup_env(runner: Runner, env_cfg: Any) -> None:
        set_up(runner, env_cfg)
        runner._timestamp += f'_{next(numbers):06}'

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Runner, 'setup_env', setup_env)
        yield


@pytest.fixture(scope='session')
def libraries() -> None:
    """All of mmsegmentation, imported, and left out of collections too."""
    register_all_modules(init_default_scope=False)
    gc.collect()
    gc.freeze()


@pytest.fixture(scope='session')
def project(libraries: None,
            tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The user's project: drawn data, a config, the drop-in over it."""
    folder = tmp_path_factory.mktemp('project')
    make_demo_data(folder / 'data', train=8, val=4, size=64, seed=0)
    data = repr(str(folder / 'data'))
    dense, gated = folder / 'my_config.py', folder / f'{NAME}.py'
    dense.write_text(
        DENSE.replace('DATA_ROOT', data, 1).replace('ITERATIONS',
                                                    str(ITERATIONS)))
    (folder / 'drop_in.py').write_text(DROP_IN.replace('TARGET', str(TARGET)))
    gated.write_text(SHORT.replace('PHASES', str(PHASES)))
    return Project(folder, dense, gated)


@pytest.fixture(scope='session')
def trained(project: Project,
            tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A gated training, from its first iteration to settled gates."""
    work_dir = tmp_path_factory.mktemp('trained')
    runner, recorder = train(project.load(work_dir))
    return Trained(project.gated, work_dir / f'iter_{ITERATIONS}.pth',
                   work_dir, runner, recorder)


@pytest.fixture(scope='session')
def exported(trained: Trained,
             tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The trained checkpoint, exported by the command line."""
    cwd = tmp_path_factory.mktemp('exported')
    with written_for(True):
        outcome = run_tool(
            'export.py',
            trained.config,
            trained.checkpoint,
            '--out-dir',
            cwd / 'pair',
            cwd=cwd)
    if outcome.status:
        raise RuntimeError(outcome.stderr)
    return Exported(cwd / 'pair')


@pytest.fixture()
def changed(
        trained: Trained,
        tmp_path: Path) -> Callable[[Callable[[dict[str, Any]], None]], Path]:
    """Copies of the trained checkpoint, changed by a function in place."""

    def change(edit: Callable[[dict[str, Any]], None]) -> Path:
        content = torch.load(
            trained.checkpoint, map_location='cpu', weights_only=False)
        edit(content)
        path = tmp_path / 'changed.pth'
        torch.save(content, path)
        return path

    return change
