"""Export: two files that compute what the gated network does, or nothing."""
from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any, Callable, Mapping

import pytest

pytest.importorskip('mmseg')

import torch
from mmengine.config import Config
from mmengine.model import PretrainedInit
from mmengine.registry import MODELS, init_default_scope
from mmseg.models import EncoderDecoder
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from gdp_mmseg.analysis.structure import Analysis
from gdp_mmseg.cost.counts import FlopCost
from gdp_mmseg.engine.checkpoint import read_checkpoint
from gdp_mmseg.engine.config import ModelConfig
from gdp_mmseg.engine.forwards import inference_forward
from gdp_mmseg.engine.matching import gate_meta
from gdp_mmseg.engine.model import analyse_config
from gdp_mmseg.engine.pruned_config import pruned_config
from gdp_mmseg.export import export as exporting
from gdp_mmseg.export.compare import check_metrics, check_trainable
from gdp_mmseg.export.export import export, run_test
from gdp_mmseg.report.measure import count_flops
from gdp_mmseg.report.tables import Report
from gdp_mmseg.surgery.constant import Constant
from gdp_mmseg.version import __version__

from helpers.project import (NAME, TARGET, Exported, Project, Trained, build,
                             run_tool, train, tree, unet, with_two_heads)

Change = Callable[[Callable[[dict[str, Any]], None]], Path]
PLAIN = (bool, int, float, str, type(None))


def _load(exported: Exported) -> nn.Module:
    """By stock means alone: config, registry, torch."""
    cfg = Config.fromfile(exported.config)
    init_default_scope(cfg.default_scope)
    model = MODELS.build(_without_sync(cfg.model))
    content = torch.load(
        exported.checkpoint, map_location='cpu', weights_only=True)
    model.load_state_dict(content['state_dict'], strict=True)
    return model.eval()


def _without_sync(model: Mapping[str, Any]) -> Any:
    """A config without SyncBN, which a CPU cannot run."""
    if isinstance(model, Mapping):
        return type(model)({
            key:
            'BN' if value == 'SyncBN' else _without_sync(value)
            for key, value in model.items()
        })
    return model


