"""The published pipeline, rebuilt from our parts: what every speed is compared with.

It computes step by step what the formulas say: ContMix with the map of affinities and all tap weights in memory and
an index-built position bias, unmerged dilated branches, contiguous (NCHW) maps, PyTorch's own gradients.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from overlock.layers import (
    GRN,
    ChannelAffine,
    ConvFFN,
    ConvNorm,
    DilatedReparamConv,
    LayerNorm2d,
    ResidualDWConv,
    SqueezeExcite,
)
from overlock.models.blocks import DynamicBlock, StaticBlock
from overlock.ops.contmix import natten

NUM_REGIONS = 7


def published(model: nn.Module, device: torch.device | str = 'cpu') -> nn.Module:
    """A copy of one of our models that runs the published pipeline on the same parameters and buffers.

    Args:
        model: `OverLoCK` or `OverLoCKBackbone`, not merged; it stays as it is.
        device: Where the copy will run: natten aggregates on CPUs where it imports, an unfold elsewhere.

    Raises:
        ValueError: If the model is merged for inference.
    """
    if any(isinstance(module, DilatedReparamConv) and not module.branches for module in model.modules()):
        raise ValueError('the published pipeline runs unmerged, but the model given is merged for inference')
    tensors = [*model.parameters(), *model.buffers()]
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    twin.memory_format = torch.contiguous_format
    for module in twin.modules():
        form = FORMS.get(type(module))
        if form is not None:
            # The same attributes under another forward, for this instance alone.
            module.__class__ = form
    for block in twin.modules():
        if isinstance(block, PublishedDynamicBlock):
            block.aggregate = aggregation(device)
    return twin


def aggregation(device: torch.device | str) -> Callable[[Tensor, Tensor, int], Tensor]:
    """natten's kernel where it can run, else the unfold that people fall back to."""
    # The only wheel that a recent torch imports is the one built for CPUs.
    return aggregate_natten if torch.device(device).type == 'cpu' and natten.verify()[0] else aggregate_unfold


def contmix(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    bias: Tensor,
    rpb_small: Tensor,
    rpb_large: Tensor,
    kernel_sizes: tuple[int, int],
    num_groups: int,
    scale: float,
    aggregate: Callable[[Tensor, Tensor, int], Tensor],
) -> Tensor:
    """See `overlock.ops.contmix`; `aggregate` sums values under tap weights."""
    batch, _, height, width = value.shape
    query = (query * scale).reshape(batch, num_groups, -1, height * width)
    key = key.reshape(batch, num_groups, query.shape[2], -1)
    affinity = torch.einsum('bgdn,bgdm->bgnm', query, key).permute(0, 3, 1, 2).contiguous()
    logits = F.conv2d(affinity, weight[:, :, None, None], bias).permute(0, 2, 3, 1)
    logits = logits.reshape(batch, num_groups, height, width, -1)
    halves = []
    for size, rpb, half_logits, half in zip(
        kernel_sizes,
        (rpb_small, rpb_large),
        logits.split([size**2 for size in kernel_sizes], dim=-1),
        value.chunk(2, dim=1),
        strict=True,
    ):
        bias_field = rpb.flatten(1)[:, bias_index(height, width, size).to(rpb.device)]
        weights = (half_logits + bias_field.reshape(1, num_groups, height, width, size**2)).softmax(dim=-1)
        half = half.reshape(batch, num_groups, -1, height, width)
        halves.append(aggregate(weights, half, size).flatten(1, 2))
    return torch.cat(halves, dim=1)


def bias_index(height: int, width: int, kernel_size: int) -> Tensor:
    """(H W, K^2), int64, on the CPU: where in the flat (2K-1) x (2K-1) bias each query finds each of its taps."""
    rows, cols = (_relative(length, kernel_size) for length in (height, width))
    index = rows[:, None, :, None] * (2 * kernel_size - 1) + cols[None, :, None, :]
    return index.reshape(height * width, kernel_size**2)


