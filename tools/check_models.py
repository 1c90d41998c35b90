"""Check the pruning of many models: one process for each config.

Without arguments: configs of mmsegmentation, as installed, one at least for
each family, backbone and decode head, and of mmpretrain's convolutional
classifiers; the rows go to docs/reports/models.json, a table of them to
docs/models.md.
"""
from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any, Iterator, Mapping

from mmengine.config import Config
from rich.progress import track

from gdp_mmseg.cli.check import check, name_of, show
from gdp_mmseg.cli.checks import check_config_file
from gdp_mmseg.cli.errors import one_line_errors

from models_page import markdown, summary

ROOT = Path(__file__).resolve().parents[1]
# Limits of one process. No model that finished came near them.
LIMIT_SECONDS = 300
LIMIT_GIB = 10
CLASSIFIERS = ('convnext', 'convnext_v2', 'densenet', 'efficientnet',
               'mobilenet_v2', 'mobilenet_v3', 'regnet', 'resnet', 'resnext',
               'res2net', 'seresnet', 'shufflenet_v1', 'shufflenet_v2', 'vgg')


def parse_args() -> argparse.Namespace:
    """Parse the flags of the command."""
    parser = argparse.ArgumentParser(
        description='Prune half of each model at random and compare outputs.')
    parser.add_argument('configs', nargs='*', metavar='CONFIG')
    parser.add_argument(
        '--json', type=Path, help='file that gets the rows as JSON')
    parser.add_argument(
        '--row', action='store_true', help=argparse.SUPPRESS)  # one process
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


def check_apart(path: Path) -> dict[str, Any]:
    """Check one config in a process of its own, within limits.

    A model that exhausts time or memory is a refused row, not the end of the
    sweep.
    """

    def limit() -> None:
        size = LIMIT_GIB * 2**30
        resource.setrlimit(resource.RLIMIT_DATA, (size, size))

    try:
        done = subprocess.run(
            [sys.executable, '-W', 'ignore', __file__, '--row',
             str(path)],
            capture_output=True,
            text=True,
            preexec_fn=limit,
            timeout=LIMIT_SECONDS)
        row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return row
    except subprocess.TimeoutExpired:
        reason = f'no result within {LIMIT_SECONDS} s'
    except (ValueError, IndexError):
        lines = done.stderr.strip().splitlines() or ['']
        reason = f'the process ended with {done.returncode}: {lines[-1]}'
    return dict(
        config=name_of(path),
        family=path.parent.name,
        status='refused',
        reason=reason[:200])


@one_line_errors()
def main() -> None:
    """Check the configs of the command line, or the representatives."""
    args = parse_args()
    if args.row:
        print(json.dumps(check(args.configs[0])))
        return
    for config in args.configs:
        check_config_file(config)
    configs = [Path(config) for config in args.configs]
    rows = []
    for path in track(configs or list(representatives()), 'models'):
        rows.append(check_apart(path))
        show(rows[-1])
    from gdp_mmseg.files import write_json
    if args.json or not configs:
        write_json(args.json or ROOT / 'docs/reports/models.json', rows)
    if not configs:
        (ROOT / 'docs/models.md').write_text(markdown(rows))
        print(summary(rows))
    if any(row['status'] == 'wrong' for row in rows):
        raise SystemExit(1)


if __name__ == '__main__':
    main()
