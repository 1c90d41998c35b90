"""The examples run without any mm package and print what they promise."""
from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import ROOT

# Runs a script as if no mm package were installed.
WITHOUT_MM = '''
import runpy, sys


class Absent:
    """Finder that refuses the mm packages."""

    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('mmcv', 'mmengine', 'mmpretrain', 'mmseg'):
            raise ModuleNotFoundError(f'No module named {name!r}', name=name)


sys.meta_path.insert(0, Absent())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
'''


def run(example: str, folder: Path, *arguments: str) -> str:
    outcome = subprocess.run([
        sys.executable, '-W', 'ignore', '-c', WITHOUT_MM,
        str(ROOT / 'examples' / example), *arguments
    ],
                             cwd=folder,
                             env=dict(
                                 PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1'),
                             capture_output=True,
                             text=True)
    assert outcome.returncode == 0, outcome.stderr
    return outcome.stdout


def test_plain_pytorch(tmp_path: Path) -> None:
    said = run('plain_pytorch.py', tmp_path, '--steps', '24')
    assert re.search(r'FLOPs: .* G \((39|40)\.\d%\) at 1 x 3 x 64 x 64', said)
    gated, pruned, loaded = re.findall(r'\w+ (0\.\d{4})', said)
    assert gated == pruned == loaded
    assert (tmp_path / 'unet_pruned.pt').is_file()


def test_torchvision_deeplabv3(tmp_path: Path) -> None:
    pytest.importorskip('torchvision')
    said = run('torchvision_deeplabv3.py', tmp_path, '--steps', '16')
    assert re.search(r'FLOPs: .* G \(5\d\.\d%\) at 1 x 3 x 96 x 96', said)
    difference = re.search(r'outputs differ by (\S+)', said)
    assert difference and float(difference[1]) < 1e-5


def test_user_code_of_the_plain_example_is_short() -> None:
    """The part of a user: from the model with gates to the loaded copy."""
    text = (ROOT / 'examples' / 'plain_pytorch.py').read_text()
    part = text[text.index('    model = UNet()'):text.index("if __name__")]
    code = [
        line for line in part.splitlines()
        if line.strip() and not line.strip().startswith('#')
    ]
    assert len(code) <= 40
