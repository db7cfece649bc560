"""Test a checkpoint with a config: any task, pre-training too."""

import argparse
from inspect import signature
from pathlib import Path
from typing import NamedTuple

# First, since it explains what may be wrong with the packages that follow.
import mmcnv2  # noqa: F401

# isort: split
from mmengine.config import Config, ConfigDict
from mmengine.hooks import Hook
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.registry import METRICS
from mmengine.runner import Runner
from torch import nn

from mmcnv2.engine.launch import (
    add_common_arguments,
    build_runner,
    check_annotations,
    checkpoint_path,
    leave_process_group,
    load_config,
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_common_arguments(parser)
    parser.add_argument('checkpoint', type=checkpoint_path, help='path or URL')
    parser.add_argument(
        '--out',
        help='where predictions go: for segmentation a folder of label maps, otherwise '
        'a .pkl file',
    )
    parser.add_argument('--show', action='store_true', help='show each prediction')
    parser.add_argument('--show-dir', help='folder where painted predictions go')
    parser.add_argument(
        '--wait-time', type=float, default=2, help='seconds to show each for'
    )
    parser.add_argument(
        '--tta',
        action='store_true',
        help="test-time augmentation by the config's tta_model and tta_pipeline",
    )
    return parser.parse_args()


def enable_visualization(cfg: Config, args: argparse.Namespace) -> None:
    hook = (cfg.get('default_hooks') or {}).get('visualization')
    if hook is None:
        raise SystemExit(
            '--show and --show-dir need default_hooks.visualization in the config: '
            "as dict(type='DetVisualizationHook'), dict(type='SegVisualizationHook'), "
            "dict(type='mmpretrain.VisualizationHook') or "
            "dict(type='mmcnv2.ReconstructionVisualizationHook')."
        )
    # MMPretrain's hook has names of its own.
    classifies = cfg.get('default_scope') == 'mmpretrain'
    hook['enable' if classifies else 'draw'] = True
    # The segmentation hook would draw every 50th batch, that of classification every
    # 5000th picture, that of pre-training a part.
    hook.setdefault('interval', 1)
    if cfg.get('default_scope') == 'mmcnv2':
        hook.setdefault('num_pictures', None)
    if args.show:
        hook.show = True
        hook.wait_time = args.wait_time
    if not args.show_dir:
        return
    show_dir = str(Path(args.show_dir).absolute())
    if cfg.get('default_scope') == 'mmseg':
        cfg.visualizer.save_dir = show_dir
    else:
        # A relative path would be one inside the run's folder in the work dir.
        hook['out_dir' if classifies else 'test_out_dir'] = show_dir


def enable_tta(cfg: Config) -> None:
    missing = [name for name in ('tta_model', 'tta_pipeline') if name not in cfg]
    if missing:
        raise SystemExit(
            f'--tta needs {" and ".join(missing)} in the config: add them, or leave '
            '--tta out. MMDetection has it for boxes, not for masks.'
        )
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:
        dataset = dataset.dataset
    dataset.pipeline = cfg.tta_pipeline


def write_predictions(cfg: Config, out: str) -> None:
    evaluator = cfg.test_evaluator
    metrics = list(evaluator) if isinstance(evaluator, list | tuple) else [evaluator]
    if cfg.get('default_scope') == 'mmseg':
        # MMSegmentation leaves it to the first process, which others may be ahead of.
        Path(out).mkdir(parents=True, exist_ok=True)
        for metric in filter(writes_maps, metrics):
            # MMSegmentation would delete the folder of a Cityscapes metric otherwise.
            metric.update(output_dir=out, keep_results=True)
        return
    dump = (
        'mmdet.DumpDetResults' if cfg.get('default_scope') == 'mmdet' else 'DumpResults'
    )
    cfg.test_evaluator = [*metrics, {'type': dump, 'out_file_path': out}]


def writes_maps(metric: ConfigDict) -> bool:
    with METRICS.switch_scope_and_registry('mmseg') as registry:
        return 'output_dir' in signature(registry.get(metric.type)).parameters


class WholeModel(Hook):
    """Let loading fail where MMEngine would warn, and test what is half at random."""

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        model = runner.model
        while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
            model = model.module
        # The weights are loaded next.
        model.register_load_state_dict_post_hook(refuse_missing_parameters)


def refuse_missing_parameters(model: nn.Module, keys: NamedTuple) -> None:
    parameters = dict(model.named_parameters())
    missing = [name for name in keys.missing_keys if name in parameters]
    if missing:
        raise SystemExit(
            f'The checkpoint does not fit the config: it lacks {len(missing)} of '
            f'{len(parameters)} parameters of the model, {", ".join(missing[:3])} '
            'among them, which would stay as they are at the start of training. '
            'Give a checkpoint of the whole model, as tools/train.py writes it.'
        )


def main() -> None:
    args = parse_args()
    cfg = load_config(args)
    cfg.load_from = args.checkpoint
    if args.show or args.show_dir:
        enable_visualization(cfg, args)
    if args.tta:
        enable_tta(cfg)
    if args.out:
        write_predictions(cfg, args.out)
    runner = build_runner(cfg)
    check_annotations(cfg.test_dataloader)
    runner.register_hook(WholeModel())
    runner.test()
    leave_process_group()


if __name__ == '__main__':
    main()
