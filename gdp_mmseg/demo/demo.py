"""Demo of the whole method on drawn shapes: train, export, compare, on a CPU.

Draws a small data set, trains DeepLabV3Plus-ResNet50 dense and with gates for
as many iterations, exports the pruned network and compares the three. The two
trainings run at the same time, one thread each. Leaves ``report.json`` and
``report.png`` in the work folder. Each step is a command of its own, which is
printed and can be run again.
"""
from __future__ import annotations

import argparse
import dataclasses
import os
import platform
import re
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable

from ..cli.checks import load_config
from ..cli.errors import fail, one_line_errors
from ..packages import ONNX, is_installed
from .commands import Command, run_together
from .data import make_demo_data
from .picture import draw

if TYPE_CHECKING:
    from ..report.tables import Report


def configs() -> Path:
    """Return the folder of the configs that come with the package.

    A clone has them beside the package, an installed package inside of it.
    """
    package = Path(__file__).resolve().parents[1]
    installed = package / '.mim' / 'configs'
    return installed if installed.is_dir() else package.parent / 'configs'


DENSE = configs() / 'deeplabv3plus_demo.py'
GATED = configs() / 'gdp_deeplabv3plus_demo.py'
# Duration of everything but the trainings, in iterations of the gated one:
# the start of the estimate of the time left, before anything is measured.
AROUND = 100


class Clock:
    """A printer of progress with an estimate of the time left.

    Args:
        iterations (int): Length of each training.
    """

    def __init__(self, iterations: int) -> None:
        self.iterations = iterations
        self.work = iterations + AROUND
        self.reached = {'dense': 0, 'gated': 0}
        self.start = time.monotonic()

    def show(self, stage: str, done: float, text: str = '') -> None:
        """Print one line; ``done`` is work in iterations, of ``self.work``."""
        spent = time.monotonic() - self.start
        left = spent * (self.work - done) / done if done else 0
        remains = f'{left / 60:4.1f} min left' if done else ''
        print(f'[{stage:6}] {text:34} {remains}', flush=True)

    def show_iteration(self, stage: str, line: str) -> None:
        """Print the progress that a line of a training's log holds, if any."""
        found = re.search(r'Iter\(train\) \[ *(\d+)/(\d+)\].* loss: ([\d.]+)',
                          line)
        if not found:
            return
        flops = re.search(r'gdp_flops: ([\d.]+)', line)
        text = f'{found[1]:>4}/{found[2]}  loss {float(found[3]):.2f}'
        if flops:
            text += f'  FLOPs {float(flops[1]):.2f}'
        self.reached[stage] = int(found[1])
        # Both trainings must end, so the slower one counts.
        self.show(stage, min(self.reached.values()), text)


def draw_data(cfg: Any) -> Path:
    """Draw the data of the demo, unless they are there; return their folder.

    Args:
        cfg (Config): Config of a training of the demo.
    """
    root = Path(cfg.train_dataloader.dataset.data_root)
    make_demo_data(root, train=600, val=160, size=128, seed=0)
    return root


def train_both(folder: Path, clock: Clock) -> dict[str, float]:
    """Train dense and gated at the same time, each by a command.

    Returns:
        dict[str, float]: Processor time of each in seconds.
    """
    trainings = {'dense': DENSE, 'gated': GATED}
    seconds = run_together([
        Command(
            arguments=called('train', config, '--work-dir', folder / stage),
            log=folder / f'{stage}.log',
            see=_shown_as(stage, clock))
        for stage, config in trainings.items()
    ])
    for stage in trainings:
        checkpoint = checkpoint_of(folder, stage, clock.iterations)
        if not checkpoint.exists():
            fail(f'expected the training to leave {checkpoint}, but it is '
                 f'not there; read {folder / stage}.log')
    return dict(zip(trainings, seconds))


def called(command: str, *arguments: object) -> list[str]:
    """Return the interpreter's command line for a command of the package."""
    return ['-m', 'gdp_mmseg', command, *map(str, arguments)]


def _shown_as(stage: str, clock: Clock) -> Callable[[str], None]:
    return lambda line: clock.show_iteration(stage, line)


