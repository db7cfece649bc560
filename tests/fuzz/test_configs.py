"""Configs with unknown keys and wrong types: refused by name, or built to work."""

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.registry import Registry, init_default_scope

from mmcnv2.registry import HOOKS, MODELS, TRANSFORMS

ARCH = dict(depths=(1, 1, 1, 1), dims=(4, 4, 8, 8))
BACKBONE = dict(
    type='ConvNeXtV2',
    arch=ARCH,
    in_channels=3,
    out_indices=(0, 1, 2, 3),
    drop_path_rate=0.1,
    frozen_stages=-1,
    output_norm=True,
    gap_before_final_norm=False,
    sparse='packed',
    with_cp=False,
)
FCMAE = dict(
    type='FCMAE',
    backbone=dict(type='ConvNeXtV2', arch=ARCH),
    neck=dict(type='FCMAEDecoder', decoder_dim=8, decoder_depth=1),
    head=dict(type='FCMAEHead', norm_pix=True),
    data_preprocessor=dict(
        type='FCMAEDataPreprocessor',
        mean=[128.0] * 3,
        std=[64.0] * 3,
        bgr_to_rgb=True,
        data_range=255.0,
    ),
    mask_ratio=0.6,
    test_mask_seed=0,
)
CROP = dict(
    type='RandomResizedCrop',
    scale=64,
    crop_ratio_range=(0.2, 1.0),
    aspect_ratio_range=(0.75, 1.33),
    interpolation='bicubic',
    backend='pillow',
)
PACK = dict(type='PackPretrainInputs', meta_keys=('img_path',))
HOOK_CONFIGS = [
    dict(type='CheckpointHook', interval=1, stop_if_not_saved=False),
    dict(type='BrokenImagesHook', max_share=0.1),
    dict(type='NonFiniteLossHook', max_in_a_row=2),
    dict(type='FeatureDiversityHook', interval=3, layers=['stages.*.*']),
]
JUNK = [
    *(None, 'text', '0.5', '', -1, 0, 1.5, True, [], [1], ['a'], {}, {'a': 1}),
    *(float('nan'), float('inf'), (1, 2, 3), [[1, 2]], object),
]


def use(built: Any) -> None:
    """Do what it is for, with a result that is known to be right."""
    kind = type(built).__name__
    if kind == 'ConvNeXtV2':
        for i, features in zip(
            built.out_indices, built(torch.rand(2, 3, 64, 64)), strict=True
        ):
            side = () if built.gap_before_final_norm else (16 // 2**i, 16 // 2**i)
            assert features.shape == (2, built.dims[i], *side)
    elif kind == 'FCMAE':
        pictures = [torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)] * 2
        inputs = built.data_preprocessor(dict(inputs=pictures))['inputs']
        assert built(inputs, mode='loss')['loss'].isfinite()
        assert len(built(inputs, mode='predict')) == 2
    elif kind == 'RandomResizedCrop':
        picture = built(dict(img=np.full((50, 60, 3), 7, np.uint8)))['img']
        width, height = built.scale
        assert picture.shape == (height, width, 3)
        assert (picture == 7).all()


def places(config: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Find every key, and the dict that it is in."""
    for key, value in config.items():
        yield config, key
        if isinstance(value, dict):
            yield from places(value)


def spoilt(config: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """Put junk into every place, and unknown types and keys."""
    for i, (_, key) in enumerate(list(places(config))):
        cases = [(key, junk) for junk in JUNK]
        if key == 'type':
            cases = [('type', 'NoSuchType'), ('no_such_key', 1)]
        for name, junk in cases:
            changed = copy.deepcopy(config)
            inner, _ = list(places(changed))[i]
            inner[name] = copy.deepcopy(junk)
            yield changed, name, junk


@pytest.mark.parametrize(
    ('registry', 'config'),
    [
        (MODELS, BACKBONE),
        (MODELS, FCMAE),
        (TRANSFORMS, CROP),
        (TRANSFORMS, PACK),
        *((HOOKS, config) for config in HOOK_CONFIGS),
    ],
    ids=lambda value: value['type'] if isinstance(value, dict) else '',
)
def test_junk_in_every_place(registry: Registry, config: dict[str, Any]) -> None:
    init_default_scope('mmcnv2')
    use(registry.build(config))
    for changed, key, junk in spoilt(config):
        try:
            use(registry.build(changed))
        except (KeyError, TypeError, ValueError) as error:
            message = str(error)
        else:
            assert key not in ('type', 'no_such_key')
            continue
        # MMCV names the interpolation that it does not know, and MMEngine its own
        # argument, where a dict has no type.
        names = (key, str(junk), '"type"')
        assert any(name in message for name in names), (key, junk, message)
