"""Run ``benchmarks/faults.py`` with trainings of a third of their length."""
from __future__ import annotations

import dataclasses

import faults


def main() -> None:
    faults.ITERATIONS //= 3
    faults.RUN = dataclasses.replace(faults.RUN, iterations=faults.ITERATIONS)
    faults.main()


if __name__ == '__main__':
    main()
