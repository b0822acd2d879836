"""The inputs of the backends of ContMix."""

from typing import NamedTuple

from torch import Tensor


class Half(NamedTuple):
    """The inputs of one kernel: the small one with the first half of the value channels, or the large one."""

    size: int  # K
    query: Tensor  # (B, G, d, H, W), the same for both
    kernel: Tensor  # (B, G, d, K^2)
    bias: Tensor  # (K^2,)
    rpb: Tensor  # (G, 2K - 1, 2K - 1)
    value: Tensor  # (B, G, d, H, W)


class Projected(NamedTuple):
    """The inputs of the fused backends: the regions are already projected to taps and scaled."""

    query: Tensor  # (B, G d, H, W)
    kernel: Tensor  # (B, G, d, k^2 + K^2), first the taps of the small kernel
    value: Tensor  # (B, 2 G d, H, W), first the channels of the small kernel
    bias: Tensor  # (k^2 + K^2,)
    rpb_small: Tensor  # (G, 2k - 1, 2k - 1)
    rpb_large: Tensor  # (G, 2K - 1, 2K - 1)

    @property
    def kernel_sizes(self) -> tuple[int, int]:
        """The sizes (k, K)."""
        return (self.rpb_small.shape[1] + 1) // 2, (self.rpb_large.shape[1] + 1) // 2

    def by_group(self, x: Tensor) -> Tensor:
        """Return a view (B, G, d, H, W) of a map like `query`, (B, G d, H, W)."""
        return x.unflatten(1, self.kernel.shape[1:3])

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return views (B, G, d, H, W) of the halves of a map like `value`, (B, 2 G d, H, W)."""
        small, large = x.unflatten(1, (2, *self.kernel.shape[1:3])).unbind(1)
        return small, large

    def halves(self) -> tuple[Half, Half]:
        """Return the inputs of the small and of the large kernel."""
        small, large = self.kernel_sizes
        first, query, (value_small, value_large) = small**2, self.by_group(self.query), self.split(self.value)
        return (
            Half(small, query, self.kernel[..., :first], self.bias[:first], self.rpb_small, value_small),
            Half(large, query, self.kernel[..., first:], self.bias[first:], self.rpb_large, value_large),
        )


class Inputs(NamedTuple):
    """The arguments of `contmix`, which documents them."""

    query: Tensor
    key: Tensor
    value: Tensor
    weight: Tensor
    bias: Tensor
    rpb_small: Tensor
    rpb_large: Tensor
    kernel_sizes: tuple[int, int]
    num_groups: int
    scale: float

    def project(self) -> Projected:
        """Project the regions to taps: affinities and their projection are linear, so no pixel's affinity is needed."""
        kernel = (self.scale * self.key).flatten(2).unflatten(1, (self.num_groups, -1)) @ self.weight.t()
        dtype = self.value.dtype
        return Projected(self.query.to(dtype), kernel.to(dtype), self.value, self.bias, self.rpb_small, self.rpb_large)

    def check_shapes(self) -> None:
        """Check that the shapes fit each other.

        Raises:
            ValueError: If they do not, or if the map is smaller than the large kernel.
        """
        (height, width), (small, large), groups = self.value.shape[2:], self.kernel_sizes, self.num_groups
        regions = self.key.shape[2:].numel()
        if small % 2 == 0 or large % 2 == 0:
            raise ValueError(f'kernel_sizes must be odd, got {self.kernel_sizes}')
        if min(height, width) < max(small, large):
            raise ValueError(f'value must be at least {max(small, large)} pixels high and wide, got {height}x{width}')
        if self.value.shape[1] != 2 * self.query.shape[1] or self.value.shape[1] % (2 * groups):
            raise ValueError(
                f'value must have twice the channels of query and a multiple of 2 x {groups} groups, '
                f'got {self.value.shape[1]} and {self.query.shape[1]}'
            )
        for name, tensor, shape in (
            ('weight', self.weight, (small**2 + large**2, regions)),
            ('rpb', self.rpb_small, (groups, 2 * small - 1, 2 * small - 1)),
            ('rpb', self.rpb_large, (groups, 2 * large - 1, 2 * large - 1)),
        ):
            if tensor.shape != shape:
                raise ValueError(f'{name} must have shape {shape}, got {tuple(tensor.shape)}')
