import subprocess
import sys

import pytest
import torch
from mmengine.structures import BaseDataElement

from mmcnv2.models import FCMAE, ConvNeXtV2
from mmcnv2.models.fcmae import patchify, unpatchify
from mmcnv2.registry import MODELS

MEAN, STD = [100.0, 120.0, 140.0], [50.0, 60.0, 70.0]


def fcmae_cfg(in_channels=3, head=None, **kwargs) -> dict:
    preprocessor = dict(
        type='FCMAEDataPreprocessor',
        mean=(MEAN * 2)[:in_channels],
        std=(STD * 2)[:in_channels],
    )
    return dict(
        type='FCMAE',
        data_preprocessor=preprocessor,
        backbone=dict(
            type='ConvNeXtV2',
            arch=dict(depths=(1, 1, 1, 1), dims=(6, 8, 10, 12)),
            in_channels=in_channels,
        ),
        neck=dict(type='FCMAEDecoder', decoder_dim=16),
        head=dict(type='FCMAEHead', **(head or {})),
        **kwargs,
    )


def fcmae(*args, **kwargs) -> FCMAE:
    torch.manual_seed(0)
    model = MODELS.build(fcmae_cfg(*args, **kwargs))
    model.init_weights()
    return model


def samples(*indices):
    return [BaseDataElement(metainfo=dict(sample_idx=i)) for i in indices]


def spread(weight):
    return round(weight.std().item(), 2)


def test_torch_and_mmengine_are_enough():
    """For another process, which cannot import the rest of OpenMMLab."""
    code = f"""
import sys

for name in ('mmcv', 'mmdet', 'mmseg', 'mmpretrain', 'timm', 'MinkowskiEngine'):
    sys.modules[name] = None
import torch
from mmcnv2.registry import MODELS

model = MODELS.build({fcmae_cfg()!r})
model(torch.randn(2, 3, 64, 96), mode='loss')['loss'].backward()
print(float(model.backbone.stages[0][0].dwconv.weight.grad.abs().max()) > 0)
"""
    run = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, check=False
    )
    assert run.stdout == 'True\n', run.stderr


def test_decoder_has_the_blocks_of_the_encoder():
    cfg = fcmae_cfg()
    cfg['backbone']['use_grn'] = False
    model = MODELS.build(cfg)
    model.init_weights()
    assert model.neck.decoder[0].gamma.shape == (16,)
    assert not [name for name in model.state_dict() if '.grn.' in name]
    model(torch.randn(2, 3, 64, 96), mode='loss')['loss'].backward()
    grads = [p.grad for name, p in model.named_parameters() if name.endswith('.gamma')]
    assert len(grads) == 5
    assert all(grad.abs().max() > 0 for grad in grads)


def test_starts_as_in_the_papers_code():
    torch.manual_seed(0)
    init_cfg = dict(type='mmcnv2.FCMAEInit')
    arch = dict(depths=(1, 1, 1, 1), dims=(64, 64, 64, 64))
    encoder = MODELS.build(dict(type='ConvNeXtV2', arch=arch, init_cfg=init_cfg))
    decoder = MODELS.build(
        dict(type='FCMAEDecoder', in_channels=64, decoder_dim=64, init_cfg=init_cfg)
    )
    for module in (encoder, decoder):
        module.init_weights()
    stem, *others = encoder.downsample_layers
    assert {spread(downsample[1].weight) for downsample in others} == {0.02}

    # A normal distribution of standard deviation 1, cut at 2, has 0.88.
    block = encoder.stages[2][0]
    wide = [stem[0], block.dwconv, block.pwconv1, block.pwconv2]
    wide += [decoder.proj, decoder.pred, decoder.decoder[0].dwconv]
    for layer in wide:
        assert spread(layer.weight) == pytest.approx(0.88, abs=0.03)
        assert layer.weight.abs().max() <= 2
        assert not layer.bias.any()
    untouched = decoder.decoder[0].pwconv1
    assert untouched.weight.abs().max() <= 64**-0.5
    assert untouched.bias.any()
    assert spread(decoder.mask_token) == pytest.approx(0.02, abs=0.01)
    for norm in (stem[1], block.norm):
        assert (norm.weight == 1).all()
    assert not block.grn.gamma.any()


