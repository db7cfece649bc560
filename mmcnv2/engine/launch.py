"""What the tools have in common."""

import os
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Iterator
from difflib import get_close_matches
from inspect import signature
from pathlib import Path
from typing import Any

import torch.distributed
from mmengine.config import Config, DictAction
from mmengine.device import get_device
from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.hooks import CheckpointHook as _CheckpointHook
from mmengine.hooks import Hook
from mmengine.registry import DATASETS, RUNNERS
from mmengine.runner import FlexibleRunner, Runner

from ..datasets.coco_check import check_coco
from .checkpoint import find_resumable
from .exact_resume import make_resumable
from .nonfinite_loss import NonFiniteLossHook


def add_common_arguments(parser: ArgumentParser) -> None:
    """Add the arguments that training and testing share.

    Args:
        parser: Gets ``config``, ``--work-dir``, ``--cfg-options``, ``--launcher`` and
            ``--local_rank``.
    """
    add_config_arguments(parser)
    parser.add_argument(
        '--work-dir',
        help="where logs and checkpoints go; the config's work_dir, or else "
        './work_dirs/ with the name of the config, if left out',
    )
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='what started this process as one of several',
    )
    # torch.distributed.launch passes it; torchrun sets LOCAL_RANK instead.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)


def add_config_arguments(parser: ArgumentParser) -> None:
    """Add the arguments that say which config is meant.

    Args:
        parser: Gets ``config`` and ``--cfg-options``.
    """
    parser.add_argument('config', type=config_path, help='path of the config')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        help='settings that override the config, as key=value; a list is key="[a,b]" '
        'or key=a,b, and the quotation marks are needed',
    )


def config_path(text: str) -> str:
    """Accept the path of a file that exists; a type for argparse.

    Args:
        text: What was given.

    Returns:
        The same.

    Raises:
        ArgumentTypeError: If there is no such file.
    """
    if Path(text).is_file():
        return text
    raise ArgumentTypeError(
        f'there is no file {text} (working folder: {Path.cwd()}); give the path of a '
        'config, such as configs/demo/mask-rcnn_convnextv2-atto_fpn_demo.py'
    )


def checkpoint_path(text: str) -> str:
    """Accept the path of a file that exists, or a URL; a type for argparse.

    Args:
        text: What was given.

    Returns:
        The same.

    Raises:
        ArgumentTypeError: If it is neither.
    """
    if '://' in text or Path(text).expanduser().is_file():
        return text
    raise ArgumentTypeError(
        f'there is no file {text} (working folder: {Path.cwd()}); give the path of a '
        'checkpoint, such as work_dirs/NAME/epoch_12.pth'
    )


def read_config(args: Namespace) -> Config:
    """Read the config that ``config`` and ``--cfg-options`` describe.

    Args:
        args: Of :func:`add_config_arguments`.

    Returns:
        The config.

    Raises:
        SystemExit: If an option is nearly a setting of the config, and none.
    """
    cfg = _Config()
    cfg.__setstate__(Config.fromfile(args.config).__getstate__())
    _check_names(args.cfg_options or {}, cfg)
    cfg.merge_from_dict(args.cfg_options or {})
    return cfg


def load_config(args: Namespace) -> Config:
    """Read the config, ready for the run that the common arguments describe.

    It tells MMEngine by ``LOCAL_RANK`` which process of a machine this is.

    Args:
        args: Of :func:`add_common_arguments`.

    Returns:
        The config, with launcher and work dir.

    Raises:
        SystemExit: As of :func:`read_config`.
    """
    # MMEngine takes the device of a process from Open MPI's name, that of its model
    # from torchrun's.
    local_rank = os.environ.get('OMPI_COMM_WORLD_LOCAL_RANK', str(args.local_rank))
    os.environ.setdefault('LOCAL_RANK', local_rank)
    cfg = read_config(args)
    cfg.launcher = args.launcher
    default_work_dir = str(Path('work_dirs', Path(args.config).stem))
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or default_work_dir
    return cfg


def build_runner(cfg: Config, start: str | None = None) -> Runner:
    """Build the config's runner, also for several processes without accelerators.

    Where ``auto_scale_lr`` is enabled it counts accumulated batches too. Training is
    exactly resumable, and losses that are not finite stop it
    (:class:`~mmcnv2.engine.NonFiniteLossHook`) also where the config says nothing of
    them. It resumes from the last checkpoint that can be read, and refuses a file of
    weights alone.

    Args:
        cfg: A config that is ready to run.
        start: Checkpoint to load if it is to resume by itself and there is nothing to
            resume from.

    Returns:
        The runner.

    Raises:
        SystemExit: If ``auto_scale_lr`` is enabled without ``base_batch_size``.
    """
    _check_auto_scale_lr(cfg)
    _save_safely(cfg)
    if cfg.launcher == 'pytorch' and get_device() == 'cpu':
        _distribute_over_cpus(cfg)
    runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
    _count_accumulated_batches(runner, cfg)
    runner.register_hook(_ResumeFromRuns(), priority='VERY_HIGH')
    if not any(isinstance(hook, NonFiniteLossHook) for hook in runner.hooks):
        runner.register_hook(NonFiniteLossHook())
    make_resumable(runner)
    if runner._resume is True and runner._load_from is None:
        found = _found_by_first(runner.work_dir)
        runner._load_from, runner._resume = found or start, found is not None
    return runner


