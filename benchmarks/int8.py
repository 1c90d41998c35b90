"""Quality and latency of a pruned network as 8-bit integers in ONNX Runtime.

    gdp-mmseg demo
    python benchmarks/int8.py --report docs/reports/int8.json

Quantises the pruned network of the demo by ONNX Runtime's static
quantisation, calibrated on images of the training set, and evaluates it by
the test loop of its config. Writes the report and, from it, a table in
``docs/deploy.md``. Needs the packages of ``requirements/deploy.txt``.
"""
from __future__ import annotations

import argparse
import copy
import json
import platform
import tempfile
from pathlib import Path
from typing import Any, Iterator

import onnxruntime
import torch
from mmengine.config import Config
from mmengine.runner import Runner
from onnxruntime.quantization import (CalibrationDataReader, QuantType,
                                      quantize_static)
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor, nn

from gdp_mmseg.export.compare import preprocessed
from gdp_mmseg.export.export import run_test
from gdp_mmseg.export.networks import enter_scope, load_exported
from gdp_mmseg.export.onnx import INPUT, to_onnx
from gdp_mmseg.files import write_json
from gdp_mmseg.packages import onnxruntime_session
from gdp_mmseg.report.measure import median_ms
from gdp_mmseg.report.runtimes import onnxruntime_call
from gdp_mmseg.report.tables import table

from pages import put_between

ROOT = Path(__file__).resolve().parents[1]
NAME = 'gdp_deeplabv3plus_demo'


class Images(CalibrationDataReader):
    """Reader of images for the calibration."""

    def __init__(self, images: list[Tensor]) -> None:
        self._images: Iterator[Tensor] = iter(images)

    def get_next(self) -> dict[str, Any] | None:
        """Return the next image, or None at the end."""
        image = next(self._images, None)
        return None if image is None else {INPUT: image.numpy()}


def training_images(cfg: Config, network: nn.Module,
                    number: int) -> list[Tensor]:
    """Load images of the training set by the pipeline of the test."""
    loader = copy.deepcopy(cfg.test_dataloader)
    loader.dataset.ann_file = cfg.train_dataloader.dataset.ann_file
    batches = Runner.build_dataloader(loader)
    return preprocessed([batch for _, batch in zip(range(number), batches)],
                        network)


def quantised(content: bytes, images: list[Tensor]) -> bytes:
    """Quantise an ONNX file to 8 bits, each channel with a scale of its own.
    """
    with tempfile.TemporaryDirectory() as folder:
        plain, ready, small = (
            Path(folder) / f'{name}.onnx'
            for name in ('plain', 'ready', 'small'))
        plain.write_bytes(content)
        quant_pre_process(str(plain), str(ready))
        quantize_static(
            str(ready),
            str(small),
            Images(images),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8)
        return small.read_bytes()


def miou(cfg: Config, network: nn.Module, content: bytes | None) -> float:
    """Evaluate a network, or the file in its place, by the test loop."""
    tested: Any = copy.deepcopy(network)
    if content is not None:
        session = onnxruntime_session(content)
        # Preprocessing and metrics stay those of the config.
        tested.encode_decode = lambda inputs, metas: torch.from_numpy(
            session.run(None, {INPUT: inputs.numpy()})[0])
    return float(run_test(cfg, tested)['mIoU'])


def measure(folder: Path, calibration: int) -> dict[str, Any]:
    """Quantise and evaluate an exported network; return the report."""
    cfg = Config.fromfile(folder / f'{NAME}_pruned.py')
    enter_scope(cfg)
    network = load_exported(folder, NAME)
    images = training_images(cfg, network, calibration)
    content, _ = to_onnx(network, images[:1], 'an image')
    small = quantised(content, images)
    files = {
        'PyTorch': None,
        'ONNX Runtime': content,
        'ONNX Runtime, int8': small
    }
    calls = [onnxruntime_call(one, images[0]) for one in (content, small)]
    plain, integer = median_ms(calls, 20, 20.)
    return dict(
        name=NAME,
        iterations=cfg.train_cfg.max_iters,
        miou={
            name: miou(cfg, network, file)
            for name, file in files.items()
        },
        bytes=[len(content), len(small)],
        latency=integer / plain,
        calibration=calibration,
        machine=platform.machine(),
        onnxruntime=onnxruntime.__version__)


def markdown(report: dict[str, Any]) -> str:
    """Return the section of a report."""
    rows = [['pruned network of the demo', 'mIoU']]
    rows += [[name, f'{value:.2f}'] for name, value in report['miou'].items()]
    plain, small = report['bytes']
    return '\n'.join([
        table(rows), '',
        f'Trained for {report["iterations"]} iterations, and calibrated '
        f'on {report["calibration"]} images of the training set. '
        'Of the file in single precision, the one of integers has '
        f'{small / plain:.0%} of the size and takes '
        f'{report["latency"]:.0%} of the time '
        f'({report["machine"]}, {torch.get_num_threads()} thread, ONNX '
        f'Runtime {report["onnxruntime"]}; this depends on the instructions '
        'of the processor).'
    ])


def main() -> None:
    """Measure, write the report and, from it, the section of the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        '--folder', type=Path, default=Path('work_dirs/demo/export'))
    parser.add_argument('--calibration', type=int, default=64)
    parser.add_argument('--report', type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    write_json(args.report, measure(args.folder, args.calibration))
    put_between(ROOT / 'docs' / 'deploy.md', 'int8',
                markdown(json.loads(args.report.read_text())))


if __name__ == '__main__':
    main()
