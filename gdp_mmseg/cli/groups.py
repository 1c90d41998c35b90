"""Groups of channels of a config's model, and channels without a gate."""
from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checks import add_cfg_options, load_config
from .errors import one_line_errors

if TYPE_CHECKING:
    from ..engine.config import ModelConfig


def parse_args() -> argparse.Namespace:
    """Parse the flags of the command."""
    parser = argparse.ArgumentParser(
        description='Show which channels of a model can be pruned, before a '
        'training.')
    parser.add_argument('config', help='config, with GDPModel or without')
    parser.add_argument(
        '--gate',
        help='gate method, e.g. scp, which has no gates for some channels '
        '(default: that of the config)')
    parser.add_argument('--json', help='file that gets the groups as JSON')
    add_cfg_options(parser)
    return parser.parse_args()


def describe(config: ModelConfig, gate: str | None = None) -> dict[str, Any]:
    """Return the groups of a model as plain types.

    Args:
        config (ModelConfig): Config of the model.
        gate (str, optional): Gate method. Defaults to that of the config.

    Returns:
        dict[str, Any]: ``input_shape`` ``(C, H, W)``; ``macs``, the dense
        multiply-adds at that size; ``gates``, their number; ``groups`` and
        ``frozen``, one mapping each; ``fixed_flops_share``, which adds up to
        1 with ``flops_share`` of all groups.
    """
    from ..cost.counts import FlopCost
    from ..engine.model import analyse_config
    analysis = analyse_config(config, gate)
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
        fixed_flops_share=cost.fixed_share(),
        frozen=[
            dict(
                reason=frozen.reason,
                writers=list(frozen.writers),
                channels=frozen.channels) for frozen in analysis.frozen
        ])


def show(found: dict[str, Any]) -> None:
    """Print tables of the groups and of the channels without a gate."""
    from ..report.tables import table
    shape = ' x '.join(map(str, found['input_shape']))
    print(f'{found["gates"]} gates in {len(found["groups"])} groups; '
          f'{found["macs"] / 1e9:.2f} G multiply-adds at {shape}\n')
    groups, fixed = found['groups'], found['fixed_flops_share']
    rows = [['written by', 'read by', 'channels', 'FLOPs']]
    rows += [[
        _short(group['writers']),
        _short(group['readers']),
        str(group['channels']), f'{group["flops_share"]:.1%}'
    ] for group in groups]
    whole = fixed + sum(group['flops_share'] for group in groups)
    channels = sum(group['channels'] for group in groups)
    rows += [['no gate on either side', '', '', f'{fixed:.1%}'],
             ['total', '', str(channels), f'{whole:.1%}']]
    print(table(rows))
    print(
        '\nFLOPs: share of all FLOPs; a layer between two groups counts half '
        'for each, and\na layer with gates on one side counts for that group '
        'alone.\n\nChannels without a gate:\n')
    rows = [['written by', 'reason', 'channels']]
    rows += [[_short(row['writers']), row['reason'],
              str(row['channels'])] for row in found['frozen']]
    print(table(rows))


def _short(modules: list[str]) -> str:
    """Return the first of a list of modules and the number of the others."""
    first, *rest = modules or ['']
    return f'{first} and {len(rest)} more' if rest else first


@one_line_errors()
def main() -> None:
    """Print the groups of a config's model; write them with ``--json``."""
    args = parse_args()
    cfg = load_config(args.config, args.cfg_options)
    from mmengine.registry import init_default_scope

    from ..engine.config import ModelConfig
    from ..files import write_json
    init_default_scope(cfg.get('default_scope') or 'mmseg')
    found = describe(ModelConfig.of(cfg), args.gate)
    show(found)
    if args.json:
        write_json(Path(args.json), found)


if __name__ == '__main__':
    main()
