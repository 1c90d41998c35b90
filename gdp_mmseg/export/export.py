"""From a trained, gated checkpoint to a pruned config and checkpoint.

Everything is made in a folder of a temporary name, proven there, and renamed:
a folder that exists is a complete one.
"""
from __future__ import annotations

import copy
import dataclasses
import math
import tempfile
from pathlib import Path
from typing import Any, Mapping

import numpy as np
import torch
from mmengine.config import Config
from mmengine.runner import Runner
from torch import nn

from ..analysis.structure import Analysis
from ..engine.checkpoint import (closed_gates, other_versions, read_checkpoint,
                                 save_exported)
from ..engine.compat import moves_gates
from ..engine.config import default_base, without_pretrained
from ..engine.model import find_pruner
from ..engine.monitor import RECORD, path_figure
from ..files import write_json
from ..pruner.settings import COSTS
from ..report.measure import count_macs, count_parameters, paired_latency_ms
from ..report.summary import dead_parts, kept_by_part
from ..report.tables import Progress, markdown
from ..surgery.prune import prune
from ..surgery.widths import Widths
from ..version import __version__
from .compare import compare
from .folder import check_out_dir, new_folder, writing
from .networks import build_dense, build_gated, enter_scope, load_exported


def export(cfg: Config,
           checkpoint: str,
           out_dir: str | Path,
           name: str,
           evaluate: bool = True,
           progress: Progress = print) -> dict[str, Any]:
    """Prune a gated checkpoint, prove it, evaluate it, write it.

    Args:
        cfg (Config): The config that it was trained with.
        checkpoint (str): Its path.
        out_dir (str | Path): A folder that does not exist or is empty; gets
            ``<name>_pruned.py``, ``<name>_pruned.pth``, ``report.json`` and
            ``report.md``; and ``gates.png``, the gates' path, if its record
            lies beside the checkpoint.
        name (str): Of the config.
        evaluate (bool): Whether to run the config's test loop on both.
        progress (Callable[[str], None]): Gets a line now and then.

    Returns:
        dict[str, Any]: What ``report.json`` holds.

    Raises:
        ValueError: If config, checkpoint and folder do not fit together.
        RuntimeError: If gated and pruned outputs differ by more than 1e-4.
    """
    out_dir = Path(out_dir)
    check_out_dir(out_dir)
    if evaluate and not cfg.get('test_dataloader'):
        raise ValueError(
            'config: expected test_dataloader, test_evaluator and test_cfg to '
            'evaluate with, but got no test_dataloader; add them, e.g. '
            'test_dataloader = val_dataloader, or pass --no-eval')
    enter_scope(cfg)
    state, meta = read_checkpoint(checkpoint)
    gated = build_gated(cfg, state)
    dense = build_dense(cfg, state)
    pruner = find_pruner(gated)
    closed_gates(pruner.analysis, state, meta)
    changed = other_versions(meta)
    if changed:
        progress(f'note: trained with other versions: {changed}')
    pruned, widths = prune(dense, pruner.analysis, pruner.gates.openness())
    report = dict(name=name, **_measure(gated, dense, pruned))
    target = pruner.settings.target
    if report['cost_pruned'] > target.ratio + 0.01:
        progress(f'note: {report["cost_pruned"]:.3f} of the '
                 f'{COSTS[target.type]} are left, asked for {target.ratio}; '
                 'is the pruning phase over in this checkpoint?')
    with new_folder(out_dir) as partial:
        with writing(out_dir):
            _write_pair(partial, name, cfg, pruned, widths, meta)
        progress('comparing the gated network and the exported files')
        exported = load_exported(partial, name)
        report.update(compare(cfg, gated, exported, needs_data=evaluate))
        if evaluate:
            progress('evaluating the gated network')
            report.update(_metrics(run_test(cfg, gated), 'gated'))
            progress('evaluating the exported files')
            files = Config.fromfile(partial / f'{name}_pruned.py')
            report.update(_metrics(run_test(files, exported), 'pruned'))
        else:
            report.update(miou_gated=None, miou_pruned=None)
        with writing(out_dir):
            report['gates_picture'] = draw_record(
                partial,
                Path(checkpoint).with_name(RECORD), pruner.analysis,
                meta.get('iter', math.inf), progress)
            write_json(partial / 'report.json', report)
            (partial / 'report.md').write_text(markdown(report))
    return report


