"""Winograd's 3x3 convolution in float32 on CPUs, which oneDNN does not have: a quarter of the multiplications."""

import torch
from torch import Tensor
from torch.nn import functional as F

# F(4x4, 3x3) of Lavin and Gray (2016): 6x6 pixels of the input give 4x4 of the output.
_INPUT = [[4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0]]
_INPUT += [[0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0], [0, 4, 0, -5, 0, 1]]
_KERNEL = [[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]  # times 24
_OUTPUT = [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]
# Tiles that are transformed at once: the products stay in the cache.
_TILES = 256


def _both_axes(matrix: list[list[int]], divisor: int = 1) -> Tensor:
    one = torch.tensor(matrix, dtype=torch.float64) / divisor
    return torch.kron(one, one)


def transform_kernel(weight: Tensor) -> Tensor:
    """Transform a kernel (O, C, 3, 3) for `conv3x3`: (36, C, O)."""
    flat = weight.double().permute(2, 3, 1, 0).reshape(9, -1)
    kernel = _both_axes(_KERNEL, 24).to(weight.device) @ flat
    return kernel.view(36, weight.shape[1], weight.shape[0]).to(weight.dtype)


def conv3x3(x: Tensor, kernel: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolve at stride 1 with padding 1, for inference.

    Rounding errors are some ten times those of the direct sum: about 1e-5 of the largest value in float32.

    Args:
        x: (B, C, H, W), float32 or float64; fastest in channels_last.
        kernel: (36, C, O), see `transform_kernel`.
        bias: (O,) or None.

    Returns:
        (B, O, H, W), in channels_last.
    """
    (batch, channels, height, width), outputs = x.shape, kernel.shape[2]
    rows, cols = -(-height // 4), -(-width // 4)
    into, back = _both_axes(_INPUT).to(kernel), _both_axes(_OUTPUT).to(kernel)
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 4 * cols + 1 - width, 1, 4 * rows + 1 - height))
    y = x.new_empty((batch, rows, 4, cols, 4, outputs))
    # (B, rows, cols, C, 6, 6)
    tiles = padded.unfold(1, 6, 4).unfold(2, 6, 4)
    images, lines = max(1, _TILES // (rows * cols)), max(1, _TILES // cols)
    for i in range(0, batch, images):
        for j in range(0, rows, lines):
            part = tiles[i : i + images, j : j + lines]
            pixels = part.permute(4, 5, 0, 1, 2, 3).reshape(36, -1)
            products = torch.bmm((into @ pixels).view(36, -1, channels), kernel)
            sums = (back @ products.view(36, -1)).view(4, 4, *part.shape[:3], outputs)
            y[i : i + images, j : j + lines] = sums.permute(2, 3, 0, 4, 1, 5)
    if bias is not None:
        y += bias
    return y.view(batch, 4 * rows, 4 * cols, outputs)[:, :height, :width].permute(0, 3, 1, 2)
