"""Write the pruned form of a trained, gated checkpoint, and prove it."""
from __future__ import annotations

import argparse
from pathlib import Path

from mmengine.config import DictAction

from _cli import check_checkpoint, check_paths, load_config, one_line_errors


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config of the gated training')
    parser.add_argument('checkpoint', help='checkpoint that it saved')
    parser.add_argument(
        '--out-dir',
        required=True,
        help='new or empty folder for the pruned config and checkpoint, '
        'report.json, report.md and gates.png')
    parser.add_argument(
        '--no-eval',
        action='store_true',
        help='do not run the test loop on the gated and the pruned network')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        help='override settings of the config, as key=value')
    return parser.parse_args()


@one_line_errors()
def main() -> None:
    args = parse_args()
    cfg = load_config(args.config, args.cfg_options)
    check_checkpoint(args.checkpoint)
    if not args.no_eval:
        check_paths(cfg, ['test'])
    # Slow to import, and not needed for the errors above.
    from gdp_mmseg.export.export import export
    from gdp_mmseg.report.tables import comparison
    report = export(cfg, args.checkpoint, args.out_dir,
                    Path(args.config).stem, not args.no_eval)
    print(comparison(report))
    print(f'wrote {args.out_dir}')


if __name__ == '__main__':
    main()
