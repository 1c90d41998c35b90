"""Networks, projects and programs that several test modules share."""
from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / 'tools'
BENCHMARKS = ROOT / 'benchmarks'
HELPERS = ROOT / 'tests' / 'helpers'
# A process that a test starts imports the package and the helpers from here.
PYTHONPATH = ':'.join(map(str, (ROOT, ROOT / 'tests', BENCHMARKS, TOOLS)))
