"""Outputs of the gated and of the exported network, compared on inputs."""
from __future__ import annotations

import itertools
from typing import Any

import torch
from mmengine.config import Config
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..engine.model import find_pruner
from ..surgery.verify import largest_difference

TOLERANCE = 1e-4


def compare(cfg: Config, gated: nn.Module, exported: nn.Module,
            needs_data: bool) -> dict[str, Any]:
    """Largest difference of outputs on a few inputs, and what these are.

    Args:
        cfg (Config): Its test set is where the inputs are from.
        gated (nn.Module): In eval mode.
        exported (nn.Module): In eval mode.
        needs_data (bool): Whether a missing test set is an error; if not,
            the inputs are random then.

    Raises:
        RuntimeError: If the outputs are not equal.
    """
    settings = cfg.get('test_dataloader') or cfg.get('val_dataloader')
    try:
        loader = Runner.build_dataloader(_in_this_process(settings))
    except (FileNotFoundError, AssertionError, TypeError):
        if needs_data:
            raise
        shape = find_pruner(gated).analysis.input_shape
        inputs = [torch.randn(shape) for _ in range(2)]
        source = '2 random inputs (no data set found)'
    else:
        inputs = _preprocessed(loader, gated)
        source = f'{len(inputs)} inputs of the test set'
    difference = max_rel_diff(gated, exported, inputs)
    # Also false for nan.
    if not difference <= TOLERANCE:
        raise RuntimeError(
            f'expected equal outputs of the gated and the pruned network, '
            f'but got a relative difference of {difference:.1e} on {source}; '
            'nothing was written. Please report this with the config')
    return dict(max_rel_diff=difference, compared_on=source)


def _in_this_process(settings: Any) -> dict[str, Any]:
    """A loader's config, without what only goes with other processes."""
    plain = dict(settings, num_workers=0, persistent_workers=False)
    for key in ('prefetch_factor', 'timeout', 'multiprocessing_context'):
        plain.pop(key, None)
    return plain


def _preprocessed(loader: Any, model: nn.Module) -> list[Tensor]:
    """Inputs ``(1, C, H, W)`` of the first two batches of a loader."""
    preprocess: Any = model.data_preprocessor
    images: list[Tensor] = []
    for data in itertools.islice(loader, 2):
        images += [image[None] for image in preprocess(data, False)['inputs']]
    settings = getattr(model, 'test_cfg', None) or {}
    if settings.get('mode') == 'slide':
        # Such a model may take windows only.
        height, width = settings['crop_size']
        images = [image[..., :height, :width] for image in images]
    return images


@torch.no_grad()
def max_rel_diff(gated: nn.Module, pruned: nn.Module,
                 inputs: list[Tensor]) -> float:
    """Largest difference of outputs, over the largest output."""
    return max(
        largest_difference(*([
            leaf for leaf in tree_leaves(model(image, mode='tensor'))
            if isinstance(leaf, Tensor)
        ] for model in (pruned, gated))) for image in inputs)
