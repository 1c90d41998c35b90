"""Config of a pruned network, written so that mmengine reads it back.

mmengine's own ``Config.dump`` sorts the keys, which changes the order of the
heads of a ``ModuleDict``, and cannot write paths and arrays.
"""
from __future__ import annotations

import keyword
import math
import tempfile
from pathlib import Path
from typing import Any, Iterator, Mapping

import numpy as np
from mmengine.config import Config

from ..surgery.widths import Widths
from .compat import moves_gates
from .config import PRUNED, SCOPE, ModelConfig

# Key by which an exported config is known, whatever is changed in it.
_EXPORTED = 'gdp_exported'
# Keys that belong to the gated training alone.
_OF_THE_TRAINING = ('work_dir', 'load_from', 'resume')


def pruned_config(cfg: Config, name: str, widths: Widths) -> dict[str, Any]:
    """Make the config of the pruned network, which stock tools read.

    A training with it starts from the exported weights beside the config.

    Args:
        cfg (Config): Config of the gated training.
        name (str): Name of that config.
        widths (Widths): Widths of the pruned network.

    Returns:
        dict[str, Any]: Plain types only, in the order of the user's config.

    Raises:
        ValueError: If a value of the config cannot be written to a file.
    """
    content = {
        key: value
        for key, value in cfg.to_dict().items() if key not in _OF_THE_TRAINING
    }
    config = ModelConfig.of(cfg).without_pretrained()
    content['model'] = dict(
        config.parts,
        type=f'{SCOPE}.{PRUNED}',
        base=config.base,
        gdp=dict(
            widths=widths,
            checkpoint='{{ fileDirname }}/' + f'{name}_pruned.pth'))
    hooks = content.get('default_hooks') or {}
    content['default_hooks'] = {
        key: hook
        for key, hook in hooks.items() if not moves_gates(hook)
    }
    if content.get('custom_hooks'):
        content['custom_hooks'] = [
            hook for hook in content['custom_hooks'] if not moves_gates(hook)
        ]
    content[_EXPORTED] = True
    return {key: plain_value(value, key) for key, value in content.items()}


def check_not_exported(cfg: Config) -> None:
    """Check that a gated training does not build on an exported config.

    Its gates would be on the dense network again, with random weights.

    Raises:
        ValueError: If it does.
    """
    if cfg.get(_EXPORTED):
        raise ValueError(
            'config: expected a gated training of the dense network, but got '
            f'gates in the config of an export ({_EXPORTED}=True); to prune '
            'further, train the gated config again with load_from=its last '
            'checkpoint and a lower gdp.target')


def write_config(path: Path, content: Mapping[str, Any]) -> None:
    """Write a config of plain types as Python code, in its order."""
    path.write_text(
        ''.join(f'{key} = {_code(value)}\n' for key, value in content.items()),
        encoding='utf8')


def check_survives(cfg: Config) -> None:
    """Check that an export can write a config and read the same back.

    Args:
        cfg (Config): Config of a gated training.

    Raises:
        ValueError: If a value cannot be written, or comes back as another.
    """
    content = pruned_config(cfg, 'config', {})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'config_pruned.py'
        write_config(path, content)
        try:
            back = Config.fromfile(path).to_dict()
        except Exception as error:  # a value may be anything
            raise ValueError(
                'config: expected values that can be written to a file and '
                f'read again, as an export does, but got {error}; change the '
                'config') from error
    for key, value in content.items():
        found = back.get(key)
        if key == 'model':
            # Its key ``gdp`` holds the path of the folder.
            value, found = dict(value, gdp=None), dict(found, gdp=None)
        # Texts are compared, because they tell the order of keys, and nan is
        # unequal to itself.
        if repr(value) != repr(found):
            raise ValueError(
                f'config: expected a value at {key} that can be written to a '
                'file and read again, as an export does, but got one that '
                'comes back as another; change the config')


def plain_value(value: Any, key: str) -> Any:
    """Turn a value of a config into plain types that Python code can hold.

    Args:
        value (Any): Paths become strings; arrays and numbers of NumPy become
            lists and numbers; classes and functions become their names.
        key (str): Key of the value, for the error.

    Raises:
        ValueError: If it holds an object of another kind.
    """
    if isinstance(value, Mapping):
        return {
            _plain_key(name): plain_value(item, f'{key}.{name}')
            for name, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        items = [
            plain_value(item, f'{key}.{index}')
            for index, item in enumerate(value)
        ]
        return tuple(items) if isinstance(value, tuple) else items
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, (str, Path)):
        return str(value)
    name = getattr(value, '__qualname__', '')
    if callable(value) and name and '<' not in name:
        return f'{value.__module__}.{name}'
    raise ValueError(
        f'config: expected numbers, strings, lists and dicts at {key}, but '
        f'got {type(value).__name__}, which cannot be written to the exported '
        'config; change the config, for example to the name of a registered '
        'class')


def _plain_key(name: Any) -> Any:
    """Keep numbers as keys, e.g. those of a map of labels."""
    return name if type(name) in (bool, int, float) else str(name)


def _code(value: Any, indent: int = 0) -> str:
    """Python code of a value, one item a line where it is long."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"float('{value}')"
    if not isinstance(value, (dict, list, tuple)):
        return repr(value)
    items = list(_items(value, indent + 4))
    opening, closing = _brackets(value)
    line = opening + ', '.join(items) + closing
    if indent + len(line) < 76 and '\n' not in line:
        return line
    space = '\n' + ' ' * (indent + 4)
    return (opening + ''.join(f'{space}{item},' for item in items) + '\n' +
            ' ' * indent + closing.lstrip(','))


def _items(value: Any, indent: int) -> Iterator[str]:
    """Code of each item of a dict, list or tuple."""
    if not isinstance(value, dict):
        yield from (_code(item, indent) for item in value)
        return
    for name, item in value.items():
        code = _code(item, indent)
        yield f'{name}={code}' if _named(value) else f'{name!r}: {code}'


def _brackets(value: Any) -> tuple[str, str]:
    """Opening and closing bracket of a dict, list or tuple."""
    if isinstance(value, list):
        return '[', ']'
    if isinstance(value, tuple):
        # A single item in brackets alone is no tuple.
        return '(', ',)' if len(value) == 1 else ')'
    return ('dict(', ')') if _named(value) else ('{', '}')


def _named(value: Mapping[str, Any]) -> bool:
    """Tell whether all keys can be names of arguments."""
    return all(
        isinstance(name, str) and name.isidentifier()
        and not keyword.iskeyword(name) for name in value)
