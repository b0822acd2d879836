"""The Triton kernels of the dilated branches; `dilated_triton.py` imports this file when it launches one.

Maps come packed, as (units, height, width, LANES) in a frame of zeros: a unit is a block of LANES channels of an image,
and no tap of a tile leaves the frame. A tile is ROWS x COLS pixels of a unit, (PIXELS, LANES) in registers. Sums are in
the dtype of `taps`. `dilated_triton.py` defines the named tuples: `Frame` (as `f`) and `Constants` (as `C`). `branches`
has the size, the dilation and the first tap of each branch, so that one kernel serves all layers.
"""

import triton
import triton.language as tl

# Triton would compile kernels again where one of these is 1 or a multiple of 16, and they would be no faster.
COUNTS = ('first', 'span')


@triton.jit
def _tile(height, width, C: tl.constexpr):
    """Return this program's unit (int64) and tile of maps of this size."""
    tiles = tl.cdiv(height, C.ROWS) * tl.cdiv(width, C.COLS)
    return (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles


@triton.jit
def _pixels(height, width, tile, C: tl.constexpr):
    """Return rows and columns of a tile's pixels, (PIXELS,), and which of them are on the map, (PIXELS, 1)."""
    segments = tl.cdiv(width, C.COLS)
    pixel = tl.arange(0, C.ROWS * C.COLS)
    rows, cols = tile // segments * C.ROWS + pixel // C.COLS, tile % segments * C.COLS + pixel % C.COLS
    return rows, cols, ((rows < height) & (cols < width))[:, None]


@triton.jit
def _framed(f, rows, cols, C: tl.constexpr):
    """Return the offsets (PIXELS, LANES) of pixels of the map in a packed one."""
    return (((rows + f.REACH) * f.WIDTH + cols + f.REACH) * C.LANES)[:, None] + tl.arange(0, C.LANES)[None, :]


@triton.jit
def _strided(f, data, strides, unit, rows, cols, C: tl.constexpr):
    """Return pointers (PIXELS, LANES) to pixels of a map (B, C, H, W), and which channels there are, (1, LANES)."""
    channels = unit % f.BLOCKS * C.LANES + tl.arange(0, C.LANES)
    # The last pixels of a large map are farther than an int32 counts.
    offsets = (rows.to(tl.int64) * strides[2] + cols * strides[3])[:, None] + (channels * strides[1])[None, :]
    return data + unit // f.BLOCKS * strides[0] + offsets, (channels < f.CHANNELS)[None, :]


@triton.jit
def _taps_of(f, taps, unit, C: tl.constexpr):
    """Return pointers (LANES,) to the first tap of a unit."""
    return taps + unit % f.BLOCKS * C.LANES + tl.arange(0, C.LANES)


@triton.jit
def _convolve(f, x, taps, branches, branch, z, SIGN: tl.constexpr, C: tl.constexpr):
    """Add to a tile its convolution with a branch, or for SIGN -1 the transposed one; `x` points at its pixels."""
    size, dilation = tl.load(branches + 3 * branch), tl.load(branches + 3 * branch + 1)
    step = dilation * (SIGN * C.LANES)
    stride = f.BLOCKS * C.LANES
    taps += tl.load(branches + 3 * branch + 2) * stride
    x -= size // 2 * (f.WIDTH + 1) * step
    for _ in range(size):
        for b in tl.range(0, size, loop_unroll_factor=C.UNROLL):
            z += tl.load(x + b * step).to(z.dtype) * tl.load(taps + b * stride)[None, :]
        x += f.WIDTH * step
        taps += size * stride
    return z


@triton.jit
def _branch(f, x, taps, branches, branch, unit, rows, cols, C: tl.constexpr):
    """Return a tile of a branch's map."""
    x += unit * f.HEIGHT * f.WIDTH * C.LANES + _framed(f, rows, cols, C)
    z = tl.full([C.ROWS * C.COLS, C.LANES], 0, taps.dtype.element_ty)
    return _convolve(f, x, _taps_of(f, taps, unit, C), branches, branch, z, 1, C)


@triton.jit
def pack(f, source, strides, target, C: tl.constexpr):
    """Copy a map (B, C, H, W) into a frame of zeros."""
    unit, tile = _tile(f.HEIGHT, f.WIDTH, C)
    rows, cols, framed = _pixels(f.HEIGHT, f.WIDTH, tile, C)
    y, x = rows - f.REACH, cols - f.REACH
    pointers, there = _strided(f, source, strides, unit, y, x, C)
    live = ((y >= 0) & (y < f.H) & (x >= 0) & (x < f.W))[:, None]
    pixels = tl.load(pointers, mask=live & there, other=0.0)
    target += unit * f.HEIGHT * f.WIDTH * C.LANES
    tl.store(target + _framed(f, y, x, C), pixels, mask=framed)


@triton.jit
def moments(f, x, taps, branches, partial, C: tl.constexpr):
    """Compute mean and sum of squared deviations of a tile of a branch: (2, branches, units, tiles, LANES)."""
    unit, tile = _tile(f.H, f.W, C)
    rows, cols, live = _pixels(f.H, f.W, tile, C)
    z = _branch(f, x, taps, branches, tl.program_id(1), unit, rows, cols, C)
    mean = tl.sum(tl.where(live, z, 0.0), 0) / tl.sum(live.to(z.dtype), 0)
    deviations = tl.where(live, z - mean[None, :], 0.0)
    partial += (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * C.LANES + tl.arange(0, C.LANES)
    tl.store(partial, mean)
    squares = tl.num_programs(1).to(tl.int64) * tl.num_programs(0) * C.LANES
    tl.store(partial + squares, tl.sum(deviations * deviations, 0))


@triton.jit
def products(f, x, taps, branches, grad, strides, means, partial, C: tl.constexpr):
    """Sum gradient x deviation from the mean over a tile of a branch: (branches, units, tiles, LANES)."""
    unit, tile = _tile(f.H, f.W, C)
    rows, cols, live = _pixels(f.H, f.W, tile, C)
    z = _branch(f, x, taps, branches, tl.program_id(1), unit, rows, cols, C)
    z -= tl.load(_taps_of(f, means, unit, C) + tl.program_id(1) * f.BLOCKS * C.LANES)[None, :]
    pointers, there = _strided(f, grad, strides, unit, rows, cols, C)
    slopes = tl.load(pointers, mask=live & there, other=0.0).to(z.dtype)
    partial += (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * C.LANES
    tl.store(partial + tl.arange(0, C.LANES), tl.sum(slopes * z, 0))


@triton.jit(do_not_specialize=COUNTS)
def branch_grad(f, x, taps, branches, grad, strides, coefficients, target, first, C: tl.constexpr):
    """Compute the gradient of a tile of a branch's map, c_0 grad + c_1 z + c_2: (units, branches), each in its frame.

    `first` is the first unit of `target`; `coefficients` are (3, branches, C).
    """
    unit, tile = _tile(f.H, f.W, C)
    rows, cols, live = _pixels(f.H, f.W, tile, C)
    z = _branch(f, x, taps, branches, tl.program_id(1), unit + first, rows, cols, C)
    pointers, there = _strided(f, grad, strides, unit + first, rows, cols, C)
    slopes = tl.load(pointers, mask=live & there, other=0.0).to(z.dtype)
    stride = f.BLOCKS * C.LANES
    factor = _taps_of(f, coefficients, unit + first, C) + tl.program_id(1) * stride
    stride *= tl.num_programs(1)
    a, b, c = tl.load(factor), tl.load(factor + stride), tl.load(factor + 2 * stride)
    dz = a[None, :] * slopes + b[None, :] * z + c[None, :]
    target += (unit * tl.num_programs(1) + tl.program_id(1)) * f.HEIGHT * f.WIDTH * C.LANES
    tl.store(target + _framed(f, rows, cols, C), dz.to(target.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=COUNTS)
def input_grad(f, dz, taps, branches, target, strides, first, count, C: tl.constexpr):
    """Sum the transposed convolutions of all `count` branches for a tile of the input's gradient."""
    unit, tile = _tile(f.H, f.W, C)
    rows, cols, live = _pixels(f.H, f.W, tile, C)
    dx = tl.full([C.ROWS * C.COLS, C.LANES], 0, taps.dtype.element_ty)
    dz += unit * count * f.HEIGHT * f.WIDTH * C.LANES
    pixels, taps = _framed(f, rows, cols, C), _taps_of(f, taps, unit + first, C)
    for branch in range(count):
        dx = _convolve(f, dz + pixels, taps, branches, branch, dx, -1, C)
        dz += f.HEIGHT * f.WIDTH * C.LANES
    pointers, there = _strided(f, target, strides, unit + first, rows, cols, C)
    tl.store(pointers, dx.to(target.dtype.element_ty), mask=live & there)


@triton.jit(do_not_specialize=COUNTS)
def tap_grad(f, x, dz, branches, groups, partial, first, count, total, span, C: tl.constexpr):
    """Sum gradient x shifted input over `span` tiles of a unit for TAPS taps: (units, parts, taps, LANES)."""
    tiles = tl.cdiv(f.H, C.ROWS) * tl.cdiv(f.W, C.COLS)
    parts = tl.cdiv(tiles, span)
    unit, part = (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts
    branch, begin = tl.load(groups + 2 * tl.program_id(1)), tl.load(groups + 2 * tl.program_id(1) + 1)
    size, dilation = tl.load(branches + 3 * branch), tl.load(branches + 3 * branch + 1)
    t = begin + tl.arange(0, C.TAPS)
    tap = tl.minimum(t, size * size - 1)
    shift = ((tap // size - size // 2) * f.WIDTH + tap % size - size // 2) * dilation * C.LANES
    x += (unit + first) * f.HEIGHT * f.WIDTH * C.LANES
    dz += (unit * count + branch) * f.HEIGHT * f.WIDTH * C.LANES
    sums = tl.full([C.TAPS, C.ROWS * C.COLS, C.LANES], 0, partial.dtype.element_ty)
    for tile in range(part * span, tl.minimum(part * span + span, tiles)):
        rows, cols, _ = _pixels(f.H, f.W, tile, C)
        # Beyond the map the gradient is zero, too.
        pixels = _framed(f, rows, cols, C)
        slopes = tl.load(dz + pixels).to(sums.dtype)
        sums += tl.load(x + shift[:, None, None] + pixels[None, :, :]).to(sums.dtype) * slopes[None, :, :]
    partial += (((unit + first) * parts + part) * total + tl.load(branches + 3 * branch + 2)) * C.LANES
    offsets = (t * C.LANES)[:, None] + tl.arange(0, C.LANES)[None, :]
    tl.store(partial + offsets, tl.sum(sums, 1), mask=(t < size * size)[:, None])
