"""Odd projects drawn at random, each trained, exported and fine-tuned.

    OMP_NUM_THREADS=1 python benchmarks/odd_projects.py --number 200 \
        --seed 0 --report docs/reports/odd_projects.json

Writes the report and, from it, the figures in ``docs/reliability.md``. A
project takes about five seconds on one core. Seeds that the report has are
skipped, so a run that was interrupted can be continued.
"""
from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import platform
import re
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
# The projects are also drawn in the tests.
sys.path.insert(1, str(ROOT / 'tests'))

from gdp_mmseg.files import write_json  # noqa: E402
from gdp_mmseg.report.tables import table  # noqa: E402

from helpers.odd_check import check  # noqa: E402
from helpers.odd_projects import ITERATIONS, PROPERTIES, draw  # noqa: E402
from pages import put_between  # noqa: E402

PAGE = ROOT / 'docs' / 'reliability.md'
# mmengine keeps loggers and log files of each training until a process ends.
_PROJECTS_OF_A_PROCESS = 20


def run(seed: int) -> dict[str, Any]:
    """Draw and check the project of a seed; return its row of the report."""
    warnings.simplefilter('ignore')
    torch.set_num_threads(1)
    project = draw(seed)
    with tempfile.TemporaryDirectory() as folder:
        outcome = check(project, Path(folder))
    # Names of temporary folders would differ in each run.
    message = outcome.message.replace(str(folder), 'FOLDER')
    return dict(
        dataclasses.asdict(outcome),
        message=message,
        properties=sorted(project.properties))


def add_missing(path: Path, seeds: range) -> dict[str, Any]:
    """Run the seeds that a report lacks; write it after each of them."""
    rows = json.loads(path.read_text())['projects'] if path.exists() else []
    left = [
        seed for seed in seeds if seed not in {row['seed']
                                               for row in rows}
    ]
    report = dict(
        machine=f'{platform.machine()}, 1 of {os.cpu_count()} CPU cores',
        torch=torch.__version__,
        iterations=ITERATIONS,
        num_properties=len(PROPERTIES),
        projects=rows)
    # A fork shares what is imported.
    context = multiprocessing.get_context('fork')
    with context.Pool(1, maxtasksperchild=_PROJECTS_OF_A_PROCESS) as pool:
        for row in pool.imap(run, left):
            print(json.dumps(row), flush=True)
            rows.append(row)
            rows.sort(key=lambda one: one['seed'])
            write_json(path, report)
    return report


def cause(row: dict[str, Any]) -> str:
    """Return the message of a row without what differs between projects."""
    message = re.sub(r'\d+(\.\d+)?(e-?\d+)?', 'N', row['message'])
    message = message.partition(': ')[2].partition(';')[0]
    return f'{row["kind"]}: {message}' if row['kind'] else message


def markdown(report: dict[str, Any]) -> str:
    """Return the section of the page."""
    rows = report['projects']
    results = Counter(row['result'] for row in rows)
    each = [len(row['properties']) for row in rows]
    lines = [
        f'{len(rows)} small projects, each drawn at random with {min(each)} '
        f'to {max(each)} of {report["num_properties"]} odd properties: heads '
        'that run only in the loss, code that reads features only in a '
        'prediction, computed kernels, forwards with state or random numbers, '
        'teachers, shared modules, own classes, other inputs and outputs. '
        f'{results["trained"]} of them are trained for '
        f'{report["iterations"]} iterations and exported; the exported files '
        'predict what the gated network predicts, have the FLOPs of the '
        'report by the counter of torch, and can be fine-tuned from the '
        f'exported weights. {results["refused"]} are refused before the first '
        f'iteration, and {results["failed"]} fail.'
    ]
    for result, title in (('refused', 'reason of a refusal'), ('failed',
                                                               'failure')):
        causes = Counter(cause(row) for row in rows if row['result'] == result)
        if causes:
            lines += [
                '',
                table([[title, 'projects'],
                       *([text, str(number)]
                         for text, number in causes.most_common())])
            ]
    return '\n'.join([
        *lines, '', f'{report["machine"]}, torch {report["torch"]}. Report: '
        '`reports/odd_projects.json`, by `python benchmarks/odd_projects.py '
        f'--number {rows[-1]["seed"] - rows[0]["seed"] + 1} '
        f'--seed {rows[0]["seed"]} --report '
        'docs/reports/odd_projects.json`.'
    ])


def main() -> None:
    """Run projects, write the report and, from it, the section of the page.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('--report', type=Path, required=True)
    parser.add_argument(
        '--number', type=int, default=200, help='number of projects')
    parser.add_argument('--seed', type=int, default=0, help='the first seed')
    args = parser.parse_args()
    args.report.parent.mkdir(parents=True, exist_ok=True)
    report = add_missing(args.report, range(args.seed,
                                            args.seed + args.number))
    print(markdown(report))
    if args.report.resolve() == ROOT / 'docs/reports/odd_projects.json':
        put_between(PAGE, 'odd', markdown(report))


if __name__ == '__main__':
    main()
