"""The benchmarks run on the package as it is."""
from __future__ import annotations

import io
import json
import logging
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip('mmseg')

import torch
from torch import nn

from helpers import BENCHMARKS, HELPERS, ROOT
from helpers.project import run_program
from helpers.toys import Net


@pytest.mark.parametrize('name, options', [
    ('budget',
     ['--models', 'SegFormer', '--targets', '0.3', '0.6', '--multiple', '4']),
    ('controllers', [
        '--models', 'DeepLabV3Plus-ResNet18', '--targets', '0.6', '--seeds',
        '1', '--loss-weights', '10'
    ]),
])
def test_budget_is_measured_run_by_run(name: str, options: list[str],
                                       tmp_path: Path) -> None:
    report = tmp_path / 'report.json'
    run_program(
        BENCHMARKS / f'{name}.py',
        *options,
        '--iterations',
        16,
        '--work-dir',
        tmp_path,
        '--report',
        report,
        cwd=tmp_path)
    runs = json.loads(report.read_text())['runs']
    # SegFormer cannot be pruned to 0.3.
    assert runs and all(one['run']['target'] == 0.6 for one in runs)
    assert all(0 < one['flops'] <= 1 and one['loss'] > 0 for one in runs)
    assert not any(one['other_widths'] for one in runs)


