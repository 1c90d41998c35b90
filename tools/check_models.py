"""Prune half of models at random, and see whether that changes a number.

Without arguments: configs of mmsegmentation, as installed, one at least for
each family, backbone and decode head, and of mmpretrain's convolutional
classifiers; the table goes to docs/models.md.
"""
from __future__ import annotations

import argparse
import copy
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Iterator, Mapping

from mmengine.config import Config
from rich.progress import track

from _cli import ROOT, fail, load_config, one_line_errors

SIDE = 128
LIMIT_SECONDS = 120
LIMIT_GIB = 10
CLASSIFIERS = ('convnext', 'convnext_v2', 'densenet', 'efficientnet',
               'mobilenet_v2', 'mobilenet_v3', 'regnet', 'resnet', 'resnext',
               'res2net', 'seresnet', 'shufflenet_v1', 'shufflenet_v2', 'vgg')
# How a row's status reads in the table.
STATUS = dict(
    works='works',
    part='works, part frozen',
    refused='refused',
    unbuilt='cannot be built here',
    wrong='WRONG')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('configs', nargs='*', metavar='CONFIG')
    parser.add_argument('--json', type=Path, help='write the rows here')
    parser.add_argument(
        '--row', action='store_true', help=argparse.SUPPRESS)  # one process
    return parser.parse_args()


def folder_of(library: str) -> Path:
    """Where an installed library has its configs."""
    module = __import__(library)
    return Path(module.__file__).parent / '.mim' / 'configs'


def families(library: str) -> Iterator[tuple[str, list[Path]]]:
    """Name and configs of each family."""
    for folder in sorted(folder_of(library).iterdir()):
        configs = sorted(folder.glob('*.py'))
        if configs and folder.name != '_base_' and (
                library == 'mmseg' or folder.name in CLASSIFIERS):
            yield folder.name, configs


def representatives() -> Iterator[Path]:
    """For each family, backbone and head the first config that has it."""
    for library in ('mmseg', 'mmpretrain'):
        seen: set[tuple[str, str]] = set()
        for family, configs in families(library):
            first = True
            for path in configs:
                parts = {('family', family)} if first else set()
                try:
                    config = Config.fromfile(path, import_custom_modules=False)
                    parts |= set(_parts(config.model))
                except (OSError, ImportError, AttributeError) as error:
                    print(f'{path.name}: {error}', file=sys.stderr)
                if parts - seen:
                    seen |= parts
                    first = False
                    yield path


