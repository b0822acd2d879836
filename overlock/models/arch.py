"""The variants of OverLoCK: the only table of depths, widths and kernel sizes."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

T = TypeVar('T')

_LENGTHS = dict(embed_dims=4, base_depths=3, focus_depths=2, focus_groups=2, kernel_sizes=4, dynamic_kernel_sizes=2)


@dataclass(frozen=True)
class Arch:
    """The shape of one OverLoCK network (paper, Table 1).

    Args:
        embed_dims: Channels of stages 1 to 4 (strides 4, 8, 16, 32).
        base_depths: Static blocks in stages 1 to 3 of Base-Net.
        overview_depth: Static blocks of Overview-Net (stage 4).
        focus_depths: Dynamic blocks of Focus-Net at strides 16 and 32.
        focus_groups: Groups of ContMix at strides 16 and 32; each of the two kernel sizes has this many groups.
        kernel_sizes: Large depthwise kernels of stages 1 to 4; those of stages 3 and 4 serve Focus-Net too.
        dynamic_kernel_sizes: ContMix's larger kernel at strides 16 and 32, each beside a `small_kernel_size` one.
        small_kernel_size: ContMix's smaller kernel.
        static_mlp_ratio: Hidden width of a static block's feed-forward over its channels.
        dynamic_mlp_ratio: The same for dynamic blocks.

    Raises:
        ValueError: If a field has the wrong length or a value that no network can have.
    """

    embed_dims: tuple[int, int, int, int]
    base_depths: tuple[int, int, int]
    overview_depth: int
    focus_depths: tuple[int, int]
    focus_groups: tuple[int, int]
    kernel_sizes: tuple[int, int, int, int] = (17, 15, 13, 7)
    dynamic_kernel_sizes: tuple[int, int] = (13, 7)
    small_kernel_size: int = 5
    static_mlp_ratio: int = 4
    dynamic_mlp_ratio: int = 3

    def __post_init__(self) -> None:
        for field in fields(self):
            value, length = getattr(self, field.name), _LENGTHS.get(field.name)
            if length is not None:
                if not isinstance(value, (tuple, list)) or len(value) != length:
                    raise ValueError(f'arch: {field.name} must have {length} entries, got {value!r}')
                object.__setattr__(self, field.name, tuple(value))
            if any(not isinstance(entry, int) or entry < 1 for entry in (value if length is not None else (value,))):
                raise ValueError(f'arch: {field.name} must hold positive integers, got {value!r}')
        for name in ('kernel_sizes', 'dynamic_kernel_sizes'):
            if any(size % 2 == 0 for size in getattr(self, name)):
                raise ValueError(f'arch: {name} must be odd, got {getattr(self, name)}')
        if self.small_kernel_size % 2 == 0 or self.small_kernel_size > min(self.dynamic_kernel_sizes):
            raise ValueError(
                'arch: small_kernel_size must be odd and at most the smallest of dynamic_kernel_sizes '
                f'{self.dynamic_kernel_sizes}, got {self.small_kernel_size}'
            )
        if self.embed_dims[3] % 4:
            raise ValueError(f'arch: the last of embed_dims must be divisible by 4, got {self.embed_dims[3]}')
        for dims, groups in zip(self.embed_dims[2:], self.focus_groups, strict=True):
            if dims % (2 * groups):
                raise ValueError(f'arch: channels must be divisible by twice focus_groups, got {dims} and {groups}')

    @property
    def context_dims(self) -> int:
        """Channels of the context prior."""
        return self.embed_dims[3] // 4

    @property
    def out_channels(self) -> tuple[int, int, int, int]:
        """Channels of the four dense-prediction outputs."""
        c1, c2, c3, c4 = self.embed_dims
        return c1, c2, c3 + self.context_dims, c4 + self.context_dims


ARCHS: dict[str, Arch] = {
    'xt': Arch((56, 112, 256, 336), (2, 2, 3), 2, (6, 2), (8, 12)),
    't': Arch((64, 128, 256, 512), (4, 4, 6), 2, (12, 2), (8, 16)),
    's': Arch((64, 128, 320, 512), (6, 6, 8), 3, (16, 3), (16, 32)),
    'b': Arch((80, 160, 384, 576), (8, 8, 10), 4, (20, 4), (12, 18)),
}


def get_arch(arch: str | Mapping[str, Any] | Arch) -> Arch:
    """Return the `Arch` for a name, a mapping of its fields, or an `Arch`; see `find_arch`."""
    return find_arch(arch, Arch, ARCHS)


def find_arch(arch: str | Mapping[str, Any] | T, kind: type[T], archs: Mapping[str, T]) -> T:
    """Return an arch of a kind, a dataclass, by its name in a table, by a mapping of its fields, or as it is.

    Raises:
        ValueError: If the name is unknown or the fields do not make a network.
        TypeError: If `arch` is none of the three.
    """
    if isinstance(arch, kind):
        return arch
    if isinstance(arch, str):
        if arch not in archs:
            raise ValueError(f"arch must be one of {', '.join(archs)} or a dict of one's own, got {arch!r}")
        return archs[arch]
    if isinstance(arch, Mapping):
        try:
            return kind(**arch)
        except TypeError as error:
            names = ', '.join(field.name for field in fields(kind))  # type: ignore[arg-type]
            raise ValueError(f'arch dict: {error}; its fields are {names}') from error
    raise TypeError(f'arch must be a name, a dict or an overlock.{kind.__name__}, got {type(arch).__name__}')
