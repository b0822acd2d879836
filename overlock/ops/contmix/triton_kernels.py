"""ContMix's Triton kernels; `triton.py` beside this file imports them when it runs.

Maps come as (B, G, H, W, P): the P channels of a pixel and group side by side, zeros behind the D live ones, so that a
tile of pixels is a few wide loads. A tile is COLS queries of one row, or of ROWS rows. The taps of a window row are
padded to P_TAPS, and P_COLS columns hold the windows of a tile; both are powers of two. Sums are in the dtype of `lse`,
the operands of products in DOT. HALF is 0 for the small kernel and its half of the channels, 1 for the large one.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _start(position, length, K: tl.constexpr):
    """First position of a query's window on an axis: moved inward near a border."""
    return tl.minimum(tl.maximum(position - K // 2, 0), length - K)


@triton.jit
def _dot(x, y, acc, DOT: tl.constexpr):
    """acc + x y, never in tf32."""
    return tl.dot(x.to(DOT), y.to(DOT), acc, input_precision='ieee', out_dtype=acc.dtype)


@triton.jit
def _to_columns(weights, first, SIZE: tl.constexpr):
    """Tap t of query m in (M, P_TAPS) goes to column first[m] + t of (M, SIZE), zeros everywhere else."""
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
    """Column first[m] + t of query m in (M, P_COLS) goes to tap t of (M, SIZE)."""
    index = tl.minimum(first[:, None] + tl.arange(0, SIZE)[None, :], columns.shape[1] - 1)
    return tl.gather(columns, index, 1)


@triton.jit
def _for_rows(x, ROWS: tl.constexpr):
    """(COLS,) to (ROWS COLS,): the same for each row of a tile."""
    return tl.reshape(tl.broadcast_to(x[None, :], [ROWS, x.shape[0]]), [ROWS * x.shape[0]])


@triton.jit
def _tile(G, H, W, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Image and group (int64), first row and first column of this program's tile."""
    segments, bands = tl.cdiv(W, COLS), tl.cdiv(H, ROWS)
    program = tl.program_id(0)
    plane = (program // segments // bands).to(tl.int64)
    return plane // G, plane % G, program // segments % bands * ROWS, program % segments * COLS


@triton.jit
def _pixels(strides, rows, cols, P: tl.constexpr):
    """(rows, cols, P): where these pixels of a map stand."""
    offsets = (rows * strides[2])[:, None] + (cols * strides[3])[None, :]
    return offsets[:, :, None] + tl.arange(0, P)


@triton.jit
def _taps(kernel, rows, K: tl.constexpr, P: tl.constexpr, P_TAPS: tl.constexpr):
    """(rows, P_TAPS, P): these window rows of a packed kernel; the padding repeats the last tap."""
    tap = (rows * K)[:, None] + tl.minimum(tl.arange(0, P_TAPS), K - 1)[None, :]
    return tl.load(kernel + (tap * P)[:, :, None] + tl.arange(0, P))


@triton.jit
def _biases(group, row, col, K: tl.constexpr, P_TAPS: tl.constexpr):
    """(row, col, P_TAPS): where `bias_table` has window row 0 of queries at (row, col) of their windows."""
    offsets = ((group * K + row) * K * K)[:, None] + col[None, :]
    return (offsets * P_TAPS)[:, :, None] + tl.arange(0, P_TAPS)


@triton.jit
def _bias(table, group, row, col, inside, a, K: tl.constexpr, P_TAPS: tl.constexpr):
    """(rows cols, P_TAPS) for window row a; away from the borders of a row of the map, one line serves all queries."""
    table += a * (K * P_TAPS)
    if inside:
        line = tl.load(table + _biases(group, row, K // 2 + tl.arange(0, 1), K, P_TAPS))
        x = tl.broadcast_to(line, [row.shape[0], col.shape[0], P_TAPS])
    else:
        x = tl.load(table + _biases(group, row, col, K, P_TAPS))
    return tl.reshape(x, [row.shape[0] * col.shape[0], P_TAPS])


@triton.jit
def _store(target, tile, strides, rows, cols, live, D: tl.constexpr):
    """Stores (rows, cols, P) at the D channels of a map with strides (b, c, h, w); `target` is its first channel."""
    c = tl.arange(0, tile.shape[2])
    offsets = (rows * strides[2])[:, None] + (cols * strides[3])[None, :]
    tl.store(
        target + offsets[:, :, None] + c * strides[1], tile.to(target.dtype.element_ty), mask=live[:, :, None] & (c < D)
    )


@triton.jit
def pack(source, target, strides, G, H, W, D: tl.constexpr, P: tl.constexpr, COLS: tl.constexpr):
    """(B, G, H, W, D) of any strides to (B, G, H, W, P), contiguous."""
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
    """All biases there are, (G, K, K, K, P_TAPS): group, query's row, window row, query's column, window column.

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
def _mix(
    q,
    kernel,
    value,
    table,
    group,
    row,
    col,
    inside,
    first,
    value_row,
    K: tl.constexpr,
    P: tl.constexpr,
    P_TAPS: tl.constexpr,
    P_COLS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
):
    """Output (ROWS COLS, P) and log-sum-exp of a tile: one pass over the window's rows with a running maximum."""
    peak = tl.full([ROWS * COLS], float('-inf'), ACC)
    total = tl.zeros([ROWS * COLS, P_TAPS], ACC)
    out = tl.zeros([ROWS, COLS, P], ACC)
    for a in range(K):
        taps = tl.reshape(_taps(kernel, a + tl.arange(0, 1), K, P, P_TAPS), [P_TAPS, P])
        logits = _dot(q, tl.trans(taps), _bias(table, group, row, col, inside, a, K, P_TAPS), DOT)
        highest = tl.maximum(peak, tl.max(logits, 1))
        weights = tl.exp2(logits * LOG2E - (highest * LOG2E)[:, None])
        decay = tl.exp2((peak - highest) * LOG2E)
        total = total * decay[:, None] + weights
        pixels = tl.load(value)
        spread = tl.reshape(_to_columns(weights.to(pixels.dtype), first, P_COLS), [ROWS, COLS, P_COLS])
        out = _dot(spread, pixels, out * tl.reshape(decay, [ROWS, COLS])[:, :, None], DOT)
        peak = highest
        value += value_row
    norm = tl.sum(total, 1)
    return tl.reshape(out, [ROWS * COLS, P]) / norm[:, None], peak + tl.log(norm)


@triton.jit
def _forward_half(
    q,
    kernel,
    value,
    table,
    out,
    lse,
    value_strides,
    out_strides,
    image,
    group,
    i0,
    j0,
    B,
    G,
    H,
    W,
    HALF: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    P_TAPS: tl.constexpr,
    P_COLS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DOT: tl.constexpr,
):
    """The tile of one kernel size."""
    rows, cols = i0 + tl.arange(0, ROWS), j0 + tl.arange(0, COLS)
    i, j = tl.minimum(rows, H - 1), tl.minimum(cols, W - 1)
    top, left, start = _start(i, H, K), _start(j0, W, K), _start(j, W, K)
    value += image * value_strides[0] + (HALF * G + group) * value_strides[1]
    value += _pixels(value_strides, top, tl.minimum(left + tl.arange(0, P_COLS), W - 1), P)
    inside = (j0 >= K // 2) & (j0 + COLS + K // 2 <= W)
    mixed, norm = _mix(
        q,
        kernel,
        value,
        table,
        group,
        i - top,
        j - start,
        inside,
        _for_rows(start - left, ROWS),
        value_strides[2],
        K,
        P,
        P_TAPS,
        P_COLS,
        ROWS,
        COLS,
        DOT,
        lse.dtype.element_ty,
    )
    live = (rows < H)[:, None] & (cols < W)[None, :]
    out += image * out_strides[0] + (HALF * G + group) * D * out_strides[1]
    _store(out, tl.reshape(mixed, [ROWS, COLS, P]), out_strides, rows, cols, live, D)
    lse += ((HALF * B + image) * G + group) * H * W
    tl.store(lse + (rows * W)[:, None] + cols[None, :], tl.reshape(norm, [ROWS, COLS]), mask=live)


@triton.jit
def forward(
    query,
    kernel,
    value,
    table_small,
    table_large,
    out,
    lse,
    query_strides,
    value_strides,
    out_strides,
    B,
    G,
    H,
    W,
    K_SMALL: tl.constexpr,
    K_LARGE: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    P_TAPS: tl.constexpr,
    P_COLS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DOT: tl.constexpr,
):
    """Output and log-sum-exp of one tile of queries, for both kernel sizes."""
    image, group, i0, j0 = _tile(G, H, W, ROWS, COLS)
    i = tl.minimum(i0 + tl.arange(0, ROWS), H - 1)
    j = tl.minimum(j0 + tl.arange(0, COLS), W - 1)
    query += image * query_strides[0] + group * query_strides[1]
    q = tl.reshape(tl.load(query + _pixels(query_strides, i, j, P)), [ROWS * COLS, P])
    kernel += (image * G + group) * (K_SMALL * K_SMALL + K_LARGE * K_LARGE) * P
    _forward_half(
        q,
        kernel,
        value,
        table_small,
        out,
        lse,
        value_strides,
        out_strides,
        image,
        group,
        i0,
        j0,
        B,
        G,
        H,
        W,
        0,
        K_SMALL,
        D,
        P,
        P_TAPS,
        P_COLS,
        ROWS,
        COLS,
        DOT,
    )
    _forward_half(
        q,
        kernel + K_SMALL * K_SMALL * P,
        value,
        table_large,
        out,
        lse,
        value_strides,
        out_strides,
        image,
        group,
        i0,
        j0,
        B,
        G,
        H,
        W,
        1,
        K_LARGE,
        D,
        P,
        P_TAPS,
        P_COLS,
        ROWS,
        COLS,
        DOT,
    )


@triton.jit
def _query_half(
    q,
    kernel,
    value,
    grad,
    table,
    lse,
    delta,
    value_strides,
    grad_strides,
    image,
    group,
    i0,
    j0,
    B,
    G,
    H,
    W,
    HALF: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    P_TAPS: tl.constexpr,
    P_COLS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DOT: tl.constexpr,
):
    """Share of one kernel size in a tile's dq, (ROWS COLS, P); stores delta, the sum over taps of weight x dweight."""
    rows, cols = i0 + tl.arange(0, ROWS), j0 + tl.arange(0, COLS)
    i, j = tl.minimum(rows, H - 1), tl.minimum(cols, W - 1)
    top, left, start = _start(i, H, K), _start(j0, W, K), _start(j, W, K)
    inside = (j0 >= K // 2) & (j0 + COLS + K // 2 <= W)
    row, col = i - top, j - start
    value += image * value_strides[0] + (HALF * G + group) * value_strides[1]
    grad += image * grad_strides[0] + (HALF * G + group) * grad_strides[1]
    places = ((HALF * B + image) * G + group) * H * W + (i * W)[:, None] + j[None, :]
    norm = tl.reshape(tl.load(lse + places), [ROWS * COLS])[:, None] * LOG2E
    grads = tl.load(grad + _pixels(grad_strides, i, j, P))
    # Counted from what the query's own pixel gives, dweights are small, and the two sums below hardly cancel.
    own = tl.load(value + _pixels(value_strides, i, j, P))
    origin = tl.sum(grads.to(norm.dtype) * own.to(norm.dtype), 2)
    value += _pixels(value_strides, top, tl.minimum(left + tl.arange(0, P_COLS), W - 1), P)
    excess = tl.zeros([ROWS * COLS, P_TAPS], norm.dtype)
    moment = tl.zeros([ROWS * COLS, P], norm.dtype)
    mean = tl.zeros([ROWS * COLS, P], norm.dtype)
    for a in range(K):
        taps = tl.reshape(_taps(kernel, a + tl.arange(0, 1), K, P, P_TAPS), [P_TAPS, P])
        logits = _dot(q, tl.trans(taps), _bias(table, group, row, col, inside, a, K, P_TAPS), DOT)
        weights = tl.exp2(logits * LOG2E - norm)
        seen = _dot(
            grads, tl.trans(tl.load(value), 0, 2, 1), tl.broadcast_to(-origin[:, :, None], [ROWS, COLS, P_COLS]), DOT
        )
        # Rounded like the maps, of which they are products, they take half the way through shared memory.
        seen = tl.reshape(seen, [ROWS * COLS, P_COLS]).to(grads.dtype)
        dweights = _to_taps(seen, _for_rows(start - left, ROWS), P_TAPS)
        share = weights * dweights.to(norm.dtype)
        excess += share
        moment = _dot(share.to(taps.dtype), taps, moment, DOT)
        mean = _dot(weights.to(taps.dtype), taps, mean, DOT)
        value += value_strides[2]
    rest = tl.sum(excess, 1)
    live = (rows < H)[:, None] & (cols < W)[None, :]
    tl.store(delta + places, origin + tl.reshape(rest, [ROWS, COLS]), mask=live)
    return moment - rest[:, None] * mean


@triton.jit
def query_grad(
    query,
    kernel,
    value,
    grad,
    table_small,
    table_large,
    lse,
    delta,
    grad_query,
    query_strides,
    value_strides,
    grad_strides,
    grad_query_strides,
    B,
    G,
    H,
    W,
    K_SMALL: tl.constexpr,
    K_LARGE: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    P_TAPS: tl.constexpr,
    P_COLS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DOT: tl.constexpr,
):
    """dq of one tile of queries, and for both kernel sizes the delta that the gradient of the softmax subtracts."""
    image, group, i0, j0 = _tile(G, H, W, ROWS, COLS)
    rows, cols = i0 + tl.arange(0, ROWS), j0 + tl.arange(0, COLS)
    query += image * query_strides[0] + group * query_strides[1]
    query += _pixels(query_strides, tl.minimum(rows, H - 1), tl.minimum(cols, W - 1), P)
    q = tl.reshape(tl.load(query), [ROWS * COLS, P])
    kernel += (image * G + group) * (K_SMALL * K_SMALL + K_LARGE * K_LARGE) * P
    dq = _query_half(
        q,
        kernel,
        value,
        grad,
        table_small,
        lse,
        delta,
        value_strides,
        grad_strides,
        image,
        group,
        i0,
        j0,
        B,
        G,
        H,
        W,
        0,
        K_SMALL,
        P,
        P_TAPS,
        P_COLS,
        ROWS,
        COLS,
        DOT,
    )
    dq += _query_half(
        q,
        kernel + K_SMALL * K_SMALL * P,
        value,
        grad,
        table_large,
        lse,
        delta,
        value_strides,
        grad_strides,
        image,
        group,
        i0,
        j0,
        B,
        G,
        H,
        W,
        1,
        K_LARGE,
        P,
        P_TAPS,
        P_COLS,
        ROWS,
        COLS,
        DOT,
    )
    live = (rows < H)[:, None] & (cols < W)[None, :]
    grad_query += image * grad_query_strides[0] + group * D * grad_query_strides[1]
    _store(grad_query, tl.reshape(dq, [ROWS, COLS, P]), grad_query_strides, rows, cols, live, D)


@triton.jit
def _run(run, RUNS, EDGE, STEP, H):
    """First row and end of a run of rows that stand alike in their windows: near a border, each row is a run."""
    near, far = run < EDGE, run >= RUNS - EDGE
    begin = tl.where(near, run, tl.where(far, H - RUNS + run, EDGE + (run - EDGE) * STEP))
    return begin, tl.where(near | far, begin + 1, tl.minimum(begin + STEP, H - EDGE))


@triton.jit
def _tap_grad_tile(
    query,
    value,
    grad,
    lse,
    delta,
    taps,
    bias,
    dtaps,
    query_strides,
    value_strides,
    grad_strides,
    a,
    begin,
    end,
    j0,
    H,
    W,
    K: tl.constexpr,
    P: tl.constexpr,
    P_TAPS: tl.constexpr,
    P_COLS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DOT: tl.constexpr,
):
    """dlogits (ROWS, COLS, P_TAPS) of COLS columns, summed over query rows begin to end, and dtaps with them added."""
    cols = j0 + tl.arange(0, COLS)
    j = tl.minimum(cols, W - 1)
    left = _start(j0, W, K)
    first = _for_rows(_start(j, W, K) - left, ROWS)
    seen_cols = tl.minimum(left + tl.arange(0, P_COLS), W - 1)
    total = tl.zeros([ROWS, COLS, P_TAPS], bias.dtype)
    for i in range(begin, end):
        row = i + tl.arange(0, 1)
        q = tl.broadcast_to(tl.load(query + _pixels(query_strides, row, j, P)), [ROWS, COLS, P])
        grads = tl.broadcast_to(tl.load(grad + _pixels(grad_strides, row, j, P)), [ROWS, COLS, P])
        pixels = tl.load(value + _pixels(value_strides, _start(i, H, K) + a, seen_cols, P))
        # An infinite log-sum-exp takes out the queries beyond the map.
        norm = tl.load(lse + i * W + cols, mask=cols < W, other=float('inf'))[None, :, None]
        level = tl.broadcast_to(-tl.load(delta + i * W + j)[None, :, None], [ROWS, COLS, P_COLS])
        weights = tl.exp2(_dot(q, taps, bias - norm, DOT) * LOG2E)
        seen = tl.reshape(_dot(grads, tl.trans(pixels, 0, 2, 1), level, DOT), [ROWS * COLS, P_COLS])
        dlogits = weights * tl.reshape(_to_taps(seen.to(q.dtype), first, P_TAPS).to(bias.dtype), [ROWS, COLS, P_TAPS])
        total += dlogits
        dtaps = _dot(tl.trans(dlogits.to(q.dtype), 0, 2, 1), q, dtaps, DOT)
    return total, dtaps


@triton.jit
def tap_grad(
    query,
    kernel,
    value,
    grad,
    table,
    lse,
    delta,
    partial,
    rpb_partial,
    query_strides,
    value_strides,
    grad_strides,
    B,
    G,
    H,
    W,
    EDGE,
    STEP,
    RUNS,
    SPAN,
    HALF: tl.constexpr,
    K_SMALL: tl.constexpr,
    K_LARGE: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    P_TAPS: tl.constexpr,
    P_COLS: tl.constexpr,
    P_RPB: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DOT: tl.constexpr,
):
    """ROWS window rows over SPAN runs of query rows: their sums for dkernel and dbias, and for drpb run by run."""
    ACC: tl.constexpr = lse.dtype.element_ty
    K: tl.constexpr = K_LARGE if HALF else K_SMALL
    blocks, chunks = (K + ROWS - 1) // ROWS, tl.cdiv(RUNS, SPAN)
    program = tl.program_id(0)
    plane, chunk = (program // blocks // chunks).to(tl.int64), program // blocks % chunks
    image, group = plane // G, plane % G
    rows = program % blocks * ROWS + tl.arange(0, ROWS)
    a = tl.minimum(rows, K - 1)
    query += image * query_strides[0] + group * query_strides[1]
    value += image * value_strides[0] + (HALF * G + group) * value_strides[1]
    grad += image * grad_strides[0] + (HALF * G + group) * grad_strides[1]
    lse += (HALF * B * G + plane) * H * W
    delta += (HALF * B * G + plane) * H * W
    places = plane * (K_SMALL * K_SMALL + K_LARGE * K_LARGE) + HALF * K_SMALL * K_SMALL
    taps = tl.trans(_taps(kernel + places * P, a, K, P, P_TAPS), 0, 2, 1)
    dtaps = tl.zeros([ROWS, P_TAPS, P], ACC)
    dbias = tl.zeros([ROWS, COLS, P_TAPS], ACC)
    u = tl.arange(0, P_RPB)
    for run in range(chunk * SPAN, tl.minimum(chunk * SPAN + SPAN, RUNS)):
        begin, end = _run(run, RUNS, EDGE, STEP, H)
        at = begin - _start(begin, H, K)
        drpb = tl.zeros([ROWS * COLS, P_RPB], ACC)
        for j0 in range(0, W, COLS):
            j = tl.minimum(j0 + tl.arange(0, COLS), W - 1)
            col = j - _start(j, W, K)
            bias = tl.load(table + (a * (K * P_TAPS))[:, None, None] + _biases(group, at + 0 * a, col, K, P_TAPS))
            total, dtaps = _tap_grad_tile(
                query,
                value,
                grad,
                lse,
                delta,
                taps,
                bias,
                dtaps,
                query_strides,
                value_strides,
                grad_strides,
                a,
                begin,
                end,
                j0,
                H,
                W,
                K,
                P,
                P_TAPS,
                P_COLS,
                ROWS,
                COLS,
                DOT,
            )
            dbias += total
            drpb += _to_columns(tl.reshape(total, [ROWS * COLS, P_TAPS]), _for_rows(K - 1 - col, ROWS), P_RPB)
        line = ((image * RUNS + run) * G + group) * (2 * K - 1) + K - 1 - at + rows
        tl.store(
            rpb_partial + (line * (2 * K - 1))[:, None] + u,
            tl.sum(tl.reshape(drpb, [ROWS, COLS, P_RPB]), 1),
            mask=(rows < K)[:, None] & (u < 2 * K - 1),
        )
    t, c = tl.arange(0, P_TAPS), tl.arange(0, P)
    partial += (chunk * B * G * (K_SMALL * K_SMALL + K_LARGE * K_LARGE) + places) * (D + 1)
    offsets = ((rows * K)[:, None] + t) * (D + 1)
    live = (rows < K)[:, None] & (t < K)
    tl.store(partial + offsets[:, :, None] + c, dtaps, mask=live[:, :, None] & (c < D))
    tl.store(partial + offsets + D, tl.sum(dbias, 1), mask=live)


@triton.jit
def value_grad(
    query,
    kernel,
    grad,
    table,
    lse,
    grad_value,
    query_strides,
    grad_strides,
    grad_value_strides,
    B,
    G,
    H,
    W,
    HALF: tl.constexpr,
    K_SMALL: tl.constexpr,
    K_LARGE: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    P_TAPS: tl.constexpr,
    P_COLS: tl.constexpr,
    COLS: tl.constexpr,
    KEYS: tl.constexpr,
    DOT: tl.constexpr,
):
    """dv of KEYS pixels of one row: a sum over the queries whose windows hold them."""
    K: tl.constexpr = K_LARGE if HALF else K_SMALL
    image, group, y, x0 = _tile(G, H, W, 1, KEYS)
    plane = image * G + group
    query += image * query_strides[0] + group * query_strides[1]
    grad += image * grad_strides[0] + (HALF * G + group) * grad_strides[1]
    kernel += (plane * (K_SMALL * K_SMALL + K_LARGE * K_LARGE) + HALF * K_SMALL * K_SMALL) * P
    lse += (HALF * B * G + plane) * H * W
    x = x0 + tl.arange(0, P_COLS)
    last = tl.minimum(x0 + KEYS, W) - 1
    j_begin, j_end = tl.where(x0 < K, 0, x0 - K // 2), tl.where(last >= W - K, W, last + K // 2 + 1)
    i_begin, i_end = tl.where(y < K, 0, y - K // 2), tl.where(y >= H - K, H, y + K // 2 + 1)
    dv = tl.zeros([P_COLS, P], lse.dtype.element_ty)
    for j0 in range(j_begin, j_end, COLS):
        cols = j0 + tl.arange(0, COLS)
        j = tl.minimum(cols, W - 1)
        start = _start(j, W, K)
        inside = (j0 >= K // 2) & (j0 + COLS + K // 2 <= W)
        for i in range(i_begin, i_end):
            row = i + tl.arange(0, 1)
            top = _start(row, H, K)
            taps = tl.reshape(_taps(kernel, y - top, K, P, P_TAPS), [P_TAPS, P])
            q = tl.reshape(tl.load(query + _pixels(query_strides, row, j, P)), [COLS, P])
            grads = tl.reshape(tl.load(grad + _pixels(grad_strides, row, j, P)), [COLS, P])
            # An infinite log-sum-exp takes out the queries beyond the map.
            norm = tl.load(lse + i * W + cols, mask=cols < W, other=float('inf'))
            bias = _bias(table, group, row - top, j - start, inside, y - _start(i, H, K), K, P_TAPS)
            logits = _dot(q, tl.trans(taps), bias, DOT)
            weights = tl.exp2((logits - norm[:, None]) * LOG2E)
            spread = _to_columns(weights.to(grads.dtype), start - x0, P_COLS)
            dv = _dot(tl.trans(spread), grads, dv, DOT)
    grad_value += image * grad_value_strides[0] + (HALF * G + group) * D * grad_value_strides[1]
    live = (x <= last)[None, :]
    _store(grad_value, tl.reshape(dv, [1, P_COLS, P]), grad_value_strides, y + tl.arange(0, 1), x, live, D)