def _parts(model: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Types of backbone and heads, as far as a config names them."""
    for name in ('backbone', 'neck', 'decode_head', 'head'):
        part = model.get(name) or ()
        for one in [part] if isinstance(part, Mapping) else part:
            kind = one.get('type')
            yield name, kind if isinstance(kind, str) else str(kind)


def check(path: str) -> dict[str, Any]:
    """One row: analyse the model of a config, prune half, compare."""
    import torch
    torch.set_num_threads(1)
    row: dict[str, Any] = dict(
        config=path,
        family=Path(path).parent.name,
        status='unbuilt',
        reason='',
        prunable_channels=None,
        prunable_macs=None,
        frozen=[],
        rel_diff=None,
        side=None,
        seconds=None,
        peak_gib=None)
    try:
        network, sides = _build(load_config(path))
    except BaseException as error:  # whatever a config or package says
        return dict(row, reason=_first_line(error))
    for side in sides:
        try:
            row.update(_prune_half(network, side), side=side)
            break
        except ValueError as error:
            row.update(status='refused', reason=_first_line(error), side=side)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return dict(row, peak_gib=round(peak / 2**20, 2))


def _build(cfg: Config) -> tuple[Any, list[int]]:
    """The model of a config without its weights, and sides to try."""
    from mmengine.model import revert_sync_batchnorm
    from mmengine.registry import init_default_scope

    from gdp_mmseg.export import without_pretrained
    from gdp_mmseg.model import build_base_model
    init_default_scope(cfg.get('default_scope') or 'mmseg')
    model = without_pretrained(cfg)
    size = (cfg.get('crop_size') or (model.get('data_preprocessor') or {}).get(
        'size') or (224, 224))
    for part in (model.backbone, model.get('decode_head')):
        # Of what takes one size only: the positions that it knows.
        if isinstance(part, dict) and 'img_size' in part:
            part['img_size'] = (SIDE, SIDE)
    network = build_base_model(model.pop('type'), model)
    return revert_sync_batchnorm(network).eval(), [SIDE, max(size)]


def _prune_half(network: Any, side: int) -> dict[str, Any]:
    """What an analysis finds, and what pruning at random changes."""
    import torch

    from gdp_mmseg.cost import Cost
    from gdp_mmseg.gate import Gates, gate_layer_
    from gdp_mmseg.model import Settings, analyse_model, infer
    from gdp_mmseg.proof import TOLERANCE, largest_difference, randomise_
    from gdp_mmseg.surgery import kept_channels, prune
    channels = 3
    start = time.perf_counter()
    groups, _ = analyse_model(network, (channels, side, side),
                              Settings(target=0.5))
    seconds = time.perf_counter() - start
    cost = Cost(groups)
    least = float(cost(kept_channels(groups, torch.zeros(groups.number)).
                       float()))
    written = [layer.outputs for layer in groups.layers if layer.kernel]
    gated_slots = sum(int((slots >= 0).sum()) for slots in written)

    torch.manual_seed(7)
    torch.set_default_dtype(torch.float64)
    network = randomise_(network.double())
    gates = Gates(groups.number)
    with torch.no_grad():
        gates.theta.uniform_(0.3, 1.)
        gates.theta[torch.rand(groups.number) < 0.5] = 0
    pruned, _ = prune(network, groups, gates.openness())
    inputs = torch.randn(1, channels, side, side)
    with torch.no_grad():
        got = _leaves(infer(pruned, inputs))
        for layer in groups.readers():
            gate_layer_(
                network.get_submodule(layer.name), gates, layer.inputs)
        wanted = _leaves(infer(network, inputs))
    difference = largest_difference(got, wanted)
    held = [
        dict(reason=frozen.reason, channels=frozen.channels)
        for frozen in groups.frozen
        if 'output of the model' not in frozen.reason
        and 'for training only' not in frozen.reason
    ]
    status = 'wrong' if not difference <= TOLERANCE else (
        'part' if held else 'works')
    return dict(
        status=status,
        reason='',
        prunable_channels=round(
            gated_slots / sum(len(slots) for slots in written), 4),
        prunable_macs=round(1 - least, 4),
        frozen=held,
        rel_diff=difference,
        seconds=round(seconds, 2))


def _leaves(outputs: Any) -> list[Any]:
    import torch
    from torch.utils._pytree import tree_leaves
    return [
        leaf for leaf in tree_leaves(outputs) if isinstance(leaf, torch.Tensor)
    ]


def _first_line(error: BaseException) -> str:
    """The innermost cause of an error, in one short line."""
    while error.__cause__ is not None and isinstance(error, (KeyError, )):
        error = error.__cause__
    text = ' '.join(str(error).split())
    return f'{type(error).__name__}: {text}'[:200]


def check_apart(path: Path) -> dict[str, Any]:
    """:func:`check` in a process of its own, within limits."""

    def limit() -> None:
        size = LIMIT_GIB * 2**30
        resource.setrlimit(resource.RLIMIT_DATA, (size, size))

    try:
        done = subprocess.run(
            [sys.executable, '-W', 'ignore', __file__, '--row',
             str(path)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            preexec_fn=limit,
            timeout=LIMIT_SECONDS)
        row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return row
    except subprocess.TimeoutExpired:
        reason = f'no result within {LIMIT_SECONDS} s'
    except (ValueError, IndexError):
        lines = done.stderr.strip().splitlines() or ['']
        reason = f'the process ended with {done.returncode}: {lines[-1]}'
    return dict(
        config=str(path),
        family=path.parent.name,
        status='refused',
        reason=reason[:200])


@one_line_errors()
def main() -> None:
    args = parse_args()
    if args.row:
        print(json.dumps(check(args.configs[0])))
        return
    configs = [Path(config) for config in args.configs]
    for config in configs:
        if not config.is_file():
            fail(f'expected a config file, but got {config}, which does not '
                 'exist; pass the path of a config')
    rows = []
    for path in track(configs or list(representatives()), 'models'):
        rows.append(check_apart(path))
        row = rows[-1]
        print(f'{row["family"]:16} {path.name:60} {row["status"]:8} '
              f'{row.get("rel_diff") or 0:.0e} {row["reason"]}', flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == '__main__':
    main()
