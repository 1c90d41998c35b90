"""ONNX file of a config and a checkpoint without gates."""
from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Mapping, Sequence

import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..engine.checkpoint import read_checkpoint
from ..engine.config import ModelConfig
from ..files import write_whole
from ..packages import ONNX, check_packages
from ..report.deployment import Deployment, LayerRow, OnnxFile
from ..report.measure import Call, layer_ms, median_ms
from ..report.plots import draw_shares
from ..report.runtimes import RUNTIMES, installed_runtimes
from ..report.tables import Report
from ..surgery.saved import load_strictly
from .compare import Progress, load_batches, preprocessed
from .networks import enter_scope
from .onnx import Deployed, resized, to_onnx

_PICTURE = 'shares.png'
# Number of layers that a report lists.
_SLOWEST = 8
# No third round of measurement starts after this time.
_SECONDS = 10.


def export_onnx(cfg: Config,
                checkpoint: str,
                out: Path,
                dynamic: bool = False,
                argmax: bool = False,
                size: Sequence[int] | None = None,
                progress: Progress = print) -> OnnxFile:
    """Write an ONNX file of a network, checked against PyTorch.

    Args:
        cfg (Config): Config of a network without gates, e.g. an exported one.
        checkpoint (str): Its checkpoint.
        out (Path): File to write.
        dynamic (bool): See :func:`to_onnx`.
        argmax (bool): See :func:`to_onnx`.
        size (Sequence[int], optional): ``(H, W)`` of the input. Defaults to
            that of the data preprocessor, or else of the first test image.
        progress (Progress): Called with a line now and then.

    Raises:
        ValueError: See :func:`to_onnx`.
    """
    check_packages('onnx', *ONNX)
    enter_scope(cfg)
    config = ModelConfig.of(cfg).without_pretrained()
    if config.kind == 'gated':
        raise ValueError('onnx: expected an exported config, but got one with '
                         'gates; export it by gdp-mmseg export, with --onnx')
    network = revert_sync_batchnorm(MODELS.build(config.ungated)).eval()
    load_strictly(network, read_checkpoint(checkpoint)[0])
    images, source = images_of(cfg, network, size, progress)
    content, written = to_onnx(network, images, source, dynamic, argmax)
    write_onnx(out, content)
    return dataclasses.replace(written, file=out.name)


def images_of(cfg: Config, network: nn.Module, size: Sequence[int] | None,
              progress: Progress) -> tuple[list[Tensor], str]:
    """Load images of the test set; random ones if it cannot be read.

    Args:
        cfg (Config): Config with the test set.
        network (nn.Module): Its network, which has the preprocessor.
        size (Sequence[int], optional): ``(H, W)``, see :func:`export_onnx`.
        progress (Progress): Called with a line that says so.

    Returns:
        tuple[list[Tensor], str]: Images ``(1, C, H, W)``, and a description.
    """
    try:
        channels, *known = ModelConfig.of(cfg).input_shape()
    except ValueError:
        channels, known = 3, []
    loader = cfg.get('test_dataloader') or cfg.get('val_dataloader')
    found = load_batches(loader, False, progress)
    if found is None:
        size = size or known or (224, 224)
        return [torch.randn(1, channels, *size)], 'a random input'
    images = preprocessed(found, network)
    size = size or known or images[0].shape[2:]
    return ([resized(image, size)
             for image in images], f'{len(images)} inputs of the test set')