def draw_record(folder: Path, record: Path, analysis: Analysis, until: float,
                progress: Progress) -> str | None:
    """Name of the picture of a training's record, if there is one."""
    try:
        figure = path_figure(record, analysis.groups, until)
    except (ValueError, KeyError, TypeError) as error:
        progress(f'note: no picture of the gates: {error}')
        return None
    if figure is None:
        return None
    figure.savefig(folder / 'gates.png')
    return 'gates.png'


def _measure(gated: nn.Module, dense: nn.Module,
             pruned: nn.Module) -> dict[str, Any]:
    """The report's sizes and times."""
    pruner = find_pruner(gated)
    shape = pruner.analysis.input_shape
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    latencies = paired_latency_ms(
        [copy.deepcopy(model).to(device) for model in (dense, gated, pruned)],
        shape)
    channels = pruner.channels()
    keep = channels.cpu() > 0
    return dict(
        target=pruner.settings.target.ratio,
        target_type=pruner.settings.target.type,
        cost_pruned=float(pruner.cost(channels)),
        phases=list(pruner.settings.phases),
        input_shape=list(shape),
        macs_dense=count_macs(dense, shape),
        macs_pruned=count_macs(pruned, shape),
        params_dense=count_parameters(dense),
        params_pruned=count_parameters(pruned),
        latency_ms_dense=latencies[0],
        latency_ms_gated=latencies[1],
        latency_ms_pruned=latencies[2],
        device=str(device),
        torch=torch.__version__,
        gdp_mmseg=__version__,
        parts=[
            dataclasses.asdict(part)
            for part in kept_by_part(pruner.analysis.groups, keep)
        ],
        dead=dead_parts(pruner.analysis, keep),
        groups=[
            dict(
                writers=list(group.writers),
                readers=list(group.readers),
                channels=len(group.gates),
                kept=int(keep[group.gates].sum()))
            for group in pruner.analysis.groups
        ])


def _metrics(metrics: Mapping[str, Any], which: str) -> dict[str, Any]:
    # Also of classes one by one, which some metrics give as lists.
    plain = {
        key: float(value)
        for key, value in metrics.items() if np.ndim(value) == 0
    }
    return {f'miou_{which}': plain.get('mIoU'), f'metrics_{which}': plain}


def run_test(cfg: Config, model: nn.Module) -> dict[str, float]:
    """Run the config's test loop on a model that is built and loaded."""
    with tempfile.TemporaryDirectory() as folder:
        runner = Runner(
            model=model,
            work_dir=folder,
            test_dataloader=copy.deepcopy(cfg.test_dataloader),
            test_evaluator=copy.deepcopy(cfg.test_evaluator),
            test_cfg=copy.deepcopy(cfg.test_cfg),
            default_scope=cfg.get('default_scope', 'mmseg'),
            log_processor=cfg.get('log_processor'),
            env_cfg=cfg.get('env_cfg', dict(dist_cfg=dict(backend='gloo'))),
            log_level='WARNING',
            experiment_name=Path(folder).name)
        return runner.test()


def _write_pair(folder: Path, name: str, cfg: Config, pruned: nn.Module,
                widths: Widths, meta: Mapping[str, Any]) -> None:
    """``<name>_pruned.py`` and ``<name>_pruned.pth``."""
    save_exported(folder / f'{name}_pruned.pth', pruned.state_dict(), widths,
                  meta)
    pruned_config(cfg, name, widths).dump(folder / f'{name}_pruned.py')


def pruned_config(cfg: Config, name: str, widths: Widths) -> Config:
    """The config of the pruned model: stock tools read it.

    Training starts from the exported weights beside the config.
    """
    content = cfg.to_dict()
    model = without_pretrained(cfg).to_dict()
    model.update(type='gdp_mmseg.PrunedModel', gdp=dict(widths=widths))
    model.setdefault('base', default_base(model))
    model['init_cfg'] = dict(
        type='Pretrained',
        checkpoint='{{ fileDirname }}/' + f'{name}_pruned.pth')
    content['model'] = model
    hooks = content.get('default_hooks') or {}
    content['default_hooks'] = {
        key: hook
        for key, hook in hooks.items() if not moves_gates(hook)
    }
    if content.get('custom_hooks'):
        content['custom_hooks'] = [
            hook for hook in content['custom_hooks'] if not moves_gates(hook)
        ]
    for key in ('work_dir', 'load_from', 'resume'):
        content.pop(key, None)
    return Config(content)
