"""ContMix on GPUs: launches the fused kernels of `triton_kernels.py`; README.md beside this file describes them."""

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from overlock.ops.contmix import library
from overlock.ops.contmix.inputs import Half, Inputs, Projected
from overlock.ops.gpu import interpreted, why_no_triton, why_not_on_gpu

why_unavailable = why_no_triton

# Queries of one row in a tile: what a product on tensor cores takes.
COLS = 16
# Rows of queries away from the borders whose gradients of the position bias are summed together.
STEP = 4
# About how many partial sums of a tap's gradient there are, over all images and groups.
PARTIALS = 1024


def why_unsupported(inputs: Inputs) -> str:
    """Return '' if the maps are on a CUDA device, or the interpreter runs, else the reason why not."""
    return why_not_on_gpu(inputs.value)


def _kernels() -> ModuleType:
    from overlock.ops.contmix import triton_kernels

    return triton_kernels


class Map(NamedTuple):
    """A map as kernels take it."""

    data: Tensor
    strides: tuple[int, ...]


class Size(NamedTuple):
    """Images, groups, height and width."""

    B: int
    G: int
    H: int
    W: int


class Operands(NamedTuple):
    """What all kernels take: packed maps and tables of biases."""

    query: Map
    kernel: Tensor
    value: Map
    tables: tuple[Tensor, Tensor]
    size: Size


class Runs(NamedTuple):
    """Runs of query rows that `tap_grad` sums together."""

    EDGE: int  # rows near a border, each of them a run
    STEP: int  # rows of a run between the borders
    COUNT: int
    SPAN: int  # runs of a program


class Constants(NamedTuple):
    """Compile-time constants of kernels."""

    K_SMALL: int
    K_LARGE: int
    D: int  # channels of a group
    P: int  # the same padded to a power of two, at least 16
    P_TAPS: int  # taps of a window row, padded to a power of two with at least one tap of padding
    P_COLS: int  # columns of the windows of a tile, padded to a power of two
    DOT: Any  # dtype of the operands of products
    ROWS: int = 2  # rows of a tile of queries, or window rows of a program of `tap_grad`
    COLS: int = COLS  # queries of one row in a tile


def forward(x: Projected) -> tuple[Tensor, Tensor]:
    """Compute the mixed map and the log-sum-exps; see `overlock.ops.contmix.library.register`."""
    with torch.cuda.device_of(x.value):
        o, constants = _prepare(x)
        out = torch.empty_like(x.value)
        lse = o.tables[0].new_empty(2, *o.size)
        _kernels().forward[_grid(o, constants.ROWS, COLS)](o, _map(out), lse, **_options(x, constants, registers=128))
    return out, lse


def backward(grad: Tensor, lse: Tensor, x: Projected) -> Projected:
    """Compute the gradients; see `overlock.ops.contmix.library.register`."""
    with torch.cuda.device_of(x.value):
        o, constants = _prepare(x)
        packed = _map(_packed(_by_group(grad, 2 * o.size.G), constants.P))
        lse = lse.contiguous()
        delta, grad_query, grad_value = torch.empty_like(lse), torch.empty_like(x.query), torch.empty_like(x.value)
        # This fills `delta`, which `tap_grad` takes.
        _kernels().query_grad[_grid(o, constants.ROWS, COLS)](
            o, packed, lse, delta, _map(grad_query), **_options(x, constants, registers=168)
        )
        options = _options(x, constants, registers=160, num_warps=1)
        for half, size in enumerate(x.kernel_sizes):
            keys = _keys(size, constants.P_COLS)
            _kernels().value_grad[_grid(o, 1, keys)](o, packed, lse, _map(grad_value), HALF=half, KEYS=keys, **options)
        partial, *rpb_partials = _tap_grads(o, constants, packed, lse, delta, _options(x, constants, registers=168))
        taps = partial.sum(0)
        grad_kernel = torch.empty_like(x.kernel).copy_(taps[..., :-1].transpose(2, 3))
        grad_bias = torch.empty_like(x.bias).copy_(taps[..., -1].sum((0, 1)))
        grad_small, grad_large = (
            torch.empty_like(rpb).copy_(part.sum((0, 1)))
            for rpb, part in zip((x.rpb_small, x.rpb_large), rpb_partials, strict=True)
        )
    return Projected(grad_query, grad_kernel, grad_value, grad_bias, grad_small, grad_large)


run = library.register('triton', forward, backward)


