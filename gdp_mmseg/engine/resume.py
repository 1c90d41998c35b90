"""Exact resume and early errors, for trainings with gates or without."""
from __future__ import annotations

import math
import os
import random
from pathlib import Path
from typing import Any, Iterator, Mapping, Sequence

import numpy as np
import torch
from mmengine.dist import barrier, get_rank, is_main_process
from mmengine.hooks import CheckpointHook, Hook
from mmengine.runner import Runner
from torch import Tensor, nn

from ..registry import HOOKS
from .checkpoint import not_plain, plain, unwrapped
from .matching import check_resume
from .whole_files import (WHOLE, WholeFileBackend, mend_last_checkpoint,
                          pointed_checkpoint)

RandomState = dict[str, Any]
_SKIP = 'or skip this check with GDP_CHECKS=0'


@HOOKS.register_module()
class ResumeHook(Hook):
    """Hook that makes a training resume as if it had not been interrupted.

    - Checkpoints contain the state of the random number generators, and
      validation does not change it. A resumed training draws the numbers that
      the uninterrupted one draws.
    - A checkpoint file is complete or absent, and the last one is removed only
      when the next one is complete. ``--resume`` passes over a damaged file.
    - Weights that are not finite are not saved. Losses that are not finite
      for some iterations in a row end the training.
    - A label that the model has no class for is an error that names the file.

    ``GDPHook`` does all this; a training without gates gets it by
    ``default_hooks = dict(resume=dict(type='gdp_mmseg.ResumeHook'))``.

    Args:
        patience (int): Iterations in a row with a loss that is not finite,
            after which the training ends. Defaults to 10.
    """

    priority = 'NORMAL'

    def __init__(self, patience: int = 10) -> None:
        self.patience = patience
        self._not_finite = 0
        # State of the loaded checkpoint, until the training begins.
        self._loaded: RandomState | None = None
        # State of the training, while a validation runs.
        self._paused: RandomState | None = None
        # Pointer that an earlier training left in the work folder.
        self._earlier: tuple[str, int] | None = None

    def before_run(self, runner: Runner) -> None:
        """Check the files that a resume would start from.

        Raises:
            ValueError: If there are checkpoints, but no complete one.
        """
        if runner.cfg.get('resume') and not runner.cfg.get('load_from'):
            if is_main_process():
                mend_last_checkpoint(
                    Path(runner.work_dir), runner.logger.warning)
            barrier()

    def after_load_checkpoint(self, runner: Runner,
                              checkpoint: dict[str, Any]) -> None:
        """Keep the random state of a checkpoint until the training begins.

        Raises:
            ValueError: If the training would resume from a checkpoint with
                gates, and its model has none, or the other way round.
        """
        meta = checkpoint.get('meta') or {}
        self._loaded = meta.get('random_state')
        if getattr(runner, '_resume', False):
            check_resume(
                network_of(runner.model),
                checkpoint.get('state_dict') or {})

    def before_train(self, runner: Runner) -> None:
        """Make checkpoint hooks write local files completely or not at all."""
        WholeFileBackend.forget(Path(runner.work_dir))
        loader = getattr(runner, 'train_dataloader', None)
        dataset = getattr(loader, 'dataset', None)
        meta = getattr(dataset, 'metainfo', None) or {}
        for key in not_plain(meta, 'metainfo'):
            runner.logger.warning(
                f'GDP: expected numbers, strings, lists and dicts at {key} of '
                'the training set, but got an object, which is saved as its '
                'text in checkpoints')
        self._earlier = (None if runner.iter else pointed_checkpoint(
            Path(runner.work_dir)))
        for hook in runner.hooks:
            if (isinstance(hook, CheckpointHook)
                    and '://' not in str(hook.out_dir)
                    and hook.backend_args is hook.file_client_args is None):
                hook.backend_args = dict(backend=WHOLE)

    def before_train_epoch(self, runner: Runner) -> None:
        """Restore the random state right before a resumed training goes on."""
        state, self._loaded = self._loaded, None
        # Fine-tuning starts with fresh numbers. Processes with different
        # seeds have states of their own, and the checkpoint has the first's.
        if state is None or not runner.iter or (get_rank() and
                                                (runner.cfg.get('randomness')
                                                 or {}).get('diff_rank_seed')):
            return
        loop: Any = runner.train_loop
        if hasattr(loop, 'dataloader_iterator'):
            loop.dataloader_iterator = _SkippingIterator(loop, state)
        else:
            set_random_state(state)

    def before_train_iter(self,
                          runner: Runner,
                          batch_idx: int,
                          data_batch: Any = None) -> None:
        """Check the labels of a batch, unless GDP_CHECKS=0 is set.

        Raises:
            ValueError: If the model has no class for a label.
        """
        if os.environ.get('GDP_CHECKS') != '0':
            check_labels(runner.model, data_batch)

    def after_train_iter(self,
                         runner: Runner,
                         batch_idx: int,
                         data_batch: Any = None,
                         outputs: Any = None) -> None:
        """Count consecutive losses that are not finite.

        Raises:
            FloatingPointError: If there are ``patience`` of them.
        """
        loss = float(torch.as_tensor((outputs or {}).get('loss', 0.)).detach())
        if math.isfinite(loss):
            self._not_finite = 0
            return
        self._not_finite += 1
        runner.logger.warning(f'GDP: the loss is {loss} in iteration '
                              f'{runner.iter + 1}; {self._not_finite} in a '
                              f'row, the training ends at {self.patience}')
        if self._not_finite >= self.patience:
            raise FloatingPointError(
                f'expected finite losses, but got {loss} in '
                f'{self._not_finite} iterations in a row, the last of them '
                f'{runner.iter + 1}; {self._advice(runner)}')

    def before_save_checkpoint(self, runner: Runner,
                               checkpoint: dict[str, Any]) -> None:
        """Add the random state and the widths of an export to the meta.

        Raises:
            FloatingPointError: If a weight is not finite.
        """
        state = unwrapped(checkpoint['state_dict'])
        for name, _ in network_of(runner.model).named_parameters():
            value = state.get(name)
            if value is not None and not value.isfinite().all():
                raise FloatingPointError(
                    f'expected finite weights to save, but got nan or inf in '
                    f'{name} after iteration {runner.iter + 1}; nothing was '
                    f'saved; {self._advice(runner)}')
        meta = checkpoint['meta']
        meta['random_state'] = self._paused or random_state()
        # A data set's own types could not be loaded without running code.
        hub = checkpoint.get('message_hub')
        infos = hub.get('runtime_info') if isinstance(hub, Mapping) else None
        for place in (meta, infos or {}):
            if place.get('dataset_meta'):
                place['dataset_meta'] = plain(place['dataset_meta'])
        widths = ((runner.cfg.get('model') or {}).get('gdp')
                  or {}).get('widths')
        if widths:
            checkpoint['meta']['widths'] = plain(widths)

    def before_val(self, runner: Runner) -> None:
        """Keep the random state of the training during a validation."""
        self._paused = random_state()

    def after_val(self, runner: Runner) -> None:
        """Restore the random state: a resume does not repeat a validation."""
        if self._paused is not None:
            set_random_state(self._paused)
        self._paused = None

    def last_checkpoint(self, runner: Runner) -> str | None:
        """Path of the last checkpoint that this training saved, if any."""
        last = pointed_checkpoint(Path(runner.work_dir))
        return None if last is None or last == self._earlier else last[0]

    def _advice(self, runner: Runner) -> str:
        """Advice for a training whose numbers are not finite."""
        last = self.last_checkpoint(runner)
        if last is None:
            return ('there is no good checkpoint of this training yet; lower '
                    'the learning rate (optim_wrapper.optimizer.lr)')
        return (f'the last good checkpoint is {last}: resume from it with '
                '--resume, at a lower learning rate '
                '(optim_wrapper.optimizer.lr)')


