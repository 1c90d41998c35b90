"""Target and FLOPs reached, on several models and lengths of training.

Trains small models with gates for each target and number of iterations, and
writes a report after each run. ``benchmarks/results.py`` makes a table of it.
Finished runs are not repeated.

    OMP_NUM_THREADS=1 python benchmarks/budget.py \
        --report docs/reports/budget.json
"""
from __future__ import annotations

import argparse
from pathlib import Path

from gdp_mmseg.files import write_json

from small_models import (MODELS, Run, add_gate_option, conditions,
                          least_flops, train_once)

TARGETS = [0.2, 0.3, 0.4, 0.5, 0.7]


def main() -> None:
    """Train all runs that the gates can serve, and write the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('--report', type=Path, required=True)
    parser.add_argument(
        '--work-dir', type=Path, default=Path('work_dirs/budget'))
    parser.add_argument('--models', nargs='+', default=list(MODELS))
    parser.add_argument('--targets', nargs='+', type=float, default=TARGETS)
    parser.add_argument(
        '--iterations', nargs='+', type=int, default=[500, 2000])
    parser.add_argument(
        '--long-targets',
        nargs='+',
        type=float,
        help='targets of all but the first number of iterations (default: '
        'all targets)')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument(
        '--multiple',
        type=int,
        default=1,
        help='number of which all widths are to be multiples (default: 1)')
    add_gate_option(parser)
    args = parser.parse_args()
    least = {name: least_flops(name, args.gate) for name in args.models}
    report = dict(
        title='Budget: target and FLOPs reached' +
        (f', widths in multiples of {args.multiple}' if args.multiple > 1 else
         '') + (f', gate {args.gate}' if args.gate != 'gdp' else ''),
        least_flops=least,
        targets=sorted(args.targets),
        multiple=args.multiple,
        gate=args.gate,
        runs=[],
        **conditions())
    for iterations in args.iterations:
        first = iterations == args.iterations[0]
        for target in (args.targets
                       if first else args.long_targets or args.targets):
            for name in args.models:
                if target > least[name]:
                    run = Run(
                        name,
                        target,
                        iterations,
                        args.seed,
                        multiple=args.multiple,
                        gate=args.gate)
                    report['runs'].append(train_once(run, args.work_dir))
                    write_json(args.report, report)


if __name__ == '__main__':
    main()
