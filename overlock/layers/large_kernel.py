"""The large depthwise kernel with parallel dilated branches (UniRepLKNet's dilated re-parameterized block)."""

import torch
from torch import Tensor, distributed, nn

from overlock.layers.conv import DepthwiseConv, is_plain
from overlock.layers.fold import BatchNorm, bn_affine, fuse, set_conv
from overlock.layers.sync_norm import CPUSyncBatchNorm, agrees, is_shared, sum_over_processes, track
from overlock.ops import dilated
from overlock.ops.depthwise import compute_dtype, taps_of
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


class Branch(nn.Module):
    """A depthwise convolution with its BatchNorm."""

    def __init__(self, channels: int, kernel_size: int, dilation: int) -> None:
        super().__init__()
        self.conv = DepthwiseConv(channels, kernel_size, dilation, bias=False)
        self.bn: nn.Module = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        y: Tensor = self.bn(self.conv(x))
        return y


class DilatedReparamConv(nn.Module):
    """A depthwise K x K convolution and dilated smaller ones, each with its BatchNorm, summed.

    In evaluation the sum equals one K x K convolution with a bias: `switch_to_deploy` merges it.
    """

    branches: dict[str, Branch]  # nn.ModuleDict does not tell the type of its values

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__()
        if kernel_size not in BRANCHES:
            raise ValueError(f'kernel_size must be one of {sorted(BRANCHES)}, got {kernel_size}')
        self.conv = DepthwiseConv(channels, kernel_size, bias=False)
        self.bn: nn.Module = nn.BatchNorm2d(channels)
        self.branches = nn.ModuleDict()  # type: ignore[assignment]
        for size, dilation in BRANCHES[kernel_size]:
            self.branches[f'k{size}_d{dilation}'] = Branch(channels, size, dilation)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        if self._fuses(x):
            return self._fused(x)
        y: Tensor = self.bn(self.conv(x))
        for branch in self.branches.values():
            y = y + branch(x)
        return y

    def _convs(self) -> list[DepthwiseConv]:
        return [self.conv, *(branch.conv for branch in self.branches.values())]

    def _norms(self) -> list[nn.BatchNorm2d]:
        return [self.bn, *(branch.bn for branch in self.branches.values())]  # type: ignore[list-item]

    def _fuses(self, x: Tensor) -> bool:
        """Return whether one operator computes this step."""
        synced = nn.SyncBatchNorm if x.is_cuda else CPUSyncBatchNorm
        if type(self.bn) not in (nn.BatchNorm2d, synced) or not self.bn.training or not is_eager():
            return False
        answer = self._is_uniform() and not dilated.why_unsupported(x)
        if not self._is_synced():
            return answer and x.numel() > x.shape[1]
        if getattr(self.bn, 'process_group', None) not in (None, distributed.group.WORLD):
            return False
        # Nothing may depend on the share or the machine of one process, or processes wait for each other.
        return agrees(self, answer, (x.device.type, compute_dtype(x)), x.device)

    def _is_uniform(self) -> bool:
        """Return whether all BatchNorms normalize by the batch, in the same way, and no module has hooks."""
        norms = self._norms()
        if not all(is_plain(norm, type(self.bn)) and norm.affine for norm in norms):
            return False
        settings = {(norm.training, norm.eps, getattr(norm, 'process_group', None)) for norm in norms}
        plain = [is_plain(conv, DepthwiseConv) for conv in self._convs()]
        plain += [is_plain(branch, Branch) for branch in self.branches.values()]
        return len(settings) == 1 and all(plain)

    def _is_synced(self) -> bool:
        return isinstance(self.bn, (CPUSyncBatchNorm, nn.SyncBatchNorm)) and is_shared()

    def _fused(self, x: Tensor) -> Tensor:
        convs, norms = self._convs(), self._norms()
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
