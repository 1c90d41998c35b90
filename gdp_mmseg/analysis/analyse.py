"""Groups of channels that can only be pruned together.

A model is run once, without computing anything (on the ``meta`` device, so at
its true input size). Every slot of every channel axis of every parameter gets
a label, an integer that travels beside the activations (see ``tracer.py`` and
``labels.py``). Labels that have to be kept or removed together are tied; the
connected components of tied labels are the *classes*. A class is prunable and
owns a gate if layers write it, layers read it, and no other operator depends
on it.

Letters: ``N`` batch, ``C`` channels, ``H, W`` height and width, ``G``
prunable classes (one gate each), ``S`` groups (classes that lie on the same
axes, e.g. "the channels between conv1 and conv2").
"""
from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from fnmatch import fnmatchcase
from typing import Iterable, Sequence

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn

from .labels import Labels
from .read_points import ReadPointTracker
from .spelling import did_you_mean
from .structure import Analysis, FrozenChannels, Group, Layer
from .tracer import Forward, ForwardError, Tracer, copy_model

# Number of modules that a reason names.
_MAX_SHOWN = 3


def analyse(model: nn.Module,
            input_shape: tuple[int, ...],
            forward: Forward,
            training_forward: Forward | None = None,
            ignore: Sequence[str] = (),
            only: Sequence[str] | None = None) -> Analysis:
    """Find the channels of a model that can be removed exactly.

    Args:
        model (nn.Module): The model, which stays unchanged; a copy is run.
        input_shape (tuple[int, ...]): ``(C, H, W)`` of one input.
        forward (Forward): Runs the copy as inference does, on an input
            ``(N, C, H, W)``, and returns the model's outputs.
        training_forward (Forward, optional): Runs everything that training
            runs, e.g. auxiliary heads and the layers that feed them. Layers
            that are reached here only have no cost and keep their outputs.
        ignore (Sequence[str]): Names or patterns of modules that must not
            change at all.
        only (Sequence[str], optional): Names or patterns of the modules that
            may lose output channels. Defaults to all modules.

    Returns:
        Analysis: The groups, the layers and the frozen channels.

    Raises:
        ForwardError: If the model cannot take an input of this shape.
        ValueError: If none of its channels can be pruned, or if a pattern in
            ``ignore`` or ``only`` matches no module.
    """
    ignored = _part(model, ignore, 'ignore')
    chosen = None if only is None else _part(model, only, 'only')
    tracer = _trace(model, input_shape, forward, training_forward)
    labels = tracer.labels
    for (name, axis), slots in labels.axes.items():
        owner = name.rpartition('.')[0]
        if owner in ignored:
            labels.freeze_labels(slots, 'kept out by ignore')
        elif (chosen is not None and owner not in chosen
              and (name, axis) in labels.written_axes):
            labels.freeze_labels(slots, 'kept out by only')
    found = _collect(labels, tracer.read_points, (1, *input_shape))
    if not found.num_gates:
        raise ValueError(nothing_left(found))
    return dataclasses.replace(
        found, frozen=found.frozen + _unread(model, tracer.unread.values()))


def nothing_left(analysis: Analysis) -> str:
    """Compose the error message for a model without a prunable channel."""
    reasons = '; '.join(f'{frozen.channels} channels: {frozen.reason}'
                        for frozen in analysis.frozen[:3])
    return ('expected at least one prunable group of channels, but got none '
            f'({reasons or "no convolution"})')


def _part(model: nn.Module, patterns: Sequence[str], option: str) -> set[str]:
    """Return the names of all modules that match, and of their submodules.

    Raises:
        ValueError: If a pattern matches no module.
    """
    names = [name for name, _ in model.named_modules() if name]
    part: set[str] = set()
    for pattern in patterns:
        found = [name for name in names if fnmatchcase(name, pattern)]
        if not found:
            children = ', '.join(name for name, _ in model.named_children())
            raise ValueError(
                f'{option}: expected names or patterns of modules, but got '
                f'{pattern!r}, which matches none; the parts of the model '
                f'are {children}' + did_you_mean(pattern, names))
        part.update(found)
    return {
        name
        for name in names
        if any(name == top or name.startswith(f'{top}.') for top in part)
    }


