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
    assert cfg.model.type in ('EncoderDecoder', 'gdp_mmseg.GDPModel')
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
