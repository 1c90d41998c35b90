"""A fine-tuning starts from the exported weights, and from no others."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip('mmseg')

import torch
from mmengine.config import Config
from mmseg.models import EncoderDecoder
from mmseg.registry import MODELS
from torch import nn

from gdp_mmseg.engine.start import StartFromExport

from helpers.project import Exported, build
from helpers.toys import ComputedTable


@MODELS.register_module()
class PartsStarter(EncoderDecoder):
    """A segmentor with its own ``init_weights``, which loads nothing."""

    def init_weights(self) -> None:
        for parameter in self.parameters():
            nn.init.constant_(parameter, 0.5)


def model_of(exported: Exported, **changes: Any) -> nn.Module:
    """Build the exported model with changes of its config, initialised."""
    cfg = Config.fromfile(exported.config)
    cfg.merge_from_dict({f'model.{key}': one for key, one in changes.items()})
    model = build(cfg.model)
    model.init_weights()
    return model


def weights(exported: Exported) -> dict[str, torch.Tensor]:
    return torch.load(exported.checkpoint, weights_only=True)['state_dict']


@pytest.mark.parametrize('base', ['EncoderDecoder', 'PartsStarter'])
def test_every_weight_is_the_exported_one(exported: Exported,
                                          base: str) -> None:
    state = model_of(exported, base=base).state_dict()
    expected = weights(exported)
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in expected)


class _Drops(ComputedTable):
    """Computes a buffer, and begins with other weights."""

    def init_weights(self) -> None:
        nn.init.constant_(self.kernel, 0.5)


def test_buffers_that_a_model_computes_need_not_be_loaded(
        tmp_path: Path) -> None:
    state = dict(kernel=torch.arange(2.), table=torch.zeros(3))
    torch.save(dict(state_dict=state, meta={}), tmp_path / 'x.pth')
    model = _Drops()
    StartFromExport(model, str(tmp_path / 'x.pth'))()
    assert model.kernel.tolist() == [0, 1]
    assert model.table.tolist() == [1, 1, 1]


def test_layers_of_other_classes_begin_anew(exported: Exported) -> None:
    state = model_of(exported, **{
        'base': 'PartsStarter',
        'decode_head.num_classes': 7
    }).state_dict()
    expected = weights(exported)
    for name, value in expected.items():
        if name.startswith('decode_head.conv_seg.'):
            assert (state[name] == 0.5).all() and len(state[name]) == 7
        else:
            assert torch.equal(state[name], value)


def test_a_copy_starts_itself_and_not_the_original(exported: Exported) -> None:
    import copy
    cfg = Config.fromfile(exported.config)
    model = build(cfg.model)
    before = {name: one.clone() for name, one in model.state_dict().items()}
    copied = copy.deepcopy(model)
    copied.init_weights()
    assert all(
        torch.equal(one, before[name])
        for name, one in model.state_dict().items())
    assert not torch.equal(copied.state_dict()['backbone.stem.0.weight'],
                           before['backbone.stem.0.weight'])


@pytest.mark.parametrize('damage, message', [
    ('gone', 'does not exist'),
    ('changed', 'expected the weights that were exported'),
    ('foreign', 'got none that fits'),
])
def test_a_wrong_file_is_an_error_before_the_training(exported: Exported,
                                                      tmp_path: Path,
                                                      damage: str,
                                                      message: str) -> None:
    path = tmp_path / 'x.pth'
    content = torch.load(exported.checkpoint, weights_only=True)
    if damage == 'changed':
        content['state_dict']['decode_head.conv_seg.bias'] += 1
    if damage == 'foreign':
        content = dict(state_dict=dict(other=torch.ones(2)), meta={})
    if damage != 'gone':
        torch.save(content, path)
    with pytest.raises(ValueError, match=message):
        model_of(exported, **{'gdp.checkpoint': str(path)})
