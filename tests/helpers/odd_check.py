"""Check of one odd project, from its training to a fine-tuned export."""
from __future__ import annotations

import contextlib
import copy
import dataclasses
import random
import traceback
from pathlib import Path
from typing import Any, Iterator

import numpy as np
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gdp_mmseg.export.export import export
from gdp_mmseg.report.tables import Report

from helpers.odd_models import TorchImages
from helpers.odd_projects import ITERATIONS, Project

NAME = 'odd'
# Relative difference of predictions in single precision.
TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Result of a check.

    Args:
        seed (int): Seed of the project.
        result (str): ``'trained'``, ``'refused'`` or ``'failed'``.
        kind (str): Step that failed; empty otherwise.
        message (str): First line of the error, or an empty string.
        reached (float, optional): Share of the FLOPs that was kept.
        target (float): Share of the FLOPs that was to be kept.
    """
    seed: int
    result: str
    target: float
    kind: str = ''
    message: str = ''
    reached: float | None = None


class Failure(Exception):
    """Something that must not happen.

    Args:
        kind (str): Step that failed.
        message (str): What was seen.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f'{kind}: {message}')
        self.kind, self.message = kind, message


class Begun(Hook):
    """Hook that remembers that a first iteration began."""
    begun = False

    def before_train_iter(self, *_: Any, **__: Any) -> None:
        """Remember it."""
        self.begun = True


class Weights(Hook):
    """Hook that copies the state before the first and after the last step."""
    priority = 'LOWEST'

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []

    def before_train(self, runner: Any) -> None:
        """Copy the state that the training starts from."""
        self._copy(runner.model)

    def after_train(self, runner: Any) -> None:
        """Copy the state that the training ended with."""
        self._copy(runner.model)

    def _copy(self, model: nn.Module) -> None:
        self.states.append({
            name: value.detach().clone()
            for name, value in model.state_dict().items()
        })


def check(project: Project, folder: Path) -> Outcome:
    """Check that a project is refused at its start, or goes all the way.

    Args:
        project (Project): The project.
        folder (Path): A new folder, for its files.
    """
    target = project.config.model.gdp.target
    try:
        refusal = _train(project.config, folder)
        if refusal:
            return Outcome(
                project.seed, 'refused', target, message=_line(refusal))
        report = _exported(project.config, folder)
        _same_predictions(project.config, folder)
        _count_flops(project.config, folder, report)
        _fine_tune(folder)
    except Failure as failure:
        return Outcome(project.seed, 'failed', target, failure.kind,
                       failure.message)
    return Outcome(
        project.seed, 'trained', target, reached=round(report.reached, 4))


@contextlib.contextmanager
def _step(kind: str) -> Iterator[None]:
    """Turn every error of a step into a failure of that step."""
    try:
        yield
    except Failure:
        raise
    except Exception as error:
        raise Failure(kind, f'{_line(error)} at {_place(error)}') from error


def _line(error: BaseException) -> str:
    return f'{type(error).__name__}: {str(error).splitlines()[0]}'[:600]


def _place(error: BaseException) -> str:
    """Name file and line of the code that raised an error."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f'{Path(last.filename).name}:{last.lineno}'


def _raised_by_package(error: BaseException) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return any('gdp_mmseg' in Path(frame.filename).parts for frame in frames)


def _train(cfg: Config, folder: Path) -> Exception | None:
    """Train a project; return the error with which it was refused."""
    begun = Begun()
    cfg = copy.deepcopy(cfg)
    cfg.work_dir = str(folder / 'work')
    # mmengine keeps loggers and visualizers of a process by this name.
    cfg.experiment_name = f'{folder.name}_work'
    try:
        runner = Runner.from_cfg(cfg)
        runner.register_hook(begun)
        runner.train()
    except Exception as error:
        text = str(error)
        if (not begun.begun and isinstance(error, ValueError)
                and 'expected' in text and 'but got' in text
                and _raised_by_package(error)):
            return error
        kind = 'training' if begun.begun else 'start'
        raise Failure(kind, f'{_line(error)} at {_place(error)}') from error
    return None


def _checkpoint(folder: Path) -> str:
    return str(folder / 'work' / f'iter_{ITERATIONS}.pth')


def _exported(cfg: Config, folder: Path) -> Report:
    """Export a project, evaluated if it has an evaluator."""
    with _step('export'):
        return export(
            copy.deepcopy(cfg),
            _checkpoint(folder),
            folder / 'pair',
            NAME,
            evaluate='test_evaluator' in cfg,
            progress=lambda line: None)


def _seed() -> None:
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)


def _model(model: Any, path: str | Path) -> nn.Module:
    """Build a model and load its weights, in eval mode."""
    init_default_scope('mmseg')
    network = revert_sync_batchnorm(MODELS.build(copy.deepcopy(model)))
    content = torch.load(path, map_location='cpu', weights_only=False)
    missing, extra = network.load_state_dict(
        content['state_dict'], strict=False)
    if missing or extra:
        raise Failure('loading', f'{missing} missing, {extra} left over')
    return network.eval()


def _pruned(folder: Path) -> nn.Module:
    cfg = Config.fromfile(folder / 'pair' / f'{NAME}_pruned.py')
    return _model(cfg.model, folder / 'pair' / f'{NAME}_pruned.pth')


def _numbers(value: Any) -> Iterator[Tensor]:
    """Yield all tensors in what a prediction returns."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, BaseDataElement):
        for name in sorted(value.keys()):
            yield from _numbers(value.get(name))
    elif isinstance(value, dict):
        for name in sorted(value):
            yield from _numbers(value[name])
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _numbers(item)


