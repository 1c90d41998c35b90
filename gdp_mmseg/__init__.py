"""Lossless channel pruning of PyTorch networks by gates.

``gate``, ``GatedModel``, ``save_pruned`` and ``load_pruned`` serve any
PyTorch model. ``GDPModel``, ``PrunedModel``, ``GDPHook`` and ``ResumeHook``
are for configs of mmengine, which needs only their names, and
``export_checkpoint`` exports what such a training saved.
"""
from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .analysis.structure import Analysis
    from .engine.hook import GDPHook
    from .engine.model import build_gated_model as GDPModel
    from .engine.model import build_pruned_model as PrunedModel
    from .engine.resume import ResumeHook
    from .export.export import export as export_checkpoint
    from .gated import GatedModel, gate
    from .surgery.saved import load_pruned, save_pruned

__all__ = [
    '__version__', 'Analysis', 'GDPHook', 'GDPModel', 'GatedModel',
    'PrunedModel', 'ResumeHook', 'export_checkpoint', 'gate', 'load_pruned',
    'save_pruned'
]

# Modules of the names, and their names there if they differ. They are
# imported when they are first asked for: torch and the mm packages are slow
# to import, and the latter may be absent.
_MODULES = dict(
    Analysis='analysis.structure',
    GDPHook='engine.hook',
    GDPModel='engine.model:build_gated_model',
    GatedModel='gated',
    PrunedModel='engine.model:build_pruned_model',
    ResumeHook='engine.resume',
    export_checkpoint='export.export:export',
    gate='gated',
    load_pruned='surgery.saved',
    save_pruned='surgery.saved')

# Modules that are commands when they are run.
_COMMANDS = [
    f'{__name__}.{name}'
    for name in ('__main__', 'cli.check', 'cli.export', 'cli.groups',
                 'cli.onnx', 'cli.test', 'cli.train', 'demo.data', 'demo.demo')
]


def _refuse_to_run(arguments: list[str]) -> None:
    """End ``python -m gdp_mmseg.X`` with a line if X is no command.

    Python imports this package first, and would then run a module that
    defines functions only, without a word.
    """
    named = [one for one in arguments if one.startswith(f'{__name__}.')]
    if named and named[0] not in _COMMANDS:
        sys.exit(f'{named[0]} is no command; python -m {__name__} --help '
                 'lists the commands')


# So it is while Python looks for a module to run.
if sys.argv[:1] == ['-m']:
    _refuse_to_run(sys.orig_argv)


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _MODULES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    module, _, attribute = _MODULES[name].partition(':')
    found = getattr(
        importlib.import_module(f'{__name__}.{module}'), attribute or name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    """List the public names, for completion."""
    return sorted({*globals(), *__all__})
