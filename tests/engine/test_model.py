"""GDPModel: the user's own model, and one clear error for each setting."""
from __future__ import annotations

import copy
from typing import Any

import pytest

pytest.importorskip('mmseg')

import torch
from mmengine.config import Config
from mmengine.model import BaseDataPreprocessor
from mmengine.registry import MODELS
from mmseg.models import CascadeEncoderDecoder, EncoderDecoder

from gdp_mmseg.engine import hooked
from gdp_mmseg.engine.config import ModelConfig, default_base
from gdp_mmseg.engine.model import (analyse_config, build_base_model,
                                    build_gated_model, find_pruner)
from gdp_mmseg.gates.gdp import GDPGates
from gdp_mmseg.pruner.pruner import Pruner
from gdp_mmseg.pruner.settings import Settings, Target

from helpers.project import (Project, build, nothing_to_prune, unet,
                             with_two_heads)
from helpers.toys import BACKBONES, deeplab


@MODELS.register_module()
class OwnSegmentor(EncoderDecoder):
    """A class of the user's own."""


@pytest.fixture()
def dense(project: Project) -> Config:
    return Config.fromfile(project.dense)


@pytest.fixture()
def gated(project: Project) -> Config:
    return Config.fromfile(project.gated)


def test_model_is_of_the_users_class_with_the_users_keys(
        dense: Config, gated: Config) -> None:
    plain, model = build(dense.model), build(gated.model)
    assert type(model) is EncoderDecoder
    keys = list(model.state_dict())
    assert [key for key in keys
            if not key.startswith('gdp.')] == list(plain.state_dict())
    assert {
        key
        for key in keys if key.startswith('gdp.')
    } == {
        f'gdp.gates.{name}'
        for name in dict(model.gdp.gates.named_parameters())
        | dict(model.gdp.gates.named_buffers()) if not name.startswith('slots')
    } | {'gdp.takeover.level', 'gdp.takeover.watches'}
    for key, value in plain.state_dict().items():
        assert model.state_dict()[key].shape == value.shape


def test_config_of_the_model_stays_as_it_is(dense: Config,
                                            gated: Config) -> None:
    before = copy.deepcopy(gated.model)
    build(gated.model)
    assert gated.model == before
    # Flat, and nothing changed but the type and the settings beside it.
    rest = {
        key: value
        for key, value in gated.model.items() if key not in ('type', 'gdp')
    }
    assert rest == {
        key: value
        for key, value in dense.model.items() if key != 'type'
    }


def test_a_dense_checkpoint_loads_but_for_the_gates(dense: Config,
                                                    gated: Config) -> None:
    model = build(gated.model)
    missing, unexpected = model.load_state_dict(
        build(dense.model).state_dict(), strict=False)
    assert not unexpected
    assert missing and all(key.startswith('gdp.') for key in missing)


def test_before_training_the_gated_model_is_the_dense_one(
        dense: Config, gated: Config) -> None:
    plain, model = build(dense.model).eval(), build(gated.model).eval()
    plain.load_state_dict({
        key: value
        for key, value in model.state_dict().items()
        if not key.startswith('gdp.')
    })
    assert (model.gdp.gates.openness() == 1).all()
    with torch.no_grad():
        inputs = torch.randn(1, 3, 64, 64)
        expected = plain(inputs, mode='tensor')
        got = model(inputs, mode='tensor')
    assert torch.equal(got, expected)
    assert not torch.allclose(got, torch.zeros_like(got))


