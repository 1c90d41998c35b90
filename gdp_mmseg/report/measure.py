"""Multiply-adds, parameters and latency of a network."""
from __future__ import annotations

import copy
import statistics
import time
from typing import Sequence

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def count_macs(model: nn.Module, input_shape: tuple[int, ...]) -> int:
    """Multiply-adds of one forward pass in ``tensor`` mode.

    Counted by torch's own counter, which knows nothing of this project.

    Args:
        model (nn.Module): An mm model; a copy is run, without data where its
            forward asks for none.
        input_shape (tuple[int, ...]): ``(N, C, H, W)``.
    """
    for device in ('meta', 'cpu'):
        shadow = copy.deepcopy(model).to(device).eval()
        try:
            # The others of a CPU the counter does not know.
            with torch.no_grad(), sdpa_kernel(
                    SDPBackend.MATH), FlopCounterMode(
                        display=False) as counter:
                shadow(torch.zeros(input_shape, device=device), mode='tensor')
            break
        except Exception:  # the model's own, of any kind
            if device == 'cpu':
                raise
    return counter.get_total_flops() // 2


def count_parameters(model: nn.Module) -> int:
    """All parameters of a model, those that only training uses included."""
    return sum(parameter.numel() for parameter in model.parameters())


def paired_latency_ms(models: Sequence[nn.Module],
                      input_shape: tuple[int, ...],
                      repeats: int = 7,
                      seconds: float = 6.) -> list[float]:
    """Median time of a forward pass of each model, measured in turn.

    The models alternate, so that a machine that slows down slows all of them:
    the ratios hold where the times do not.

    Args:
        models (Sequence[nn.Module]): mm models on one device, in eval mode.
        input_shape (tuple[int, ...]): ``(N, C, H, W)``.
        repeats (int): Timed rounds at most, after one that is not timed.
        seconds (float): No third timed round starts after this.

    Returns:
        list[float]: Milliseconds.
    """
    device = next(models[0].parameters()).device
    inputs = torch.rand(input_shape, device=device)

    def once(model: nn.Module) -> float:
        if device.type == 'cuda':
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        model(inputs, mode='tensor')
        if device.type == 'cuda':
            torch.cuda.synchronize(device)
        return (time.perf_counter() - start) * 1e3

    end = time.perf_counter() + seconds
    runs: list[list[float]] = []
    with torch.no_grad():
        while len(runs) <= 2 or (len(runs) <= repeats
                                 and time.perf_counter() < end):
            runs.append([once(model) for model in models])
    runs = runs[1:]
    return [statistics.median(times) for times in zip(*runs)]
