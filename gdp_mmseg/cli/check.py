"""Check of one config: prune half of its model at random, compare outputs.

The gated and the pruned network must compute the same function. Their outputs
are compared with random weights of order one, in single and in double
precision, and with the weights that the model is built with.
"""
from __future__ import annotations

import argparse
import contextlib
import re
import resource
import time
from collections import Counter
from pathlib import Path
from typing import Any, Iterator

from .checks import check_config_file
from .errors import one_line_errors

CHANNELS, SIDE = 3, 128
# Largest relative difference of outputs in single precision. A network may
# amplify rounding beyond it: then this multiple of what one rounding of the
# inputs changes.
TOLERANCE = 1e-5
ROUNDINGS = 4
# Least relative change of the outputs by half-open gates. Below it, equal
# outputs of the gated and the pruned network would say nothing.
MIN_EFFECT = 1e-3
# Text of a row's status in tables.
STATUS = dict(
    works='works',
    part='works, part frozen',
    refused='refused',
    unbuilt='cannot be built here',
    wrong='WRONG')
COLUMNS = ('status', 'prunable channels', 'prunable FLOPs',
           'random weights, fp32', 'random weights, fp64', 'as built, fp32',
           'analysis (s)', 'peak (GiB)', 'frozen channels, or error')


def parse_args() -> argparse.Namespace:
    """Parse the flags of the command."""
    parser = argparse.ArgumentParser(
        description='Analyse the model of a config, prune half of its '
        'channels at random and compare the outputs.')
    parser.add_argument('config', help='config, with GDPModel or without')
    parser.add_argument('--json', help='file that gets the result as JSON')
    return parser.parse_args()


def check(path: str) -> dict[str, Any]:
    """Analyse the model of a config, prune half at random, compare.

    Returns:
        dict[str, Any]: ``status``, a key of ``STATUS``; ``reason`` of a
        failure; shares of channels and multiply-adds that can be pruned;
        frozen channels with reasons; relative differences of the outputs;
        seconds of the analysis and peak memory in GiB.
    """
    import torch
    from mmengine.config import Config
    torch.set_num_threads(1)
    torch.manual_seed(0)
    row: dict[str, Any] = dict(
        config=name_of(Path(path)),
        family=Path(path).parent.name,
        status='unbuilt',
        reason='',
        prunable_channels=None,
        prunable_macs=None,
        frozen=[],
        rel_diff=None,
        rel_diff_fp64=None,
        rel_diff_built=None,
        side=None,
        seconds=None,
        peak_gib=None)
    try:
        network, sides, settings = _build(Config.fromfile(path))
    except BaseException as error:  # a config or its packages raise anything
        return dict(row, reason=_first_line(error))
    for side in sides:
        try:
            row.update(_prune_half(network, side, settings), side=side)
            break
        except ValueError as error:
            row.update(status='refused', reason=_first_line(error), side=side)
    return row


def _build(cfg: Any) -> tuple[Any, list[int], Any]:
    """Build a config's model; return it, input sides to try, settings."""
    from mmengine.model import revert_sync_batchnorm
    from mmengine.registry import MODELS, init_default_scope

    from ..engine.config import ModelConfig
    init_default_scope(cfg.get('default_scope') or 'mmseg')
    config = ModelConfig.of(cfg).without_pretrained()
    model = config.parts
    size = (
        cfg.get('crop_size')
        or (model.get('data_preprocessor') or {}).get('size') or (224, 224))
    for part in (model.get('backbone'), model.get('decode_head')):
        # Position embeddings of one size only: fit them to our input.
        if isinstance(part, dict) and 'img_size' in part:
            part['img_size'] = (SIDE, SIDE)
    network = revert_sync_batchnorm(MODELS.build(config.ungated)).eval()
    return network, [SIDE, max(size)], config.settings