def test_patches_are_cut_by_row_column_and_channel():
    pictures = torch.randn(2, 3, 64, 96)
    patches = patchify(pictures)
    assert patches.shape == (2, 2, 3, 32 * 32 * 3)
    for n, i, j in [(0, 0, 0), (1, 1, 2), (0, 1, 1)]:
        tile = pictures[n, :, 32 * i : 32 * (i + 1), 32 * j : 32 * (j + 1)]
        assert torch.equal(patches[n, i, j], tile.permute(1, 2, 0).flatten())
    assert torch.equal(unpatchify(patches), pictures)


@pytest.mark.parametrize('norm_pix', [True, False])
def test_loss_is_the_papers(norm_pix):
    """The official loss, one hidden patch at a time."""
    model = fcmae(head=dict(norm_pix=norm_pix))
    pictures = torch.randn(2, 3, 64, 96)
    mask = torch.tensor([[[1, 0, 1], [1, 1, 0]], [[0, 1, 1], [1, 0, 1]]]).bool()
    prediction = model(pictures, mode='tensor', mask=mask)
    errors = []
    for n, i, j in mask.nonzero().tolist():
        tile = pictures[n, :, 32 * i : 32 * (i + 1), 32 * j : 32 * (j + 1)]
        target = tile.permute(1, 2, 0).flatten()
        if norm_pix:
            target = (target - target.mean()) / (target.var() + 1e-6) ** 0.5
        errors.append((prediction[n, i, j] - target).square().mean())
    loss = model(pictures, mode='loss', mask=mask)['loss']
    torch.testing.assert_close(loss, torch.stack(errors).mean())


def test_loss_keeps_double_precision():
    head = fcmae().head
    pictures = torch.randn(1, 3, 32, 64, dtype=torch.float64)
    mask = torch.tensor([[[True, False]]])
    prediction = torch.randn(1, 1, 2, 3072, dtype=torch.float64)
    target = patchify(pictures)[mask]
    target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
    expected = (prediction[mask] - target).square().mean(1)
    loss = head.loss(prediction, pictures, mask)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def test_compiles_to_one_graph(to_one_graph):
    model = fcmae()
    compiled = to_one_graph(model.forward, dynamic=False, backend='aot_eager')
    for seed, stance in enumerate(('default', *['fail_on_recompile'] * 2)):
        pictures, grads = torch.randn(2, 3, 64, 96), []
        for run in (compiled, model):
            model.zero_grad()
            torch.manual_seed(seed)
            with torch.compiler.set_stance(stance):
                run(pictures, mode='loss')['loss'].backward()
            grads.append([param.grad for param in model.parameters()])
        for grad, expected in zip(*grads, strict=True):
            torch.testing.assert_close(grad, expected)


def test_loss_does_not_see_visible_targets():
    model = fcmae()
    pictures = torch.randn(1, 3, 64, 64)
    mask = torch.tensor([[[True, False], [False, True]]])
    prediction = torch.randn(1, 2, 2, 3072, requires_grad=True)
    model.head.loss(prediction, pictures, mask).sum().backward()
    assert (prediction.grad[~mask] == 0).all()
    assert (prediction.grad[mask] != 0).all()


def test_decoder_puts_tokens_where_they_belong():
    decoder = fcmae().neck
    features = torch.randn(2, 2, 12)
    mask = torch.tensor([[[True, False, True, False]], [[False, True, True, False]]])
    expected = decoder.mask_token.expand(2, 1, 4, 16).clone()
    for picture, places in ((0, (1, 3)), (1, (0, 3))):
        for token, place in enumerate(places):
            expected[picture, 0, place] = decoder.proj(features[picture, token])
    (block,) = decoder.decoder
    seen = []
    block.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    decoder(features, mask)
    torch.testing.assert_close(seen[0], expected)


