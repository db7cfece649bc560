"""Train with a config: any task, pre-training too."""

import argparse

# First, since it explains what may be wrong with the packages that follow.
import mmcnv2  # noqa: F401

# isort: split
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.runner import Runner

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
    parser.add_argument(
        '--amp', action='store_true', help='train in mixed precision (AmpOptimWrapper)'
    )
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='scale the learning rate from auto_scale_lr.base_batch_size to the actual '
        'number of pictures of a step, over all processes and accumulated batches',
    )
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        type=resume_path,
        help='go on from this checkpoint, or from the latest in the work dir if none '
        'is given',
    )
    return parser.parse_args()


def resume_path(text: str) -> str:
    return text if text == 'auto' else checkpoint_path(text)


def enable_amp(cfg: Config) -> None:
    wrapper = cfg.optim_wrapper
    kind = wrapper.get('type', 'OptimWrapper')
    if kind not in ('OptimWrapper', 'AmpOptimWrapper'):
        raise SystemExit(
            f'--amp turns OptimWrapper into AmpOptimWrapper, but optim_wrapper.type is '
            f'{kind}: leave --amp out and set up mixed precision in the config.'
        )
    if get_device() == 'cpu':
        raise SystemExit(
            '--amp needs an accelerator, and there is none: AmpOptimWrapper cannot run '
            'on CPUs. Leave --amp out.'
        )
    wrapper.type = 'AmpOptimWrapper'
    if cfg.get('default_scope') == 'mmcnv2':
        # What the paper's initial weights bring forth is too large for float16.
        wrapper.setdefault('dtype', 'bfloat16')
    wrapper.setdefault('loss_scale', 'dynamic')


def check_for_a_batch(runner: Runner) -> None:
    loader = runner.train_dataloader
    if len(loader):
        return
    raise SystemExit(
        f'There are {len(loader.dataset)} pictures to train on, fewer than a batch of '
        f'{loader.batch_sampler.batch_size} in each of {runner.world_size} processes, '
        'and unfinished batches are dropped. Take more pictures, or set '
        'train_dataloader.batch_size to fewer.'
    )


def main() -> None:
    args = parse_args()
    cfg = load_config(args)
    if args.amp:
        enable_amp(cfg)
    if args.auto_scale_lr:
        cfg.merge_from_dict({'auto_scale_lr.enable': True})
    start = cfg.get('load_from')
    if args.resume:
        cfg.resume = True
        # Without a path the runner looks for the latest checkpoint itself.
        cfg.load_from = None if args.resume == 'auto' else args.resume
    runner = build_runner(cfg, start)
    check_annotations(cfg.train_dataloader, cfg.get('val_dataloader'))
    check_for_a_batch(runner)
    runner.train()
    leave_process_group()


if __name__ == '__main__':
    main()
