"""Device code of the selective scan; :mod:`mmvmamba_kernels.backends.triton.scan` launches it.

A program is one warp, a lane a channel of each of its BLOCKS blocks. It walks its path in groups of
GROUP positions. Three things keep it from waiting for memory:

- The loads of a group are issued together, a group or two ahead, and the loop carries what they
  give as it is: a conversion before the loop's end would wait for it.
- The rows of ``proj`` that a group needs, the same for all channels, are one or a few loads of the
  whole warp, a word a lane. A lane asks the others for a word where it needs it, which takes one
  instruction and no register beforehand.
- Lanes find the positions of a group as well, one each. Beyond the end of a path the last position
  is read again, and what it would add is left out, so that no load depends on a comparison.
"""

# ruff: noqa: RET505, RUF005, SIM102, SIM108 - a constexpr branch must stay one, and Triton has no unpacking

from __future__ import annotations

import triton
import triton.language as tl

# Sizes that change from image to image: a kernel compiled for one serves all.
_SIZES = (
    "height",
    "width",
    "lines",
    "length",
    "positions",
    "chunk",
    "chunks",
    "blocks",
    "first",
    "wave",
    "states",
)

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _log2(x, FAST: tl.constexpr):
    # Triton's own log2 is twenty instructions and a branch; the argument here is never subnormal.
    if FAST:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.log2(x)


@triton.jit
def _reciprocal(x, FAST: tl.constexpr):
    # Triton's division takes care of quotients that overflow on the way; this one cannot.
    if FAST:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def _softplus(z, SOFTPLUS: tl.constexpr, ACC: tl.constexpr, FAST: tl.constexpr):
    """softplus and its derivative; z itself and 1 beyond 20, or everywhere without SOFTPLUS.

    With SOFTPLUS the argument is z * log2(e).
    """
    if SOFTPLUS:
        e = tl.exp2(z)
        w = 1.0 + e
        linear = z > 20.0 * _LOG2E
        if tl.float64 == ACC:
            # The rounding error of 1 + e cancels in the quotient.
            rounded = w - 1.0
            value = tl.where(
                rounded == 0.0, e, tl.log(w) * (e / tl.where(rounded == 0.0, 1.0, rounded))
            )
            value = tl.where(linear, z * _LN2, value)
        else:
            # Below 1/32 the logarithm of 1 + e loses digits. This parabola is ln(1 + e) / e within
            # 3e-7 there.
            series = e * (0.9999997702671433 + e * (-0.4998674903719871 + e * 0.32193565366363264))
            value = tl.where(e < 0.03125, series, _LN2 * tl.where(linear, z, _log2(w, FAST)))
        return value, tl.where(linear, 1.0, e * _reciprocal(w, FAST))
    else:
        return z, tl.full(z.shape, 1.0, ACC)


@triton.jit
def _program(blocks, wave, first, chunks):
    """Channel block, direction, chunk and sequence of this program.

    The grid has one axis, the one that is not limited to 65535.
    """
    pid = tl.program_id(0)
    block = pid % blocks
    pid = pid // blocks
    k = first + pid % wave
    pid = pid // wave
    return block, k, pid % chunks, pid // chunks


@triton.jit
def _chunk(t0, k, chunk, length, list_ptr, GROUP: tl.constexpr, LISTED: tl.constexpr):
    """Positions of the chunk that begins at step t0, their groups, and the number of the last one.

    A listed path may be shorter than others, and have nothing in its last chunks.
    """
    if LISTED:
        length = tl.load(list_ptr + k.to(tl.int64) * (length + 1))
    count = tl.maximum(tl.minimum(chunk, length - t0), 0)
    groups = (count + GROUP - 1) // GROUP
    return count, groups, tl.maximum(groups - 1, 0)


