"""Names of a config that no registry has, each with the nearest one."""
from __future__ import annotations

import re
from typing import Any, Iterator, Mapping

import mmengine.registry
from mmengine.config import Config
from mmengine.registry import (DATASETS, HOOKS, MODELS, OPTIM_WRAPPERS,
                               OPTIMIZERS, PARAM_SCHEDULERS, TRANSFORMS,
                               DefaultScope, Registry, init_default_scope)

from ..analysis.spelling import did_you_mean
from ..engine.config import kind_of

# mmengine's message, which newer releases begin with the scope.
UNKNOWN = re.compile(r'([\w.]+) is not in the (?:(\w+)::)?([\w ]+) registry')


def check_model_names(cfg: Config) -> None:
    """Check that the ``type`` and our ``base`` of the model are registered.

    Raises:
        ValueError: If no registry has one of them.
    """
    init_default_scope(cfg.get('default_scope') or 'mmseg')
    # A dense model may have an argument ``base`` of its own.
    dense = kind_of(cfg.model) == 'dense'
    for key in ['type'] if dense else ['type', 'base']:
        _check(MODELS, f'model.{key}', cfg.model.get(key))


def check_training_names(cfg: Config) -> None:
    """Check that what a training is made of is registered.

    mmengine would say so after the analysis of the model, which may take
    minutes, and not at all of an optimizer.

    Raises:
        ValueError: If no registry has the ``type`` of a hook, an optimizer, a
            parameter scheduler, a dataset or a transform.
    """
    init_default_scope(cfg.get('default_scope') or 'mmseg')
    for registry, key, node in _training_parts(cfg):
        if isinstance(node, Mapping) and '_scope_' not in node:
            _check(registry, f'{key}.type', node.get('type'))


def _training_parts(cfg: Config) -> Iterator[tuple[Registry, str, Any]]:
    """Yield parts of a config, each with its registry and its key."""
    for name, hook in (cfg.get('default_hooks') or {}).items():
        yield HOOKS, f'default_hooks.{name}', hook
    for key, registry in (('custom_hooks', HOOKS), ('param_scheduler',
                                                    PARAM_SCHEDULERS)):
        parts = cfg.get(key) or []
        for index, part in enumerate(
                parts if isinstance(parts, list) else [parts]):
            yield registry, f'{key}.{index}', part
    wrapper = _mapping(cfg.get('optim_wrapper'))
    yield OPTIM_WRAPPERS, 'optim_wrapper', wrapper
    yield OPTIMIZERS, 'optim_wrapper.optimizer', wrapper.get('optimizer')
    dataset = _mapping(_mapping(cfg.get('train_dataloader')).get('dataset'))
    yield DATASETS, 'train_dataloader.dataset', dataset
    for index, step in enumerate(dataset.get('pipeline') or []):
        yield TRANSFORMS, f'train_dataloader.dataset.pipeline.{index}', step


def _mapping(part: Any) -> Mapping[str, Any]:
    """Return a part of a config if it is a mapping, else an empty one."""
    return part if isinstance(part, Mapping) else {}


def _check(registry: Registry, key: str, name: Any) -> None:
    """Raise if a name at a key of the config is not in a registry."""
    if isinstance(name, str) and find_class(registry, name) is None:
        raise ValueError(_unknown(key, name, registry.name))


def find_class(registry: Registry, kind: Any) -> Any:
    """Return the class of a ``type`` in a config; None if there is none."""
    if not isinstance(kind, str):
        return kind
    with registry.switch_scope_and_registry(None) as scoped:
        try:
            return scoped.get(kind)
        except RuntimeError:
            # Registry.get raises it for a name that looks like a module.
            return None


def unknown_name(error: BaseException | None) -> str | None:
    """Return the message for a name that a registry did not have.

    Args:
        error (BaseException, optional): What building a part of a config
            raised. mmengine may have wrapped the registry's error several
            times.

    Returns:
        str, optional: None if the error is another one.
    """
    while error is not None:
        found = UNKNOWN.search(str(error))
        if isinstance(error, KeyError) and found:
            return _unknown('type', found[1], found[3])
        error = error.__cause__ or error.__context__
    return None


def _unknown(key: str, name: str, registry: str) -> str:
    """Return the message for a name that the registries of a kind lack."""
    advice = did_you_mean(name, _names(registry)) or (
        '; change it, or import what registers it by custom_imports')
    return (f'{key}: expected a name in the {registry} registry, but got '
            f'{name!r}{advice}')


def _names(registry: str) -> Iterator[str]:
    """Yield all names of a kind of registry as a config may write them.

    Names of the default scope, and mmengine's own, need no scope.
    """
    current = DefaultScope.get_current_instance()
    for root in vars(mmengine.registry).values():
        if isinstance(root, Registry) and root.name == registry:
            yield from root.module_dict
            for scope, child in root.children.items():
                child.import_from_location()
                if current and scope == current.scope_name:
                    yield from child.module_dict
                yield from (f'{scope}.{name}' for name in child.module_dict)
