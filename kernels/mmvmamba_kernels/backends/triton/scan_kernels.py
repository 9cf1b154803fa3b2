"""Device code of the selective scan; :mod:`mmvmamba_kernels.backends.triton.scan` launches it."""

# ruff: noqa: RET505, RUF005, SIM102 - a constexpr branch must stay one, and Triton has no unpacking

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
)

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _log2(x, FAST_LOG: tl.constexpr):
    # Triton's own log2 is twenty instructions and a branch; the argument here is never subnormal.
    if FAST_LOG:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.log2(x)


@triton.jit
def _softplus(z, SOFTPLUS: tl.constexpr, ACC: tl.constexpr, FAST_LOG: tl.constexpr):
    """softplus(z) and its derivative; z itself and 1 beyond 20, or everywhere without SOFTPLUS."""
    if SOFTPLUS:
        e = tl.exp2(z * _LOG2E)
        w = 1.0 + e
        if tl.float64 == ACC:
            # The rounding error of 1 + e cancels in the quotient.
            rounded = w - 1.0
            value = tl.where(
                rounded == 0.0, e, tl.log(w) * (e / tl.where(rounded == 0.0, 1.0, rounded))
            )
        else:
            # Below 1/32 the logarithm of 1 + e loses digits; four terms of its series suffice.
            series = e * (1.0 - e * (0.5 - e * (0.3333333333333333 - e * 0.25)))
            value = tl.where(e < 0.03125, series, _LN2 * _log2(w, FAST_LOG))
        linear = z > 20.0
        return tl.where(linear, z, value), tl.where(linear, 1.0, e / w)
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
def _sequence(s, k, height, width, lines, length, COLUMN: tl.constexpr):
    """First position of a sequence, positions of a run of its path, and the step within a run."""
    column = ((COLUMN >> k) & 1) == 1
    base = (s // lines).to(tl.int64) * height * width + (s % lines) * tl.where(column, 1, width)
    return base, tl.where(column, height, length), tl.where(column, width, 1)


@triton.jit
def _start(t, k, run, step, length, REVERSE: tl.constexpr, BACKWARDS: tl.constexpr):
    """Where step t of a path is, and how to walk on from there without divisions.

    Returns the position from the start of the sequence, its number within its run, and the
    distances to the next position and to the next run.
    """
    reverse = ((REVERSE >> k) & 1) == 1
    index = tl.where(reverse, length - 1 - t, t)
    within = index % run
    pos = index // run + within * step
    down = reverse != BACKWARDS
    sign = tl.where(down, -1, 1)
    return pos, tl.where(down, run - 1 - within, within), sign * step, sign * (1 - (run - 1) * step)


@triton.jit
def _advance(pos, q, run, step, jump, more):
    """The next position; at the end of the walk the same one, so that loads stay in the map."""
    wrap = q + 1 == run
    ahead = pos + tl.where(wrap, jump, step)
    return tl.where(more, ahead, pos), tl.where(wrap, 0, q + 1)


@triton.jit
def _direction(
    weight_ptr,
    bias_ptr,
    k,
    d,
    inside,
    channels,
    R: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACC: tl.constexpr,
):
    """The rows of dt_weight and dt_bias that belong to these channels."""
    weights = ()
    for r in tl.static_range(R):
        w = tl.load(weight_ptr + (k * channels + d) * R + r, mask=inside, other=0.0)
        weights = weights + (w.to(ACC),)
    bias = tl.zeros(d.shape, ACC)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + k * channels + d, mask=inside, other=0.0).to(ACC)
    return weights, bias


@triton.jit
def _raw_step(delta_row, proj_row, weights, bias, d, inside, R: tl.constexpr, ACC: tl.constexpr):
    """A position's step sizes before softplus: recomputed from the low rank, or read if R is 0."""
    z = bias
    if R == 0:
        z += tl.load(delta_row + d, mask=inside, other=0.0).to(ACC)
    for r in tl.static_range(R):
        z += tl.load(proj_row + r).to(ACC) * weights[r]
    return z


