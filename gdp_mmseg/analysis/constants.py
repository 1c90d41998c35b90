"""Constant tensors of a module that follow it to its device."""
from __future__ import annotations

from typing import Any, Callable

from torch import Tensor, nn


class WithConstants(nn.Module):
    """Base class of modules with constant tensors, such as indices.

    A buffer would not do: an average of models
    (``torch.optim.swa_utils.AveragedModel`` with ``use_buffers=True``)
    averages all buffers, and rounds integers down.
    """

    def __init__(self) -> None:
        super().__init__()
        self._constants: list[str] = []

    def add_constant(self, name: str, tensor: Tensor) -> None:
        """Take a tensor as an attribute that is in no state dict.

        Args:
            name (str): Name of the attribute.
            tensor (Tensor): Its value, which nobody changes.
        """
        self._constants.append(name)
        setattr(self, name, tensor)

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any,
               **kwargs: Any) -> Any:
        super()._apply(fn, *args, **kwargs)
        for name in self._constants:
            setattr(self, name, fn(getattr(self, name)))
        return self
