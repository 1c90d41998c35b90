"""Latency of networks at 0.4 of their FLOPs, in the runtimes that deploy them.

    python benchmarks/latency.py --report docs/reports/latency.json

Writes the report and, from it, ``docs/latency.md``. No network is trained:
gates are closed at random, so many of each group that the FLOPs are 0.4 of the
dense ones. All times of a row are process times of one thread, taken in turns.
Needs the packages of ``requirements/deploy.txt``.
"""
from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import platform
import time
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn

from gdp_mmseg.analysis.structure import Analysis
from gdp_mmseg.analysis.tracer import clone_model
from gdp_mmseg.cost.counts import Cost, FlopCost, inference_layers
from gdp_mmseg.cost.latency import STOPWATCHES, LatencyCost
from gdp_mmseg.cost.latency import measure as measure_layers
from gdp_mmseg.engine.config import ModelConfig
from gdp_mmseg.engine.forwards import count_inference_flops
from gdp_mmseg.engine.model import analyse_model
from gdp_mmseg.export.onnx import Deployed, to_onnx
from gdp_mmseg.files import write_json
from gdp_mmseg.packages import check_packages
from gdp_mmseg.report.measure import Call, median_ms
from gdp_mmseg.report.runtimes import RUNTIMES
from gdp_mmseg.report.tables import table
from gdp_mmseg.surgery.prune import prune

ROOT = Path(__file__).resolve().parents[1]
NETWORKS = {
    'DeepLabV3Plus-ResNet50': 'deeplabv3plus_voc.py',
    'DeepLabV3Plus-MobileNetV2': 'deeplabv3plus_mobilenetv2_voc.py',
}
TARGET = 0.4
# Widths are rounded up to multiples of these.
MULTIPLES = (1, 4)
COLUMNS = dict(
    pytorch='PyTorch',
    channels_last='PyTorch, channels_last',
    onnxruntime='ONNX Runtime',
    openvino='OpenVINO')


def build(config: str) -> tuple[nn.Module, Config]:
    """Build the network of a config with random weights, in eval mode."""
    cfg = Config.fromfile(ROOT / 'configs' / config)
    init_default_scope(cfg.default_scope)
    model = ModelConfig.of(cfg).without_pretrained().ungated
    return revert_sync_batchnorm(MODELS.build(model)).eval(), cfg


def random_widths(analysis: Analysis, cost: Cost, seed: int = 0) -> Tensor:
    """Close gates at random until a cost is at the target.

    Each group keeps another share of its gates, as after a training.

    Args:
        analysis (Analysis): Analysis of the network.
        cost (Cost): FLOPs or latency, as a training would hold it.
        seed (int): Seed of the random numbers.

    Returns:
        Tensor: ``(G,)`` openness, 0 or 1.
    """
    generator = torch.Generator().manual_seed(seed)
    shares = 0.2 + torch.rand(len(analysis.groups), generator=generator)

    def opened(scale: float) -> Tensor:
        keep = torch.zeros(analysis.num_gates)
        for group, share in zip(analysis.groups, shares.tolist()):
            number = round(min(scale * share, 1.) * len(group.gates))
            keep[group.gates[:max(number, 1)]] = 1
        return keep

    low, high = 0., 5.
    for _ in range(30):
        middle = (low + high) / 2
        if float(cost(opened(middle))) > TARGET:
            high = middle
        else:
            low = middle
    return opened(low)


def rounded_up(openness: Tensor, analysis: Analysis, multiple: int) -> Tensor:
    """Open more gates of each group, to a multiple or to all of them."""
    openness = openness.clone()
    for group in analysis.groups:
        number = int(openness[group.gates].sum())
        number = math.ceil(number / multiple) * multiple
        openness[group.gates[:number]] = 1
    return openness


def calls_of(network: nn.Module, image: Tensor) -> dict[str, Call]:
    """Make the calls of a network in each runtime."""
    content, _ = to_onnx(network, [image], 'noise')
    plain = Deployed(network).eval()
    last = Deployed(clone_model(network)).eval()
    last = last.to(memory_format=torch.channels_last)
    image_last = image.to(memory_format=torch.channels_last)
    return dict(
        pytorch=lambda: plain(image),
        channels_last=lambda: last(image_last),
        **{
            name: runtime(content, image)
            for name, runtime in RUNTIMES.items()
        })


def measure(name: str, sides: list[int], rounds: int) -> list[dict[str, Any]]:
    """Measure a network at all widths and sizes; return rows of the report."""
    network, _ = build(NETWORKS[name])
    rows = []
    for side in sides:
        analysis, _ = analyse_model(network, (3, side, side))
        openness = random_widths(analysis, FlopCost(analysis))
        networks = [network] + [
            prune(network, analysis, rounded_up(
                openness, analysis, multiple))[0] for multiple in MULTIPLES
        ]
        image = torch.randn(1, 3, side, side)
        calls = [calls_of(one, image) for one in networks]
        flops = [
            count_inference_flops(one, (1, 3, side, side)) for one in networks
        ]
        times = median_ms([call for one in calls for call in one.values()],
                          rounds,
                          math.inf,
                          clock=time.process_time)
        dense, *others = (
            dict(zip(COLUMNS, times[first:]))
            for first in range(0, len(times), len(COLUMNS)))
        rows += [
            dict(
                network=name,
                side=side,
                multiple=multiple,
                flops=count / flops[0],
                latency={key: found[key] / dense[key]
                         for key in COLUMNS})
            for multiple, count, found in zip(MULTIPLES, flops[1:], others)
        ]
        print(json.dumps(rows[-len(MULTIPLES):]), flush=True)
    return rows


