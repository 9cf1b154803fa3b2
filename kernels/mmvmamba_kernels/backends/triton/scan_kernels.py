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
    "turns",
    "directions",
    "backwards",
    "stride_y_k",
    "stride_delta_k",
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
def _program(blocks, directions, chunks):
    """Channel block, direction, chunk and sequence of this program.

    The grid has one axis, the one that is not limited to 65535.
    """
    pid = tl.program_id(0)
    block = pid % blocks
    pid = pid // blocks
    k = pid % directions
    pid = pid // directions
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
    """Where step t of a path is, and how the path goes on.

    Returns the first position of the sequence; from there the position of step t; its number within
    its run, the straight part of a path; and what :func:`_at` takes: the positions of a run, the
    distance from a position to the next, and what is added to it at the end of a run. Of a listed
    path positions are steps, and the last is the list, which :func:`_at` reads.
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
    return base, position, t % run, (run, sign * step, hop)


@triton.jit
def _at(position, within, j, path, SHORT: tl.constexpr):
    """The position ``j`` steps on; less than two runs away, unless SHORT."""
    run, step, hop = path
    if hop.dtype.is_ptr():
        return tl.load(hop + position + j)
    elif SHORT:
        return position + j * step + (within + j) // run * hop
    else:
        return position + j * step + tl.where(within + j >= run, hop, 0)


@triton.jit
def _runs(within, run, SHORT: tl.constexpr):
    """Runs from that of a position to that which number ``within`` is in, two at most if not SHORT.

    Backwards they are negative, as the number is.
    """
    if SHORT:
        return tl.where(within < 0, -((run - 1 - within) // run), within // run)
    else:
        ahead = (within >= run).to(tl.int32) + (within >= 2 * run).to(tl.int32)
        return ahead - (within < 0).to(tl.int32) - (within + run < 0).to(tl.int32)


@triton.jit
def _next_group(cursor, path, BACKWARDS: tl.constexpr, GROUP: tl.constexpr, SHORT: tl.constexpr):
    """The group after this: its position, number within its run, last number, what remains.

    After the last group comes the last group again, so that loads stay in the map.
    """
    position, within, last, remaining = cursor
    run, step, hop = path
    ahead = -GROUP if BACKWARDS else GROUP
    new_within = within + ahead
    if hop.dtype.is_ptr():
        new_position = position + ahead
    else:
        runs = _runs(new_within, run, SHORT)
        new_within -= runs * run
        new_position = position + ahead * step + runs * hop
    new_last = GROUP - 1 if BACKWARDS else tl.minimum(remaining - GROUP, GROUP) - 1
    more = remaining > GROUP
    return (
        tl.where(more, new_position, position),
        tl.where(more, new_within, within),
        tl.where(more, new_last, last),
        tl.where(more, remaining - GROUP, remaining),
    )


@triton.jit
def _no_group():
    """What stands for the group before the first."""
    return tl.cast(0, tl.int32), tl.cast(0, tl.int32), tl.cast(0, tl.int32), tl.cast(0, tl.int32)


@triton.jit
def _nothing(ptr, COUNT: tl.constexpr, LANES: tl.constexpr):
    """What stands for COUNT loads before the first."""
    values = ()
    for _ in tl.static_range(COUNT):
        values = values + (tl.zeros((LANES,), ptr.dtype.element_ty),)
    return values


@triton.jit
def _pick(lanes, i: tl.constexpr, LANES: tl.constexpr):
    """What lane i has, in all lanes."""
    return tl.gather(lanes, tl.full((LANES,), i, tl.int32), 0)


@triton.jit
def _write(ptr, value, mask, inside, FULL: tl.constexpr):
    if FULL:
        tl.store(ptr, value.to(ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(ptr, value.to(ptr.dtype.element_ty), mask=inside & mask)


@triton.jit
def _turned(values, new, COUNT: tl.constexpr, FIRST: tl.constexpr):
    """The values behind the FIRST ones, then the first of ``new``: every turn finds its own."""
    turned = ()
    for i in tl.static_range(FIRST, COUNT):
        turned = turned + (values[i],)
    for i in tl.static_range(FIRST):
        turned = turned + (new[i],)
    return turned


@triton.jit
def _load_rows(
    row_ptr,
    cursor,
    path,
    ROW: tl.constexpr,
    WORDS: tl.constexpr,
    GROUP: tl.constexpr,
    LANES: tl.constexpr,
    SHORT: tl.constexpr,
    INDEX: tl.constexpr,
):
    """The first words of the rows of proj at a group's positions, row after row, a word a lane."""
    position, within, last, _ = cursor
    rows = ()
    for i in tl.static_range((GROUP * WORDS + LANES - 1) // LANES):
        word = i * LANES + tl.arange(0, LANES)
        at = _at(position, within, tl.minimum(last, word // WORDS), path, SHORT)
        rows = rows + (tl.load(row_ptr + at.to(INDEX) * ROW + word % WORDS),)
    return rows


@triton.jit
def _load_words(
    row_ptr,
    cursor,
    path,
    ROW: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
    TURN: tl.constexpr,
    PACK: tl.constexpr,
    GROUP: tl.constexpr,
    LANES: tl.constexpr,
    SHORT: tl.constexpr,
    INDEX: tl.constexpr,
):
    """A group's words of the low rank, and of B and C: for every turn B, C of its states.

    One state's B and C are in the same words as the low rank.
    """
    if N == 1:
        rows = _load_rows(row_ptr, cursor, path, ROW, (R + 2) // PACK, GROUP, LANES, SHORT, INDEX)
        return rows, rows
    else:
        HALF: tl.constexpr = TURN // PACK
        position, within, last, _ = cursor
        factors = ()
        for turn in tl.static_range(N // TURN):
            for i in tl.static_range((GROUP * 2 * HALF + LANES - 1) // LANES):
                word = i * LANES + tl.arange(0, LANES)
                at = _at(position, within, tl.minimum(last, word // (2 * HALF)), path, SHORT)
                column = turn * HALF + word % HALF + word // HALF % 2 * (N // PACK) + R // PACK
                factors = factors + (tl.load(row_ptr + at.to(INDEX) * ROW + column),)
        if R == 0:
            return factors, factors
        else:
            rows = _load_rows(row_ptr, cursor, path, ROW, R // PACK, GROUP, LANES, SHORT, INDEX)
            return rows, factors


@triton.jit
def _no_words(
    row_ptr,
    N: tl.constexpr,
    R: tl.constexpr,
    TURN: tl.constexpr,
    PACK: tl.constexpr,
    GROUP: tl.constexpr,
    LANES: tl.constexpr,
):
    """What stands for :func:`_load_words` before the first group."""
    WORDS: tl.constexpr = (R + 2 if N == 1 else R) // PACK
    TURNS: tl.constexpr = N // TURN
    rows = _nothing(row_ptr, (GROUP * WORDS + LANES - 1) // LANES, LANES)
    if N == 1:
        return rows, rows
    else:
        COUNT: tl.constexpr = (GROUP * 2 * TURN // PACK + LANES - 1) // LANES
        factors = _nothing(row_ptr, TURNS * COUNT, LANES)
        if R == 0:
            return factors, factors
        else:
            return rows, factors


@triton.jit
def _element(
    words,
    j: tl.constexpr,
    i: tl.constexpr,
    WORDS: tl.constexpr,
    PACK: tl.constexpr,
    LANES: tl.constexpr,
    TYPE: tl.constexpr,
    ACC: tl.constexpr,
):
    """Number i of a group's position j, in all lanes; a position has WORDS words."""
    WORD: tl.constexpr = j * WORDS + i // PACK
    word = _pick(words[WORD // LANES], WORD % LANES, LANES)
    if PACK == 1:
        return word.to(ACC)
    elif tl.bfloat16 == TYPE:
        half = word << 16 if i % 2 == 0 else word & -65536
        return half.to(tl.float32, bitcast=True).to(ACC)
    else:
        half = word if i % 2 == 0 else word >> 16
        return half.to(tl.int16).to(TYPE, bitcast=True).to(ACC)


@triton.jit
def _offsets(cursor, path, stride, LANES: tl.constexpr, SHORT: tl.constexpr, INDEX: tl.constexpr):
    """Where a group's positions are in a map, a position a lane; those behind the last are it."""
    position, within, last, _ = cursor
    j = tl.minimum(tl.arange(0, LANES), last)
    return _at(position, within, j, path, SHORT).to(INDEX) * stride


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
                if FULL:
                    value = tl.load(ptr)
                else:
                    value = tl.load(ptr, mask=inside[g], other=0.0)
                values = values + (value,)
    return values


@triton.jit
def _no_maps(
    pointers,
    COUNT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCKS: tl.constexpr,
    LANES: tl.constexpr,
):
    """What stands for :func:`_load_maps` before the first group."""
    values = ()
    for i in tl.static_range(COUNT):
        values = values + _nothing(pointers[i], GROUP * BLOCKS, LANES)
    return values


@triton.jit
def _load_group(
    row_ptr,
    pointers,
    cursor,
    path,
    stride,
    inside,
    ROW: tl.constexpr,
    MAPS: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
    BACKWARDS: tl.constexpr,
    TURN: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCKS: tl.constexpr,
    LANES: tl.constexpr,
    FULL: tl.constexpr,
    SHORT: tl.constexpr,
    PACK: tl.constexpr,
    INDEX: tl.constexpr,
):
    """What a group needs, and the next one: its words, offsets in maps, the maps, last number."""
    rows, factors = _load_words(
        row_ptr, cursor, path, ROW, N, R, TURN, PACK, GROUP, LANES, SHORT, INDEX
    )
    offsets = _offsets(cursor, path, stride, LANES, SHORT, INDEX)
    maps = _load_maps(pointers, offsets, inside, MAPS, GROUP, BLOCKS, LANES, FULL)
    group = (rows, factors, offsets, maps, cursor[2])
    return group, _next_group(cursor, path, BACKWARDS, GROUP, SHORT)


@triton.jit
def _parameters(
    weight_ptr,
    bias_ptr,
    skip_ptr,
    k,
    d,
    channels,
    R: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCKS: tl.constexpr,
    LANES: tl.constexpr,
    ACC: tl.constexpr,
):
    """What channels have of their own: inside, weights, bias and skip, block after block.

    Weights and bias are multiplied by SCALE.
    """
    all_inside = ()
    weights = ()
    biases = ()
    skips = ()
    for g in tl.static_range(BLOCKS):
        c = d + g * LANES
        inside = c < channels
        row = k * channels + c
        all_inside = all_inside + (inside,)
        for r in tl.static_range(R):
            w = tl.load(weight_ptr + row * R + r, mask=inside, other=0.0)
            weights = weights + (w.to(ACC) * SCALE,)
        bias = tl.zeros((LANES,), ACC)
        if HAS_BIAS:
            bias = tl.load(bias_ptr + row, mask=inside, other=0.0).to(ACC) * SCALE
        biases = biases + (bias,)
        skip = tl.zeros((LANES,), ACC)
        if HAS_SKIP:
            skip = tl.load(skip_ptr + row, mask=inside, other=0.0).to(ACC)
        skips = skips + (skip,)
    return all_inside, weights, biases, skips


@triton.jit
def _load_states(
    ptr,
    channels,
    inside,
    N: tl.constexpr,
    BLOCKS: tl.constexpr,
    LANES: tl.constexpr,
    ACC: tl.constexpr,
):
    states = ()
    for n in tl.static_range(N):
        for g in tl.static_range(BLOCKS):
            state = tl.load(ptr + n * channels + g * LANES, mask=inside[g], other=0.0)
            states = states + (state.to(ACC),)
    return states


@triton.jit
def _load_saved(
    ptr,
    index,
    channels,
    inside,
    N: tl.constexpr,
    RATIO: tl.constexpr,
):
    """The states that were saved before group ``index`` or the one before it; first if none is.

    They are as they were saved: the loop carries them.
    """
    row = tl.maximum(index, 0) // RATIO
    ptr += row.to(tl.int64) * (N * channels)
    states = ()
    for n in tl.static_range(N):
        states = states + (tl.load(ptr + n * channels, mask=inside[0], other=0.0),)
    return states


@triton.jit
def _load_rates(
    ptr,
    channels,
    inside,
    TURN: tl.constexpr,
    BLOCKS: tl.constexpr,
    LANES: tl.constexpr,
    ACC: tl.constexpr,
):
    """A turn's log2(e) A, state after state."""
    rates = ()
    for n in tl.static_range(TURN):
        for g in tl.static_range(BLOCKS):
            rate = tl.load(ptr + n * channels + g * LANES, mask=inside[g], other=0.0)
            rates = rates + (rate.to(ACC) * _LOG2E,)
    return rates


@triton.jit
def _store_states(
    ptr,
    states,
    channels,
    inside,
    N: tl.constexpr,
    BLOCKS: tl.constexpr,
    LANES: tl.constexpr,
):
    for n in tl.static_range(N):
        for g in tl.static_range(BLOCKS):
            tl.store(ptr + n * channels + g * LANES, states[n * BLOCKS + g], mask=inside[g])


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


@triton.jit
def _advance(
    states,
    rates,
    factors,
    steps,
    drives,
    outputs,
    j: tl.constexpr,
    FIRST: tl.constexpr,
    BACKWARDS: tl.constexpr,
    OUTPUT: tl.constexpr,
    TURN: tl.constexpr,
    BLOCKS: tl.constexpr,
    WORDS: tl.constexpr,
    PACK: tl.constexpr,
    LANES: tl.constexpr,
    TYPE: tl.constexpr,
    ACC: tl.constexpr,
):
    """A turn's states after a group's position j, and ``outputs`` with their share (OUTPUT).

    Forwards, the recurrence is h = a h + dt B u. Backwards it is that of the gradient that leaves a
    position for the one before it: s = a (s + C dy). The drives are dt u and dy.
    """
    new_states = ()
    for m in tl.static_range(TURN):
        factor = _element(factors, j, FIRST + m + BACKWARDS * TURN, WORDS, PACK, LANES, TYPE, ACC)
        new_outputs = ()
        for g in tl.static_range(BLOCKS):
            decay = tl.exp2(steps[g] * rates[m * BLOCKS + g])
            state = states[m * BLOCKS + g]
            if BACKWARDS:
                state = decay * (state + drives[g] * factor)
            else:
                state = decay * state + drives[g] * factor
            new_states = new_states + (state,)
            if OUTPUT:
                of_c = _element(factors, j, FIRST + TURN + m, WORDS, PACK, LANES, TYPE, ACC)
                new_outputs = new_outputs + (outputs[g] + state * of_c,)
        if OUTPUT:
            outputs = new_outputs
    return new_states, outputs


@triton.jit
def _walk_group(
    states,
    totals,
    rates,
    rate_ptr,
    group,
    inside,
    weights,
    biases,
    skips,
    channels,
    turns,
    N: tl.constexpr,
    R: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    BACKWARDS: tl.constexpr,
    OUTPUT: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    TURN: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCKS: tl.constexpr,
    LANES: tl.constexpr,
    PACK: tl.constexpr,
    TYPE: tl.constexpr,
    ACC: tl.constexpr,
    FAST: tl.constexpr,
):
    """The states after a group, the sums of step sizes, and the outputs (OUTPUT) or nothing.

    Many states take turns, TURN at a time, so that the code of one turn serves all. The rates are
    those of the first turn; later ones read theirs, since registers are scarce.
    """
    SCALE: tl.constexpr = _LOG2E if SOFTPLUS else 1.0
    TURNS: tl.constexpr = N // TURN
    WORDS: tl.constexpr = (R + 2 if N == 1 else R) // PACK
    FACTOR_WORDS: tl.constexpr = WORDS if N == 1 else 2 * TURN // PACK
    FACTORS: tl.constexpr = (GROUP * FACTOR_WORDS + LANES - 1) // LANES
    FIRST: tl.constexpr = R if N == 1 else 0
    SUMS: tl.constexpr = GROUP * BLOCKS * (2 if R == 0 else 1)
    START: tl.constexpr = GROUP - 1 if BACKWARDS else 0
    STOP: tl.constexpr = -1 if BACKWARDS else GROUP
    STEP: tl.constexpr = -1 if BACKWARDS else 1
    rows, factors, _places, maps, last = group
    lane_last = _pick(tl.full((LANES,), last, tl.int32), 0, LANES)
    steps = ()
    drives = ()
    outputs = ()
    for j in tl.static_range(START, STOP, STEP):
        dts, _slopes = _step_sizes(
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
        here = ()
        inputs = ()
        ys = ()
        new_totals = ()
        for g in tl.static_range(BLOCKS):
            dt = dts[g]
            u = maps[j * BLOCKS + g].to(ACC)
            if OUTPUT:
                y = skips[g] * u
                if ACCUMULATE:
                    y += maps[SUMS + j * BLOCKS + g].to(ACC)
                ys = ys + (y,)
            else:
                dt = tl.where(lane_last >= j, dt, 0.0)
                new_totals = new_totals + (totals[g] + dt,)
            here = here + (dt,)
            if BACKWARDS:
                inputs = inputs + (tl.where(lane_last >= j, u, 0.0),)
            else:
                inputs = inputs + (dt * u,)
        if not OUTPUT:
            totals = new_totals
        if TURNS == 1:
            states, ys = _advance(
                states,
                rates,
                factors,
                here,
                inputs,
                ys,
                j,
                FIRST,
                BACKWARDS,
                OUTPUT,
                TURN,
                BLOCKS,
                FACTOR_WORDS,
                PACK,
                LANES,
                TYPE,
                ACC,
            )
        else:
            steps = steps + (here,)
            drives = drives + (inputs,)
        outputs = outputs + (ys,)
    if TURNS > 1:
        for turn in range(turns):
            own_rates = _load_rates(
                rate_ptr + turn * TURN * channels, channels, inside, TURN, BLOCKS, LANES, ACC
            )
            own = states
            new_outputs = ()
            for i in tl.static_range(GROUP):
                own, ys = _advance(
                    own,
                    own_rates,
                    factors,
                    steps[i],
                    drives[i],
                    outputs[i],
                    START + i * STEP,
                    FIRST,
                    BACKWARDS,
                    OUTPUT,
                    TURN,
                    BLOCKS,
                    FACTOR_WORDS,
                    PACK,
                    LANES,
                    TYPE,
                    ACC,
                )
                new_outputs = new_outputs + (ys,)
            outputs = new_outputs
            states = _turned(states, own, N * BLOCKS, TURN * BLOCKS)
            factors = _turned(factors, factors, TURNS * FACTORS, FACTORS)
    return states, totals, outputs


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
    turns,
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
    TURN: tl.constexpr,
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
    """Sum of the step sizes and end state of every chunk but the last, starting from zero.

    Backwards, ``u_ptr`` is the gradient of the output, the state that which leaves the chunk at its
    start, and the last chunk the first of the path.
    """
    SCALE: tl.constexpr = _LOG2E if SOFTPLUS else 1.0
    WIDTH: tl.constexpr = (LOW + 2 * N) // PACK
    MAPS: tl.constexpr = 2 if R == 0 else 1
    block, k, c, s = _program(blocks, K, chunks - 1)
    if BACKWARDS:
        c += 1
    t0 = c * chunk
    count, groups, final = _chunk(t0, k, chunk, length, list_ptr, GROUP, LISTED)
    if BACKWARDS:
        t0 += final * GROUP
    base, position, within, path = _path(
        s, k, t0, height, width, lines, length, list_ptr, COLUMN, REVERSE, LISTED
    )
    d = block * (BLOCKS * LANES) + tl.arange(0, LANES)
    inside, weights, biases, skips = _parameters(
        weight_ptr,
        bias_ptr,
        weight_ptr,
        k,
        d,
        channels,
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
    for _ in tl.static_range(N * BLOCKS):
        states = states + (tl.zeros((LANES,), ACC),)
    bases = (u_ptr + base * stride + k.to(tl.int64) * stride_u_k + d,)
    if R == 0:
        bases = bases + (delta_ptr + base * stride + k.to(tl.int64) * stride_delta_k + d,)
    row_base = proj_ptr + base * (K * WIDTH) + k * WIDTH + (LOW - R) // PACK
    rate_base = a_ptr + k * N * channels + d
    rates = _load_rates(rate_base, channels, inside, TURN, BLOCKS, LANES, ACC)

    if BACKWARDS:
        last = count - final * GROUP - 1
        cursor = (position, within, last, groups * GROUP)
    else:
        cursor = (position, within, tl.minimum(count, GROUP) - 1, count)
    group, cursor = _load_group(
        row_base,
        bases,
        cursor,
        path,
        stride,
        inside,
        K * WIDTH,
        MAPS,
        N,
        R,
        BACKWARDS,
        TURN,
        GROUP,
        BLOCKS,
        LANES,
        FULL,
        SHORT,
        PACK,
        INDEX,
    )
    next_group, cursor = _load_group(
        row_base,
        bases,
        cursor,
        path,
        stride,
        inside,
        K * WIDTH,
        MAPS,
        N,
        R,
        BACKWARDS,
        TURN,
        GROUP,
        BLOCKS,
        LANES,
        FULL,
        SHORT,
        PACK,
        INDEX,
    )
    for _ in range(groups):
        states, totals, _outputs = _walk_group(
            states,
            totals,
            rates,
            rate_base,
            group,
            inside,
            weights,
            biases,
            skips,
            channels,
            turns,
            N,
            R,
            SOFTPLUS,
            BACKWARDS,
            False,
            False,
            TURN,
            GROUP,
            BLOCKS,
            LANES,
            PACK,
            TYPE,
            ACC,
            FAST,
        )
        group = next_group
        next_group, cursor = _load_group(
            row_base,
            bases,
            cursor,
            path,
            stride,
            inside,
            K * WIDTH,
            MAPS,
            N,
            R,
            BACKWARDS,
            TURN,
            GROUP,
            BLOCKS,
            LANES,
            FULL,
            SHORT,
            PACK,
            INDEX,
        )
    chunk_row = ((s.to(tl.int64) * K + k) * chunks + c) * channels
    for g in tl.static_range(BLOCKS):
        tl.store(total_ptr + chunk_row + d + g * LANES, totals[g], mask=inside[g])
    _store_states(end_ptr + chunk_row * N + d, states, channels, inside, N, BLOCKS, LANES)


@triton.jit(do_not_specialize=_SIZES)
def selective_scan_carry_kernel(
    state_ptr,
    total_ptr,
    a_ptr,
    channels,
    chunks,
    blocks,
    backwards,
    K: tl.constexpr,
    N: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """Replace the chunks' end states by the states that enter them; the last has no end state."""
    block, k, n, s = _program(blocks, K, N)
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = d < channels
    rate = tl.load(a_ptr + (k * N + n) * channels + d, mask=inside, other=0.0).to(ACC) * _LOG2E
    first = (s.to(tl.int64) * K + k) * chunks
    state = tl.zeros((BLOCK_D,), ACC)
    for i in range(0, chunks, UNROLL):
        ends = ()
        decays = ()
        for j in tl.static_range(UNROLL):
            c = first + tl.where(backwards != 0, chunks - 1 - i - j, i + j)
            mask = inside & (i + j < chunks)
            ends = ends + (tl.load(state_ptr + (c * N + n) * channels + d, mask=mask, other=0.0),)
            total = tl.load(total_ptr + c * channels + d, mask=mask, other=0.0)
            decays = decays + (tl.exp2(total * rate),)
        for j in tl.static_range(UNROLL):
            c = first + tl.where(backwards != 0, chunks - 1 - i - j, i + j)
            mask = inside & (i + j < chunks)
            tl.store(state_ptr + (c * N + n) * channels + d, state, mask=mask)
            state = decays[j] * state + ends[j]


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
    turns,
    directions,
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
    TURN: tl.constexpr,
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
    """Outputs of one chunk or a whole path.

    A direction writes its own buffer of y, or adds to it (ACCUMULATE). The states at every SAVED
    positions, a multiple of GROUP, are left for the backward pass; at none if it is 0.
    """
    SCALE: tl.constexpr = _LOG2E if SOFTPLUS else 1.0
    WIDTH: tl.constexpr = (LOW + 2 * N) // PACK
    MAPS: tl.constexpr = 1 + (R == 0) + ACCUMULATE
    block, k, c, s = _program(blocks, directions, chunks)
    t0 = c * chunk
    count, groups, _final = _chunk(t0, k, chunk, length, list_ptr, GROUP, LISTED)
    base, position, within, path = _path(
        s, k, t0, height, width, lines, length, list_ptr, COLUMN, REVERSE, LISTED
    )
    d = block * (BLOCKS * LANES) + tl.arange(0, LANES)
    inside, weights, biases, skips = _parameters(
        weight_ptr,
        bias_ptr,
        skip_ptr,
        k,
        d,
        channels,
        R,
        HAS_BIAS,
        HAS_SKIP,
        SCALE,
        BLOCKS,
        LANES,
        ACC,
    )
    row = s.to(tl.int64) * K + k
    # Nothing enters the first chunk, which may be all there is.
    enters = ()
    for g in tl.static_range(BLOCKS):
        enters = enters + (inside[g] & (c > 0),)
    entering_base = entering_ptr + (row * chunks + c) * (N * channels) + d
    states = _load_states(entering_base, channels, enters, N, BLOCKS, LANES, ACC)
    y_base = y_ptr + base * stride + k.to(tl.int64) * stride_y_k + d
    bases = (u_ptr + base * stride + k.to(tl.int64) * stride_u_k + d,)
    if R == 0:
        bases = bases + (delta_ptr + base * stride + k.to(tl.int64) * stride_delta_k + d,)
    if ACCUMULATE:
        bases = bases + (y_base,)
    row_base = proj_ptr + base * (K * WIDTH) + k * WIDTH + (LOW - R) // PACK
    rate_base = a_ptr + k * N * channels + d
    rates = _load_rates(rate_base, channels, inside, TURN, BLOCKS, LANES, ACC)
    carries_base = carries_ptr + d
    if SAVED > 0:
        carries_base += (row * ((length + SAVED - 1) // SAVED) + t0 // SAVED) * (N * channels)

    cursor = (position, within, tl.minimum(count, GROUP) - 1, count)
    group, cursor = _load_group(
        row_base,
        bases,
        cursor,
        path,
        stride,
        inside,
        K * WIDTH,
        MAPS,
        N,
        R,
        False,
        TURN,
        GROUP,
        BLOCKS,
        LANES,
        FULL,
        SHORT,
        PACK,
        INDEX,
    )
    next_group, cursor = _load_group(
        row_base,
        bases,
        cursor,
        path,
        stride,
        inside,
        K * WIDTH,
        MAPS,
        N,
        R,
        False,
        TURN,
        GROUP,
        BLOCKS,
        LANES,
        FULL,
        SHORT,
        PACK,
        INDEX,
    )
    for i in range(groups):
        if SAVED == GROUP:
            _store_states(carries_base, states, channels, inside, N, BLOCKS, LANES)
            carries_base += N * channels
        elif SAVED > 0:
            if (i * GROUP) % SAVED == 0:
                _store_states(carries_base, states, channels, inside, N, BLOCKS, LANES)
                carries_base += N * channels
        states, _totals, outputs = _walk_group(
            states,
            (),
            rates,
            rate_base,
            group,
            inside,
            weights,
            biases,
            skips,
            channels,
            turns,
            N,
            R,
            SOFTPLUS,
            False,
            True,
            ACCUMULATE,
            TURN,
            GROUP,
            BLOCKS,
            LANES,
            PACK,
            TYPE,
            ACC,
            FAST,
        )
        lane_last = _pick(tl.full((LANES,), group[4], tl.int32), 0, LANES)
        for j in tl.static_range(GROUP):
            for g in tl.static_range(BLOCKS):
                place = y_base + _pick(group[2], j, LANES) + g * LANES
                _write(place, outputs[j][g], lane_last >= j, inside[g], FULL)
        group = next_group
        next_group, cursor = _load_group(
            row_base,
            bases,
            cursor,
            path,
            stride,
            inside,
            K * WIDTH,
            MAPS,
            N,
            R,
            False,
            TURN,
            GROUP,
            BLOCKS,
            LANES,
            FULL,
            SHORT,
            PACK,
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
def _fold(values, COUNT: tl.constexpr, BIT: tl.constexpr, LANES: tl.constexpr):
    """Sums of COUNT values over the lanes that differ from BIT on in the bits that count them.

    Lane i has that of value i // BIT % COUNT. In a fixed order, with one exchange a value where
    sums one by one take log2(LANES).
    """
    if COUNT == 1:
        return values[0]
    else:
        return _fold(_halve(values, COUNT, BIT, LANES), COUNT // 2, 2 * BIT, LANES)


@triton.jit
def _adjoint(
    state,
    incoming,
    rate_sum,
    rate,
    factors,
    steps,
    drives,
    grads,
    through_drive,
    through_rate,
    B: tl.constexpr,
    C: tl.constexpr,
    GROUP: tl.constexpr,
    WORDS: tl.constexpr,
    PACK: tl.constexpr,
    LANES: tl.constexpr,
    TYPE: tl.constexpr,
    ACC: tl.constexpr,
):
    """Adjoint of one state over a group; B and C are its columns of the factors.

    Returns the gradient that leaves the group at its start, the sum for the gradient of A, the sums
    over channels that are those of B and C, which some lanes have yet to add (:func:`_fold`), and
    ``through_drive`` and ``through_rate`` with this state's share: B g, and log2(e) times the
    gradient of the step sizes through the decays.
    """
    state = state.to(ACC)
    entered = ()
    decays = ()
    of_c = ()
    for j in tl.static_range(GROUP):
        decay = tl.exp2(steps[j] * rate)
        entered = entered + (state,)
        decays = decays + (decay,)
        b = _element(factors, j, B, WORDS, PACK, LANES, TYPE, ACC)
        state = decay * state + drives[j] * b
        of_c = of_c + (grads[j] * state,)
    sums = ()
    drive_shares = ()
    rate_shares = ()
    for j in tl.static_range(GROUP - 1, -1, -1):
        b = _element(factors, j, B, WORDS, PACK, LANES, TYPE, ACC)
        c = _element(factors, j, C, WORDS, PACK, LANES, TYPE, ACC)
        adjoint = c * grads[j] + incoming
        incoming = decays[j] * adjoint
        through = incoming * entered[j]
        rate_sum += steps[j] * through
        drive_shares = (through_drive[j] + b * adjoint,) + drive_shares
        rate_shares = (through_rate[j] + rate * through,) + rate_shares
        sums = (adjoint * drives[j], of_c[j]) + sums
    return incoming, rate_sum, _fold(sums, 2 * GROUP, 1, LANES), drive_shares, rate_shares


@triton.jit
def _adjoint_turn(
    entered,
    incoming,
    grad_a,
    rates,
    factors,
    steps,
    drives,
    grads,
    through_drive,
    through_rate,
    grad_proj_ptr,
    cursor,
    path,
    n,
    ROW: tl.constexpr,
    FIRST: tl.constexpr,
    TURN: tl.constexpr,
    GROUP: tl.constexpr,
    WORDS: tl.constexpr,
    PACK: tl.constexpr,
    LANES: tl.constexpr,
    SHORT: tl.constexpr,
    TYPE: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
):
    """Adjoint of the states n to n + TURN - 1, whose shares of the gradients of B and C it stores.

    Returns the first four of :func:`_adjoint` but for those sums, the first two state by state.
    """
    # A state has SUMS sums, SHARED states share the lanes.
    SUMS: tl.constexpr = 2 * GROUP
    SHARED: tl.constexpr = 32 // SUMS if TURN * SUMS > 32 else TURN
    position, within, last, _remaining = cursor
    lanes = tl.arange(0, LANES)
    j = lanes % SUMS // 2
    ptr = grad_proj_ptr + _at(position, within, tl.minimum(last, j), path, SHORT).to(INDEX) * ROW
    mask = (j <= last) & (lanes < SUMS * SHARED)
    new_incoming = ()
    new_grad_a = ()
    shared = ()
    for m in tl.static_range(TURN):
        left, rate_sum, total, through_drive, through_rate = _adjoint(
            entered[m],
            incoming[m],
            grad_a[m],
            rates[m],
            factors,
            steps,
            drives,
            grads,
            through_drive,
            through_rate,
            FIRST + m,
            FIRST + TURN + m,
            GROUP,
            WORDS,
            PACK,
            LANES,
            TYPE,
            ACC,
        )
        new_incoming = new_incoming + (left,)
        new_grad_a = new_grad_a + (rate_sum,)
        shared = shared + (total,)
        if m % SHARED == SHARED - 1:
            total = _fold(shared, SHARED, SUMS, LANES)
            shared = ()
            if SUMS * SHARED < 32:
                total += tl.gather(total, lanes ^ 16, 0)
            if LANES == 64:
                total += tl.gather(total, lanes ^ 32, 0)
            tl.store(ptr + n + (m - (SHARED - 1)) + lanes // SUMS, total, mask=mask)
    return new_incoming, new_grad_a, through_drive, through_rate


@triton.jit
def _find_states(
    states,
    rates,
    rate_ptr,
    rows,
    factors,
    maps,
    inside,
    weights,
    biases,
    channels,
    turns,
    N: tl.constexpr,
    R: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    TURN: tl.constexpr,
    GROUP: tl.constexpr,
    LANES: tl.constexpr,
    PACK: tl.constexpr,
    TYPE: tl.constexpr,
    ACC: tl.constexpr,
    FAST: tl.constexpr,
):
    """The states after a whole group."""
    totals = (tl.zeros((LANES,), ACC),)
    states, _totals, _outputs = _walk_group(
        states,
        totals,
        rates,
        rate_ptr,
        (rows, factors, rows, maps, GROUP - 1),
        inside,
        weights,
        biases,
        biases,
        channels,
        turns,
        N,
        R,
        SOFTPLUS,
        False,
        False,
        False,
        TURN,
        GROUP,
        1,
        LANES,
        PACK,
        TYPE,
        ACC,
        FAST,
    )
    return states


@triton.jit(do_not_specialize=_SIZES)
def selective_scan_bwd_kernel(
    u_ptr,
    delta_ptr,
    proj_ptr,
    weight_ptr,
    bias_ptr,
    a_ptr,
    list_ptr,
    skip_ptr,
    carries_ptr,
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
    turns,
    directions,
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
    TURN: tl.constexpr,
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
    """Gradients of one chunk, or of a whole path, from its last group of positions to its first.

    ``entering_ptr`` has the gradients that enter the chunks from behind. The gradients of B and C
    are sums over this program's channels, those of A and the skip weights sums over its positions.

    The forward pass saved the states at every SAVED positions, one group or two: before the second
    group's turn, the program finds the states between from those before the first.
    """
    SCALE: tl.constexpr = _LOG2E if SOFTPLUS else 1.0
    WIDTH: tl.constexpr = (LOW + 2 * N) // PACK
    TURNS: tl.constexpr = N // TURN
    WORDS: tl.constexpr = (R + 2 if N == 1 else R) // PACK
    FACTOR_WORDS: tl.constexpr = WORDS if N == 1 else 2 * TURN // PACK
    FACTORS: tl.constexpr = (GROUP * FACTOR_WORDS + LANES - 1) // LANES
    B: tl.constexpr = R if N == 1 else 0
    RATIO: tl.constexpr = SAVED // GROUP
    # What finding states takes too is read two groups ahead, the rest one.
    EARLY: tl.constexpr = 0 if RATIO == 1 else 2 if R == 0 else 1
    MAPS: tl.constexpr = 2 + (R == 0) + ACCUMULATE
    GRADS: tl.constexpr = GROUP * (2 if R == 0 else 1)
    PARTS: tl.constexpr = GRADS + GROUP
    block, k, c, s = _program(blocks, directions, chunks)
    t0 = c * chunk
    count, groups, final = _chunk(t0, k, chunk, length, list_ptr, GROUP, LISTED)
    base, position, within, path = _path(
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
    inside, weights, biases, skips = _parameters(
        weight_ptr,
        bias_ptr,
        skip_ptr,
        k,
        d,
        channels,
        R,
        HAS_BIAS,
        HAS_SKIP,
        SCALE,
        BLOCKS,
        LANES,
        ACC,
    )
    row = s.to(tl.int64) * K + k
    k64 = k.to(tl.int64)
    grad_u_base = grad_u_ptr + base * stride + k64 * stride_y_k + d
    grad_raw_base = grad_raw_ptr + base * stride + k64 * stride_delta_k + d
    early_bases = (u_ptr + base * stride + k64 * stride_u_k + d,)
    if R == 0:
        early_bases = early_bases + (delta_ptr + base * stride + k64 * stride_delta_k + d,)
    late_bases = (grad_y_ptr + base * stride + k64 * stride_u_k + d,)
    if ACCUMULATE:
        late_bases = late_bases + (grad_u_base,)
    if EARLY == 0:
        late_bases = early_bases + late_bases
    row_base = proj_ptr + base * (K * WIDTH) + k * WIDTH + (LOW - R) // PACK
    rate_base = a_ptr + k * N * channels + d
    rates = _load_rates(rate_base, channels, inside, TURN, BLOCKS, LANES, ACC)
    # Even lanes write sums for B, odd ones for C.
    grad_proj_base = (
        grad_proj_ptr
        + ((block.to(tl.int64) * positions + base) * K + k) * (2 * N)
        + (lanes & 1) * N
    )
    carries_base = carries_ptr + row * ((length + SAVED - 1) // SAVED) * (N * channels)
    carries_base += (t0 // SAVED).to(tl.int64) * (N * channels) + d
    # One row per sequence and chunk, so that one reduction over rows finishes the sums.
    sums_row = (s.to(tl.int64) * chunks + c) * K + k

    # Nothing enters the last chunk from behind.
    incoming = _load_states(
        entering_ptr + (row * chunks + c) * (N * channels) + d,
        channels,
        (inside[0] & (c + 1 < chunks),),
        N,
        BLOCKS,
        LANES,
        ACC,
    )
    grad_a = ()
    for _ in tl.static_range(N):
        grad_a = grad_a + (tl.zeros((LANES,), ACC),)
    grad_skip = tl.zeros((LANES,), ACC)

    cursor = (position, within, count - final * GROUP - 1, groups * GROUP)
    # No two names for one value, which Triton would not take to change.
    group = _no_group()
    next_group = _no_group()
    rows, factors = _no_words(row_base, N, R, TURN, PACK, GROUP, LANES)
    next_rows, next_factors = _no_words(row_base, N, R, TURN, PACK, GROUP, LANES)
    offsets = tl.zeros((LANES,), INDEX)
    early = _no_maps(early_bases, EARLY, GROUP, BLOCKS, LANES)
    next_early = _no_maps(early_bases, EARLY, GROUP, BLOCKS, LANES)
    late = _no_maps(late_bases, MAPS - EARLY, GROUP, BLOCKS, LANES)
    saved = _no_maps((carries_base,), 1, N, BLOCKS, LANES)
    next_saved = _no_maps((carries_base,), 1, N, BLOCKS, LANES)
    # Words are read two groups ahead: the first two turns only load.
    for i in range(-2, groups):
        index = groups - 1 - i
        if i >= 0:
            maps = early + late
            lane_last = _pick(tl.full((LANES,), group[2], tl.int32), 0, LANES)
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
                dt = tl.where(lane_last >= j, dts[0], 0.0)
                u = maps[j].to(ACC)
                grad = tl.where(lane_last >= j, maps[GRADS + j].to(ACC), 0.0)
                grads = grads + (grad,)
                steps = steps + (dt,)
                slopes = slopes + (dt_slopes[0],)
                drives = drives + (dt * u,)
                through_drive = through_drive + (tl.zeros((LANES,), ACC),)
                through_rate = through_rate + (tl.zeros((LANES,), ACC),)
                grad_skip += u * grad
            entered = saved
            if RATIO > 1:
                # The dtype of saved states is that of states then.
                if index % RATIO != 0:
                    entered = _find_states(
                        saved,
                        rates,
                        rate_base,
                        next_rows,
                        next_factors,
                        next_early,
                        inside,
                        weights,
                        biases,
                        channels,
                        turns,
                        N,
                        R,
                        SOFTPLUS,
                        TURN,
                        GROUP,
                        LANES,
                        PACK,
                        TYPE,
                        ACC,
                        FAST,
                    )
            if TURNS == 1:
                incoming, grad_a, through_drive, through_rate = _adjoint_turn(
                    entered,
                    incoming,
                    grad_a,
                    rates,
                    factors,
                    steps,
                    drives,
                    grads,
                    through_drive,
                    through_rate,
                    grad_proj_base,
                    group,
                    path,
                    0,
                    K * 2 * N,
                    B,
                    TURN,
                    GROUP,
                    FACTOR_WORDS,
                    PACK,
                    LANES,
                    SHORT,
                    TYPE,
                    ACC,
                    INDEX,
                )
            else:
                own_factors = factors
                for turn in range(turns):
                    own_rates = _load_rates(
                        rate_base + turn * TURN * channels,
                        channels,
                        inside,
                        TURN,
                        BLOCKS,
                        LANES,
                        ACC,
                    )
                    new_incoming, new_grad_a, through_drive, through_rate = _adjoint_turn(
                        entered,
                        incoming,
                        grad_a,
                        own_rates,
                        own_factors,
                        steps,
                        drives,
                        grads,
                        through_drive,
                        through_rate,
                        grad_proj_base,
                        group,
                        path,
                        turn * TURN,
                        K * 2 * N,
                        B,
                        TURN,
                        GROUP,
                        FACTOR_WORDS,
                        PACK,
                        LANES,
                        SHORT,
                        TYPE,
                        ACC,
                        INDEX,
                    )
                    incoming = _turned(incoming, new_incoming, N, TURN)
                    grad_a = _turned(grad_a, new_grad_a, N, TURN)
                    entered = _turned(entered, entered, N, TURN)
                    own_factors = _turned(own_factors, own_factors, TURNS * FACTORS, FACTORS)
            for j in tl.static_range(GROUP):
                place = _pick(offsets, j, LANES)
                grad_u = skips[0] * grads[j] + steps[j] * through_drive[j]
                grad_raw = maps[j].to(ACC) * through_drive[j] + _LN2 * through_rate[j]
                if ACCUMULATE:
                    grad_u += maps[PARTS + j].to(ACC)
                _write(grad_u_base + place, grad_u, lane_last >= j, inside[0], FULL)
                _write(grad_raw_base + place, grad_raw * slopes[j], lane_last >= j, inside[0], FULL)
        group, rows, factors, early = next_group, next_rows, next_factors, next_early
        offsets = _offsets(group, path, stride, LANES, SHORT, INDEX)
        late = _load_maps(late_bases, offsets, inside, MAPS - EARLY, GROUP, BLOCKS, LANES, FULL)
        next_group = cursor
        next_rows, next_factors = _load_words(
            row_base, cursor, path, K * WIDTH, N, R, TURN, PACK, GROUP, LANES, SHORT, INDEX
        )
        next_offsets = _offsets(cursor, path, stride, LANES, SHORT, INDEX)
        next_early = _load_maps(
            early_bases, next_offsets, inside, EARLY, GROUP, BLOCKS, LANES, FULL
        )
        cursor = _next_group(cursor, path, True, GROUP, SHORT)
        if N == 1:
            saved = next_saved
            next_saved = _load_saved(carries_base, index - 2, channels, inside, N, RATIO)
        else:
            following = tl.minimum(index, groups) - 1
            saved = _load_saved(carries_base, following, channels, inside, N, RATIO)
    _store_states(
        grad_a_ptr + sums_row * (N * channels) + d, grad_a, channels, inside, N, BLOCKS, LANES
    )
    if HAS_SKIP:
        tl.store(grad_skip_ptr + sums_row * channels + d, grad_skip, mask=inside[0])


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