def deploy(report: Report, folder: Path, cfg: Config,
           networks: Mapping[str, nn.Module], options: Mapping[str, bool],
           progress: Progress) -> Report:
    """Write the ONNX file and the chart of an export, and measure both.

    Args:
        report (Report): Report of the export, which stays unchanged.
        folder (Path): Folder to write to.
        cfg (Config): Config with the test set.
        networks (Mapping[str, nn.Module]): Dense, gated and pruned network in
            eval mode on the CPU, by the names in the report.
        options (Mapping[str, bool]): ``dynamic`` and ``argmax``, see
            :func:`gdp_mmseg.export.onnx.to_onnx`.
        progress (Progress): Called with a line now and then.

    Returns:
        Report: Copy with latencies in all runtimes and with a deployment.

    Raises:
        ValueError: If the pruned network cannot be exported to ONNX.
    """
    progress('exporting to ONNX, and measuring the latency of the file')
    pruned = networks['pruned']
    images, source = images_of(cfg, pruned, report.input_shape[2:], progress)
    content, written = to_onnx(pruned, images, source, **options)
    name = f'{report.name}_pruned.onnx'
    write_onnx(folder / name, content)
    dense, _ = to_onnx(networks['dense'], images[:1], source, **options)
    latencies = _latencies(networks, dict(dense=dense, pruned=content),
                           images[0])
    rows = [
        dataclasses.replace(
            row, latency_ms=dict(row.latency_ms, **latencies[row.name]))
        for row in report.networks
    ]
    deployment = Deployment(
        onnx=dataclasses.replace(written, file=name),
        threads=torch.get_num_threads(),
        layers=_slowest_layers(networks, tuple(images[0].shape)),
        picture=_PICTURE)
    report = dataclasses.replace(report, networks=rows, deployment=deployment)
    draw_shares(report.shares(),
                f'{report.name}: shares of the dense network').savefig(
                    folder / _PICTURE)
    return report


def _latencies(networks: Mapping[str, nn.Module], files: Mapping[str, bytes],
               image: Tensor) -> dict[str, dict[str, float]]:
    """Measure milliseconds of each network by runtime, all in turns."""
    calls: dict[tuple[str, str], Call] = {
        ('pytorch cpu', name):
        functools.partial(Deployed(network).eval(), image)
        for name, network in networks.items()
    }
    for runtime in installed_runtimes():
        for name, content in files.items():
            calls[f'{runtime} cpu', name] = RUNTIMES[runtime](content, image)
    times = median_ms([*calls.values()], seconds=_SECONDS)
    found: dict[str, dict[str, float]] = {name: {} for name in networks}
    for (runtime, name), time in zip(calls, times):
        found[name][runtime] = time
    return found


def _slowest_layers(networks: Mapping[str, nn.Module],
                    shape: tuple[int, ...]) -> list[LayerRow]:
    """Time the layers of the pruned network beside those of the dense one."""
    models = [Deployed(networks[name]).eval() for name in ('dense', 'pruned')]
    times = layer_ms(models, shape, lambda model, image: model(image))
    kernels = [{
        name: module.weight.numel()
        for name, module in model.named_modules()
        if name in found and isinstance(module, (nn.Linear, _ConvNd))
    } for model, found in zip(models, times)]
    dense, pruned = times
    slowest = sorted(kernels[1], key=lambda name: -pruned[name])[:_SLOWEST]

    def summed(title: str, *names: set[str]) -> LayerRow:
        return LayerRow(
            title,
            *(sum(found[name] for name in chosen)
              for found, chosen in zip(times, names)))

    rows = [
        LayerRow(
            name.removeprefix('network.'), dense[name], pruned[name],
            kernels[1][name] / kernels[0][name]) for name in slowest
    ]
    rows += [
        summed('all other layers with FLOPs',
               *({*found} - {*slowest} for found in kernels)),
        summed(
            'norms, activations, pooling',
            *({*found} - {*layers, ''}
              for found, layers in zip(times, kernels)))
    ]
    return [
        *rows,
        summed('between the modules: resizing, addition, ...', {''}, {''})
    ]


def write_onnx(path: Path, content: bytes) -> None:
    """Write a file that is complete or absent.

    Raises:
        ValueError: If it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)
    except OSError as error:
        raise ValueError(
            f'onnx: expected to write {path}, but got: '
            f'{error.strerror or error}; make room, or choose another file'
        ) from error
