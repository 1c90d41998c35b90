"""Missing data and errors of a pipeline when an export reads its test set."""
from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip('mmseg')

import torch
from mmcv.transforms import BaseTransform
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.registry import init_default_scope
from torch import Tensor, nn

from gdp_mmseg.export.compare import load_batches
from gdp_mmseg.report.measure import paired_latency_ms


class MountedDataset(BaseDataset):
    """Two samples, if its share is mounted."""

    def load_data_list(self) -> list[dict[str, Any]]:
        if self.data_root == 'unmounted':
            raise RuntimeError('the share is not mounted')
        return [dict(number=0), dict(number=1)]


class FailingTransform(BaseTransform):
    """A transform that fails when it is built, when it runs, or not at all.
    """

    def __init__(self,
                 building: str | None = None,
                 running: Exception | None = None) -> None:
        if building:
            raise ValueError(building)
        self.running = running

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        if self.running:
            raise self.running
        return dict(inputs=torch.tensor(results['number']))


def config(step: dict[str, Any], **dataset: Any) -> Config:
    """A config with a test set and one transform."""
    init_default_scope('mmengine')
    return Config(
        dict(
            test_dataloader=dict(
                batch_size=1,
                sampler=dict(type='DefaultSampler', shuffle=False),
                dataset=dict(
                    type='RepeatDataset',
                    times=1,
                    dataset=dict(
                        type=MountedDataset,
                        pipeline=[dict(step, type=FailingTransform)],
                        **dataset)))))


def test_batches_of_the_test_set_are_read() -> None:
    notes: list[str] = []
    batches = load_batches(config({}).test_dataloader, False, notes.append)
    assert batches is not None and not notes
    assert [int(batch['inputs'][0]) for batch in batches] == [0, 1]


def test_missing_data_is_noted_with_its_error() -> None:
    notes: list[str] = []
    cfg = config({}, data_root='unmounted')
    assert load_batches(cfg.test_dataloader, False, notes.append) is None
    assert len(notes) == 1 and 'the share is not mounted' in notes[0]
    with pytest.raises(RuntimeError, match='not mounted'):
        load_batches(cfg.test_dataloader, True, notes.append)


def test_missing_image_is_noted_with_its_error() -> None:
    notes: list[str] = []
    cfg = config(dict(running=FileNotFoundError('no 3.png')))
    assert load_batches(cfg.test_dataloader, False, notes.append) is None
    assert 'no 3.png' in notes[0]


@pytest.mark.parametrize('step, dataset, error', [
    (dict(building='no such mode'), {}, ValueError),
    (dict(running=TypeError('no array')), {}, TypeError),
    (dict(running=ValueError('empty')), {}, ValueError),
    ({}, dict(no_argument=1), TypeError),
])
def test_error_of_the_users_code_is_not_taken_for_missing_data(
        step: dict[str, Any], dataset: dict[str, Any],
        error: type[Exception]) -> None:
    notes: list[str] = []
    with pytest.raises(error):
        load_batches(
            config(step, **dataset).test_dataloader, False, notes.append)
    assert not notes


def test_forwards_of_the_comparison_count_as_rounds_of_the_latency() -> None:
    """They are not run again, and neither is an untimed round."""
    calls: list[str] = []

    def forward(model: nn.Linear, inputs: Tensor) -> Tensor:
        calls.append(model.name)
        return model(inputs)

    models = [nn.Linear(2, 2), nn.Linear(2, 2)]
    for model, name in zip(models, 'ab'):
        model.name = name
    known = [(1e9, 3e9)]
    times = paired_latency_ms(models, (1, 2), forward, known=known)
    assert calls == ['a', 'b']
    assert times == pytest.approx([5e8, 1.5e9], rel=1e-3)