class _SkippingIterator:
    """Iterator that restores the random state after skipped batches.

    An iteration-based loop first skips the batches that were trained on. Some
    versions of mmengine ask for that; others take and drop each batch, which
    draws random numbers. So the state is restored when the first batch to
    train on is requested. Then the loop gets its own iterator back.

    Args:
        loop (Any): mmengine's IterBasedTrainLoop, or one like it.
        state (RandomState): State to restore.
    """

    def __init__(self, loop: Any, state: RandomState) -> None:
        self._loop = loop
        self._inner = loop.dataloader_iterator
        self._state = state
        self._dropped = 0 if hasattr(self._inner, 'skip_iter') else loop.iter

    def __iter__(self) -> Iterator[Any]:
        return self

    def skip_iter(self, iterations: int) -> None:
        """Skip batches that were trained on."""
        self._inner.skip_iter(iterations)

    def __next__(self) -> Any:
        if self._dropped:
            self._dropped -= 1
            return next(self._inner)
        self._loop.dataloader_iterator = self._inner
        set_random_state(self._state)
        # A loader may create its iterator only now, and that draws a number
        # from its generator. The straight training drew it at the start, so
        # the number is drawn from a throw-away generator.
        loader = self._loop.dataloader
        own = loader.generator
        loader.generator = torch.Generator()
        try:
            return next(self._inner)
        finally:
            loader.generator = own