def by_latency(name: str, side: int, rounds: int) -> list[dict[str, Any]]:
    """Choose widths by a measured latency, and measure the network's own."""
    network, _ = build(NETWORKS[name])
    analysis, _ = analyse_model(network, (3, side, side))
    image = torch.randn(1, 3, side, side)
    dense = calls_of(network, image)
    rows = []
    for runtime, column in (('torch', 'pytorch'), ('onnxruntime', ) * 2):
        cost = LatencyCost(analysis)
        cost.weigh_(
            measure_layers(
                inference_layers(analysis), torch.device('cpu'),
                STOPWATCHES[runtime]()).flatten())
        openness = random_widths(analysis, cost)
        pruned = calls_of(prune(network, analysis, openness)[0], image)
        found, whole = median_ms([pruned[column], dense[column]],
                                 rounds,
                                 math.inf,
                                 clock=time.process_time)
        rows.append(
            dict(
                network=name,
                side=side,
                runtime=runtime,
                flops=float(FlopCost(analysis)(openness)),
                layers=float(cost(openness)),
                latency=found / whole))
        print(json.dumps(rows[-1]), flush=True)
    return rows


def markdown(report: dict[str, Any]) -> str:
    """Return the page of a report."""
    rows = [['network and widths', 'size', 'FLOPs', *COLUMNS.values()]]
    for row in report['rows']:
        widths = ('any widths' if row['multiple'] == 1 else
                  f'multiples of {row["multiple"]}')
        rows.append([
            f'{row["network"]}, {widths}', f'{row["side"]} x {row["side"]}',
            f'{row["flops"]:.3f}',
            *(f'{row["latency"][key]:.3f}' for key in COLUMNS)
        ])
    targets = [[
        'network', 'size', 'runtime of the target', 'layers',
        'whole network there', 'FLOPs'
    ]]
    for row in report['by_latency']:
        targets.append([
            row['network'], f'{row["side"]} x {row["side"]}', row['runtime'],
            *(f'{row[key]:.3f}' for key in ('layers', 'latency', 'flops'))
        ])
    return '\n'.join([
        '# Latency',
        '',
        'Generated by `python benchmarks/latency.py --report '
        f'docs/reports/latency.json --rounds {report["rounds"]}`.',
        '',
        'FLOPs and latency of a pruned network over those of the dense one:',
        '',
        table(rows),
        '',
        'No network was trained: channels were removed at random, another '
        f'share of each group, until {TARGET} of the FLOPs were left, and '
        'each width was then rounded up. The time of a network is the same '
        'whichever of its channels were removed. Process time of one thread, '
        'one image, from the normalised image to logits of its size; medians '
        f'of {report["rounds"]} rounds in which all networks and runtimes '
        'take turns. Only ratios can be compared with other machines. '
        f'{report["machine"]}; {report["versions"]}.',
        '',
        'ONNX Runtime is slower at widths that are not multiples of 4. '
        '[Deployment](deploy.md) shows how to measure your own network.',
        '',
        f'## A target of {TARGET} of the latency',
        '',
        'Channels removed in the same way, until the sum of the times of the '
        "layers, measured one by one in the target's runtime, was at the "
        'target:',
        '',
        table(targets),
        '',
        'The target knows nothing of norms, activations and resizing, which '
        'are a part of the whole network.',
        '',
    ])


def main() -> None:
    """Measure, write the report and, from it, the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('--report', type=Path, required=True)
    parser.add_argument('--networks', nargs='+', default=[*NETWORKS])
    parser.add_argument('--sides', type=int, nargs='+', default=[256, 512])
    parser.add_argument('--rounds', type=int, default=7)
    args = parser.parse_args()
    check_packages('benchmarks/latency.py', 'onnx', 'onnxruntime', 'openvino')
    torch.set_num_threads(1)
    packages = ('torch', 'onnxruntime', 'openvino')
    rows, by_target = [], []
    with torch.no_grad():
        for name in args.networks:
            rows += measure(name, args.sides, args.rounds)
            by_target += by_latency(name, min(args.sides), args.rounds)
    report = dict(
        rows=rows,
        by_latency=by_target,
        rounds=args.rounds,
        machine=platform.machine(),
        versions=', '.join(f'{one} {importlib.metadata.version(one)}'
                           for one in packages))
    args.report.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.report, report)
    (ROOT / 'docs' / 'latency.md').write_text(
        markdown(json.loads(args.report.read_text())))


if __name__ == '__main__':
    main()
