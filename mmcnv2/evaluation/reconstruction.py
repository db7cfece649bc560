"""How well FCMAE reconstructs what it does not see."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from mmengine.evaluator import BaseMetric
from torch import Tensor

from mmcnv2.registry import METRICS


def hidden_psnr(
    mask: Tensor, picture: Tensor, reconstruction: Tensor, data_range: float = 255.0
) -> float:
    """Compute the peak signal-to-noise ratio over the hidden pixels of a picture.

    Args:
        mask: (h, w), True for hidden patches.
        picture: (C, H, W) in pixel units; H is a multiple of h, and W the same multiple
            of w.
        reconstruction: Likewise.
        data_range: Difference between the greatest and the least possible pixel value.

    Returns:
        The ratio in dB, infinite for a reconstruction without any error.
    """
    patch = picture.shape[-1] // mask.shape[-1]
    hidden = mask.repeat_interleave(patch, 0).repeat_interleave(patch, 1)
    error = (reconstruction - picture)[:, hidden].double().square().mean()
    return 10 * torch.log10(data_range**2 / error).item()


@METRICS.register_module()
class ReconstructionMetric(BaseMetric):
    """Mean loss and mean PSNR, in dB, on the hidden patches of each picture.

    The PSNR flatters where the target of the head is normalised per patch, since
    undoing that takes the mean and deviation of the hidden patch itself. It compares
    checkpoints of one such model, not methods of restoring pictures.

    Args:
        collect_device: ``cpu`` or ``gpu``, where results of all processes are gathered.
        prefix: What stands before the slash in the names of the results.
    """

    default_prefix = 'fcmae'

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:
        """Take in what the model predicted for a batch.

        Args:
            data_batch: Not used.
            data_samples: What FCMAE predicts, as dicts with ``mask``, ``picture``,
                ``reconstruction``, ``data_range`` and ``loss``.
        """
        names = ('mask', 'picture', 'reconstruction', 'data_range')
        for sample in data_samples:
            psnr = hidden_psnr(*(sample[name] for name in names))
            self.results.append((float(sample['loss']), psnr))

    def compute_metrics(self, results: list[tuple[float, float]]) -> dict[str, float]:
        """Average over all pictures.

        Args:
            results: Loss and PSNR of each picture.

        Returns:
            The means, as ``loss`` and ``psnr``.
        """
        loss, psnr = np.mean(results, axis=0).tolist()
        return {'loss': loss, 'psnr': psnr}
