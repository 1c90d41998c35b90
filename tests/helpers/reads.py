"""Count how often the host would wait for a GPU to read a value from it."""
from __future__ import annotations

import contextlib
import sys
from typing import Any, Callable, Iterator
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Operators that need values of a tensor on the host, on a GPU at least.
_OPERATORS = ('_local_scalar_dense', 'nonzero', 'masked_select', 'bincount',
              '_unique2', 'equal', 'is_nonzero')
# Methods that copy to the host without an operator if the tensor is there.
_METHODS = ('tolist', 'cpu', 'numpy')
# Modules that read on behalf of another.
_OWN = ('torch', 'helpers', 'unittest')


class _Watch(TorchDispatchMode):

    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__()
        self.note = note

    def __torch_dispatch__(self,
                           func: Any,
                           types: Any,
                           args: Any = (),
                           kwargs: Any = None) -> Any:
        name = func._schema.name.split('::')[1]
        # An index by a mask looks for its positions first.
        masks = name.startswith('index') and any(
            isinstance(one, Tensor) and one.dtype == torch.bool
            for one in (args[1] if isinstance(args[1], (list, tuple)) else ()))
        if name in _OPERATORS or masks:
            self.note(name)
        return func(*args, **(kwargs or {}))


def _module(frame: Any) -> str:
    return frame.f_globals.get('__name__', '')


@contextlib.contextmanager
def reads_of(*modules: str) -> Iterator[list[str]]:
    """List the reads that modules make, with their places.

    Args:
        *modules (str): What the full names of the modules begin with.
    """
    found: list[str] = []

    def note(name: str) -> None:
        frame: Any = sys._getframe(2)
        while frame and _module(frame).startswith(_OWN):
            frame = frame.f_back
        if frame and _module(frame).startswith(modules):
            found.append(f'{name} in {frame.f_code.co_filename}:'
                         f'{frame.f_lineno}')

    def watched(name: str) -> Callable[..., Any]:
        method = getattr(Tensor, name)

        def call(self: Tensor, *args: Any) -> Any:
            note(name)
            return method(self, *args)

        return call

    with contextlib.ExitStack() as stack:
        for name in _METHODS:
            stack.enter_context(mock.patch.object(Tensor, name, watched(name)))
        stack.enter_context(_Watch(note))
        yield found
