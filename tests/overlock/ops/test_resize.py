"""Sizes and pooling that an exported graph computes for every size are those of eager mode."""

import pytest
import torch
from torch.nn import functional as F

from overlock.ops.contmix import banded, contmix
from overlock.ops.contmix.inputs import Inputs
from overlock.ops.resize import adaptive_avg_pool2d, enlarged_size
from tests.testing import TOLERANCES, assert_relative


def published(height, width, least):
    """The published rule, with its rounding."""
    short = min(height, width)
    if short >= least:
        return height, width
    return tuple(least if side == short else int(least / short * side) for side in (height, width))


@pytest.mark.parametrize('least', [5, 7, 9, 13])
def test_small_maps_grow_by_the_published_rule(least):
    for height in range(1, 2 * least):
        for width in range(1, 150):
            assert enlarged_size(height, width, least) == published(height, width, least)


class Resized(torch.nn.Module):
    def forward(self, x):
        size = enlarged_size(*x.shape[2:], 7)
        y = F.interpolate(x, size, mode='bilinear', align_corners=False)
        return adaptive_avg_pool2d(y, x.shape[2:]), adaptive_avg_pool2d(x, (7, 7)), adaptive_avg_pool2d(x, (1, 1))


def test_one_graph_enlarges_and_pools_at_every_size():
    height, width = (torch.export.Dim(name, min=2, max=300) for name in ('height', 'width'))
    x = torch.rand(2, 3, 5, 6, dtype=torch.float64)
    program = torch.export.export(Resized(), (x,), dynamic_shapes=({2: height, 3: width},), strict=False).module()
    for size in ((2, 2), (3, 29), (6, 13), (7, 7), (8, 50), (29, 30)):
        x = torch.rand(2, 3, *size, dtype=torch.float64)
        for ours, expected in zip(program(x), Resized()(x), strict=True):
            assert_relative(ours, expected, TOLERANCES[torch.float64])


@pytest.mark.parametrize(('height', 'width', 'large'), [(7, 7, 7), (7, 9, 5), (14, 20, 13), (13, 31, 13), (16, 5, 3)])
def test_banded_contmix_is_the_reference(height, width, large):
    generator = torch.Generator().manual_seed(0)

    def noise(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    small, groups, channels = 3, 2, 3
    tensors = (
        noise(2, groups * channels, height, width),
        noise(2, groups * channels, 7, 7),
        noise(2, 2 * groups * channels, height, width),
        noise(small**2 + large**2, 49),
        noise(small**2 + large**2),
        noise(groups, 2 * small - 1, 2 * small - 1),
        noise(groups, 2 * large - 1, 2 * large - 1),
    )
    options = dict(kernel_sizes=(small, large), num_groups=groups, scale=0.3)
    expected = contmix(*tensors, **options, backend='reference')
    assert_relative(banded.run(Inputs(*tensors, *options.values())), expected, TOLERANCES[torch.float64])