def checkpoint_of(folder: Path, stage: str, iterations: int) -> Path:
    """Return the path of the last checkpoint of a training."""
    return folder / stage / f'iter_{iterations}.pth'


def export(folder: Path, clock: Clock) -> None:
    """Export the gated checkpoint by a command."""

    onnx = ['--onnx'] if all(map(is_installed, ONNX)) else []

    def see(line: str) -> None:
        if line.startswith(('comparing', 'exporting', 'evaluating')):
            clock.show('export', clock.iterations + AROUND / 3, line)

    run_together([
        Command(
            arguments=called('export', GATED,
                             checkpoint_of(folder, 'gated', clock.iterations),
                             '--out-dir', folder / 'export', *onnx),
            log=folder / 'export.log',
            see=see)
    ])


def complete_report(folder: Path, seconds: dict[str, float]) -> Report:
    """Return the export's report, completed by what the trainings gave.

    Args:
        folder (Path): Folder of the demo.
        seconds (dict[str, float]): Processor time of both trainings.
    """
    from ..report.record import last_metrics
    from ..report.tables import Report
    report = Report.read(folder / 'export' / 'report.json')
    report = report.with_metrics(
        dict(dense=last_metrics(folder / 'dense', ['mIoU'])))
    return report.with_training_minutes({
        stage: spent / 60
        for stage, spent in seconds.items()
    })


def conditions(cfg: Any) -> dict[str, Any]:
    """Return data, schedule and machine of the demo as plain types."""
    from ..report.precision import precision_of_training
    return dict(
        title='DeepLabV3Plus-ResNet50 on drawn shapes',
        train='600 drawn images of 128 x 128, 3 classes, seed 0',
        test='160 drawn images of 128 x 128',
        crop=list(cfg.crop_size),
        batch_size=cfg.train_dataloader.batch_size,
        iterations=cfg.train_cfg.max_iters,
        seeds=[cfg.randomness.seed],
        precision=precision_of_training(),
        machine=f'{platform.machine()}, {os.cpu_count()} CPU cores')


def parse_args() -> argparse.Namespace:
    """Parse the flags of the command."""
    parser = argparse.ArgumentParser(
        description='Train, export and compare on drawn shapes, on a CPU.')
    parser.add_argument(
        '--work-dir',
        type=Path,
        default=Path('work_dirs/demo'),
        help='folder of the trainings, the report and the picture; the data '
        'are always in work_dirs/demo/data')
    return parser.parse_args()


@one_line_errors()
def main() -> None:
    """Run the demo and print its table."""
    args = parse_args()
    from ..files import write_json
    from ..report.tables import comparison
    folder = args.work_dir.resolve()
    cfg = load_config(str(GATED))
    clock = Clock(cfg.train_cfg.max_iters)
    folder.mkdir(parents=True, exist_ok=True)
    # Only folders that a demo writes are removed: the work folder may hold
    # anything else.
    for name in ('dense', 'gated', 'export'):
        shutil.rmtree(folder / name, ignore_errors=True)
    clock.show('data', 0, 'drawing shapes')
    data_root = draw_data(cfg)
    seconds = train_both(folder, clock)
    export(folder, clock)
    report = complete_report(folder, seconds)
    write_json(folder / 'report.json',
               dict(dataclasses.asdict(report), **conditions(cfg)))
    clock.show('report', clock.work, 'drawing report.png')
    miou = {
        row.name: row.metrics['mIoU']
        for row in report.networks if row.metrics
    }
    draw(folder / 'report.png', data_root,
         [('dense', miou['dense'], DENSE,
           checkpoint_of(folder, 'dense', clock.iterations)),
          ('pruned', miou['pruned'],
           folder / 'export' / f'{GATED.stem}_pruned.py',
           folder / 'export' / f'{GATED.stem}_pruned.pth')],
         folder / 'gated' / 'gates.jsonl', report.target)
    print()
    print(comparison(report))
    print(f'\nFLOPs left: {report.share("flops"):.3f} '
          f'(target {report.target}); the outputs of the gated and the '
          f'pruned network differ by {report.max_rel_diff:.0e} of the '
          f'largest output\n{folder / "report.json"}\n{folder / "report.png"}')


if __name__ == '__main__':
    main()
