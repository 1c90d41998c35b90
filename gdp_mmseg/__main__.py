"""Commands of the package: ``gdp-mmseg COMMAND`` and ``python -m gdp_mmseg``.

A command is imported when it is called, so that the list of all is shown at
once.
"""
from __future__ import annotations

import argparse
import pkgutil
import sys

from .cli.errors import fail_unknown
from .version import __version__

# The function of each command, and what it does.
COMMANDS = dict(
    groups=('gdp_mmseg.cli.groups:main',
            'show which channels can be pruned, which cannot, and why'),
    check=('gdp_mmseg.cli.check:main',
           'prune half of a model at random and compare the outputs'),
    train=('gdp_mmseg.cli.train:main', 'train the model of a config'),
    export=('gdp_mmseg.cli.export:main',
            'write the pruned network of a gated checkpoint, and a report'),
    onnx=('gdp_mmseg.cli.onnx:main',
          'write a pruned network as ONNX, checked in ONNX Runtime'),
    test=('gdp_mmseg.cli.test:main', 'evaluate a checkpoint'),
    demo=('gdp_mmseg.demo.demo:main',
          'train, export and compare on drawn shapes, about 7 minutes on a '
          'CPU'))


def make_parser(program: str) -> argparse.ArgumentParser:
    """Make the parser of what stands before a command: help and version.

    Args:
        program (str): Name by which the package was called.
    """
    width = max(map(len, COMMANDS)) + 2
    parser = argparse.ArgumentParser(
        prog=program,
        usage='%(prog)s [-h] [--version] COMMAND ...',
        description='Channel pruning for mmsegmentation by gates.',
        epilog='commands:\n' +
        '\n'.join(f'  {name:{width}}{text}'
                  for name, (_, text) in COMMANDS.items()) +
        f'\n\n{program} COMMAND --help shows the flags of a command.',
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--version', action='version', version=__version__)
    return parser


def main(program: str = 'gdp-mmseg') -> None:
    """Run the command that the command line names.

    Args:
        program (str): Name by which the package was called, for messages.
    """
    name, *arguments = sys.argv[1:] or ['']
    if name.startswith('-'):
        make_parser(program).parse_args([name, *arguments])
    # What argparse and our errors take for the name of the program.
    sys.argv = [f'{program} {name}' if name in COMMANDS else program]
    if name not in COMMANDS:
        fail_unknown('a command', name, COMMANDS)
    sys.argv += arguments
    pkgutil.resolve_name(COMMANDS[name][0])()


if __name__ == '__main__':
    main('python -m gdp_mmseg')
