"""Write a network as ONNX, checked in ONNX Runtime against PyTorch."""
from __future__ import annotations

import argparse
from pathlib import Path

from .checks import add_cfg_options, load_config, verify_checkpoint
from .errors import fail, one_line_errors


def parse_args() -> argparse.Namespace:
    """Parse the flags of the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='exported config, or one without gates')
    parser.add_argument('checkpoint', help='checkpoint of that config')
    parser.add_argument(
        '--out',
        type=Path,
        help='file to write; by default the path of the checkpoint with the '
        'suffix .onnx')
    add_onnx_flags(parser)
    parser.add_argument(
        '--size',
        type=int,
        nargs=2,
        metavar=('HEIGHT', 'WIDTH'),
        help='size of the input; by default that of the data preprocessor, or '
        'else of the first test image')
    add_cfg_options(parser)
    return parser.parse_args()


def add_onnx_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that ``export`` has too."""
    parser.add_argument(
        '--dynamic',
        action='store_true',
        help='ONNX input of any batch, height and width')
    parser.add_argument(
        '--argmax',
        action='store_true',
        help='ONNX output is the class of each pixel instead of the logits')


@one_line_errors()
def main() -> None:
    """Export a network to ONNX and print how well it was reproduced."""
    args = parse_args()
    cfg = load_config(args.config, args.cfg_options)
    verify_checkpoint(args.checkpoint, cfg)
    out = args.out or Path(args.checkpoint).with_suffix('.onnx')
    if out.exists():
        fail(f'--out: expected a new file, but {out} exists; choose another, '
             'or remove it')
    # Slow to import, and not needed for the errors above.
    from ..export.deploy import export_onnx
    written = export_onnx(cfg, args.checkpoint, out, args.dynamic, args.argmax,
                          args.size)
    print(written.sentence())
    print(f'wrote {out}')


if __name__ == '__main__':
    main()
