"""Three ways to set the multiplier of the gate step, all else equal.

The same small models, starts, data order and schedules; only what
``gdp_mmseg.gate.solve_multiplier`` returns differs. Writes a report, after
each run, that ``benchmarks/results.py`` turns into a table. Runs that are done
are not run again.

    OMP_NUM_THREADS=1 python benchmarks/controllers.py \
        --report docs/reports/controllers.json
"""
from __future__ import annotations

import argparse
import dataclasses
import itertools
from pathlib import Path
from typing import Callable
from unittest import mock

from gdp_mmseg.files import write_json
from gdp_mmseg.gates import gdp as gate

from small_models import Run, conditions, train_once

# Cost after a step at a multiplier; budget; order of the multiplier.
Controller = Callable[[Callable[[float], float], float, float], float]


@dataclasses.dataclass
class DualAscent:
    """lambda <- max(0, lambda + rate (F - budget)), F after the last step.

    Args:
        rate (float): In units of the loss per share of FLOPs.
    """
    rate: float
    multiplier: float = 0.
    over: float = 0.

    def __call__(self, spent: Callable[[float], float], budget: float,
                 scale: float) -> float:
        self.multiplier = max(0., self.multiplier + self.rate * self.over)
        self.over = spent(self.multiplier) - budget
        return self.multiplier


@dataclasses.dataclass
class ProportionalIntegral:
    """lambda = scale max(0, proportional e + integral sum e), e = F - budget.

    ``scale``, the order of the gains over the order of the prices, makes it
    free of the units of loss and cost. The sum stays above zero: a budget
    that was met early is no credit.
    """
    proportional: float
    integral: float
    total: float = 0.
    over: float = 0.

    def __call__(self, spent: Callable[[float], float], budget: float,
                 scale: float) -> float:
        self.total = max(0., self.total + self.over)
        multiplier = scale * max(
            0., self.proportional * self.over + self.integral * self.total)
        self.over = spent(multiplier) - budget
        return multiplier


# The first pair is the best of eleven on 200 iterations of one model.
WAYS: dict[str, Callable[[], Controller]] = {
    'dual ascent, rate 0.05': lambda: DualAscent(0.05),
    'dual ascent, rate 0.2': lambda: DualAscent(0.2),
    'proportional 3, integral 0.02': lambda: ProportionalIntegral(3, 0.02),
    'proportional 1, integral 0.1': lambda: ProportionalIntegral(1, 0.1),
    'exact solve (ours)': lambda: gate.solve_multiplier,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('--report', type=Path, required=True)
    parser.add_argument(
        '--work-dir', type=Path, default=Path('work_dirs/budget'))
    parser.add_argument(
        '--models', nargs='+', default=['DeepLabV3Plus-ResNet18', 'HRNet'])
    parser.add_argument('--targets', nargs='+', type=float, default=[0.2, 0.4])
    parser.add_argument('--iterations', nargs='+', type=int, default=[500])
    parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1])
    # A loss in another unit is the same task.
    parser.add_argument(
        '--loss-weights', nargs='+', type=float, default=[1., 10.])
    args = parser.parse_args()
    report = dict(
        title='Three ways to set the multiplier', runs=[], **conditions())
    for name, seed, weight, iterations, target in itertools.product(
            args.models, args.seeds, args.loss_weights, args.iterations,
            args.targets):
        run = Run(name, target, iterations, seed, weight)
        for way, build in WAYS.items():
            with mock.patch.object(gate, 'solve_multiplier', build()):
                report['runs'].append(train_once(run, args.work_dir, way))
            write_json(args.report, report)


if __name__ == '__main__':
    main()
