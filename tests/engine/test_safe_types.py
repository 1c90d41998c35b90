"""mmengine's checkpoints are read by ``weights_only=True``, and nothing else.
"""
from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, Iterator

import pytest

pytest.importorskip('mmengine')

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.registry import PARAM_SCHEDULERS
from torch import nn

from gdp_mmseg.engine.checkpoint import read_checkpoint
from gdp_mmseg.engine.safe_types import allow_mmengine_types

from helpers.project import Trained, run_program

# What each needs beside an optimizer.
SCHEDULERS: dict[str, dict[str, Any]] = {
    'ConstantLR': {},
    'CosineAnnealingLR': dict(T_max=2),
    'CosineRestartLR': dict(periods=[2], eta_min=0.),
    'ExponentialLR': dict(gamma=0.5),
    'LinearLR': {},
    'MultiStepLR': dict(milestones=[1]),
    'OneCycleLR': dict(eta_max=1., total_steps=4),
    'PolyLR': {},
    'ReduceOnPlateauLR': {},
    'StepLR': dict(step_size=1),
}


class Reference:
    """Something that a file gives by a call."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self.reduced = call, arguments

    def __reduce__(self) -> Any:
        return self.reduced


@pytest.fixture()
def nothing_allowed() -> Iterator[None]:
    """A process in which no type was allowed yet."""
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    yield
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(before)


@pytest.mark.usefixtures('nothing_allowed')
def test_log_buffers_go_on_where_they_were(trained: Trained) -> None:
    with pytest.raises(pickle.UnpicklingError):
        torch.load(trained.checkpoint, weights_only=True)
    allow_mmengine_types()
    got = torch.load(trained.checkpoint, weights_only=True)
    loss = got['message_hub']['log_scalars']['train/loss']
    expected = trained.runner.message_hub.log_scalars['train/loss']
    assert isinstance(loss, HistoryBuffer)
    assert loss.data[0].tolist() == expected.data[0].tolist()
    assert loss.statistics('mean', 4) == expected.mean(4)


@pytest.mark.usefixtures('nothing_allowed')
@pytest.mark.parametrize('kind', SCHEDULERS)
def test_state_of_a_scheduler_is_read(kind: str, tmp_path: Path) -> None:
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.)
    scheduler = PARAM_SCHEDULERS.build(
        dict(type=kind, optimizer=optimizer, **SCHEDULERS[kind]))
    torch.save(scheduler.state_dict(), tmp_path / 'state.pth')
    allow_mmengine_types()
    got = torch.load(tmp_path / 'state.pth', weights_only=True)
    assert got == scheduler.state_dict()


@pytest.mark.parametrize('owner, name', [(HistoryBuffer, '__init__'),
                                         (HistoryBuffer, 'no_method'),
                                         (np.ndarray, 'tofile')])
def test_no_other_attribute_is_looked_up(owner: Any, name: str,
                                         tmp_path: Path) -> None:
    torch.save(
        dict(state_dict={}, loss=Reference(getattr, HistoryBuffer, 'mean')),
        tmp_path / 'good.pth')
    assert read_checkpoint(str(tmp_path / 'good.pth')) == ({}, {})
    torch.save(
        dict(state_dict={}, loss=Reference(getattr, owner, name)),
        tmp_path / 'bad.pth')
    with pytest.raises(ValueError, match='also holds builtins.getattr'):
        read_checkpoint(str(tmp_path / 'bad.pth'))


@pytest.mark.parametrize('module', ['model', 'hook', 'resume', 'amp'])
def test_a_config_that_names_the_package_allows_them(module: str,
                                                     trained: Trained,
                                                     tmp_path: Path) -> None:
    """mmengine imports one of these modules before it loads a checkpoint."""
    program = tmp_path / 'load.py'
    program.write_text(f'''
import gdp_mmseg.engine.{module}, torch
content = torch.load({str(trained.checkpoint)!r}, weights_only=True)
print('got', type(content['message_hub']['log_scalars']['train/loss']))
''')
    output = run_program(program, cwd=tmp_path)
    assert "got <class 'mmengine.logging.history_buffer" in output
