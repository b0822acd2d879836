"""The Triton kernels of ContMix; `triton.py` imports this file when it launches one.

Maps come as (B, G, H, W, P): the P channels of a pixel and group side by side, zeros behind the D live ones, so that a
tile of pixels is a few wide loads. HALF is 0 for the small kernel and its half of the channels, 1 for the large one.
Sums are in the dtype of `lse`. `triton.py` defines and documents the named tuples that kernels take: `Map` (a pointer
and strides), `Operands` (as `x`), `Runs`, and `Constants` (as `C`), which stands for compile-time constants.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _start(position, length, K: tl.constexpr):
    """Return the first position of a query's window on an axis: moved inward near a border."""
    return tl.minimum(tl.maximum(position - K // 2, 0), length - K)


@triton.jit
def _dot(x, y, acc, C: tl.constexpr):
    """Return acc + x y, never in tf32."""
    return tl.dot(x.to(C.DOT), y.to(C.DOT), acc, input_precision='ieee', out_dtype=acc.dtype)


@triton.jit
def _to_columns(weights, first, SIZE: tl.constexpr):
    """Move tap t of query m in (M, P_TAPS) to column first[m] + t of (M, SIZE), and zeros everywhere else."""
    # The last tap is padding and weighs nothing; negative taps, as unsigned numbers, are beyond it.
    padding: tl.constexpr = weights.shape[1] - 1
    tap = 2 * tl.arange(0, SIZE // 2)[None, :] - first[:, None]
    even = tl.minimum(tap.to(tl.uint32, bitcast=True), padding).to(tl.int32)
    odd = tl.minimum((tap + 1).to(tl.uint32, bitcast=True), padding).to(tl.int32)
    # Joined, a thread holds neighbouring columns, and they go to shared memory in pairs.
    pairs = tl.join(tl.gather(weights, even, 1), tl.gather(weights, odd, 1))
    return tl.reshape(pairs, [weights.shape[0], SIZE])


@triton.jit
def _to_taps(columns, first, SIZE: tl.constexpr):
    """Move column first[m] + t of query m in (M, P_COLS) to tap t of (M, SIZE)."""
    index = tl.minimum(first[:, None] + tl.arange(0, SIZE)[None, :], columns.shape[1] - 1)
    return tl.gather(columns, index, 1)


@triton.jit
def _for_rows(x, ROWS: tl.constexpr):
    """Repeat (COLS,) for each row of a tile, (ROWS COLS,)."""
    return tl.reshape(tl.broadcast_to(x[None, :], [ROWS, x.shape[0]]), [ROWS * x.shape[0]])


@triton.jit
def _tile(size, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Return image and group (int64), first row and first column of this program's tile."""
    segments, bands = tl.cdiv(size.W, COLS), tl.cdiv(size.H, ROWS)
    program = tl.program_id(0)
    plane = (program // segments // bands).to(tl.int64)
    return plane // size.G, plane % size.G, program // segments % bands * ROWS, program % segments * COLS


@triton.jit
def _pixels(strides, rows, cols, P: tl.constexpr):
    """Return the offsets (rows, cols, P) of these pixels of a map."""
    offsets = (rows * strides[2])[:, None] + (cols * strides[3])[None, :]
    return offsets[:, :, None] + tl.arange(0, P)


@triton.jit
def _queries(x, tile, C: tl.constexpr):
    """Load the queries of a tile, (ROWS COLS, P); those beyond the map repeat its last row and column."""
    image, group, i0, j0 = tile
    i = tl.minimum(i0 + tl.arange(0, C.ROWS), x.size.H - 1)
    j = tl.minimum(j0 + tl.arange(0, C.COLS), x.size.W - 1)
    q = tl.load(_plane(x.query, image, group) + _pixels(x.query.strides, i, j, C.P))
    return tl.reshape(q, [C.ROWS * C.COLS, C.P])


@triton.jit
def _taps(kernel, rows, K: tl.constexpr, C: tl.constexpr):
    """Load window rows (rows, P_TAPS, P) of a packed kernel; the padding repeats the last tap."""
    tap = (rows * K)[:, None] + tl.minimum(tl.arange(0, C.P_TAPS), K - 1)[None, :]
    return tl.load(kernel + (tap * C.P)[:, :, None] + tl.arange(0, C.P))


@triton.jit
def _biases(group, row, col, K: tl.constexpr, P_TAPS: tl.constexpr):
    """Return offsets (row, col, P_TAPS) in `bias_table` of window row 0 of queries at (row, col) of their windows."""
    offsets = ((group * K + row) * K * K)[:, None] + col[None, :]
    return (offsets * P_TAPS)[:, :, None] + tl.arange(0, P_TAPS)


@triton.jit
def _bias(table, group, row, col, inside, a, K: tl.constexpr, C: tl.constexpr):
    """Load (rows cols, P_TAPS) for window row a; away from the borders of a map's row, one line serves all queries."""
    P_TAPS: tl.constexpr = C.P_TAPS
    table += a * (K * P_TAPS)
    if inside:
        line = tl.load(table + _biases(group, row, K // 2 + tl.arange(0, 1), K, P_TAPS))
        x = tl.broadcast_to(line, [row.shape[0], col.shape[0], P_TAPS])
    else:
        x = tl.load(table + _biases(group, row, col, K, P_TAPS))
    return tl.reshape(x, [row.shape[0] * col.shape[0], P_TAPS])


@triton.jit
def _store(target, tile, strides, rows, cols, live, D: tl.constexpr):
    """Store (rows, cols, P) at the D channels of a map with strides (b, c, h, w); `target` is its first channel."""
    c = tl.arange(0, tile.shape[2])
    offsets = (rows * strides[2])[:, None] + (cols * strides[3])[None, :]
    tl.store(
        target + offsets[:, :, None] + c * strides[1], tile.to(target.dtype.element_ty), mask=live[:, :, None] & (c < D)
    )


@triton.jit
def _plane(x, image, plane):
    """Return the pointer to a plane of an image: of a packed map to a group's, of another to a channel's."""
    return x.data + image * x.strides[0] + plane * x.strides[1]


@triton.jit
def _kernel_of(kernel, plane, HALF: tl.constexpr, C: tl.constexpr):
    """Return the pointer to the first tap of a packed kernel, of the small or the large half."""
    return kernel + (plane * (C.K_SMALL * C.K_SMALL + C.K_LARGE * C.K_LARGE) + HALF * C.K_SMALL * C.K_SMALL) * C.P


@triton.jit
def pack(source, target, strides, G, H, W, D: tl.constexpr, P: tl.constexpr, COLS: tl.constexpr):
    """Copy (B, G, H, W, D) of any strides to (B, G, H, W, P), contiguous, zeros behind the D."""
    segments = tl.cdiv(W, COLS)
    row = (tl.program_id(0) // segments).to(tl.int64)
    w = tl.program_id(0) % segments * COLS + tl.arange(0, COLS)
    c = tl.arange(0, P)
    source += row // H // G * strides[0] + row // H % G * strides[1] + row % H * strides[2]
    pixels = tl.load(
        source + (w * strides[3])[:, None] + (c * strides[4])[None, :],
        mask=(w < W)[:, None] & (c < D)[None, :],
        other=0.0,
    )
    tl.store(target + (row * W + w)[:, None] * P + c[None, :], pixels, mask=(w < W)[:, None])


@triton.jit
def bias_table(bias, rpb, table, bias_stride, strides, K: tl.constexpr, P_TAPS: tl.constexpr):
    """Fill a table with all biases, (G, K, K, K, P_TAPS).

    The axes are group, query's row, window row, query's column, window column.
    A query's row and column are those in its window: K // 2 for all but the ones near a border. Padded taps get -inf.
    """
    program = tl.program_id(0)
    group, row, a = program // K // K, program // K % K, program % K
    col, b = tl.arange(0, P_TAPS)[:, None], tl.arange(0, P_TAPS)[None, :]
    rpb += group * strides[0] + (K - 1 - row + a) * strides[1]
    x = tl.load(rpb + (K - 1 - col + b) * strides[2], mask=(col < K) & (b < K), other=float('-inf'))
    tap = tl.load(bias + (a * K + b) * bias_stride, mask=b < K, other=0.0)
    total = x.to(table.dtype.element_ty) + tap.to(table.dtype.element_ty)
    tl.store(table + (program * K + col) * P_TAPS + b, total, mask=col < K)


@triton.jit
def forward(x, out, lse, C: tl.constexpr):
    """Compute output and log-sum-exp of one tile of queries, for both kernel sizes."""
    tile = _tile(x.size, C.ROWS, C.COLS)
    q = _queries(x, tile, C)
    _forward_half(x, q, out, lse, tile, 0, C.K_SMALL, C)
    _forward_half(x, q, out, lse, tile, 1, C.K_LARGE, C)


@triton.jit
def _forward_half(x, q, out, lse, tile, HALF: tl.constexpr, K: tl.constexpr, C: tl.constexpr):
    """Compute and store the tile of one kernel size, with a running maximum over the rows of the window."""
    ACC: tl.constexpr = lse.dtype.element_ty
    image, group, i0, j0 = tile
    H, W = x.size.H, x.size.W
    rows, cols = i0 + tl.arange(0, C.ROWS), j0 + tl.arange(0, C.COLS)
    i, j = tl.minimum(rows, H - 1), tl.minimum(cols, W - 1)
    top, left, start = _start(i, H, K), _start(j0, W, K), _start(j, W, K)
    inside = (j0 >= K // 2) & (j0 + C.COLS + K // 2 <= W)
    row, col, first = i - top, j - start, _for_rows(start - left, C.ROWS)
    kernel = _kernel_of(x.kernel, image * x.size.G + group, HALF, C)
    seen_cols = tl.minimum(left + tl.arange(0, C.P_COLS), W - 1)
    pixels_of = _plane(x.value, image, HALF * x.size.G + group) + _pixels(x.value.strides, top, seen_cols, C.P)
    peak = tl.full([C.ROWS * C.COLS], float('-inf'), ACC)
    total = tl.full([C.ROWS * C.COLS, C.P_TAPS], 0, ACC)
    mixed = tl.full([C.ROWS, C.COLS, C.P], 0, ACC)
    for a in range(K):
        taps = tl.reshape(_taps(kernel, a + tl.arange(0, 1), K, C), [C.P_TAPS, C.P])
        logits = _dot(q, tl.trans(taps), _bias(x.tables[HALF], group, row, col, inside, a, K, C), C)
        highest = tl.maximum(peak, tl.max(logits, 1))
        weights = tl.exp2(logits * LOG2E - (highest * LOG2E)[:, None])
        decay = tl.exp2((peak - highest) * LOG2E)
        total = total * decay[:, None] + weights
        pixels = tl.load(pixels_of)
        spread = tl.reshape(_to_columns(weights.to(pixels.dtype), first, C.P_COLS), [C.ROWS, C.COLS, C.P_COLS])
        mixed = _dot(spread, pixels, mixed * tl.reshape(decay, [C.ROWS, C.COLS])[:, :, None], C)
        peak = highest
        pixels_of += x.value.strides[2]
    total = tl.sum(total, 1)
    mixed = tl.reshape(mixed, [C.ROWS * C.COLS, C.P]) / total[:, None]
    norm = peak + tl.log(total)
    live = (rows < H)[:, None] & (cols < W)[None, :]
    target = _plane(out, image, (HALF * x.size.G + group) * C.D)
    _store(target, tl.reshape(mixed, [C.ROWS, C.COLS, C.P]), out.strides, rows, cols, live, C.D)
    lse += ((HALF * x.size.B + image) * x.size.G + group) * H * W
    tl.store(lse + (rows * W)[:, None] + cols[None, :], tl.reshape(norm, [C.ROWS, C.COLS]), mask=live)


@triton.jit
def query_grad(x, grad, lse, delta, grad_query, C: tl.constexpr):
    """Compute dq of one tile of queries, and for both kernel sizes the delta that the softmax's gradient subtracts."""
    tile = _tile(x.size, C.ROWS, C.COLS)
    q = _queries(x, tile, C)
    dq = _query_half(x, q, grad, lse, delta, tile, 0, C.K_SMALL, C)
    dq += _query_half(x, q, grad, lse, delta, tile, 1, C.K_LARGE, C)
    image, group, i0, j0 = tile
    rows, cols = i0 + tl.arange(0, C.ROWS), j0 + tl.arange(0, C.COLS)
    live = (rows < x.size.H)[:, None] & (cols < x.size.W)[None, :]
    target = _plane(grad_query, image, group * C.D)
    _store(target, tl.reshape(dq, [C.ROWS, C.COLS, C.P]), grad_query.strides, rows, cols, live, C.D)


@triton.jit
def _query_half(x, q, grad, lse, delta, tile, HALF: tl.constexpr, K: tl.constexpr, C: tl.constexpr):
    """Return the share of one kernel size in a tile's dq, (ROWS COLS, P); store delta, the sum of weight x dweight."""
    image, group, i0, j0 = tile
    H, W = x.size.H, x.size.W
    rows, cols = i0 + tl.arange(0, C.ROWS), j0 + tl.arange(0, C.COLS)
    i, j = tl.minimum(rows, H - 1), tl.minimum(cols, W - 1)
    top, left, start = _start(i, H, K), _start(j0, W, K), _start(j, W, K)
    inside = (j0 >= K // 2) & (j0 + C.COLS + K // 2 <= W)
    row, col, first = i - top, j - start, _for_rows(start - left, C.ROWS)
    kernel = _kernel_of(x.kernel, image * x.size.G + group, HALF, C)
    value_of = _plane(x.value, image, HALF * x.size.G + group)
    places = ((HALF * x.size.B + image) * x.size.G + group) * H * W + (i * W)[:, None] + j[None, :]
    norm = tl.reshape(tl.load(lse + places), [C.ROWS * C.COLS])[:, None] * LOG2E
    grads = tl.load(_plane(grad, image, HALF * x.size.G + group) + _pixels(grad.strides, i, j, C.P))
    # Counted from what the query's own pixel gives, dweights are small, and the two sums below hardly cancel.
    own = tl.load(value_of + _pixels(x.value.strides, i, j, C.P))
    origin = tl.sum(grads.to(norm.dtype) * own.to(norm.dtype), 2)
    value_of += _pixels(x.value.strides, top, tl.minimum(left + tl.arange(0, C.P_COLS), W - 1), C.P)
    excess = tl.full([C.ROWS * C.COLS, C.P_TAPS], 0, norm.dtype)
    moment = tl.full([C.ROWS * C.COLS, C.P], 0, norm.dtype)
    mean = tl.full([C.ROWS * C.COLS, C.P], 0, norm.dtype)
    for a in range(K):
        taps = tl.reshape(_taps(kernel, a + tl.arange(0, 1), K, C), [C.P_TAPS, C.P])
        logits = _dot(q, tl.trans(taps), _bias(x.tables[HALF], group, row, col, inside, a, K, C), C)
        weights = tl.exp2(logits * LOG2E - norm)
        level = tl.broadcast_to(-origin[:, :, None], [C.ROWS, C.COLS, C.P_COLS])
        seen = _dot(grads, tl.trans(tl.load(value_of), 0, 2, 1), level, C)
        # Rounded like the maps, of which they are products, they take half the way through shared memory.
        seen = tl.reshape(seen, [C.ROWS * C.COLS, C.P_COLS]).to(grads.dtype)
        dweights = _to_taps(seen, first, C.P_TAPS)
        share = weights * dweights.to(norm.dtype)
        excess += share
        moment = _dot(share.to(taps.dtype), taps, moment, C)
        mean = _dot(weights.to(taps.dtype), taps, mean, C)
        value_of += x.value.strides[2]
    rest = tl.sum(excess, 1)
    live = (rows < H)[:, None] & (cols < W)[None, :]
    tl.store(delta + places, origin + tl.reshape(rest, [C.ROWS, C.COLS]), mask=live)
    return moment - rest[:, None] * mean


@triton.jit
def _run(run, runs, H):
    """Return first row and end of a run of rows that stand alike in their windows: near a border, each row is a run."""
    near, far = run < runs.EDGE, run >= runs.COUNT - runs.EDGE
    begin = tl.where(near, run, tl.where(far, H - runs.COUNT + run, runs.EDGE + (run - runs.EDGE) * runs.STEP))
    return begin, tl.where(near | far, begin + 1, tl.minimum(begin + runs.STEP, H - runs.EDGE))


@triton.jit
def tap_grad(x, grad, lse, delta, partial, rpb_partial, runs, HALF: tl.constexpr, P_RPB: tl.constexpr, C: tl.constexpr):
    """Sum ROWS window rows over SPAN runs of query rows, for dkernel and dbias, and for drpb run by run."""
    ACC: tl.constexpr = lse.dtype.element_ty
    K: tl.constexpr = C.K_LARGE if HALF else C.K_SMALL
    B, G, H, W = x.size.B, x.size.G, x.size.H, x.size.W
    blocks, chunks = (K + C.ROWS - 1) // C.ROWS, tl.cdiv(runs.COUNT, runs.SPAN)
    program = tl.program_id(0)
    plane, chunk = (program // blocks // chunks).to(tl.int64), program // blocks % chunks
    image, group = plane // G, plane % G
    rows = program % blocks * C.ROWS + tl.arange(0, C.ROWS)
    a = tl.minimum(rows, K - 1)
    query_of = _plane(x.query, image, group)
    value_of = _plane(x.value, image, HALF * G + group)
    grad_of = _plane(grad, image, HALF * G + group)
    lse += (HALF * B * G + plane) * H * W
    delta += (HALF * B * G + plane) * H * W
    places = plane * (C.K_SMALL * C.K_SMALL + C.K_LARGE * C.K_LARGE) + HALF * C.K_SMALL * C.K_SMALL
    taps = tl.trans(_taps(x.kernel + places * C.P, a, K, C), 0, 2, 1)
    dtaps = tl.full([C.ROWS, C.P_TAPS, C.P], 0, ACC)
    dbias = tl.full([C.ROWS, C.COLS, C.P_TAPS], 0, ACC)
    u = tl.arange(0, P_RPB)
    for run in range(chunk * runs.SPAN, tl.minimum(chunk * runs.SPAN + runs.SPAN, runs.COUNT)):
        begin, end = _run(run, runs, H)
        at = begin - _start(begin, H, K)
        drpb = tl.full([C.ROWS * C.COLS, P_RPB], 0, ACC)
        for j0 in range(0, W, C.COLS):
            cols = j0 + tl.arange(0, C.COLS)
            j = tl.minimum(cols, W - 1)
            start = _start(j, W, K)
            col = j - start
            left = _start(j0, W, K)
            first = _for_rows(start - left, C.ROWS)
            seen_cols = tl.minimum(left + tl.arange(0, C.P_COLS), W - 1)
            offsets = (a * (K * C.P_TAPS))[:, None, None] + _biases(group, at + 0 * a, col, K, C.P_TAPS)
            bias = tl.load(x.tables[HALF] + offsets)
            total = tl.full([C.ROWS, C.COLS, C.P_TAPS], 0, ACC)  # dlogits, summed over the rows of the run
            for i in range(begin, end):
                row = i + tl.arange(0, 1)
                q = tl.load(query_of + _pixels(x.query.strides, row, j, C.P))
                q = tl.broadcast_to(q, [C.ROWS, C.COLS, C.P])
                grads = tl.load(grad_of + _pixels(grad.strides, row, j, C.P))
                grads = tl.broadcast_to(grads, [C.ROWS, C.COLS, C.P])
                pixels = tl.load(value_of + _pixels(x.value.strides, _start(i, H, K) + a, seen_cols, C.P))
                # An infinite log-sum-exp takes out the queries beyond the map.
                norm = tl.load(lse + i * W + cols, mask=cols < W, other=float('inf'))[None, :, None]
                level = -tl.load(delta + i * W + j)[None, :, None]
                level = tl.broadcast_to(level, [C.ROWS, C.COLS, C.P_COLS])
                weights = tl.exp2(_dot(q, taps, bias - norm, C) * LOG2E)
                seen = _dot(grads, tl.trans(pixels, 0, 2, 1), level, C)
                seen = tl.reshape(seen, [C.ROWS * C.COLS, C.P_COLS]).to(q.dtype)
                dweights = tl.reshape(_to_taps(seen, first, C.P_TAPS).to(ACC), [C.ROWS, C.COLS, C.P_TAPS])
                dlogits = weights * dweights
                total += dlogits
                dtaps = _dot(tl.trans(dlogits.to(q.dtype), 0, 2, 1), q, dtaps, C)
            dbias += total
            total = tl.reshape(total, [C.ROWS * C.COLS, C.P_TAPS])
            drpb += _to_columns(total, _for_rows(K - 1 - col, C.ROWS), P_RPB)
        line = ((image * runs.COUNT + run) * G + group) * (2 * K - 1) + K - 1 - at + rows
        tl.store(
            rpb_partial + (line * (2 * K - 1))[:, None] + u,
            tl.sum(tl.reshape(drpb, [C.ROWS, C.COLS, P_RPB]), 1),
            mask=(rows < K)[:, None] & (u < 2 * K - 1),
        )
    t, c = tl.arange(0, C.P_TAPS), tl.arange(0, C.P)
    partial += (chunk * B * G * (C.K_SMALL * C.K_SMALL + C.K_LARGE * C.K_LARGE) + places) * (C.D + 1)
    offsets = ((rows * K)[:, None] + t) * (C.D + 1)
    live = (rows < K)[:, None] & (t < K)
    tl.store(partial + offsets[:, :, None] + c, dtaps, mask=live[:, :, None] & (c < C.D))
    tl.store(partial + offsets + C.D, tl.sum(dbias, 1), mask=live)


@triton.jit
def value_grad(x, grad, lse, grad_value, HALF: tl.constexpr, KEYS: tl.constexpr, C: tl.constexpr):
    """Compute dv of KEYS pixels of one row: a sum over the queries whose windows hold them."""
    K: tl.constexpr = C.K_LARGE if HALF else C.K_SMALL
    H, W = x.size.H, x.size.W
    image, group, y, x0 = _tile(x.size, 1, KEYS)
    plane = image * x.size.G + group
    query_of = _plane(x.query, image, group)
    grad_of = _plane(grad, image, HALF * x.size.G + group)
    kernel = _kernel_of(x.kernel, plane, HALF, C)
    lse += (HALF * x.size.B * x.size.G + plane) * H * W
    keys = x0 + tl.arange(0, C.P_COLS)
    last = tl.minimum(x0 + KEYS, W) - 1
    j_begin, j_end = tl.where(x0 < K, 0, x0 - K // 2), tl.where(last >= W - K, W, last + K // 2 + 1)
    i_begin, i_end = tl.where(y < K, 0, y - K // 2), tl.where(y >= H - K, H, y + K // 2 + 1)
    dv = tl.full([C.P_COLS, C.P], 0, lse.dtype.element_ty)
    for j0 in range(j_begin, j_end, C.COLS):
        cols = j0 + tl.arange(0, C.COLS)
        j = tl.minimum(cols, W - 1)
        start = _start(j, W, K)
        inside = (j0 >= K // 2) & (j0 + C.COLS + K // 2 <= W)
        for i in range(i_begin, i_end):
            row = i + tl.arange(0, 1)
            top = _start(row, H, K)
            taps = tl.reshape(_taps(kernel, y - top, K, C), [C.P_TAPS, C.P])
            q = tl.reshape(tl.load(query_of + _pixels(x.query.strides, row, j, C.P)), [C.COLS, C.P])
            grads = tl.reshape(tl.load(grad_of + _pixels(grad.strides, row, j, C.P)), [C.COLS, C.P])
            # An infinite log-sum-exp takes out the queries beyond the map.
            norm = tl.load(lse + i * W + cols, mask=cols < W, other=float('inf'))
            bias = _bias(x.tables[HALF], group, row - top, j - start, inside, y - _start(i, H, K), K, C)
            logits = _dot(q, tl.trans(taps), bias, C)
            weights = tl.exp2((logits - norm[:, None]) * LOG2E)
            spread = _to_columns(weights.to(grads.dtype), start - x0, C.P_COLS)
            dv = _dot(tl.trans(spread), grads, dv, C)
    target = _plane(grad_value, image, (HALF * x.size.G + group) * C.D)
    live = (keys <= last)[None, :]
    _store(target, tl.reshape(dv, [1, C.P_COLS, C.P]), grad_value.strides, y + tl.arange(0, 1), keys, live, C.D)
