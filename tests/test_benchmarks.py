"""The benchmarks run on the package as it is."""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip('mmseg')

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / 'benchmarks'


@pytest.mark.parametrize('name, options', [
    ('budget', ['--models', 'SegFormer', '--targets', '0.3', '0.6']),
    ('controllers', ['--models', 'DeepLabV3Plus-ResNet18', '--targets', '0.6'
                     ]),
])
def test_budget_is_measured_run_by_run(name: str, options: list[str],
                                       tmp_path: Path) -> None:
    report = tmp_path / 'report.json'
    subprocess.run([
        sys.executable, '-W', 'ignore', BENCHMARKS / f'{name}.py', *options,
        '--iterations', '8', '--work-dir', tmp_path, '--report', report
    ],
                   check=True,
                   capture_output=True)
    runs = json.loads(report.read_text())['runs']
    # SegFormer cannot be pruned to 0.3.
    assert runs and all(one['run']['target'] == 0.6 for one in runs)
    assert all(0 < one['flops'] <= 1 and one['loss'] > 0 for one in runs)


def test_reports_of_the_repository_become_the_results_page(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import results
    reports = sorted((ROOT / 'docs' / 'reports').glob('*.json'))
    page, readme = tmp_path / 'results.md', tmp_path / 'README.md'
    readme.write_bytes((ROOT / 'README.md').read_bytes())
    monkeypatch.setattr(results, 'RESULTS', page)
    monkeypatch.setattr(results, 'README', readme)
    monkeypatch.setattr(sys, 'argv', ['results.py', *map(str, reports)])
    results.main()
    assert page.read_text() == (ROOT / 'docs' / 'results.md').read_text()
    assert readme.read_text() == (ROOT / 'README.md').read_text()


def test_page_on_reliability_has_the_figures_of_its_report(
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import faults
    report = json.loads((ROOT / 'docs/reports/faults.json').read_text())
    assert len(report['trainings']) == len(report['exports']) == 25
    page = (ROOT / 'docs/reliability.md').read_text()
    assert faults.markdown(report) in page


def test_page_on_reliability_has_the_figures_of_two_processes(
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import processes
    report = json.loads((ROOT / 'docs/reports/processes.json').read_text())
    page = (ROOT / 'docs/reliability.md').read_text()
    assert processes.markdown(report) in page


def test_training_that_is_killed_ends_as_the_one_that_is_not(
        tmp_path: Path) -> None:
    report = tmp_path / 'report.json'
    subprocess.run([
        sys.executable, '-W', 'ignore', BENCHMARKS / 'faults.py', '--kills',
        '1', '--seed', '1', '--report', report
    ],
                   check=True,
                   capture_output=True)
    written = json.loads(report.read_text())
    training, = written['trainings']
    assert all(training[key] for key in training if key != 'ends')
    assert any(end['killed'] for end in training['ends'])
    assert written['exports'][0]['left'] in ('nothing', 'complete')
    assert written['left_by_killed_exports'] == 0
