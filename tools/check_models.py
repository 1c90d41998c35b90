"""Check the pruning of many models: one process for each of them.

Without arguments: configs of mmsegmentation, as installed, one at least for
each family, backbone and decode head, and of mmpretrain's convolutional
classifiers; the rows go to docs/reports/models.json. With --backbones: stock
backbones of mmpretrain, timm and torchvision (see stock_backbones.py); the
rows go to docs/reports/backbones.json. Both are shown in docs/models.md.
"""
from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import multiprocessing
import os
import resource
import sys
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Mapping

from mmengine.config import Config
from rich.progress import track

from gdp_mmseg.cli.check import check, name_of
from gdp_mmseg.cli.checks import check_config_file
from gdp_mmseg.cli.errors import one_line_errors
from gdp_mmseg.cli.rows import show
from gdp_mmseg.files import write_json

from models_page import BACKBONES, MODELS, summary, write_page
from stock_backbones import check_backbone, stock

# Limits of one process. No model that finished came near them.
LIMIT_SECONDS = 300
LIMIT_GIB = 10
LIBRARIES = ('gdp_mmseg.engine.model', 'mmseg.models', 'mmpretrain.models',
             'timm', 'torchvision.models')
CLASSIFIERS = ('convnext', 'convnext_v2', 'densenet', 'efficientnet',
               'mobilenet_v2', 'mobilenet_v3', 'regnet', 'resnet', 'resnext',
               'res2net', 'seresnet', 'shufflenet_v1', 'shufflenet_v2', 'vgg')


def parse_args() -> argparse.Namespace:
    """Parse the flags of the command."""
    parser = argparse.ArgumentParser(
        description='Prune half of each model at random and compare outputs.')
    parser.add_argument('configs', nargs='*', metavar='CONFIG')
    parser.add_argument(
        '--backbones',
        action='store_true',
        help='check stock backbones that the report does not have yet, or '
        'those named instead of configs, e.g. timm/resnet18')
    parser.add_argument(
        '--json', type=Path, help='file that gets the rows as JSON')
    return parser.parse_args()


def configs_of(library: str) -> Path:
    """Return the folder of an installed library's configs."""
    module = __import__(library)
    return Path(str(module.__file__)).parent / '.mim' / 'configs'


def families(library: str) -> Iterator[tuple[str, list[Path]]]:
    """Yield the name and the configs of each family of a library."""
    for folder in sorted(configs_of(library).iterdir()):
        configs = sorted(folder.glob('*.py'))
        if configs and folder.name != '_base_' and (
                library == 'mmseg' or folder.name in CLASSIFIERS):
            yield folder.name, configs


def representatives() -> Iterator[Path]:
    """Yield the first config of each family, backbone and head."""
    for library in ('mmseg', 'mmpretrain'):
        seen: set[tuple[str, str]] = set()
        for family, configs in families(library):
            first = True
            for path in configs:
                parts = {('family', family)} if first else set()
                try:
                    config = Config.fromfile(path, import_custom_modules=False)
                    parts |= set(_parts(config.model))
                except (OSError, ImportError, AttributeError) as error:
                    print(f'{path.name}: {error}', file=sys.stderr)
                if parts - seen:
                    seen |= parts
                    first = False
                    yield path


def _parts(model: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the types of backbone and heads that a config names."""
    for name in ('backbone', 'neck', 'decode_head', 'head'):
        part = model.get(name) or ()
        for one in [part] if isinstance(part, Mapping) else part:
            kind = one.get('type')
            yield name, kind if isinstance(kind, str) else str(kind)


def import_libraries() -> None:
    """Import what the processes need, as far as it is installed."""
    for library in LIBRARIES:
        with contextlib.suppress(ImportError):
            importlib.import_module(library)


Check = Callable[[str], dict[str, Any]]


def check_apart(check_one: Check, name: str, family: str) -> dict[str, Any]:
    """Check one model in a process of its own, within limits.

    A model that exhausts time or memory is a refused row, not the end of the
    sweep. The process is a fork, so that libraries are imported only once.
    No thread may run beside it, not even one that draws a progress bar.

    Args:
        check_one (Check): Function from the name of a model to its row.
        name (str): Path of a config or name of a backbone.
        family (str): Family of the row of a process that failed.
    """
    fork = multiprocessing.get_context('fork')
    receiver, sender = fork.Pipe(duplex=False)
    process = fork.Process(target=_send_row, args=(sender, check_one, name))
    process.start()
    sender.close()
    reason = f'no result within {LIMIT_SECONDS} s'
    try:
        if receiver.poll(LIMIT_SECONDS):
            row: dict[str, Any] = receiver.recv()
            return row
    except EOFError:
        process.join()
        reason = f'the process ended with {process.exitcode}'
    finally:
        process.kill()
        process.join()
    return dict(
        config=name_of(Path(name)),
        family=family,
        status='refused',
        reason=reason)


def _send_row(sender: Any, check_one: Check, name: str) -> None:
    """Check one model within the limit of memory and send its row."""
    size = LIMIT_GIB * 2**30
    resource.setrlimit(resource.RLIMIT_DATA, (size, size))
    # Models print and warn while they are built.
    silent = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(silent, stream)
    sender.send(check_one(name))


def check_configs(configs: Iterable[Path],
                  report: Path | None) -> list[dict[str, Any]]:
    """Check the models of configs and write the rows into a report."""
    import_libraries()
    rows = []
    for path in track(list(configs), 'models', auto_refresh=False):
        rows.append(check_apart(check, str(path), path.parent.name))
        show(rows[-1])
    if report:
        write_json(report, rows)
    return rows


def check_backbones(names: list[str], report: Path) -> list[dict[str, Any]]:
    """Check stock backbones and write each row into a report at once.

    A sweep that was interrupted goes on where it ended.

    Args:
        names (list[str]): Backbones to check; empty for all that the report
            does not have.
        report (Path): The report, which may exist.

    Returns:
        list[dict[str, Any]]: All rows of the report.
    """
    import_libraries()
    order = stock()
    unknown = sorted(set(names) - set(order))
    if unknown:
        raise ValueError(f'expected names such as {order[0]}, but got '
                         f'{", ".join(unknown)}; the names are in '
                         'tools/stock_backbones.py')
    rows: dict[str, dict[str, Any]] = {}
    if report.exists():
        rows = {row['config']: row for row in json.loads(report.read_text())}

    def in_order() -> list[dict[str, Any]]:
        return [rows[name] for name in order if name in rows]

    wanted = names or [name for name in order if name not in rows]
    for name in track(wanted, 'backbones', auto_refresh=False):
        family = name.partition('/')[2]
        rows[name] = check_apart(check_backbone, name, family)
        show(rows[name])
        write_json(report, in_order())
    return in_order()


@one_line_errors()
def main() -> None:
    """Check what the command line names, or all; write reports and page."""
    args = parse_args()
    if args.backbones:
        rows = check_backbones(args.configs, args.json or BACKBONES)
        whole = not args.json
    else:
        for config in args.configs:
            check_config_file(config)
        whole = not args.configs
        rows = check_configs(
            map(Path, args.configs) if args.configs else representatives(),
            args.json or (MODELS if whole else None))
    if whole:
        write_page()
        print(summary(rows, 'backbones' if args.backbones else 'families'))
    if any(row['status'] == 'wrong' for row in rows):
        raise SystemExit(1)


if __name__ == '__main__':
    main()
