import math

import numpy as np
import pytest
import torch
from mmengine.evaluator import Evaluator
from mmengine.structures import BaseDataElement

from mmcnv2.evaluation import hidden_psnr
from mmcnv2.registry import METRICS


def sample(
    seed: int, error: float, channels: int = 3, data_range: float = 255.0
) -> BaseDataElement:
    """A picture 64 x 96 with one patch in two hidden, and an error of this size."""
    generator = np.random.default_rng(seed)
    mask = np.array([[True, False, True], [False, True, False]])
    picture = generator.uniform(0, 255, (channels, 64, 96)).astype(np.float32)
    signs = generator.choice([-1, 1], picture.shape)
    hidden = np.kron(mask, np.ones((32, 32), bool))
    # Errors in visible places have no influence.
    reconstruction = picture + signs * np.where(hidden, error, 99)
    element = BaseDataElement(metainfo={'data_range': data_range})
    element.set_data(
        {
            'mask': torch.from_numpy(mask),
            'picture': torch.from_numpy(picture),
            'reconstruction': torch.from_numpy(reconstruction.astype(np.float32)),
            'loss': torch.tensor(error / 10),
        }
    )
    return element


@pytest.mark.parametrize(('data_range', 'channels'), [(255, 3), (65535, 1), (1, 5)])
def test_mean_of_the_pictures(data_range, channels):
    metric = METRICS.build(dict(type='ReconstructionMetric'))
    evaluator = Evaluator(metric)
    errors = [2.0, 8.0, 32.0]
    samples = [sample(i, e, channels, data_range) for i, e in enumerate(errors)]
    evaluator.process(samples[:2], {})
    evaluator.process(samples[2:], {})
    result = evaluator.evaluate(3)
    # The mean of the ratios is the ratio for the geometric mean of the errors.
    assert result['fcmae/psnr'] == pytest.approx(20 * math.log10(data_range / 8))
    assert result['fcmae/loss'] == pytest.approx(1.4)


def test_what_stands_in_for_a_broken_picture_does_not_count():
    evaluator = Evaluator(METRICS.build(dict(type='ReconstructionMetric')))
    samples = [sample(0, 2.0), sample(1, 8.0), sample(2, 32.0)]
    samples[0].set_metainfo({'broken_paths': ()})
    samples[2].set_metainfo({'broken_paths': ('broken.jpg',)})
    evaluator.process(samples, {})
    result = evaluator.evaluate(3)
    assert result['fcmae/loss'] == pytest.approx(0.5)
    assert result['fcmae/psnr'] == pytest.approx(20 * math.log10(255 / 4))


def test_other_prefix():
    metric = METRICS.build(dict(type='ReconstructionMetric', prefix='nuclei'))
    evaluator = Evaluator(metric)
    evaluator.process([sample(0, 1.0)], {})
    assert set(evaluator.evaluate(1)) == {'nuclei/psnr', 'nuclei/loss'}


def test_psnr_is_scikit_images():
    from skimage.metrics import peak_signal_noise_ratio

    mask = torch.tensor([[True, False], [True, True]])
    picture, reconstruction = torch.rand(2, 3, 64, 64).mul(255)
    found = hidden_psnr(mask, picture, reconstruction)
    pixels = [
        np.concatenate([each[:, :, :32], each[:, 32:, 32:]], None)
        for each in (picture.numpy(), reconstruction.numpy())
    ]
    expected = peak_signal_noise_ratio(*pixels, data_range=255)
    assert found == pytest.approx(expected, abs=1e-5)


def test_no_error_at_all():
    picture = torch.rand(1, 32, 64)
    mask = torch.tensor([[True, False]])
    assert hidden_psnr(mask, picture, picture.clone()) == math.inf
