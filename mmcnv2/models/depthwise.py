"""Depthwise convolution, of which CPUs compute the gradient of the weights quickly."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from .shortcuts import has_onednn, is_traced

# Larger pictures are cut into parts of this side: kernels of that size are quickest.
_PART = 64


class DepthwiseConv2d(nn.Conv2d):
    """Convolve each channel by itself, at stride 1, keeping the size.

    Everything is nn.Conv2d's, but for the gradients on CPUs: those of oneDNN for the
    weights take several times as long as the convolution itself.

    Args:
        dim (int): Number of channels.
        kernel_size (int): Side of the kernel, odd. Defaults to 7.
    """

    bias: Tensor

    def __init__(self, dim: int, kernel_size: int = 7) -> None:
        super().__init__(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)

    def _conv_forward(self, x, weight, bias) -> Tensor:
        # Whoever traces the module wants to see an ordinary convolution.
        if is_traced() or x.device.type != 'cpu' or not torch.is_grad_enabled():
            return super()._conv_forward(x, weight, bias)
        return _DepthwiseConv.apply(*autocast(x, weight, bias))


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast what a convolution takes, as autocast does for PyTorch's own.

    Args:
        *tensors (Tensor): Its input, weight and bias.

    Returns:
        tuple[Tensor, ...]: The same in one dtype: autocast's if it is on, or else that
        of the input.
    """
    device, dtype = tensors[0].device.type, tensors[0].dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return tuple(tensor.to(dtype) for tensor in tensors)


class _DepthwiseConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        padding = weight.shape[-1] // 2
        return functional.conv2d(x, weight, bias, padding=padding, groups=len(weight))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        margin = weight.shape[-1] // 2
        return (
            input_gradient(grad, weight, padding=margin) if of_x else None,
            weight_gradient(grad, pad(x, margin), weight) if of_weight else None,
            grad.sum((0, 2, 3)) if of_bias else None,
        )


def pad(x: Tensor, margin: int) -> Tensor:
    """Pad ``(N, C, H, W)`` with zeros, as channels last."""
    last = x.permute(0, 2, 3, 1)
    padded = functional.pad(last, (0, 0, margin, margin, margin, margin))
    return padded.permute(0, 3, 1, 2)


def input_gradient(grad: Tensor, weight: Tensor, padding: int) -> Tensor:
    """Compute that of a depthwise convolution, which is one too, of stride 1.

    Args:
        grad (Tensor): Gradient of its output, ``(N, C, H, W)``.
        weight (Tensor): Its weight, ``(C, 1, K, K)``.
        padding (int): Zeros to put around ``grad``: ``K // 2`` of them keep the size.
            Defaults to 0.

    Returns:
        Tensor: ``(N, C, H + 2 * padding - K + 1, W + 2 * padding - K + 1)``.
    """
    turned = weight.flip(2, 3)
    return functional.conv2d(grad, turned, padding=padding, groups=len(weight))


def weight_gradient(grad: Tensor, padded: Tensor, weight: Tensor) -> Tensor:
    """Compute that of a depthwise convolution.

    Args:
        grad (Tensor): Gradient of its output, ``(N, C, H, W)``.
        padded (Tensor): Its input with what was padded,
            ``(N, C, H + K - 1, W + K - 1)``, channels last.
        weight (Tensor): Its weight, ``(C, 1, K, K)``.

    Returns:
        Tensor: Shape and dtype of ``weight``.
    """
    if grad.dtype not in (torch.float32, torch.bfloat16) or not has_onednn(grad):
        return torch.nn.grad.conv2d_weight(
            padded, weight.shape, grad, groups=len(weight)
        )
    # Each picture is convolved with the gradient of its output for a kernel, which is
    # what this gradient is, and oneDNN is quick at it.
    total = grad.new_zeros(1, dtype=torch.float32)
    # Kernels in plain order: turned all at once, and not one by one in convolutions.
    kernels = grad.contiguous()
    # A batch of one, which by its strides still counts as channels last.
    for picture, kernel in zip(padded.split(1), kernels, strict=True):
        for window, part in _parts(picture, kernel, weight.shape[-1]):
            out = functional.conv2d(window, part[:, None], groups=len(part))
            total = total + out
    return total.to(grad.dtype).transpose(0, 1)


def _parts(
    picture: Tensor, kernel: Tensor, size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut a kernel into parts, each with the window of the picture that it sees."""
    height, width = kernel.shape[1:]
    for i in range(0, height, _PART):
        for j in range(0, width, _PART):
            part = kernel[:, i : i + _PART, j : j + _PART]
            rows, columns = (side + size - 1 for side in part.shape[1:])
            yield picture[..., i : i + rows, j : j + columns], part
