"""Device code of the depth-wise convolution; the operator's ``triton_impl.py`` launches it.

A program is one warp that owns a block of channels of P neighbouring columns and slides down the
rows. A lane holds its channels of all P columns, so the columns' overlap and the rows' overlap are
in registers: an element is loaded once a program, and nothing crosses lanes.
"""

# ruff: noqa: RET505, RUF005 - a constexpr branch must stay one, and Triton has no unpacking

from __future__ import annotations

import triton
import triton.language as tl

# Sizes that change from image to image: a kernel compiled for one serves all.
_SIZES = ("height", "width", "strips", "chunks", "rows", "tiles", "total")

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
_RSQRT2 = tl.constexpr(0.7071067811865476)
_RSQRT2PI = tl.constexpr(0.3989422804014327)


@triton.jit
def _sigmoid(z, FAST: tl.constexpr):
    """Of an argument that is multiplied by -log2(e)."""
    if FAST:
        # A precise exponential and division cost more than the nine products.
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1; add.f32 $0, $0, 0f3F800000; rcp.approx.ftz.f32 $0, $0;",
            "=f,f",
            [z],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        return 1.0 / (1.0 + tl.exp2(z))


@triton.jit
def _activation(z, ACT: tl.constexpr, FAST: tl.constexpr):
    if ACT == "silu":
        return z * _sigmoid(z * -_LOG2E, FAST)
    elif ACT == "gelu":
        return 0.5 * z * (1.0 + tl.erf(z * _RSQRT2))
    elif ACT == "relu":
        return tl.where(z <= 0.0, 0.0, z)
    else:
        return z


@triton.jit
def _derivative(z, ACT: tl.constexpr, FAST: tl.constexpr):
    """By z, which is multiplied by -log2(e) for silu."""
    if ACT == "silu":
        s = _sigmoid(z, FAST)
        return s * (z * (_LN2 * _LN2 - _LN2 * _LN2 * s) - _LN2)
    elif ACT == "gelu":
        return 0.5 * (1.0 + tl.erf(z * _RSQRT2)) + z * _RSQRT2PI * tl.exp(-0.5 * z * z)
    elif ACT == "relu":
        return tl.where(z <= 0.0, 0.0, 1.0)
    else:
        return tl.full(z.shape, 1.0, z.dtype)


@triton.jit
def _program(C, BLOCK_C: tl.constexpr):
    """The first channel and the number of a program among those of its channels.

    The grid has one axis, the one that is not limited to 65535; neighbouring programs read the same
    lines of memory.
    """
    blocks = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    return pid % blocks * BLOCK_C, pid // blocks