def _relative(length: int, kernel_size: int) -> Tensor:
    """(L, K): position of each tap minus that of the query, plus K - 1, on one axis."""
    query = torch.arange(length)[:, None]
    start = (query - kernel_size // 2).clamp(0, length - kernel_size)
    return start + torch.arange(kernel_size) - query + kernel_size - 1


def aggregate_natten(weights: Tensor, value: Tensor, kernel_size: int) -> Tensor:
    """Weights (B, G, H, W, K^2) and value (B, G, d, H, W) to (B, G, d, H, W), in value's dtype."""
    # On CPUs natten knows float32 and float64 alone.
    wide = torch.promote_types(value.dtype, torch.float32)
    seen = value.permute(0, 1, 3, 4, 2).to(wide).contiguous()
    mixed = natten._na2d_av()(weights.to(wide).contiguous(), seen, kernel_size)
    return mixed.permute(0, 1, 4, 2, 3).to(value.dtype)


def aggregate_unfold(weights: Tensor, value: Tensor, kernel_size: int) -> Tensor:
    """The same by making every window: an unfold, whose border windows are replicated for the border queries."""
    batch, groups, dims, height, width = value.shape
    radius = kernel_size // 2
    windows = F.unfold(value.flatten(0, 1), kernel_size)
    windows = windows.reshape(batch * groups, -1, height - 2 * radius, width - 2 * radius)
    windows = F.pad(windows, (radius,) * 4, mode='replicate')
    windows = windows.reshape(batch, groups, dims, kernel_size**2, height, width)
    return torch.einsum('bghwt,bgdthw->bgdhw', weights.to(value.dtype), windows)


class PublishedDynamicBlock(DynamicBlock):
    """The dynamic block; `aggregate` is set by `published`."""

    def forward(self, x: Tensor, context: Tensor, prior: Tensor) -> tuple[Tensor, Tensor] | Tensor:
        if self.mix_prior:
            context = self.context_scale(context) + self.prior_scale(prior)
        y = self.dwconv1(torch.cat([x, context], dim=1))
        y = self.ls1(y) + self.drop_path(self.mix(self.norm1(y)))
        y = self.dwconv2(y)
        y = self.ls2(y) + self.drop_path(self.ffn(self.norm2(y)))
        if not self.split:
            return y
        return y.split([self.channels, y.shape[1] - self.channels], dim=1)

    def mix(self, x: Tensor) -> Tensor:
        value = self.fusion(x)
        gate = self.gate(value)
        y = self.dynamic_proj(self.dynamic_conv(x, value)) + self.local(value)
        return self.proj(self.se(y) * gate)

    def dynamic_conv(self, x: Tensor, value: Tensor) -> Tensor:
        size = value.shape[2:]
        short, large = min(size), self.kernel_sizes[1]
        if short < large:
            grown = [large if side == short else int(large / short * side) for side in size]
            x, value = (F.interpolate(t, grown, mode='bilinear', align_corners=False) for t in (x, value))
        query = self.query(x[:, : self.channels])
        key = self.key(F.adaptive_avg_pool2d(x[:, self.channels :], NUM_REGIONS))
        out = contmix(
            query,
            key,
            value,
            self.weight_proj.weight.flatten(1),
            self.weight_proj.bias,
            self.rpb_small,
            self.rpb_large,
            self.kernel_sizes,
            self.num_groups,
            self.scale,
            self.aggregate,
        )
        return F.adaptive_avg_pool2d(out, size) if short < large else out


class PublishedStaticBlock(StaticBlock):
    """The static block."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.dwconv(x)
        y = self.se(self.bn(self.dilated(self.norm(x))))
        shortcut = self.ls(x) if isinstance(self.ls, ChannelAffine) else x
        return shortcut + self.drop_path(self.ffn(y))


class PublishedConvFFN(ConvFFN):
    """The feed-forward."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.grn(self.dwconv(self.act(self.fc1(x)))))


class PublishedConvNorm(ConvNorm):
    """Convolution, BatchNorm, activation."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class PublishedResidualDWConv(ResidualDWConv):
    """A depthwise 3x3 convolution, then a sum."""

    def forward(self, x: Tensor) -> Tensor:
        return x + F.conv2d(x, self.weight, self.bias, padding=1, groups=self.groups)


class PublishedDilatedConv(DilatedReparamConv):
    """Unmerged: each branch by its own convolution and BatchNorm, summed one by one."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(F.conv2d(x, self.conv.weight, padding=self.conv.padding, groups=self.conv.groups))
        for branch in self.branches.values():
            conv = branch.conv
            y = y + branch.bn(F.conv2d(x, conv.weight, None, 1, conv.padding, conv.dilation, conv.groups))
        return y


class PublishedLayerNorm(LayerNorm2d):
    """Two permutes, each with a copy."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.permute(0, 2, 3, 1).contiguous()
        y = F.layer_norm(y, self.normalized_shape, self.weight, self.bias, self.eps)
        return y.permute(0, 3, 1, 2).contiguous()


class PublishedGRN(GRN):
    """The formula as it stands."""

    def forward(self, x: Tensor) -> Tensor:
        response = torch.norm(x, p=2, dim=(2, 3), keepdim=True)
        response = response / (response.mean(dim=1, keepdim=True) + 1e-6)
        return (self.gamma * response + 1) * x + self.beta


class PublishedSqueezeExcite(SqueezeExcite):
    """Pool, two 1x1 convolutions, sigmoid."""

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc2(self.act(self.fc1(F.adaptive_avg_pool2d(x, 1)))).sigmoid()


class PublishedChannelAffine(ChannelAffine):
    """A depthwise 1x1 convolution."""

    def forward(self, x: Tensor, addend: Tensor | None = None) -> Tensor:
        y = F.conv2d(x, self.weight, self.bias, groups=x.shape[1])
        return y if addend is None else y + addend


FORMS = {
    form.__mro__[1]: form
    for form in (
        PublishedDynamicBlock,
        PublishedStaticBlock,
        PublishedConvFFN,
        PublishedConvNorm,
        PublishedResidualDWConv,
        PublishedDilatedConv,
        PublishedLayerNorm,
        PublishedGRN,
        PublishedSqueezeExcite,
        PublishedChannelAffine,
    )
}
