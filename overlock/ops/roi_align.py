"""RoIAlign on CPUs, by two small matrix products for each region.

mmcv's operator for CPUs visits one channel of one sample at a time, on one thread, and takes every map for a contiguous
one: of maps in channels_last it returns wrong values, and says nothing.
"""

from typing import Any, cast

import torch
from torch import Tensor


def roi_align(
    x: Tensor, rois: Tensor, size: tuple[int, int], scale: float, sampling_ratio: int = 0, aligned: bool = True
) -> Tensor:
    """Average bilinear samples of a map in a grid of bins for each region (Mask R-CNN, He et al., 2017).

    Samples are a grid, and bilinear weights are products: a bin's value is its weights of rows, times the map, times
    its weights of columns.

    Args:
        x: (B, C, H, W), any float dtype; fastest in channels_last. Under autocast it is computed in float32.
        rois: (N, 5): index in the batch, then x1, y1, x2, y2 in pixels of the image. Regions that are not finite
            give zeros; so do those of negative size, where `aligned` and without a positive `sampling_ratio`.
        size: Rows and columns of bins.
        scale: Pixels of the map in a pixel of the image.
        sampling_ratio: Samples of a bin along each axis; 0 or less for about one per pixel of the map.
        aligned: Whether the center of the first pixel lies at half a pixel; else at 0, and no region is below 1 pixel.

    Returns:
        (N, C, *size), of x's dtype, in channels_last. As mmcv's, it has a gradient for the map alone.
    """
    corners = rois[:, 1:].to(torch.promote_types(x.dtype, torch.float32)) * scale - (0.5 if aligned else 0.0)
    rows, top, bottom = _weights(corners[:, 1], corners[:, 3], x.shape[2], size[0], sampling_ratio, aligned)
    columns, left, right = _weights(corners[:, 0], corners[:, 2], x.shape[3], size[1], sampling_ratio, aligned)
    bounds = torch.stack([rois[:, 0].long(), top, bottom, left, right], 1).tolist()
    return cast(Tensor, _Average.apply(x, rows.to(x.dtype), columns.to(x.dtype), bounds))


class _Average(torch.autograd.Function):
    """Averages of the windows of a map (B, C, H, W) by weights of rows (N, h, H) and of columns (N, w, W)."""

    @staticmethod
    @torch.amp.custom_fwd(device_type='cpu', cast_inputs=torch.float32)
    def forward(ctx: Any, x: Tensor, rows: Tensor, columns: Tensor, bounds: list[list[int]]) -> Tensor:
        ctx.save_for_backward(rows, columns)
        ctx.shape, ctx.bounds = x.shape, bounds
        channels, height = x.shape[1], rows.shape[1]
        lines = x.permute(0, 2, 3, 1).contiguous().flatten(2)
        out = x.new_zeros((len(rows), height, columns.shape[1], channels))
        for i, (image, y1, y2, x1, x2) in enumerate(bounds):
            if y1 < y2 and x1 < x2:
                part = rows[i, :, y1:y2] @ lines[image, y1:y2, x1 * channels : x2 * channels]
                torch.matmul(columns[i, :, x1:x2], part.view(height, x2 - x1, channels), out=out[i])
        return out.permute(0, 3, 1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    @torch.amp.custom_bwd(device_type='cpu')
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        rows, columns = ctx.saved_tensors
        batch, channels, height, width = ctx.shape
        slopes = grad.permute(0, 2, 3, 1).contiguous()
        lines = grad.new_zeros((batch, height, width * channels))
        for i, (image, y1, y2, x1, x2) in enumerate(ctx.bounds):
            if y1 < y2 and x1 < x2:
                part = columns[i, :, x1:x2].T @ slopes[i]
                lines[image, y1:y2, x1 * channels : x2 * channels].addmm_(rows[i, :, y1:y2].T, part.flatten(1))
        return lines.view(batch, height, width, channels).permute(0, 3, 1, 2), None, None, None


def _weights(
    start: Tensor, end: Tensor, length: int, bins: int, sampling_ratio: int, aligned: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the weights of an axis for each region, (N, bins, length), and where they begin and end, (N,)."""
    extent = end - start if aligned else (end - start).clamp(min=1)
    count = torch.full_like(extent, sampling_ratio) if sampling_ratio > 0 else (extent / bins).ceil()
    # What is not finite has no samples.
    count = count.nan_to_num(0, 0, 0).clamp(min=0)[:, None, None]
    sample = torch.arange(int(count.max()) if len(count) else 0, device=start.device)
    place = torch.arange(bins, device=start.device)[:, None] + (sample + 0.5) / count.clamp(min=1)
    position = start[:, None, None] + place * (extent / bins)[:, None, None]
    inside = (sample < count) & (position >= -1) & (position <= length)
    position = torch.where(inside, position, 0).clamp(0, length - 1)
    low = position.long()
    high = (low + 1).clamp(max=length - 1)
    share = inside / count.clamp(min=1)
    weights = start.new_zeros((len(start), bins, length))
    weights.scatter_add_(2, low, share * (1 - (position - low)))
    weights.scatter_add_(2, high, share * (position - low))
    seen = weights.any(1).long()
    return weights, seen.argmax(1), (seen * torch.arange(1, length + 1, device=start.device)).amax(1)
