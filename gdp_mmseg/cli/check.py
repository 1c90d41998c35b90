"""Check of one config: prune half of its model at random, compare outputs.

The gated and the pruned network must compute the same function. Their outputs
are compared with random weights of order one, in single and in double
precision, and with the weights that the model is built with. With random
weights :func:`gdp_mmseg.surgery.verify.is_exact` decides.
"""
from __future__ import annotations

import argparse
import dataclasses
import resource
import time
from pathlib import Path
from typing import Any, Callable, Sequence

from .checks import add_cfg_options, load_config
from .errors import fail, one_line_errors
from .rows import show

Shape = tuple[int, ...]

SIDE = 128


def parse_args() -> argparse.Namespace:
    """Parse the flags of the command."""
    parser = argparse.ArgumentParser(
        description='Analyse the model of a config, prune half of its '
        'channels at random and compare the outputs.')
    parser.add_argument('config', help='config, with GDPModel or without')
    parser.add_argument('--json', help='file that gets the result as JSON')
    add_cfg_options(parser)
    return parser.parse_args()


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A model to check.

    Args:
        network (Any): An mm model in evaluation mode, without gates.
        shapes (Sequence[Shape]): Shapes ``(C, H, W)`` of the input, to be
            tried in this order until the analysis accepts one.
        ignore (Sequence[str]): Names of modules that must not change.
        only (Sequence[str], optional): Names of the modules that may lose
            channels. Defaults to all.
    """
    network: Any
    shapes: Sequence[Shape]
    ignore: Sequence[str] = ()
    only: Sequence[str] | None = None


def check(path: str) -> dict[str, Any]:
    """Check the model of a config (see :func:`check_candidate`)."""
    from mmengine.config import Config
    return check_candidate(
        name_of(Path(path)),
        Path(path).parent.name, lambda: _build(Config.fromfile(path)))


def check_candidate(name: str, family: str,
                    build: Callable[[], Candidate]) -> dict[str, Any]:
    """Analyse a model, prune half of it at random, compare the outputs.

    Args:
        name (str): Name of the model in the table.
        family (str): Name of the family, under which rows are summarised.
        build (Callable[[], Candidate]): Function that builds the model.

    Returns:
        dict[str, Any]: ``status``, a key of ``rows.STATUS``; ``reason`` of a
        failure; shares of channels and multiply-adds that can be pruned;
        frozen channels with reasons; relative differences of the outputs
        (that of double precision is None if the model cannot run in it);
        seconds of the analysis and peak memory in GiB.
    """
    _fix_torch()
    row: dict[str, Any] = dict(
        config=name,
        family=family,
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
        candidate = build()
    except BaseException as error:  # a config or its packages raise anything
        return dict(row, reason=_first_line(error))
    for shape in candidate.shapes:
        side = shape[-1]
        try:
            row.update(_prune_half(candidate, shape), side=side)
            break
        except Exception as error:
            row.update(
                status='refused' if _is_refusal(error) else 'wrong',
                reason=_first_line(error),
                side=side)
    return row


def _fix_torch() -> None:
    """Let torch use one thread, and the same random numbers each time."""
    import torch
    torch.set_num_threads(1)
    torch.manual_seed(0)


def _is_refusal(error: Exception) -> bool:
    """Return True if an error says clearly why a model is not pruned.

    Memory that the limit of the process refuses is no fault either.
    """
    return (isinstance(error, ValueError) and 'but got' in str(error)
            or isinstance(error, MemoryError)
            or "can't allocate memory" in str(error))


def _build(cfg: Any) -> Candidate:
    """Build the model of a config."""
    from mmengine.model import revert_sync_batchnorm
    from mmengine.registry import MODELS, init_default_scope

    from ..engine.config import ModelConfig
    init_default_scope(cfg.get('default_scope') or 'mmseg')
    config = ModelConfig.of(cfg).without_pretrained()
    model, settings = config.parts, config.settings
    side = max(
        cfg.get('crop_size')
        or (model.get('data_preprocessor') or {}).get('size') or (224, 224))
    whole = (
        config.input_shape() if settings.input_shape else config.with_channels(
            (side, side)))
    for part in (model.get('backbone'), model.get('decode_head')):
        # Position embeddings of one size only: fit them to our input.
        if isinstance(part, dict) and 'img_size' in part:
            part['img_size'] = (SIDE, SIDE)
    network = revert_sync_batchnorm(MODELS.build(config.ungated)).eval()
    return Candidate(network, [(whole[0], SIDE, SIDE), whole], settings.ignore,
                     settings.only)


def _prune_half(candidate: Candidate, shape: Shape) -> dict[str, Any]:
    """Return the part of a row that the analysis and the comparison fill."""
    import torch

    from ..analysis.liveness import kept_channels
    from ..cost.counts import FlopCost
    from ..engine.forwards import inference_forward
    from ..engine.model import analyse_model
    from ..surgery.random_half import compare_half, is_right
    network = candidate.network
    start = time.process_time()
    analysis, _ = analyse_model(network, shape, candidate.ignore,
                                candidate.only)
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
    found = compare_half(network, analysis, shape, inference_forward)
    status = ('part' if held else 'works') if is_right(found) else 'wrong'
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


def name_of(path: Path) -> str:
    """Return a config's path from its library on, without local folders."""
    parts = path.parts
    if '.mim' in parts:
        place = parts.index('.mim')
        return '/'.join([parts[place - 1], *parts[place + 2:]])
    return str(path)


def _first_line(error: BaseException) -> str:
    """Return the innermost cause of an error in one line."""
    while error.__cause__ is not None and isinstance(error, KeyError):
        error = error.__cause__
    text = ' '.join(str(error).split()).partition(', the current sys.path')[0]
    return f'{type(error).__name__}: {text}'


@one_line_errors()
def main() -> None:
    """Check the model of one config; exit with status 1 if it is wrong.

    Unlike in a table of many models, a model that cannot be built or is
    refused is an error.
    """
    args = parse_args()
    cfg = load_config(args.config, args.cfg_options)
    _fix_torch()
    candidate = _build(cfg)
    path = Path(args.config)
    row = check_candidate(name_of(path), path.parent.name, lambda: candidate)
    if row['status'] == 'refused':
        fail(row['reason'].partition(': ')[2])
    show(row)
    if args.json:
        from ..files import write_json
        write_json(Path(args.json), row)
    if row['status'] == 'wrong':
        raise SystemExit(1)


if __name__ == '__main__':
    main()
