"""Copies and cuts do not depend on how a model loads its weights."""
from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gdp_mmseg.analysis.analyse import analyse
from gdp_mmseg.analysis.tracer import copy_model
from gdp_mmseg.surgery.constant import Constant
from gdp_mmseg.surgery.prune import prune
from gdp_mmseg.surgery.verify import verify

from helpers.toys import SHAPE, TOYS, Net, block, last, run


class Versioned(nn.Sequential):
    """Loads only states of its own version, which a plain dict has lost."""
    _version = 3

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any,
                              *args: Any) -> None:
        if metadata.get('version') != 3:
            raise ValueError('expected version 3')
        super()._load_from_state_dict(state, prefix, metadata, *args)


class Renamed(nn.Sequential):
    """Saves its tensors under other keys, and loads none of them."""

    def _save_to_state_dict(self, destination: Any, prefix: str,
                            keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f'{prefix}extra'] = torch.zeros(1)

    def _load_from_state_dict(self, state: Any, prefix: str, *args:
                              Any) -> None:
        for key in [key for key in state if key.startswith(prefix)]:
            del state[key]


@pytest.mark.parametrize('kind', [Versioned, Renamed])
def test_model_with_a_loading_code_of_its_own_is_pruned(kind: Any) -> None:
    net = Net(
        lambda net, x: net.head(net.body(x)),
        body=kind(*block(3, 6), *block(6, 8)),
        head=last(8)).eval()
    analysis, difference = verify(net, analyse(net, SHAPE, run), run)
    assert analysis.num_gates == 14 and difference < 1e-8
    openness = (torch.arange(14) % 2).float()
    pruned, _ = prune(net, analysis, openness)
    assert pruned.body[0].weight.shape == (3, 3, 3, 3)
    assert pruned.body[3].weight.shape == (4, 3, 3, 3)
    assert not pruned.body[0].weight.is_meta


def test_mnasnet_is_analysed_and_verified() -> None:
    models = pytest.importorskip('torchvision.models')
    net = models.mnasnet0_5(weights=None)
    analysis = analyse(net, (3, 64, 64), run)
    left, difference = verify(net, analysis, run)
    assert left.num_gates == analysis.num_gates > 1000
    assert difference < 1e-8


def constants(name: str) -> nn.Module:
    """A pruned toy in which layers became constants."""
    net, analysis = TOYS[name].analyse()
    keep = torch.ones(analysis.num_gates)
    for group in analysis.groups:
        if any('branch' in module or module in ('3', 'middle')
               for module in group.writers):
            keep[group.gates] = 0
    pruned, _ = prune(net, analysis, keep)
    assert any(isinstance(module, Constant) for module in pruned.modules())
    return pruned


SHAPES = [(1, 8, 8), (3, 8, 8), (2, 13, 10)]


@pytest.mark.parametrize('name', ['residual', 'transposed convolution'])
def test_traced_constant_takes_any_batch_and_size(name: str) -> None:
    pruned = constants(name)
    traced = torch.jit.trace(pruned, torch.randn(2, *SHAPE))
    for number, height, width in SHAPES:
        inputs = torch.randn(number, 3, height, width)
        assert torch.equal(traced(inputs), pruned(inputs))


def test_traced_constant_of_a_linear_layer_takes_any_batch() -> None:
    left = Constant(nn.Linear(3, 4), 4)
    traced = torch.jit.trace(left, torch.randn(2, 5, 0))
    for number, tokens in ((1, 5), (3, 7)):
        inputs = torch.randn(number, tokens, 0)
        assert torch.equal(traced(inputs), left(inputs))


def test_exported_constant_takes_any_batch_and_size() -> None:
    pruned = constants('residual')
    dynamic = torch.export.Dim.DYNAMIC
    program = torch.export.export(
        pruned, (torch.randn(2, *SHAPE), ),
        dynamic_shapes=({
            0: dynamic,
            2: dynamic,
            3: dynamic
        }, ))
    for number, height, width in SHAPES[1:]:
        inputs: Tensor = torch.randn(number, 3, height, width)
        assert torch.equal(program.module()(inputs), pruned(inputs))


def test_copies_have_hooks_and_containers_of_their_own() -> None:
    net = nn.Sequential(*block(3, 4))
    net[0].seen, net[1].seen = {}, {}
    copied = copy_model(net)
    copied[0].register_forward_pre_hook(lambda *_: copied[0].seen.update(a=1))
    copied(torch.ones(1, 3, 4, 4))
    assert copied[0].seen == dict(a=1) and copied[1].seen == {}
    assert net[0].seen == {} and not net[0]._forward_pre_hooks
