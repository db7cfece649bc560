"""How well FCMAE reconstructs what it does not see."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from mmengine.evaluator import BaseMetric
from mmengine.logging import print_log
from torch import Tensor

from ..registry import METRICS


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

    A picture that :class:`~mmcnv2.datasets.UnlabelledImages` put in the place of one it
    could not read is left out, and how many these were is logged.

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
            stands_in = bool(sample.get('broken_paths'))
            self.results.append((float(sample['loss']), psnr, stands_in))

    def compute_metrics(
        self, results: list[tuple[float, float, bool]]
    ) -> dict[str, float]:
        """Average over all pictures.

        Args:
            results: Loss and PSNR of each picture, and whether it stands in for others.

        Returns:
            The means, as ``loss`` and ``psnr``.
        """
        own = [figures for *figures, stands_in in results if not stands_in]
        if len(own) < len(results):
            print_log(
                f'{len(results) - len(own)} of {len(results)} pictures could not be '
                'read and are left out of the means; a line for each is above.',
                logger='current',
                level=logging.WARNING,
            )
        loss, psnr = np.mean(own, axis=0).tolist()
        return {'loss': loss, 'psnr': psnr}
