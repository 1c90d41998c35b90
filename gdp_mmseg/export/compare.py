"""Comparison of the gated network and the exported files on inputs."""
from __future__ import annotations

import copy
import dataclasses
import itertools
import time
from typing import Any, Callable, Mapping

import torch
from mmengine.config import Config
from mmengine.dataset import BaseDataset, Compose
from mmengine.registry import DATASETS
from mmengine.runner import Runner
from torch import Tensor, nn

from ..analysis.tracer import clone_model, fixed_seeds
from ..engine.forwards import inference_forward, loss_forward, tensors_of
from ..engine.model import find_pruner
from ..surgery.outputs import (TOLERANCE, first_line, largest_difference,
                               outputs_of)

# Largest relative difference of a metric. Rounding may change the class of a
# pixel between two classes that are equally likely, and no more than that.
METRIC_TOLERANCE = 0.01
_BATCHES = 2
# Images of a batch that are compared one by one. A classifier is often tested
# on hundreds at a time.
_IMAGES = 8
# Largest side of made-up images for a loss step: it is no matter of size.
_SMALL = 128
# Errors by which a data set says that its files are missing; mmengine and
# mmseg use the first two. Others, e.g. a TypeError, are errors of its code.
_NO_DATA = (OSError, AssertionError, RuntimeError, ValueError)

Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Result of a comparison.

    Args:
        max_rel_diff (float): Largest difference between outputs of the two
            networks, relative to the largest output.
        compared_on (str): Inputs on which they were compared.
        rounds (tuple[tuple[float, ...], ...]): Milliseconds of a forward pass
            of the dense, the gated and the exported network, by rounds.
    """
    max_rel_diff: float
    compared_on: str
    rounds: tuple[tuple[float, ...], ...] = ()


def compare(cfg: Config,
            gated: nn.Module,
            exported: nn.Module,
            needs_data: bool,
            progress: Progress,
            dense: nn.Module | None = None) -> Comparison:
    """Compare the outputs and predictions of two networks on a few inputs.

    Compared are the logits (``mode='tensor'``) and what ``test_step`` returns:
    preprocessing, sliding windows, and all heads of the prediction.

    Args:
        cfg (Config): Config with the test set that the inputs come from.
        gated (nn.Module): Gated network in eval mode.
        exported (nn.Module): Exported network in eval mode.
        needs_data (bool): Whether a missing test set is an error. If it is
            not, the inputs are random in that case.
        progress (Progress): Called with a line that says so.
        dense (nn.Module, optional): Network without gates, which is timed
            beside the two.

    Raises:
        RuntimeError: If the outputs are not equal.
    """
    shape = find_pruner(gated).analysis.input_shape
    batches = load_batches(
        cfg.get('test_dataloader') or cfg.get('val_dataloader'), needs_data,
        progress)
    if batches is None:
        images = [torch.randn(shape) for _ in range(_BATCHES)]
        source = f'{_BATCHES} random inputs (no data set found)'
    else:
        images = preprocessed(batches, gated)
        source = f'{len(images)} inputs of the test set'
    timed = _Timed(_logits)
    rounds = []
    differences = []
    for index, image in enumerate(images):
        differences.append(_difference(timed, gated, exported, image))
        # The first round allocates memory and chooses algorithms.
        if index and dense is not None and image.shape == shape:
            outputs_of(dense, timed, image)
            rounds.append(timed.last(3))
    difference = max(
        *differences,
        *(_difference(_predict, gated, exported, batch)
          for batch in batches or ()))
    # The comparison is also false for nan.
    if not difference <= TOLERANCE:
        raise RuntimeError(
            f'expected equal outputs of the gated and the pruned network, '
            f'but got a relative difference of {difference:.1e} on {source}; '
            'nothing was written. Please report this with the config')
    return Comparison(difference, source, tuple(rounds))


def check_trainable(cfg: Config, gated: nn.Module, exported: nn.Module,
                    progress: Progress) -> None:
    """Check that the exported network can be fine-tuned: run one loss step.

    The step runs on the first images of the training set, or on made-up ones
    if there is no data: on small ones if the gated network takes them. A step
    that the gated network cannot run either says nothing about the export.

    Raises:
        RuntimeError: If only the exported network fails, or its loss is not
            finite.
    """
    settings = cfg.get('train_dataloader')
    # Norms need two images in training.
    batches = load_batches(
        settings and dict(settings, batch_size=2), False, progress)
    _, channels, *sides = find_pruner(gated).analysis.input_shape

    def step(network: nn.Module, side: int) -> None:
        model: Any = clone_model(network).train()
        with fixed_seeds():
            if batches:
                data = model.data_preprocessor(copy.deepcopy(batches[0]), True)
                loss = model.parse_losses(model(**data, mode='loss'))[0]
            else:
                size = [min(side, length) for length in sides]
                losses = loss_forward(model, torch.randn(2, channels, *size))
                loss = torch.stack([one.mean() for one in losses]).sum()
            loss.backward()
        if not bool(loss.isfinite()):
            raise FloatingPointError(f'a loss of {float(loss)}')

    whole = max(sides)
    tried = [whole] if batches else [min(_SMALL, whole), whole]
    for side in dict.fromkeys(tried):
        try:
            return step(exported, side)
        except Exception as error:  # a user's forward can raise anything
            try:
                step(gated, side)
            except Exception:
                continue
            raise RuntimeError(
                'expected a loss step of the exported network, as the gated '
                f'one makes it, but got {first_line(error)}; nothing was '
                'written. Please report this with the config') from error


def check_metrics(gated: Mapping[str, float], pruned: Mapping[str,
                                                              float]) -> None:
    """Check that two evaluations agree.

    Raises:
        RuntimeError: If a metric differs by more than rounding explains.
    """
    for name, value in gated.items():
        found = pruned.get(name, float('nan'))
        # Two metrics that are nan agree: a class may be absent.
        if value != value and found != found:
            continue
        if not abs(value -
                   found) <= METRIC_TOLERANCE * max(abs(value), abs(found)):
            raise RuntimeError(
                f'expected equal metrics of the gated and the pruned network, '
                f'but got {name} {value} and {found}; nothing was written. '
                'Please report this with the config')


def load_batches(settings: Any, needs_data: bool,
                 progress: Progress) -> list[Any] | None:
    """Load the first batches of a loader; None if there is no data.

    Args:
        settings (Any): Config of the loader, or None.
        needs_data (bool): Whether missing files are an error.
        progress (Progress): Called with a line if files are missing.
    """
    if not settings:
        return None
    # Here, an error of a transform cannot be taken for missing data.
    _build_pipelines(settings.get('dataset'))
    missing: tuple[type[Exception], ...] = _NO_DATA
    try:
        loader = Runner.build_dataloader(_in_this_process(settings))
        # From here on, transforms run, whose errors are not those of files.
        missing = (FileNotFoundError, )
        return list(itertools.islice(loader, _BATCHES))
    except missing as error:
        if needs_data:
            raise
        progress('note: random inputs take the place of a data set that '
                 f'cannot be read ({first_line(error)})')
        return None


def _build_pipelines(dataset: Any) -> None:
    """Build the transforms of a data set, and of those that it wraps."""
    if isinstance(dataset, (list, tuple)):
        for one in dataset:
            _build_pipelines(one)
    elif isinstance(dataset, Mapping):
        kind = dataset.get('type')
        kind = DATASETS.get(kind) if isinstance(kind, str) else kind
        # Others may build their transforms in a way that is not known here.
        if (isinstance(kind, type) and issubclass(kind, BaseDataset)
                and isinstance(dataset.get('pipeline'), (list, tuple))):
            Compose(copy.deepcopy(dataset['pipeline']))
        for key in ('dataset', 'datasets'):
            _build_pipelines(dataset.get(key))


def _in_this_process(settings: Any) -> dict[str, Any]:
    """Copy a loader's config without the options of worker processes."""
    plain = dict(settings, num_workers=0, persistent_workers=False)
    for key in ('prefetch_factor', 'timeout', 'multiprocessing_context'):
        plain.pop(key, None)
    return plain


