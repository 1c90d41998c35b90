"""The exported config is what the user's was, but for the gates."""
from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip('mmengine')

import numpy as np
from mmengine.config import Config
from torch import nn

from gdp_mmseg.engine.pruned_config import (check_not_exported, check_survives,
                                            plain_value, pruned_config,
                                            write_config)

Size = collections.namedtuple('Size', 'height width')
MODEL = dict(
    type='gdp_mmseg.GDPModel', base='My', gdp=dict(target=0.4), heads=dict())


def written(tmp_path: Path, value: Any) -> Any:
    """Return a value after the way to a config file and back."""
    write_config(tmp_path / 'c.py', dict(key=plain_value(value, 'key')))
    return Config.fromfile(tmp_path / 'c.py').key


@pytest.mark.parametrize('value, expected', [
    ((1, ), (1, )),
    ((), ()),
    ([(1., 2), [None, True]], [(1., 2), [None, True]]),
    (float('inf'), float('inf')),
    (-1e-7, -1e-7),
    ('driver\'s "seat", фон\n', 'driver\'s "seat", фон\n'),
    (Path('data') / 'x', 'data/x'),
    (np.array([[0, 255]], np.uint8), [[0, 255]]),
    (np.float32(0.5), 0.5),
    (Size(3, 4), (3, 4)),
    (nn.ReLU, 'torch.nn.modules.activation.ReLU'),
    ({
        'not a name': 1,
        'class': 2
    }, {
        'not a name': 1,
        'class': 2
    }),
    (dict(a=dict(b=[dict(c=['x' * 50, 'y' * 50])])),
     dict(a=dict(b=[dict(c=['x' * 50, 'y' * 50])]))),
])
def test_values_come_back_as_they_were(value: Any, expected: Any,
                                       tmp_path: Path) -> None:
    assert written(tmp_path, value) == expected


def test_keys_that_are_numbers_stay_numbers(tmp_path: Path) -> None:
    assert dict(written(tmp_path, {0: 'a', 255: 'b'})) == {0: 'a', 255: 'b'}


@pytest.mark.parametrize('value', [
    dict(c=[1, (2., )], a=dict(z=float('nan'), b=Path('x'))),
    {
        1: np.zeros(2),
        'a b': True
    },
])
def test_config_that_survives_an_export_passes(value: Any) -> None:
    assert check_survives(Config(dict(model=MODEL, value=value))) is None


@pytest.mark.parametrize('value, message', [
    (lambda: 0, 'at value.x, but got function'),
    (dict(y=object()), 'at value.x.y, but got object'),
    ('{{ fileBasename }}', 'a value at value .* comes back as another'),
    ('{{ _base_.y }}', 'read again, as an export does, but got'),
])
def test_config_that_does_not_survive_an_export_is_refused(
        value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_survives(Config(dict(model=MODEL, value=dict(x=value))))


def test_gates_in_the_config_of_an_export_are_refused(tmp_path: Path) -> None:
    """Also if nothing but a key tells that it is one."""
    cfg = Config(dict(model=MODEL))
    assert check_not_exported(cfg) is None
    write_config(tmp_path / 'pruned.py', pruned_config(cfg, 'x', {}))
    (tmp_path / 'again.py').write_text(
        "_base_ = './pruned.py'\nmodel = dict(type='gdp_mmseg.GDPModel', "
        'gdp=dict(_delete_=True, target=0.5))\n')
    with pytest.raises(ValueError, match='to prune further, train the gated'):
        check_not_exported(Config.fromfile(tmp_path / 'again.py'))


def test_the_order_of_keys_is_kept(tmp_path: Path) -> None:
    """The order of a ModuleDict is that of its config."""
    heads = dict(seg=1, rim=2, a=3)
    assert list(written(tmp_path, dict(heads=heads)).heads) == [*heads]


def test_what_cannot_be_written_is_named_by_its_key() -> None:
    with pytest.raises(ValueError, match='at key.0.f, but got function'):
        plain_value([dict(f=lambda x: x)], 'key')


def test_a_model_without_init_cfg_gets_none() -> None:
    """Its class may not take one."""
    content = pruned_config(Config(dict(model=MODEL)), 'x', {'a': [1]})
    assert set(content['model']) == {'type', 'base', 'gdp', 'heads'}
    assert content['model']['gdp']['widths'] == {'a': [1]}