@triton.jit(do_not_specialize=_SIZES)
def selective_scan_state_kernel(
    u_ptr,
    delta_ptr,
    proj_ptr,
    weight_ptr,
    bias_ptr,
    a_ptr,
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
    stride_u,
    stride_u_k,
    stride_delta,
    stride_delta_k,
    K: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
    LOW: tl.constexpr,
    COLUMN: tl.constexpr,
    REVERSE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    BACKWARDS: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    FAST_LOG: tl.constexpr,
):
    """Sum of the step sizes and end state of every chunk that starts from zero.

    Forwards, the recurrence is h = a h + dt B u. Backwards, ``u_ptr`` is the gradient of the output
    and the recurrence is that of the gradient that leaves a position for the one before it:
    s = a (s + C dy).
    """
    block, k, c, s = _program(blocks, K, 0, chunks)
    base, run, step = _sequence(s, k, height, width, lines, length, COLUMN)
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = d < channels
    weights, bias = _direction(weight_ptr, bias_ptr, k, d, inside, channels, R, HAS_BIAS, ACC)
    rates = ()
    states = ()
    for n in tl.static_range(N):
        a = tl.load(a_ptr + (k * channels + d) * N + n, mask=inside, other=0.0).to(ACC)
        rates = rates + (a * _LOG2E,)
        states = states + (tl.zeros((BLOCK_D,), ACC),)
    total = tl.zeros((BLOCK_D,), ACC)

    WIDTH: tl.constexpr = LOW + 2 * N
    FACTOR: tl.constexpr = LOW + (N if BACKWARDS else 0)
    u_base = u_ptr + base * stride_u + k.to(tl.int64) * stride_u_k
    delta_base = delta_ptr + base * stride_delta + k.to(tl.int64) * stride_delta_k
    proj_base = proj_ptr + base * (K * WIDTH) + k * WIDTH
    t0 = c * chunk
    count = tl.minimum(chunk, length - t0)
    pos, q, step, jump = _start(
        t0 + (count - 1 if BACKWARDS else 0), k, run, step, length, REVERSE, BACKWARDS
    )
    for t in range(0, count, UNROLL):
        us = ()
        steps = ()
        rows = ()
        for j in tl.static_range(UNROLL):
            at = pos.to(INDEX)
            row = proj_base + at * (K * WIDTH)
            u = tl.load(u_base + at * stride_u + d, mask=inside, other=0.0).to(ACC)
            z = _raw_step(delta_base + at * stride_delta, row, weights, bias, d, inside, R, ACC)
            dt, _ = _softplus(z, SOFTPLUS, ACC, FAST_LOG)
            exists = t + j < count
            dt = tl.where(exists, dt, 0.0)
            us = us + (tl.where(exists, u, 0.0) if BACKWARDS else dt * u,)
            steps = steps + (dt,)
            rows = rows + (row,)
            total += dt
            pos, q = _advance(pos, q, run, step, jump, t + j + 1 < count)
        for j in tl.static_range(UNROLL):
            following = ()
            for n in tl.static_range(N):
                drive = us[j] * tl.load(rows[j] + FACTOR + n).to(ACC)
                decay = tl.exp2(steps[j] * rates[n])
                if BACKWARDS:
                    following = following + (decay * (states[n] + drive),)
                else:
                    following = following + (decay * states[n] + drive,)
            states = following
    chunk_row = ((s.to(tl.int64) * K + k) * chunks + c) * channels
    tl.store(total_ptr + chunk_row + d, total, mask=inside)
    for n in tl.static_range(N):
        tl.store(end_ptr + chunk_row * N + n * channels + d, states[n], mask=inside)


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


