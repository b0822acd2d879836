"""The large depthwise kernel with parallel dilated branches (UniRepLKNet's dilated re-parameterized block)."""

import torch
from torch import Tensor, distributed, nn

from overlock.layers.conv import ConvNorm
from overlock.layers.fold import BatchNorm, bn_affine, fuse, set_conv
from overlock.layers.sync_norm import CPUSyncBatchNorm, agrees, sum_over_processes, track
from overlock.ops import dilated
from overlock.ops.depthwise import depthwise_conv2d, taps_of
from overlock.ops.tracing import is_eager

# (kernel size, dilation) of the branches beside a large kernel.
BRANCHES: dict[int, tuple[tuple[int, int], ...]] = {
    19: ((5, 1), (7, 1), (9, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
    17: ((5, 1), (7, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
    15: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    13: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    11: ((5, 1), (7, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    9: ((5, 1), (7, 1), (5, 2), (3, 3), (3, 4)),
    7: ((5, 1), (3, 1), (3, 2), (3, 3)),
    5: ((3, 1), (3, 2)),
}


class DilatedReparamConv(nn.Module):
    """A depthwise K x K convolution and dilated smaller ones, each with its BatchNorm, summed.

    In evaluation the sum equals one K x K convolution with a bias: `switch_to_deploy` merges it.
    """

    branches: dict[str, ConvNorm]  # nn.ModuleDict does not tell the type of its values

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__()
        if kernel_size not in BRANCHES:
            raise ValueError(f'kernel_size must be one of {sorted(BRANCHES)}, got {kernel_size}')
        self.conv = nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels, bias=False)
        self.bn: nn.Module = nn.BatchNorm2d(channels)
        self.branches = nn.ModuleDict()  # type: ignore[assignment]
        for size, dilation in BRANCHES[kernel_size]:
            self.branches[f'k{size}_d{dilation}'] = ConvNorm(
                channels, channels, size, groups=channels, dilation=dilation
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        if self._fuses(x):
            return self._fused(x)
        y = self.bn(depthwise_conv2d(x, self.conv.weight, self.conv.bias))
        for branch in self.branches.values():
            y = y + branch.bn(depthwise_conv2d(x, branch.conv.weight, dilation=branch.conv.dilation[0]))
        return y

    def _norms(self) -> list[nn.BatchNorm2d]:
        return [self.bn, *(branch.bn for branch in self.branches.values())]  # type: ignore[list-item]

    def _fuses(self, x: Tensor) -> bool:
        """Return whether one operator computes this step: all BatchNorms normalize by the batch, in the same way."""
        first, *others = self._norms()
        synced = nn.SyncBatchNorm if x.is_cuda else CPUSyncBatchNorm
        if type(first) not in (nn.BatchNorm2d, synced) or not (first.training and first.affine):
            return False
        kinds = {(type(norm), norm.training, norm.affine, norm.eps) for norm in (first, *others)}
        if len(kinds) > 1 or not is_eager():
            return False
        if not self._is_synced():
            return x.numel() > x.shape[1] and not dilated.why_unsupported(x)
        # Nothing may depend on the share or the machine of one process, or processes wait for each other.
        if getattr(first, 'process_group', None) not in (None, distributed.group.WORLD):
            return False
        return agrees(not dilated.why_unsupported(x), (x.device.type, x.dtype), x.device)

    def _is_synced(self) -> bool:
        return isinstance(self.bn, (CPUSyncBatchNorm, nn.SyncBatchNorm)) and distributed.is_initialized()

    def _fused(self, x: Tensor) -> Tensor:
        norms = self._norms()
        convs = [self.conv, *(branch.conv for branch in self.branches.values())]
        y, moments = dilated.dilated_norm(
            x,
            [conv.weight for conv in convs],
            [conv.dilation[0] for conv in convs],
            [norm.weight for norm in norms],
            [norm.bias for norm in norms],
            norms[0].eps,
            sum_over_processes if self._is_synced() else None,
        )
        unbiased = moments.variance * (moments.size / (moments.size - 1))
        for norm, mean, variance in zip(norms, moments.mean, unbiased, strict=True):
            track(norm, mean, variance)
        return y

    @torch.no_grad()
    def switch_to_deploy(self) -> None:
        """Merge every branch into `conv`, in place and idempotently."""
        if not isinstance(self.bn, BatchNorm):
            return
        weight, bias = fuse(self.conv, *bn_affine(self.bn))
        for branch in self.branches.values():
            assert isinstance(branch.bn, BatchNorm)
            branch_weight, branch_bias = fuse(branch.conv, *bn_affine(branch.bn))
            taps_of(weight, branch.conv.kernel_size[0], branch.conv.dilation[0]).add_(branch_weight)
            bias = bias + branch_bias
        set_conv(self.conv, weight, bias)
        self.bn = nn.Identity()
        self.branches.clear()