def _macs(model: nn.Module, shape: tuple[int, ...]) -> int:
    """torch's own count, halved to multiply-adds."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(shape), mode='tensor')
    return counter.get_total_flops() // 2


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _is_plain(value: Any) -> bool:
    """Only tensors and what Python itself brings, by exact type."""
    if isinstance(value, dict):
        return all(
            type(key) in PLAIN and _is_plain(one)
            for key, one in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return type(value) in (*PLAIN, Tensor)


def _group_gates(analysis: Analysis, written_by: str) -> list[Tensor]:
    """Gates of the groups that a module of this name writes first."""
    return [
        group.gates for group in analysis.groups
        if written_by in group.writers[0]
    ]


def test_report_says_what_was_measured(exported: Exported) -> None:
    report = exported.report
    assert report.target == TARGET
    assert report.input_shape == [1, 3, 64, 64]
    assert report.torch == torch.__version__
    assert report.name == NAME
    assert 'test set' in report.compared_on
    assert [row.name
            for row in report.networks] == ['dense', 'gated', 'pruned']
    for row in report.networks:
        assert min(row.flops, row.params, row.latency_ms['pytorch cpu']) > 0
        assert row.metrics is None if row.name == 'dense' else row.metrics
    assert report.metric == 'mIoU'
    assert report.gdp_mmseg == __version__


def test_report_is_read_as_it_was_written(exported: Exported,
                                          tmp_path: Path) -> None:
    report = exported.report
    report.write(tmp_path / 'again.json')
    assert Report.read(tmp_path / 'again.json') == report
    assert (tmp_path /
            'again.json').read_text() == (exported.folder /
                                          'report.json').read_text()


def test_folder_holds_these_files_and_no_others(exported: Exported) -> None:
    assert set(tree(exported.folder)) == {
        f'{NAME}_pruned.py', f'{NAME}_pruned.pth', 'report.json', 'report.md',
        'gates.png'
    }
    assert [path.name for path in exported.folder.parent.iterdir()
            ] == [exported.folder.name]


def test_report_for_a_reader_has_the_reports_numbers(
        exported: Exported) -> None:
    report, text = exported.report, (exported.folder / 'report.md').read_text()
    assert f'{report.max_rel_diff:.1e}' in text
    assert f'{report.network("pruned").metrics["mIoU"]:.2f}' in text
    share = report.network('pruned').flops / report.network('dense').flops
    assert f'{share:.4f}' in text
    for group in report.groups:
        assert group.writers[0] in text


def test_no_path_of_the_machine_is_in_the_report_or_the_weights(
        exported: Exported, trained: Trained) -> None:
    written = tree(exported.folder)
    for name in ('report.json', 'report.md', exported.checkpoint.name):
        for folder in (exported.folder, trained.work_dir, Path.home()):
            assert f'{folder}/'.encode() not in written[name]


def test_other_versions_of_the_training_are_noted(project: Project,
                                                  trained: Trained,
                                                  changed: Change,
                                                  tmp_path: Path) -> None:

    def age(content: dict[str, Any]) -> None:
        content['meta']['versions']['torch'] = '1.13.1'

    said: list[str] = []
    export(
        project.load(tmp_path),
        str(changed(age)),
        tmp_path / 'pair',
        'x',
        evaluate=False,
        progress=said.append)
    assert any('torch 1.13.1 (here ' in line for line in said)


def test_outputs_of_gated_and_pruned_agree(exported: Exported) -> None:
    assert 0 <= exported.report.max_rel_diff <= 1e-4


def test_miou_of_gated_and_pruned_agree_to_two_decimals(
        exported: Exported) -> None:
    gated, pruned = (
        exported.report.network(name).metrics['mIoU']
        for name in ('gated', 'pruned'))
    assert f'{gated:.2f}' == f'{pruned:.2f}'
    assert 0 < pruned < 100


def test_flops_are_at_the_target(exported: Exported) -> None:
    report = exported.report
    share = report.network('pruned').flops / report.network('dense').flops
    assert TARGET - 0.03 <= share <= TARGET + 0.02


def test_groups_of_the_report_are_those_of_the_gates(exported: Exported,
                                                     trained: Trained) -> None:
    pruner = trained.runner.model.gdp
    rows = exported.report.groups
    assert len(rows) == len(pruner.analysis.groups)
    for row, group in zip(rows, pruner.analysis.groups):
        assert row.writers == list(group.writers)
        assert row.readers == list(group.readers)
        assert row.channels == len(group.gates)
        assert 0 <= row.kept <= row.channels
    assert sum(row.kept for row in rows) == int(pruner.channels().sum())


def test_checkpoint_holds_tensors_and_plain_types_only(
        exported: Exported) -> None:
    content = torch.load(
        exported.checkpoint, map_location='cpu', weights_only=True)
    assert set(content) == {'meta', 'state_dict'}
    assert _is_plain(content['meta'])
    assert all(
        type(value) is Tensor for value in content['state_dict'].values())
    assert all(value.isfinite().all()
               for value in content['state_dict'].values())
    assert content['meta']['dataset_meta']['classes'][0] == 'background'


def test_checkpoint_loads_strictly_in_a_stock_model(exported: Exported,
                                                    trained: Trained) -> None:
    model = _load(exported)
    assert type(model) is type(trained.runner.model)
    # The names are the dense model's, some of them gone with dead layers.
    dense = {
        key
        for key in trained.runner.model.state_dict()
        if not key.startswith('gdp.')
    }
    extra = set(model.state_dict()) - dense
    assert all(
        isinstance(model.get_submodule(key.rpartition('.')[0]), Constant)
        for key in extra)


def test_multiply_adds_and_parameters_are_those_of_the_files(
        exported: Exported) -> None:
    model, report = _load(exported), exported.report
    assert _macs(model,
                 tuple(report.input_shape)) == report.network('pruned').flops
    assert _parameters(model) == report.network('pruned').params


def test_dense_sizes_are_those_of_the_users_own_config(
        exported: Exported, project: Project) -> None:
    cfg, report = Config.fromfile(project.dense), exported.report
    model = MODELS.build(_without_sync(cfg.model)).eval()
    assert _macs(model,
                 tuple(report.input_shape)) == report.network('dense').flops
    assert _parameters(model) == report.network('dense').params


def test_files_compute_what_the_gated_network_computes(
        exported: Exported, trained: Trained) -> None:
    pruned = _load(exported)
    gated = copy.deepcopy(trained.runner.model).cpu().eval()
    inputs = torch.randn(2, 3, 96, 64)
    with torch.no_grad():
        expected, got = (
            model(inputs, mode='tensor') for model in (gated, pruned))
    worst = float((got - expected).abs().max() / expected.abs().max())
    assert worst <= 1e-4


def _export_closed(trained: Trained, changed: Change, tmp_path: Path,
                   gates: Tensor | slice) -> Exported:
    """Export a checkpoint with ``theta = 0`` for some of its gates."""

    def close(content: dict[str, Any]) -> None:
        content['state_dict']['gdp.gates.theta'][gates] = 0

    outcome = run_tool(
        'export.py',
        trained.config,
        changed(close),
        '--out-dir',
        tmp_path / 'pair',
        '--no-eval',
        cwd=tmp_path)
    assert outcome.status == 0, outcome.stderr
    return Exported(tmp_path / 'pair')


@pytest.mark.parametrize('writers', [
    ('backbone.layer2.1.conv1', ),
    ('backbone.layer4.0.conv1', 'backbone.layer4.1.conv1'),
    ('decode_head.image_pool', ),
    ('decode_head.aspp_modules', ),
    ('decode_head.c1_bottleneck', ),
    ('decode_head.sep_bottleneck.0', ),
    ('decode_head.aspp_modules', 'decode_head.image_pool'),
    ('backbone.layer1.0.conv1', 'backbone.layer1.1.conv1',
     'decode_head.aspp_modules', 'decode_head.c1_bottleneck'),
])
def test_dead_blocks_leave_and_nothing_changes(
        trained: Trained, changed: Change, tmp_path: Path,
        writers: tuple[str, ...]) -> None:
    analysis = trained.runner.model.gdp.analysis
    gates = [one for name in writers for one in _group_gates(analysis, name)]
    assert gates
    dead = torch.cat(gates)
    exported = _export_closed(trained, changed, tmp_path, dead)
    report, model = exported.report, _load(exported)
    assert report.max_rel_diff <= 1e-4
    assert _macs(model,
                 tuple(report.input_shape)) == report.network('pruned').flops
    for row, group in zip(report.groups, analysis.groups):
        if bool(torch.isin(group.gates, dead).all()):
            assert row.kept <= (0 if group.can_be_empty else 1)


def test_all_gates_closed_is_still_a_network(trained: Trained, changed: Change,
                                             tmp_path: Path) -> None:
    exported = _export_closed(trained, changed, tmp_path, slice(None))
    assert exported.report.max_rel_diff <= 1e-4
    assert _load(exported)(
        torch.randn(1, 3, 64, 64), mode='tensor').isfinite().all()


def test_network_of_windows_is_compared_in_them(project: Project,
                                                tmp_path: Path) -> None:
    cfg = project.load(tmp_path)
    cfg.model = unet(cfg.model)
    cfg.model.test_cfg = dict(
        mode='slide', crop_size=(32, 32), stride=(24, 24))
    # Which the network cannot take as a whole.
    pipeline = cfg.test_dataloader.dataset.pipeline
    pipeline.insert(1, dict(type='Resize', scale=(60, 60)))
    model: Any = build(cfg.model)
    with torch.no_grad():
        model.gdp.gates.theta[::2] = 0
    meta = dict(gdp=gate_meta(model.gdp))
    torch.save(
        dict(state_dict=model.state_dict(), meta=meta), tmp_path / 'gated.pth')
    report = export(cfg, str(tmp_path / 'gated.pth'), tmp_path / 'pair', 'x')
    assert report.compared_on == '2 inputs of the test set'
    assert report.network('gated').metrics['mIoU'] == report.network(
        'pruned').metrics['mIoU']


def test_dense_checkpoint_fills_its_row(project: Project, trained: Trained,
                                        tmp_path: Path) -> None:
    cfg = project.load(tmp_path)
    dense: Any = build(_without_sync(Config.fromfile(project.dense).model))
    torch.save(dict(state_dict=dense.state_dict()), tmp_path / 'dense.pth')
    outcome = run_tool(
        'export.py',
        trained.config,
        trained.checkpoint,
        '--out-dir',
        tmp_path / 'pair',
        '--dense',
        tmp_path / 'dense.pth',
        cwd=tmp_path)
    assert outcome.status == 0, outcome.stderr
    report = Exported(tmp_path / 'pair').report
    metrics = report.network('dense').metrics
    assert metrics == pytest.approx(run_test(cfg, dense.eval()))
    # Its weights are not those of the gated training.
    assert metrics != report.network('gated').metrics
    row, = re.findall(r'^\| dense .*$',
                      (tmp_path / 'pair/report.md').read_text(), re.M)
    assert f' {metrics["mIoU"]:.2f} ' in row


def test_nothing_to_evaluate_on_is_said_first(trained: Trained,
                                              tmp_path: Path) -> None:
    cfg = Config.fromfile(trained.config)
    cfg.test_dataloader = None
    with pytest.raises(ValueError, match='test_dataloader = val_dataloader'):
        export(cfg, str(trained.checkpoint), tmp_path / 'pair', 'x')


def test_exported_config_moves_no_gates(exported: Exported) -> None:
    cfg = Config.fromfile(exported.config)
    assert 'GDPHook' not in cfg.pretty_text
    assert 'GDPModel' not in cfg.pretty_text
    assert cfg.model.type == 'gdp_mmseg.PrunedModel'
    # The rest of the user's config is there.
    assert set(cfg.default_hooks) == {
        'timer', 'logger', 'param_scheduler', 'checkpoint', 'sampler_seed',
        'visualization'
    }


def test_exported_config_is_analysed_as_the_model_that_it_is(
        exported: Exported) -> None:
    analysis = analyse_config(ModelConfig.of(Config.fromfile(exported.config)))
    cost = FlopCost(analysis)
    assert cost.dense == exported.report.network('pruned').flops
    for group in analysis.groups:
        kept, = [
            one.kept for one in exported.report.groups
            if group.writers[0] in one.writers
        ]
        assert len(group.gates) == kept


def test_hook_among_the_custom_hooks_goes_and_the_others_stay(
        project: Project, exported: Exported, tmp_path: Path) -> None:
    cfg = project.load(tmp_path)
    cfg.custom_hooks = [
        dict(type='gdp_mmseg.GDPHook'),
        dict(type='EMAHook', momentum=0.1)
    ]
    content = Config(pruned_config(cfg, 'x', _widths(exported)))
    assert [hook['type'] for hook in content.custom_hooks] == ['EMAHook']


@pytest.mark.parametrize('options', [
    {
        'model.pretrained': 'dense.pth'
    },
    {
        'model.backbone.pretrained': 'dense.pth'
    },
    {
        'model.backbone.init_cfg': dict(
            type='Pretrained', checkpoint='dense.pth')
    },
    {
        'model.init_cfg': dict(type='Pretrained', checkpoint='dense.pth')
    },
    {
        'model.backbone.part.init_cfg': [
            dict(type='Kaiming', layer='Conv2d'),
            dict(type='Pretrained', checkpoint='dense.pth')
        ]
    },
    {
        'model.backbone.init_cfg':
        dict(type=PretrainedInit, checkpoint='dense.pth')
    },
    {
        'model.backbone.parts': [dict(pretrained='dense.pth')]
    },
    {
        'load_from': 'dense.pth'
    },
])
def test_exported_config_asks_for_no_dense_weights(
        project: Project, exported: Exported, tmp_path: Path,
        options: dict[str, Any]) -> None:
    content = pruned_config(
        project.load(tmp_path, **options), 'x', _widths(exported))
    assert 'dense.pth' not in str(content)
    assert content['model']['gdp']['checkpoint'].endswith('/x_pruned.pth')


def test_exported_pair_can_move(exported: Exported, tmp_path: Path) -> None:
    """Paths in the config are relative to it."""
    exported.folder.rename(tmp_path / 'moved')
    try:
        moved = Exported(tmp_path / 'moved')
        cfg = Config.fromfile(moved.config)
        assert cfg.model.gdp.checkpoint == str(moved.checkpoint)
        assert isinstance(_load(moved), nn.Module)
    finally:
        (tmp_path / 'moved').rename(exported.folder)


def _widths(exported: Exported) -> dict[str, list[int]]:
    return Config.fromfile(exported.config).model.gdp.widths.to_dict()


def test_checkpoint_and_config_say_the_same_widths(exported: Exported) -> None:
    meta = torch.load(
        exported.checkpoint, map_location='cpu', weights_only=True)['meta']
    assert meta['widths'] == _widths(exported)


# Each two of the values meet.
@pytest.mark.parametrize('failure, which, out_dir', [
    (RuntimeError, 1, 'pair'),
    (RuntimeError, 2, 'a/b/pair'),
    (KeyboardInterrupt, 1, 'a/b/pair'),
    (KeyboardInterrupt, 2, 'pair'),
])
def test_half_an_export_leaves_nothing_behind(project: Project,
                                              trained: Trained, tmp_path: Path,
                                              monkeypatch: pytest.MonkeyPatch,
                                              failure: type[BaseException],
                                              which: int,
                                              out_dir: str) -> None:
    calls = []

    def run_test(*_: Any) -> dict[str, float]:
        calls.append(1)
        if len(calls) == which:
            raise failure('out of memory')
        return dict(mIoU=1.)

    monkeypatch.setattr(exporting, 'run_test', run_test)
    with pytest.raises(failure):
        export(
            project.load(tmp_path), str(trained.checkpoint),
            tmp_path / out_dir, 'x')
    assert len(calls) == which
    assert tree(tmp_path) == {}


def test_metrics_that_are_no_numbers_are_left_out(
        project: Project, trained: Trained, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = dict(mIoU=50., IoU=[40., 60.])
    monkeypatch.setattr(exporting, 'run_test', lambda *_: metrics)
    report = export(
        project.load(tmp_path), str(trained.checkpoint), tmp_path / 'pair',
        'x')
    assert report.network('pruned').metrics == dict(mIoU=50.)


def test_multiply_adds_are_counted_where_a_forward_asks_for_values() -> None:

    class Asking(nn.Conv2d):

        def forward(self, inputs: Tensor, mode: str) -> Tensor:
            return super().forward(inputs / max(inputs.max().item(), 1))

    assert count_flops(Asking(3, 2, 1), (1, 3, 4, 4),
                       inference_forward) == 3 * 2 * 16


def test_wrong_surgery_is_an_error_and_leaves_nothing_behind(
        project: Project, trained: Trained, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    right = exporting.prune

    def wrong(*arguments: Any) -> Any:
        model, widths = right(*arguments)
        with torch.no_grad():
            model.decode_head.conv_seg.weight *= 1.01
        return model, widths

    monkeypatch.setattr(exporting, 'prune', wrong)
    with pytest.raises(RuntimeError) as error:
        export(
            project.load(tmp_path), str(trained.checkpoint), tmp_path / 'pair',
            'x')
    assert 'but got a relative difference' in str(error.value)
    assert tree(tmp_path) == {}


def test_files_that_differ_from_what_was_proven_are_an_error(
        project: Project, trained: Trained, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    """What counts is the pair on disk, not the model in memory."""
    right = exporting._write_pair

    def wrong(folder: Path, name: str, cfg: Config, pruned: nn.Module, *rest:
              Any) -> None:
        pruned = copy.deepcopy(pruned)
        with torch.no_grad():
            pruned.decode_head.conv_seg.weight.mul_(-1)
        right(folder, name, cfg, pruned, *rest)

    monkeypatch.setattr(exporting, '_write_pair', wrong)
    with pytest.raises((RuntimeError, ValueError)):
        export(
            project.load(tmp_path), str(trained.checkpoint), tmp_path / 'pair',
            'x')
    assert tree(tmp_path) == {}


@pytest.mark.parametrize('number', [float('nan'), float('inf')])
def test_weights_that_are_not_finite_are_an_error(project: Project,
                                                  trained: Trained,
                                                  changed: Change,
                                                  tmp_path: Path,
                                                  number: float) -> None:

    def spoil(content: dict[str, Any]) -> None:
        content['state_dict']['decode_head.conv_seg.bias'][0] = number

    checkpoint = changed(spoil)
    before = tree(tmp_path)
    with pytest.raises(ValueError, match='decode_head.conv_seg.bias'):
        export(project.load(tmp_path), str(checkpoint), tmp_path / 'pair', 'x')
    assert tree(tmp_path) == before


def test_folder_that_holds_files_is_left_as_it_is(project: Project,
                                                  trained: Trained,
                                                  tmp_path: Path) -> None:
    (tmp_path / 'pair').mkdir()
    (tmp_path / 'pair/thesis.tex').write_text('years of work')
    before = tree(tmp_path)
    with pytest.raises(ValueError, match='--out-dir'):
        export(
            project.load(tmp_path), str(trained.checkpoint), tmp_path / 'pair',
            'x')
    assert tree(tmp_path) == before


def test_file_in_place_of_the_folder_is_left_as_it_is(project: Project,
                                                      trained: Trained,
                                                      tmp_path: Path) -> None:
    (tmp_path / 'pair').write_text('years of work')
    with pytest.raises(ValueError, match='--out-dir'):
        export(
            project.load(tmp_path), str(trained.checkpoint), tmp_path / 'pair',
            'x')
    assert tree(tmp_path) == {'pair': b'years of work'}


def test_empty_folder_is_taken(project: Project, trained: Trained,
                               tmp_path: Path) -> None:
    (tmp_path / 'pair').mkdir()
    export(
        project.load(tmp_path),
        str(trained.checkpoint),
        tmp_path / 'pair',
        'x',
        evaluate=False)
    assert (tmp_path / 'pair/x_pruned.pth').is_file()
    assert [path.name for path in tmp_path.iterdir()] == ['pair']


def test_export_is_the_same_each_time(project: Project, trained: Trained,
                                      exported: Exported,
                                      tmp_path: Path) -> None:
    before = trained.checkpoint.read_bytes()
    export(
        project.load(tmp_path),
        str(trained.checkpoint),
        tmp_path / 'pair',
        NAME,
        evaluate=False)
    again = Exported(tmp_path / 'pair')
    assert again.config.read_text() == exported.config.read_text()
    states = [
        torch.load(one.checkpoint, weights_only=True)['state_dict']
        for one in (exported, again)
    ]
    assert list(states[0]) == list(states[1])
    assert all(
        torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert trained.checkpoint.read_bytes() == before


def test_without_data_random_inputs_are_compared_and_named(
        project: Project, trained: Trained, tmp_path: Path) -> None:
    outcome = run_tool(
        'export.py',
        trained.config,
        trained.checkpoint,
        '--out-dir',
        tmp_path / 'pair',
        '--no-eval',
        '--cfg-options',
        'test_dataloader.dataset.data_root=/nowhere',
        cwd=tmp_path)
    assert outcome.status == 0, outcome.stderr
    report = Exported(tmp_path / 'pair').report
    assert 'random' in report.compared_on
    assert report.max_rel_diff <= 1e-4
    assert report.network('gated').metrics is None
    assert report.network('pruned').metrics is None and report.metric is None
    assert 'random' in (tmp_path / 'pair/report.md').read_text()


def test_config_without_a_test_set_exports_too(project: Project,
                                               trained: Trained,
                                               tmp_path: Path) -> None:
    cfg = project.load(tmp_path)
    for split in ('val', 'test'):
        for key in ('dataloader', 'evaluator', 'cfg'):
            cfg.pop(f'{split}_{key}')
    report = export(
        cfg, str(trained.checkpoint), tmp_path / 'pair', 'x', evaluate=False)
    assert 'random' in report.compared_on


def test_checkpoint_is_read_without_running_code_from_it(
        trained: Trained, tmp_path: Path) -> None:
    state, meta = read_checkpoint(str(trained.checkpoint))
    assert 'gdp.gates.theta' in state and meta['dataset_meta']['classes']

    class Bomb:

        def __reduce__(self) -> Any:
            return (tmp_path / 'exploded').touch, ()

    torch.save(dict(state_dict={}, bomb=Bomb()), tmp_path / 'bomb.pth')
    with pytest.raises(ValueError, match='but .* holds pathlib'):
        read_checkpoint(str(tmp_path / 'bomb.pth'))
    assert not (tmp_path / 'exploded').exists()


def test_own_base_class_survives_export(project: Project,
                                        tmp_path: Path) -> None:
    """Two heads in a row, whose class nobody named."""
    cfg = project.load(tmp_path)
    cfg.model = with_two_heads(cfg.model)
    runner, _ = train(cfg)
    report = export(
        cfg,
        str(next(tmp_path.glob('iter_*.pth'))),
        tmp_path / 'pair',
        NAME,
        evaluate=False)
    assert report.max_rel_diff <= 1e-4
    exported = Exported(tmp_path / 'pair')
    assert Config.fromfile(
        exported.config).model.base == 'CascadeEncoderDecoder'
    assert type(_load(exported)) is type(runner.model)


def test_predictions_are_compared_and_not_only_logits(
        project: Project, trained: Trained, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    """The class of a model may do more in ``predict`` than in ``tensor``."""
    right = exporting.load_exported

    def wrong(folder: Path, name: str) -> nn.Module:
        model: Any = right(folder, name)
        predict = model.predict

        def other(inputs: Tensor, samples: Any = None) -> Any:
            results = predict(inputs, samples)
            for result in results:
                result.seg_logits.data += result.seg_logits.data.abs().max()
            return results

        model.predict = other
        return model

    monkeypatch.setattr(exporting, 'load_exported', wrong)
    with pytest.raises(RuntimeError, match='but got a relative difference'):
        export(
            project.load(tmp_path),
            str(trained.checkpoint),
            tmp_path / 'pair',
            'x',
            evaluate=False)
    assert tree(tmp_path) == {}


def test_metrics_that_differ_are_an_error(
        project: Project, trained: Trained, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    found = iter([dict(mIoU=50.46), dict(mIoU=47.93)])
    monkeypatch.setattr(exporting, 'run_test', lambda *_: next(found))
    with pytest.raises(RuntimeError, match='but got mIoU 50.46 and 47.93'):
        export(
            project.load(tmp_path), str(trained.checkpoint), tmp_path / 'pair',
            'x')
    assert tree(tmp_path) == {}


@pytest.mark.parametrize('gated, pruned, agree', [
    (dict(mIoU=50.), dict(mIoU=50.004), True),
    (dict(mIoU=50.), dict(mIoU=49.), False),
    (dict(mIoU=50., aAcc=90.), dict(mIoU=50.), False),
    (dict(IoU=float('nan')), dict(IoU=float('nan')), True),
    (dict(IoU=float('nan')), dict(IoU=1.), False),
    (dict(loss=0.), dict(loss=0.), True),
])
def test_metrics_agree_within_rounding(gated: dict[str, float],
                                       pruned: dict[str, float],
                                       agree: bool) -> None:
    if agree:
        assert check_metrics(gated, pruned) is None
        return
    with pytest.raises(RuntimeError, match='expected equal metrics'):
        check_metrics(gated, pruned)


def test_an_export_that_cannot_be_trained_is_an_error(
        project: Project, trained: Trained, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    right = exporting.load_exported

    def wrong(folder: Path, name: str) -> nn.Module:
        model: Any = right(folder, name)

        def loss(*_: Any) -> None:
            raise RuntimeError('expected 64 channels')

        model.loss = loss
        return model

    monkeypatch.setattr(exporting, 'load_exported', wrong)
    with pytest.raises(
            RuntimeError, match='but got RuntimeError: expected 64 channels'):
        export(
            project.load(tmp_path),
            str(trained.checkpoint),
            tmp_path / 'pair',
            'x',
            evaluate=False)
    assert tree(tmp_path) == {}


def test_a_model_that_cannot_be_trained_at_all_is_exported(
        project: Project, trained: Trained,
        monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss that fails with gates too says nothing about the export."""
    model = copy.deepcopy(trained.runner.model)
    other = copy.deepcopy(model)
    for one in (model, other):
        one.loss = None
    assert check_trainable(Config(), model, other, print) is None


@MODELS.register_module()
class DrawingSegmentor(EncoderDecoder):
    """Draws numbers when it predicts."""

    def encode_decode(self, inputs: Tensor, batch_img_metas: Any) -> Tensor:
        logits = super().encode_decode(inputs, batch_img_metas)
        return logits + torch.randn_like(logits)


def test_metrics_of_a_network_that_draws_numbers_are_the_same_each_time(
        project: Project, tmp_path: Path) -> None:
    cfg = project.load(tmp_path)
    model = build(dict(ModelConfig.of(cfg).ungated,
                       type='DrawingSegmentor')).eval()
    first, second = (run_test(cfg, model) for _ in range(2))
    assert first == second
