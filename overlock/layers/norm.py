"""Normalizations over channels and over space."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from overlock.layers.fold import fold_into_next
from overlock.ops import spatial_norm
from overlock.ops.feed_forward import grn_scale


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of each pixel of a (B, C, H, W) map, eps 1e-6 (ConvNeXt's convention)."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape, in the dtype of `x`."""
        y = x.permute(0, 2, 3, 1)
        weight: Tensor = self.weight
        bias: Tensor = self.bias
        if x.device.type == 'cpu' and torch.is_grad_enabled():
            # On CPUs (PyTorch 2.11) the gradients of weight and bias are summed in the dtype of the map: bfloat16 loses
            # most of a sum over a large one.
            wide = torch.promote_types(x.dtype, torch.float32)
            y, weight, bias = (t if t is None else t.to(wide) for t in (y, weight, bias))
        y = F.layer_norm(y, self.normalized_shape, weight, bias, self.eps)
        y = y.permute(0, 3, 1, 2).to(x.dtype)
        # Keep the memory format of the input; for channels_last there is nothing to copy.
        return y if x.is_contiguous(memory_format=torch.channels_last) else y.contiguous()

    def fold_affine_into(self, conv: nn.Conv2d) -> None:
        """Move scale and shift into the 1x1 convolution that takes the output; nothing else may take it."""
        fold_into_next(self.weight, self.bias, conv)
        self.register_parameter('weight', None)
        self.register_parameter('bias', None)
        self.elementwise_affine = False


class GRN(nn.Module):
    """Global response normalization (ConvNeXt V2): `(gamma * N + 1) * x + beta`.

    N is the L2 norm of each channel over space, divided by its mean over channels plus 1e-6. `beta` is None once it is
    folded into the next convolution.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape, in the dtype of `x`."""
        scale = self.scale(x).to(x.dtype)
        return x * scale if self.beta is None else torch.addcmul(self.beta.to(x.dtype), x, scale)

    def scale(self, x: Tensor) -> Tensor:
        """Return `gamma * N + 1` (B, C, 1, 1) for a map (B, C, H, W), in float32 at least."""
        return grn_scale(spatial_norm(x), self.gamma)

    def fold_beta_into(self, conv: nn.Conv2d) -> None:
        """Move beta into the bias of the 1x1 convolution that takes the output; nothing else may take it."""
        fold_into_next(torch.ones_like(self.beta).flatten(), self.beta.flatten(), conv)
        self.register_parameter('beta', None)
