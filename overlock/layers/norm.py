"""Normalisations over channels and over space."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of each pixel of a (B, C, H, W) map, eps 1e-6 (ConvNeXt's convention)."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same, in the dtype of `x`."""
        y = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        y = y.permute(0, 3, 1, 2).to(x.dtype)
        # The memory format of the input goes on; for channels_last there is nothing to copy.
        return y if x.is_contiguous(memory_format=torch.channels_last) else y.contiguous()


class GRN(nn.Module):
    """Global response normalisation (ConvNeXt V2): `(gamma * N + 1) * x + beta`.

    N is the L2 norm of each channel over space, over its mean over channels plus 1e-6.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same, in the dtype of `x`."""
        # A sum of squares over a map leaves float16's range, so half types sum in float32.
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        response = torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True, dtype=wide)
        response = response / (response.mean(dim=1, keepdim=True) + 1e-6)
        scale = (self.gamma * response + 1).to(x.dtype)
        return torch.addcmul(self.beta.to(x.dtype), x, scale)
