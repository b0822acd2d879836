"""The feed-forward part of a block."""

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from overlock.layers.conv import PointwiseConv, ResidualDWConv, is_plain
from overlock.layers.norm import GRN
from overlock.ops import feed_forward
from overlock.ops.pointwise import pointwise_conv2d
from overlock.ops.tracing import is_eager


class ConvFFN(nn.Module):
    """1x1 convolution, GELU, residual depthwise 3x3, GRN, 1x1 convolution."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = PointwiseConv(channels, hidden)
        self.act = nn.GELU()
        self.dwconv = ResidualDWConv(hidden)
        self.grn = GRN(hidden)
        self.fc2 = PointwiseConv(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        hidden = self.fc1(x)
        if self._fuses(hidden):
            norm, last = self.grn, self.fc2
            taps, bias = self.dwconv.kernels(), self.dwconv.bias
            assert last.bias is not None
            return feed_forward.feed_forward(hidden, taps, bias, norm.gamma, norm.beta, last.weight, last.bias)
        if hidden.requires_grad and is_eager():
            # Keep one wide map for the backward pass: the four after it are cheap to compute again.
            return checkpoint(self.rest, hidden, use_reentrant=False, preserve_rng_state=False)
        return self.rest(hidden)

    def rest(self, hidden: Tensor) -> Tensor:
        """Map the output of `fc1` (B, hidden, H, W) to (B, C, H, W), layer by layer."""
        y = self.dwconv(self.act(hidden))
        if self.grn.beta is None and is_eager() and len(y) == 1:
            # One sample has one scale: it goes into the weights, which are smaller than the map. On two AVX-512 cores
            # 1x224x200x336 to 56 channels takes 12 instead of 16 ms; a batched product, for many samples, takes 26 ms.
            weight = self.fc2.weight * self.grn.scale(y).view(1, -1, 1, 1)
            return pointwise_conv2d(y, weight.to(self.fc2.weight.dtype), self.fc2.bias)
        return self.fc2(self.grn(y))

    def _fuses(self, hidden: Tensor) -> bool:
        """Return whether one operator computes what comes after `fc1`."""
        kinds = {self.act: nn.GELU, self.dwconv: ResidualDWConv, self.grn: GRN, self.fc2: PointwiseConv}
        are_plain = feed_forward.takes(hidden) and all(is_plain(*pair) for pair in kinds.items())
        return are_plain and self.act.approximate == 'none'

    def switch_to_deploy(self) -> None:
        """Fold the shortcut of the depthwise convolution and the shift of GRN, in place and idempotently."""
        self.dwconv.switch_to_deploy()
        if self.grn.beta is not None:
            self.grn.fold_beta_into(self.fc2)
