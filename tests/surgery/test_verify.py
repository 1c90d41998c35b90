"""A surgery that an analysis wrongly calls exact is found, and not done."""
from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gdp_mmseg.analysis.analyse import analyse
from gdp_mmseg.analysis.liveness import kept_channels
from gdp_mmseg.analysis.structure import Analysis
from gdp_mmseg.surgery import trial
from gdp_mmseg.surgery.outputs import largest_difference
from gdp_mmseg.surgery.random_weights import copy_with_random_weights
from gdp_mmseg.surgery.verify import TOLERANCE, verify

from helpers.toys import SHAPE, TOYS, Net, block, conv, last, run


def proven(net: nn.Module, at_norms: bool = True) -> tuple[Analysis, Analysis]:
    """What the analysis says, and what is left of it."""
    analysis = analyse(net, SHAPE, run)
    if not at_norms:
        analysis = analysis.at_layers()
    return analysis, verify(net, analysis, run)[0]


def writers(analysis: Analysis) -> set[str]:
    return {name for group in analysis.groups for name in group.writers}


@pytest.mark.parametrize('name', TOYS)
def test_exact_analysis_is_left_as_it_is(name: str) -> None:
    toy = TOYS[name]
    net, analysis = toy.analyse()
    left, difference = verify(net, analysis, run)
    assert left.num_gates == analysis.num_gates
    assert left.groups == analysis.groups
    assert difference <= TOLERANCE


class DirectConv(nn.Conv2d):
    """Runs its kernel without the method that a gate replaces."""

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input, self.weight, self.bias, padding=1)


def view_by_stored_number(net: Any, x: Tensor) -> Tensor:
    x = net.stem(x)
    n, _, h, w = x.shape
    return net.head(net.body(x.view(n, -1, 4, h, w).flatten(1, 2)))


def split_by_stored_sizes(net: Any, x: Tensor) -> Tensor:
    left, right = net.stem(x).split([4, 4], 1)
    return net.head(net.body(torch.cat([right, left], 1)))


def scale_by_stored_number(net: Any, x: Tensor) -> Tensor:
    """No error, only another result."""
    return net.head(net.body(net.stem(x) / net.stem[0].out_channels))


def view_by_numbers_of_others(net: Any, x: Tensor) -> Tensor:
    """Two parts that have as many channels by chance."""
    x = net.stem(x)
    y = net.twin(x)
    return net.head(net.body(y.flatten().view(x.shape)))


def test_channels_taken_for_as_many_others_stay() -> None:
    net = Net(
        view_by_numbers_of_others,
        stem=block(3, 16),
        twin=block(16, 16),
        body=block(16, 6),
        head=last(6))
    assert writers(proven(net)[1]) == {'body.0'}


def plain(net: Any, x: Tensor) -> Tensor:
    return net.head(net.body(net.stem(x)))


@pytest.mark.parametrize(
    'forward',
    [view_by_stored_number, split_by_stored_sizes, scale_by_stored_number])
def test_channels_that_the_forward_counts_on_stay(forward: Any) -> None:
    net = Net(forward, stem=block(3, 8), body=block(8, 6), head=last(6))
    groups, left = proven(net)
    assert writers(groups) == {'stem.0', 'body.0'}
    assert writers(left) == {'body.0'}
    assert left.num_gates == 6
    row = left.frozen[-1]
    assert row.writers == ('stem.0', ) and 'counts on' in row.reason
    assert all(name != 'stem.0.weight' for name, _ in left.gate_of_slot)


def test_layer_in_which_no_gate_works_keeps_its_inputs() -> None:
    net = Net(
        plain,
        stem=block(3, 8),
        body=DirectConv(8, 6, 3, padding=1),
        head=last(6))
    groups, left = proven(net, at_norms=False)
    assert writers(groups) == {'stem.0', 'body'}
    assert writers(left) == {'body'}
    # A gate at the norm in front of it does work.
    assert writers(proven(net)[1]) == {'stem.0', 'body'}


def refuse_nothing(net: Any, x: Tensor) -> Tensor:
    x = net.stem(x)
    if not x.shape[1]:
        raise ValueError('expected channels')
    return net.head(net.body(x))