def leave_process_group() -> None:
    """Leave the process group, if there is one, when all that a tool does is done.

    A thread of Gloo that holds a last result while the interpreter ends may abort the
    process (https://github.com/pytorch/pytorch/pull/179291).
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def check_annotations(*loaders: dict | None) -> None:
    """Check the annotation files of data loaders, as far as they are COCO's.

    Args:
        *loaders: Configs of data loaders; None has nothing to check.

    Raises:
        SystemExit: A file would stop training somewhere, or teach what is wrong; see
            :func:`~mmcnv2.datasets.check_coco`.
    """
    if not is_main_process():
        return
    for path, dataset in _coco_datasets(loaders):
        names = (dataset.get('metainfo') or {}).get('classes')
        if names is None:
            names = DATASETS.get('mmdet.CocoDataset').METAINFO['classes']
        pipeline = dataset.get('pipeline') or []
        try:
            check_coco(
                path,
                # The path of a list of names is left to MMEngine.
                classes=None if isinstance(names, str) else names,
                masks=any(isinstance(t, dict) and t.get('with_mask') for t in pipeline),
                test_mode=dataset.get('test_mode', False),
            )
        except ValueError as error:
            raise SystemExit(str(error)) from None


def _coco_datasets(config: Any) -> Iterator[tuple[Path, dict]]:
    """Look for them in wrappers; a file that is not there is MMDetection's matter."""
    if isinstance(config, list | tuple):
        for each in config:
            yield from _coco_datasets(each)
    if not isinstance(config, dict):
        return
    kind = config.get('type')
    if isinstance(kind, str) and kind.split('.')[-1] == 'CocoDataset':
        path = Path(config.get('data_root') or '', config.get('ann_file') or '')
        if path.is_file():
            yield path, config
        return
    yield from _coco_datasets(list(config.values()))


class _Config(Config):
    """Is laid out anew when it has changed, and not each of five times in a run."""

    _laid_out = ('', '')

    @property
    def pretty_text(self) -> str:
        content = repr(self.to_dict())
        if content != self._laid_out[0]:
            # What is set in the ordinary way becomes a part of the config.
            object.__setattr__(self, '_laid_out', (content, super().pretty_text))
        return self._laid_out[1]


class _ResumeFromRuns(Hook):
    """Refuse to resume from weights alone, before any of them is loaded."""

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        needed = {'meta', 'message_hub'}
        # Strategies keep their own, elsewhere, or fail for want of it.
        if not hasattr(runner, 'strategy'):
            needed.add('optimizer')
        if not runner._resume or needed <= checkpoint.keys():
            return
        raise SystemExit(
            f'Cannot resume from {runner._load_from}: it holds weights, but not how '
            'far training and its optimizer had come; nor do the best checkpoints, and '
            'those of save_optimizer=False. To start a new run from these weights '
            f'leave --resume out and add --cfg-options load_from={runner._load_from}, '
            "or, for the backbone alone, model.backbone.init_cfg = dict(type='"
            "Pretrained', checkpoint=...) in the config."
        )


def _check_names(options: dict[str, Any], cfg: Config) -> None:
    """Refuse what is nearly a setting: MMEngine would take it for a variable."""
    known = {*signature(Runner).parameters, *signature(FlexibleRunner).parameters}
    for key in options:
        name = key.split('.')[0]
        close = get_close_matches(name, known, 1, cutoff=0.8)
        if close and name not in known and name not in cfg:
            raise SystemExit(
                f'--cfg-options {key}: neither the config nor MMEngine has {name!r}. '
                f'Did you mean {close[0]!r}?'
            )


def _check_auto_scale_lr(cfg: Config) -> None:
    scale = cfg.get('auto_scale_lr') or {}
    if scale.get('enable') and 'base_batch_size' not in scale:
        raise SystemExit(
            '--auto-scale-lr, or enable=True in auto_scale_lr, needs auto_scale_lr = '
            'dict(base_batch_size=...) in the config: the number of pictures of a '
            'step, over all processes and accumulated batches, that its learning rate '
            'is for.'
        )


def _save_safely(cfg: Config) -> None:
    hooks = cfg.get('default_hooks') or {}
    hook = hooks.get('checkpoint', dict(type='CheckpointHook'))
    plain = (_CheckpointHook, 'CheckpointHook', 'mmengine.CheckpointHook')
    if hook and hook.get('type') in plain:
        hook = {**hook, 'type': 'mmcnv2.CheckpointHook'}
    cfg.default_hooks = {**hooks, 'checkpoint': hook}


def _found_by_first(work_dir: str) -> str | None:
    """Let one process look for a checkpoint, so that all take the same."""
    found = [find_resumable(work_dir) if is_main_process() else None]
    broadcast_object_list(found)
    return found[0]


def _count_accumulated_batches(runner: Runner, cfg: Config) -> None:
    if not (cfg.get('auto_scale_lr') or {}).get('enable'):
        return
    # MMEngine compares with a single batch of each process. The config stays as it is,
    # for it is stored, and somebody may start from it.
    flexible = hasattr(runner, 'strategy')
    scale = runner.strategy._auto_scale_lr if flexible else runner.auto_scale_lr
    scale['base_batch_size'] /= cfg.optim_wrapper.get('accumulative_counts', 1)


def _distribute_over_cpus(cfg: Config) -> None:
    # MMEngine would choose a CUDA device, whichever backend is configured. It starts no
    # process group where there is one, and asks the config before it names a device.
    torch.distributed.init_process_group('gloo')
    cfg.model_wrapper_cfg = {
        'type': 'MMDistributedDataParallel',
        'broadcast_buffers': False,
        'find_unused_parameters': cfg.get('find_unused_parameters', False),
        **(cfg.get('model_wrapper_cfg') or {}),
        'device_ids': None,
    }
