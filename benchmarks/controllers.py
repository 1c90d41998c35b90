"""Three controllers of the multiplier of the gate step, all else equal.

Models, starts, data order and schedules are the same; only the result of
``solve_multiplier`` differs. Writes a report after each run.
``benchmarks/results.py`` makes a table of it. Finished runs are not repeated.

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

import torch
from torch import Tensor

from gdp_mmseg.files import write_json
from gdp_mmseg.gates import gdp

from small_models import Run, conditions, train_once

# Arguments: cost after a step at a multiplier, budget, order of magnitude of
# the multiplier, and the last one. Result: a multiplier. All are scalars.
Controller = Callable[..., Tensor]


@dataclasses.dataclass
class DualAscent:
    """Dual ascent: lambda <- max(0, lambda + rate (F - budget)).

    F is the cost after the last step.

    Args:
        rate (float): Step size in units of the loss per share of FLOPs.
        multiplier (float): Current lambda.
        excess (float): F - budget.
    """
    rate: float
    multiplier: float = 0.
    excess: float = 0.

    def __call__(self, spent: Callable[[Tensor], Tensor], budget: Tensor,
                 scale: Tensor, guess: Tensor, **_: int) -> Tensor:
        self.multiplier = max(0., self.multiplier + self.rate * self.excess)
        found = torch.full_like(scale, self.multiplier)
        self.excess = float(spent(found) - budget)
        return found


@dataclasses.dataclass
class ProportionalIntegral:
    """PI controller: lambda = scale max(0, proportional e + integral sum e).

    e is the cost minus the budget. ``scale``, the order of magnitude of the
    gains over that of the prices, makes the controller independent of the
    units of loss and cost. The sum stays above zero, so that a budget met
    early gives no credit for later.

    Args:
        proportional (float): Gain of the current error.
        integral (float): Gain of the sum of errors.
        total (float): Sum of errors.
        excess (float): Current error.
    """
    proportional: float
    integral: float
    total: float = 0.
    excess: float = 0.

    def __call__(self, spent: Callable[[Tensor], Tensor], budget: Tensor,
                 scale: Tensor, guess: Tensor, **_: int) -> Tensor:
        self.total = max(0., self.total + self.excess)
        multiplier = scale * max(
            0., self.proportional * self.excess + self.integral * self.total)
        self.excess = float(spent(multiplier) - budget)
        return multiplier


# The first pair of gains is the best of eleven on 200 iterations of one model.
CONTROLLERS: dict[str, Callable[[], Controller]] = {
    'dual ascent, rate 0.05': lambda: DualAscent(0.05),
    'dual ascent, rate 0.2': lambda: DualAscent(0.2),
    'proportional 3, integral 0.02': lambda: ProportionalIntegral(3, 0.02),
    'proportional 1, integral 0.1': lambda: ProportionalIntegral(1, 0.1),
    'exact solve': lambda: gdp.solve_multiplier,
}


def main() -> None:
    """Train each run with each controller, and write the report."""
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
    # A controller should not depend on the unit of the loss.
    parser.add_argument(
        '--loss-weights', nargs='+', type=float, default=[1., 10.])
    args = parser.parse_args()
    report = dict(
        title='Three controllers of the multiplier', runs=[], **conditions())
    for name, seed, weight, iterations, target in itertools.product(
            args.models, args.seeds, args.loss_weights, args.iterations,
            args.targets):
        run = Run(name, target, iterations, seed, weight)
        for controller, build in CONTROLLERS.items():
            with mock.patch.object(gdp, 'solve_multiplier', build()):
                report['runs'].append(
                    train_once(run, args.work_dir, controller))
            write_json(args.report, report)


if __name__ == '__main__':
    main()
