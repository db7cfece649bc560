"""The ordinary way: every pixel is there."""

from torch import Tensor, nn

from ..depthwise import convolve_tiles, is_quicker_by_tiles


class DenseLayout:
    """Every pixel is there: positions are ``(H, W)``, and convolutions are ordinary.

    They see the channels-last memory as it is, as tiles or through permuted views, so
    no block copies its input or output.
    """

    def stem(self, conv: nn.Conv2d, image: Tensor) -> Tensor:
        return conv(image).permute(0, 2, 3, 1)

    def depthwise(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        if is_quicker_by_tiles(conv, x):
            return convolve_tiles(conv, x, tiles=None)
        return self._convolve(conv, x)

    def downsample(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        return self._convolve(conv, x)

    def output(self, x: Tensor) -> Tensor:
        """Return ``(N, C, H, W)`` in plain memory order.

        MMCV's compiled operators (RoIAlign, for one) read raw memory and would take
        a channels-last tensor for another picture.
        """
        return x.permute(0, 3, 1, 2).contiguous()

    def _convolve(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