@triton.jit
def _tile(tile, height, width, strips, chunks, rows, P: tl.constexpr):
    """The columns and rows of a tile, from its number.

    Returns:
        The first of its columns and of its rows, the number of its rows, and the position of the
        first of those in memory.
    """
    column = tile % strips * P
    tile = tile // strips
    first = tile % chunks * rows
    image = (tile // chunks).to(tl.int64)
    position = (image * height + first) * width + column
    return column, first, tl.minimum(rows, height - first), position


@triton.jit
def _channels(start, places, C, WHOLE: tl.constexpr):
    """A program's channels and which of them exist: known to be all where the blocks are whole."""
    c = start + places
    if WHOLE:
        return c, tl.full(c.shape, True, tl.int1)
    else:
        return c, c < C


@triton.jit
def _taps(taps_ptr, c, inside, C, ACC: tl.constexpr):
    """The nine weights of every channel, row by row."""
    taps = ()
    for t in tl.static_range(9):
        taps = taps + (tl.load(taps_ptr + t * C + c, mask=inside, other=0.0).to(ACC),)
    return taps


@triton.jit
def _load_row(
    ptr,
    exists,
    column,
    inside,
    width,
    STRIDE,
    P: tl.constexpr,
    MORE: tl.constexpr,
):
    """A row's P columns and MORE on each side, one or two, zeros outside the map.

    Args:
        ptr: Where the row's first column is, for every channel.
        exists: Whether the row is in the map.
    """
    # One comparison a column.
    columns = tl.where(exists, width - column, 0)
    values = ()
    for j in tl.static_range(-MORE, P + MORE):
        mask = inside & (columns > j)
        if j < 0:
            # The columns before are another program's P.
            mask = inside & (columns > 0) & (column > 0)
        values = values + (tl.load(ptr + j * STRIDE, mask=mask, other=0.0),)
    return values


@triton.jit
def _converted(values, COUNT: tl.constexpr, ACC: tl.constexpr, FAST: tl.constexpr):
    converted = ()
    for j in tl.static_range(COUNT):
        if FAST and values[j].dtype == tl.bfloat16:
            # One instruction a number, where the compiler takes the upper one out first.
            value = tl.inline_asm_elementwise(
                "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;",
                "=r,=r,r",
                [values[j]],
                dtype=tl.float32,
                is_pure=True,
                pack=2,
            )
        else:
            value = values[j].to(ACC)
        converted = converted + (value,)
    return converted


@triton.jit
def _add(total, values, taps, j: tl.constexpr, row: tl.constexpr):
    """Add what one row of the filter gives at column j."""
    total += taps[3 * row] * values[j]
    total += taps[3 * row + 1] * values[j + 1]
    return total + taps[3 * row + 2] * values[j + 2]


@triton.jit(do_not_specialize=_SIZES)
def depthwise_conv_fwd_kernel(
    x_ptr,
    taps_ptr,
    bias_ptr,
    out_ptr,
    height,
    width,
    strips,
    chunks,
    rows,
    C,
    STRIDE,
    CONSTANT_C: tl.constexpr,
    P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WHOLE: tl.constexpr,
    ACT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACC: tl.constexpr,
    FAST: tl.constexpr,
):
    """The activation of the convolution of x and the bias.

    A row of x is needed by three rows of the output. It is added to all three as it is read, so
    that two rows of unfinished sums are what a program keeps, and of x nothing.

    Args:
        x_ptr: The map, STRIDE elements from a position to the next.
        taps_ptr: (9, C).
        bias_ptr: (C,).
        out_ptr: Contiguous.
        strips: Groups of P columns in a row of the map.
        chunks: Groups of rows in a map.
        rows: Rows of such a group.
        CONSTANT_C: C and STRIDE, where they shall be constants; else 0, and a kernel serves all.
    """
    if CONSTANT_C > 0:
        C = CONSTANT_C
        STRIDE = CONSTANT_C
    start, tile = _program(C, BLOCK_C)
    column, first, count, position = _tile(tile, height, width, strips, chunks, rows, P)
    c, inside = _channels(start, tl.arange(0, BLOCK_C), C, WHOLE)
    taps = _taps(taps_ptr, c, inside, C, ACC)
    bias = tl.zeros((BLOCK_C,), ACC)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + c, mask=inside, other=0.0).to(ACC)

    step = width.to(tl.int64) * STRIDE
    x_row = x_ptr + position * STRIDE + c
    out_row = out_ptr + position * C + c
    above = _load_row(x_row - step, first > 0, column, inside, width, STRIDE, P, 1)
    above = _converted(above, P + 2, ACC, FAST)
    here = _load_row(x_row, first < height, column, inside, width, STRIDE, P, 1)
    here = _converted(here, P + 2, ACC, FAST)
    ending = ()
    begun = ()
    for j in tl.static_range(P):
        ending = ending + (_add(_add(bias, above, taps, j, 0), here, taps, j, 1),)
        begun = begun + (_add(bias, here, taps, j, 0),)
    for i in range(count):
        x_row += step
        exists = first + i + 1 < height
        below = _load_row(x_row, exists, column, inside, width, STRIDE, P, 1)
        below = _converted(below, P + 2, ACC, FAST)
        following = ()
        starting = ()
        for j in tl.static_range(P):
            out = _activation(_add(ending[j], below, taps, j, 2), ACT, FAST)
            mask = inside & (column + j < width)
            tl.store(out_row + j * C, out.to(out_ptr.dtype.element_ty), mask=mask)
            following = following + (_add(begun[j], below, taps, j, 1),)
            starting = starting + (_add(bias, below, taps, j, 0),)
        ending = following
        begun = starting
        out_row += width.to(tl.int64) * C