def test_group_keeps_a_channel_where_the_forward_needs_one() -> None:
    net = Net(refuse_nothing, stem=block(3, 8), body=block(8, 6), head=last(6))
    analysis, left = proven(net)
    assert left.num_gates == analysis.num_gates
    stem, = (group for group in left.groups if group.writers == ('stem.0', ))
    assert not stem.can_be_empty
    kept = kept_channels(left, torch.zeros(left.num_gates))
    assert kept[stem.gates].sum() == 1


def test_several_culprits_are_found_among_many() -> None:
    net = nn.Sequential(*(
        Net(view_by_stored_number if index in (2, 5) else plain,
            stem=block(3, 8),
            body=block(8, 6),
            head=conv(6, 3)) for index in range(7)))
    groups, left = proven(net)
    assert writers(groups) - writers(left) == {'2.stem.0', '5.stem.0'}


def count_cuts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of all cuts of a proof, how many channels go."""
    cuts: list[int] = []
    plain = trial.cut

    def cut(model: nn.Module, analysis: Analysis, openness: Tensor) -> Any:
        cuts.append(int((openness == 0).sum()))
        return plain(model, analysis, openness)

    monkeypatch.setattr(trial, 'cut', cut)
    return cuts


def repeated(number: int, forward: Any, body: Any) -> nn.Module:
    return nn.Sequential(
        *(Net(forward, stem=block(3, 8), body=body(), head=conv(6, 3))
          for _ in range(number)))


def test_layers_that_ask_for_no_gate_are_found_at_once(
        monkeypatch: pytest.MonkeyPatch) -> None:
    net = repeated(9, plain, lambda: DirectConv(8, 6, 3, padding=1))
    cuts = count_cuts(monkeypatch)
    groups, left = proven(net, at_norms=False)
    assert writers(groups) - writers(left) == {
        f'{index}.stem.0'
        for index in range(9)
    }
    # All, what is left by halves, and what is left as a whole.
    assert len(cuts) <= 4


def test_culprits_alike_are_tried_one_by_one(
        monkeypatch: pytest.MonkeyPatch) -> None:
    net = repeated(9, view_by_stored_number, lambda: block(8, 6))
    cuts = count_cuts(monkeypatch)
    groups, left = proven(net)
    assert writers(groups) - writers(left) == {
        f'{index}.stem.0'
        for index in range(9)
    }
    # With gates at norms, and with all at layers.
    assert len(cuts) <= 2 * (9 + 6)


def test_one_of_many_alike_does_not_condemn_the_others() -> None:
    net = nn.Sequential(*(
        Net(view_by_stored_number if index == 4 else plain,
            stem=block(3, 8),
            body=block(8, 6),
            head=conv(6, 3)) for index in range(9)))
    groups, left = proven(net)
    assert writers(groups) - writers(left) == {'4.stem.0'}


@pytest.mark.parametrize('least, side', [
    (1, 64),
    (100, 128),
    (200, 224),
    (300, 320),
])
def test_input_is_about_the_least_that_the_model_takes(least: int,
                                                       side: int) -> None:
    seen: set[int] = set()

    def picky(net: Any, x: Tensor) -> Tensor:
        if x.shape[-1] < least:
            raise ValueError(f'expected at least {least}')
        if x.device.type == 'cpu':
            seen.add(x.shape[-1])
        return plain(net, x)

    net = Net(picky, stem=block(3, 4), body=block(4, 4), head=last(4))
    analysis = analyse(net, (3, 320, 320), run)
    assert verify(net, analysis, run)[0].num_gates == analysis.num_gates
    assert seen == {side}


def test_lively_copy_leaves_the_model_and_shares_memory() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*block(3, 8), *block(8, 8), *block(8, 8), last(8))
    before = copy.deepcopy(net.state_dict())
    random_copy = copy_with_random_weights(
        net.eval(), lambda net: net(torch.zeros(1, 3, 8, 8)))
    assert all(
        torch.equal(tensor, before[name])
        for name, tensor in net.state_dict().items())
    kernels: list[Tensor] = [random_copy[index].weight for index in (3, 6)]
    first, second = (kernel.untyped_storage() for kernel in kernels)
    assert first.data_ptr() == second.data_ptr()
    assert not torch.equal(*kernels)
    # As many numbers as a model of its own has, none of them special.
    for name, parameter in random_copy.named_parameters():
        assert parameter.shape == before[name].shape
        assert len(parameter.unique()) == parameter.numel()
        assert (parameter.abs() > 1e-6).float().mean() > 0.9


def test_lively_copy_is_calmer_where_numbers_would_overflow() -> None:
    net = nn.Sequential(*(nn.Linear(1, 1) for _ in range(3)))

    def run(net: nn.Module) -> Tensor:
        outputs = net(torch.ones(1, 1))
        return torch.where(outputs > 1, torch.inf, outputs)

    random_copy = copy_with_random_weights(net, run)
    assert bool(run(random_copy).isfinite().all())


def test_model_that_is_never_the_same_is_refused() -> None:
    calls = itertools.count()
    net = Net(
        lambda net, x: plain(net, x) + next(calls),
        stem=block(3, 8),
        body=block(8, 6),
        head=last(6))
    with pytest.raises(ValueError, match='prunable|relative difference'):
        proven(net)


def test_training_forward_counts_too() -> None:
    net = Net(plain, stem=block(3, 8), body=block(8, 6), head=last(6))

    def training(net: Any, x: Tensor) -> Tensor:
        return view_by_stored_number(net, x)

    analysis = analyse(net, SHAPE, run, training)
    assert writers(verify(net, analysis, run, training)[0]) == {'body.0'}


def test_neither_model_nor_random_numbers_are_touched() -> None:
    net = Net(
        view_by_stored_number,
        stem=block(3, 8),
        body=block(8, 6),
        head=last(6)).train()
    before = copy.deepcopy(net.state_dict())
    torch.manual_seed(3)
    wanted = torch.rand(3)
    torch.manual_seed(3)
    proven(net)
    assert torch.equal(torch.rand(3), wanted)
    assert all(module.training for module in net.modules())
    assert all(
        torch.equal(tensor, before[name])
        for name, tensor in net.state_dict().items())


def test_proof_is_the_same_each_time() -> None:
    net = Net(
        view_by_stored_number,
        stem=block(3, 8),
        body=block(8, 6),
        head=last(6))
    analysis = analyse(net, SHAPE, run)
    first, second = (verify(net, analysis, run) for _ in range(2))
    assert first[1] == second[1]
    assert [g.writers
            for g in first[0].groups] == [g.writers for g in second[0].groups]


@pytest.mark.parametrize('got, wanted, difference', [
    ([[1., 2.]], [[1., 2.]], 0.),
    ([[1., 2.5]], [[1., 2.]], 0.25),
    ([[1., float('nan')]], [[1., 2.]], float('inf')),
    ([[1., 2., 3.]], [[1., 2.]], float('inf')),
    ([[1., 2.]], [[1., 2.], [1., 2.]], float('inf')),
    ([[0.5]], [[0.]], 0.5),
])
def test_largest_difference(got: list[list[float]], wanted: list[list[float]],
                            difference: float) -> None:
    assert largest_difference([torch.tensor(one) for one in got],
                              [torch.tensor(one)
                               for one in wanted]) == difference


# -- ignore and prune -------------------------------------------------------


def test_ignored_part_is_not_touched_at_all() -> None:
    net = TOYS['residual with downsample'].analyse()[0]
    analysis = analyse(net, SHAPE, run, ignore=['branch.0'])
    # It reads the stem and writes what branch.3 reads.
    assert writers(analysis) == {'down.0', 'branch.3'}
    assert not any(
        name.startswith('branch.0') for name, _ in analysis.gate_of_slot)
    with pytest.raises(ValueError, match='kept out by ignore'):
        analyse(net, SHAPE, run, ignore=['bran*', 'stem'])


def test_prune_restricts_whose_outputs_go() -> None:
    net = TOYS['chain'].analyse()[0]
    analysis = analyse(net, SHAPE, run, only=['3'])
    assert writers(analysis) == {'3'}
    assert ('6.weight', 1) in analysis.gate_of_slot
    assert any('kept out by only' in row.reason and row.writers == ('0', )
               for row in analysis.frozen)


@pytest.mark.parametrize('option', ['ignore', 'only'])
def test_pattern_of_no_module_is_named(option: str) -> None:
    options: Any = {option: ['branch', 'bodi*']}
    with pytest.raises(
            ValueError,
            match=rf"{option}: .*'bodi\*'.*matches none.* stem, branch, head"):
        analyse(TOYS['residual'].build(), SHAPE, run, **options)
