"""Time of a training step after closed channels have left, by their widths.

Steps in half precision are much slower where the number of channels is no
multiple of 8 or so. ``benchmarks/speed.py`` has the results in its report.
"""
from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from step_models import CONFIGS, build, optimizer_of, outputs_of
from torch import nn

from gdp_mmseg.analysis.liveness import filled_up, kept_channels
from gdp_mmseg.gates.blocks import block_sizes
from gdp_mmseg.report.tables import table
from gdp_mmseg.surgery.shrink import Shrinkage

BATCH, SIZE = 2, 192
# Share of the gates of each group that are closed: mean and deviation.
CLOSED = (0.35, 0.15)
# Multiples that the widths are; None where closed channels stay.
MULTIPLES = (None, 1, 4, 8, 16)
FORMATS = {
    'float32': (torch.float32, torch.contiguous_format),
    'bfloat16, channels last': (torch.bfloat16, torch.channels_last),
}


def pruned(name: str, multiple: int | None) -> tuple[nn.Module, float]:
    """Build a gated network with closed gates, without their channels.

    Args:
        name (str): Key of :data:`CONFIGS`.
        multiple (int, optional): Number of which the widths are a multiple.
            None keeps all channels.

    Returns:
        tuple[nn.Module, float]: The network, and the share of the FLOPs in
        the channels that it has.
    """
    torch.manual_seed(0)
    model: Any = build(True, config=CONFIGS[name])
    pruner, analysis = model.gdp, model.gdp.analysis
    is_open = torch.ones(analysis.num_gates, dtype=torch.bool)
    for group in analysis.groups:
        share = min(max(float(torch.empty(1).normal_(*CLOSED)), 0), 0.95)
        order = group.gates[torch.randperm(len(group.gates))]
        is_open[order[:int(share * len(order))]] = False
    pruner.gates.close_(~is_open)
    # As in the settling phase, where most steps are.
    pruner.gates.heeded = False
    everything = torch.ones_like(is_open)
    if multiple is None:
        return model, float(pruner.flops(everything.float()))
    keep = filled_up(analysis, kept_channels(analysis, is_open), everything,
                     block_sizes(analysis, multiple))
    Shrinkage(model, analysis).narrow_(keep)
    return model, float(pruner.flops(keep.float()))


def step(model: nn.Module, optimizer: torch.optim.Optimizer,
         dtype: torch.dtype, memory_format: torch.memory_format) -> float:
    """Return the seconds of one training step."""
    inputs = torch.randn(BATCH, 3, SIZE, SIZE)
    inputs = inputs.contiguous(memory_format=memory_format)
    start = time.process_time()
    optimizer.zero_grad()
    with torch.autocast('cpu', dtype, enabled=dtype != torch.float32):
        outputs = outputs_of(model, inputs)
    sum(output.float().square().mean() for output in outputs).backward()
    optimizer.step()
    return time.process_time() - start


def measure(rounds: int) -> dict[str, Any]:
    """Time all networks; those of one table cell alternate."""
    return dict(
        batch=BATCH,
        size=SIZE,
        rounds=rounds,
        steps={
            name: {
                form: _measure(name, form, rounds)
                for form in FORMATS
            }
            for name in CONFIGS
        })


def _measure(name: str, form: str, rounds: int) -> list[dict[str, Any]]:
    dtype, memory_format = FORMATS[form]
    networks = [(build(False, config=CONFIGS[name]), 1.)]
    networks += [pruned(name, multiple) for multiple in MULTIPLES]
    found = []
    for model, share in networks:
        model.to(memory_format=memory_format)
        found.append((model, optimizer_of(model), share, []))
    for _ in range(rounds + 1):
        for model, optimizer, _, seconds in found:
            seconds.append(step(model, optimizer, dtype, memory_format))
    names = ['dense', *MULTIPLES]
    return [
        dict(widths=width, flops=share, seconds=seconds[1:])
        for width, (_, _, share, seconds) in zip(names, found)
    ]


def markdown(report: dict[str, Any]) -> str:
    """Return the section of ``docs/speed.md``.

    Args:
        report (dict[str, Any]): Result of :func:`measure`.
    """
    rows = [[
        'training step, closed channels', 'widths', 'FLOPs',
        *(f'{form}: time / dense' for form in FORMATS)
    ]]
    for name, by_form in report['steps'].items():
        forms = [*by_form.values()]
        for index, found in enumerate(forms[0]):
            rows.append([
                name,
                _width(found['widths']), f'{found["flops"]:.2f}',
                *(_ratio(form[index]['seconds'], form[0]['seconds'])
                  for form in forms)
            ])
    size = f'{report["size"]} x {report["size"]}'
    return '\n'.join([
        table(rows), '',
        f'Steps of batch {report["batch"]} of {size} without a step of the '
        f'gates; medians of {report["rounds"]} rounds, in which the networks '
        f'take turns. In each group of channels, {CLOSED[0]:.0%} of the gates '
        f'are closed, with a deviation of {CLOSED[1]:.0%} between groups. '
        'Trainings take the multiples of 8: closed channels stay where their '
        'group would have another width.'
    ])


def _width(multiple: int | str | None) -> str:
    if multiple is None:
        return 'all channels stay'
    if multiple == 'dense':
        return 'dense'
    return 'any' if multiple == 1 else f'multiples of {multiple}'


def _ratio(seconds: list[float], dense: list[float]) -> str:
    return f'{statistics.median(seconds) / statistics.median(dense):.2f}'
