"""Types that mmengine's checkpoints contain besides tensors and plain types.

``torch.load(weights_only=True)`` reads only types that it was told of. Since
torch 2.6 this is the default, so that mmengine 0.10.7, which tells it of none,
cannot load the log buffers in the checkpoints that it saved itself.
"""
from __future__ import annotations

import functools
import pickle
from typing import Any, Callable

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.optim import OneCycleParamScheduler

# Codes of NumPy's kinds of numbers: signed, unsigned, real, bool, text.
_NUMBERS = ('i1', 'i2', 'i4', 'i8', 'u1', 'u2', 'u4', 'u8', 'f2', 'f4', 'f8',
            'b', 'U1')
# Classes whose methods mmengine saves by name: the statistics of a log buffer,
# the annealing of a scheduler.
_OWNERS = (HistoryBuffer, OneCycleParamScheduler)


def allow_mmengine_types() -> None:
    """Make ``torch.load(weights_only=True)`` read mmengine's checkpoints.

    The types stay allowed in this process. None of them runs code from the
    file. Other libraries may remove a type again, so this function is called
    before each load of this package.
    """
    known = torch.serialization.get_safe_globals()
    missing = [one for one in _mmengine_types() if one not in known]
    if missing:
        torch.serialization.add_safe_globals(missing)


@functools.cache
def _mmengine_types() -> tuple[Any, ...]:
    """Return the types and functions that may be unpickled."""
    numpy_functions: list[Any] = [
        np.zeros(1).__reduce__()[0],
        np.float64(0).__reduce__()[0]
    ]
    return (
        *_OWNERS,
        _named(_method, 'builtins', 'getattr'),
        np.ndarray,
        np.dtype,
        *dict.fromkeys(type(np.dtype(kind)) for kind in _NUMBERS),
        # The names that versions 1 and 2 of NumPy save.
        *(_named(function, module, function.__name__)
          for function in numpy_functions
          for module in ('numpy.core.multiarray', 'numpy._core.multiarray')))


def _named(function: Callable[..., Any], module: str, name: str) -> Any:
    """Return a function under the name by which a file refers to it."""
    named: Any = functools.partial(function)
    named.__module__ = module
    # torch 2.5 reads the first, later versions the second.
    named.__name__ = named.__qualname__ = name
    return named


def _method(owner: Any, name: str) -> Any:
    """Look up a method of mmengine's classes, instead of any attribute.

    A file in pickle's protocol 2 refers to a method by ``getattr``.

    Raises:
        UnpicklingError: If it is no such method.
    """
    if not any(owner is one
               for one in _OWNERS) or (name.startswith('__')
                                       or name not in vars(owner)):
        raise pickle.UnpicklingError(
            f'GLOBAL builtins.getattr for {name} was not allowed')
    return getattr(owner, name)