def _trace(model: nn.Module, input_shape: tuple[int, ...], forward: Forward,
           training_forward: Forward | None) -> Tracer:
    """Trace a copy of the model on the meta device, else on the CPU."""
    uses = Counter(
        id(tensor) for tensor in model.state_dict(keep_vars=True).values())
    # A tensor with two names is cut under one of them only, so it is frozen.
    shared = [
        name for name, tensor in model.state_dict(keep_vars=True).items()
        if uses[id(tensor)] > 1
    ]
    dtype = next(model.parameters(), torch.zeros(())).dtype
    for device in ('meta', 'cpu'):
        # A forward that branches on values cannot run on the meta device,
        # whose tensors have none.
        tracer = Tracer(
            copy_model(model,
                       lambda tensor: tensor.detach().to(device, copy=True)),
            shared)
        # Two images: a batch axis of size 1 could be confused with others
        # where the forward reshapes.
        inputs = torch.zeros((2, *input_shape), device=device, dtype=dtype)
        try:
            tracer.run(forward, inputs, in_inference=True)
            if training_forward is not None:
                tracer.run(training_forward, inputs, in_inference=False)
            break
        except Exception as error:  # a user's forward can raise anything
            if device == 'cpu':
                first_line = str(error).partition('\n')[0]
                raise ForwardError(
                    f'expected the model to run on an input of shape (N, C, '
                    f'H, W) = {tuple(inputs.shape)}, but got '
                    f'{type(error).__name__}: {first_line}; correct the '
                    "model's forward, or set input_shape to a shape that it "
                    'can take') from error
    return tracer


def _unread(model: nn.Module,
            names: Iterable[str]) -> tuple[FrozenChannels, ...]:
    """List the layers whose kernels no traced forward reads, in one row.

    Such layers may run in the prediction or in the loss alone. They stay as
    they are, and so do the channels that they turn out to depend on.
    """
    kernels = [name for name in names if model.get_parameter(name).dim() > 1]
    if not kernels:
        return ()
    modules = _modules((name, 0) for name in kernels)
    shown = ', '.join(modules[:_MAX_SHOWN])
    if len(modules) > _MAX_SHOWN:
        shown += f' and {len(modules) - _MAX_SHOWN} more'
    return (FrozenChannels(
        f'no traced forward runs {shown}: only prediction or loss, or nothing',
        modules, sum(len(model.get_parameter(name)) for name in kernels)), )


def _collect(labels: Labels, read_points: ReadPointTracker,
             input_shape: tuple[int, ...]) -> Analysis:
    """Turn traced labels into classes, gates and groups."""
    classes = _classes(labels)
    axes = {key: classes[slots.numpy()] for key, slots in labels.axes.items()}
    reasons = _reasons(labels, classes, axes)
    places = _places(axes, reasons)

    # Gates are numbered group by group in the order of the network, so that
    # a group is a range of gates and the numbers are the same in each run.
    gate_of = np.full(classes.max() + 1, -1)
    members: dict[tuple[tuple[int, int], ...], list[int]] = {}
    for index in sorted(places):
        members.setdefault(places[index], []).append(index)
    stopped = set(
        np.concatenate([np.zeros(0, int)] +
                       [classes[stop.numpy()]
                        for stop in labels.stops]).tolist())
    keys, groups, number = list(axes), [], 0
    for place, indices in members.items():
        gates = np.arange(number, number + len(indices))
        gate_of[indices] = gates
        number += len(indices)
        touched = {keys[key]: count for key, count in place}
        read = [key for key in touched if key in labels.read_axes]
        kernels = [kernel for kernel, _ in read]
        behind = read_points.norms_to_gate(kernels, touched)
        groups.append(
            Group(
                torch.from_numpy(gates),
                _modules(key for key in touched if key in labels.written_axes),
                _modules(read), stopped.isdisjoint(indices),
                read_points.points(kernels, touched),
                tuple(dict.fromkeys(itertools.chain(*behind.values()))),
                _modules(key for key in read if key[0] in behind)))

    gate_axes = {
        key: torch.from_numpy(gate_of[index])
        for key, index in axes.items()
    }
    return Analysis(
        num_gates=number,
        gate_of_slot={
            key: gates
            for key, gates in gate_axes.items() if bool((gates >= 0).any())
        },
        layers=_layers(labels, gate_axes) + tuple(
            Layer(product.name, '', product.macs_per_pair, 1,
                  torch.full((product.inputs, ), -1),
                  torch.from_numpy(gate_of[classes[product.outputs.numpy()]]),
                  False, product.in_inference, (product.call, ))
            for product in labels.products),
        groups=tuple(groups),
        parameters=labels.parameters,
        frozen=_frozen(labels, axes, reasons),
        norms=labels.norms(),
        input_shape=input_shape)