def test_reports_of_the_repository_become_the_results_page(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import results
    reports = sorted((ROOT / 'docs' / 'reports').glob('*.json'))
    page, readme = tmp_path / 'results.md', tmp_path / 'README.md'
    guide = tmp_path / 'guide.md'
    readme.write_bytes((ROOT / 'README.md').read_bytes())
    guide.write_bytes((ROOT / 'docs' / 'guide.md').read_bytes())
    monkeypatch.setattr(results, 'RESULTS', page)
    monkeypatch.setattr(results, 'README', readme)
    monkeypatch.setattr(results, 'GUIDE', guide)
    for plot in ('plot_accuracy', 'plot_overview'):
        monkeypatch.setattr(results, plot, lambda *_: None)
    monkeypatch.setattr(sys, 'argv', ['results.py', *map(str, reports)])
    results.main()
    assert page.read_text() == (ROOT / 'docs' / 'results.md').read_text()
    assert readme.read_text() == (ROOT / 'README.md').read_text()
    assert guide.read_text() == (ROOT / 'docs' / 'guide.md').read_text()


def test_guide_stays_as_it_is_without_all_reports(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import results
    guide = tmp_path / 'guide.md'
    guide.write_text('<!-- budget -->\nold\n<!-- /budget -->\n')
    monkeypatch.setattr(results, 'GUIDE', guide)
    results.show_guide(
        results.read([ROOT / 'docs' / 'reports' / 'budget.json'])['budget'])
    assert 'old' in guide.read_text()


def _row(method: str, score: float, seed: int, target: float = 0.4) -> dict:
    return dict(
        method=method,
        target=target,
        seed=seed,
        score=score,
        macs=target,
        minutes=2.,
        score_gated=score,
        half_open=0.001,
        start_score=None if method == 'start' else 50.)


def _report(*rows: dict, **changed: Any) -> dict:
    return dict(
        dict(
            title='M on D: all',
            file='accuracy_voc_8',
            data='voc',
            metric='mIoU',
            weights='none',
            weights_sha256='0' * 64,
            machine='here',
            torch='2.0',
            torch_pruning='1.6',
            start=30,
            iterations=8,
            batch_size=2,
            crop=[9, 9],
            optimizer='SGD',
            precision='float32',
            phases=[0.1, 0.6, 0.3],
            train='',
            test='',
            rows=list(rows)), **changed)


def _cells(text: str) -> list[list[str]]:
    """Cells of the tables in a text, without the lines below their heads."""
    return [[cell.strip() for cell in line.split('|')[1:-1]]
            for line in text.splitlines()
            if line.startswith('|') and not line.startswith('|:')]


def test_accuracy_of_several_seeds_becomes_a_table_and_a_plot(
        tmp_path: Path) -> None:
    import results
    report = _report(
        _row('start', 50., 0, 1.), _row('dense', 60., 0, 1.),
        _row('dense', 64., 1, 1.), _row('gdp', 58., 0), _row('gdp', 61., 1),
        _row('scp', 57., 0), dict(_row('l1', 55., 0, 0.25), start_score=51.),
        dict(method='l1', target=0.4, seed=0, score=None, start_score=50.))
    section = results.accuracy(report)
    facts = '\n'.join(section.facts)
    assert section.title == 'M on D, 8 iterations, phases 0.1, 0.6, 0.3'
    assert _cells(section.body[0]) == [
        ['training', 'FLOPs', 'mIoU', 'minus dense (95 % interval; pairs)'],
        ['dense', '1', '62.00 ± 2.83 (2)', '-'],
        ['GDP', '0.4', '59.50 ± 2.12 (2)', '-2.50 (-8.85 to +3.85; 2)'],
        ['SCP', '0.4', '57.00 (1)', '-3.00 (1)'],
        ['L1 norm', '0.4', 'out of reach', '-'],
        # It started from another network than the dense one.
        ['L1 norm', '0.25', '55.00 (1)', '-'],
    ]
    assert ('(none), mIoU 50.00; `l1-0.25-0` started from another training '
            'of it: 51.00.') in facts
    assert '--methods dense gdp l1 scp --targets 0.25 0.4`' in facts
    assert ('all 3 trainings with gates: FLOPs 0.0 points from the target '
            '(0.0 with the') in results.checks([report])
    results.plot_accuracy(report, tmp_path)
    results.plot_overview([report], tmp_path)
    for name in ('accuracy_voc_8', 'accuracy_overview'):
        assert (tmp_path / f'{name}.png').stat().st_size > 1000


def test_differences_are_those_of_pairs_with_their_interval() -> None:
    from accuracy_scores import differences, mean_and_interval
    report = _report(
        *(_row('dense', 60. + seed, seed, 1.) for seed in range(4)),
        *(_row('gdp', 59. + seed - gap, seed)
          for seed, gap in enumerate([0., 1., 2.])),
        # Another start: no pair.
        dict(_row('gdp', 40., 3), start_score=49.))
    gaps = differences(report, 'gdp', 0.4)
    assert gaps == [-1., -2., -3.]
    # Deviation 1, so the error is 3 ** -0.5; the quantile of t is 4.3027.
    assert mean_and_interval(gaps) == '-2.00 (-4.48 to +0.48; 3)'
    assert mean_and_interval([]) == '-'


def test_gdp_stands_beside_the_dense_runs_of_its_start() -> None:
    import results
    report = _report(
        _row('dense', 60., 0, 1.), _row('gdp', 58., 0),
        dict(_row('dense', 70., 0, 1.), start_score=55.),
        dict(_row('l1', 62., 0), start_score=55.),
        dict(_row('gdp_slow', 57., 0), takeover=False))
    row = _cells('\n'.join(results.overview([report])))[1]
    assert row[2:4] == ['0.1, 0.6, 0.3', '0.4']
    assert row[4:] == [
        '60.00 (1)', '58.00 (1)', '-2.00 (1)', '62.00 (1), L1 norm'
    ]
    cells = _cells(results.accuracy(report).body[0])
    assert cells[1:] == [
        ['dense', '1', '65.00 ± 7.07 (2)', '-'],
        ['GDP', '0.4', '58.00 (1)', '-2.00 (1)'],
        ['L1 norm', '0.4', '62.00 (1)', '-8.00 (1)'],
        [
            'GDP, pruning for 0.6, settling for 0.3, takeover=False', '0.4',
            '57.00 (1)', '-3.00 (1)'
        ],
    ]


def test_changes_are_compared_with_no_change_run_by_run() -> None:
    import results
    from accuracy_variants import CHANGES
    report = _report(
        _row('dense', 60., 0, 1.), _row('dense+kd', 61., 0, 1.),
        _row('gdp', 58., 0), _row('gdp', 50., 1), _row('gdp+kd', 60., 0),
        _row('gdp+ema+flat', 57., 0), _row('gdp+ema+flat', 48., 1))
    text = '\n'.join(results.accuracy(report).body)
    ema, flat, kd = (CHANGES[name].label for name in ('ema', 'flat', 'kd'))
    before, after = text.split('One change at a time')
    head, *rows = _cells(after)
    assert head == [
        'training', 'FLOPs', 'mIoU', 'minus no change (95 % interval; pairs)',
        'minus dense (95 % interval; pairs)'
    ]
    assert rows == [
        ['dense', '1', '60.00 (1)', '-', '-'],
        [f'dense, {kd}', '1', '61.00 (1)', '+1.00 (1)', '-'],
        ['GDP', '0.4', '54.00 ± 5.66 (2)', '-', '-2.00 (1)'],
        [
            f'GDP, {ema}, {flat}', '0.4', '52.50 ± 6.36 (2)',
            '-1.50 (-7.85 to +4.85; 2)', '-3.00 (1)'
        ],
        [f'GDP, {kd}', '0.4', '60.00 (1)', '+2.00 (1)', '+0.00 (1)'],
    ]
    # Rows with a change are no rows of the first table.
    assert [row[0] for row in _cells(before)] == ['training', 'dense', 'GDP']


def test_rows_from_elsewhere_are_named() -> None:
    from accuracy_report import places
    there = dict(
        machine='there', torch='2.1', torch_pruning='', precision='bfloat16')
    report = _report(
        _row('dense', 60., 0, 1.), _row('gdp', 58., 0), _row('l1', 58., 0),
        _row('l1', 58., 1), dict(_row('gdp', 58., 1), **there),
        dict(_row('dense', 60., 0, 1.), **there),
        dict(_row('dense', 60., 1, 1.), **there),
        dict(_row('gdp', 58., 2), **there))
    assert places(report) == (
        'here, torch 2.0, Torch-Pruning 1.6; `gdp-0.4-1`, `dense-1.0-0/1`, '
        'seed 2: there, torch 2.1, bfloat16')


def test_report_is_completed_on_another_machine(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import accuracy
    weights, report = tmp_path / 'weights.pth', tmp_path / 'report.json'
    weights.touch()
    monkeypatch.setattr(sys, 'argv', [
        'accuracy.py', 'camvid', '--data-root',
        str(tmp_path), '--weights',
        str(weights), '--work-dir',
        str(tmp_path), '--methods', 'dense', '--seeds', '0', '1', '--report',
        str(report)
    ])
    args = accuracy.parse_args()
    old = dict(
        machine='old', torch='1.0', torch_pruning='', precision='bfloat16')
    rows = [
        _row('start', 50., 0, 1.),
        _row('dense', 60., 0, 1.),
        dict(_row('dense', 62., 0, 1.), start_score=52.)
    ]
    report.write_text(
        json.dumps(dict(accuracy.conditions(args), **old, rows=rows)))
    # The start was trained again here, and so was the second seed.
    again = [_row('start', 51., 0, 1.), _row('dense', 61., 1, 1.)]
    for row in again:
        folder = accuracy.folder_of(args, accuracy.name_of(row))
        (folder / 'training').mkdir(parents=True)
        (folder / 'result.json').write_text(json.dumps(row))
    accuracy.start_checkpoint(args).touch()
    accuracy.main()
    assert json.loads(report.read_text())['rows'] == [
        dict(rows[1], **old),
        dict(rows[2], **old),
        dict(again[1], **accuracy.place()),
        dict(rows[0], **old)
    ]
    monkeypatch.setattr(sys, 'argv', [*sys.argv, '--start', '31'])
    with pytest.raises(SystemExit, match='expected start 31 as in this run'):
        accuracy.main()


def test_facts_of_all_sections_are_said_once() -> None:
    from pages import Section, chapter
    sections = [
        Section('one', ['table'], ['shared', 'first']),
        Section('two', [], ['shared', '', 'second'])
    ]
    assert chapter('all', ['intro'], sections) == [
        '## all', '', '- intro', '- shared', '', '### one', '', 'table', '',
        '- first', '', '### two', '', '- second', ''
    ]
    assert chapter('all', ['intro'], sections[:1]) == [
        '## one', '', 'table', '', '- intro', '- shared', '- first', ''
    ]
    assert chapter('all', ['intro'], []) == []


def test_time_of_whole_trainings_becomes_iterations() -> None:
    from cost_report import equal_time
    runs = {
        name: [share * dense for dense in (10., 5., 20.)]
        for name, share in dict(dense=1., short=0.8).items()
    }
    report = _report(
        _row('dense', 60., 0, 1.), dict(_row('gdp', 58., 0), minutes=3.))
    facts = equal_time(None, dict(whole=dict(iterations=40, runs=runs)),
                       [report]).facts
    assert 'short: 40 gated iterations took 0.80 of' in facts[1]
    assert facts[1].endswith(', 50 would fit.')
    assert facts[2].endswith('in 1 of 1 comparisons.')


@pytest.mark.parametrize('methods, target, cells', [
    (('dense', 'gdp', 'random', 'l1'), 0.4, [
        'M on D', 'accuracy', '60.00 (1)', '0.4', '60.00 (1)',
        '61.00 (1), L1 norm'
    ]),
    (('dense', 'gdp'), 0.4,
     ['M on D', 'accuracy', '60.00 (1)', '0.4', '60.00 (1)', '-']),
    (('dense', 'gdp', 'scp', 'l1'), 0.5, [
        'M on D', 'accuracy', '60.00 (1)', '0.5', '60.00 (1)', '62.00 (1)',
        '61.00 (1), L1 norm'
    ]),
    (('gdp', 'l1'), 0.4, None),
])
def test_readme_has_the_gates_and_the_best_alternative(
        methods: tuple[str,
                       ...], target: float, cells: list[str] | None) -> None:
    from accuracy_overview import readme_table
    rows = [
        _row('dense', 60., 0, 1.),
        _row('gdp', 60., 0, target),
        _row('scp', 62., 0, target),
        _row('random', 59., 0, target),
        _row('l1', 61., 0, target)
    ]
    report = _report(
        *(row for row in rows if row['method'] in methods), metric='accuracy')
    assert _cells(readme_table([report]))[1:] == ([cells] if cells else [])


def test_first_sentence_says_where_gdp_stands() -> None:
    from accuracy_overview import overview
    reports = [
        _report(
            _row('dense', 60., 0, 1.),
            _row('gdp', 60. + gap, 0, target),
            title=f'DeepLabV3Plus-{name} on D: all',
            data=name)
        for name, gap, target in (('A', -7.5, 0.4), ('B', 0.5, 0.5))
    ]
    assert ('on 1 of 2 networks: at 0.4 of the FLOPs 7.50 below (A on D); at '
            '0.5 of the FLOPs 0.50 above (B on D).**') in overview(reports)[0]


def test_predictions_stand_side_by_side_in_a_small_file() -> None:
    import numpy as np
    import predictions
    from PIL import Image
    image = np.zeros((6, 8, 3), np.uint8)
    labels = np.full((6, 8), 255, np.uint8)
    labels[:, :4] = 1
    content = predictions.draw([('image', [image]), ('label', [labels])],
                               classes=('sky', 'road'),
                               palette=[[9, 9, 9], [200, 0, 100]])
    with Image.open(io.BytesIO(content)) as picture:
        colours = {
            colour: number
            for number, colour in picture.convert('RGB').getcolors()
        }
    # Half of the label, and less in the legend; none of the first class.
    assert colours[200, 0, 100] > 10 * colours.get((9, 9, 9), 0) > 0
    assert len(content) < 20_000


@pytest.mark.parametrize('made, message', [
    ([], 'finished run of'),
    (['dense/result.json', 'pruned/result.json'], 'expected a run with gates'),
    ([
        'dense/result.json', 'pruned/result.json', 'pruned/pair/gdp_pruned.py',
        'dense/training/voc.py', 'pruned/training/camvid.py'
    ], 'but got voc and camvid'),
])
def test_runs_that_cannot_be_drawn_are_refused(
        made: list[str], message: str, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    import predictions
    for name in made:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr(sys, 'argv', [
        'predictions.py',
        str(tmp_path / 'dense'),
        str(tmp_path / 'pruned'), '--report', 'report.json'
    ])
    with pytest.raises(SystemExit):
        predictions.parse_args()
    assert message in ' '.join(capsys.readouterr().err.split())


def test_alternatives_prune_every_layer_by_the_same_share() -> None:
    tp = pytest.importorskip('torch_pruning')
    from one_shot import WithinLayers

    # Kernels of 3 x 3 and far smaller ones of 1 x 1.
    model = Net(
        lambda net, x: net.last(
            net.depthwise(torch.cat([net.wide(x), net.narrow(x)], 1))),
        wide=nn.Conv2d(3, 8, 3, padding=1),
        narrow=nn.Conv2d(3, 4, 1),
        depthwise=nn.Conv2d(12, 12, 3, padding=1, groups=12),
        last=nn.Conv2d(12, 2, 1))
    for layer, scale in (model.wide, 1.), (model.narrow, 0.01):
        for channel, kernel in enumerate(layer.weight.data):
            kernel.fill_(scale * (1 + channel))
    nn.init.ones_(model.depthwise.weight)
    nn.init.ones_(model.last.weight)
    tp.pruner.BasePruner(
        model,
        torch.zeros(1, 3, 5, 5),
        WithinLayers(tp.importance.GroupMagnitudeImportance(p=1)),
        pruning_ratio=0.5,
        ignored_layers=[model.last]).step()
    for layer, scale, left in ((model.wide, 1., [5, 6, 7, 8]), (model.narrow,
                                                                0.01, [3, 4])):
        kept = layer.weight[:, 0, 0, 0] / scale
        assert kept.tolist() == pytest.approx(left)


def _widths(model: nn.Module) -> dict[str, int]:
    return {
        name: module.out_channels
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
    }


def _small_deeplab() -> nn.Module:
    """DeepLabV3Plus-MobileNetV2 with a decode head of 16 channels."""
    from mmengine.config import Config
    from mmengine.registry import init_default_scope
    from mmseg.registry import MODELS
    cfg = Config.fromfile(ROOT / 'configs/deeplabv3plus_mobilenetv2_voc.py')
    init_default_scope('mmseg')
    cfg.model.pretrained = None
    cfg.model.decode_head.update(channels=16, norm_cfg=dict(type='BN'))
    model: nn.Module = MODELS.build(cfg.model)
    return model


def _changed(before: dict[str, int], after: dict[str, int]) -> set[str]:
    return {name for name in before if after[name] != before[name]}


def test_alternative_in_the_head_leaves_the_backbone_whole() -> None:
    pytest.importorskip('torch_pruning')
    from one_shot import METHODS, prune_
    model = _small_deeplab()
    before = _widths(model)
    prune_(model, METHODS['l1_head'], 0.5, (1, 3, 64, 64), 0)
    after = _widths(model)
    changed = _changed(before, after)
    assert changed and all(name.startswith('decode_head') for name in changed)
    assert after['decode_head.bottleneck.conv'] == 8
    assert after['decode_head.c1_bottleneck.conv'] == 24
    assert after['decode_head.conv_seg'] == before['decode_head.conv_seg']


def test_one_threshold_takes_channels_where_their_scales_are_small() -> None:
    pytest.importorskip('torch_pruning')
    from one_shot import METHODS, prune_
    model: Any = _small_deeplab()
    before = _widths(model)
    model.decode_head.image_pool[1].bn.weight.data[:10] = 0.01
    few = 10 / sum(before.values())
    prune_(model, METHODS['slimming_global'], few, (1, 3, 64, 64), 0)
    after = _widths(model)
    assert _changed(before, after) == {'decode_head.image_pool.1.conv'}
    assert after['decode_head.image_pool.1.conv'] == 6


def test_groups_of_the_optimizer_outlive_the_pruning() -> None:
    pytest.importorskip('torch_pruning')
    from one_shot import PruneOnce
    model: Any = _small_deeplab()
    optimizer = torch.optim.AdamW([
        dict(params=model.backbone.parameters(), lr=1.),
        dict(params=model.decode_head.parameters(), lr=10.)
    ])
    runner: Any = SimpleNamespace(
        model=model,
        iter=0,
        optim_wrapper=SimpleNamespace(optimizer=optimizer),
        logger=logging.getLogger())
    PruneOnce('random', 0.5, 0, (1, 3, 64, 64), 0).before_train_iter(runner, 0)
    for part, group in zip((model.backbone, model.decode_head),
                           optimizer.param_groups):
        assert set(group['params']) == set(part.parameters())
    assert [group['lr'] for group in optimizer.param_groups] == [1., 10.]
    assert model.decode_head.bottleneck.conv.out_channels < 16


def test_page_on_reliability_has_the_figures_of_its_report() -> None:
    import faults
    report = json.loads((ROOT / 'docs/reports/faults.json').read_text())
    assert len(report['trainings']) == len(report['exports']) == 25
    page = (ROOT / 'docs/reliability.md').read_text()
    assert faults.markdown(report) in page


def test_page_on_reliability_has_the_figures_of_two_processes() -> None:
    import processes
    report = json.loads((ROOT / 'docs/reports/processes.json').read_text())
    page = (ROOT / 'docs/reliability.md').read_text()
    assert processes.markdown(report) in page


def test_training_that_is_killed_ends_as_the_one_that_is_not(
        tmp_path: Path) -> None:
    report = tmp_path / 'report.json'
    run_program(
        HELPERS / 'short_faults.py',
        '--kills',
        1,
        '--seed',
        1,
        '--report',
        report,
        cwd=tmp_path)
    written = json.loads(report.read_text())
    training, = written['trainings']
    assert all(training[key] for key in training if key != 'ends')
    assert any(end['killed'] for end in training['ends'])
    assert written['exports'][0]['left'] in ('nothing', 'complete')
    assert written['left_by_killed_exports'] == 0


def test_random_widths_are_at_the_target_and_round_up() -> None:
    import latency

    from gdp_mmseg.cost.counts import FlopCost

    from helpers.toys import TOYS
    analysis = TOYS['interpolate and concat'].analyse()[1]
    cost = FlopCost(analysis)
    openness = latency.random_widths(analysis, cost)
    assert cost.fixed_share() < float(cost(openness)) <= latency.TARGET
    rounded = latency.rounded_up(openness, analysis, 2)
    assert bool((rounded >= openness).all())
    for group in analysis.groups:
        kept = int(rounded[group.gates].sum())
        assert kept % 2 == 0 or kept == len(group.gates)


def _archive(path: Path) -> None:
    """Write grey images of CIFAR-10's layout; the level tells which one."""
    import cv2
    import numpy as np
    with tarfile.open(path, 'w') as file:
        for split, name, number, level in (('test', 'bird', 0,
                                            40), ('train', 'airplane', 0, 80),
                                           ('train', 'airplane', 1,
                                            120), ('train', 'truck', 0, 160),
                                           ('train', 'truck', 1, 200)):
            image = np.full((32, 32, 3), level, np.uint8)
            content = cv2.imencode('.jpg', image)[1].tobytes()
            member = tarfile.TarInfo(f'{split}/{name}/{number:04}.jpg')
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))


def test_packed_images_are_those_of_the_archive(tmp_path: Path) -> None:
    pytest.importorskip('mmpretrain')
    import cifar10
    _archive(tmp_path / 'images.tar')
    cifar10.pack(tmp_path / 'images.tar', tmp_path / cifar10.FILE)
    found = {}
    for split in ('train', 'test', 'three_quarters', 'quarter'):
        batch = cifar10.stack_images(
            cifar10.PackedCIFAR10(str(tmp_path), split).__getitems__([0, -1]))
        assert batch['inputs'].dtype == torch.uint8
        found[split] = [
            (int(image.float().mean()), int(sample.gt_label))
            for image, sample in zip(batch['inputs'], batch['data_samples'])
        ]
    assert found == dict(
        train=[(80, 0), (200, 9)],
        test=[(40, 2), (40, 2)],
        three_quarters=[(80, 0), (160, 9)],
        quarter=[(200, 9), (200, 9)])


def test_images_are_cropped_and_flipped_one_by_one(tmp_path: Path) -> None:
    import cifar10
    torch.manual_seed(0)
    images = torch.randint(1, 256, (64, 3, 32, 32), dtype=torch.uint8)
    places = set()
    for image, crop in zip(images, cifar10.augmented(images)):
        padded = torch.nn.functional.pad(image, [4] * 4)
        places.update(
            (flip, top, left) for flip in (False, True) for top in range(9)
            for left in range(9) if torch.equal(
                crop.flip(-1) if flip else crop, padded[:, top:top + 32,
                                                        left:left + 32]))
    assert len(places) > 40
    assert {flip for flip, *_ in places} == {False, True}


@pytest.mark.parametrize('target', [0.5, 0.3])
def test_alternatives_meet_the_target_in_narrow_layers(target: float) -> None:
    pytest.importorskip('torch_pruning')
    pytest.importorskip('mmpretrain')
    from mmengine.config import Config
    from mmengine.registry import MODELS, init_default_scope

    from gdp_mmseg.engine.forwards import inference_forward
    from gdp_mmseg.report.measure import count_flops

    from accuracy_tasks import TASKS
    from one_shot import PruneOnce
    cfg = Config.fromfile(BENCHMARKS / 'configs/cifar10_resnet20.py')
    init_default_scope(cfg.default_scope)
    model: Any = MODELS.build(cfg.model)
    shape = (1, 3, 32, 32)
    dense = count_flops(model, shape, inference_forward)
    runner: Any = SimpleNamespace(
        model=model,
        iter=0,
        optim_wrapper=SimpleNamespace(
            optimizer=torch.optim.SGD(model.parameters(), 0.1)),
        logger=logging.getLogger())
    PruneOnce('l1', target, 0, shape, 0,
              TASKS['cifar10_resnet20'].whole).before_train_iter(runner, 0)
    left = count_flops(model, shape, inference_forward) / dense
    assert target - 0.01 < left <= target
    assert model.backbone.layer1[0].conv2.out_channels == 16
    assert model.head.fc.out_features == 10


@pytest.mark.parametrize('name', ['cifar10_resnet20', 'cifar10_resnet56'])
def test_classifier_starts_from_weights_and_is_gated(name: str) -> None:
    import accuracy_configs
    args: Any = SimpleNamespace(
        data=name,
        data_root=Path('data'),
        weights=Path('weights.pth'),
        work_dir=Path('work'),
        iterations=10,
        start=accuracy_configs.TASKS[name].start,
        tune=False,
        lr=accuracy_configs.TASKS[name].lr_after_start,
        hold=0.)
    start = accuracy_configs.config_of(args, 'start', 1., 0)
    for init in (start.model.backbone.init_cfg,
                 start.model.head.init_cfg.override):
        assert Path(init.checkpoint).name == 'weights.pth'
    assert start.train_cfg.max_iters == args.start
    gated = accuracy_configs.config_of(args, 'gdp', 0.5, 1)
    assert gated.model.gdp.target == 0.5
    assert gated.model.gdp.input_shape == (32, 32)
    assert gated.load_from.endswith(f'start-1.0-0/training/iter_{args.start}'
                                    '.pth')
    assert gated.optim_wrapper.optimizer.lr == 0.02
    assert gated.train_dataloader.dataset == dict(
        type='PackedCIFAR10',
        split='train',
        augment=True,
        data_root=str(Path('data').resolve()))


def _config_of(method: str) -> Any:
    """Config of a training on CamVid with changes."""
    import accuracy_configs
    args: Any = SimpleNamespace(
        data='camvid',
        data_root=Path('data'),
        weights=Path('weights.pth'),
        work_dir=Path('work'),
        iterations=100,
        start=700,
        tune=False,
        lr=1e-3,
        hold=0.6)
    return accuracy_configs.config_of(args, method, 0.4, 0)


def test_rate_is_twice_as_high_after_the_pruning_phase() -> None:
    from mmengine.registry import PARAM_SCHEDULERS
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 1e-3)
    schedulers = [
        PARAM_SCHEDULERS.build(dict(one, optimizer=optimizer))
        for one in _config_of('gdp+short+restart').param_scheduler
    ]
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        for one in schedulers:
            one.step()
    assert rates[:30] == [1e-3] * 30
    assert rates[30] == 2e-3
    assert rates[65] == pytest.approx(1e-3, rel=0.02)
    assert rates[-1] < 5e-5


def test_features_of_the_start_are_predicted_from_those_that_are_left(
        monkeypatch: pytest.MonkeyPatch) -> None:
    import distill_hooks
    torch.manual_seed(0)

    class Segmentor(nn.Module):

        def __init__(self, channels: int) -> None:
            super().__init__()
            self.backbone: Any = nn.Conv2d(3, channels, 1)
            self.backbone.register_forward_hook(lambda *args: (args[2], ))
            self.decode_head = nn.Identity()
            self.decode_head.loss_by_feat = lambda logits, samples: {}

    # The three channels of the teacher are the colours; the student has two.
    teacher, student = Segmentor(3), Segmentor(2)
    with torch.no_grad():
        teacher.backbone.weight.copy_(torch.eye(3)[:, :, None, None])
        student.backbone.weight.copy_(torch.eye(3)[:2, :, None, None])
    monkeypatch.setattr(distill_hooks.MODELS, 'build', lambda _: teacher)
    monkeypatch.setattr(distill_hooks, 'load_checkpoint', lambda *_: None)
    monkeypatch.setattr(distill_hooks, 'RATE_OF_MAPS', 0.1)
    hook = distill_hooks.FeatureHook(
        model={}, checkpoint='', weight=6., begin=0.5)
    runner: Any = SimpleNamespace(model=student, iter=0, max_iters=300)
    hook.before_train(runner)
    heads: Any = student.decode_head
    weight = student.backbone.weight
    images = torch.randn(4, 3, 8, 8)
    for runner.iter in range(300):
        losses = heads.loss_by_feat(student.backbone(images), None)
        assert bool(losses) == (runner.iter >= 150)
        if losses:
            losses['loss_features'].backward()
            # At first the maps learn alone.
            assert (weight.grad is not None) == (
                runner.iter >= 150 + distill_hooks.ALONE)
        hook.after_train_iter(runner, 0)
    # One of three channels cannot be told from the others.
    assert losses['loss_features'].item() == pytest.approx(2., abs=0.1)
    # Channels that leave the student leave the maps, too.
    assert [one.in_channels for one in hook.maps] == [2]
    hook.term(teacher, images, Segmentor(1).backbone(images), images)
    assert [one.in_channels for one in hook.maps] == [1]


def test_channels_that_are_left_are_compared_with_their_own(
        monkeypatch: pytest.MonkeyPatch) -> None:
    import distill_hooks

    from gdp_mmseg.engine.model import add_gates_
    from gdp_mmseg.engine.shrinking import ShrinkHook
    from gdp_mmseg.pruner.settings import Settings

    from helpers.toys import TOYS
    net, analysis = TOYS['residual'].analyse()
    add_gates_(net, analysis, Settings.from_config(dict(target=0.5)))
    norm, gates = next(
        (name.removesuffix('.weight'), gates)
        for (name, _), gates in analysis.gate_of_slot.items() if
        isinstance(net.get_submodule(name.rpartition('.')[0]), nn.BatchNorm2d)
        and len(gates) == 4)
    openness = torch.zeros(analysis.num_gates)
    openness[gates] = torch.tensor([1., 0.5, 0., 1.])
    pruner: Any = net.gdp
    monkeypatch.setattr(pruner.gates, 'openness', lambda: openness)
    hook = distill_hooks.ChannelHook(model={}, checkpoint='')
    hook.norms = [norm]
    cut = ShrinkHook()
    hook.runner = SimpleNamespace(model=net, hooks=[cut])
    wanted = torch.randn(2, 4, 5, 5)
    wanted /= wanted.std((0, 2, 3), correction=0)[:, None, None]
    teacher = SimpleNamespace(backbone=lambda images: (wanted, ))
    features = wanted.clone()
    features[:, 1] += 1
    features[:, 2] += 9  # a closed channel does not count
    found = hook.term(teacher, wanted, (features, ), wanted)
    assert found.item() == pytest.approx(0.5 / 2.5, rel=1e-2)
    # The closed channel has left.
    cut._shrinkages = [SimpleNamespace(present=openness > 0)]
    found = hook.term(teacher, wanted, (features[:, [0, 1, 3]], ), wanted)
    assert found.item() == pytest.approx(0.5 / 2.5, rel=1e-2)
    # A dense network has all channels.
    hook.runner = SimpleNamespace(model=nn.Identity(), hooks=[])
    found = hook.term(teacher, wanted, (wanted + 1, ), wanted)
    assert found.item() == pytest.approx(1., rel=1e-2)


def test_last_norms_of_stages_write_their_features() -> None:
    from distill_hooks import _last_norms
    from mmseg.models import MobileNetV2, ResNet
    nets = [
        SimpleNamespace(backbone=ResNet(50)),
        SimpleNamespace(backbone=MobileNetV2(out_indices=(1, 6)))
    ]
    assert [_last_norms(net) for net in nets] == [[
        'backbone.layer1.2.bn3', 'backbone.layer2.3.bn3',
        'backbone.layer3.5.bn3', 'backbone.layer4.2.bn3'
    ], ['backbone.layer2.1.conv.2.bn', 'backbone.layer7.0.conv.2.bn']]


def test_residual_streams_keep_their_share() -> None:
    from gate_hooks import GainHook, StreamHook

    from gdp_mmseg.engine.model import add_gates_
    from gdp_mmseg.pruner.settings import Settings

    from helpers.toys import TOYS
    net, analysis = TOYS['residual'].analyse()
    settings = _config_of('gdp+parts').model.gdp
    add_gates_(net, analysis, Settings.from_config(settings))
    runner: Any = SimpleNamespace(model=net)
    StreamHook(0.75).before_train(runner)
    pruner: Any = net.gdp
    # The stream of four channels, and the inside of its branch.
    assert pruner.min_kept.tolist() == [3, 1]
    GainHook((0.5, 0.6)).before_train(runner)
    assert pruner.gates.betas == (0.5, 0.6)


def test_phases_are_compared_in_one_training_each(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import phases

    from gdp_mmseg.report.record import GateRow, append_row, begin_record
    commands = []

    def train(started: list[Any]) -> None:
        command = started[0].arguments
        commands.append(command)
        folder = Path(command[command.index('--work-dir') + 1])
        (folder / 'log/vis_data').mkdir(parents=True)
        (folder / 'iter_500.pth').touch()
        begin_record(folder / 'gates.jsonl', [], 0)
        append_row(
            folder / 'gates.jsonl',
            GateRow(500, flops=0.41, budget=0.4, held_cost=0.4, openness=[]))
        (folder / 'log/vis_data/scalars.json').write_text('{"mIoU": 80.5}\n')

    report = tmp_path / 'phases.json'
    monkeypatch.setattr(phases, 'run_together', train)
    monkeypatch.setattr(phases, 'draw_data', lambda cfg: None)
    monkeypatch.setattr(sys, 'argv', [
        'phases.py', '--report',
        str(report), '--work-dir',
        str(tmp_path), '--seeds', '3'
    ])
    phases.main()
    row = dict(target=0.4, seed=3, macs=0.41, score=80.5)
    assert json.loads(report.read_text())['rows'] == [
        dict(row, method='gdp'),
        dict(row, method='gdp+short')
    ]
    assert [command[-2:] for command in commands] == [
        ['randomness.seed=3', 'model.gdp.phases=[0.35, 0.5, 0.15]'],
        ['randomness.seed=3', 'model.gdp.phases=[0.1, 0.2, 0.7]'],
    ]
    phases.main()
    assert len(commands) == 2
