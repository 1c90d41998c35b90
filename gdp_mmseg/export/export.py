"""Export of a trained, gated checkpoint to a pruned config and checkpoint.

All files are written to a folder with a temporary name and verified there,
then the folder is renamed. So a folder that exists is a complete one.
"""
from __future__ import annotations

import copy
import dataclasses
import math
import tempfile
from pathlib import Path
from typing import Any, Mapping

import torch
from mmengine.config import Config
from mmengine.runner import Runner
from torch import nn

from ..analysis.structure import Analysis
from ..analysis.tracer import clone_model, fixed_seeds
from ..engine.checkpoint import other_versions, read_checkpoint, save_exported
from ..engine.forwards import count_inference_flops, inference_forward
from ..engine.model import find_pruner
from ..engine.pruned_config import pruned_config, write_config
from ..packages import ONNX, check_packages
from ..pruner.pruner import Pruner
from ..report.measure import count_parameters, paired_latency_ms
from ..report.plots import draw_record
from ..report.record import RECORD
from ..report.summary import (dead_parts, kept_by_group, kept_by_part,
                              note_on_widths)
from ..report.tables import NetworkRow, Report, markdown, scalar_metrics
from ..surgery.prune import prune
from ..surgery.widths import Widths
from ..version import __version__
from .compare import (Comparison, Progress, check_metrics, check_trainable,
                      compare)
from .deploy import deploy
from .folder import check_out_dir, new_folder, writing
from .networks import build_networks, enter_scope, load_dense, load_exported

_PICTURE = 'gates.png'
# A network and the config whose test loop evaluates it.
Tested = tuple[Config, nn.Module]


def export(cfg: Config,
           checkpoint: str,
           out_dir: str | Path,
           name: str,
           evaluate: bool = True,
           progress: Progress = print,
           dense_checkpoint: str | None = None,
           onnx: Mapping[str, bool] | None = None) -> Report:
    """Prune a gated checkpoint, verify and evaluate the result, write it.

    Args:
        cfg (Config): Config of the gated training.
        checkpoint (str): Path of the checkpoint.
        out_dir (str | Path): A new or empty folder. It gets
            ``<name>_pruned.py``, ``<name>_pruned.pth``, ``report.json`` and
            ``report.md``, and ``gates.png`` if the record of the gates lies
            beside the checkpoint.
        name (str): Name of the config.
        evaluate (bool): Whether to run the config's test loop on the gated
            and on the pruned network.
        progress (Callable[[str], None]): Called with a line now and then.
        dense_checkpoint (str, optional): Checkpoint of a training of the same
            model without gates. It is evaluated too, and fills the metrics of
            the dense network.
        onnx (Mapping[str, bool], optional): ``dynamic`` and ``argmax`` of an
            ONNX file that is written too, see
            :func:`gdp_mmseg.export.onnx.to_onnx`. Defaults to none.

    Raises:
        ValueError: If config, checkpoint and folder do not fit together.
        RuntimeError: If gated and pruned network differ: in their outputs by
            more than 1e-4, in a metric, or because only the pruned one cannot
            be trained.
    """
    out_dir = Path(out_dir)
    check_out_dir(out_dir)
    if onnx is not None:
        check_packages('--onnx', *ONNX)
    _check_evaluation(cfg, evaluate, dense_checkpoint)
    enter_scope(cfg)
    state, meta = read_checkpoint(checkpoint)
    dense, gated = build_networks(cfg, state, meta)
    trained_dense = (None if dense_checkpoint is None else load_dense(
        dense, dense_checkpoint))
    changed = other_versions(meta)
    if changed:
        progress(f'note: trained with other versions: {changed}')
    pruner = find_pruner(gated)
    pruned, widths = prune(dense, pruner.analysis, pruner.gates.decided())
    with new_folder(out_dir) as partial:
        with writing(out_dir):
            _write_pair(partial, name, cfg, pruned, widths, meta)
        progress('comparing the gated network and the exported files')
        exported = load_exported(partial, name)
        comparison = compare(cfg, gated, exported, evaluate, progress, dense)
        check_trainable(cfg, gated, exported, progress)
        report = _report(name, pruner,
                         dict(dense=dense, gated=gated, pruned=pruned),
                         comparison)
        _note_misses(report, pruner, progress)
        if onnx is not None:
            with writing(out_dir):
                report = deploy(
                    report, partial, cfg,
                    dict(dense=dense, gated=gated, pruned=exported), onnx,
                    progress)
        if evaluate:
            files = Config.fromfile(partial / f'{name}_pruned.py')
            report = _evaluated(
                report, (cfg, gated), (files, exported), progress,
                None if trained_dense is None else (cfg, trained_dense))
        with writing(out_dir):
            report = _with_picture(report, partial,
                                   Path(checkpoint).with_name(RECORD),
                                   pruner.analysis, meta.get('iter', math.inf),
                                   progress)
            report.write(partial / 'report.json')
            (partial / 'report.md').write_text(markdown(report))
    return report


