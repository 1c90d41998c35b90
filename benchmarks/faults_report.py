"""Section of docs/reliability.md on killed trainings and exports."""
from __future__ import annotations

from collections import Counter
from typing import Any

from gdp_mmseg.report.tables import table


def markdown(report: dict[str, Any]) -> str:
    """Return the section of the page."""
    trainings, exports = report['trainings'], report['exports']
    checks = [key for key in trainings[0] if key != 'ends']
    ends = [end for one in trainings for end in one['ends'] if end['killed']]
    right = sum(all(one[key] for key in checks) for one in trainings)
    kept = sum(one['left'] != 'half a result' for one in exports)
    if (gate := report.get('gate', 'gdp')) != 'gdp':
        return (f'With `gate={gate!r}`, {right} of {len(trainings)} killed '
                f'trainings end like the uninterrupted one. Report: '
                f'`reports/faults_{gate}.json`.')
    cells = [['moment of the kill', 'warm-up', 'pruning', 'settling']]
    for when, what in (('running', 'any time of an iteration'),
                       ('saving', 'writing a checkpoint'),
                       ('pointing', 'writing `last_checkpoint`')):
        phases = Counter(end['phase'] for end in ends if end['when'] == when)
        cells.append([
            what, *(str(phases[phase])
                    for phase in ('warmup', 'pruning', 'settling'))
        ])
    lefts = Counter(one['left'] for one in exports)
    return '\n'.join([
        f'{right} of {len(trainings)} killed trainings end, after a resume, '
        'bit for bit like the uninterrupted training: gates, weights, '
        'optimizer, random numbers, the loss of every iteration and '
        '`gates.jsonl` are equal. Closed channels leave the training at '
        f'{report["narrowed"]} of its iterations. The {len(ends)} kills by '
        'phase:', '',
        table(cells), '',
        f'{kept} of {len(exports)} killed exports leave nothing '
        f'({lefts["nothing"]}) or a complete result ({lefts["complete"]}) '
        'that loads and has the right checksum. They were killed at any time, '
        'while they wrote a file, or right after they renamed one. The next '
        'export that was not killed removed their temporary folders; '
        f'{report["left_by_killed_exports"]} were left.', '',
        f'{report["model"]}, {report["iterations"]} iterations of batch '
        f'{report["batch_size"]} with dropout, random flips and colours, a '
        f'checkpoint every {report["saved_every"]} iterations '
        '(`max_keep_ckpts=1`), validation every '
        f'{2 * report["saved_every"]}; SIGKILL, seed {report["seed"]}. '
        f'{report["machine"]}, torch {report["torch"]}. '
        'Report: `reports/faults.json`, by `python benchmarks/faults.py '
        '--report docs/reports/faults.json`.'
    ])
