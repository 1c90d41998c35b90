"""FLOPs, parameters and latency of a network."""
from __future__ import annotations

import statistics
import time
from typing import Any, Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..analysis.tracer import clone_model

Forward = Callable[[nn.Module, Tensor], Any]
Rounds = Sequence[Sequence[float]]
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def count_flops(model: nn.Module, input_shape: tuple[int, ...],
                forward: Forward) -> int:
    """Count the multiply-adds of one forward pass by torch's own counter.

    The counter knows nothing of this project, so it checks the project's own
    count.

    Args:
        model (nn.Module): Any model; a copy is run, on the meta device where
            its forward works without values.
        input_shape (tuple[int, ...]): ``(N, C, H, W)``.
        forward (Forward): Called with the copy and an input.

    Returns:
        int: One fused multiply-add counts as one.
    """
    for device in ('meta', 'cpu'):
        shadow = clone_model(model, device).eval()
        if device == 'meta':
            shadow = _without_norms(shadow)
        try:
            # The counter misses the fused attention kernels of a CPU.
            with torch.no_grad(), sdpa_kernel(
                    SDPBackend.MATH), FlopCounterMode(
                        display=False) as counter:
                forward(shadow, torch.zeros(input_shape, device=device))
            break
        except Exception:  # the model's own error, of any kind
            if device == 'cpu':
                raise
    # torch counts a multiply-add as two.
    return counter.get_total_flops() // 2


def _without_norms(model: nn.Module) -> nn.Module:
    """Replace batch norms by the identity, in place, and return the model.

    They have no multiply-adds that count, and on the meta device they take
    longer than all other layers together.
    """
    if type(model) in _NORMS:
        return nn.Identity()
    for name, child in model.named_children():
        setattr(model, name, _without_norms(child))
    return model


def count_parameters(model: nn.Module) -> int:
    """Count all parameters, those that only training uses included."""
    return sum(parameter.numel() for parameter in model.parameters())


def paired_latency_ms(models: Sequence[nn.Module],
                      input_shape: tuple[int, ...],
                      forward: Forward,
                      repeats: int = 7,
                      seconds: float = 6.,
                      known: Rounds = ()) -> list[float]:
    """Measure the median time of a forward pass of each model.

    The models alternate, so a machine that slows down slows all of them:
    ratios can be compared where times cannot.

    Args:
        models (Sequence[nn.Module]): Models on one device, in eval mode.
        input_shape (tuple[int, ...]): ``(N, C, H, W)``.
        forward (Forward): Called with a model and an input.
        repeats (int): Largest number of timed rounds, after one untimed.
        seconds (float): No third timed round starts after this time.
        known (Rounds): Rounds that were timed before, each
            with milliseconds in the order of the models. They count, and no
            untimed round is made.

    Returns:
        list[float]: Milliseconds, in the order of the models.
    """
    device = next(models[0].parameters()).device
    inputs = torch.rand(input_shape, device=device)

    def once(model: nn.Module) -> float:
        # Kernels of a GPU run after the call that starts them.
        if device.type == 'cuda':
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        forward(model, inputs)
        if device.type == 'cuda':
            torch.cuda.synchronize(device)
        return (time.perf_counter() - start) * 1e3

    # The first round allocates memory and chooses algorithms.
    runs = [list(times) for times in (*known[:1], *known)]
    end = time.perf_counter() + seconds - sum(map(sum, runs)) / 1e3
    with torch.no_grad():
        while len(runs) <= 2 or (len(runs) <= repeats
                                 and time.perf_counter() < end):
            runs.append([once(model) for model in models])
    return [statistics.median(times) for times in zip(*runs[1:])]
