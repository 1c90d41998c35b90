"""ONNX files: what PyTorch computes, in one size or any, or nothing."""
from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip('mmseg')

import numpy as np
import torch
from mmengine.config import Config
from mmseg.apis import inference_model
from PIL import Image
from torch import Tensor, nn

from gdp_mmseg import packages
from gdp_mmseg.export import deploy as deploying
from gdp_mmseg.export import onnx as exporting
from gdp_mmseg.export.deploy import deploy, export_onnx, write_onnx
from gdp_mmseg.export.onnx import INPUT, Deployed, to_onnx
from gdp_mmseg.report.deployment import Deployment, LayerRow, OnnxFile
from gdp_mmseg.report.tables import Report, markdown

from helpers import ROOT
from helpers.project import NAME, Exported, Project, Trained, run_tool

needs_onnx = pytest.mark.skipif(
    not all(map(packages.is_installed, packages.ONNX)),
    reason='needs requirements/deploy.txt')


class Classifier(nn.Module):
    """A convolution, then another module, then the mean over the image."""

    def __init__(self, last: nn.Module, classes: int = 3) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, classes, 3)
        self.last = last

    def forward(self, images: Tensor, mode: str = 'tensor') -> Tensor:
        return self.last(self.first(images)).mean((2, 3))


class Bessel(nn.Module):
    """An operator that ONNX has not."""

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.special.i0(inputs)


class FixedSize(nn.Module):
    """Keeps the size that it saw first, as int() does in an export."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs[..., :int(inputs.shape[-1] * 0.5)] * inputs.shape[-1]


class Segmentor(nn.Module):
    """Logits of the images' size, by the interface of mmseg."""

    threshold = 0.3

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, classes, 3, stride=2, padding=1)
        self.decode_head = self

    # A module that is its own child would have no end of names.
    def __setattr__(self, name: str, value: Any) -> None:
        if name == 'decode_head':
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def encode_decode(self, images: Tensor, metas: list[Any]) -> Tensor:
        return nn.functional.interpolate(
            self.layer(images), metas[0]['img_shape'], mode='bilinear')


def images(number: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(1, 3, 64, 64, generator=generator) for _ in range(number)
    ]


def run(content: bytes, inputs: Tensor) -> Tensor:
    from gdp_mmseg.packages import onnxruntime_session
    session = onnxruntime_session(content)
    return torch.from_numpy(session.run(None, {INPUT: inputs.numpy()})[0])


@needs_onnx
@pytest.mark.parametrize('classes', [1, 4])
def test_dynamic_file_gives_the_classes_at_any_size(classes: int) -> None:
    network = Segmentor(classes)
    content, written = to_onnx(network, images(), 'noise', True, True)
    assert written.max_rel_diff < 1e-5
    assert written.compared_on == 'noise, 64 x 64 and 32 x 32'
    inputs = torch.randn(3, 3, 40, 56)
    logits = Deployed(network)(inputs)
    wanted = (
        logits.argmax(1) if classes > 1 else
        (logits[:, 0].sigmoid() > network.threshold).long())
    found = run(content, inputs)
    assert found.dtype == torch.int64 and found.shape == (3, 40, 56)
    assert 0 < float(wanted.float().mean())
    assert float((found != wanted).float().mean()) < 1e-3


@needs_onnx
def test_missing_operator_is_named_with_its_module() -> None:
    """The exporter makes it of another one before it finds that it is none."""
    network = Classifier(nn.Sequential(nn.ReLU(), Bessel())).eval()
    with pytest.raises(ValueError) as found:
        to_onnx(network, images(), 'noise')
    assert str(found.value) == (
        'onnx: expected operators that ONNX has, but got '
        'prims.bessel_i0.default in module last.1; replace it there; nothing '
        'was written')


@needs_onnx
def test_file_that_is_right_at_one_size_only_is_refused(
        monkeypatch: pytest.MonkeyPatch) -> None:
    network = Classifier(FixedSize()).eval()
    assert to_onnx(network, images(), 'noise')[1].max_rel_diff < 1e-5
    monkeypatch.setattr(exporting, '_by_program', exporting._by_trace)
    with pytest.raises(
            ValueError,
            match='relative difference of .*above .*'
            'leave --dynamic out.*nothing was written'):
        to_onnx(network, images(), 'noise', dynamic=True)


@needs_onnx
def test_capture_of_sizes_without_end_is_refused(
        monkeypatch: pytest.MonkeyPatch) -> None:

    def endless(*_: Any, **__: Any) -> None:
        while True:
            with contextlib.suppress(Exception):
                sum(range(1000))

    monkeypatch.setattr(exporting, '_by_trace', exporting._by_program)
    monkeypatch.setattr(exporting, '_SECONDS', 0.1)
    monkeypatch.setattr(torch.export, 'export', endless)
    before = signal.getsignal(signal.SIGVTALRM)
    with pytest.raises(
            ValueError,
            match=r'within 0\.1 s of processor time, but got none by then; '
            'leave --dynamic out.*nothing was written'):
        to_onnx(Classifier(nn.ReLU()).eval(), images(), 'noise', dynamic=True)
    assert signal.getsignal(signal.SIGVTALRM) == before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)


