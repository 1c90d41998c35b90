"""Factors of channel axes, looked up in one table of all gates.

A network has dozens of axes with gates, and small operations take longer to
start than to run. So the factors of all axes are computed together, once for
each state of the gates.

Letters: ``G`` gates, one for each class of channels (see ``analysis``);
``C`` channels on an axis; ``N`` channels on all axes.
"""
from __future__ import annotations

from typing import Any, Callable, Hashable

import torch
from torch import Tensor
from torch.nn import functional as F


class Lookup:
    """Channel axes with gates, and their factors."""

    def __init__(self) -> None:
        # No buffers: an average of models would average these indices.
        self._slots: list[Tensor] = []
        self._joined: Tensor | None = None
        self._known: tuple[Tensor, Hashable, tuple[Tensor, ...]] | None = None

    def add(self, slots: Tensor) -> int:
        """Register the gates of a channel axis.

        Args:
            slots (Tensor): ``(C,)`` gate of each channel, -1 for none.

        Returns:
            int: Index of the axis.
        """
        self._slots.append(slots)
        self._joined = self._known = None
        return len(self._slots) - 1

    def replace_(self, index: int, slots: Tensor) -> None:
        """Replace the gates of a channel axis, in place.

        Args:
            index (int): Index of the axis.
            slots (Tensor): ``(C,)`` gate of each channel, -1 for none.
        """
        self._slots[index] = slots
        self._joined = self._known = None

    def factors(self, index: int, levels: Tensor) -> Tensor:
        """Factors ``(C,)`` of an axis by levels ``(G,)`` of the gates."""
        slots = self._slots[index]
        if slots.device != levels.device:
            slots = self._slots[index] = slots.to(levels.device)
        return slot_values(levels, slots)

    def known(self, index: int, theta: Tensor, state: Hashable,
              levels: Callable[[], tuple[Tensor, Tensor]]) -> Tensor:
        """Factors ``(C,)`` of an axis, differentiable in theta.

        Those of all axes are computed at once for each state.

        Args:
            index (int): Index of the axis.
            theta (Tensor): ``(G,)``.
            state (Hashable): State of all that ``levels`` reads.
            levels (Callable): Returns levels ``(G,)`` of the gates and their
                derivatives ``(G,)`` in theta.
        """
        state = (state, theta._version, theta.device, theta.dtype,
                 theta.requires_grad, torch.is_grad_enabled(),
                 torch.is_inference_mode_enabled())
        known = self._known
        if known is None or known[0] is not theta or known[1] != state:
            if self._joined is None or self._joined.device != theta.device:
                # What has no gate reads the end of the padded tables below.
                self._joined = torch.cat(self._slots).to(
                    theta.device).remainder(len(theta) + 1)
            factors: Tensor = _Linear.apply(theta, *levels(), self._joined)
            sizes = [len(slots) for slots in self._slots]
            known = self._known = theta, state, factors.split(sizes)
        return known[2][index]

    def __getstate__(self) -> dict[str, Any]:
        """Leave what is known out of copies: it belongs to other gates."""
        return dict(vars(self), _known=None)


class _Linear(torch.autograd.Function):
    # Tensors are kept as attributes, and not by save_for_backward, which would
    # allow a single backward pass; several passes share the factors.

    @staticmethod
    def forward(ctx: Any, theta: Tensor, levels: Tensor, slopes: Tensor,
                slots: Tensor) -> Tensor:
        ctx.parts = slopes, slots
        return F.pad(levels, (0, 1), value=1).index_select(0, slots)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        slopes, slots = ctx.parts
        slopes = F.pad(slopes, (0, 1))
        # Not index_add_, whose order of additions is random on a GPU.
        found = torch.zeros_like(slopes).index_put_(
            (slots, ),
            gradient * slopes.index_select(0, slots),
            accumulate=True)
        return found[:-1], None, None, None


def slot_values(openness: Tensor, slots: Tensor) -> Tensor:
    """Openness of each slot of a channel axis: 1 where there is no gate.

    Args:
        openness (Tensor): ``(G,)``.
        slots (Tensor): ``(C,)`` gate of each slot, -1 for none.

    Returns:
        Tensor: ``(C,)``, differentiable in ``openness``.

    Examples:
        >>> import torch
        >>> slot_values(torch.tensor([0.5, 0.]), torch.tensor([1, -1, 0]))
        tensor([0.0000, 1.0000, 0.5000])
    """
    found = openness.index_select(0, slots.clamp(min=0))
    return found.masked_fill(slots < 0, 1)