def _prune_half(network: Any, side: int, settings: Any) -> dict[str, Any]:
    """Return the part of a row that the analysis and the comparison fill."""
    import torch

    from ..analysis.liveness import kept_channels
    from ..cost.counts import FlopCost
    from ..engine.model import analyse_model
    from ..surgery.verify import TOLERANCE as EXACT
    start = time.process_time()
    analysis, _ = analyse_model(network, (CHANNELS, side, side),
                                settings.ignore, settings.only)
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cost = FlopCost(analysis)
    least = float(
        cost(kept_channels(analysis, torch.zeros(analysis.num_gates)).float()))
    written = [layer.outputs for layer in analysis.layers if layer.kernel]
    gated_slots = sum(int((slots >= 0).sum()) for slots in written)
    # Outputs of the model, and layers that inference does not run, are never
    # pruned, so they are no loss.
    held = [
        dict(reason=frozen.reason, channels=frozen.channels)
        for frozen in analysis.frozen
        if 'output of the model' not in frozen.reason and 'for training only'
        not in frozen.reason and 'no traced forward' not in frozen.reason
    ]
    found = _compare(network, analysis, side)
    # Comparisons with nan are false, so nan is never right.
    right = (
        found['rel_diff'] <= TOLERANCE and found['rel_diff_fp64'] <= EXACT
        and found['rel_diff_built'] <= max(
            TOLERANCE, ROUNDINGS * found.get('rounding', 0.))
        and found['effect'] > MIN_EFFECT)
    status = ('part' if held else 'works') if right else 'wrong'
    return dict(
        status=status,
        reason='',
        prunable_channels=round(
            gated_slots / sum(len(slots) for slots in written), 4),
        prunable_macs=round(1 - least, 4),
        frozen=held,
        seconds=round(seconds, 2),
        peak_gib=round(peak / 2**20, 2),
        **found)


def _compare(network: Any, analysis: Any, side: int) -> dict[str, float]:
    """Compare gated and pruned outputs at several weights.

    Returns:
        dict[str, float]: Relative differences of gated and pruned outputs;
        ``effect``, the relative change of the outputs by the gates; and, if
        the difference with the built weights exceeds ``TOLERANCE``,
        ``rounding``: the change of the gated outputs by one rounding of the
        inputs.
    """
    import torch

    from ..engine.forwards import inference_forward
    from ..gates.gdp import GDPGates
    from ..surgery.outputs import largest_difference
    from ..surgery.random_weights import copy_with_random_weights
    generator = torch.Generator().manual_seed(7)
    gates = GDPGates(analysis.num_gates)
    images = torch.randn(1, CHANNELS, side, side, generator=generator)
    with torch.no_grad():
        gates.theta.uniform_(0.3, 1., generator=generator)
        gates.theta[torch.rand(analysis.num_gates, generator=generator) <
                    0.5] = 0

    wanted, difference = _differ(network, analysis, gates, images)
    found = dict(rel_diff_built=difference)
    if not difference <= TOLERANCE:  # true for nan, too
        rounded = images * (
            1 + torch.finfo(images.dtype).eps *
            (torch.rand(images.shape, generator=generator) - 0.5))
        found['rounding'] = largest_difference(
            _outputs(_gated(network, analysis, gates), rounded), wanted)
    for key, dtype in (('rel_diff', torch.float32), ('rel_diff_fp64',
                                                     torch.float64)):
        gates.to(dtype)
        with _default_dtype(dtype):
            cast = images.to(dtype)
            random_copy = copy_with_random_weights(
                network, lambda net: inference_forward(net, cast))
            wanted, found[key] = _differ(random_copy, analysis, gates, cast)
            if dtype == torch.float32:
                found['effect'] = largest_difference(
                    _outputs(random_copy, cast), wanted)
    return found