@triton.jit
def _through_activation(
    grads,
    above,
    here,
    below,
    taps,
    bias,
    COUNT: tl.constexpr,
    ACT: tl.constexpr,
    FAST: tl.constexpr,
):
    """The gradients of what the activation took in COUNT columns, which is computed again."""
    through = ()
    for j in tl.static_range(COUNT):
        z = _add(_add(bias, above, taps, j, 0), here, taps, j, 1)
        slope = _derivative(_add(z, below, taps, j, 2), ACT, FAST)
        through = through + (grads[j] * slope,)
    return through


@triton.jit
def _add_products(sums, above, here, below, grad, j: tl.constexpr):
    """Add a column's share of the gradients of the nine weights, and of the bias."""
    return (
        sums[0] + above[j] * grad,
        sums[1] + above[j + 1] * grad,
        sums[2] + above[j + 2] * grad,
        sums[3] + here[j] * grad,
        sums[4] + here[j + 1] * grad,
        sums[5] + here[j + 2] * grad,
        sums[6] + below[j] * grad,
        sums[7] + below[j + 1] * grad,
        sums[8] + below[j + 2] * grad,
        sums[9] + grad,
    )


@triton.jit(do_not_specialize=_SIZES)
def depthwise_conv_bwd_kernel(
    x_ptr,
    taps_ptr,
    bias_ptr,
    grad_out_ptr,
    grad_x_ptr,
    partial_ptr,
    height,
    width,
    total,
    strips,
    rows,
    tiles,
    C: tl.constexpr,
    STRIDE: tl.constexpr,
    P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TILES: tl.constexpr,
    ACT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACC: tl.constexpr,
    FAST: tl.constexpr,
):
    """The gradients of x, of the weight and of the bias.

    Row by row, what the activation took is computed again and its gradient goes to the three rows
    of x's gradient that need it, so that it is never in memory. Neighbours compute it too where
    they need it: a row above and below, and a column on each side. Maps are one above the other,
    with a row of zeros below each, so that a program walks from map to map.

    Args:
        x_ptr: The map, STRIDE elements from a position to the next.
        taps_ptr: (9, C).
        bias_ptr: (C,).
        grad_out_ptr: Gradient of the output, contiguous.
        grad_x_ptr: Where the gradient of x goes, contiguous.
        partial_ptr: Where every program's sums go: of the nine weights and the bias, (programs of
            one channel block, 10, C).
        total: Rows of all maps and the rows of zeros below them.
        strips: Groups of P columns in a row of the map.
        rows: Rows of a program.
        tiles: Groups of columns and rows in all maps.
        TILES: How many of them a program takes at once, side by side in its lanes.
    """
    SIZE: tl.constexpr = TILES * BLOCK_C
    start, program = _program(C, BLOCK_C)
    lanes = tl.arange(0, SIZE)
    tile = program * TILES + lanes // BLOCK_C
    column = tile % strips * P
    first = tile // strips * rows
    # A tile that does not exist has no columns.
    column = tl.where(tile < tiles, column, width)
    c, inside = _channels(start, lanes % BLOCK_C, C, C % BLOCK_C == 0)
    # What an exponential takes is computed without a product of its own: all gradients here are
    # of that, the products with the weights make up for it, and the sums are scaled.
    SCALE: tl.constexpr = -_LOG2E if ACT == "silu" else 1.0
    unscaled = _taps(taps_ptr, c, inside, C, ACC)
    taps = ()
    turned = ()
    for t in tl.static_range(9):
        taps = taps + (unscaled[t] * SCALE,)
        turned = turned + (unscaled[8 - t] * SCALE,)
    zero = tl.zeros((SIZE,), ACC)
    bias = zero
    if HAS_BIAS:
        bias = tl.load(bias_ptr + c, mask=inside, other=0.0).to(ACC) * SCALE
    sums = ()
    for _ in tl.static_range(10):
        sums = sums + (tl.zeros((SIZE,), ACC),)
    ending = ()
    begun = ()
    for _ in tl.static_range(P):
        ending = ending + (tl.zeros((SIZE,), ACC),)
        begun = begun + (tl.zeros((SIZE,), ACC),)

    x_step = width.to(tl.int64) * STRIDE
    step = width.to(tl.int64) * C
    # Two rows above this program's own; of the gradient one. A row of zeros is nowhere in memory.
    row = first + height - 1
    images = row // (height + 1)
    position = (row - images - height).to(tl.int64) * width + column
    row -= images * (height + 1)
    x_row = x_ptr + position * STRIDE + c
    out_row = grad_x_ptr + position * C + c
    above = _load_row(x_row, (first > 1) & (row < height), column, inside, width, STRIDE, P, 2)
    grad_row = grad_out_ptr + position * C + c + tl.where(row < height, step, 0)
    x_row += tl.where(row < height, x_step, 0)
    row = tl.where(row < height, row + 1, 0)
    here = _load_row(x_row, (first > 0) & (row < height), column, inside, width, STRIDE, P, 2)
    x_row += tl.where(row < height, x_step, 0)
    row = tl.where(row < height, row + 1, 0)
    loaded = _load_row(x_row, row < height, column, inside, width, STRIDE, P, 2)
    grads = _load_row(grad_row, row > 0, column, inside, width, C, P, 1)
    above = _converted(above, P + 4, ACC, FAST)
    here = _converted(here, P + 4, ACC, FAST)
    # The row of x with which the row that is written, three above, is one of zeros.
    unwritten = 2 % (height + 1)
    count = tl.minimum(rows, total - first)
    for i in range(rows + 2):
        below = _converted(loaded, P + 4, ACC, FAST)
        of_z = _converted(grads, P + 2, ACC, FAST)
        # The next turn's rows are asked for before all that this one computes, and carried to it
        # as they are.
        x_row += tl.where(row < height, x_step, 0)
        grad_row += tl.where(row > 0, step, 0)
        row = tl.where(row < height, row + 1, 0)
        exists = (row < height) & (first + i + 1 < total)
        loaded = _load_row(x_row, exists, column, inside, width, STRIDE, P, 2)
        exists = (row > 0) & (first + i < total)
        grads = _load_row(grad_row, exists, column, inside, width, C, P, 1)
        if ACT != "none":
            of_z = _through_activation(of_z, above, here, below, taps, bias, P + 2, ACT, FAST)
        # Rows behind the map's have no gradient.
        if (i > 0) & (i <= rows):
            for j in tl.static_range(P):
                sums = _add_products(sums, above, here, below, of_z[j + 1], j + 1)
        written = (i > 1) & (i <= count + 1) & (row != unwritten)
        columns = tl.where(written, width - column, 0)
        following = ()
        starting = ()
        for j in tl.static_range(P):
            out = _add(ending[j], of_z, turned, j, 2)
            mask = inside & (columns > j)
            tl.store(out_row + j * C, out.to(grad_x_ptr.dtype.element_ty), mask=mask)
            following = following + (_add(begun[j], of_z, turned, j, 1),)
            starting = starting + (_add(zero, of_z, turned, j, 0),)
        ending = following
        begun = starting
        above = here
        here = below
        out_row += tl.where(row != unwritten, step, 0)
    partial = partial_ptr + tile.to(tl.int64) * (10 * C) + c
    for t in tl.static_range(10):
        tl.store(partial + t * C, sums[t] * SCALE, mask=inside & (tile < tiles))