@triton.jit
def _path(
    s,
    k,
    t,
    height,
    width,
    lines,
    length,
    list_ptr,
    COLUMN: tl.constexpr,
    REVERSE: tl.constexpr,
    LISTED: tl.constexpr,
):
    """Where step t of a path is, and how it goes on.

    Returns the first position of the sequence; from there the position of step t; its number within
    its run, the straight part of a path; the positions of a run; the distance from a position to
    the next; and what is added to it at the end of a run. Of a listed path positions are steps, and
    the last is the list, which :func:`_at` reads.
    """
    column = ((COLUMN >> k) & 1) == 1
    base = (s // lines).to(tl.int64) * height * width + (s % lines) * tl.where(column, 1, width)
    run = tl.where(column, height, length)
    reverse = ((REVERSE >> k) & 1) == 1
    sign = tl.where(reverse, -1, 1)
    step = tl.where(column, width, 1)
    start = tl.where(reverse, (length - 1) // run + (run - 1) * step, 0)
    position = start + sign * (t // run + (t % run) * step)
    if LISTED:
        hop = list_ptr + k.to(tl.int64) * (length + 1) + 1
    else:
        hop = sign * (1 - run * step)
    return base, position, t % run, run, sign * step, hop


@triton.jit
def _at(position, within, j, run, step, hop, SHORT: tl.constexpr):
    """The position ``j`` steps on; less than two runs away, unless SHORT."""
    if hop.dtype.is_ptr():
        return tl.load(hop + position + j)
    elif SHORT:
        return position + j * step + (within + j) // run * hop
    else:
        return position + j * step + tl.where(within + j >= run, hop, 0)


@triton.jit
def _ahead(position, within, run, step, hop, GROUP: tl.constexpr, SHORT: tl.constexpr):
    """The position a group further on, and its number within its run."""
    ahead = within + GROUP
    if hop.dtype.is_ptr():
        return position + GROUP, ahead
    else:
        if SHORT:
            runs = ahead // run
        else:
            runs = (ahead >= run).to(tl.int32) + (ahead >= 2 * run).to(tl.int32)
        return position + GROUP * step + runs * hop, ahead - runs * run


@triton.jit
def _back(position, within, run, step, hop, GROUP: tl.constexpr, SHORT: tl.constexpr):
    """The position a group before, and its number within its run."""
    back = within - GROUP
    if hop.dtype.is_ptr():
        return position - GROUP, back
    else:
        if SHORT:
            runs = (run - 1 - back) // run
        else:
            runs = (back < 0).to(tl.int32) + (back + run < 0).to(tl.int32)
        return position - GROUP * step - runs * hop, back + runs * run


@triton.jit
def _read(ptr, inside, FULL: tl.constexpr):
    if FULL:
        return tl.load(ptr)
    else:
        return tl.load(ptr, mask=inside, other=0.0)


@triton.jit
def _write(ptr, value, mask, inside, FULL: tl.constexpr):
    if FULL:
        tl.store(ptr, value.to(ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(ptr, value.to(ptr.dtype.element_ty), mask=inside & mask)


@triton.jit
def _pick(lanes, i: tl.constexpr, LANES: tl.constexpr):
    """What lane i has, in all lanes."""
    return tl.gather(lanes, tl.full((LANES,), i, tl.int32), 0)


@triton.jit
def _group_offsets(
    position,
    within,
    last,
    run,
    step,
    hop,
    stride,
    LANES: tl.constexpr,
    SHORT: tl.constexpr,
    INDEX: tl.constexpr,
):
    """Where a group's positions are in a map, a position a lane; those behind ``last`` are it."""
    j = tl.minimum(tl.arange(0, LANES), last)
    return _at(position, within, j, run, step, hop, SHORT).to(INDEX) * stride


@triton.jit
def _load_rows(
    row_ptr,
    position,
    within,
    last,
    run,
    step,
    hop,
    STRIDE: tl.constexpr,
    WORDS: tl.constexpr,
    GROUP: tl.constexpr,
    LANES: tl.constexpr,
    SHORT: tl.constexpr,
    INDEX: tl.constexpr,
):
    """The rows of proj at a group's positions, one after another, a word a lane."""
    rows = ()
    for i in tl.static_range((GROUP * WORDS + LANES - 1) // LANES):
        word = i * LANES + tl.arange(0, LANES)
        at = _at(position, within, tl.minimum(last, word // WORDS), run, step, hop, SHORT)
        rows = rows + (tl.load(row_ptr + at.to(INDEX) * STRIDE + word % WORDS),)
    return rows


@triton.jit
def _element(
    rows,
    j: tl.constexpr,
    i: tl.constexpr,
    WORDS: tl.constexpr,
    PACK: tl.constexpr,
    LANES: tl.constexpr,
    TYPE: tl.constexpr,
    ACC: tl.constexpr,
):
    """Column i of a group's row j, in all lanes."""
    WORD: tl.constexpr = j * WORDS + i // PACK
    word = _pick(rows[WORD // LANES], WORD % LANES, LANES)
    if PACK == 1:
        return word.to(ACC)
    elif tl.bfloat16 == TYPE:
        half = word << 16 if i % 2 == 0 else word & -65536
        return half.to(tl.float32, bitcast=True).to(ACC)
    else:
        half = word if i % 2 == 0 else word >> 16
        return half.to(tl.int16).to(TYPE, bitcast=True).to(ACC)


@triton.jit
def _load_maps(
    pointers,
    offsets,
    inside,
    COUNT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCKS: tl.constexpr,
    LANES: tl.constexpr,
    FULL: tl.constexpr,
):
    """COUNT maps at a group's positions: map after map, position after position, then blocks."""
    places = ()
    for j in tl.static_range(GROUP):
        places = places + (_pick(offsets, j, LANES),)
    values = ()
    for i in tl.static_range(COUNT):
        for j in tl.static_range(GROUP):
            for g in tl.static_range(BLOCKS):
                ptr = pointers[i] + places[j] + g * LANES
                values = values + (_read(ptr, inside[g], FULL),)
    return values


@triton.jit
def _load_group(
    row_ptr,
    pointers,
    position,
    within,
    last,
    run,
    step,
    hop,
    stride,
    inside,
    ROW: tl.constexpr,
    WORDS: tl.constexpr,
    MAPS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCKS: tl.constexpr,
    LANES: tl.constexpr,
    FULL: tl.constexpr,
    SHORT: tl.constexpr,
    INDEX: tl.constexpr,
):
    """What a group needs: its rows of proj, its offsets in maps, and the maps there."""
    rows = _load_rows(
        row_ptr, position, within, last, run, step, hop, ROW, WORDS, GROUP, LANES, SHORT, INDEX
    )
    offsets = _group_offsets(position, within, last, run, step, hop, stride, LANES, SHORT, INDEX)
    maps = _load_maps(pointers, offsets, inside, MAPS, GROUP, BLOCKS, LANES, FULL)
    return rows, offsets, maps


@triton.jit
def _next_group(
    position,
    within,
    last,
    remaining,
    run,
    step,
    hop,
    BACKWARDS: tl.constexpr,
    GROUP: tl.constexpr,
    SHORT: tl.constexpr,
):
    """Position, number within its run, last number and remaining positions of the group after this.

    After the last group comes the last group again, so that loads stay in the map.
    """
    more = remaining > GROUP
    if BACKWARDS:
        new_position, new_within = _back(position, within, run, step, hop, GROUP, SHORT)
        new_last = GROUP - 1
    else:
        new_position, new_within = _ahead(position, within, run, step, hop, GROUP, SHORT)
        new_last = tl.minimum(remaining - GROUP, GROUP) - 1
    return (
        tl.where(more, new_position, position),
        tl.where(more, new_within, within),
        tl.where(more, new_last, last),
        tl.where(more, remaining - GROUP, remaining),
    )


@triton.jit
def _parameters(
    weight_ptr,
    bias_ptr,
    a_ptr,
    skip_ptr,
    k,
    d,
    channels,
    N: tl.constexpr,
    RATES: tl.constexpr,
    R: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCKS: tl.constexpr,
    LANES: tl.constexpr,
    ACC: tl.constexpr,
):
    """What channels have of their own, block after block: inside, weights, bias, rates, skip.

    Of the rates the first RATES. Weights and bias are multiplied by SCALE.
    """
    all_inside = ()
    weights = ()
    biases = ()
    rates = ()
    skips = ()
    for g in tl.static_range(BLOCKS):
        c = d + g * LANES
        inside = c < channels
        row = k * channels + c
        all_inside = all_inside + (inside,)
        for r in tl.static_range(R):
            w = tl.load(weight_ptr + row * R + r, mask=inside, other=0.0)
            weights = weights + (w.to(ACC) * SCALE,)
        for n in tl.static_range(RATES):
            a = tl.load(a_ptr + row * N + n, mask=inside, other=0.0)
            rates = rates + (a.to(ACC),)
        bias = tl.zeros((LANES,), ACC)
        if HAS_BIAS:
            bias = tl.load(bias_ptr + row, mask=inside, other=0.0).to(ACC) * SCALE
        biases = biases + (bias,)
        skip = tl.zeros((LANES,), ACC)
        if HAS_SKIP:
            skip = tl.load(skip_ptr + row, mask=inside, other=0.0).to(ACC)
        skips = skips + (skip,)
    return all_inside, weights, biases, rates, skips


@triton.jit
def _step_sizes(
    rows,
    maps,
    weights,
    biases,
    j: tl.constexpr,
    DELTAS: tl.constexpr,
    R: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCKS: tl.constexpr,
    WORDS: tl.constexpr,
    PACK: tl.constexpr,
    LANES: tl.constexpr,
    TYPE: tl.constexpr,
    ACC: tl.constexpr,
    FAST: tl.constexpr,
):
    """Step sizes at a group's position j, and the derivatives of softplus, block after block.

    The raw step sizes are computed from the low rank, or were read as ``maps[DELTAS:]`` if R is 0.
    """
    low = ()
    for r in tl.static_range(R):
        low = low + (_element(rows, j, r, WORDS, PACK, LANES, TYPE, ACC),)
    steps = ()
    slopes = ()
    for g in tl.static_range(BLOCKS):
        z = biases[g]
        if R == 0:
            z += maps[DELTAS + j * BLOCKS + g].to(ACC) * SCALE
        for r in tl.static_range(R):
            z += low[r] * weights[g * R + r]
        dt, slope = _softplus(z, SOFTPLUS, ACC, FAST)
        steps = steps + (dt,)
        slopes = slopes + (slope,)
    return steps, slopes


@triton.jit(do_not_specialize=_SIZES)
def selective_scan_state_kernel(
    u_ptr,
    delta_ptr,
    proj_ptr,
    weight_ptr,
    bias_ptr,
    a_ptr,
    list_ptr,
    end_ptr,
    total_ptr,
    channels,
    height,
    width,
    lines,
    length,
    chunk,
    chunks,
    blocks,
    stride,
    stride_u_k,
    stride_delta_k,
    K: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
    LOW: tl.constexpr,
    COLUMN: tl.constexpr,
    REVERSE: tl.constexpr,
    LISTED: tl.constexpr,
    SHORT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    BACKWARDS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCKS: tl.constexpr,
    LANES: tl.constexpr,
    FULL: tl.constexpr,
    PACK: tl.constexpr,
    TYPE: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    FAST: tl.constexpr,
):
    """Sum of the step sizes and end state of every chunk that starts from zero.

    Forwards, the recurrence is h = a h + dt B u. Backwards, ``u_ptr`` is the gradient of the output
    and the recurrence is that of the gradient that leaves a position for the one before it:
    s = a (s + C dy).
    """
    SCALE: tl.constexpr = _LOG2E if SOFTPLUS else 1.0
    WIDTH: tl.constexpr = (LOW + 2 * N) // PACK
    WORDS: tl.constexpr = (R + 2 * N) // PACK
    FACTOR: tl.constexpr = R + (N if BACKWARDS else 0)
    FIRST: tl.constexpr = GROUP - 1 if BACKWARDS else 0
    STOP: tl.constexpr = -1 if BACKWARDS else GROUP
    STEP: tl.constexpr = -1 if BACKWARDS else 1
    MAPS: tl.constexpr = 2 if R == 0 else 1
    block, k, c, s = _program(blocks, K, 0, chunks)
    t0 = c * chunk
    count, groups, final = _chunk(t0, k, chunk, length, list_ptr, GROUP, LISTED)
    if BACKWARDS:
        t0 += final * GROUP
    base, position, within, run, step, hop = _path(
        s, k, t0, height, width, lines, length, list_ptr, COLUMN, REVERSE, LISTED
    )
    d = block * (BLOCKS * LANES) + tl.arange(0, LANES)
    inside, weights, biases, rates, _ = _parameters(
        weight_ptr,
        bias_ptr,
        a_ptr,
        a_ptr,
        k,
        d,
        channels,
        N,
        N,
        R,
        HAS_BIAS,
        False,
        SCALE,
        BLOCKS,
        LANES,
        ACC,
    )
    totals = ()
    states = ()
    for _ in tl.static_range(BLOCKS):
        totals = totals + (tl.zeros((LANES,), ACC),)
    for _ in tl.static_range(BLOCKS * N):
        states = states + (tl.zeros((LANES,), ACC),)
    bases = (u_ptr + base * stride + k.to(tl.int64) * stride_u_k + d,)
    if R == 0:
        bases = bases + (delta_ptr + base * stride + k.to(tl.int64) * stride_delta_k + d,)
    row_base = proj_ptr + base * (K * WIDTH) + k * WIDTH + (LOW - R) // PACK

    last = tl.minimum(count - final * GROUP if BACKWARDS else count, GROUP) - 1
    rows, _offsets, maps = _load_group(
        row_base,
        bases,
        position,
        within,
        last,
        run,
        step,
        hop,
        stride,
        inside,
        K * WIDTH,
        WORDS,
        MAPS,
        GROUP,
        BLOCKS,
        LANES,
        FULL,
        SHORT,
        INDEX,
    )
    remaining = groups * GROUP if BACKWARDS else count
    position, within, next_last, remaining = _next_group(
        position, within, last, remaining, run, step, hop, BACKWARDS, GROUP, SHORT
    )
    next_rows, _offsets, next_maps = _load_group(
        row_base,
        bases,
        position,
        within,
        next_last,
        run,
        step,
        hop,
        stride,
        inside,
        K * WIDTH,
        WORDS,
        MAPS,
        GROUP,
        BLOCKS,
        LANES,
        FULL,
        SHORT,
        INDEX,
    )
    for _ in range(groups):
        lane_last = _pick(tl.full((LANES,), last, tl.int32), 0, LANES)
        for j in tl.static_range(FIRST, STOP, STEP):
            steps, _slopes = _step_sizes(
                rows,
                maps,
                weights,
                biases,
                j,
                GROUP * BLOCKS,
                R,
                SOFTPLUS,
                SCALE,
                BLOCKS,
                WORDS,
                PACK,
                LANES,
                TYPE,
                ACC,
                FAST,
            )
            factors = ()
            for n in tl.static_range(N):
                factors = factors + (_element(rows, j, FACTOR + n, WORDS, PACK, LANES, TYPE, ACC),)
            exists = lane_last >= j
            new_totals = ()
            new_states = ()
            for g in tl.static_range(BLOCKS):
                dt = tl.where(exists, steps[g], 0.0)
                u = maps[j * BLOCKS + g].to(ACC)
                drive = tl.where(exists, u, 0.0) if BACKWARDS else dt * u
                new_totals = new_totals + (totals[g] + dt,)
                for n in tl.static_range(N):
                    decay = tl.exp2(dt * (rates[g * N + n] * _LOG2E))
                    state = states[g * N + n]
                    if BACKWARDS:
                        state = decay * (state + drive * factors[n])
                    else:
                        state = decay * state + drive * factors[n]
                    new_states = new_states + (state,)
            totals = new_totals
            states = new_states
        rows = next_rows
        maps = next_maps
        last = next_last
        position, within, next_last, remaining = _next_group(
            position, within, next_last, remaining, run, step, hop, BACKWARDS, GROUP, SHORT
        )
        next_rows, _offsets, next_maps = _load_group(
            row_base,
            bases,
            position,
            within,
            next_last,
            run,
            step,
            hop,
            stride,
            inside,
            K * WIDTH,
            WORDS,
            MAPS,
            GROUP,
            BLOCKS,
            LANES,
            FULL,
            SHORT,
            INDEX,
        )
    chunk_row = ((s.to(tl.int64) * K + k) * chunks + c) * channels
    for g in tl.static_range(BLOCKS):
        place = d + g * LANES
        tl.store(total_ptr + chunk_row + place, totals[g], mask=inside[g])
        for n in tl.static_range(N):
            tl.store(
                end_ptr + chunk_row * N + n * channels + place, states[g * N + n], mask=inside[g]
            )


@triton.jit(do_not_specialize=_SIZES)
def selective_scan_carry_kernel(
    state_ptr,
    total_ptr,
    a_ptr,
    channels,
    chunks,
    blocks,
    K: tl.constexpr,
    N: tl.constexpr,
    BACKWARDS: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """Replace the chunks' end states by the states that enter them."""
    block, k, n, s = _program(blocks, K, 0, N)
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = d < channels
    rate = tl.load(a_ptr + (k * channels + d) * N + n, mask=inside, other=0.0).to(ACC) * _LOG2E
    first = (s.to(tl.int64) * K + k) * chunks
    state = tl.zeros((BLOCK_D,), ACC)
    for i in range(0, chunks, UNROLL):
        ends = ()
        decays = ()
        for j in tl.static_range(UNROLL):
            c = first + (chunks - 1 - i - j if BACKWARDS else i + j)
            mask = inside & (i + j < chunks)
            ends = ends + (tl.load(state_ptr + (c * N + n) * channels + d, mask=mask, other=0.0),)
            total = tl.load(total_ptr + c * channels + d, mask=mask, other=0.0)
            decays = decays + (tl.exp2(total * rate),)
        for j in tl.static_range(UNROLL):
            c = first + (chunks - 1 - i - j if BACKWARDS else i + j)
            mask = inside & (i + j < chunks)
            tl.store(state_ptr + (c * N + n) * channels + d, state, mask=mask)
            state = decays[j] * state + ends[j]


@triton.jit
def _save(
    ptr,
    states,
    channels,
    inside,
    N: tl.constexpr,
    BLOCKS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Store the states, state after state."""
    for n in tl.static_range(N):
        for g in tl.static_range(BLOCKS):
            tl.store(ptr + n * channels + g * LANES, states[n * BLOCKS + g], mask=inside[g])


@triton.jit(do_not_specialize=_SIZES)
def selective_scan_fwd_kernel(
    u_ptr,
    delta_ptr,
    proj_ptr,
    weight_ptr,
    bias_ptr,
    a_ptr,
    list_ptr,
    skip_ptr,
    entering_ptr,
    carries_ptr,
    y_ptr,
    channels,
    height,
    width,
    lines,
    length,
    chunk,
    chunks,
    blocks,
    first,
    wave,
    stride,
    stride_u_k,
    stride_delta_k,
    stride_y_k,
    K: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
    LOW: tl.constexpr,
    COLUMN: tl.constexpr,
    REVERSE: tl.constexpr,
    LISTED: tl.constexpr,
    SHORT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    SAVED: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCKS: tl.constexpr,
    LANES: tl.constexpr,
    FULL: tl.constexpr,
    PACK: tl.constexpr,
    TYPE: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    FAST: tl.constexpr,
):
    """Outputs of one chunk or a whole path, of the directions ``first`` to ``first + wave - 1``.

    Direction ``first + i`` writes buffer i of y, or adds to it. The states at every SAVED
    positions, a multiple of GROUP, are left for the backward pass; at none if it is 0.
    """
    SCALE: tl.constexpr = _LOG2E if SOFTPLUS else 1.0
    WIDTH: tl.constexpr = (LOW + 2 * N) // PACK
    WORDS: tl.constexpr = (R + 2 * N) // PACK
    SUMS: tl.constexpr = GROUP * BLOCKS * (2 if R == 0 else 1)
    MAPS: tl.constexpr = 1 + (R == 0) + ACCUMULATE
    block, k, c, s = _program(blocks, wave, first, chunks)
    t0 = c * chunk
    count, groups, _final = _chunk(t0, k, chunk, length, list_ptr, GROUP, LISTED)
    base, position, within, run, step, hop = _path(
        s, k, t0, height, width, lines, length, list_ptr, COLUMN, REVERSE, LISTED
    )
    d = block * (BLOCKS * LANES) + tl.arange(0, LANES)
    inside, weights, biases, rates, skips = _parameters(
        weight_ptr,
        bias_ptr,
        a_ptr,
        skip_ptr,
        k,
        d,
        channels,
        N,
        N,
        R,
        HAS_BIAS,
        HAS_SKIP,
        SCALE,
        BLOCKS,
        LANES,
        ACC,
    )
    path = s.to(tl.int64) * K + k
    states = ()
    for n in tl.static_range(N):
        for g in tl.static_range(BLOCKS):
            row = entering_ptr + ((path * chunks + c) * N + n) * channels + d + g * LANES
            # Nothing enters the first chunk, which may be all there is.
            states = states + (tl.load(row, mask=inside[g] & (c > 0), other=0.0).to(ACC),)
    y_base = y_ptr + base * stride + (k - first).to(tl.int64) * stride_y_k + d
    bases = (u_ptr + base * stride + k.to(tl.int64) * stride_u_k + d,)
    if R == 0:
        bases = bases + (delta_ptr + base * stride + k.to(tl.int64) * stride_delta_k + d,)
    if ACCUMULATE:
        bases = bases + (y_base,)
    row_base = proj_ptr + base * (K * WIDTH) + k * WIDTH + (LOW - R) // PACK
    carries_base = carries_ptr + d
    if SAVED > 0:
        carries_base += (path * ((length + SAVED - 1) // SAVED) + t0 // SAVED) * (N * channels)

    last = tl.minimum(count, GROUP) - 1
    rows, offsets, maps = _load_group(
        row_base,
        bases,
        position,
        within,
        last,
        run,
        step,
        hop,
        stride,
        inside,
        K * WIDTH,
        WORDS,
        MAPS,
        GROUP,
        BLOCKS,
        LANES,
        FULL,
        SHORT,
        INDEX,
    )
    remaining = count
    position, within, next_last, remaining = _next_group(
        position, within, last, remaining, run, step, hop, False, GROUP, SHORT
    )
    next_rows, next_offsets, next_maps = _load_group(
        row_base,
        bases,
        position,
        within,
        next_last,
        run,
        step,
        hop,
        stride,
        inside,
        K * WIDTH,
        WORDS,
        MAPS,
        GROUP,
        BLOCKS,
        LANES,
        FULL,
        SHORT,
        INDEX,
    )
    for i in range(groups):
        if SAVED == GROUP:
            _save(carries_base, states, channels, inside, N, BLOCKS, LANES)
            carries_base += N * channels
        elif SAVED > 0:
            if (i * GROUP) % SAVED == 0:
                _save(carries_base, states, channels, inside, N, BLOCKS, LANES)
                carries_base += N * channels
        lane_last = _pick(tl.full((LANES,), last, tl.int32), 0, LANES)
        outputs = ()
        for j in tl.static_range(GROUP):
            steps, _slopes = _step_sizes(
                rows,
                maps,
                weights,
                biases,
                j,
                GROUP * BLOCKS,
                R,
                SOFTPLUS,
                SCALE,
                BLOCKS,
                WORDS,
                PACK,
                LANES,
                TYPE,
                ACC,
                FAST,
            )
            drives = ()
            ys = ()
            for g in tl.static_range(BLOCKS):
                u = maps[j * BLOCKS + g].to(ACC)
                drives = drives + (steps[g] * u,)
                y = skips[g] * u
                if ACCUMULATE:
                    y += maps[SUMS + j * BLOCKS + g].to(ACC)
                ys = ys + (y,)
            new_states = ()
            for n in tl.static_range(N):
                b = _element(rows, j, R + n, WORDS, PACK, LANES, TYPE, ACC)
                factor = _element(rows, j, R + N + n, WORDS, PACK, LANES, TYPE, ACC)
                new_ys = ()
                for g in tl.static_range(BLOCKS):
                    decay = tl.exp2(steps[g] * (rates[g * N + n] * _LOG2E))
                    state = decay * states[n * BLOCKS + g] + drives[g] * b
                    new_states = new_states + (state,)
                    new_ys = new_ys + (ys[g] + state * factor,)
                ys = new_ys
            states = new_states
            outputs = outputs + ys
        for j in tl.static_range(GROUP):
            for g in tl.static_range(BLOCKS):
                place = _pick(offsets, j, LANES) + g * LANES
                _write(y_base + place, outputs[j * BLOCKS + g], lane_last >= j, inside[g], FULL)
        offsets = next_offsets
        rows = next_rows
        maps = next_maps
        last = next_last
        position, within, next_last, remaining = _next_group(
            position, within, next_last, remaining, run, step, hop, False, GROUP, SHORT
        )
        next_rows, next_offsets, next_maps = _load_group(
            row_base,
            bases,
            position,
            within,
            next_last,
            run,
            step,
            hop,
            stride,
            inside,
            K * WIDTH,
            WORDS,
            MAPS,
            GROUP,
            BLOCKS,
            LANES,
            FULL,
            SHORT,
            INDEX,
        )


@triton.jit
def _halve(values, COUNT: tl.constexpr, BIT: tl.constexpr, LANES: tl.constexpr):
    """Half as many values, each the sum of two lanes: those with BIT hold the odd ones."""
    lanes = tl.arange(0, LANES)
    upper = (lanes & BIT) != 0
    halved = ()
    for i in tl.static_range(COUNT // 2):
        even = values[2 * i]
        odd = values[2 * i + 1]
        other = tl.gather(tl.where(upper, even, odd), lanes ^ BIT, 0)
        halved = halved + (tl.where(upper, odd, even) + other,)
    return halved


@triton.jit
def _sums_over_lanes(values, LANES: tl.constexpr):
    """Sums of 16 values over the lanes: lane i has that of value i % 16.

    In a fixed order, with one exchange a value where sums one by one take log2(LANES).
    """
    values = _halve(values, 16, 1, LANES)
    values = _halve(values, 8, 2, LANES)
    values = _halve(values, 4, 4, LANES)
    total = _halve(values, 2, 8, LANES)[0]
    lanes = tl.arange(0, LANES)
    total += tl.gather(total, lanes ^ 16, 0)
    if LANES == 64:
        total += tl.gather(total, lanes ^ 32, 0)
    return total


@triton.jit
def _load_state(carries_ptr, index, channels, inside):
    """The one state that was saved before group ``index``, or before the first group."""
    row = carries_ptr + tl.maximum(index, 0).to(tl.int64) * channels
    return tl.load(row, mask=inside, other=0.0)


@triton.jit
def _load_factors(
    row_ptr,
    position,
    within,
    last,
    n,
    run,
    step,
    hop,
    ROW: tl.constexpr,
    N: tl.constexpr,
    LANES: tl.constexpr,
    SHORT: tl.constexpr,
    INDEX: tl.constexpr,
):
    """B and C of state n at a group's positions: B of position j in lane 2j, C in the next."""
    lanes = tl.arange(0, LANES)
    at = _at(position, within, tl.minimum(last, lanes // 2), run, step, hop, SHORT)
    return tl.load(row_ptr + at.to(INDEX) * ROW + (lanes & 1) * N + n)


@triton.jit
def _find_states(
    carries_ptr,
    scratch_ptr,
    row_ptr,
    factor_ptr,
    a_ptr,
    pointers,
    states,
    groups,
    position,
    within,
    run,
    step,
    hop,
    stride,
    channels,
    inside,
    weights,
    biases,
    N: tl.constexpr,
    R: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    SCALE: tl.constexpr,
    ROW: tl.constexpr,
    WORDS: tl.constexpr,
    MAPS: tl.constexpr,
    GROUP: tl.constexpr,
    LANES: tl.constexpr,
    FULL: tl.constexpr,
    SHORT: tl.constexpr,
    PACK: tl.constexpr,
    TYPE: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    FAST: tl.constexpr,
):
    """Store the states that enter ``groups`` groups and one more, from those of ``carries_ptr``."""
    AHEAD: tl.constexpr = 4
    entered = ()
    for m in tl.static_range(N):
        entered = entered + (tl.load(carries_ptr + m * channels, mask=inside[0], other=0.0),)
    for m in tl.static_range(N):
        tl.store(scratch_ptr + m * LANES, entered[m])
    for i in range(groups):
        rows, _offsets, maps = _load_group(
            row_ptr,
            pointers,
            position,
            within,
            GROUP - 1,
            run,
            step,
            hop,
            stride,
            inside,
            ROW,
            WORDS,
            MAPS,
            GROUP,
            1,
            LANES,
            FULL,
            SHORT,
            INDEX,
        )
        steps = ()
        drives = ()
        for j in tl.static_range(GROUP):
            dts, _slopes = _step_sizes(
                rows,
                maps,
                weights,
                biases,
                j,
                GROUP,
                R,
                SOFTPLUS,
                SCALE,
                1,
                WORDS,
                PACK,
                LANES,
                TYPE,
                ACC,
                FAST,
            )
            steps = steps + (dts[0] * _LOG2E,)
            drives = drives + (dts[0] * maps[j].to(ACC),)
        # What a state needs is asked for AHEAD states before: one takes less time than memory.
        here = scratch_ptr + i * (N * LANES)
        queue = ()
        rates = ()
        factors = ()
        for m in tl.static_range(AHEAD):
            following = tl.minimum(m, N - 1)
            queue = queue + (tl.load(here + following * LANES),)
            rates = rates + (tl.load(a_ptr + following, mask=inside[0], other=0.0),)
            factors = factors + (
                _load_factors(
                    factor_ptr,
                    position,
                    within,
                    GROUP - 1,
                    following,
                    run,
                    step,
                    hop,
                    ROW * PACK,
                    N,
                    LANES,
                    SHORT,
                    INDEX,
                ),
            )
        # Not range(N), which a compiler would unroll.
        for n in range(states):
            ahead = tl.minimum(n + AHEAD, N - 1)
            next_state = tl.load(here + ahead * LANES)
            next_rate = tl.load(a_ptr + ahead, mask=inside[0], other=0.0)
            next_factors = _load_factors(
                factor_ptr,
                position,
                within,
                GROUP - 1,
                ahead,
                run,
                step,
                hop,
                ROW * PACK,
                N,
                LANES,
                SHORT,
                INDEX,
            )
            state = queue[0]
            rate = rates[0].to(ACC)
            for j in tl.static_range(GROUP):
                b = _pick(factors[0], 2 * j, LANES).to(ACC)
                state = tl.exp2(steps[j] * rate) * state + drives[j] * b
            tl.store(here + (N + n) * LANES, state)
            queue = (queue[1], queue[2], queue[3], next_state)
            rates = (rates[1], rates[2], rates[3], next_rate)
            factors = (factors[1], factors[2], factors[3], next_factors)
        position, within = _ahead(position, within, run, step, hop, GROUP, SHORT)


@triton.jit
def _adjoint(
    state,
    incoming,
    rate_sum,
    rate,
    bs,
    cs,
    steps,
    drives,
    grads,
    through_drive,
    through_rate,
    GROUP: tl.constexpr,
    LANES: tl.constexpr,
):
    """Adjoint of one state over a group.

    Returns the gradient that leaves the group at its start, the sum for the gradient of A, the sums
    over channels that are those of B and C, and ``through_drive`` and ``through_rate`` with this
    state's share: B g, and the gradient of the step sizes through the decays.
    """
    entered = ()
    decays = ()
    of_c = ()
    for j in tl.static_range(GROUP):
        decay = tl.exp2(steps[j] * (rate * _LOG2E))
        entered = entered + (state,)
        decays = decays + (decay,)
        state = decay * state + drives[j] * bs[j]
        of_c = of_c + (grads[j] * state,)
    sums = ()
    drive_shares = ()
    rate_shares = ()
    for j in tl.static_range(GROUP - 1, -1, -1):
        adjoint = cs[j] * grads[j] + incoming
        incoming = decays[j] * adjoint
        through = incoming * entered[j]
        rate_sum += steps[j] * through
        drive_shares = (through_drive[j] + bs[j] * adjoint,) + drive_shares
        rate_shares = (through_rate[j] + rate * through,) + rate_shares
        sums = (adjoint * drives[j], of_c[j]) + sums
    return incoming, rate_sum, _sums_over_lanes(sums, LANES), drive_shares, rate_shares


@triton.jit(do_not_specialize=_SIZES)
def selective_scan_bwd_kernel(
    u_ptr,
    delta_ptr,
    proj_ptr,
    factors_ptr,
    weight_ptr,
    bias_ptr,
    a_ptr,
    list_ptr,
    skip_ptr,
    carries_ptr,
    scratch_ptr,
    grad_y_ptr,
    entering_ptr,
    grad_u_ptr,
    grad_raw_ptr,
    grad_proj_ptr,
    grad_a_ptr,
    grad_skip_ptr,
    channels,
    height,
    width,
    lines,
    length,
    positions,
    chunk,
    chunks,
    blocks,
    first,
    wave,
    states,
    stride,
    stride_u_k,
    stride_delta_k,
    stride_y_k,
    K: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
    LOW: tl.constexpr,
    COLUMN: tl.constexpr,
    REVERSE: tl.constexpr,
    LISTED: tl.constexpr,
    SHORT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    SAVED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCKS: tl.constexpr,
    LANES: tl.constexpr,
    FULL: tl.constexpr,
    PACK: tl.constexpr,
    TYPE: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    FAST: tl.constexpr,
):
    """Gradients of one chunk, or of a whole path, from its last group of 8 positions to its first.

    ``entering_ptr`` has the gradients that enter the chunks from behind. The gradients of B and C
    are sums over this program's channels, those of A and the skip weights sums over its positions.

    One state stays in registers, as do its gradient and sums. Several take turns in every group;
    what they have is in ``scratch_ptr``, small enough for the caches. The forward pass saved them
    at every SAVED positions: the program finds those between when it comes to the last of SAVED.
    """
    SCALE: tl.constexpr = _LOG2E if SOFTPLUS else 1.0
    WIDTH: tl.constexpr = (LOW + 2 * N) // PACK
    # With several states B and C are read state by state.
    COLUMNS: tl.constexpr = R + 2 if N == 1 else R
    WORDS: tl.constexpr = COLUMNS // PACK if COLUMNS > 0 else 1
    GRADS: tl.constexpr = GROUP * (2 if R == 0 else 1)
    PARTS: tl.constexpr = GRADS + GROUP
    FORWARD: tl.constexpr = 1 + (R == 0)
    MAPS: tl.constexpr = 1 + FORWARD + ACCUMULATE
    RATIO: tl.constexpr = SAVED // GROUP
    block, k, c, s = _program(blocks, wave, first, chunks)
    t0 = c * chunk
    count, groups, final = _chunk(t0, k, chunk, length, list_ptr, GROUP, LISTED)
    base, position, within, run, step, hop = _path(
        s,
        k,
        t0 + final * GROUP,
        height,
        width,
        lines,
        length,
        list_ptr,
        COLUMN,
        REVERSE,
        LISTED,
    )
    lanes = tl.arange(0, LANES)
    d = block * LANES + lanes
    insides, weights, biases, rates, skips = _parameters(
        weight_ptr,
        bias_ptr,
        a_ptr,
        skip_ptr,
        k,
        d,
        channels,
        N,
        1,
        R,
        HAS_BIAS,
        HAS_SKIP,
        SCALE,
        BLOCKS,
        LANES,
        ACC,
    )
    inside = insides[0]
    skip = skips[0]
    path = s.to(tl.int64) * K + k
    k64 = k.to(tl.int64)
    grad_u_base = grad_u_ptr + base * stride + (k64 - first) * stride_y_k + d
    grad_raw_base = grad_raw_ptr + base * stride + k64 * stride_delta_k + d
    sweep_bases = (u_ptr + base * stride + k64 * stride_u_k + d,)
    if R == 0:
        sweep_bases = sweep_bases + (delta_ptr + base * stride + k64 * stride_delta_k + d,)
    bases = sweep_bases + (grad_y_ptr + base * stride + k64 * stride_u_k + d,)
    if ACCUMULATE:
        bases = bases + (grad_u_base,)
    row_base = proj_ptr + base * (K * WIDTH) + k * WIDTH + (LOW - R) // PACK
    # Lane i writes the sums of position i // 2: of B if it is even, of C if it is odd.
    grad_proj_base = (
        grad_proj_ptr
        + ((block.to(tl.int64) * positions + base) * K + k) * (2 * N)
        + (lanes & 1) * N
    )
    carries_base = carries_ptr + path * ((length + SAVED - 1) // SAVED) * (N * channels)
    carries_base += (t0 // SAVED).to(tl.int64) * (N * channels) + d
    scratch_base = scratch_ptr + tl.program_id(0).to(tl.int64) * ((RATIO + 2) * N * LANES) + lanes
    # One row per sequence and chunk, so that one reduction over rows finishes the sums.
    sums = (s.to(tl.int64) * chunks + c) * K + k

    entering_row = entering_ptr + (path * chunks + c) * N * channels + d
    # Nothing enters the last chunk from behind.
    enters = inside & (c + 1 < chunks)
    incoming = tl.zeros((LANES,), ACC)
    grad_a = tl.zeros((LANES,), ACC)
    rate_row = a_ptr + (k * channels + d) * N
    factor_base = factors_ptr + base * (K * (LOW + 2 * N)) + k * (LOW + 2 * N) + LOW
    incoming_base = scratch_base + RATIO * N * LANES
    grad_a_base = incoming_base + N * LANES
    if N == 1:
        incoming = tl.load(entering_row, mask=enters, other=0.0).to(ACC)
    else:
        for n in range(N):
            entered = tl.load(entering_row + n * channels, mask=enters, other=0.0).to(ACC)
            tl.store(incoming_base + n * LANES, entered)
            tl.store(grad_a_base + n * LANES, tl.zeros((LANES,), ACC))
    grad_skip = tl.zeros((LANES,), ACC)

    last = count - final * GROUP - 1
    rows, offsets, maps = _load_group(
        row_base,
        bases,
        position,
        within,
        last,
        run,
        step,
        hop,
        stride,
        insides,
        K * WIDTH,
        WORDS,
        MAPS,
        GROUP,
        BLOCKS,
        LANES,
        FULL,
        SHORT,
        INDEX,
    )
    next_position, next_within, next_last, remaining = _next_group(
        position, within, last, groups * GROUP, run, step, hop, True, GROUP, SHORT
    )
    next_rows = _load_rows(
        row_base,
        next_position,
        next_within,
        next_last,
        run,
        step,
        hop,
        K * WIDTH,
        WORDS,
        GROUP,
        LANES,
        SHORT,
        INDEX,
    )
    if RATIO == 1:
        saved = _load_state(carries_base, groups - 1, channels, inside)
        next_saved = _load_state(carries_base, groups - 2, channels, inside)
    for i in range(groups):
        index = groups - 1 - i
        if RATIO > 1:
            if (i == 0) | (index % RATIO == RATIO - 1):
                segment = index // RATIO
                _start, sweep_position, sweep_within, _run, _step, _hop = _path(
                    s,
                    k,
                    t0 + segment * SAVED,
                    height,
                    width,
                    lines,
                    length,
                    list_ptr,
                    COLUMN,
                    REVERSE,
                    LISTED,
                )
                _find_states(
                    carries_base + segment.to(tl.int64) * (N * channels),
                    scratch_base,
                    row_base,
                    factor_base,
                    rate_row,
                    sweep_bases,
                    states,
                    index - segment * RATIO,
                    sweep_position,
                    sweep_within,
                    run,
                    step,
                    hop,
                    stride,
                    channels,
                    insides,
                    weights,
                    biases,
                    N,
                    R,
                    SOFTPLUS,
                    SCALE,
                    K * WIDTH,
                    WORDS,
                    FORWARD,
                    GROUP,
                    LANES,
                    FULL,
                    SHORT,
                    PACK,
                    TYPE,
                    ACC,
                    INDEX,
                    FAST,
                )
        lane_last = _pick(tl.full((LANES,), last, tl.int32), 0, LANES)
        us = ()
        grads = ()
        steps = ()
        slopes = ()
        drives = ()
        through_drive = ()
        through_rate = ()
        for j in tl.static_range(GROUP):
            dts, dt_slopes = _step_sizes(
                rows,
                maps,
                weights,
                biases,
                j,
                GROUP,
                R,
                SOFTPLUS,
                SCALE,
                BLOCKS,
                WORDS,
                PACK,
                LANES,
                TYPE,
                ACC,
                FAST,
            )
            exists = lane_last >= j
            dt = tl.where(exists, dts[0], 0.0)
            u = maps[j].to(ACC)
            grad = tl.where(exists, maps[GRADS + j].to(ACC), 0.0)
            us = us + (u,)
            grads = grads + (grad,)
            steps = steps + (dt,)
            slopes = slopes + (dt_slopes[0],)
            drives = drives + (dt * u,)
            through_drive = through_drive + (tl.zeros((LANES,), ACC),)
            through_rate = through_rate + (tl.zeros((LANES,), ACC),)
            grad_skip += u * grad
        lane_at = _at(position, within, tl.minimum(last, lanes // 2), run, step, hop, SHORT)
        lane_ptr = grad_proj_base + lane_at.to(INDEX) * (K * 2 * N)
        lane_mask = lanes // 2 <= last
        if N == 1:
            bs = ()
            cs = ()
            for j in tl.static_range(GROUP):
                bs = bs + (_element(rows, j, R, WORDS, PACK, LANES, TYPE, ACC),)
                cs = cs + (_element(rows, j, R + 1, WORDS, PACK, LANES, TYPE, ACC),)
            incoming, grad_a, of_factors, through_drive, through_rate = _adjoint(
                saved,
                incoming,
                grad_a,
                rates[0],
                bs,
                cs,
                steps,
                drives,
                grads,
                through_drive,
                through_rate,
                GROUP,
                LANES,
            )
            tl.store(lane_ptr, of_factors, mask=lane_mask)
        else:
            here = scratch_base + (index % RATIO) * (N * LANES)
            state = tl.load(here)
            left = tl.load(incoming_base)
            rate_sum = tl.load(grad_a_base)
            rate = tl.load(rate_row, mask=inside, other=0.0)
            factors = _load_factors(
                factor_base,
                position,
                within,
                last,
                0,
                run,
                step,
                hop,
                K * (LOW + 2 * N),
                N,
                LANES,
                SHORT,
                INDEX,
            )
            for n in range(states):
                following = tl.minimum(n + 1, N - 1)
                next_state = tl.load(here + following * LANES)
                next_left = tl.load(incoming_base + following * LANES)
                next_rate_sum = tl.load(grad_a_base + following * LANES)
                next_rate = tl.load(rate_row + following, mask=inside, other=0.0)
                next_factors = _load_factors(
                    factor_base,
                    position,
                    within,
                    last,
                    following,
                    run,
                    step,
                    hop,
                    K * (LOW + 2 * N),
                    N,
                    LANES,
                    SHORT,
                    INDEX,
                )
                bs = ()
                cs = ()
                for j in tl.static_range(GROUP):
                    bs = bs + (_pick(factors, 2 * j, LANES).to(ACC),)
                    cs = cs + (_pick(factors, 2 * j + 1, LANES).to(ACC),)
                left, rate_sum, of_factors, through_drive, through_rate = _adjoint(
                    state,
                    left,
                    rate_sum,
                    rate.to(ACC),
                    bs,
                    cs,
                    steps,
                    drives,
                    grads,
                    through_drive,
                    through_rate,
                    GROUP,
                    LANES,
                )
                tl.store(lane_ptr + n, of_factors, mask=lane_mask)
                tl.store(incoming_base + n * LANES, left)
                tl.store(grad_a_base + n * LANES, rate_sum)
                state = next_state
                left = next_left
                rate_sum = next_rate_sum
                rate = next_rate
                factors = next_factors
        for j in tl.static_range(GROUP):
            place = _pick(offsets, j, LANES)
            grad_u = skip * grads[j] + steps[j] * through_drive[j]
            grad_raw = (us[j] * through_drive[j] + through_rate[j]) * slopes[j]
            if ACCUMULATE:
                grad_u += maps[PARTS + j].to(ACC)
            _write(grad_u_base + place, grad_u, lane_last >= j, inside, FULL)
            _write(grad_raw_base + place, grad_raw, lane_last >= j, inside, FULL)
        position = next_position
        within = next_within
        last = next_last
        rows = next_rows
        offsets = _group_offsets(
            position, within, last, run, step, hop, stride, LANES, SHORT, INDEX
        )
        maps = _load_maps(bases, offsets, insides, MAPS, GROUP, BLOCKS, LANES, FULL)
        next_position, next_within, next_last, remaining = _next_group(
            position, within, last, remaining, run, step, hop, True, GROUP, SHORT
        )
        next_rows = _load_rows(
            row_base,
            next_position,
            next_within,
            next_last,
            run,
            step,
            hop,
            K * WIDTH,
            WORDS,
            GROUP,
            LANES,
            SHORT,
            INDEX,
        )
        if RATIO == 1:
            saved = next_saved
            next_saved = _load_state(carries_base, index - 2, channels, inside)
    for n in range(N):
        if N > 1:
            grad_a = tl.load(grad_a_base + n * LANES)
        tl.store(grad_a_ptr + (sums * N + n) * channels + d, grad_a, mask=inside)
    if HAS_SKIP:
        tl.store(grad_skip_ptr + sums * channels + d, grad_skip, mask=inside)


@triton.jit
def sum_buffers_kernel(
    part_ptr, out_ptr, size, COUNT: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr
):
    """The sum of COUNT buffers of ``size`` elements, in their order."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), ACC)
    for p in tl.static_range(COUNT):
        total += tl.load(part_ptr + p * tl.cast(size, tl.int64) + i, mask=i < size, other=0.0).to(
            ACC
        )
    tl.store(out_ptr + i, total.to(out_ptr.dtype.element_ty), mask=i < size)