def random_state() -> RandomState:
    """Return the state of all global random number generators.

    Returns:
        RandomState: State of Python, NumPy, torch and the GPU, as tensors and
        plain types that ``torch.load(weights_only=True)`` reads.
    """
    version, words, gauss = random.getstate()
    kind, keys, place, has_gauss, cached = np.random.get_state()
    state: RandomState = dict(
        python=[version, torch.tensor(words), gauss],
        numpy=[
            kind,
            torch.from_numpy(keys.astype(np.int64)),  # type: ignore
            place,
            has_gauss,
            cached
        ],
        torch=torch.get_rng_state())
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state['cuda'] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: RandomState) -> None:
    """Restore what :func:`random_state` returned, loaded to any device."""
    version, words, gauss = state['python']
    random.setstate((version, tuple(words.tolist()), gauss))
    kind, keys, *rest = state['numpy']
    np.random.set_state((kind, keys.cpu().numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state['torch'].cpu())
    if 'cuda' in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state['cuda'].cpu())


def check_labels(model: nn.Module, batch: Any) -> None:
    """Check the labels of a batch against the classes of a model.

    Args:
        model (nn.Module): Segmentor whose decode head (the last one of
            several) has ``num_classes`` and ``ignore_index``, or a classifier
            whose head has ``num_classes``.
        batch (Any): Training batch before preprocessing.

    Raises:
        ValueError: If a label has no class, or the labels are no map of the
            image. The map may be finer or coarser than the image.
    """
    head = getattr(network_of(model), 'decode_head', None)
    if head is None:
        return _check_classes(getattr(network_of(model), 'head', None), batch)
    head = head[-1] if isinstance(head, (nn.ModuleList, Sequence)) else head
    classes = getattr(head, 'num_classes', None)
    if classes is None or not isinstance(batch, Mapping):
        return
    for image, sample in zip(
            batch.get('inputs', ()), batch.get('data_samples', ())):
        labels = getattr(getattr(sample, 'gt_sem_seg', None), 'data', None)
        if labels is None:
            continue
        path = sample.get('seg_map_path', 'an image')
        if (labels.dim() != 3 or len(labels) != 1
                or not _same_scene(labels.shape[1:], image.shape[-2:])):
            raise ValueError(
                'labels: expected one for each pixel of '
                f'{list(image.shape[-2:])}, but got {list(labels.shape)} in '
                f'{path}; replace the file by a map of class numbers of the '
                f'size of its image, {_SKIP}')
        _check_range(labels, classes, getattr(head, 'ignore_index', 255), path)


def _check_classes(head: Any, batch: Any) -> None:
    """Check that each label of a classifier's batch is a class of its head."""
    classes = getattr(head, 'num_classes', None)
    if classes is None or not isinstance(batch, Mapping):
        return
    for sample in batch.get('data_samples') or ():
        labels = getattr(sample, 'gt_label', None)
        if not isinstance(labels, Tensor):
            continue
        if bool(((labels < 0) | (labels >= classes)).any()):
            raise ValueError(
                f'labels: expected classes up to {classes - 1}, but got '
                f'{labels.tolist()} in {sample.get("img_path", "an image")}; '
                f'change num_classes of the head or the data set, {_SKIP}')


def _same_scene(labels: Sequence[int], image: Sequence[int]) -> bool:
    """Tell whether two sizes ``(H, W)`` can be of the same scene.

    Both axes differ by the same factor, but for the rounding of a resize.
    """
    if any(one == other for one, other in zip(labels, image)):
        return tuple(labels) == tuple(image)
    difference = abs(labels[0] * image[1] - labels[1] * image[0])
    return difference <= max(sum(labels), sum(image)) / 2


def _check_range(labels: Tensor, classes: int, ignored: int,
                 path: str) -> None:
    """Check that each label is a class or the ignored value."""
    # A single output may distinguish two classes.
    highest = max(classes, 2) - 1
    least, most = (int(value) for value in labels.aminmax())
    if least >= 0 and most <= highest:
        return
    wrong = labels[((labels < 0) | (labels > highest)) & (labels != ignored)]
    if len(wrong):
        raise ValueError(
            f'labels: expected classes up to {highest}, or {ignored} for none,'
            f' but got {int(wrong[0])} in {path}; change num_classes of the '
            f'heads, reduce_zero_label or the file, {_SKIP}')


def network_of(model: nn.Module) -> nn.Module:
    """Return the model itself, without the wrapper of several processes."""
    return getattr(model, 'module', model)
