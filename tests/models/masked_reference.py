"""The masked encoder written out plainly: dense, and masked again after every step.

It shares nothing with the package but the names of the weights.
"""

import torch
from torch import Tensor
from torch.nn import functional


def layer_norm(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    """LayerNorm over the channels of ``(N, C, H, W)``."""
    mean = x.mean(1, keepdim=True)
    variance = (x - mean).square().mean(1, keepdim=True)
    scale = weights[f'{name}.weight'][:, None, None]
    shift = weights[f'{name}.bias'][:, None, None]
    return (x - mean) / (variance + 1e-6).sqrt() * scale + shift


def linear(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    """A pointwise layer on ``(N, C, H, W)``."""
    weight = weights[f'{name}.weight'][:, :, None, None]
    return functional.conv2d(x, weight, weights[f'{name}.bias'])


def grn(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    """GRN of pictures whose hidden positions are zero, so that they do not count."""
    gamma = weights[f'{name}.gamma'].view(-1, 1, 1)
    beta = weights[f'{name}.beta'].view(-1, 1, 1)
    squares = x.square().sum((2, 3), keepdim=True)
    norm = torch.where(squares > 0, squares, 1).sqrt() * (squares > 0)
    response = norm / (norm.mean(1, keepdim=True) + 1e-6)
    return gamma * (x * response) + beta + x


def masked_encoder(
    weights: dict[str, Tensor], depths: tuple[int, ...], image: Tensor, mask: Tensor
) -> list[Tensor]:
    """Return the features of each stage, ``(N, C, H, W)``, zero where hidden."""
    x, stages = image, []
    for stage, depth in enumerate(depths):
        name = f'downsample_layers.{stage}'
        if stage == 0:
            conv = [weights[f'{name}.0.{kind}'] for kind in ('weight', 'bias')]
            x = layer_norm(functional.conv2d(x, *conv, stride=4), weights, f'{name}.1')
        else:
            conv = [weights[f'{name}.1.{kind}'] for kind in ('weight', 'bias')]
            x = functional.conv2d(layer_norm(x, weights, f'{name}.0'), *conv, stride=2)
        scale = x.shape[2] // mask.shape[1]
        seen = ~mask.repeat_interleave(scale, 1).repeat_interleave(scale, 2)[:, None]
        x = x * seen
        for block in range(depth):
            name = f'stages.{stage}.{block}'
            conv = [weights[f'{name}.dwconv.{kind}'] for kind in ('weight', 'bias')]
            y = functional.conv2d(x, *conv, padding=3, groups=x.shape[1])
            y = linear(
                layer_norm(y, weights, f'{name}.norm'), weights, f'{name}.pwconv1'
            )
            y = functional.gelu(y) * seen
            if f'{name}.gamma' in weights:
                scale = weights[f'{name}.gamma'].view(-1, 1, 1)
                y = scale * linear(y, weights, f'{name}.pwconv2')
            else:
                y = linear(grn(y, weights, f'{name}.grn'), weights, f'{name}.pwconv2')
            x = (x + y) * seen
        stages.append(x)
    return stages


def visible_tokens(x: Tensor, mask: Tensor) -> Tensor:
    """Return the visible positions, ``(N, T, C)``, one patch after the other."""
    side = x.shape[2] // mask.shape[1]
    pictures = []
    for picture, hidden in zip(x, mask, strict=True):
        tiles = [
            picture[:, i * side : (i + 1) * side, j * side : (j + 1) * side].flatten(1)
            for i, j in (~hidden).nonzero().tolist()
        ]
        pictures.append(torch.cat(tiles, 1).T)
    return torch.stack(pictures)
