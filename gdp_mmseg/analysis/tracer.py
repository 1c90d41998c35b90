"""Tracing of a model under a dispatch mode that follows its channels.

A dispatch mode sees every ATen operator, so every model that runs can be
traced, whatever its Python code looks like. The rules that say what each
operator does to labels are in ``operators.py``.
"""
from __future__ import annotations

import collections
import contextlib
import copy
import itertools
import random
from typing import Any, Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .labels import Labels
from .operators import PRODUCTS, Operation, apply
from .read_points import ReadPointTracker

Forward = Callable[[nn.Module, Tensor], Any]


class ForwardError(ValueError):
    """Failure of a model's own forward pass, without anything pruned."""


class Tracer(TorchDispatchMode):
    """Dispatch mode that runs a model with labels beside its activations.

    Args:
        model (nn.Module): The model, on any device; its parameters may be on
            the meta device.
        shared (Iterable[str]): Names of tensors that have several names;
            their channels are frozen.

    Attributes:
        labels (Labels): The labels of all forward passes so far.
        read_points (ReadPointTracker): What the layers read in them.
        unread (dict[int, str]): Names of the parameters that no operator has
            read so far, by the tensors' ids.
    """

    def __init__(self, model: nn.Module, shared: Iterable[str] = ()) -> None:
        super().__init__()
        self.model = model
        self.labels = Labels(model, shared)
        self.read_points = ReadPointTracker(self.labels)
        self.unread = {
            id(parameter): name
            for name, parameter in model.named_parameters()
        }
        # Labels are kept by id(tensor). Python may give the id of a freed
        # tensor to a new one, so all tensors of a pass are kept alive.
        self._alive: list[Tensor] = []

    def run(self, forward: Forward, inputs: Tensor,
            in_inference: bool) -> None:
        """Trace one forward pass and freeze its outputs.

        Args:
            forward (Forward): Function of the model and the inputs.
            inputs (Tensor): ``(N, C, H, W)``, on the model's device.
            in_inference (bool): Whether this is the forward of inference. If
                not, the model is in training mode (see :func:`set_mode_`).
        """
        labels = self.labels
        labels.in_inference = in_inference
        labels.batch.begin(inputs)
        try:
            with module_names(self.model, labels.modules), fixed_seeds(
            ), torch.no_grad(), _plain_attention(), self:
                # Within the trace, because train() may compute tensors from
                # parameters, which have to be frozen then.
                set_mode_(self.model, training=not in_inference)
                outputs = forward(self.model, inputs)
            for output in tree_leaves(outputs):
                if isinstance(output, Tensor):
                    labels.count_reads([output])
                    labels.freeze(output, 'output of the model')
        finally:
            labels.forget_activations()
            self.read_points.forget_activations()
            self._alive.clear()

    def __torch_dispatch__(self,
                           function: Any,
                           types: Any,
                           args: tuple[Any, ...] = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        output = _norm_on_meta(function, args)
        if output is None:
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
        for tensor in tensors:
            self.unread.pop(id(tensor), None)
        operation = Operation(function, args, kwargs or {}, tensors, outputs)
        labels.batch.follow(tensors, outputs)
        # An operator on tensors without labels concerns no channel, but may
        # still have a cost.
        if any(map(labels.knows, tensors)) or operation.name in PRODUCTS:
            if not apply(labels, operation):
                for tensor in tensors:
                    labels.freeze(tensor,
                                  f'{operation.name} in {labels.here()}')
            self.read_points.follow(operation)
        return output


def _norm_on_meta(function: Any, args: tuple[Any, ...]) -> Any:
    """Return the outputs of a batch norm in evaluation on the meta device.

    PyTorch computes their shapes by decomposing the norm, which takes longer
    than all other operators of a network together.

    Returns:
        Any: The outputs; None for any other operator.
    """
    if function is not torch.ops.aten.native_batch_norm.default:
        return None
    inputs, _, _, _, _, training, *_ = args
    if training or not inputs.is_meta:
        return None
    # In evaluation no statistics are returned.
    return (torch.empty_like(inputs), inputs.new_empty(0), inputs.new_empty(0))


@contextlib.contextmanager
def module_names(model: nn.Module, running: list[str]) -> Iterator[None]:
    """Keep a list of the names of the running modules, innermost last.

    Args:
        model (nn.Module): The model, which has hooks within this context.
        running (list[str]): The list, changed in place as modules begin and
            end.
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
    replaced: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    shared: Iterable[Any] = ()
) -> nn.Module:
    """Deep-copy a model, but choose the tensors of the copy.

    Args:
        model (nn.Module): The model, which stays unchanged.
        replaced (Callable[[Tensor], Tensor]): Function from a parameter,
            buffer or other tensor of a module to the tensor that the copy
            has in its place. By default both models share their tensors.
        shared (Iterable[Any]): Further objects that both models share.
    """
    memo: dict[int, Any] = {id(thing): thing for thing in shared}
    # Modules may keep tensors in plain attributes, e.g. the kernel that weight
    # norm computes, which deepcopy refuses if it has a gradient's history.
    plain = (
        value for module in model.modules() for value in vars(module).values()
        if isinstance(value, Tensor))
    for tensor in itertools.chain(model.parameters(), model.buffers(), plain):
        if not tensor.is_leaf:
            memo[id(tensor)] = replaced(tensor.detach())
            continue
        other = replaced(tensor)
        if isinstance(tensor, nn.Parameter) and other is not tensor:
            other = nn.Parameter(other, tensor.requires_grad)
        memo[id(tensor)] = other
    _share_constants(model, memo)
    return copy.deepcopy(model, memo)


def _share_constants(model: nn.Module, memo: dict[int, Any]) -> None:
    """Add copies of small objects to the memo of ``deepcopy``, in place.

    Each module has about ten empty containers, mostly for hooks, and tuples
    of numbers. deepcopy takes longer for them than for everything else.

    Args:
        model (nn.Module): The model that will be copied.
        memo (dict[int, Any]): Copies by the ids of what they are copies of.
    """
    for module in model.modules():
        for value in vars(module).values():
            kind = type(value)
            if kind in (collections.OrderedDict, set, dict) and not value:
                memo[id(value)] = kind()
            elif kind is tuple and all(type(item) is int for item in value):
                memo[id(value)] = value


def clone_model(model: nn.Module,
                device: torch.device | str | None = None) -> nn.Module:
    """Deep-copy a model with all its tensors, to a device or where they are.

    ``deepcopy`` refuses models with a tensor that has a gradient's history.

    Args:
        model (nn.Module): The model, which stays unchanged.
        device (torch.device | str, optional): Device of the copy. Defaults to
            that of each tensor.
    """
    return copy_model(
        model,
        lambda tensor: tensor.detach().to(device or tensor.device, copy=True))


def set_mode_(model: nn.Module, training: bool) -> None:
    """Set the mode of a model in place; modules without parts stay in eval.

    The model's own ``train`` is called, because some modules compute tensors
    there or keep their parts in eval mode. In training mode, modules that ask
    ``self.training`` (e.g. to run an auxiliary head) do what they do in
    training. Norms and dropout do not: a norm would change its statistics,
    and random numbers would differ between two networks that are compared.
    """
    model.train(training)
    for module in model.modules():
        if not any(module.children()):
            module.eval()


@contextlib.contextmanager
def fixed_seeds() -> Iterator[None]:
    """Seed the generators of Python, NumPy and PyTorch, and restore them.

    A forward that draws numbers then draws the same ones each time. Only the
    generator of the CPU is seeded, where all copies of models run.
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(1)
    np.random.seed(1)
    torch.default_generator.manual_seed(1)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


@contextlib.contextmanager
def _plain_attention() -> Iterator[None]:
    """Disable the fused attention of PyTorch, which hides its linear layers.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
