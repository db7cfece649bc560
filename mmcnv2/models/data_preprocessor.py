"""From a batch of pictures as they were loaded to the tensor that FCMAE takes."""

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.model import BaseDataPreprocessor
from torch import Tensor

from ..arguments import check_arguments
from ..registry import MODELS
from .tiles import STRIDE


@MODELS.register_module()
@check_arguments
class FCMAEDataPreprocessor(BaseDataPreprocessor):
    """Move pictures of any number of channels to the device, normalise and stack them.

    Args:
        mean: Mean of each channel in pixel units, in the order of the model's channels,
            so after the swap that ``bgr_to_rgb`` asks for.
        std: Standard deviation of each channel, likewise.
        bgr_to_rgb: Whether to reverse the order of the three channels. MMCV loads
            colour pictures as blue, green, red.
        data_range: The greatest pixel value there can be, zero being the least. PSNR
            and painted reconstructions go by it. Defaults to 255, as of 8 bits; for
            pictures of 16 it has to be given, since few use all of them.
        non_blocking: Whether copying to the device may overlap with computing.

    Raises:
        ValueError: If ``mean`` and ``std`` do not belong together, a deviation is not
            positive, nor ``data_range``, or ``bgr_to_rgb`` is set for other than three
            channels.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        bgr_to_rgb: bool = False,
        data_range: float | None = None,
        non_blocking: bool = False,
    ) -> None:
        super().__init__(non_blocking)
        if not mean or len(mean) != len(std):
            raise ValueError(
                f'mean has {len(mean)} values and std {len(std)}: each needs one for '
                'every channel.'
            )
        if min(std) <= 0:
            raise ValueError(f'std is {tuple(std)}: each value has to be positive.')
        if bgr_to_rgb and len(mean) != 3:
            raise ValueError(
                f'bgr_to_rgb is for pictures of 3 channels, but mean has {len(mean)} '
                'values: leave bgr_to_rgb out.'
            )
        if data_range is not None and not data_range > 0:
            raise ValueError(f'data_range is {data_range}: it has to be positive.')
        self.bgr_to_rgb = bgr_to_rgb
        self.data_range = 255.0 if data_range is None else data_range
        self._data_range_is_given = data_range is not None
        for name, values in (('mean', mean), ('std', std)):
            column = torch.tensor(values, dtype=torch.float32).view(-1, 1, 1)
            self.register_buffer(name, column, persistent=False)

    def forward(self, data: dict[str, Any], training: bool = False) -> dict[str, Any]:
        """Prepare a batch.

        Args:
            data: A batch as the data loader gives it. ``inputs`` are the pictures, a
                list of tensors (C, H, W) or one tensor (N, C, H, W), of any real type.
            training: Not used; the same happens in training and testing.

        Returns:
            The same, on the device, with ``inputs`` a float tensor (N, C, H, W) that is
            normalised.

        Raises:
            ValueError: If the pictures of the batch are not (C, H, W) or differ in
                size, the number of their channels or their size does not suit the
                model, or they have 16 bits and it is not said how many are in use.
        """
        data = self.cast_data(data)
        pictures = list(data['inputs'])
        self._check([tuple(picture.shape) for picture in pictures])
        self._check_range(pictures[0].dtype)
        inputs = torch.stack([picture.float() for picture in pictures])
        if self.bgr_to_rgb:
            inputs = inputs.flip(1)
        return {**data, 'inputs': (inputs - self.mean) / self.std}

    def denormalise(self, inputs: Tensor) -> Tensor:
        """Undo the normalisation.

        Args:
            inputs: Pictures as :meth:`forward` gives them, (N, C, H, W).

        Returns:
            The same in pixel units, the order of channels being the model's.
        """
        return inputs * self.std + self.mean

    def _check_range(self, dtype: torch.dtype) -> None:
        if dtype == torch.uint16 and not self._data_range_is_given:
            raise ValueError(
                'The pictures have 16 bits: set data_range of the data preprocessor '
                'to the greatest pixel value there can be, 65535.0 or less.'
            )

    def _check(self, shapes: list[tuple[int, ...]]) -> None:
        if len(set(shapes)) != 1:
            raise ValueError(
                f'The pictures of a batch differ in size, (C, H, W) being '
                f'{sorted(set(shapes))}: add RandomResizedCrop, or Resize and '
                'CenterCrop, to the pipeline, or set batch_size=1.'
            )
        if len(shapes[0]) != 3:
            raise ValueError(
                f'Pictures of shape (C, H, W) expected, but got {shapes[0]}: end the '
                'pipeline with PackPretrainInputs, or add the dimension of channels.'
            )
        channels, height, width = shapes[0]
        if channels != len(self.mean):
            raise ValueError(
                f'The pictures have {channels} channels, but mean and std of the data '
                f'preprocessor have {len(self.mean)} values. Change these (and '
                'in_channels of the backbone), or color_type of LoadImageFromFile.'
            )
        if height % STRIDE or width % STRIDE:
            raise ValueError(
                f'The pictures have {height} x {width} pixels, but both sides must be '
                f'multiples of {STRIDE}: add RandomResizedCrop or Resize to a multiple '
                f'of {STRIDE} to the pipeline.'
            )
