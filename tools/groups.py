"""Show which channels of a config's model can be pruned, before training."""
from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Mapping

from mmengine.config import DictAction

from _cli import load_config, one_line_errors


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='a config, with GDPModel or without')
    parser.add_argument('--json', help='write the groups to this file too')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        help='override settings of the config, as key=value')
    return parser.parse_args()


def describe(model: Mapping[str, Any]) -> dict[str, Any]:
    """Groups of a model config, as plain types."""
    from gdp_mmseg.cost.counts import FlopCost
    from gdp_mmseg.engine.model import analyse_config
    analysis = analyse_config(model)
    cost = FlopCost(analysis)
    return dict(
        input_shape=list(analysis.input_shape),
        macs=cost.dense,
        gates=analysis.num_gates,
        groups=[
            dict(
                writers=list(group.writers),
                readers=list(group.readers),
                channels=len(group.gates),
                flops_share=share)
            for group, share in zip(analysis.groups,
                                    cost.group_shares().tolist())
        ],
        frozen=[
            dict(
                reason=frozen.reason,
                writers=list(frozen.writers),
                channels=frozen.channels) for frozen in analysis.frozen
        ])


def show(found: dict[str, Any]) -> None:
    """Print the groups, then what is frozen, as tables."""
    from gdp_mmseg.report.tables import table
    shape = ' x '.join(map(str, found['input_shape']))
    print(f'{found["gates"]} gates in {len(found["groups"])} groups; '
          f'{found["macs"] / 1e9:.2f} G multiply-adds at {shape}\n')
    rows = [['written by', 'read by', 'channels', 'FLOPs']]
    rows += [[
        ', '.join(group['writers']), ', '.join(group['readers']),
        str(group['channels']), f'{group["flops_share"]:.1%}'
    ] for group in found['groups']]
    print(_narrow(rows, table))
    print('\nFLOPs: the share that would go with this group alone; '
          'neighbours share layers.\n\nWithout a gate:\n')
    rows = [['written by', 'reason', 'channels']]
    rows += [[', '.join(row['writers']), row['reason'],
              str(row['channels'])] for row in found['frozen']]
    print(_narrow(rows, table))


def _narrow(rows: list[list[str]], table: Any) -> str:
    """A table with long lists of modules cut; --json has them whole."""

    def cut(cell: str) -> str:
        first, *rest = cell.split(', ')
        return f'{first} and {len(rest)} more' if rest else first

    return table([[cut(cell) for cell in row] for row in rows])


@one_line_errors()
def main() -> None:
    args = parse_args()
    cfg = load_config(args.config, args.cfg_options)
    from mmengine.registry import init_default_scope

    from gdp_mmseg.engine.config import model_config
    from gdp_mmseg.files import write_json
    init_default_scope(cfg.get('default_scope') or 'mmseg')
    found = describe(model_config(cfg))
    show(found)
    if args.json:
        write_json(Path(args.json), found)


if __name__ == '__main__':
    main()
