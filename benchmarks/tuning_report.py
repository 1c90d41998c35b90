"""Section on the changes to a training that were tried before a comparison."""
from __future__ import annotations

from typing import Any

from gdp_mmseg.report.tables import table

from accuracy_report import mean_and_spread
from accuracy_variants import CHANGES

Report = dict[str, Any]


def tuning(report: Report) -> list[str]:
    """Return a table of changes, and its conditions."""
    changed = [row['method'].partition('+') for row in report['rows']]
    tried = sorted(
        {changes
         for base, _, changes in changed if base in ('dense', 'gdp')})
    rows = [[
        ', '.join(CHANGES[name].label for name in changes.split('+') if name)
        or 'none', *(_scores(report, f'{base}+{changes}'.rstrip('+'))
                     for base in ('dense', 'gdp'))
    ] for changes in tried]
    return [
        table([['change to the training', 'dense', 'GDP at 0.4'], *rows]), '',
        f'- {report["metric"]} after {report["iterations"]} iterations from a '
        f'dense network of {report["start"]}; one seed where no spread is '
        'given. These scores chose the learning rate of later comparisons.',
        f'- Training: {report["train"]}. Evaluation: {report["test"]}.',
        f'- {report["optimizer"]}, unless the row says otherwise.'
    ]


def _scores(report: Report, method: str) -> str:
    """Return the mean and spread of a method's scores, if it has any."""
    scores = [
        row['score'] for row in report['rows'] if row['method'] == method
    ]
    return mean_and_spread(scores) if scores else '-'
