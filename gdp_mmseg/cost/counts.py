"""Cost of a gated network as a function of its gates' openness.

Every cost is a sum of terms, each a product of two numbers of open channels,
so that the derivative has a closed form. A cost is given as a share of the
dense cost: it is 1 with all gates open.

- FLOPs: one fused multiply-add is one FLOP, at the input size that was
  analysed, for one image. Only convolutions, linear layers and products of
  activations count (nothing else in a segmentation network has a cost that
  is quadratic in channels), and only those that inference runs.
- Parameters: those that inference reads.
- Latency: the measured times of the layers that have FLOPs.

Letters: ``G`` gates, ``S`` groups, ``K`` terms, ``L`` layers of inference.
"""
from __future__ import annotations

import dataclasses
import math
from typing import Sequence

import torch
from torch import Tensor

from ..analysis.constants import WithConstants
from ..analysis.structure import Analysis, Layer

# One slot without a gate: a factor of 1 in a term.
ONE = torch.tensor([-1])


@dataclasses.dataclass(frozen=True)
class CostTerm:
    """Two channel axes whose numbers of open channels are multiplied.

    Args:
        inputs (Tensor): ``(C_in,)`` gate of each input slot, -1 for none.
        outputs (Tensor): ``(C_out,)`` gate of each output slot, -1 for none.
    """
    inputs: Tensor
    outputs: Tensor


class Cost(WithConstants):
    """Share of the dense cost as a function of the openness of all gates.

    The cost is zero until :meth:`weigh_` sets the weights of the terms.

    Args:
        analysis (Analysis): The analysis of the model.
        terms (Sequence[CostTerm]): The ``K`` terms of the sum.
        persistent (bool): Whether the weights are part of the state dict.
    """

    group_of: Tensor
    sizes: Tensor
    inputs: Tensor
    fixed_inputs: Tensor
    outputs: Tensor
    fixed_outputs: Tensor
    shares: Tensor

    def __init__(self,
                 analysis: Analysis,
                 terms: Sequence[CostTerm],
                 persistent: bool = False) -> None:
        super().__init__()
        group_of, sizes = analysis.group_of(), analysis.group_sizes()
        # The gates of a group lie on the same axes equally often, so the sum
        # over a group is enough to know the open channels of each axis.
        self.add_constant('group_of', group_of)
        self.add_constant('sizes', sizes)
        for side in ('inputs', 'outputs'):
            slots = torch.zeros(len(terms), len(analysis.groups))
            fixed = torch.zeros(len(terms))
            for row, term in enumerate(terms):
                gates = getattr(term, side)
                fixed[row] = (gates < 0).sum()
                slots[row].index_add_(0, group_of[gates[gates >= 0]],
                                      torch.ones(int((gates >= 0).sum())))
            self.add_constant(side, slots / sizes)
            self.add_constant(f'fixed_{side}', fixed)
        self.register_buffer(
            'shares', torch.zeros(len(terms)), persistent=persistent)

    @torch.no_grad()
    def weigh_(self, amounts: Tensor) -> float:
        """Set the weights of the terms in place.

        Args:
            amounts (Tensor): ``(K,)`` cost of each term per pair of channels.

        Returns:
            float: The dense cost, in the unit of ``amounts``.
        """
        # Counts exceed 2^24, beyond which float32 skips integers.
        amounts = amounts.to(self.shares.device, torch.double)
        inputs, outputs = self._sums(
            torch.ones_like(self.group_of, dtype=torch.double))
        dense = float((amounts * inputs * outputs).sum())
        self.shares.copy_(amounts / dense)
        return dense

    def group_sums(self, openness: Tensor) -> Tensor:
        """Sum the openness ``(G,)`` over each group, ``(S,)``."""
        # A group is a range of gates. The sizes are not checked again, because
        # the host would wait for a GPU.
        return torch.segment_reduce(
            openness, 'sum', lengths=self.sizes, unsafe=True)

    def _sums(self, openness: Tensor) -> tuple[Tensor, Tensor]:
        """Open input and output channels of each term, ``(K,)`` twice."""
        sums = self.group_sums(openness)
        return (torch.addmv(
            self.fixed_inputs.to(sums), self.inputs.to(sums), sums),
                torch.addmv(
                    self.fixed_outputs.to(sums), self.outputs.to(sums), sums))

    def forward(self, openness: Tensor) -> Tensor:
        """Compute the share of the dense cost, a differentiable scalar.

        Args:
            openness (Tensor): ``(G,)`` in [0, 1].
        """
        inputs, outputs = self._sums(openness)
        # A dot product would not be exactly 1 with all gates open.
        return (self.shares * inputs * outputs).sum()

    def price(self, openness: Tensor) -> Tensor:
        """Derivative ``(G,)`` of :meth:`forward`, in closed form."""
        inputs, outputs = self._sums(openness)
        groups = (
            self.inputs.T.to(inputs) @ (self.shares * outputs) +
            self.outputs.T.to(inputs) @ (self.shares * inputs))
        return groups.index_select(0, self.group_of)

    @torch.no_grad()
    def group_shares(self) -> Tensor:
        """Share ``(S,)`` of the dense cost that each group accounts for.

        The cost of a pair of channels is divided equally between the groups
        of the two, or belongs to one of them if the other has no gate. So the
        shares and :meth:`fixed_share` add up to 1. A share is also what
        closing the group saves, averaged over all orders in which the groups
        can be closed one after the other (the Shapley value).

        All this is the price at half of all openness: the cost is quadratic
        along the line from closed to open gates, and for a quadratic function
        the derivative at the middle times the length is the exact difference.
        """
        half = torch.full_like(self.group_of, 0.5, dtype=torch.double)
        return self.group_sums(self.price(half))

    @torch.no_grad()
    def fixed_share(self) -> float:
        """Share of the dense cost that stays if all gates close."""
        return float(self(torch.zeros_like(self.group_of, dtype=torch.double)))