@triton.jit(do_not_specialize=_SIZES)
def selective_scan_fwd_kernel(
    u_ptr,
    delta_ptr,
    proj_ptr,
    weight_ptr,
    bias_ptr,
    a_ptr,
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
    stride_u,
    stride_u_k,
    stride_delta,
    stride_delta_k,
    stride_y,
    stride_y_k,
    K: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
    LOW: tl.constexpr,
    COLUMN: tl.constexpr,
    REVERSE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    ENTER: tl.constexpr,
    SAVE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    OUTPUT: tl.constexpr,
    SAVED: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    FAST_LOG: tl.constexpr,
):
    """Outputs of one chunk or a whole path, of the directions ``first`` to ``first + wave - 1``.

    Direction ``first + i`` writes buffer i of y, or adds to it. Without OUTPUT the kernel leaves
    nothing but the states at every SAVED positions.
    """
    block, k, c, s = _program(blocks, wave, first, chunks)
    base, run, step = _sequence(s, k, height, width, lines, length, COLUMN)
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = d < channels
    weights, bias = _direction(weight_ptr, bias_ptr, k, d, inside, channels, R, HAS_BIAS, ACC)
    skip = tl.zeros((BLOCK_D,), ACC)
    if HAS_SKIP:
        skip = tl.load(skip_ptr + k * channels + d, mask=inside, other=0.0).to(ACC)
    path = s.to(tl.int64) * K + k
    rates = ()
    states = ()
    for n in tl.static_range(N):
        a = tl.load(a_ptr + (k * channels + d) * N + n, mask=inside, other=0.0).to(ACC)
        rates = rates + (a * _LOG2E,)
        if ENTER:
            row = entering_ptr + ((path * chunks + c) * N + n) * channels
            states = states + (tl.load(row + d, mask=inside, other=0.0),)
        else:
            states = states + (tl.zeros((BLOCK_D,), ACC),)

    WIDTH: tl.constexpr = LOW + 2 * N
    u_base = u_ptr + base * stride_u + k.to(tl.int64) * stride_u_k
    delta_base = delta_ptr + base * stride_delta + k.to(tl.int64) * stride_delta_k
    proj_base = proj_ptr + base * (K * WIDTH) + k * WIDTH
    y_base = y_ptr + base * stride_y + (k - first).to(tl.int64) * stride_y_k
    carries_base = carries_ptr + path * ((length + SAVED - 1) // SAVED) * N * channels
    t0 = c * chunk
    t1 = tl.minimum(t0 + chunk, length)
    pos, q, step, jump = _start(t0, k, run, step, length, REVERSE, False)
    for t in range(t0, t1, UNROLL):
        if SAVE:
            if t % SAVED == 0:
                saved = carries_base + tl.cast(t // SAVED, tl.int64) * (N * channels)
                for n in tl.static_range(N):
                    tl.store(saved + n * channels + d, states[n], mask=inside)
        # All loads come before all stores: a compiler that cannot tell that they never meet would
        # keep their order, and every position would wait for the memory.
        us = ()
        steps = ()
        offsets = ()
        sums = ()
        for j in tl.static_range(UNROLL):
            at = pos.to(INDEX)
            u = tl.load(u_base + at * stride_u + d, mask=inside, other=0.0).to(ACC)
            z = _raw_step(
                delta_base + at * stride_delta,
                proj_base + at * (K * WIDTH),
                weights,
                bias,
                d,
                inside,
                R,
                ACC,
            )
            dt, _ = _softplus(z, SOFTPLUS, ACC, FAST_LOG)
            us = us + (u,)
            steps = steps + (tl.where(t + j < t1, dt, 0.0),)
            offsets = offsets + (at,)
            y = skip * u
            if ACCUMULATE:
                y += tl.load(y_base + at * stride_y + d, mask=inside, other=0.0).to(ACC)
            sums = sums + (y,)
            pos, q = _advance(pos, q, run, step, jump, t + j + 1 < t1)
        outputs = ()
        for j in tl.static_range(UNROLL):
            weights_row = proj_base + offsets[j] * (K * WIDTH) + LOW
            drive = steps[j] * us[j]
            y = sums[j]
            following = ()
            for n in tl.static_range(N):
                b = tl.load(weights_row + n).to(ACC)
                state = tl.exp2(steps[j] * rates[n]) * states[n] + drive * b
                if OUTPUT:
                    y += state * tl.load(weights_row + N + n).to(ACC)
                following = following + (state,)
            states = following
            outputs = outputs + (y,)
        if OUTPUT:
            for j in tl.static_range(UNROLL):
                tl.store(
                    y_base + offsets[j] * stride_y + d,
                    outputs[j].to(y_ptr.dtype.element_ty),
                    mask=inside & (t + j < t1),
                )


@triton.jit
def _interval_backward(
    proj_base,
    grad_base,
    offsets,
    us,
    grads,
    steps,
    through_drive,
    through_rate,
    state,
    incoming,
    rate,
    n,
    count,
    N: tl.constexpr,
    LOW: tl.constexpr,
    STRIDE: tl.constexpr,
    STRIDE_GRAD: tl.constexpr,
    INTERVAL: tl.constexpr,
    ACC: tl.constexpr,
):
    """Adjoint of one state over one interval.

    Writes the sums over the block's channels that make up the gradients of B and C. Returns the
    gradient that leaves the interval at its start, the sum for the gradient of A, and
    ``through_drive`` and ``through_rate`` with this state's share added: B g and the gradient of
    the step sizes through the decays, at every position.
    """
    before = ()
    decays = ()
    for j in tl.static_range(INTERVAL):
        before = before + (state,)
        decay = tl.exp2(steps[j] * (rate * _LOG2E))
        decays = decays + (decay,)
        b = tl.load(proj_base + offsets[j] * STRIDE + LOW + n).to(ACC)
        state = decay * state + steps[j] * us[j] * b
        tl.store(
            grad_base + offsets[j] * STRIDE_GRAD + N + n,
            tl.sum(grads[j] * state, 0),
            mask=j < count,
        )
    rate_sum = tl.zeros(rate.shape, ACC)
    drive_shares = ()
    rate_shares = ()
    for j in tl.static_range(INTERVAL - 1, -1, -1):
        row = proj_base + offsets[j] * STRIDE + LOW + n
        adjoint = tl.load(row + N).to(ACC) * grads[j] + incoming
        incoming = decays[j] * adjoint
        through = incoming * before[j]
        rate_sum += steps[j] * through
        rate_shares = (through_rate[j] + rate * through,) + rate_shares
        drive_shares = (through_drive[j] + tl.load(row).to(ACC) * adjoint,) + drive_shares
        tl.store(
            grad_base + offsets[j] * STRIDE_GRAD + n,
            tl.sum(adjoint * (steps[j] * us[j]), 0),
            mask=j < count,
        )
    return incoming, rate_sum, drive_shares, rate_shares


@triton.jit(do_not_specialize=_SIZES)
def selective_scan_bwd_kernel(
    u_ptr,
    delta_ptr,
    proj_ptr,
    weight_ptr,
    bias_ptr,
    a_ptr,
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
    first,
    wave,
    stride_u,
    stride_u_k,
    stride_delta,
    stride_delta_k,
    stride_y,
    stride_y_k,
    K: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
    LOW: tl.constexpr,
    COLUMN: tl.constexpr,
    REVERSE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    INTERVAL: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    FAST_LOG: tl.constexpr,
):
    """Gradients of one chunk, or of a whole path, from its last interval to its first.

    ``entering_ptr`` has the gradients that enter the chunks from behind, and with more than one
    state is where they are kept between intervals. The gradients of B and C are sums over this
    program's channels, those of A and the skip weights sums over its positions.
    """
    block, k, c, s = _program(blocks, wave, first, chunks)
    base, run, step = _sequence(s, k, height, width, lines, length, COLUMN)
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = d < channels
    weights, bias = _direction(weight_ptr, bias_ptr, k, d, inside, channels, R, HAS_BIAS, ACC)
    skip = tl.zeros((BLOCK_D,), ACC)
    if HAS_SKIP:
        skip = tl.load(skip_ptr + k * channels + d, mask=inside, other=0.0).to(ACC)

    WIDTH: tl.constexpr = LOW + 2 * N
    path = s.to(tl.int64) * K + k
    k64 = k.to(tl.int64)
    u_base = u_ptr + base * stride_u + k64 * stride_u_k
    grad_y_base = grad_y_ptr + base * stride_u + k64 * stride_u_k
    delta_base = delta_ptr + base * stride_delta + k64 * stride_delta_k
    grad_raw_base = grad_raw_ptr + base * stride_delta + k64 * stride_delta_k
    proj_base = proj_ptr + base * (K * WIDTH) + k * WIDTH
    grad_proj_base = grad_proj_ptr + ((block.to(tl.int64) * positions + base) * K + k) * (2 * N)
    grad_u_base = grad_u_ptr + base * stride_y + (k64 - first) * stride_y_k
    carries_base = carries_ptr + path * ((length + INTERVAL - 1) // INTERVAL) * N * channels
    entering_base = entering_ptr + (path * chunks + c) * N * channels
    # One row per sequence and chunk, so that one reduction over rows finishes the sums.
    sums = (s.to(tl.int64) * chunks + c) * K + k
    grad_a_base = grad_a_ptr + sums * N * channels

    rate = tl.zeros((BLOCK_D,), ACC)
    incoming = tl.zeros((BLOCK_D,), ACC)
    grad_a = tl.zeros((BLOCK_D,), ACC)
    grad_skip = tl.zeros((BLOCK_D,), ACC)
    if N == 1:
        rate = tl.load(a_ptr + k * channels + d, mask=inside, other=0.0).to(ACC)
        incoming = tl.load(entering_base + d, mask=inside, other=0.0)

    t0 = c * chunk
    t1 = tl.minimum(t0 + chunk, length)
    intervals = (t1 - t0 + INTERVAL - 1) // INTERVAL
    for i in range(intervals):
        t = t0 + (intervals - 1 - i) * INTERVAL
        pos, q, stride, jump = _start(t, k, run, step, length, REVERSE, False)
        us = ()
        grads = ()
        steps = ()
        slopes = ()
        offsets = ()
        through_drive = ()
        through_rate = ()
        for j in tl.static_range(INTERVAL):
            at = pos.to(INDEX)
            exists = t + j < t1
            u = tl.load(u_base + at * stride_u + d, mask=inside, other=0.0).to(ACC)
            grad = tl.load(grad_y_base + at * stride_u + d, mask=inside & exists, other=0.0).to(ACC)
            z = _raw_step(
                delta_base + at * stride_delta,
                proj_base + at * (K * WIDTH),
                weights,
                bias,
                d,
                inside,
                R,
                ACC,
            )
            dt, slope = _softplus(z, SOFTPLUS, ACC, FAST_LOG)
            us = us + (u,)
            grads = grads + (grad,)
            steps = steps + (tl.where(exists, dt, 0.0),)
            slopes = slopes + (slope,)
            offsets = offsets + (at,)
            through_drive = through_drive + (tl.zeros((BLOCK_D,), ACC),)
            through_rate = through_rate + (tl.zeros((BLOCK_D,), ACC),)
            grad_skip += u * grad
            pos, q = _advance(pos, q, run, stride, jump, t + j + 1 < t1)
        carries_row = carries_base + tl.cast(t // INTERVAL, tl.int64) * (N * channels)
        if N == 1:
            state = tl.load(carries_row + d, mask=inside, other=0.0)
            incoming, share, through_drive, through_rate = _interval_backward(
                proj_base,
                grad_proj_base,
                offsets,
                us,
                grads,
                steps,
                through_drive,
                through_rate,
                state,
                incoming,
                rate,
                0,
                t1 - t,
                N,
                LOW,
                K * WIDTH,
                K * 2 * N,
                INTERVAL,
                ACC,
            )
            grad_a += share
        else:
            for n in range(N):
                row = n * channels + d
                state = tl.load(carries_row + row, mask=inside, other=0.0)
                rate_n = tl.load(a_ptr + (k * channels + d) * N + n, mask=inside, other=0.0).to(ACC)
                incoming_n = tl.load(entering_base + row, mask=inside, other=0.0)
                grad_n = tl.load(grad_a_base + row, mask=inside, other=0.0)
                incoming_n, share, through_drive, through_rate = _interval_backward(
                    proj_base,
                    grad_proj_base,
                    offsets,
                    us,
                    grads,
                    steps,
                    through_drive,
                    through_rate,
                    state,
                    incoming_n,
                    rate_n,
                    n,
                    t1 - t,
                    N,
                    LOW,
                    K * WIDTH,
                    K * 2 * N,
                    INTERVAL,
                    ACC,
                )
                tl.store(entering_base + row, incoming_n, mask=inside)
                tl.store(grad_a_base + row, grad_n + share, mask=inside)
        for j in tl.static_range(INTERVAL):
            mask = inside & (t + j < t1)
            grad_u = skip * grads[j] + steps[j] * through_drive[j]
            if ACCUMULATE:
                grad_u += tl.load(grad_u_base + offsets[j] * stride_y + d, mask=mask, other=0.0).to(
                    ACC
                )
            grad_raw = (us[j] * through_drive[j] + through_rate[j]) * slopes[j]
            tl.store(
                grad_u_base + offsets[j] * stride_y + d,
                grad_u.to(grad_u_ptr.dtype.element_ty),
                mask=mask,
            )
            tl.store(
                grad_raw_base + offsets[j] * stride_delta + d,
                grad_raw.to(grad_raw_ptr.dtype.element_ty),
                mask=mask,
            )
    if N == 1:
        tl.store(grad_a_base + d, grad_a, mask=inside)
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
