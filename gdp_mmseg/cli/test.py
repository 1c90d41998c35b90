# Copyright (c) OpenMMLab. All rights reserved.
"""Test: mmseg's tools/test.py with checks of config, data, checkpoint."""
from __future__ import annotations

import argparse
import inspect
import os
import os.path as osp
from typing import Any

from mmengine.config import Config, DictAction
from mmengine.registry import METRICS
from mmengine.runner import Runner

from ..engine.config import name_of
from .checks import join_processes_, load_config, verify_checkpoint
from .data_checks import check_paths
from .errors import fail, held_output, one_line_errors
from .names import find_class


def parse_args() -> argparse.Namespace:
    """Parse mmseg's flags of a test."""
    parser = argparse.ArgumentParser(
        description='MMSeg test (and eval) a model')
    parser.add_argument('config', help='train config file path')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument(
        '--work-dir',
        help=('if specified, the evaluation metric results will be dumped'
              'into the directory as json'))
    parser.add_argument(
        '--out',
        type=str,
        help='The directory to save output prediction for offline evaluation')
    parser.add_argument(
        '--show', action='store_true', help='show prediction results')
    parser.add_argument(
        '--show-dir',
        help='directory where painted images will be saved. '
        'If specified, it will be automatically saved '
        'to the work_dir/timestamp/show_dir')
    parser.add_argument(
        '--wait-time', type=float, default=2, help='the interval of show (s)')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        help='override some settings in the used config, the key-value pair '
        'in xxx=yyy format will be merged into config file. If the value to '
        'be overwritten is a list, it should be like key="[a,b]" or key=a,b '
        'It also allows nested list/tuple values, e.g. key="[(a,b),(c,d)]" '
        'Note that the quotation marks are necessary and that no white space '
        'is allowed.')
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='job launcher')
    parser.add_argument(
        '--tta', action='store_true', help='Test time augmentation')
    # When using PyTorch version >= 2.0.0, the `torch.distributed.launch`
    # will pass the `--local-rank` parameter to `tools/train.py` instead
    # of `--local_rank`.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)
    args = parser.parse_args()
    if 'LOCAL_RANK' not in os.environ:
        os.environ['LOCAL_RANK'] = str(args.local_rank)

    return args


def trigger_visualization_hook(cfg: Config,
                               args: argparse.Namespace) -> Config:
    """Switch on the drawing of predictions."""
    default_hooks = cfg.default_hooks
    if 'visualization' in default_hooks:
        visualization_hook = default_hooks['visualization']
        # Turn on visualization
        # The hook of mmpretrain has other options than that of mmseg.
        classifies = name_of(visualization_hook['type']) == 'VisualizationHook'
        visualization_hook['enable' if classifies else 'draw'] = True
        if args.show:
            visualization_hook['show'] = True
            visualization_hook['wait_time'] = args.wait_time
        if args.show_dir and classifies:
            visualization_hook.update(out_dir=args.show_dir, interval=1)
        elif args.show_dir:
            visualizer = cfg.visualizer
            visualizer['save_dir'] = args.show_dir
    else:
        fail('expected default_hooks.visualization for --show and --show-dir, '
             'but got none; add visualization=dict('
             "type='SegVisualizationHook') to default_hooks")

    return cfg


def check_tta(cfg: Config) -> None:
    """Fail if a config has no augmentation for its test."""
    missing = [key for key in ('tta_pipeline', 'tta_model') if key not in cfg]
    if missing:
        fail(
            'expected tta_pipeline and tta_model in the config for --tta, but '
            f'got no {" and no ".join(missing)}; add it, or do not pass '
            '--tta')


def check_evaluator(evaluator: Any) -> None:
    """Fail if an evaluator cannot write the predictions to a folder."""
    kind = evaluator.get('type') if isinstance(evaluator, dict) else evaluator
    found = find_class(METRICS, kind)
    options = inspect.signature(found).parameters if callable(found) else {}
    if 'output_dir' not in options:
        fail('expected a test_evaluator with the option output_dir for --out, '
             f'such as IoUMetric, but got {kind}; do not pass --out')


@one_line_errors()
def main() -> None:
    """Evaluate a checkpoint on the test set of a config."""
    args = parse_args()

    # load config
    cfg = load_config(args.config, args.cfg_options)
    cfg.launcher = args.launcher
    verify_checkpoint(args.checkpoint, cfg)
    check_paths(cfg, splits=('test', ))
    join_processes_(cfg, args.launcher)

    # work_dir is determined in this priority: CLI > segment in file > filename
    if args.work_dir is not None:
        # update configs according to CLI args if args.work_dir is not None
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir', None) is None:
        # use config filename as default work_dir if cfg.work_dir is None
        cfg.work_dir = osp.join('./work_dirs',
                                osp.splitext(osp.basename(args.config))[0])

    cfg.load_from = args.checkpoint

    if args.show or args.show_dir:
        cfg = trigger_visualization_hook(cfg, args)

    if args.tta:
        check_tta(cfg)
        cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
        cfg.tta_model.module = cfg.model
        cfg.model = cfg.tta_model

    # add output_dir in metric
    if args.out is not None:
        check_evaluator(cfg.test_evaluator)
        cfg.test_evaluator['output_dir'] = args.out
        cfg.test_evaluator['keep_results'] = True

    # build the runner from config
    with held_output():
        runner = Runner.from_cfg(cfg)

    # start testing
    runner.test()


if __name__ == '__main__':
    main()
