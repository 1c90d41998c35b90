"""Names of a config that no registry has, each with the nearest one."""
from __future__ import annotations

import re
from typing import Any, Iterator, Mapping

import mmengine.registry
from mmengine.config import Config
from mmengine.registry import HOOKS, MODELS, Registry, init_default_scope

from ..spelling import did_you_mean

# mmengine's message, which newer releases begin with the scope.
UNKNOWN = re.compile(r'([\w.]+) is not in the (?:(\w+)::)?([\w ]+) registry')


def check_model_names(cfg: Config) -> None:
    """Check that the ``type`` and the ``base`` of the model are registered.

    Raises:
        ValueError: If no registry has one of them.
    """
    init_default_scope(cfg.get('default_scope') or 'mmseg')
    for key in ('type', 'base'):
        _check(MODELS, f'model.{key}', cfg.model.get(key))


def check_hook_names(cfg: Config) -> None:
    """Check that the ``type`` of each hook is registered.

    Raises:
        ValueError: If no registry has one of them.
    """
    init_default_scope(cfg.get('default_scope') or 'mmseg')
    hooks = {
        f'default_hooks.{name}': hook
        for name, hook in (cfg.get('default_hooks') or {}).items()
    } | {
        f'custom_hooks.{index}': hook
        for index, hook in enumerate(cfg.get('custom_hooks') or [])
    }
    for key, hook in hooks.items():
        if isinstance(hook, Mapping) and '_scope_' not in hook:
            _check(HOOKS, f'{key}.type', hook.get('type'))


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
    """Yield all names of a kind of registry, with their scope and without."""
    # Nothing else imports our own names, if their scope is misspelt.
    from .. import registry as _  # noqa: F401
    for root in vars(mmengine.registry).values():
        if isinstance(root, Registry) and root.name == registry:
            yield from root.module_dict
            for scope, child in root.children.items():
                child.import_from_location()
                yield from child.module_dict
                yield from (f'{scope}.{name}' for name in child.module_dict)
