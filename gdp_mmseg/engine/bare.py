"""Build of networks whose weights are loaded afterwards, or never used."""
from __future__ import annotations

import contextlib
from typing import Any, Iterator

import torch
from torch import Tensor, nn

# Functions of torch.nn.init that draw random numbers.
_RANDOM = ('uniform_', 'normal_', 'trunc_normal_', 'xavier_uniform_',
           'xavier_normal_', 'kaiming_uniform_', 'kaiming_normal_',
           'orthogonal_', 'sparse_')
# Not zero, so that a forward which divides by the norm of a kernel works.
_VALUE = 0.01


@contextlib.contextmanager
def without_random_weights() -> Iterator[None]:
    """Let modules that are built inside have constant weights.

    To draw random numbers takes longer than everything else of a build. What
    does not draw any, e.g. the initialisation of norms, is as always.
    """
    drawing = {name: getattr(nn.init, name) for name in _RANDOM}
    for name in _RANDOM:
        setattr(nn.init, name, _fill_)
    try:
        yield
    finally:
        for name, function in drawing.items():
            setattr(nn.init, name, function)


@torch.no_grad()
def _fill_(tensor: Tensor, *_: Any, **__: Any) -> Tensor:
    """Fill a tensor with a constant, in place."""
    return tensor.fill_(_VALUE)
