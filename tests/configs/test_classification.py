"""Classification, where mmpretrain is installed as CONTRIBUTING.md says."""

import pickle
import re
import runpy
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import transformers
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner

from mmcnv2.engine.conversion import convert_checkpoint, convert_weights
from mmcnv2.models import ARCHITECTURES

from ..test_commands import calls_of, folder  # noqa: F401
from .conftest import (
    CONFIGS,
    DIMS,
    Start,
    check_schedule,
    inherited,
    metafiles,
    replace,
    shorten,
    shrink_model,
)

pytest.importorskip('mmpretrain', reason='mmpretrain is absent')

CLASSES = ('dark', 'light')
SIDE = 64
FOLDER = CONFIGS / 'classification'
PAGE = 'configs/classification/README.md'
TOOLS = CONFIGS.parent / 'tools'
TINY = 'finetune_convnextv2-tiny_300e_imagenet.py'
PROBE = 'linear-probe_convnextv2-tiny_90e_imagenet.py'

# The paper's tables 9 to 11, for a batch of 1024: epochs, warm-up, learning rate (that
# of README.md for huge), weight decay, layer decay, label smoothing, mixup, cutmix and
# drop path.
PUBLISHED = {
    'atto': (600, 0, 8e-4, 0.3, 0.9, 0.2, 0, 0, 0.1),
    'femto': (600, 0, 8e-4, 0.05, 0.9, 0.2, 0.3, 0.3, 0.0),
    'pico': (600, 0, 8e-4, 0.3, 0.9, 0.2, 0.3, 0.3, 0.0),
    'nano': (600, 0, 8e-4, 0.3, 0.9, 0.2, 0.5, 0.5, 0.1),
    'tiny': (300, 40, 3.2e-3, 0.05, 0.9, 0.1, 0.8, 1.0, 0.2),
    'base': (100, 20, 2.5e-3, 0.05, 0.6, 0.1, 0.8, 1.0, 0.1),
    'large': (100, 20, 2.5e-3, 0.05, 0.6, 0.1, 0.8, 1.0, 0.2),
    'huge': (50, 10, 5e-4, 0.05, 0.75, 0.1, 0.8, 1.0, 0.3),
}


def name_of(arch: str) -> str:
    return f'finetune_convnextv2-{arch}_{PUBLISHED[arch][0]}e_imagenet.py'


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    """Pictures of two classes, in the folders of ImageNet."""
    root = tmp_path_factory.mktemp('imagenet')
    generator = np.random.default_rng(0)
    for split in ('train', 'val'):
        for label, name in enumerate(CLASSES):
            here = root / split / name
            here.mkdir(parents=True)
            for i in range(2):
                picture = generator.integers(0, 128, (SIDE, SIDE, 3), np.uint8)
                cv2.imwrite(str(here / f'{name}{i}.png'), picture + 128 * label)
    return root


def small(recipe, tmp_path, pictures):
    """Return the config, made to run a step within a second or two."""
    cfg = inherited(f'classification/{recipe}', tmp_path)
    shrink_model(cfg.model)
    count, dim = len(CLASSES), DIMS[-1]
    replace(cfg.model, dict(num_classes=count, in_channels=dim, input_features=dim))
    cfg.data_preprocessor.num_classes = count
    cfg.val_evaluator.topk = cfg.test_evaluator.topk = 1
    for split in ('train', 'val', 'test'):
        loader = cfg[f'{split}_dataloader']
        loader.update(num_workers=0, persistent_workers=False, batch_size=2)
        loader.dataset.update(
            data_root=str(pictures),
            metainfo=dict(classes=CLASSES),
            serialize_data=False,
        )
        replace(loader.dataset.pipeline, dict(scale=SIDE, crop_size=SIDE))
    shorten(cfg, tmp_path)
    return cfg


