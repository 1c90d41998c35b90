"""Export a gated checkpoint as a pruned network and verify its outputs."""
from __future__ import annotations

import argparse
from pathlib import Path

from .checks import add_cfg_options, check_checkpoint, load_config
from .data_checks import check_paths
from .errors import one_line_errors
from .onnx import add_onnx_flags


def parse_args() -> argparse.Namespace:
    """Parse the flags of an export."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config of the gated training')
    parser.add_argument('checkpoint', help='checkpoint of that training')
    parser.add_argument(
        '--out-dir',
        required=True,
        help='new or empty folder for the pruned config and checkpoint, '
        'report.json, report.md and gates.png')
    parser.add_argument(
        '--no-eval', action='store_true', help='do not evaluate the networks')
    parser.add_argument(
        '--dense',
        metavar='CHECKPOINT',
        help='checkpoint of the same model, trained without gates: it is '
        'evaluated too, for the comparison in the report')
    parser.add_argument(
        '--onnx',
        action='store_true',
        help='also write an ONNX file, and measure the latency in all '
        'installed runtimes')
    add_onnx_flags(parser)
    add_cfg_options(parser)
    args = parser.parse_args()
    if not args.onnx and (args.dynamic or args.argmax):
        parser.error('expected --onnx with --dynamic and --argmax, but got '
                     'no --onnx; add it')
    return args


@one_line_errors()
def main() -> None:
    """Export a checkpoint and print a table of the networks."""
    args = parse_args()
    cfg = load_config(args.config, args.cfg_options)
    for checkpoint in filter(None, (args.checkpoint, args.dense)):
        check_checkpoint(checkpoint)
    if not args.no_eval:
        check_paths(cfg, ['test'])
    # Slow to import, and not needed for the errors above.
    from ..export.export import export
    from ..report.tables import comparison
    report = export(
        cfg,
        args.checkpoint,
        args.out_dir,
        Path(args.config).stem,
        not args.no_eval,
        dense_checkpoint=args.dense,
        onnx=dict(dynamic=args.dynamic, argmax=args.argmax)
        if args.onnx else None)
    print(comparison(report))
    print(f'wrote {args.out_dir}')


if __name__ == '__main__':
    main()