class CountCost(Cost):
    """Cost that is a count, such as FLOPs or parameters.

    Args:
        analysis (Analysis): The analysis of the model.
        terms (Sequence[CostTerm]): The ``K`` terms of the sum.
        amounts (Sequence[float]): Cost of each term per pair of channels.

    Attributes:
        dense (int): The count with all gates open.
    """

    amounts: Tensor

    def __init__(self, analysis: Analysis, terms: Sequence[CostTerm],
                 amounts: Sequence[float]) -> None:
        super().__init__(analysis, terms)
        self.register_buffer(
            'amounts',
            torch.tensor(amounts, dtype=torch.double),
            persistent=False)
        self.dense = round(self.weigh_(self.amounts))

    def count(self, openness: Tensor) -> int:
        """Compute the count itself, exact where openness is 0 or 1.

        Args:
            openness (Tensor): ``(G,)`` in [0, 1].
        """
        inputs, outputs = self._sums(openness.double())
        return round(float((self.amounts * inputs * outputs).sum()))


class FlopCost(CountCost):
    """Multiply-adds of one image at the input size that was analysed.

    Source: GDP (ICCV 2021), section 3: a layer costs k^2 H W s_in s_out, a
    depthwise one k^2 H W s, where s sums the openness of the channels.

    Args:
        analysis (Analysis): The analysis of the model.

    Examples:
        Two 1x1 convolutions, 3 -> 2 -> 4 channels, on 5 x 5 pixels.

        >>> from gdp_mmseg.analysis.analyse import analyse
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Conv2d(2, 4, 1))
        >>> cost = FlopCost(analyse(net, (3, 5, 5), lambda net, x: net(x)))
        >>> cost.dense == 25 * (3 * 2 + 2 * 4)
        True
        >>> cost(torch.tensor([1., 0.])).item(), cost.count(torch.ones(2))
        (0.5, 350)
        >>> cost.price(torch.ones(2)).tolist()  # (3 + 4) / 14 each
        [0.5, 0.5]
    """

    def __init__(self, analysis: Analysis) -> None:
        layers = inference_layers(analysis)
        super().__init__(analysis, [term_of(layer) for layer in layers],
                         [layer.macs_per_pair for layer in layers])


class ParameterCost(CountCost):
    """Parameters that inference reads: kernels, biases and those of norms.

    A kernel costs k^2 s_in s_out, divided by the number of groups for a
    grouped convolution. A parameter per channel costs s. A parameter without
    a gate costs what it has. A layer without inputs becomes a constant (see
    ``surgery/constant.py``) with one parameter per channel in place of its
    bias and its norm's two parameters; this cost ignores that difference.

    Args:
        analysis (Analysis): The analysis of the model.

    Examples:
        Two 1x1 convolutions with biases, 3 -> 2 -> 4 channels.

        >>> from gdp_mmseg.analysis.analyse import analyse
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Conv2d(2, 4, 1))
        >>> cost = ParameterCost(
        ...     analyse(net, (3, 5, 5), lambda net, x: net(x)))
        >>> cost.dense == (3 * 2 + 2) + (2 * 4 + 4)
        True
        >>> cost.count(torch.tensor([1., 0.]))
        12
    """

    def __init__(self, analysis: Analysis) -> None:
        terms, amounts = [], []
        for name, shape in analysis.parameters.items():
            gated = [
                analysis.gate_of_slot[name, axis]
                for axis in range(len(shape))
                if (name, axis) in analysis.gate_of_slot
            ]
            # At most two axes of a parameter have gates.
            first, second = (*gated, ONE, ONE)[:2]
            terms.append(CostTerm(first, second))
            amounts.append(math.prod(shape) / (len(first) * len(second)))
        super().__init__(analysis, terms, amounts)


def inference_layers(analysis: Analysis) -> list[Layer]:
    """Return the ``L`` layers that inference runs."""
    return [layer for layer in analysis.layers if layer.in_inference]


def term_of(layer: Layer) -> CostTerm:
    """Return the channel axes of a layer that are multiplied in its cost."""
    return CostTerm(ONE if layer.blockwise else layer.inputs, layer.outputs)