def _check_evaluation(cfg: Config, evaluate: bool,
                      dense_checkpoint: str | None) -> None:
    """Check that the networks can be evaluated, if they are to be.

    Raises:
        ValueError: If they cannot.
    """
    if evaluate and not cfg.get('test_dataloader'):
        raise ValueError(
            'config: expected test_dataloader, test_evaluator and test_cfg to '
            'evaluate with, but got no test_dataloader; add them, e.g. '
            'test_dataloader = val_dataloader, or pass --no-eval')
    if dense_checkpoint is not None and not evaluate:
        raise ValueError('--dense: expected an evaluation, which is all that '
                         'it is for, but got --no-eval too; leave one of the '
                         'two out')


def _write_pair(folder: Path, name: str, cfg: Config, pruned: nn.Module,
                widths: Widths, meta: Mapping[str, Any]) -> None:
    """Write ``<name>_pruned.py`` and ``<name>_pruned.pth`` into a folder."""
    save_exported(folder / f'{name}_pruned.pth', pruned.state_dict(), widths,
                  meta)
    write_config(folder / f'{name}_pruned.py',
                 pruned_config(cfg, name, widths))


def _report(name: str, pruner: Pruner, networks: Mapping[str, nn.Module],
            comparison: Comparison) -> Report:
    """Measure the networks and describe what was kept."""
    analysis, settings = pruner.analysis, pruner.settings
    shape = analysis.input_shape
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    latencies = paired_latency_ms(
        [clone_model(model, device) for model in networks.values()],
        shape,
        inference_forward,
        known=comparison.rounds if device.type == 'cpu' else ())
    # Gates multiply kernels, so they leave the count as it is.
    flops = {
        name: count_inference_flops(networks[name], shape)
        for name in ('dense', 'pruned')
    }
    channels = pruner.channels()
    keep = channels.cpu() > 0
    rows = [
        NetworkRow(name, flops.get(name, flops['dense']),
                   count_parameters(model),
                   {f'pytorch {device.type}': latency})
        for (name, model), latency in zip(networks.items(), latencies)
    ]
    return Report(
        name=name,
        target=settings.target.ratio,
        target_type=settings.target.type,
        reached=float(pruner.cost(channels)),
        phases=list(settings.phases),
        input_shape=list(shape),
        networks=rows,
        parts=kept_by_part(analysis.groups, keep),
        dead=dead_parts(analysis, keep),
        groups=kept_by_group(analysis.groups, keep),
        max_rel_diff=comparison.max_rel_diff,
        compared_on=comparison.compared_on,
        torch=torch.__version__,
        gdp_mmseg=__version__)


def _note_misses(report: Report, pruner: Pruner, progress: Progress) -> None:
    """Say so if the network misses the target, or widths are no multiples."""
    left = report.reached
    if report.target_type == 'flops':
        # The count of torch, which does not depend on the analysis.
        left = report.share('flops')
    keep = pruner.channels().cpu() > 0
    notes = (pruner.note_on(left),
             note_on_widths(pruner.analysis, keep, pruner.settings.multiple))
    for note in filter(None, notes):
        progress(f'note: {note}')


def _evaluated(report: Report, gated: Tested, exported: Tested,
               progress: Progress, dense: Tested | None) -> Report:
    """Evaluate networks by their configs and add the metrics."""
    progress('evaluating the gated network')
    metrics = dict(gated=scalar_metrics(run_test(*gated)))
    progress('evaluating the exported files')
    metrics['pruned'] = scalar_metrics(run_test(*exported))
    check_metrics(metrics['gated'], metrics['pruned'])
    if dense is not None:
        progress('evaluating the dense network')
        metrics['dense'] = scalar_metrics(run_test(*dense))
    return report.with_metrics(metrics)


def _with_picture(report: Report, folder: Path, record: Path,
                  analysis: Analysis, until: float,
                  progress: Progress) -> Report:
    """Draw the record of a training into a folder, if there is one."""
    try:
        figure = draw_record(record, analysis.groups, until)
    except ValueError as error:
        progress(f'note: no picture of the gates: {error}')
        return report
    if figure is None:
        return report
    figure.savefig(folder / _PICTURE)
    return dataclasses.replace(report, gates_picture=_PICTURE)


def run_test(cfg: Config, model: nn.Module) -> dict[str, Any]:
    """Run the config's test loop on a model that is built and loaded.

    Returns:
        dict[str, Any]: Metrics as the evaluator returns them.
    """
    # A forward may draw random numbers; two networks that are compared have to
    # draw the same ones. A runner without a seed would choose one at random.
    with tempfile.TemporaryDirectory() as folder, fixed_seeds():
        runner = Runner(
            model=model,
            work_dir=folder,
            test_dataloader=copy.deepcopy(cfg.test_dataloader),
            test_evaluator=copy.deepcopy(cfg.test_evaluator),
            test_cfg=copy.deepcopy(cfg.test_cfg),
            default_scope=cfg.get('default_scope', 'mmseg'),
            randomness=dict(seed=0),
            log_processor=cfg.get('log_processor'),
            env_cfg=cfg.get('env_cfg', dict(dist_cfg=dict(backend='gloo'))),
            log_level='WARNING',
            experiment_name=Path(folder).name)
        return runner.test()