@contextlib.contextmanager
def _default_dtype(dtype: Any) -> Iterator[None]:
    """Set torch's default type of numbers for a while."""
    import torch
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _differ(network: Any, analysis: Any, gates: Any,
            images: Any) -> tuple[list[Any], float]:
    """Return the gated outputs, and how far the pruned ones are from them."""
    from ..surgery.outputs import largest_difference
    from ..surgery.prune import cut
    wanted = _outputs(_gated(network, analysis, gates), images)
    pruned, _ = cut(network, analysis, gates.openness())
    return wanted, largest_difference(_outputs(pruned, images), wanted)


def _gated(network: Any, analysis: Any, gates: Any) -> Any:
    """Return a copy of a network with gates on it."""
    from ..analysis.tracer import copy_model
    from ..gates.layers import gate_layer_
    network = copy_model(network)
    for layer in analysis.gated_layers():
        gate_layer_(network.get_submodule(layer.name), gates, layer.inputs)
    return network


def _outputs(network: Any, images: Any) -> list[Any]:
    """Return all tensors that a network gives for images ``(N, C, H, W)``."""
    import torch
    from torch.utils._pytree import tree_leaves

    from ..engine.forwards import inference_forward
    torch.manual_seed(1)  # a forward may draw random numbers
    with torch.no_grad():
        outputs = inference_forward(network, images)
    return [
        leaf for leaf in tree_leaves(outputs)
        if isinstance(leaf, torch.Tensor)
    ]


def name_of(path: Path) -> str:
    """Return a config's path from its library on, without local folders."""
    parts = path.parts
    if '.mim' in parts:
        place = parts.index('.mim')
        return '/'.join([parts[place - 1], *parts[place + 2:]])
    return str(path)


def cells_of(row: dict[str, Any]) -> list[str]:
    """Return the text of a row in each of ``COLUMNS``."""
    numbers = [''] * 7
    if row.get('rel_diff') is not None:
        numbers = [
            f'{row["prunable_channels"]:.0%}', f'{row["prunable_macs"]:.0%}',
            f'{row["rel_diff"]:.0e}', f'{row["rel_diff_fp64"]:.0e}',
            _built(row), f'{row["seconds"]:.1f}', f'{row["peak_gib"]:.1f}'
        ]
    return [
        STATUS[row['status']], *numbers, row['reason']
        or _operators(row['frozen'])
    ]


def _built(row: dict[str, Any]) -> str:
    """Return the difference with the built weights, and its bound."""
    text = f'{row["rel_diff_built"]:.0e}'
    if row['rel_diff_built'] > TOLERANCE:
        text += f' (rounding: {row["rounding"]:.0e})'
    return text


def _operators(frozen: list[dict[str, Any]]) -> str:
    """Return the frozen channels by operator, the largest number first."""
    counts: Counter[str] = Counter()
    for row in frozen:
        reason = re.sub(r'^\S+ is used without', 'kernel used without',
                        row['reason'])
        # The module or an error's message follows, different in each row.
        counts[re.split(r' in | \(', reason)[0]] += row['channels']
    return ', '.join(f'{reason} ({count})'
                     for reason, count in counts.most_common())


def _first_line(error: BaseException) -> str:
    """Return the innermost cause of an error in one short line."""
    while error.__cause__ is not None and isinstance(error, KeyError):
        error = error.__cause__
    text = ' '.join(str(error).split()).partition(', the current sys.path')[0]
    return f'{type(error).__name__}: {text}'[:200]


def show(row: dict[str, Any]) -> None:
    """Print a row on one line, without its empty cells."""
    print(
        f'{row["config"]}:',
        '; '.join(f'{column}: {cell}'
                  for column, cell in zip(COLUMNS, cells_of(row)) if cell))


@one_line_errors()
def main() -> None:
    """Check the model of one config; exit with status 1 if it is wrong."""
    args = parse_args()
    check_config_file(args.config)
    row = check(args.config)
    show(row)
    if args.json:
        from ..files import write_json
        write_json(Path(args.json), row)
    if row['status'] == 'wrong':
        raise SystemExit(1)
