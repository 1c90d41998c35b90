"""Configs of this repository parse, and a drop-in adds what it must."""
from __future__ import annotations

from pathlib import Path

import pytest

mmengine = pytest.importorskip('mmengine')
pytest.importorskip('mmseg')

from gdp_mmseg.demo import data

from helpers import ROOT

CONFIGS = sorted(path.name for path in (ROOT / 'configs').glob('*.py'))
PRUNED = [name for name in CONFIGS if name.startswith('gdp_')]


@pytest.mark.parametrize('name', CONFIGS)
def test_config_parses(name: str) -> None:
    cfg = mmengine.Config.fromfile(ROOT / 'configs' / name)
    assert cfg.model.type in ('EncoderDecoder', 'ImageClassifier',
                              'gdp_mmseg.GDPModel')
    assert cfg.train_dataloader and cfg.test_dataloader and cfg.train_cfg


@pytest.mark.parametrize('name', PRUNED)
def test_drop_in_adds_a_model_type_and_a_hook_only(name: str) -> None:
    dense = mmengine.Config.fromfile(ROOT / 'configs' /
                                     name.removeprefix('gdp_')).to_dict()
    pruned = mmengine.Config.fromfile(ROOT / 'configs' / name).to_dict()
    assert pruned['model'].pop('gdp') and pruned['default_hooks'].pop('gdp')
    pruned['model']['type'] = dense['model']['type']
    assert pruned == dense


def test_base_model_type_can_be_named_in_a_drop_in(tmp_path: Path) -> None:
    template = (ROOT / 'configs' / 'drop_in_template.py').read_text()
    assert '# base=_base_.model.type' in template
    changed = tmp_path / 'config.py'
    changed.write_text(
        template.replace('# base=', 'base=').replace(
            './deeplabv3plus_voc.py',
            str(ROOT / 'configs' / 'deeplabv3plus_voc.py')))
    assert mmengine.Config.fromfile(changed).model.base == 'EncoderDecoder'


def test_demo_config_names_the_classes_that_are_drawn() -> None:
    cfg = mmengine.Config.fromfile(ROOT / 'configs/deeplabv3plus_demo.py')
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        assert loader.dataset.metainfo.classes == data.CLASSES
        assert loader.dataset.metainfo.palette == data.PALETTE
    assert cfg.model.decode_head.num_classes == len(data.CLASSES)


def test_metafile_names_each_config_once() -> None:
    yaml = pytest.importorskip('yaml')
    content = yaml.safe_load((ROOT / 'configs' / 'metafile.yml').read_text())
    collections = {one['Name'] for one in content['Collections']}
    listed = [model['Config'] for model in content['Models']]
    assert sorted(listed) == [
        f'configs/{name}' for name in CONFIGS if name != 'drop_in_template.py'
    ]
    for model in content['Models']:
        assert model['Config'] == f'configs/{model["Name"]}.py'
        assert model['In Collection'] in collections


@pytest.mark.parametrize('name, millions, widest', [
    ('gdp_resnet56_cifar10.py', 125.5, 64),
    ('gdp_vgg16_cifar10.py', 313.2, 512),
    ('gdp_resnet50_imagenet.py', 4089.2, 2048),
    ('gdp_mobilenetv2_imagenet.py', 300.8, 1280),
])
def test_classifier_can_lose_half_of_its_flops(name: str, millions: float,
                                               widest: int) -> None:
    pytest.importorskip('mmpretrain')
    from mmengine.registry import MODELS, init_default_scope

    from gdp_mmseg.analysis.analyse import analyse
    from gdp_mmseg.cost.counts import FlopCost
    from gdp_mmseg.engine.bare import without_random_weights
    from gdp_mmseg.engine.config import ModelConfig
    from gdp_mmseg.engine.forwards import inference_forward
    cfg = mmengine.Config.fromfile(ROOT / 'configs' / name)
    init_default_scope(cfg.default_scope)
    config = ModelConfig.of(cfg)
    with without_random_weights():
        network = MODELS.build(config.ungated)
    analysis = analyse(network, config.input_shape(), inference_forward)
    cost = FlopCost(analysis)
    assert cost.dense / 1e6 == pytest.approx(millions, abs=0.1)
    assert cost.fixed_share() < config.settings.target.ratio / 2
    assert widest in [len(layer.outputs) for layer in analysis.layers]