def test_training_without_the_hook_is_warned_of_twice(
        gated: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(hooked, '_warn', said.append)
    model = build(gated.model).eval()
    model.state_dict()
    assert said == []
    for _ in range(2):
        model.eval().train()
    assert len(said) == 1 and 'nothing moves the gates' in said[0]
    model.state_dict()
    assert len(said) == 2 and 'nothing moved the gates' in said[1]
    find_pruner(model).hooked = True
    model.eval().train()
    model.state_dict()
    assert len(said) == 2


def test_gates_pass_a_gradient_to_theta_only_through_the_kernels(
        gated: Config) -> None:
    model = build(gated.model)
    parameters = dict(model.named_parameters())
    assert [key for key in parameters
            if key.startswith('gdp.')] == ['gdp.gates.theta']
    model(torch.randn(2, 3, 64, 64), mode='tensor').square().mean().backward()
    assert float(parameters['gdp.gates.theta'].grad.abs().max()) > 0


def test_a_list_of_heads_chooses_the_cascade_of_itself(gated: Config) -> None:
    model = build(with_two_heads(gated.model))
    assert type(model) is CascadeEncoderDecoder
    assert isinstance(model.gdp, Pruner)
    outputs = model.eval()(torch.randn(1, 3, 64, 64), mode='tensor')
    assert outputs.isfinite().all()


@pytest.mark.parametrize('base, expected', [
    ('EncoderDecoder', EncoderDecoder),
    ('mmseg.EncoderDecoder', EncoderDecoder),
    ('OwnSegmentor', OwnSegmentor),
])
def test_base_names_the_users_class(gated: Config, base: str,
                                    expected: type) -> None:
    model = build(dict(gated.model, base=base))
    assert type(model) is expected
    assert isinstance(model.gdp, Pruner)


def test_base_can_name_the_cascade(gated: Config) -> None:
    model = build(
        dict(with_two_heads(gated.model), base='CascadeEncoderDecoder'))
    assert type(model) is CascadeEncoderDecoder


def test_default_class_is_that_of_the_number_of_heads() -> None:
    assert default_base(dict(decode_head=dict())) == 'EncoderDecoder'
    assert default_base(
        dict(decode_head=[dict(), dict()])) == 'CascadeEncoderDecoder'


def test_analysis_of_a_config_is_that_of_its_gated_model(
        dense: Config, gated: Config) -> None:
    build(gated.model)  # Enters mmseg's scope.
    analysis = build(gated.model).gdp.analysis
    for model in (dense.model, gated.model):
        found = analyse_config(ModelConfig.parse(model))
        assert found.num_gates == analysis.num_gates
        assert found.input_shape == analysis.input_shape == (1, 3, 64, 64)
        assert [group.writers for group in found.groups
                ] == [group.writers for group in analysis.groups]


@pytest.mark.parametrize('shape, expected', [
    ((32, 64), (1, 3, 32, 64)),
    ([32, 64], (1, 3, 32, 64)),
    ((3, 96, 96), (1, 3, 96, 96)),
])
def test_input_shape_of_the_settings_wins(gated: Config, shape: Any,
                                          expected: tuple[int, ...]) -> None:
    settings = dict(gated.model.gdp, input_shape=shape)
    model = build(dict(gated.model, gdp=settings))
    assert model.gdp.analysis.input_shape == expected


def test_cost_is_of_the_input_shape(gated: Config) -> None:
    """Multiply-adds of convolutions on maps grow with the pixels."""
    dense = {}
    for side in (64, 128):
        settings = dict(gated.model.gdp, input_shape=(side, side))
        model = build(dict(gated.model, gdp=settings))
        dense[side] = model.gdp.cost.dense
    # All but the image pool, which works on one pixel.
    assert dense[128] == pytest.approx(4 * dense[64], rel=0.01)
    assert dense[128] < 4 * dense[64]


BAD_SETTINGS = {
    'unknown key': (dict(target=0.4, tagret=0.3), 'tagret', 'model.gdp'),
    'no target': (dict(gate_travel=4.), 'gate_travel', 'model.gdp'),
    'no settings': (None, '[]', 'model.gdp'),
    'target 0': (dict(target=0), '0', 'gdp.target'),
    'target 1': (dict(target=1), '1', 'gdp.target'),
    'target 1.0': (dict(target=1.), '1.0', 'gdp.target'),
    'target negative': (dict(target=-0.4), '-0.4', 'gdp.target'),
    'target in percent': (dict(target=40), '40', 'gdp.target'),
    'target text': (dict(target='0.4'), "'0.4'", 'gdp.target'),
    'target none': (dict(target=None), 'None', 'gdp.target'),
    'target true': (dict(target=True), 'True', 'gdp.target'),
    'target of time':
    (dict(target=dict(type='time', ratio=0.4)), "'time'", 'gdp.target.type'),
    'target of a list': (dict(target=dict(type=['params'], ratio=0.4)),
                         "['params']", 'gdp.target.type'),
    'target without ratio':
    (dict(target=dict(type='params')), 'params', 'gdp.target'),
    'target without type': (dict(target=dict(ratio=0.4)), '0.4', 'gdp.target'),
    'target with an unknown key':
    (dict(target=dict(type='params', ratio=0.4, at=1)), "'at'", 'gdp.target'),
    'ratio in percent': (dict(target=dict(type='params', ratio=40)), '40',
                         'gdp.target.ratio'),
    'ratio text': (dict(target=dict(type='latency', ratio='0.4')), "'0.4'",
                   'gdp.target.ratio'),
    'ratio below the frozen part':
    (dict(target=dict(type='params', ratio=0.002),
          min_keep_ratio=0.2), '0.002', 'cannot be pruned'),
    'target nan': (dict(target=float('nan')), 'nan', 'gdp.target'),
    'target of next to nothing': (dict(target=1e-4), '0.0001', '[0.001, 1)'),
    'target below the frozen part': (dict(target=0.002, min_keep_ratio=0.2),
                                     '0.002', 'cannot be pruned'),
    'phases too short': (dict(target=0.4, phases=(0.5, 0.2, 0.2)),
                         '(0.5, 0.2, 0.2)', 'phases'),
    'two phases': (dict(target=0.4,
                        phases=(0.5, 0.5)), '(0.5, 0.5)', 'phases'),
    'no pruning phase': (dict(target=0.4, phases=(0.5, 0., 0.5)),
                         '(0.5, 0.0, 0.5)', 'phases'),
    'phases one number': (dict(target=0.4, phases=0.5), '0.5', 'phases'),
    'phases text': (dict(target=0.4,
                         phases=('0.1', '0.5', '0.4')), '0.5', 'phases'),
    'epsilon rising': (dict(target=0.4,
                            epsilon=(1e-4, 0.1)), '(0.0001, 0.1)', 'epsilon'),
    'epsilon zero': (dict(target=0.4,
                          epsilon=(0.1, 0.)), '(0.1, 0.0)', 'epsilon'),
    'epsilon one number': (dict(target=0.4, epsilon=0.1), '0.1', 'epsilon'),
    'travel zero': (dict(target=0.4, gate_travel=0), '0', 'gdp.gate_travel'),
    'travel text': (dict(target=0.4,
                         gate_travel='far'), "'far'", 'gdp.gate_travel'),
    'close_below negative': (dict(target=0.4,
                                  close_below=-1), '-1', 'gdp.close_below'),
    'floor of all channels': (dict(target=0.4, min_keep_ratio=1.), '1.0',
                              'gdp.min_keep_ratio'),
    'close_below above all gates': (dict(target=0.4, close_below=1.), '1.0',
                                    'gdp.close_below'),
    'input shape of one number': (dict(target=0.4, input_shape=64), '64',
                                  'gdp.input_shape'),
    'input shape with a batch': (dict(target=0.4, input_shape=(1, 3, 64, 64)),
                                 '(1, 3, 64, 64)', 'gdp.input_shape'),
    'input shape zero': (dict(target=0.4, input_shape=(0, 64)), '(0, 64)',
                         'gdp.input_shape'),
    'settings no mapping': (0.4, '0.4', 'model.gdp'),
}


@pytest.mark.parametrize('name', BAD_SETTINGS)
def test_wrong_setting_is_an_error_that_names_what_to_change(
        gated: Config, name: str) -> None:
    settings, came, change = BAD_SETTINGS[name]
    with pytest.raises(ValueError) as error:
        build(dict(gated.model, gdp=settings))
    message = _root(error.value)
    assert 'expected' in message and 'but got' in message
    assert came in message.partition('but got')[2]
    assert change in message


def _root(error: BaseException) -> str:
    """The message that our code raised: mmengine wraps it in its own."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error)


def test_size_must_come_from_somewhere(gated: Config) -> None:
    model = copy.deepcopy(gated.model)
    del model.data_preprocessor['size']
    with pytest.raises(ValueError) as error:
        build(model)
    assert 'model.gdp.input_shape' in _root(error.value)
    model.gdp.input_shape = (64, 64)
    assert build(model).gdp.analysis.input_shape == (1, 3, 64, 64)


def test_a_model_with_nothing_to_prune_is_an_error(gated: Config) -> None:
    model = nothing_to_prune(gated.model)
    with pytest.raises(ValueError) as error:
        build(model)
    message = _root(error.value)
    assert 'prunable' in message and 'but got none' in message


def test_an_input_that_the_network_cannot_take_is_an_error(
        gated: Config) -> None:
    """A UNet halves its input four times and refuses what is left over."""
    model = unet(gated.model)
    model['gdp'] = dict(target=0.4, input_shape=(24, 24))
    with pytest.raises(ValueError) as error:
        build(model)
    message = str(error.value)
    assert '(2, 3, 24, 24)' in message and 'input_shape' in message
    model['gdp'] = dict(target=0.4, input_shape=(32, 32))
    assert isinstance(build(model).gdp, Pruner)


@MODELS.register_module()
class RgbDepthPreprocessor(BaseDataPreprocessor):
    """Makes two tensors of each image."""

    def forward(self, data: dict[str, Any], training: bool = False) -> Any:
        rgb = torch.stack(list(data['inputs'])).float()
        return dict(data, inputs=dict(rgb=rgb, depth=rgb.mean(1)))


@MODELS.register_module()
class RgbDepthSegmentor(EncoderDecoder):
    """Takes a dict of two tensors."""

    def extract_feat(self, inputs: Any) -> Any:
        return self.backbone(inputs['rgb'] + inputs['depth'][:, None])


def test_inputs_in_a_dict_are_named_with_the_way_out(gated: Config) -> None:
    model = dict(
        gated.model,
        base='RgbDepthSegmentor',
        data_preprocessor=dict(type='RgbDepthPreprocessor'),
        gdp=dict(target=0.4, input_shape=(64, 64)))
    with pytest.raises(ValueError) as error:
        build(model)
    message = str(error.value)
    assert "makes a dict with the keys ['rgb', 'depth']" in message
    assert 'concatenate them along the channels' in message


@MODELS.register_module()
class PretrainedSegmentor(EncoderDecoder):
    """Needs its weights, or has more layers with them, or neither."""

    def __init__(self, pretrained: Any, kind: str, **parts: Any) -> None:
        super().__init__(**parts)
        if kind == 'needs' and not pretrained:
            raise TypeError('expected pretrained weights')
        if kind == 'more' and pretrained:
            self.more = torch.nn.Conv2d(1, 1, 1)


@pytest.mark.parametrize('kind, message', [
    ('needs', 'but got TypeError: expected pretrained weights; remove '),
    ('more', r'but got another one \(more.weight first\); remove '),
])
def test_a_model_that_an_export_cannot_build_is_refused_at_once(
        gated: Config, kind: str, message: str) -> None:
    model = dict(
        gated.model, base='PretrainedSegmentor', pretrained='x.pth', kind=kind)
    with pytest.raises(ValueError, match=message):
        build(model)


def test_the_check_without_pretrained_weights_draws_no_number(
        gated: Config) -> None:
    states = []
    for pretrained in (None, 'x.pth'):
        torch.manual_seed(0)
        build(
            dict(
                gated.model,
                base='PretrainedSegmentor',
                pretrained=pretrained,
                kind='neither'))
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_settings_have_the_documented_defaults() -> None:
    settings = Settings.from_config(dict(target=0.3))
    assert settings.target == Target(0.3, 'flops')
    assert settings.input_shape is None
    assert sum(settings.phases) == pytest.approx(1)
    assert settings.epsilon[0] > settings.epsilon[1] > 0
    assert settings.close_below == GDPGates(1).close_below == 0.01
    assert settings.takeover and settings.min_keep_ratio == 0


def test_settings_made_in_python_are_checked_too() -> None:
    assert Settings(Target(0.3)).target.ratio == 0.3
    with pytest.raises(ValueError, match='expected a Target, but got 0.3'):
        Settings(0.3)  # type: ignore
    with pytest.raises(ValueError, match='gdp.gate: '):
        Settings(Target(0.3), gate='gdp')  # type: ignore
    with pytest.raises(ValueError, match='gdp.phases: '):
        Settings(Target(0.3), phases=(1., 1., 1.))


def test_pruned_model_without_widths_is_an_error(dense: Config) -> None:
    for gdp in (None, dict(), dict(target=0.4)):
        with pytest.raises(ValueError) as error:
            build(dict(dense.model, type='gdp_mmseg.PrunedModel', gdp=gdp))
        assert 'widths' in _root(error.value)


def test_base_model_is_the_dense_one(dense: Config) -> None:
    build(dense.model)
    model = {key: value for key, value in dense.model.items() if key != 'type'}
    plain = build_base_model(None, model)
    assert type(plain) is EncoderDecoder
    assert not hasattr(plain, 'gdp')


# -- ignore and prune -------------------------------------------------------


def members(model: Any) -> tuple[set[str], set[str]]:
    """Parts of a model whose outputs, and whose inputs, carry gates."""
    analysis = find_pruner(model).analysis.groups
    return ({
        name.partition('.')[0]
        for group in analysis
        for name in group.writers
    }, {
        name.partition('.')[0]
        for group in analysis
        for name in group.readers
    })


@pytest.mark.usefixtures('mmseg_scope')
@pytest.mark.parametrize('options, writers, readers', [
    (dict(ignore=['decode_head', 'auxiliary_head']), {'backbone'
                                                      }, {'backbone'}),
    (dict(only=['backbone']), {'backbone'},
     {'backbone', 'decode_head', 'auxiliary_head'}),
    (dict(only=['decode_head.*conv*']), {'decode_head'}, {'decode_head'}),
])
def test_parts_are_kept_out_by_name(options: dict[str, Any], writers: set[str],
                                    readers: set[str]) -> None:
    model = build_gated_model(
        gdp=dict(target=0.98, input_shape=(64, 64), **options),
        **deeplab(BACKBONES['ResNet-18']))
    assert members(model) == (writers, readers)


@pytest.mark.parametrize('options, message', [
    (dict(ignore='decode_head'), "gdp.ignore: expected a list of names.*"
     "'decode_head'"),
    (dict(only=[3]), r'gdp.only: expected a list of names.*\(3,\)'),
    (dict(shrink='no'), "gdp.shrink: expected True or False, but got 'no'"),
    (dict(takeover=1), 'gdp.takeover: expected True or False, but got 1'),
    (dict(takeover=False,
          gate='trainable'), "gdp.takeover: expected it with gate='gdp' only"),
])
def test_values_of_another_kind_are_refused(options: dict[str, Any],
                                            message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings.from_config(dict(target=0.4, **options))


@pytest.mark.usefixtures('mmseg_scope')
def test_name_of_no_module_is_an_error_before_any_work() -> None:
    with pytest.raises(ValueError, match="ignore: .*'head'.*decode_head"):
        build_gated_model(
            gdp=dict(target=0.9, input_shape=(64, 64), ignore=['head']),
            **deeplab(BACKBONES['ResNet-18']))