def test_missing_package_is_named_with_its_installation(
        exported: Exported, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, 'is_installed', 'onnx'.__eq__)
    done = run_tool(
        'to_onnx.py',
        exported.config,
        exported.checkpoint,
        '--out',
        'new.onnx',
        cwd=tmp_path)
    assert done.status == 2 and done.stderr.endswith(
        'onnx: expected the packages onnx, onnxruntime, onnxscript, but got '
        'no onnxruntime and no onnxscript; install them by: pip install '
        'onnxruntime onnxscript\n')
    done = run_tool(
        'export.py',
        exported.config,
        exported.checkpoint,
        '--onnx',
        '--out-dir',
        'new',
        cwd=tmp_path)
    assert done.status == 2 and '--onnx: expected the packages' in done.stderr
    assert not [*tmp_path.iterdir()]


def test_flags_of_an_onnx_file_need_one(exported: Exported,
                                        tmp_path: Path) -> None:
    done = run_tool(
        'export.py',
        exported.config,
        exported.checkpoint,
        '--dynamic',
        '--out-dir',
        'new',
        cwd=tmp_path)
    assert done.status == 2 and 'expected --onnx with --dyn' in done.stderr


@needs_onnx
def test_gated_config_is_refused(trained: Trained, tmp_path: Path) -> None:
    done = run_tool(
        'to_onnx.py',
        trained.config,
        trained.checkpoint,
        '--out',
        'new.onnx',
        cwd=tmp_path)
    assert done.status == 2 and 'expected an exported config' in done.stderr
    assert not [*tmp_path.iterdir()]


@needs_onnx
def test_command_writes_what_the_exported_pair_computes(
        exported: Exported, tmp_path: Path) -> None:
    arguments = (exported.config, exported.checkpoint, '--out',
                 tmp_path / 'new.onnx', '--dynamic')
    done = run_tool('to_onnx.py', *arguments, cwd=tmp_path)
    assert done.status == 0, done.stderr
    inputs = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        wanted = Deployed(exported.model())(inputs)
    found = run((tmp_path / 'new.onnx').read_bytes(), inputs)
    assert float(
        (found - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())
    assert [*tmp_path.iterdir()] == [tmp_path / 'new.onnx']
    done = run_tool('to_onnx.py', *arguments, cwd=tmp_path)
    assert done.status == 2 and 'expected a new file, but' in done.stderr


@needs_onnx
def test_program_of_the_page_finds_the_classes(
        exported: Exported, project: Project, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / 'docs' / 'deploy.md').read_text()
    program = re.findall(r'^```python\n(.*?)^```', page, re.M | re.S)[0]
    assert program.count('\n') <= 20
    monkeypatch.chdir(tmp_path)
    cfg = Config.fromfile(exported.config)
    export_onnx(cfg, str(exported.checkpoint), Path('segment.onnx'), True,
                True)
    shutil.copy(project.images()[0], 'image.jpg')
    exec(program, {})
    model: Any = exported.model()
    model.cfg = cfg
    result = inference_model(model, 'image.jpg')
    wanted = result.pred_sem_seg.data[0].numpy()
    found = np.asarray(Image.open('classes.png'))
    assert found.shape == wanted.shape
    assert (found != wanted).mean() < 1e-3


@needs_onnx
def test_report_has_all_runtimes_and_the_slowest_layers(
        exported: Exported, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deploying, '_SECONDS', -1.)
    network = exported.model()
    plain = dataclasses.replace(exported.report, deployment=None)
    report = deploy(plain, tmp_path, Config.fromfile(exported.config),
                    dict(dense=network, gated=network, pruned=network),
                    dict(dynamic=False, argmax=True), lambda line: None)
    found = report.deployment
    assert found is not None and found.onnx.file == f'{NAME}_pruned.onnx'
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f'{NAME}_pruned.onnx', 'shares.png'
    ]
    assert {'pytorch cpu',
            'onnxruntime cpu'} <= {*report.network('pruned').latency_ms}
    assert 'onnxruntime cpu' not in report.network('gated').latency_ms
    assert all(row.work == 1 for row in found.layers[:8])
    report.write(tmp_path / 'report.json')
    assert Report.read(tmp_path / 'report.json') == report


def test_page_shows_shares_and_layers(exported: Exported) -> None:
    report = dataclasses.replace(
        exported.report,
        deployment=Deployment(
            OnnxFile('a.onnx', 'logits', True, 1e-6, '2 inputs'), 2,
            [LayerRow('head.conv', 4., 3., 0.5),
             LayerRow('between', 0., 1.)], 'shares.png'))
    page = markdown(report)
    share = report.network('pruned').flops / report.network('dense').flops
    assert '| FLOPs ' in page and f'{share:.3f} |' in page
    assert 'a.onnx: normalised images of any batch and size to logits' in page
    cells = [[cell.strip() for cell in line.split('|')[1:-1]]
             for line in page.splitlines()]
    assert ['head.conv', '75.0%', '0.75', '0.50'] in cells
    assert ['between', '25.0%', '-', '-'] in cells
    assert math.isclose(report.shares()['FLOPs'], share)


def test_file_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / 'file').write_text('')
    with pytest.raises(ValueError, match='onnx: expected to write .*but got'):
        write_onnx(tmp_path / 'file' / 'new.onnx', b'')