def _classes(labels: Labels) -> np.ndarray:
    """Return the class of each label ``(labels,)``, numbered by first label.
    """
    pairs = torch.cat([torch.zeros(2, 0, dtype=torch.long), *labels.pairs], 1)
    size = labels.next_label
    graph = coo_matrix((np.ones(pairs.shape[1]), tuple(pairs.numpy())),
                       shape=(size, size))
    return connected_components(graph, directed=False)[1]


def _reasons(labels: Labels, classes: np.ndarray,
             axes: dict[tuple[str, int], np.ndarray]) -> dict[int, str]:
    """Return the reason for each class that has no gate, by its index."""
    reasons: dict[int, str] = {}
    for frozen, reason in labels.freezes:
        for index in np.unique(classes[frozen.numpy()]):
            reasons.setdefault(int(index), reason)
    # Label 0 stands for channels that no layer wrote, such as zeros that were
    # concatenated. A class that is tied to it cannot be removed.
    reasons.setdefault(int(classes[0]), 'joined with channels of no layer')
    for touched, reason in ((labels.written_axes, 'written by no layer'),
                            (labels.read_axes, 'read by no layer')):
        known = set(
            np.concatenate([np.zeros(0, int)] + [axes[key]
                                                 for key in touched]).tolist())
        for index in set(classes.tolist()) - known:
            reasons.setdefault(index, reason)
    return reasons


def _places(axes: dict[tuple[str, int], np.ndarray],
            reasons: dict[int, str]) -> dict[int, tuple[tuple[int, int], ...]]:
    """Return the axes on which each prunable class lies, and how often."""
    places: dict[int, list[tuple[int, int]]] = {}
    for key, slots in enumerate(axes.values()):
        indices, counts = np.unique(slots, return_counts=True)
        for index, count in zip(indices.tolist(), counts.tolist()):
            if index not in reasons:
                places.setdefault(index, []).append((key, count))
    return {index: tuple(place) for index, place in places.items()}


def _modules(keys: Iterable[tuple[str, int]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.rpartition('.')[0] for name, _ in keys))


def _layers(labels: Labels, gate_axes: dict[tuple[str, int],
                                            Tensor]) -> tuple[Layer, ...]:
    layers = []
    for kernel, call in labels.calls.items():
        inputs, outputs = (gate_axes.get((kernel, axis),
                                         torch.full((size, ), -1))
                           for axis, size in zip(call.axes, call.sizes))
        layers.append(
            Layer(
                kernel.rpartition('.')[0], kernel, call.macs_per_pair,
                call.axes[0], inputs, outputs, call.blockwise,
                call.in_inference, call.calls))
    return tuple(layers)


def _frozen(labels: Labels, axes: dict[tuple[str, int], np.ndarray],
            reasons: dict[int, str]) -> tuple[FrozenChannels, ...]:
    """List the written channels without a gate by reason, most first."""
    found: dict[str, tuple[set[int], set[tuple[str, int]]]] = {}
    for key in axes:
        for index in set(
                axes[key].tolist()) if (key in labels.written_axes) else ():
            if index in reasons:
                indices, keys = found.setdefault(reasons[index],
                                                 (set(), set()))
                indices.add(index)
                keys.add(key)
    frozen = []
    for reason, (indices, keys) in found.items():
        # One channel of each class, but all those of no layer are class 0.
        channels = len(indices - {0})
        if 0 in indices:
            channels += max(int((axes[key] == 0).sum()) for key in keys)
        frozen.append(FrozenChannels(reason, _modules(sorted(keys)), channels))
    # A layer with a computed kernel has no axis that could be frozen. It may
    # run several times, but is listed once.
    frozen += {
        product.module:
        FrozenChannels(product.reason, (product.module, ),
                       len(product.outputs))
        for product in labels.products if product.reason
    }.values()
    return tuple(sorted(frozen, key=lambda row: -row.channels))