@pytest.fixture
def run_tool(tmp_path, monkeypatch):
    """Run a tool in this process, in which torchvision can be imported."""

    def run_tool(tool, *arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv('LOCAL_RANK', '0')
        monkeypatch.setattr(sys, 'argv', [tool, *map(str, arguments)])
        runpy.run_path(str(TOOLS / tool), run_name='__main__')

    return run_tool


@pytest.mark.parametrize(
    'recipe',
    # The other sizes differ from these in numbers alone.
    [
        TINY,
        name_of('atto'),
        name_of('base'),
        PROBE,
    ],
)
def test_trains_and_predicts(recipe, tmp_path, pictures):
    cfg = small(recipe, tmp_path, pictures)
    init_default_scope(cfg.default_scope)
    runner = Runner.from_cfg(cfg)
    start = Start()
    runner.register_hook(start)
    runner.train()

    losses = runner.message_hub.get_scalar('train/loss').data[0]
    assert len(losses) == 2
    assert np.isfinite(losses).all()
    frozen = {
        name
        for name in start.weights
        if recipe == PROBE and name.startswith('backbone.')
    }
    assert start.unmoved(runner.model) == frozen
    assert runner.message_hub.get_scalar('val/accuracy/top1').data[0].size == 1


def test_tools(tmp_path, pictures, run_tool):
    cfg = small(TINY, tmp_path, pictures)
    cfg.dump(tmp_path / 'tiny.py')
    run_tool('train.py', 'tiny.py')
    run_tool(
        *('test.py', 'tiny.py', 'epoch_1.pth'),
        *('--out', 'out.pkl', '--show-dir', 'shown', '--work-dir', 'tested'),
        *('--cfg-options', 'experiment_name=tested'),
    )
    scores = predictions(tmp_path / 'out.pkl')
    torch.testing.assert_close(scores.sum(1), torch.ones(4))
    painted = sorted((tmp_path / 'shown').iterdir())
    assert len(painted) == 4
    plain = cv2.imread(str(pictures / 'val' / 'dark' / 'dark0.png'))
    assert not np.array_equal(cv2.imread(str(painted[0])), plain)
    [log] = (tmp_path / 'tested').rglob('*.log')
    [top1] = re.findall(r'accuracy/top1: ([\d.]+)', log.read_text())
    right = scores.argmax(1) == torch.tensor([0, 0, 1, 1])
    assert float(top1) == 100 * right.float().mean()


def predictions(path):
    return torch.stack([each['pred_score'] for each in pickle.loads(path.read_bytes())])


def classifier() -> transformers.ConvNextV2ForImageClassification:
    """Build transformers' own, whose parameters all matter."""
    twin = transformers.ConvNextV2ForImageClassification(
        transformers.ConvNextV2Config(
            hidden_sizes=DIMS, depths=[1, 1, 1, 1], num_labels=len(CLASSES)
        )
    ).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in twin.parameters():
            param.add_(0.3 * torch.randn(param.shape, generator=generator))
    return twin


@pytest.mark.parametrize('target', ['ours', 'mmpretrain'])
def test_official_checkpoints_give_the_official_scores(
    target, tmp_path, pictures, run_tool
):
    """Ours after conversion; those that mmpretrain has converted, as they are."""
    twin = classifier()
    weights = convert_weights(twin.state_dict(), 'official').weights
    torch.save({'model': weights}, tmp_path / 'convnextv2_ema.pt')
    convert_checkpoint(tmp_path / 'convnextv2_ema.pt', tmp_path / 'cls.pth', target)
    cfg = small(TINY, tmp_path, pictures)
    cfg.dump(tmp_path / 'tiny.py')
    run_tool('test.py', 'tiny.py', 'cls.pth', '--out', 'out.pkl')

    paths = sorted((pictures / 'val').rglob('*.png'))
    inputs = torch.stack([normalised(path) for path in paths])
    expected = twin(inputs).logits.softmax(1)
    assert expected.std() > 0.1
    found = predictions(tmp_path / 'out.pkl')
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_commands_of_the_page(folder, pictures, run_tool):  # noqa: F811
    """They run as they stand, but for a small config, and in this one process."""
    calls = [call for call in calls_of(PAGE, folder) if call[0] == 'python']
    Path('configs').unlink()
    Path('configs', 'classification').mkdir(parents=True)
    for name in {
        Path(arg).name for call in calls for arg in call if '_imagenet' in arg
    }:
        cfg = small(name, folder, pictures)
        cfg.work_dir, cfg.experiment_name = 'work', name
        cfg.dump(f'configs/classification/{name}')
    weights = convert_weights(classifier().state_dict(), 'official').weights
    torch.save({'model': weights}, 'convnextv2_tiny_1k_224_ema.pt')
    convert_checkpoint('convnextv2_tiny_1k_224_ema.pt', 'released.pth', 'mmpretrain')
    for call in calls:
        script = next(i for i, arg in enumerate(call) if arg.endswith('.py'))
        args = call[script:]
        if '--launcher' in args:
            args = args[: args.index('--launcher')]
        args = ['released.pth' if 'https' in arg else arg for arg in args]
        run_tool(args[0].removeprefix('tools/'), *args[1:])
    assert Path('tiny.pth').exists()


def normalised(path):
    """Read a picture as torchvision's users do."""
    rgb = torch.from_numpy(cv2.imread(str(path))[..., ::-1] / 255.0)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
    return ((rgb - mean) / std).permute(2, 0, 1).float()


@pytest.mark.parametrize('arch', PUBLISHED)
def test_is_the_published_recipe(arch):
    cfg = Config.fromfile(FOLDER / name_of(arch))
    model, loader, wrapper = cfg.model, cfg.train_dataloader, cfg.optim_wrapper
    *warmup, cosine = cfg.param_scheduler
    mixing = {
        each.type: each.alpha for each in (model.train_cfg or {}).get('augments', ())
    }
    rate = wrapper.optimizer.lr
    assert PUBLISHED[arch] == (
        cfg.train_cfg.max_epochs,
        sum(each.end for each in warmup),
        rate,
        wrapper.optimizer.weight_decay,
        wrapper.paramwise_cfg.decay_rate,
        model.head.loss.label_smooth_val,
        mixing.get('Mixup', 0),
        mixing.get('CutMix', 0),
        model.backbone.drop_path_rate,
    )
    assert cosine.get('begin', 0) == PUBLISHED[arch][1]
    assert cosine.eta_min_ratio * rate == pytest.approx(1e-6)
    assert model.backbone.arch == arch
    assert model.head.in_channels == ARCHITECTURES[arch]['dims'][-1]
    assert f'convnext-v2-{arch}_3rdparty-fcmae' in model.backbone.init_cfg.checkpoint
    assert wrapper.type == 'AmpOptimWrapper'
    images = 8 * loader.batch_size * wrapper.accumulative_counts
    assert images == cfg.auto_scale_lr.base_batch_size == 1024
    [ema] = cfg.custom_hooks
    assert (ema.momentum, ema.interval) == (1e-4, wrapper.accumulative_counts)
    augment, erase = loader.dataset.pipeline[3:5]
    assert (augment.magnitude_level, augment.magnitude_std) == (9, 0.5)
    assert (erase.type, erase.erase_prob) == ('RandomErasing', 0.25)


@pytest.mark.parametrize('arch', PUBLISHED)
def test_layers_learn_at_rates_of_their_own(arch):
    cfg = Config.fromfile(FOLDER / name_of(arch))
    cfg.model.backbone.init_cfg = None
    # MMEngine's mixed precision needs an accelerator.
    cfg.optim_wrapper.type = 'OptimWrapper'
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    rates = {
        param: group['lr']
        for group in wrapper.optimizer.param_groups
        for param in group['params']
    }
    lr, decay = PUBLISHED[arch][2], PUBLISHED[arch][4]
    top = {n for n, p in model.named_parameters() if rates[p] == lr}
    kinds = ('weight', 'bias')
    assert top == {f'{m}.{k}' for m in ('backbone.norm3', 'head.fc') for k in kinds}
    # The official code groups blocks for base and large alone.
    grouped = arch in ('base', 'large')
    below = 13 if grouped else sum(ARCHITECTURES[arch]['depths'])
    lowest = rates[model.backbone.downsample_layers[0][0].weight]
    assert lowest == min(rates.values()) == pytest.approx(lr * decay**below)
    assert len(set(rates.values())) == below + 1


def test_own_pictures(tmp_path, pictures):
    [block] = re.findall(
        r'```python\n(.*?)```', (FOLDER / 'README.md').read_text(), re.DOTALL
    )
    path = tmp_path / 'my_config.py'
    path.write_text(block.replace('data/fungi', str(pictures)))
    cfg = Config.fromfile(path)
    cfg.model.backbone.init_cfg = None
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model)
    count = cfg.data_preprocessor.num_classes
    assert model.head.fc.out_features == count
    assert cfg.val_evaluator.topk == cfg.test_evaluator.topk == 1
    for split in ('train', 'val', 'test'):
        dataset = cfg[f'{split}_dataloader'].dataset
        assert dataset.data_root == f'{pictures}/'
        assert len(dataset.metainfo.classes) == count


def test_every_recipe_is_here():
    here = {path.name for path in FOLDER.glob('*.py')}
    assert here == {*map(name_of, PUBLISHED), PROBE}


def test_metafile_tells_the_schedules():
    models = [model for file in metafiles() for model in file['Models']]
    here = [each for each in models if 'classification' in each['Config']]
    assert len(here) == len(PUBLISHED) + 1
    for model in here:
        check_schedule(model)