def _keys(size: int, most: int) -> int:
    """Return the number of pixels of a row, at most `most`, whose queries fill their tiles best."""
    fitting = (min(most, tiles * COLS - size + 1) for tiles in range(size // COLS + 1, size // COLS + 4))
    return max(fitting, key=lambda keys: keys / -(-(keys + size - 1) // COLS))


def _tap_grads(
    o: Operands, constants: Constants, grad: Map, lse: Tensor, delta: Tensor, options: dict[str, Any]
) -> list[Tensor]:
    """Return partial sums of the gradients of the taps.

    Returns:
        (parts, B, G, T, d + 1) of dkernel and, last, dbias; (B, runs, G, 2K - 1, 2K - 1) of each drpb.
    """
    batch, groups, height, _ = o.size
    sizes = constants.K_SMALL, constants.K_LARGE
    edge = max(sizes) // 2
    count = 2 * edge + -(-(height - 2 * edge) // STEP)
    span = max(1, count * batch * groups // PARTIALS)
    runs, parts = Runs(edge, STEP, count, span), -(-count // span)
    partials = [lse.new_empty(parts, batch, groups, sum(size**2 for size in sizes), constants.D + 1)]
    for half, size in enumerate(sizes):
        offsets = 2 * size - 1
        partials.append(lse.new_zeros(batch, count, groups, offsets, offsets))
        padded = max(COLS, _power_of_two(offsets))
        _kernels().tap_grad[(batch * groups * parts * -(-size // constants.ROWS),)](
            o, grad, lse, delta, partials[0], partials[-1], runs, HALF=half, P_RPB=padded, **options
        )
    return partials


def _prepare(x: Projected) -> tuple[Operands, Constants]:
    groups, dims = x.kernel.shape[1:3]
    small, large = x.kernel_sizes
    # The interpreter multiplies the bits of bfloat16 as if they were integers.
    product = torch.float32 if interpreted() and x.value.dtype == torch.bfloat16 else x.value.dtype
    constants = Constants(
        K_SMALL=small,
        K_LARGE=large,
        D=dims,
        P=max(16, _power_of_two(dims)),
        P_TAPS=max(16, _power_of_two(max(small, large) + 1)),
        P_COLS=_power_of_two(COLS + max(small, large) - 1),
        DOT=getattr(_kernels().tl, str(product).removeprefix('torch.')),
    )
    batch, _, height, width = x.value.shape
    table_small, table_large = (_table(half, constants.P_TAPS) for half in x.halves())
    operands = Operands(
        _map(_packed(_by_group(x.query, groups), constants.P)),
        # A kernel is packed like a map of one row.
        _packed(x.kernel.transpose(2, 3).unsqueeze(2), constants.P, copy=True),
        _map(_packed(_by_group(x.value, 2 * groups), constants.P)),
        (table_small, table_large),
        Size(batch, groups, height, width),
    )
    return operands, constants


def _map(x: Tensor) -> Map:
    return Map(x, x.stride())


def _by_group(x: Tensor, groups: int) -> Tensor:
    """Return a view (B, G, H, W, d) of (B, G d, H, W)."""
    return x.unflatten(1, (groups, -1)).permute(0, 1, 3, 4, 2)


def _packed(x: Tensor, width: int, copy: bool = False) -> Tensor:
    """Return (B, G, H, W, `width`), zeros behind the d, of (B, G, H, W, d): `x` itself if it is so, without `copy`."""
    if x.shape[-1] == width and x.stride(-1) == 1 and not copy:
        return x
    batch, groups, height, length, dims = x.shape
    target = x.new_empty(batch, groups, height, length, width)
    columns = 32
    _kernels().pack[(batch * groups * height * -(-length // columns),)](
        x, target, x.stride(), groups, height, length, D=dims, P=width, COLS=columns, num_warps=1
    )
    return target


def _table(half: Half, width: int) -> Tensor:
    """Return the table of biases, (G, K, K, K, `width`): see the kernel `bias_table`."""
    size, groups = half.size, half.rpb.shape[0]
    wide = torch.promote_types(half.value.dtype, torch.float32)
    table = half.rpb.new_empty(groups, size, size, size, width, dtype=wide)
    _kernels().bias_table[(groups * size * size,)](
        half.bias, half.rpb, table, half.bias.stride(0), half.rpb.stride(), K=size, P_TAPS=width, num_warps=1
    )
    return table


def _grid(o: Operands, rows: int, cols: int) -> tuple[int]:
    """Return the number of programs: one for each tile of `rows` x `cols` pixels."""
    batch, groups, height, width = o.size
    return (batch * groups * -(-height // rows) * -(-width // cols),)


def _options(x: Projected, constants: Constants, registers: int, num_warps: int = 2) -> dict[str, Any]:
    """Return launch options; `registers` was found for up to 16 channels in half precision and holds only for these."""
    chosen = x.value.element_size() == 2 and constants.P == 16
    return dict(C=constants, num_warps=num_warps, num_stages=2) | (dict(maxnreg=registers) if chosen else {})


def _power_of_two(number: int) -> int:
    """Return the smallest power of two that is not below `number`."""
    return 1 << (number - 1).bit_length()
