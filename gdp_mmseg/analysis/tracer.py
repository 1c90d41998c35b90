"""Runs a model and writes down what it says of its channels.

Under a dispatch mode, which sees every ATen operator: what runs can be
analysed. What each operator does to labels is in ``operators.py``.
"""
from __future__ import annotations

import contextlib
import copy
import itertools
from typing import Any, Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .labels import Labels
from .operators import Operation, apply

Forward = Callable[[nn.Module, Tensor], Any]


class Tracer(TorchDispatchMode):
    """Runs a model, with labels beside its activations.

    Args:
        model (nn.Module): On any device; parameters may have no data.
        shared (Iterable[str]): Tensors that have several names; their
            channels are frozen.

    Attributes:
        labels (Labels): What was found.
    """

    def __init__(self, model: nn.Module, shared: Iterable[str] = ()) -> None:
        super().__init__()
        self.model = model
        self.labels = Labels(model, shared)
        # So that no identity is used twice in a forward pass.
        self._alive: list[Tensor] = []

    def run(self, forward: Forward, inputs: Tensor,
            in_inference: bool) -> None:
        """Trace one forward pass; its outputs are frozen.

        Args:
            forward (Forward): Called with the model and the inputs.
            inputs (Tensor): ``(N, C, H, W)``, on the model's device.
            counted (bool): Whether inference does this; else training does,
                and modules that ask are told so.
        """
        labels = self.labels
        labels.in_inference, labels.images = in_inference, len(inputs)
        try:
            set_mode_(self.model, training=not in_inference)
            with module_names(
                    self.model,
                    labels.modules), torch.no_grad(), _plain_attention(), self:
                outputs = forward(self.model, inputs)
            for output in tree_leaves(outputs):
                if isinstance(output, Tensor):
                    labels.count_reads([output])
                    labels.freeze(output, 'output of the model')
        finally:
            labels.forget_activations()
            self._alive.clear()

    def __torch_dispatch__(self,
                           function: Any,
                           types: Any,
                           args: tuple[Any, ...] = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        output = function(*args, **(kwargs or {}))
        tensors = [
            leaf for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, Tensor)
        ]
        outputs = [
            leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)
        ]
        self._alive += [*tensors, *outputs]
        labels = self.labels
        labels.count_reads(tensors)
        if any(map(labels.knows, tensors)):
            operation = Operation(function, args, kwargs or {}, tensors,
                                  outputs)
            if not apply(labels, operation):
                for tensor in tensors:
                    labels.freeze(tensor,
                                  f'{operation.name} in {labels.here()}')
        return output


@contextlib.contextmanager
def module_names(model: nn.Module, running: list[str]) -> Iterator[None]:
    """Keep the names of the modules that run, the innermost last.

    Args:
        model (nn.Module): Gets hooks for that long.
        running (list[str]): Changed as modules begin and end.
    """

    def enter(name: str) -> Callable[..., None]:
        return lambda module, inputs: running.append(name)

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        running.pop()

    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(enter(name)))
        handles.append(module.register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def copy_model(
        model: nn.Module,
        replaced: Callable[[Tensor],
                           Tensor] = lambda tensor: tensor) -> nn.Module:
    """A deep copy of a model with the same tensors, or others, in it.

    Args:
        model (nn.Module): Left as it is.
        replaced (Callable[[Tensor], Tensor]): What the copy has in place of a
            parameter or buffer.
    """
    memo: dict[int, Tensor] = {}
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        other = replaced(tensor)
        if isinstance(tensor, nn.Parameter) and other is not tensor:
            other = nn.Parameter(other, tensor.requires_grad)
        memo[id(tensor)] = other
    return copy.deepcopy(model, memo)


def set_mode_(model: nn.Module, training: bool) -> None:
    """Training mode, but for norms, dropout and all that has no parts."""
    for module in model.modules():
        module.training = training and any(module.children())


@contextlib.contextmanager
def _plain_attention() -> Iterator[None]:
    """PyTorch's attention as single operators, none of which hides layers."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
