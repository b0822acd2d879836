"""The published pipeline, rebuilt from our parts; every speed is compared with it.

It computes what the formulas say, step by step: ContMix keeps the map of affinities and all tap weights in memory and
looks up the position bias by index, dilated branches are not merged, maps are contiguous (NCHW) and gradients are
PyTorch's own.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from overlock.layers import GRN, ChannelAffine, ConvFFN, DilatedReparamConv, LayerNorm2d
from overlock.models.blocks import NUM_REGIONS, DynamicBlock
from overlock.models.overlock import Trunk
from overlock.ops.contmix import natten


def published(model: Trunk, device: torch.device | str = 'cpu') -> Trunk:
    """Return a copy of a model of ours that runs the published pipeline on the same parameters and buffers.

    Args:
        model: `OverLoCK` or `OverLoCKBackbone`, not merged; it is left as it is.
        device: Where the copy will run; see `aggregation`.

    Raises:
        ValueError: If the model is merged for inference.
    """
    if any(isinstance(module, DilatedReparamConv) and not module.branches for module in model.modules()):
        raise ValueError('the published pipeline runs unmerged, but the model given is merged for inference')
    tensors = [*model.parameters(), *model.buffers()]
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    twin.memory_format = torch.contiguous_format
    for module in twin.modules():
        # The same attributes under another forward, for this instance alone.
        module.__class__ = FORMS.get(type(module), type(module))
        if isinstance(module, PublishedDynamicBlock):
            module.aggregate = aggregation(device)
    return twin


def aggregation(device: torch.device | str) -> Callable[[Tensor, Tensor, int], Tensor]:
    """Return natten's kernel where it can run, else its usual replacement, an unfold."""
    # The only build that a recent torch imports is the one for CPUs.
    return aggregate_natten if torch.device(device).type == 'cpu' and not natten.why_unavailable() else aggregate_unfold


def contmix(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rpb_small: Tensor,
    rpb_large: Tensor,
    kernel_sizes: tuple[int, int],
    num_groups: int,
    scale: float,
    aggregate: Callable[[Tensor, Tensor, int], Tensor],
) -> Tensor:
    """Compute ContMix in the published steps.

    Arguments, shapes and result are those of `overlock.ops.contmix`; `aggregate` sums values under tap weights.
    """
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
    """Return the index of each tap of each query in the flat (2K - 1) x (2K - 1) bias: (H W, K^2), on the CPU."""
    rows, cols = (_relative(length, kernel_size) for length in (height, width))
    index = rows[:, None, :, None] * (2 * kernel_size - 1) + cols[None, :, None, :]
    return index.reshape(height * width, kernel_size**2)


def _relative(length: int, kernel_size: int) -> Tensor:
    """Return the position of each tap minus that of its query, plus K - 1, on one axis: (L, K)."""
    query = torch.arange(length)[:, None]
    start = (query - kernel_size // 2).clamp(0, length - kernel_size)
    return start + torch.arange(kernel_size) - query + kernel_size - 1


def aggregate_natten(weights: Tensor, value: Tensor, kernel_size: int) -> Tensor:
    """Sum values under tap weights with natten.

    Args:
        weights: (B, G, H, W, K^2).
        value: (B, G, d, H, W).
        kernel_size: K.

    Returns:
        (B, G, d, H, W), in the dtype of `value`.
    """
    # On CPUs natten takes float32 and float64 only.
    wide = torch.promote_types(value.dtype, torch.float32)
    seen = value.permute(0, 1, 3, 4, 2).to(wide).contiguous()
    mixed = natten._na2d_av()(weights.to(wide).contiguous(), seen, kernel_size)
    return mixed.permute(0, 1, 4, 2, 3).to(value.dtype)


def aggregate_unfold(weights: Tensor, value: Tensor, kernel_size: int) -> Tensor:
    """Sum values under tap weights with an unfold; queries near the border share the outermost windows."""
    batch, groups, dims, height, width = value.shape
    radius = kernel_size // 2
    windows = F.unfold(value.flatten(0, 1), kernel_size)
    windows = windows.reshape(batch * groups, -1, height - 2 * radius, width - 2 * radius)
    windows = F.pad(windows, (radius,) * 4, mode='replicate')
    windows = windows.reshape(batch, groups, dims, kernel_size**2, height, width)
    return torch.einsum('bghwt,bgdthw->bgdhw', weights.to(value.dtype), windows)


class PublishedDynamicBlock(DynamicBlock):
    """ContMix in its published steps; `published` sets `aggregate`."""

    aggregate: Callable[[Tensor, Tensor, int], Tensor]

    def dynamic_conv(self, x: Tensor, value: Tensor) -> Tensor:
        size = value.shape[2], value.shape[3]
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


class PublishedConvFFN(ConvFFN):
    """The feed-forward with every map kept for the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.grn(self.dwconv(self.act(self.fc1(x)))))


class PublishedDilatedConv(DilatedReparamConv):
    """Unmerged: a convolution and a BatchNorm for each branch, summed one by one, with PyTorch's gradients."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        for branch in self.branches.values():
            y = y + branch(x)
        return y


class PublishedLayerNorm(LayerNorm2d):
    """Two permutations, each with a copy."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.permute(0, 2, 3, 1).contiguous()
        y = F.layer_norm(y, self.normalized_shape, self.weight, self.bias, self.eps)
        return y.permute(0, 3, 1, 2).contiguous()


class PublishedGRN(GRN):
    """The formula, step by step."""

    def forward(self, x: Tensor) -> Tensor:
        response = torch.norm(x, p=2, dim=(2, 3), keepdim=True)
        response = response / (response.mean(dim=1, keepdim=True) + 1e-6)
        return (self.gamma * response + 1) * x + self.beta


class PublishedChannelAffine(ChannelAffine):
    """A depthwise 1x1 convolution."""

    def forward(self, x: Tensor, addend: Tensor | None = None) -> Tensor:
        y = F.conv2d(x, self.weight, self.bias, groups=x.shape[1])
        return y if addend is None else y + addend


# Our other layers already compute what the authors' do, in the same steps.
FORMS = {
    form.__base__: form
    for form in (
        PublishedDynamicBlock,
        PublishedConvFFN,
        PublishedDilatedConv,
        PublishedLayerNorm,
        PublishedGRN,
        PublishedChannelAffine,
    )
}
