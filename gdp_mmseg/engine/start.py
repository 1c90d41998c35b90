"""Start of a fine-tuning from the weights of an export."""
from __future__ import annotations

from typing import Any, Mapping, Sequence

import torch
from mmengine.logging import print_log
from torch import nn

from .checkpoint import read_checkpoint


class StartFromExport:
    """Replacement of ``init_weights`` that loads exported weights.

    The model's own ``init_weights`` runs first, whatever it does: layers that
    the exported weights do not fit (other classes, other bands) begin with
    what it gives them. It is an object and not a closure, because ``deepcopy``
    (as in EMA) binds its attributes to the copied model.

    Args:
        network (nn.Module): Model with the widths of the export.
        path (str): Exported checkpoint.
    """

    def __init__(self, network: nn.Module, path: str) -> None:
        self.network = network
        self.path = path

    def __call__(self) -> None:
        """Initialise the model, then load the exported weights that fit.

        Raises:
            ValueError: If the file is missing or damaged, holds other weights
                than the export wrote, or none that fits.
        """
        network: Any = self.network
        plain: Any = type(network)
        plain.init_weights(network)
        # The checksum of the weights is verified here.
        state, _ = read_checkpoint(self.path)
        own = network.state_dict()
        fitting = {
            name: value
            for name, value in state.items()
            if name in own and own[name].shape == value.shape
        }
        if not fitting:
            raise ValueError(
                f'model.gdp.checkpoint: expected weights of this model in '
                f'{self.path}, but got none that fits; use the file that was '
                'exported with the config')
        fresh = [name for name in own if name not in fitting]
        # The model's own state dict keeps the versions of its modules.
        own.update(fitting)
        # Modules may drop buffers that they compute themselves.
        dropped = network.load_state_dict(own, strict=False).missing_keys
        _check_loaded(network, fitting, dropped, self.path)
        if fresh:
            print_log(
                'GDP: these layers begin anew, because the exported weights '
                f'do not fit them: {", ".join(fresh)}',
                logger='current')


def _check_loaded(network: nn.Module, state: Mapping[str, torch.Tensor],
                  dropped: Sequence[str], path: str) -> None:
    """Check that a model holds the weights that it was given.

    Args:
        network (nn.Module): The model.
        state (Mapping[str, Tensor]): The weights.
        dropped (Sequence[str]): Names that the model's own loading code left
            out. Buffers among them may differ.
        path (str): File of the weights, for the error.

    Raises:
        ValueError: If the model's own loading code changed a weight.
    """
    loaded = network.state_dict()
    computed = set(dropped) - {name for name, _ in network.named_parameters()}
    changed = [
        name for name, value in state.items()
        if name not in computed and not torch.equal(loaded[name].cpu(), value)
    ]
    if changed:
        raise ValueError(
            f'model.gdp.checkpoint: expected the weights of {path} in the '
            f'model, but got others in {changed[0]} and {len(changed) - 1} '
            "more; the model's own loading code changes them")