def _images(cfg: Config) -> TorchImages:
    """Other images than those that the project trains and tests with."""
    options = cfg.train_dataloader.dataset
    return TorchImages(12, options.bands, options.size, options.classes)


@torch.no_grad()
def _same_predictions(cfg: Config, folder: Path) -> None:
    """Compare what the gated network and the exported files predict."""
    with _step('loading'):
        networks = [_model(cfg.model, _checkpoint(folder)), _pruned(folder)]
    images = _images(cfg)
    with _step('prediction'):
        for index in (9, 10, 11):
            item = images[index]
            found = []
            for network in networks:
                batch = dict(
                    inputs=[item['inputs'].clone()],
                    data_samples=[copy.deepcopy(item['data_samples'])])
                _seed()
                found.append([*_numbers(network.test_step(batch))])
            _compare(*found)


def _compare(gated: list[Tensor], pruned: list[Tensor]) -> None:
    shapes = [[tuple(one.shape) for one in found] for found in (gated, pruned)]
    if shapes[0] != shapes[1]:
        raise Failure('prediction', f'shapes {shapes[0]} and {shapes[1]}')
    for one, other in zip(gated, pruned):
        # Labels follow from the logits, and may jump at a tie.
        if one.is_floating_point():
            scale = float(one.abs().max()) or 1.
            difference = float((one - other).abs().max()) / scale
            if not difference <= TOLERANCE:
                raise Failure(
                    'prediction', 'relative difference of '
                    f'{difference:.1e} in {tuple(one.shape)}')


def _flops(network: Any, shape: tuple[int, ...], sample: Any) -> int:
    """Count the multiply-adds of a prediction, or of the logits if more."""
    found = []
    for mode in ('tensor', 'predict'):
        with torch.no_grad(), sdpa_kernel(
                SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            network(torch.zeros(shape), data_samples=[sample], mode=mode)
        found.append(counter.get_total_flops() // 2)
    return max(found)


def _count_flops(cfg: Config, folder: Path, report: Report) -> None:
    """Compare the FLOPs of the report with those of the exported network."""
    with _step('FLOPs'):
        sample = _images(cfg)[0]['data_samples']
        shape = tuple(report.input_shape)
        dense = copy.deepcopy(cfg.model)
        dense.type = dense.pop('base')
        del dense.gdp
        init_default_scope('mmseg')
        networks = dict(
            dense=revert_sync_batchnorm(MODELS.build(dense)).eval(),
            pruned=_pruned(folder))
        counts = {
            name: _flops(network, shape, copy.deepcopy(sample))
            for name, network in networks.items()
        }
    for name, count in counts.items():
        if report.network(name).flops != count:
            raise Failure(
                'FLOPs', f'{name}: {report.network(name).flops} in the '
                f'report, {count} counted')
    share = counts['pruned'] / counts['dense']
    # The cost counts what the logits do not need as fixed, so a prediction of
    # several passes may cost less than counted, but never more.
    if share > report.reached + 0.002:
        raise Failure(
            'FLOPs', f'{report.reached:.4f} kept by the gates, {share:.4f} '
            'counted')


def _fine_tune(folder: Path) -> None:
    """Train the export for one step, without and with a learning rate."""
    path = folder / 'pair' / f'{NAME}_pruned.pth'
    file = torch.load(path, weights_only=True)['state_dict']
    for rate in (0., 1e-2):
        kind = f'fine-tuning with a rate of {rate}'
        with _step(kind):
            before, after = _one_step(folder, rate)
        names = [name for name in file if _changed(file, before, name)]
        if names:
            raise Failure(kind, f'begins with other {names[:3]}')
        # A model may move its own slow copy or buffers at any rate.
        kernels = [
            name for name, value in file.items()
            if value.dim() > 1 and '.slow.' not in f'.{name}'
            and name.rpartition('.')[2] not in _MOVED
        ]
        moved = [name for name in kernels if _changed(file, after, name)]
        if rate == 0 and moved:
            raise Failure(kind, f'ends with other {moved[:3]}')
        if rate and not moved:
            raise Failure(kind, 'moves no kernel')
        if not all(bool(value.isfinite().all()) for value in after.values()):
            raise Failure(kind, 'ends with numbers that are not finite')


# Buffers that a forward pass in training mode moves.
_MOVED = ('mean', 'weight_u', 'weight_v', '_u', '_v')


def _changed(file: dict[str, Tensor], state: dict[str, Tensor],
             name: str) -> bool:
    return name not in state or not torch.equal(file[name], state[name])


def _one_step(folder: Path,
              rate: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Train for one step; return the states before and after."""
    cfg = Config.fromfile(folder / 'pair' / f'{NAME}_pruned.py')
    cfg.work_dir = str(folder / f'tuned{rate}')
    cfg.experiment_name = f'{folder.name}_tuned{rate}'
    cfg.train_cfg.max_iters = 1
    optimizer = cfg.optim_wrapper.optimizer
    optimizer.lr = rate
    optimizer.weight_decay = 0.
    runner = Runner.from_cfg(cfg)
    weights = Weights()
    runner.register_hook(weights)
    runner.train()
    before, after = weights.states
    return before, after