def preprocessed(batches: list[Any], model: nn.Module) -> list[Tensor]:
    """Inputs ``(1, C, H, W)`` of the first images of some batches."""
    preprocess: Any = model.data_preprocessor
    images: list[Tensor] = []
    for data in batches:
        inputs = preprocess(copy.deepcopy(data), False)['inputs']
        images += [image[None] for image in inputs[:_IMAGES]]
    settings = getattr(model, 'test_cfg', None) or {}
    if settings.get('mode') == 'slide':
        # A model that is tested on windows may accept nothing larger.
        height, width = settings['crop_size']
        images = [image[..., :height, :width] for image in images]
    return images


def _predict(model: Any, batch: Any) -> list[Tensor]:
    """Preprocess and predict a batch; return all tensors of the result."""
    # Preprocessing and prediction may write into the batch.
    return list(tensors_of(model.test_step(copy.deepcopy(batch))))


def _logits(model: Any, image: Any) -> list[Tensor]:
    """Run the model up to the logits; return all tensors of the result."""
    return list(tensors_of(inference_forward(model, image)))


class _Timed:
    """Forward that records how long each call takes.

    Args:
        forward (Callable[[Any, Any], Any]): The forward.
    """

    def __init__(self, forward: Callable[[Any, Any], Any]) -> None:
        self.forward = forward
        self.milliseconds: list[float] = []

    def __call__(self, model: Any, inputs: Any) -> Any:
        start = time.perf_counter()
        outputs = self.forward(model, inputs)
        self.milliseconds.append((time.perf_counter() - start) * 1e3)
        return outputs

    def last(self, number: int) -> tuple[float, ...]:
        """Milliseconds of the last calls, the last one first."""
        return tuple(self.milliseconds[:-number - 1:-1])


def _difference(forward: Any, gated: nn.Module, exported: nn.Module,
                inputs: Any) -> float:
    """Largest difference of outputs, relative to the largest output.

    Both networks start from the same random numbers and from their own state,
    because a forward pass may draw numbers or write into buffers.
    """
    gates = find_pruner(gated).gates
    return largest_difference(
        outputs_of(exported, forward, inputs),
        outputs_of(gated, forward, inputs, shared=gates))
