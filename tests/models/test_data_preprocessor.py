import numpy as np
import pytest
import torch
from mmengine.structures import BaseDataElement

from mmcnv2.models import FCMAEDataPreprocessor

MEAN, STD = (10.0, 20.0, 30.0), (2.0, 4.0, 5.0)


def pictures(channels=3, count=2, dtype=np.uint8, size=(32, 64)):
    generator = np.random.default_rng(0)
    values = generator.integers(0, np.iinfo(dtype).max, (count, channels, *size))
    return torch.from_numpy(values.astype(dtype))


@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
@pytest.mark.parametrize('stacked', [True, False])
def test_normalises(dtype, stacked):
    batch = pictures(dtype=dtype)
    samples = [BaseDataElement(metainfo={'sample_idx': i}) for i in range(2)]
    inputs = batch if stacked else list(batch)
    preprocessor = FCMAEDataPreprocessor(MEAN, STD, data_range=65535.0)
    done = preprocessor({'inputs': inputs, 'data_samples': samples})
    values = batch.numpy().astype(np.float64).transpose(0, 2, 3, 1)
    expected = ((values - MEAN) / STD).transpose(0, 3, 1, 2)
    assert done['inputs'].dtype == torch.float32
    np.testing.assert_allclose(done['inputs'].numpy(), expected, rtol=1e-6, atol=1e-6)
    assert [sample.sample_idx for sample in done['data_samples']] == [0, 1]


def test_takes_floats():
    batch = torch.randn(1, 3, 32, 32)
    done = FCMAEDataPreprocessor(MEAN, STD)({'inputs': batch})
    assert torch.equal(done['inputs'][0, 1], (batch[0, 1] - 20) / 4)


def test_swaps_channels_before_it_normalises():
    batch = pictures()
    done = FCMAEDataPreprocessor(MEAN, STD, bgr_to_rgb=True)({'inputs': batch})
    red = (batch[:, 2].float() - 10) / 2
    blue = (batch[:, 0].float() - 30) / 5
    assert torch.equal(done['inputs'][:, 0], red)
    assert torch.equal(done['inputs'][:, 2], blue)


@pytest.mark.parametrize('channels', [1, 2, 4, 13])
def test_any_number_of_channels_and_back(channels):
    batch = pictures(channels)
    mean, std = list(range(channels)), [2 + i for i in range(channels)]
    preprocessor = FCMAEDataPreprocessor(mean, std)
    inputs = preprocessor({'inputs': list(batch)})['inputs']
    assert torch.equal(inputs[:, -1], (batch[:, -1].float() - mean[-1]) / std[-1])
    torch.testing.assert_close(preprocessor.denormalise(inputs), batch.float())


def test_follows_the_device():
    preprocessor = FCMAEDataPreprocessor(MEAN, STD).to('meta')
    done = preprocessor({'inputs': list(pictures())})
    assert done['inputs'].device.type == 'meta'


def test_stores_nothing_in_checkpoints():
    assert not FCMAEDataPreprocessor(MEAN, STD).state_dict()


@pytest.mark.parametrize(
    ('inputs', 'message'),
    [
        (list(pictures()[0]), r'\(C, H, W\) expected, but got \(32, 64\)'),
        (list(pictures(4)), r'4 channels, but mean and std .* have 3 values'),
        (pictures(1), r'1 channels, but .* 3 values'),
        ([pictures()[0], pictures(size=(64, 64))[0]], 'differ in size.*32, 64.*64, 64'),
        (pictures(dtype=np.uint16), 'have 16 bits: set data_range'),
        (pictures(size=(32, 65)), '32 x 65 pixels.*multiples of 32.*RandomResizedCrop'),
    ],
)
def test_says_what_is_wrong_with_pictures(inputs, message):
    with pytest.raises(ValueError, match=message):
        FCMAEDataPreprocessor(MEAN, STD)({'inputs': inputs})


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'mean': MEAN, 'std': (1.0,)}, 'mean has 3 values and std 1'),
        ({'mean': (), 'std': ()}, 'mean has 0 values'),
        ({'mean': (1.0,), 'std': (0.0,)}, 'positive'),
        ({'mean': (1.0,), 'std': (1.0,), 'bgr_to_rgb': True}, 'of 3 channels'),
    ],
)
def test_says_what_is_wrong_with_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        FCMAEDataPreprocessor(**arguments)
