"""Networks that are built without random numbers, to be loaded afterwards."""
from __future__ import annotations

import pytest
import torch
from torch import nn

from gdp_mmseg.engine.bare import without_random_weights


def test_bare_networks_draw_no_numbers_and_keep_their_norms() -> None:
    before = torch.get_rng_state()
    with without_random_weights():
        net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        nn.init.trunc_normal_(net[0].weight, std=0.02)
    assert torch.equal(torch.get_rng_state(), before)
    assert net[0].weight.unique().tolist() == pytest.approx([0.01])
    assert net[1].weight.tolist() == [1] * 4 == net[1].running_var.tolist()


def test_weights_are_random_again_afterwards() -> None:
    with pytest.raises(KeyError), without_random_weights():
        raise KeyError
    assert len(nn.Conv2d(3, 4, 1).weight.unique()) == 12
