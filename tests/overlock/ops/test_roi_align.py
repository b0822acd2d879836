"""RoIAlign gives what mmcv's operator gives, and its gradient."""

import pytest
import torch

from overlock.ops.roi_align import roi_align
from tests.testing import TOLERANCES, assert_relative

HEIGHT, WIDTH, SCALE = 13, 17, 0.25
# Inside, across every border, outside, wide, empty.
BOXES = [[4, 5, 40, 30], [-30, -20, 90, 80], [200, 200, 300, 300], [0, 20, 68, 21], [9, 9, 9, 9]]


@pytest.mark.parametrize('aligned', [True, False])
@pytest.mark.parametrize('sampling_ratio', [-1, 0, 2])
@pytest.mark.parametrize('size', [(7, 7), (2, 3)])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_regions_get_the_values_of_mmcv(aligned, sampling_ratio, size, memory_format):
    mmcv = pytest.importorskip('mmcv.ops')
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, HEIGHT, WIDTH, generator=generator, dtype=torch.float64, requires_grad=True)
    corners = torch.rand(40, 4, generator=generator) * 30
    boxes = torch.cat([torch.tensor(BOXES), torch.cat([corners[:, :2], corners.view(-1, 2, 2).sum(1)], 1)])
    rois = torch.cat([torch.arange(len(boxes))[:, None] % 2, boxes], 1).double()
    expected = mmcv.roi_align(x, rois, size, SCALE, sampling_ratio, 'avg', aligned)
    actual = roi_align(x.contiguous(memory_format=memory_format), rois, size, SCALE, sampling_ratio, aligned)
    assert actual.dtype == x.dtype and expected[0].abs().max() > 0
    assert_relative(actual.detach(), expected.detach(), TOLERANCES[torch.float64])
    slopes = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    (found,), (truth,) = (torch.autograd.grad(out, x, slopes) for out in (actual, expected))
    assert_relative(found, truth, TOLERANCES[torch.float64])


@pytest.mark.parametrize('bad', [torch.nan, torch.inf])
def test_no_regions_and_regions_that_are_not_finite_give_no_values(bad):
    x = torch.randn(1, 5, HEIGHT, WIDTH, requires_grad=True)
    none = roi_align(x, torch.zeros(0, 5), (7, 7), SCALE)
    assert none.shape == (0, 5, 7, 7) and not torch.autograd.grad(none.sum(), x)[0].any()
    rois = torch.tensor([[0, bad, 1, 4, 5], [0, 1, 1, 4, bad], [0, bad, bad, bad, bad]])
    assert roi_align(x, rois, (7, 7), SCALE).abs().max() == 0


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_low_precision_costs_the_values_digits_but_not_the_places(dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 5, 40, 400, generator=generator).to(dtype)
    rois = torch.tensor([[0, 1401.3, 21.7, 1440.9, 77.1], [0, 1003.1, 3.3, 1023.7, 40.1]])
    found, exact = (roi_align(each, rois, (7, 7), SCALE) for each in (x, x.double()))
    assert found.dtype == dtype
    assert_relative(found.double(), exact, 3 * torch.finfo(dtype).eps)


def test_under_autocast_it_is_computed_in_float32():
    x = torch.randn(1, 5, HEIGHT, WIDTH, requires_grad=True)
    rois, slopes = torch.tensor([[0, 4.0, 5, 40, 30]]), torch.randn(1, 5, 7, 7)
    (expected,) = torch.autograd.grad(roi_align(x, rois, (7, 7), SCALE), x, slopes)
    with torch.autocast('cpu', torch.bfloat16):
        out = roi_align(x, rois, (7, 7), SCALE)
        (found,) = torch.autograd.grad(out, x, slopes)
    assert out.dtype == torch.float32 and torch.equal(found, expected)
