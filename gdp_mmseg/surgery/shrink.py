"""Surgery on a gated model while it trains: closed channels leave.

A closed gate stays closed, so that nothing reads its channel any more.
Without it the model computes what it did, forwards and backwards, in less
time and memory. The gates, their numbering and their cost stay dense.
"""
from __future__ import annotations

import collections
import copy
from typing import Any, Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from ..analysis.structure import Analysis
from ..gates.layers import select_slots_
from ..gates.scaling import output_type
from .constant import Expansion
from .outputs import first_line
from .prune import put_back, take
from .widths import set_sizes_, whole_width, widths_of

_Change = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
# Learning rate of the trial steps of an optimizer.
_TRIAL_LR = 0.1


class Shrinkage:
    """Removal of channels from a gated model that trains, and its undoing.

    Parameters stay the same objects, so that an optimizer keeps its groups.

    Args:
        model (nn.Module): The model, with gates and all its channels.
        analysis (Analysis): The analysis of the model.

    Attributes:
        present (Tensor): ``(G,)`` bool, gates whose channels are still there.
    """

    def __init__(self, model: nn.Module, analysis: Analysis) -> None:
        self.model = model
        self.analysis = analysis
        self.present = torch.ones(analysis.num_gates, dtype=torch.bool)
        self._names = {name for name, _ in analysis.gate_of_slot}
        # Attributes of the modules as they were, by name of the module.
        self._sizes: dict[str, dict[str, Any]] = {}
        # Names of the parameters that no longer ask for a gradient.
        self._without_entries: list[str] = []

    def narrow_(self,
                keep: Tensor,
                optimizer: torch.optim.Optimizer | None = None) -> None:
        """Remove the channels of more gates from the model, in place.

        Args:
            keep (Tensor): ``(G,)`` bool on the CPU, gates whose channels
                stay, as of :func:`gdp_mmseg.analysis.liveness.kept_channels`;
                a subset of ``present``.
            optimizer (torch.optim.Optimizer, optional): Optimizer of the
                model, one that :func:`obstacle` has nothing against.

        Raises:
            ValueError: If ``keep`` is no subset; nothing has changed then.
        """
        before = self.present
        if bool((keep & ~before).any()):
            raise ValueError('keep: expected gates whose channels are still '
                             'there, but got some that have left')

        def change(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return take(tensors, self.analysis, keep, before)

        # First: a layer that is emptied below hides its gates.
        select_slots_(self.model, self.analysis, keep)
        tensors = self._tensors()
        data = change(_data_of(tensors))
        for name, width in widths_of(self.model, self.analysis, data).items():
            if name not in tensors:
                module = self.model.get_submodule(name)
                self._set_width_(name, module,
                                 whole_width(name, module, width))
        self._replace_(tensors, data, change, optimizer)
        for name, tensor in tensors.items():
            if not tensor.numel() and tensor.requires_grad:
                # No loss depends on it: wrappers of several processes would
                # wait for its gradient.
                tensor.requires_grad_(False)
                tensor.grad = None
                self._without_entries.append(name)
        self.present = keep.clone()
        self._refresh_()

    def widen_(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Give the model all its channels back, in place.

        What belongs to a channel that had left is zero. Its gate is closed,
        so that the model computes what it did.

        Args:
            optimizer (torch.optim.Optimizer, optional): See :meth:`narrow_`.
        """
        tensors = self._tensors()
        self._replace_(tensors, self.dense(_data_of(tensors)), self.dense,
                       optimizer)
        for name in self._without_entries:
            tensors[name].requires_grad_(True)
        for name, sizes in self._sizes.items():
            module = self.model.get_submodule(name)
            _fill_(module)
            vars(module).update(sizes)
        self._sizes, self._without_entries = {}, []
        self.present = torch.ones_like(self.present)
        select_slots_(self.model, self.analysis, self.present)
        self._refresh_()

    def dense(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors of the model in their dense shapes, filled by zeros.

        Args:
            tensors (Mapping[str, Tensor]): Tensors by the name of the
                parameter or buffer whose shape they have. Others may be among
                them and stay as they are.
        """
        return put_back(tensors, self.analysis, self.present)

    def dense_states(self, states: Mapping[Any, Any],
                     names: Mapping[Any, str]) -> dict[Any, dict[str, Any]]:
        """Return the states of an optimizer in dense shapes.

        Args:
            states (Mapping[Any, Any]): State of each parameter, as in an
                optimizer's ``state`` or in its state dict.
            names (Mapping[Any, str]): Name of the parameter by the key of
                its state.
        """
        shapes = {
            name: tensor.shape
            for name, tensor in self._tensors().items()
        }
        return _changed_states(states, names, shapes, self.dense)

    def _tensors(self) -> dict[str, Tensor]:
        """Return the parameters and buffers that may lose channels."""
        named = [*self.model.named_parameters(), *self.model.named_buffers()]
        return {name: one for name, one in named if name in self._names}

    def _replace_(self, tensors: Mapping[str, Tensor],
                  data: Mapping[str, Tensor], change: _Change,
                  optimizer: torch.optim.Optimizer | None) -> None:
        """Replace the data of tensors, and change all that has their shape.
        """
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        grads = change({
            name: one.grad
            for name, one in tensors.items() if one.grad is not None
        })
        for name, tensor in tensors.items():
            if data[name].shape != tensor.shape:
                tensor.grad = None
                _set_data_(tensor, data[name])
                tensor.grad = grads.get(name)
        if optimizer is not None:
            names = {tensor: name for name, tensor in tensors.items()}
            states = _changed_states(optimizer.state, names, shapes, change)
            for parameter in states:
                optimizer.state[parameter].update(states[parameter])

    def _set_width_(self, name: str, module: nn.Module,
                    width: list[int]) -> None:
        """Set the sizes of a module, in place; one of size 0 works on."""
        self._sizes.setdefault(
            name, {
                key: value
                for key, value in vars(module).items() if type(value) is int
            })
        if 0 in width:
            _empty_(module)
        set_sizes_(module, width)

    def _refresh_(self) -> None:
        """Let modules compute again what they derive from their tensors."""
        owners = {name.rpartition('.')[0] for name in self._names}
        for owner in sorted(owners):
            module = self.model.get_submodule(owner)
            if type(module).train is not nn.Module.train:
                module.train(module.training)


def _data_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _set_data_(tensor: Tensor, data: Tensor) -> None:
    """Replace the data of a parameter or buffer by data of another shape."""
    if tensor.requires_grad:
        # Autograd's accumulator of the gradient knows the old shape, and
        # lives on where a loss or a wrapper still holds it. Only data of
        # another type makes autograd take a new one.
        other = (
            torch.float32 if data.dtype == torch.float16 else torch.float16)
        tensor.data = data.new_empty(0, dtype=other)
    tensor.data = data


def _changed_states(states: Mapping[Any, Any], names: Mapping[Any, str],
                    shapes: Mapping[str, torch.Size],
                    change: _Change) -> dict[Any, dict[str, Any]]:
    """Change the states of an optimizer that have their parameter's shape.

    Args:
        states (Mapping[Any, Any]): State of each parameter, by any key.
        names (Mapping[Any, str]): Name of the parameter by that key.
        shapes (Mapping[str, torch.Size]): Shape of each parameter that
            changes, by name; states of others are returned as they are.
        change (Callable): The change, of tensors by name.

    Returns:
        dict[Any, dict[str, Any]]: New states; the given ones are unchanged.
    """
    changed = {key: dict(state) for key, state in states.items()}
    keys = {names[key]: key for key in changed if names.get(key, '') in shapes}
    # All tensors of one item at once, such as all momenta.
    items: dict[str, dict[str, Tensor]] = collections.defaultdict(dict)
    for name, key in keys.items():
        for item, value in changed[key].items():
            if isinstance(value, Tensor) and value.shape == shapes[name]:
                items[item][name] = value
    for item, tensors in items.items():
        for name, value in change(tensors).items():
            changed[keys[name]][item] = value
    return changed


# -- modules without channels -----------------------------------------------


class _Empty:
    """Replacement of the forward of a module without channels.

    It is an object and not a closure, because ``deepcopy`` binds its
    attributes to the copied module.

    Args:
        gated (Any): What replaced its forward before, or None.
    """

    def __init__(self, gated: Any) -> None:
        self.gated = gated


class _EmptyNorm(_Empty):

    def __call__(self, inputs: Tensor, *_: Any) -> Tensor:
        return inputs


class _EmptyLayer(_Empty):
    """Replacement of the forward of a layer that has no kernel left.

    It gives the bias, or zero, at each position, as a kernel of zeros does.
    """

    def __init__(self, layer: nn.Linear | _ConvNd, gated: Any) -> None:
        super().__init__(gated)
        self.layer = layer
        self.expand = Expansion(layer)

    def __call__(self, inputs: Tensor, *_: Any) -> Tensor:
        layer = self.layer
        channels = (
            layer.weight.new_zeros(_outputs(layer))
            if layer.bias is None else layer.bias)
        return self.expand(channels.to(output_type(inputs)), inputs)


def _outputs(layer: nn.Linear | _ConvNd) -> int:
    return (layer.out_features
            if isinstance(layer, nn.Linear) else layer.out_channels)


def _forward_of(module: nn.Module) -> str:
    """Name of the method that gates and empty modules replace."""
    plain = isinstance(module, _ConvNd) and not module.transposed
    return '_conv_forward' if plain else 'forward'


def _empty_(module: Any) -> None:
    """Let a layer or norm work without channels, in place."""
    name = _forward_of(module)
    former = vars(module).get(name)
    if isinstance(former, _Empty):
        return
    # PyTorch's norms refuse tensors without channels in training mode.
    is_norm = isinstance(module, (_BatchNorm, nn.GroupNorm))
    setattr(module, name,
            _EmptyNorm(former) if is_norm else _EmptyLayer(module, former))


def _fill_(module: nn.Module) -> None:
    """Undo :func:`_empty_`, in place."""
    name = _forward_of(module)
    former = vars(module).get(name)
    if isinstance(former, _Empty):
        delattr(module, name)
        if former.gated is not None:
            setattr(module, name, former.gated)


# -- optimizers that cannot be cut ------------------------------------------


def obstacle(optimizer: torch.optim.Optimizer) -> str | None:
    """Tell why the parameters of an optimizer cannot lose entries.

    A step must move each entry by the gradients of that entry alone, and keep
    one number per entry or per parameter. That is tried on a small kernel,
    with the options of each group of parameters.

    Args:
        optimizer (torch.optim.Optimizer): The optimizer. It stays unchanged.

    Returns:
        str, optional: The reason; None if they can.
    """
    kind, tried = type(optimizer).__name__, set[str]()
    for group in optimizer.param_groups:
        options = repr([
            item for item in group.items()
            if item[0] not in ('params', 'lr', 'initial_lr')
        ])
        if options in tried:
            continue
        tried.add(options)
        try:
            (whole, reason), (part, _) = (
                _tried(optimizer, group, rows) for rows in (4, 2))
        except Exception as error:  # a user's optimizer can raise anything
            return f'a trial step of {kind} fails ({first_line(error)})'
        if reason is None and not torch.equal(whole[:2], part):
            reason = f'{kind} moves a weight by more than its own gradients'
        if reason is not None:
            return reason
    return foreign_state(optimizer)


def foreign_state(optimizer: torch.optim.Optimizer) -> str | None:
    """Tell which state of an optimizer cannot be cut, if any.

    Args:
        optimizer (torch.optim.Optimizer): The optimizer.

    Returns:
        str, optional: The reason; None if all states can be cut.
    """
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.dim() and (
                    type(value) is not Tensor
                    or value.shape != parameter.shape):
                return (f'{type(optimizer).__name__} keeps {key} in another '
                        'shape than that of the weights')
    return None


def _tried(optimizer: torch.optim.Optimizer, group: Mapping[str, Any],
           rows: int) -> tuple[Tensor, str | None]:
    """Take two steps of a copy of an optimizer on a kernel.

    Rows of the kernel from the third on have no gradient, as those of closed
    channels.

    Returns:
        tuple[Tensor, str | None]: The kernel after the steps, and what
        :func:`foreign_state` says of the copy.
    """
    like = group['params'][0] if group['params'] else torch.zeros(())
    values = torch.linspace(-1, 1, 48).reshape(4, 2, 3, 2)[:rows]
    kernel = nn.Parameter(values.to(like.device, like.dtype))
    trial = copy.copy(optimizer)
    trial.state = collections.defaultdict(dict)
    lr = group['lr']
    trial.param_groups = [
        dict(
            group,
            params=[kernel],
            lr=torch.full_like(lr, _TRIAL_LR)
            if isinstance(lr, Tensor) else _TRIAL_LR)
    ]
    for scale in (1., 0.5):
        kernel.grad = (scale * kernel.detach().cos())
        kernel.grad[2:] = 0
        trial.step()
    return kernel.detach(), foreign_state(trial)
