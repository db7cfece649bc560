"""Depthwise convolution, of which CPUs compute the gradient of the weights quickly."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

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
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
        if traced or x.device.type != 'cpu' or not torch.is_grad_enabled():
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
        grad_x, grad_weight = depthwise_gradients(
            grad, x, weight, ctx.needs_input_grad[:2]
        )
        grad_bias = grad.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias


def depthwise_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, needed: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Compute the gradients of a depthwise convolution but its bias's.

    Args:
        grad (Tensor): Gradient of its output, ``(N, C, H, W)``.
        x (Tensor): Its input, ``(N, C, H, W)``.
        weight (Tensor): Its weight, ``(C, 1, K, K)``.
        needed (tuple[bool, bool]): Whether that of the input is wanted, and that of
            the weight.

    Returns:
        tuple[Tensor | None, Tensor | None]: The gradients of input and weight.
    """
    quick = needed[1] and _is_quick(x)
    padding = weight.shape[-1] // 2
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad,
        x,
        weight,
        bias_sizes=None,
        stride=[1, 1],
        padding=[padding, padding],
        dilation=[1, 1],
        transposed=False,
        output_padding=[0, 0],
        groups=len(weight),
        output_mask=[needed[0], needed[1] and not quick, False],
    )
    if quick:
        grad_weight = _weight_gradient(grad, x, weight.shape[-1])
    return grad_x, grad_weight


def _is_quick(x: Tensor) -> bool:
    """Whether oneDNN has what the quick way stands on."""
    known = torch.backends.cpu.get_cpu_capability().startswith('AVX')
    quick = x.dtype in (torch.float32, torch.bfloat16)
    return x.device.type == 'cpu' and known and quick


def _weight_gradient(grad: Tensor, x: Tensor, size: int) -> Tensor:
    """Convolve each picture with the gradient of its output for a kernel.

    This is what the gradient of the weight is, and oneDNN is quick at it.
    """
    margin = size // 2
    # Padded as channels last, which is how both are wanted below.
    last = x.permute(0, 2, 3, 1)
    padded = functional.pad(last, (0, 0, margin, margin, margin, margin))
    total = x.new_zeros(1, dtype=torch.float32)
    for picture, kernel in zip(padded.permute(0, 3, 1, 2), grad, strict=True):
        for window, part in _parts(picture, kernel, size):
            out = functional.conv2d(window[None], part[:, None], groups=len(part))
            total = total + out
    return total.to(x.dtype).transpose(0, 1)


def _parts(
    picture: Tensor, kernel: Tensor, size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut a kernel into parts, each with the window of the picture that it sees."""
    height, width = kernel.shape[1:]
    for i in range(0, height, _PART):
        for j in range(0, width, _PART):
            part = kernel[:, i : i + _PART, j : j + _PART]
            rows, columns = (side + size - 1 for side in part.shape[1:])
            yield picture[:, i : i + rows, j : j + columns], part
