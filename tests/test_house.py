"""One version, and folders that import each other in one direction."""
from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import ROOT

PACKAGE = ROOT / 'gdp_mmseg'

# Folders, and modules beside them, in the order in which data passes them:
# none imports what stands below it here.
ORDER = ('version', 'registry', 'files', 'packages', 'analysis', 'gates',
         'cost', 'surgery', 'pruner', 'report', 'gated', 'engine', 'export',
         'cli', 'demo', '__main__', '__init__')
# What each of them imports of the others: no more and no less.
ARROWS: dict[str, set[str]] = {
    'version': set(),
    'registry': set(),
    'files': set(),
    'packages': set(),
    'analysis': set(),
    'gates': {'analysis'},
    'cost': {'packages', 'analysis'},
    'surgery': {'version', 'files', 'analysis', 'gates'},
    'pruner': {'analysis', 'gates', 'cost'},
    'report': {'files', 'packages', 'analysis'},
    'gated': {'analysis', 'gates', 'cost', 'surgery', 'pruner', 'report'},
    'engine': {
        'version', 'registry', 'files', 'analysis', 'gates', 'cost', 'surgery',
        'pruner', 'report'
    },
    'export': {
        'version', 'files', 'packages', 'analysis', 'surgery', 'pruner',
        'report', 'engine'
    },
    'cli':
    {'files', 'analysis', 'cost', 'surgery', 'report', 'engine', 'export'},
    'demo': {'files', 'packages', 'report', 'cli'},
    # The commands themselves are found by their names.
    '__main__': {'version', 'cli'},
    '__init__':
    {'version', 'analysis', 'surgery', 'gated', 'engine', 'export'},
}
# Libraries that each may import. What serves plain PyTorch models needs no
# mm package.
LIBRARIES: dict[str, set[str]] = {
    'version': set(),
    'registry': {'mmengine'},
    'files': set(),
    'packages': {'torch', 'onnxruntime'},
    'analysis': {'torch', 'scipy', 'numpy'},
    'gates': {'torch'},
    'cost': {'torch', 'scipy', 'numpy', 'onnx'},
    'surgery': {'torch'},
    'pruner': {'torch'},
    'report': {'torch', 'matplotlib', 'numpy', 'openvino'},
    'gated': {'torch'},
    'engine': {'torch', 'numpy', 'mmengine', 'mmseg', 'mmpretrain'},
    'export': {'torch', 'numpy', 'mmengine', 'onnx'},
    'cli': {'torch', 'mmengine', 'mmseg', 'PIL'},
    'demo': {'torch', 'mmseg', 'matplotlib', 'numpy', 'PIL'},
    '__main__': set(),
    '__init__': set(),
}


def modules(room: str) -> list[Path]:
    """The files of a folder, or the module of that name."""
    folder = PACKAGE / room
    return sorted(
        folder.rglob('*.py')) if folder.is_dir() else [PACKAGE / f'{room}.py']


def rooms() -> set[str]:
    """Folders and modules that stand directly in the package."""
    return {
        path.relative_to(PACKAGE).parts[0].removesuffix('.py')
        for path in PACKAGE.rglob('*.py')
    }


def imports(path: Path) -> set[str]:
    """Absolute names that a module imports anywhere in it.

    ``from a import b`` gives ``a.b``, which may be a module or not.
    """
    names: set[str] = set()
    package = ('gdp_mmseg', *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[:len(package) + 1 - node.level]
            base = '.'.join(
                [*(above if node.level else ()), *filter(None, [node.module])])
            names |= {f'{base}.{alias.name}' for alias in node.names}
    return names


def imported_rooms(room: str) -> set[str]:
    """What a room imports of the package, but for itself."""
    own = {
        name.split('.')[1]
        for path in modules(room)
        for name in imports(path) if name.startswith('gdp_mmseg.')
    }
    return own - {room}


def has_cycle(arrows: dict[str, set[str]]) -> bool:
    """Whether what is imported leads back to what imports it."""
    left = {name: targets & set(arrows) for name, targets in arrows.items()}
    while left:
        leaves = {name for name, targets in left.items() if not targets}
        if not leaves:
            return True
        left = {
            name: targets - leaves
            for name, targets in left.items() if name not in leaves
        }
    return False


def test_version_is_written_once() -> None:
    from gdp_mmseg.version import __version__
    reported = subprocess.run([sys.executable, 'setup.py', '--version'],
                              cwd=ROOT,
                              capture_output=True,
                              text=True,
                              check=True).stdout.split()[-1]
    writers = [
        path.name for path in [*PACKAGE.rglob('*.py'), ROOT / 'setup.py']
        if '__version__ =' in path.read_text()
    ]
    assert reported == __version__
    assert writers == ['version.py']
    assert f'[{__version__}]' in (ROOT / 'CHANGELOG.md').read_text()


def test_each_room_has_its_row() -> None:
    assert rooms() == set(ARROWS)
    assert set(ARROWS) <= set(ORDER) == set(LIBRARIES)


@pytest.mark.parametrize('room', ARROWS)
def test_room_imports_what_its_row_says(room: str) -> None:
    assert imported_rooms(room) == ARROWS[room]


@pytest.mark.parametrize('room', ARROWS)
def test_no_room_imports_upwards(room: str) -> None:
    below = set(ORDER[:ORDER.index(room)])
    assert imported_rooms(room) <= below


@pytest.mark.parametrize('room', ARROWS)
def test_room_imports_its_libraries_only(room: str) -> None:
    libraries = {
        name.split('.')[0]
        for path in modules(room)
        for name in imports(path)
    }
    assert (libraries - sys.stdlib_module_names -
            {'gdp_mmseg'}) <= LIBRARIES[room]


def test_rooms_have_no_cycle() -> None:
    assert not has_cycle({room: imported_rooms(room) for room in ARROWS})


@pytest.mark.parametrize('room', ARROWS)
def test_modules_of_a_room_have_no_cycle(room: str) -> None:
    names = {
        '.'.join(path.relative_to(PACKAGE.parent).with_suffix('').parts): path
        for path in modules(room)
    }
    arrows = {
        name: {
            other
            for other in names
            for found in imports(path)
            if other == found or found.startswith(f'{other}.')
        } - {name}
        for name, path in names.items()
    }
    assert not has_cycle(arrows)


def test_a_cycle_is_noticed() -> None:
    assert not has_cycle({'a': {'b'}, 'b': {'c', 'elsewhere'}, 'c': set()})
    assert has_cycle({'a': {'b'}, 'b': {'c'}, 'c': {'b'}})
