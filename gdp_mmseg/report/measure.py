"""FLOPs, parameters and latency of a network."""
from __future__ import annotations

import contextlib
import functools
import statistics
import time
from typing import Any, Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..analysis.tracer import clone_model

Forward = Callable[[nn.Module, Tensor], Any]
Rounds = Sequence[Sequence[float]]
# Also of the norms that mmengine puts in the place of SyncBN.
_NORMS = (nn.modules.batchnorm._BatchNorm.forward, nn.SyncBatchNorm.forward)
Call = Callable[[], Any]
Clock = Callable[[], float]
_CPU = torch.device('cpu')


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
    if type(model).forward in _NORMS:
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

    Args:
        models (Sequence[nn.Module]): Models on one device, in eval mode.
        input_shape (tuple[int, ...]): ``(N, C, H, W)``.
        forward (Forward): Called with a model and an input.
        repeats (int): See :func:`median_ms`.
        seconds (float): See :func:`median_ms`.
        known (Rounds): See :func:`median_ms`.

    Returns:
        list[float]: Milliseconds, in the order of the models.
    """
    device = next(models[0].parameters()).device
    inputs = torch.rand(input_shape, device=device)
    calls = [functools.partial(forward, model, inputs) for model in models]
    return median_ms(calls, repeats, seconds, known, device)


def median_ms(calls: Sequence[Call],
              repeats: int = 7,
              seconds: float = 6.,
              known: Rounds = (),
              device: torch.device = _CPU,
              clock: Clock = time.perf_counter) -> list[float]:
    """Measure the median time of each call.

    The calls alternate, so a machine that slows down slows all of them:
    ratios can be compared where times cannot.

    Args:
        calls (Sequence[Call]): Functions without arguments.
        repeats (int): Largest number of timed rounds, after one untimed.
        seconds (float): No third timed round starts after this time.
        known (Rounds): Rounds that were timed before, each with milliseconds
            in the order of the calls. They count, in time too, and no untimed
            round is made.
        device (torch.device): Device that is waited for.
        clock (Clock): Function that returns seconds; ``time.process_time``
            for those of this process alone, where others use the machine.

    Returns:
        list[float]: Milliseconds, in the order of the calls.
    """

    def once(call: Call) -> float:
        start = _now_ms(device, clock)
        call()
        return _now_ms(device, clock) - start

    runs = _rounds([functools.partial(once, call) for call in calls],
                   repeats - len(known), seconds - sum(map(sum, known)) / 1e3,
                   len(known))
    return [statistics.median(times) for times in zip(*known, *runs)]


def layer_ms(models: Sequence[nn.Module],
             input_shape: tuple[int, ...],
             forward: Forward,
             repeats: int = 5,
             seconds: float = 6.) -> list[dict[str, float]]:
    """Measure the median time of each layer of each model.

    Args:
        models (Sequence[nn.Module]): Models on one device, in eval mode.
        input_shape (tuple[int, ...]): ``(N, C, H, W)``.
        forward (Forward): Called with a model and an input.
        repeats (int): See :func:`median_ms`.
        seconds (float): See :func:`median_ms`.

    Returns:
        list[dict[str, float]]: For each model, milliseconds of the modules
        that have no modules of their own, by name; under the empty name those
        of what runs between them.
    """
    device = next(models[0].parameters()).device
    inputs = torch.rand(input_shape, device=device)

    def once(model: nn.Module) -> dict[str, float]:
        times: dict[str, float] = {}
        with _timed_layers(model, times, device):
            start = _now_ms(device)
            forward(model, inputs)
            whole = _now_ms(device) - start
        # In each round: medians of the whole and of its parts do not add up
        # on a busy machine.
        times[''] = whole - sum(times.values())
        return times

    runs = _rounds([functools.partial(once, model) for model in models],
                   repeats, seconds)
    return [{
        name: statistics.median(times[name] for times in rounds)
        for name in rounds[0]
    } for rounds in zip(*runs)]


@contextlib.contextmanager
def _timed_layers(model: nn.Module, times: dict[str, float],
                  device: torch.device) -> Iterator[None]:
    """Add the milliseconds of each leaf module to a map, in place."""
    starts: dict[str, float] = {}

    def before(name: str, *_: Any) -> None:
        starts[name] = _now_ms(device)

    def after(name: str, *_: Any) -> None:
        times[name] = times.get(name, 0.) + _now_ms(device) - starts[name]

    hooks = []
    for name, module in model.named_modules():
        if not any(True for _ in module.children()):
            hooks += [
                module.register_forward_pre_hook(
                    functools.partial(before, name)),
                module.register_forward_hook(functools.partial(after, name))
            ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _rounds(runs: Sequence[Callable[[], Any]],
            repeats: int,
            seconds: float,
            known: int = 0) -> list[list[Any]]:
    """Call functions in turns and collect what they return, by round.

    At least two rounds count, those that are known included.
    """
    end = time.perf_counter() + seconds
    rounds: list[list[Any]] = []
    # The first round allocates memory and chooses algorithms.
    untimed = 0 if known else 1
    with torch.no_grad():
        while len(rounds) + known < untimed + 2 or (
                len(rounds) < untimed + repeats and time.perf_counter() < end):
            rounds.append([run() for run in runs])
    return rounds[untimed:]


def _now_ms(device: torch.device, clock: Clock = time.perf_counter) -> float:
    """Read the clock, after what a GPU still has to do."""
    # Kernels of a GPU run after the call that starts them.
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    return clock() * 1e3
