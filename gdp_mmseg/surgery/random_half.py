"""Comparison of a network that lost half of its channels with the gated one.

The two must compute the same function. They are compared with random weights
of order one, in single and in double precision, and with the weights that the
network has.
"""
from __future__ import annotations

import dataclasses
from typing import Any, Mapping

import torch
from torch import Tensor, nn

from ..analysis.structure import Analysis
from ..analysis.tracer import Forward, copy_model
from ..gates.gdp import GDPGates
from ..gates.layers import gate_
from .outputs import largest_difference, outputs_of
from .prune import cut
from .random_weights import copy_with_random_weights
from .verify import default_dtype, is_exact

# Largest relative difference of outputs with the weights that a network has,
# in single precision. A network may amplify rounding beyond it: then this
# multiple of what one rounding of the inputs changes.
_TOLERANCE = 1e-5
_ROUNDINGS = 4
# Least relative change of the outputs by half-open gates. Below it, equal
# outputs of the gated and the pruned network would say nothing.
_MIN_EFFECT = 1e-3


def compare_half(network: nn.Module, analysis: Analysis,
                 shape: tuple[int, ...], forward: Forward) -> dict[str, Any]:
    """Close half of all gates at random, and compare gated and pruned outputs.

    Args:
        network (nn.Module): Network in evaluation mode, without gates; it
            stays unchanged.
        analysis (Analysis): Its analysis.
        shape (tuple[int, ...]): Shape ``(C, H, W)`` of the random input.
        forward (Forward): Function of a network and the input.

    Returns:
        dict[str, Any]: Relative differences of the outputs: ``rel_diff`` and
        ``rel_diff_fp64`` with random weights, None in double precision if the
        network cannot run in it, and ``rel_diff_built`` with its own weights;
        ``effect``, the relative change of the outputs by the gates; and, if
        the difference with its own weights is large, ``rounding``: the change
        of the gated outputs by one rounding of the input.
    """
    generator = torch.Generator().manual_seed(7)
    gates = GDPGates(analysis.num_gates)
    images = torch.randn(1, *shape, generator=generator)
    half = _Half(analysis, gates, forward)
    half.close_(generator)
    wanted, difference = half.differ(network, images)
    found: dict[str, Any] = dict(rel_diff_built=difference)
    if not difference <= _TOLERANCE:  # true for nan, too
        rounded = images * (
            1 + torch.finfo(images.dtype).eps *
            (torch.rand(images.shape, generator=generator) - 0.5))
        found['rounding'] = largest_difference(
            half.gated_outputs(network, rounded), wanted)
    found['rel_diff'], found['effect'] = half.differ_at_random(network, images)
    gates.double()
    try:
        with default_dtype(torch.float64):
            found['rel_diff_fp64'], _ = half.differ_at_random(
                network, images.double())
    except Exception:  # a forward that names float32 can raise anything
        found['rel_diff_fp64'] = None
    return found


def is_right(found: Mapping[str, Any]) -> bool:
    """Tell whether the differences of outputs are within the bounds.

    Args:
        found (Mapping[str, Any]): The result of :func:`compare_half`.
    """
    # Comparisons with nan are false, so nan is never right.
    bound = max(_TOLERANCE, _ROUNDINGS * found.get('rounding', 0.))
    return bool(
        is_exact(found['rel_diff'], found['rel_diff_fp64'])
        and found['rel_diff_built'] <= bound and found['effect'] > _MIN_EFFECT)


@dataclasses.dataclass(frozen=True)
class _Half:
    """Gates of a network, half of them closed, and what it runs with.

    Args:
        analysis (Analysis): The analysis of the network.
        gates (GDPGates): Its gates.
        forward (Forward): Function of a network and its input.
    """
    analysis: Analysis
    gates: GDPGates
    forward: Forward

    @torch.no_grad()
    def close_(self, generator: torch.Generator) -> None:
        """Close half of the gates, and leave the others half open."""
        theta = self.gates.theta
        theta.uniform_(0.3, 1., generator=generator)
        closed = torch.rand(len(theta), generator=generator) < 0.5
        # A closed group, e.g. one gate for all channels of a group norm, could
        # leave constant outputs, which are equal whatever else was removed.
        for group in self.analysis.groups:
            closed[group.gates[0]] = False
        theta[closed] = 0

    def gated_outputs(self, network: nn.Module,
                      images: Tensor) -> list[Tensor]:
        """Return the outputs of a copy of a network with the gates on it."""
        gated = copy_model(network)
        gate_(gated, self.analysis, self.gates)
        return outputs_of(gated, self.forward, images)

    def differ(self, network: nn.Module,
               images: Tensor) -> tuple[list[Tensor], float]:
        """Return the gated outputs, and how far the pruned ones are off."""
        wanted = self.gated_outputs(network, images)
        pruned, _ = cut(network, self.analysis, self.gates.openness())
        return wanted, largest_difference(
            outputs_of(pruned, self.forward, images), wanted)

    def differ_at_random(self, network: nn.Module,
                         images: Tensor) -> tuple[float, float]:
        """Compare copies with random weights, in the default dtype.

        Returns:
            tuple[float, float]: Relative difference of the gated and the
            pruned outputs, and relative change of the outputs by the gates.
        """

        def run(one: nn.Module) -> list[Tensor]:
            return outputs_of(one, self.forward, images)

        random_copy = copy_with_random_weights(network, run)
        wanted, difference = self.differ(random_copy, images)
        return difference, largest_difference(run(random_copy), wanted)
