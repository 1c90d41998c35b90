"""One thread for each test process, and what goes to which of them."""
from __future__ import annotations

import gc
import importlib.util
import warnings
from typing import Any, Callable

import pytest

# Programs among them.
collect_ignore = ['helpers']

# The order of the tests: the longest first, or one process would be left
# alone with one of them at the end; last the many short ones that are spread.
LONGEST = ('tests/e2e/test_processes', 'tests/e2e/test_models',
           'tests/benchmarks', 'tests/e2e', 'tests/engine', 'tests/surgery',
           'tests/gates')
LAST = ('tests/cli', 'tests/export')
# Tests of these go to whichever process is free, one by one. Those of other
# modules share a process, and what the module or a helper makes once.
SPREAD = ('tests/e2e/test_models', 'tests/e2e/test_features',
          'tests/e2e/test_stock_tools', 'tests/benchmarks',
          'tests/cli/test_bad_inputs', 'tests/export/test_export')


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        '--gate',
        help='gate method of the tests that take another one in each of '
        'their cases')


def pytest_configure(config: pytest.Config) -> None:
    """Load the fixtures of mm projects, in a process that runs tests.

    What serves plain PyTorch models is tested without any mm package too. A
    process that only hands tests out to others can begin before all imports.
    """
    hands_out = (
        config.getoption('numprocesses', None)
        and not hasattr(config, 'workerinput'))
    if not hands_out and importlib.util.find_spec('mmseg'):
        # Libraries warn each other while they are imported.
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            config.pluginmanager.import_plugin('helpers.project')


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the tests, and mark those that need an mm package."""
    items.sort(key=_place)
    for item in items:
        if 'mmseg_scope' in getattr(item, 'fixturenames', ()):
            item.add_marker('mm')


def pytest_collection_finish() -> None:
    """Leave all that is imported by now out of each garbage collection.

    mmengine collects whenever it builds a data set, which takes a quarter of
    a second with the objects of all libraries.
    """
    gc.collect()
    gc.freeze()


def _place(item: pytest.Item) -> int:
    """Place of a test's folder in the order of the tests."""
    if item.nodeid.startswith(LAST):
        return len(LONGEST) + 1
    return next((place for place, start in enumerate(LONGEST)
                 if item.nodeid.startswith(start)), len(LONGEST))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Let ``--dist loadscope`` do what ``SPREAD`` says."""
    # Absent where the tests run in one process.
    from xdist.scheduler import LoadScopeScheduling

    class Scheduler(LoadScopeScheduling):

        def _split_scope(self, nodeid: str) -> str:
            spread = nodeid.startswith(SPREAD)
            return nodeid if spread else nodeid.partition('::')[0]

    chosen = config.getoption('dist') == 'loadscope'
    return Scheduler(config, log) if chosen else None


@pytest.fixture(scope='session')
def gate_of(pytestconfig: pytest.Config) -> Callable[[int], str]:
    """Name of the gate method for the case of a number.

    All cases with all methods would take too long in each run of the tests:
    ``--gate NAME`` runs all cases with one of them.
    """
    from gdp_mmseg.gates import METHODS
    chosen, names = pytestconfig.getoption('gate'), [*METHODS]
    return lambda number: chosen or names[number % len(names)]


@pytest.fixture(autouse=True, scope='session')
def one_thread() -> None:
    # Runs are small, and machines are shared.
    import torch
    torch.set_num_threads(1)


@pytest.fixture(scope='session')
def mmseg_scope() -> None:
    """mmsegmentation's models, by their short names."""
    pytest.importorskip('mmseg')
    from mmseg.utils import register_all_modules
    register_all_modules()
