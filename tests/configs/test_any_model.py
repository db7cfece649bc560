"""What docs/any_model.md swaps the backbone in trains a step and predicts."""

import re
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from mmdet.evaluation import INSTANCE_OFFSET
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.logging import MessageHub
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS, MODELS, init_default_scope

from mmcnv2.datasets.demo_scenes import CLASSES
from mmcnv2.models import ARCHITECTURES

from ..test_docs import python_blocks
from .conftest import CONFIGS, shrink_sizes

PAGE = 'docs/any_model.md'
*WHOLE, FINE_TUNING = python_blocks(PAGE)
ROWS = re.findall(
    r'^\| ([^|]+) \| `(mm\w+::.+)` \| `(.+)` \| `(.+)` \|$',
    (CONFIGS.parent / PAGE).read_text(),
    re.MULTILINE,
)

# What a row of the page's table stands for.
ROW = """
_base_ = '{base}'
custom_imports = dict(imports=['mmcnv2'])
model = dict(
    {pretrained}
    backbone=dict(
        _delete_=True,
        type='mmcnv2.ConvNeXtV2',
        arch='tiny',
        out_indices=({stages}),
    ),
    {entries},
)
"""


def swap_of(base: str, stages: str, entries: str) -> str:
    pretrained = 'pretrained=None,' if base.startswith('mmseg') else ''
    return ROW.format(base=base, stages=stages, entries=entries, pretrained=pretrained)


SWAPS = dict(zip(['RetinaNet', 'PSPNet', 'OCRNet'], WHOLE, strict=True))
SWAPS |= {name: swap_of(*columns) for name, *columns in ROWS}
SIDE = 64
IMAGENET_MEAN = pytest.approx([123.675, 116.28, 103.53])

# Their heads leave boxes as they are, be they beyond the picture's border.
UNCLIPPED = ('YOLOX', 'YOLOv3')


def first_two(dataset: dict) -> dict:
    built = DATASETS.build(dataset)
    return pseudo_collate([built[0], built[1]])


@pytest.fixture(scope='module')
def pictures(scenes, ade):
    """Two pictures with all that may be learnt of them, by the library that loads."""
    load = [dict(type='LoadImageFromFile')]
    resize = dict(type='Resize', scale=(SIDE, SIDE))
    annotations = dict(
        type='LoadAnnotations', with_bbox=True, with_mask=True, with_seg=True
    )
    init_default_scope('mmdet')
    instances = first_two(
        dict(
            type='CocoDataset',
            data_root=str(scenes),
            ann_file='annotations/train.json',
            data_prefix=dict(img='images/train', seg='semantic/train'),
            metainfo=dict(classes=CLASSES),
            pipeline=[*load, annotations, resize, dict(type='PackDetInputs')],
        )
    )
    init_default_scope('mmseg')
    maps = first_two(
        dict(
            type='ADE20KDataset',
            data_root=str(ade),
            data_prefix=dict(
                img_path='images/training', seg_map_path='annotations/training'
            ),
            pipeline=[
                *load,
                dict(type='LoadAnnotations', reduce_zero_label=True),
                resize,
                dict(type='PackSegInputs'),
            ],
        )
    )
    return dict(mmdet=instances, mmseg=maps)


def small(name: str, tmp_path: Path) -> Config:
    """Return the swap, fine-tuned as the page has it, at a size for a quick step."""
    swap, path = tmp_path / 'swap.py', tmp_path / 'fine_tuning.py'
    swap.write_text(SWAPS[name])
    path.write_text(f"_base_ = './swap.py'\n{FINE_TUNING}")
    cfg = Config.fromfile(path)
    arch = ARCHITECTURES[cfg.model.backbone.arch]
    cfg.model.backbone.arch = dict(arch, depths=(1, 1, 1, 1))
    cfg.model.backbone.init_cfg = None  # nothing is fetched
    shrink_sizes(cfg.model, SIDE)
    # AdamW then moves what has a gradient, and nothing else.
    cfg.optim_wrapper.optimizer.weight_decay = 0.0
    return cfg


def test_the_page_is_read_whole():
    """Its table, a line for a model, and the configs above that."""
    assert sum('mmdet::' in swap for swap in SWAPS.values()) == 18
    assert sum('mmseg::' in swap for swap in SWAPS.values()) == 13


@pytest.mark.parametrize('name', SWAPS)
def test_trains_and_predicts(name, tmp_path, pictures):
    cfg = small(name, tmp_path)
    init_default_scope(cfg.default_scope)
    # YOLOX changes the size of its pictures by the count that a Runner keeps.
    MessageHub.get_current_instance().update_info('iter', 0)
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.init_weights()
    assert model.data_preprocessor.mean.flatten().tolist() == IMAGENET_MEAN
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    before = {k: v.detach().clone() for k, v in model.backbone.named_parameters()}

    losses = model.train_step(deepcopy(pictures[cfg.default_scope]), wrapper)
    assert all(loss.isfinite().all() for loss in losses.values())
    assert losses['loss'] > 0
    after = dict(model.backbone.named_parameters())
    assert all(value.isfinite().all() for value in after.values())
    assert not [key for key in after if torch.equal(after[key], before[key])]

    model.eval()
    with torch.no_grad():
        found = model.test_step(deepcopy(pictures[cfg.default_scope]))
    assert len(found) == 2
    for sample in found:
        check_prediction(sample, cfg, clipped=name not in UNCLIPPED)


def check_prediction(sample, cfg: Config, clipped: bool) -> None:
    """Look at what the base evaluates."""
    if cfg.default_scope == 'mmseg':
        classes = sample.pred_sem_seg.data
        assert classes.shape == (1, *sample.ori_shape)
        assert classes.min() >= 0
        assert classes.max() < 150
        assert sample.seg_logits.data.isfinite().all()
        return
    wanted = str(cfg.val_evaluator)
    if 'CocoPanopticMetric' in wanted:
        check_panoptic(sample.pred_panoptic_seg.sem_seg, sample.ori_shape)
    if 'bbox' in wanted:
        check_boxes(sample.pred_instances, sample.ori_shape, clipped)
    if 'segm' in wanted:
        masks = torch.as_tensor(sample.pred_instances.masks)
        assert masks.shape == (len(sample.pred_instances), *sample.ori_shape)
        assert masks.dtype == torch.bool


def check_boxes(instances, shape: tuple[int, int], clipped: bool) -> None:
    boxes = instances.bboxes
    assert len(boxes) > 0
    assert boxes.isfinite().all()
    assert (boxes[:, :2] <= boxes[:, 2:]).all()
    assert ((instances.scores >= 0) & (instances.scores <= 1)).all()
    assert ((instances.labels >= 0) & (instances.labels < 80)).all()
    if clipped:
        height, width = shape
        assert boxes.min() >= 0
        assert (boxes <= boxes.new_tensor([width, height, width, height])).all()


def check_panoptic(segments: torch.Tensor, shape: tuple[int, int]) -> None:
    """MMDetection writes a class, or as many as there are where none is found."""
    assert segments.shape == (1, *shape)
    classes = segments % INSTANCE_OFFSET
    assert classes.min() >= 0
    assert classes.max() <= 133