@pytest.mark.parametrize(
    ('ratio', 'size', 'visible'),
    [(0.6, (224, 224), 19), (0.75, (160, 288), 11), (0.9, (64, 160), 1)],
)
def test_random_mask(ratio, size, visible):
    model = fcmae(mask_ratio=ratio)
    pictures = torch.zeros(64, 3, *size)
    mask = model.random_mask(pictures, torch.Generator().manual_seed(1))
    again = model.random_mask(pictures, torch.Generator().manual_seed(1))
    other = model.random_mask(pictures, torch.Generator().manual_seed(2))
    assert mask.shape == (64, size[0] // 32, size[1] // 32)
    assert ((~mask).flatten(1).sum(1) == visible).all()
    assert torch.equal(mask, again)
    assert not torch.equal(mask, other)
    # Every place is hidden about as often as the others.
    share = mask.float().mean(0)
    assert (share - share.mean()).abs().max() < 0.3


@pytest.mark.parametrize('ratio', [0.6, 0.1])
def test_mask_must_leave_something_to_do(ratio):
    model = fcmae(mask_ratio=ratio)
    size = (32, 64) if ratio > 0.5 else (32, 32)
    with pytest.raises(ValueError, match=r'visible; take larger pictures'):
        model(torch.zeros(1, 3, *size), mode='loss')


@pytest.mark.parametrize('ratio', [0, 1, 1.5, -0.1])
def test_mask_ratio_out_of_range(ratio):
    with pytest.raises(
        ValueError, match=rf'mask_ratio is {ratio}; give it in \(0, 1\)'
    ):
        fcmae(mask_ratio=ratio)


@pytest.mark.parametrize('in_channels', [1, 3, 4])
@pytest.mark.parametrize('size', [(96, 64), (64, 160)], ids=str)
def test_every_part_learns(in_channels, size):
    model = fcmae(in_channels)
    data = dict(
        inputs=[torch.randint(0, 256, (in_channels, *size)) for _ in range(3)],
        data_samples=samples(0, 1, 2),
    )
    batch = model.data_preprocessor(data)
    loss = model(**batch, mode='loss')['loss']
    loss.backward()
    for name, param in model.named_parameters():
        assert param.grad is not None, name
        # GRN starts at zero, through which nothing reaches gamma's companions only.
        assert param.grad.isfinite().all(), name
        assert (param.grad != 0).any(), name


def test_learns_to_fill_in_a_simple_picture():
    """Stripes that run through the visible patches continue into the hidden ones."""
    model = fcmae(head=dict(norm_pix=False))
    stripes = torch.arange(96)[None, :].expand(96, 96) // 8 % 2 * 2.0 - 1
    pictures = stripes.expand(4, 3, 96, 96).clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = model(pictures, mode='loss')['loss']
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0.9
    assert losses[-1] < 0.1 * losses[0]


def test_prediction_undoes_the_normalisation():
    """A prediction equal to the target gives back the very picture."""
    model = fcmae()
    raw = torch.rand(2, 3, 64, 96) * 255
    batch = model.data_preprocessor(dict(inputs=raw, data_samples=samples(4, 5)))
    pictures = batch['inputs']
    mask = model.random_mask(pictures)
    patches = patchify(pictures)
    variance, mean = torch.var_mean(patches, -1, keepdim=True)
    target = (patches - mean) / (variance + 1e-6).sqrt()
    filled = model.head.fill_in(target, pictures, mask)
    torch.testing.assert_close(
        model.data_preprocessor.denormalise(filled), raw, rtol=1e-4, atol=1e-2
    )


def test_predict():
    model = fcmae().eval()
    raw = torch.rand(3, 3, 64, 96) * 255
    batch = model.data_preprocessor(dict(inputs=raw, data_samples=samples(7, 8, 9)))
    with torch.no_grad():
        results = model(**batch, mode='predict')
        alone = model(batch['inputs'][1:2], samples(8), mode='predict')[0]
    for picture, result in zip(raw, results, strict=True):
        hidden = result.mask.repeat_interleave(32, 0).repeat_interleave(32, 1)
        assert result.mask.sum() == 4
        torch.testing.assert_close(result.picture, picture, rtol=1e-4, atol=1e-2)
        torch.testing.assert_close(
            result.reconstruction * ~hidden, picture * ~hidden, rtol=1e-4, atol=1e-2
        )
        assert ((result.reconstruction - picture) * hidden).abs().max() > 1
    assert not torch.equal(results[0].mask, results[1].mask)
    # The batch has no influence on a picture's mask and result.
    assert torch.equal(alone.mask, results[1].mask)
    torch.testing.assert_close(alone.loss, results[1].loss)
    # The mean of the losses is what training would minimise.
    mask = torch.stack([result.mask for result in results])
    loss = model(batch['inputs'], mode='loss', mask=mask)['loss']
    torch.testing.assert_close(torch.stack([r.loss for r in results]).mean(), loss)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
def test_autocast_does_not_overflow(dtype):
    model = fcmae()
    # A nearly flat patch is blown up by its normalisation, and pixels are large.
    pictures = 300 * torch.randn(2, 3, 64, 96)
    pictures[:, :, :32] = 300 + 1e-3 * torch.randn(2, 3, 32, 96)
    with torch.autocast('cpu', dtype=dtype):
        loss = model(pictures, mode='loss')['loss']
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize('mode', ['loss', 'tensor', 'predict'])
def test_mask_from_outside_must_leave_something_to_do(mode):
    model, pictures = fcmae(), torch.zeros(1, 3, 64, 64)
    for hidden, message in ((False, 'hides no patch'), (True, 'hides a picture')):
        mask = torch.full((1, 2, 2), hidden)
        with pytest.raises(ValueError, match=message):
            model(pictures, mode=mode, mask=mask)


@pytest.mark.parametrize(
    ('shape', 'message'),
    [
        ((1, 3, 64, 40), r'multiples of 32, but got \(64, 40\)'),
        ((3, 64, 64), r'\(N, C, H, W\) expected, but got \(3, 64, 64\)'),
    ],
)
def test_shape_of_pictures(shape, message):
    with pytest.raises(ValueError, match=message):
        fcmae()(torch.zeros(shape), mode='loss')


def test_mask_from_outside_follows_the_pictures(monkeypatch):
    """To a device that holds no values, so what comes after has to be left out."""
    model = fcmae()
    monkeypatch.setattr(model, 'reconstruct', lambda inputs, mask, _: mask)
    pictures = torch.zeros(1, 3, 64, 64, device='meta')
    mask = model(pictures, mask=torch.tensor([[[True, False], [False, True]]]))
    assert mask.device == pictures.device


def test_predict_with_samples_that_do_not_know_their_place():
    model, pictures = fcmae().eval(), torch.randn(1, 3, 64, 64)
    unknown = [BaseDataElement(metainfo=dict(img_path='a.png'))]
    with pytest.raises(ValueError, match=r"no sample_idx, .* but \['img_path'\]"):
        model(pictures, unknown, mode='predict')
    mask = torch.tensor([[[True, False], [False, True]]])
    (found,) = model(pictures, unknown, mode='predict', mask=mask)
    assert torch.equal(found.mask, mask[0])


@pytest.mark.parametrize('name', ['output_norm', 'gap_before_final_norm'])
def test_what_fcmae_sets_itself_may_not_be_given(name):
    cfg = dict(fcmae_cfg(), backbone={'type': 'ConvNeXtV2', name: True})
    with pytest.raises(ValueError, match=f'itself; leave {name} out'):
        MODELS.build(cfg)


@pytest.mark.parametrize('kind', ['mmdet.ResNet', torch.nn.Identity])
def test_another_backbone(kind):
    cfg = dict(fcmae_cfg(), backbone=dict(type=kind, depth=50))
    with pytest.raises(TypeError, match=r'a (ResNet|Identity), but .*ConvNeXtV2'):
        MODELS.build(cfg)


def test_predict_without_samples():
    model, pictures = fcmae().eval(), torch.randn(2, 3, 64, 64)
    found = model(pictures, mode='predict')
    expected = model(pictures, samples(0, 1), mode='predict')
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.mask, other.mask)
        assert torch.equal(one.reconstruction, other.reconstruction)


def test_weights_move_to_a_dense_backbone():
    model = fcmae()
    weights = {
        name.removeprefix('backbone.'): value
        for name, value in model.state_dict().items()
        if name.startswith('backbone.')
    }
    dense = ConvNeXtV2(dict(depths=(1, 1, 1, 1), dims=(6, 8, 10, 12)))
    missing, unexpected = dense.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) == {
        f'norm{i}.{k}' for i in range(4) for k in ('weight', 'bias')
    }


def test_unknown_mode():
    with pytest.raises(ValueError, match="mode is 'train'; give 'loss'"):
        fcmae()(torch.zeros(1, 3, 64, 64), mode='train')
