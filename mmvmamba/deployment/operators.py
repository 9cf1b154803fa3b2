"""The operators of `mmvmamba_kernels` in ONNX, as functions of standard operators.

A scan along a path is two short loops. The path is cut into equal lines. All lines are scanned at
once, each from a zero state, and then their ends, from line to line, which gives the state that
enters each line. The loops have as many iterations as a map has rows and columns, not positions.

Runtimes differ in what they take. OpenVINO's loops know no values from outside, so that rates
travel as a state that does not change; and its Softplus loses digits where steps are small.

Shape letters: B batch, K directions, S sequences of a direction, L positions of a sequence, T
positions of a line, P lines of a sequence, M = S * P, D channels, R dt rank, N state dimension.
"""

# ruff: noqa: N802 (functions are named as ONNX names operators)

from collections.abc import Callable

import torch
from onnx.defs import OpSchema
from onnxscript import FLOAT, INT64, graph, opset18, script
from onnxscript import opset18 as op
from onnxscript.values import OnnxFunction, Op, Opset

import mmvmamba_kernels  # noqa: F401 (registers what is translated)
from mmvmamba.engine.errors import UsageError
from mmvmamba_kernels.backends.native.cpp_scan import path_codes
from mmvmamba_kernels.patterns import PATTERNS as ARITHMETIC

DOMAIN = Opset("mmvmamba", 1)


@script(DOMAIN, default_opset=opset18)
def StepSize(x: FLOAT[...]) -> FLOAT[...]:
    """Softplus, to the last digits of small results too.

    With w = 1 + exp(x), rounded, it is exp(x) * log(w) / (w - 1) (Kahan's logarithm of 1 + z). The
    clip keeps optimisers from adding 1 and -1 up.
    """
    z = op.Exp(op.Min(x, op.Constant(value_float=80.0)))
    one = op.Constant(value_float=1.0)
    tiny = op.Constant(value_float=1e-30)
    w = op.Max(op.Add(z, one), one)
    ratio = op.Div(op.Add(op.Log(w), tiny), op.Add(op.Sub(w, one), tiny))
    return op.Max(op.Mul(z, ratio), x)


@script(DOMAIN, default_opset=opset18)
def Lines(x: FLOAT[...], steps: INT64[1]) -> FLOAT[...]:
    """Cuts sequences into lines: (K, S, L, C) to (T, K, M, C)."""
    shape = op.Concat(
        op.Shape(x, start=0, end=1),
        op.Constant(value_ints=[-1]),
        steps,
        op.Shape(x, start=3),
        axis=0,
    )
    return op.Transpose(op.Reshape(x, shape), perm=[2, 0, 1, 3])


@script(DOMAIN, default_opset=opset18)
def CarriedStates(decays: FLOAT[...], ends: FLOAT[...]) -> FLOAT[...]:
    """The states that enter parts of a sequence, (K, S, parts, ...), from zero.

    Takes the decay over each part and the state at its end if it began from zero.
    """
    zero = op.Constant(value_float=0.0)
    first = op.Mul(op.Gather(ends, op.Constant(value_int=0), axis=2), zero)

    @graph()
    def follow(h: FLOAT[...], decay: FLOAT[...], end: FLOAT[...]):
        return op.Add(op.Mul(decay, h), end), op.Identity(h)

    _, entering = op.Scan(
        first,
        decays,
        ends,
        body=follow,
        num_scan_inputs=2,
        scan_input_axes=[2, 2],
        scan_output_axes=[2],
    )
    return entering


@script(DOMAIN, default_opset=opset18)
def EnteringStates(decay: FLOAT[...], end: FLOAT[...], lines: INT64[1]) -> FLOAT[...]:
    """The states that enter lines, of those that lines from zero end with.

    Takes the decay over each line and the state at its end, (K, M, ...), and P.
    """
    shape = op.Shape(end)
    of_sequences = op.Concat(
        op.Shape(end, start=0, end=1),
        op.Constant(value_ints=[-1]),
        lines,
        op.Shape(end, start=2),
        axis=0,
    )
    entering = CarriedStates(op.Reshape(decay, of_sequences), op.Reshape(end, of_sequences))
    return op.Reshape(entering, shape)


@script(DOMAIN, default_opset=opset18)
def ScanOfOneState(
    u: FLOAT[...],
    raw: FLOAT[...],
    A: FLOAT[...],
    B: FLOAT[...],
    C: FLOAT[...],
    steps: INT64[1],
) -> FLOAT[...]:
    """The selective scan of sequences where N = 1, in lines of `steps` positions.

    Takes u and the step sizes before softplus, (K, S, L, D); A, (K, D, 1); B and C, (K, S, L, 1).
    Gives (K, S, L, D).
    """
    raw_lines = Lines(raw, steps)
    zero = op.Mul(
        op.Gather(raw_lines, op.Constant(value_int=0), axis=0), op.Constant(value_float=0.0)
    )
    one = op.Add(zero, op.Constant(value_float=1.0))

    @graph()
    def step(
        h: FLOAT[...],
        q: FLOAT[...],
        rates: FLOAT[...],
        raw_t: FLOAT[...],
        u_t: FLOAT[...],
        B_t: FLOAT[...],
    ):
        delta = StepSize(raw_t)
        decay = op.Exp(op.Mul(delta, rates))
        since_start = op.Mul(decay, q)
        following = op.Add(op.Mul(decay, h), op.Mul(B_t, op.Mul(delta, u_t)))
        return (
            following,
            since_start,
            op.Identity(rates),
            op.Identity(following),
            op.Identity(since_start),
        )

    end, decay, _, inside, since_starts = op.Scan(
        zero,
        one,
        op.Transpose(A, perm=[0, 2, 1]),
        raw_lines,
        Lines(u, steps),
        Lines(B, steps),
        body=step,
        num_scan_inputs=3,
    )
    entering = EnteringStates(decay, end, op.Div(op.Shape(u, start=2, end=3), steps))
    states = op.Add(inside, op.Mul(since_starts, entering))
    y = op.Mul(states, Lines(C, steps))
    return op.Reshape(op.Transpose(y, perm=[1, 2, 0, 3]), op.Shape(u))


@script(DOMAIN, default_opset=opset18)
def ScanOfStates(
    u: FLOAT[...],
    raw: FLOAT[...],
    A: FLOAT[...],
    B: FLOAT[...],
    C: FLOAT[...],
    steps: INT64[1],
) -> FLOAT[...]:
    """As `ScanOfOneState`, for any N.

    All positions' states would take N times the memory of the maps: once their beginnings are
    known, the lines are scanned again, for the result alone.
    """
    after = op.Constant(value_ints=[3])
    delta_lines = op.Unsqueeze(Lines(StepSize(raw), steps), after)
    u_lines = op.Unsqueeze(Lines(u, steps), after)
    B_lines = op.Unsqueeze(Lines(B, steps), op.Constant(value_ints=[4]))
    C_lines = op.Unsqueeze(Lines(C, steps), op.Constant(value_ints=[4]))
    # Of shape (K, 1, N, D).
    A_lines = op.Unsqueeze(op.Transpose(A, perm=[0, 2, 1]), op.Constant(value_ints=[1]))
    total = op.ReduceSum(delta_lines, op.Constant(value_ints=[0]), keepdims=0)
    decay = op.Exp(op.Mul(total, A_lines))

    @graph()
    def step(
        h: FLOAT[...],
        rates: FLOAT[...],
        delta: FLOAT[...],
        u_t: FLOAT[...],
        B_t: FLOAT[...],
    ):
        decayed = op.Mul(op.Exp(op.Mul(delta, rates)), h)
        return op.Add(decayed, op.Mul(B_t, op.Mul(delta, u_t))), op.Identity(rates)

    end, _ = op.Scan(
        op.Mul(decay, op.Constant(value_float=0.0)),
        A_lines,
        delta_lines,
        u_lines,
        B_lines,
        body=step,
        num_scan_inputs=3,
    )
    entering = EnteringStates(decay, end, op.Div(op.Shape(u, start=2, end=3), steps))

    @graph()
    def step_with_result(
        h: FLOAT[...],
        rates: FLOAT[...],
        delta: FLOAT[...],
        u_t: FLOAT[...],
        B_t: FLOAT[...],
        C_t: FLOAT[...],
    ):
        decayed = op.Mul(op.Exp(op.Mul(delta, rates)), h)
        following = op.Add(decayed, op.Mul(B_t, op.Mul(delta, u_t)))
        axis = op.Constant(value_ints=[2])
        y_t = op.ReduceSum(op.Mul(C_t, following), axis, keepdims=0)
        return following, op.Identity(rates), y_t

    _, _, y = op.Scan(
        entering,
        A_lines,
        delta_lines,
        u_lines,
        B_lines,
        C_lines,
        body=step_with_result,
        num_scan_inputs=4,
    )
    return op.Reshape(op.Transpose(y, perm=[1, 2, 0, 3]), op.Shape(u))


@script(DOMAIN, default_opset=opset18)
def Projections(
    proj: FLOAT[...], dt_weight: FLOAT[...], dt_bias: FLOAT[...], A: FLOAT[...]
) -> tuple[FLOAT[...], FLOAT[...], FLOAT[...]]:
    """The step sizes before softplus, (K, S, L, D), and B and C, (K, S, L, N).

    Takes proj, (K, S, L, R + 2N); dt_weight, (K, D, R); dt_bias, (K, D); A, (K, D, N).
    """
    states = op.Shape(A, start=2)
    sizes = op.Concat(op.Shape(dt_weight, start=2), states, states, axis=0)
    low_rank, B, C = op.Split(proj, sizes, axis=3)
    weight = op.Unsqueeze(op.Transpose(dt_weight, perm=[0, 2, 1]), op.Constant(value_ints=[1]))
    bias = op.Unsqueeze(dt_bias, op.Constant(value_ints=[1, 2]))
    return op.Add(op.MatMul(low_rank, weight), bias), B, C


@script(DOMAIN, default_opset=opset18)
def Reversed(x: FLOAT[...]) -> FLOAT[...]:
    """(K, S, L, C) from the last position to the first."""
    last = op.Constant(value_ints=[-1])
    # Before the first position.
    stop = op.Constant(value_ints=[-9223372036854775807])
    return op.Slice(x, last, stop, op.Constant(value_ints=[2]), last)


@script(DOMAIN, default_opset=opset18)
def LineLength(x: FLOAT[...]) -> INT64[1]:
    """The shorter side of a map (B, H, W, D), by which any path over it can be cut."""
    return op.Min(op.Shape(x, start=1, end=2), op.Shape(x, start=2, end=3))


@script(DOMAIN, default_opset=opset18)
def RowMajor(x: FLOAT[...]) -> FLOAT[...]:
    """The rows of maps (K, B, H, W, C) as sequences, (K, B, H * W, C)."""
    shape = op.Concat(
        op.Shape(x, start=0, end=2),
        op.Constant(value_ints=[-1]),
        op.Shape(x, start=4),
        axis=0,
    )
    return op.Reshape(x, shape)


@script(DOMAIN, default_opset=opset18)
def ColumnMajor(x: FLOAT[...]) -> FLOAT[...]:
    """As `RowMajor`, the columns."""
    return RowMajor(op.Transpose(x, perm=[0, 1, 3, 2, 4]))


@script(DOMAIN, default_opset=opset18)
def CrossSequences(x: FLOAT[...], proj: FLOAT[...]) -> tuple[FLOAT[...], FLOAT[...], INT64[1]]:
    """The map, the projections and the line length along the paths of 'cross2d'.

    Takes x, (B, H, W, D); proj, (B, H, W, 4, C). Gives (4, B, L, D), (4, B, L, C) and (1,).
    """
    one_map = op.Unsqueeze(x, op.Constant(value_ints=[0]))
    u = op.Concat(RowMajor(one_map), ColumnMajor(one_map), axis=0)
    by_direction = op.Transpose(proj, perm=[3, 0, 1, 2, 4])
    rows, columns, rows_reversed, columns_reversed = op.Split(by_direction, num_outputs=4, axis=0)
    forward = op.Concat(RowMajor(rows), ColumnMajor(columns), axis=0)
    backward = op.Concat(RowMajor(rows_reversed), ColumnMajor(columns_reversed), axis=0)
    return (
        op.Concat(u, Reversed(u), axis=0),
        op.Concat(forward, Reversed(backward), axis=0),
        LineLength(x),
    )


@script(DOMAIN, default_opset=opset18)
def CrossMerge(y: FLOAT[...], x: FLOAT[...], D: FLOAT[...]) -> FLOAT[...]:
    """The sum of the directions of 'cross2d', (4, B, L, D), and the skip, (B, H, W, D)."""
    forward, backward = op.Split(y, num_outputs=2, axis=0)
    rows, columns = op.Split(op.Add(forward, Reversed(backward)), num_outputs=2, axis=0)
    turned = op.Transpose(x, perm=[0, 2, 1, 3])
    back = op.Transpose(op.Reshape(columns, op.Shape(turned)), perm=[0, 2, 1, 3])
    skip = op.Mul(x, op.ReduceSum(D, op.Constant(value_ints=[0]), keepdims=0))
    return op.Add(op.Add(op.Reshape(rows, op.Shape(x)), back), skip)


@script(DOMAIN, default_opset=opset18)
def ForwardSequences(x: FLOAT[...], proj: FLOAT[...]) -> tuple[FLOAT[...], FLOAT[...], INT64[1]]:
    """As `CrossSequences`, of 'unidi'."""
    u = RowMajor(op.Unsqueeze(x, op.Constant(value_ints=[0])))
    by_direction = op.Transpose(proj, perm=[3, 0, 1, 2, 4])
    return op.Concat(u, u, u, u, axis=0), RowMajor(by_direction), LineLength(x)


@script(DOMAIN, default_opset=opset18)
def ForwardMerge(y: FLOAT[...], x: FLOAT[...], D: FLOAT[...]) -> FLOAT[...]:
    """As `CrossMerge`, of 'unidi'."""
    first = op.Constant(value_ints=[0])
    skip = op.Mul(x, op.ReduceSum(D, first, keepdims=0))
    return op.Add(op.Reshape(op.ReduceSum(y, first, keepdims=0), op.Shape(x)), skip)


@script(DOMAIN, default_opset=opset18)
def BothSequences(x: FLOAT[...], proj: FLOAT[...]) -> tuple[FLOAT[...], FLOAT[...], INT64[1]]:
    """As `CrossSequences`, of 'bidi'."""
    u = RowMajor(op.Unsqueeze(x, op.Constant(value_ints=[0])))
    by_direction = op.Transpose(proj, perm=[3, 0, 1, 2, 4])
    forward, backward = op.Split(RowMajor(by_direction), num_outputs=2, axis=0)
    back = Reversed(u)
    return (
        op.Concat(u, u, back, back, axis=0),
        op.Concat(forward, Reversed(backward), axis=0),
        LineLength(x),
    )


@script(DOMAIN, default_opset=opset18)
def BothMerge(y: FLOAT[...], x: FLOAT[...], D: FLOAT[...]) -> FLOAT[...]:
    """As `CrossMerge`, of 'bidi'."""
    forward, backward = op.Split(y, num_outputs=2, axis=0)
    return ForwardMerge(op.Add(forward, Reversed(backward)), x, D)


PATTERNS: dict[str, tuple[OnnxFunction, OnnxFunction]] = {
    "cross2d": (CrossSequences, CrossMerge),
    "unidi": (ForwardSequences, ForwardMerge),
    "bidi": (BothSequences, BothMerge),
}
"""By scan pattern, what makes sequences of a map and what makes a map of their results."""


def _scan_of(A: FLOAT[...]) -> OnnxFunction:
    return ScanOfOneState if A.shape[-1] == 1 else ScanOfStates


def _call(function: OnnxFunction, *inputs):
    """Writes a call of a function that the exporter is not told of.

    It converts the version of what it wrote, for which it would write out every function at each of
    its places.
    """
    parts = (function.function_ir.inputs, function.function_ir.outputs)
    kinds = ["tensor(float)", "tensor(int64)"]
    given, results = (
        [OpSchema.FormalParameter(value.name, f"T{role}{i}") for i, value in enumerate(values)]
        for role, values in enumerate(parts)
    )
    names = [parameter.type_str for parameter in (*given, *results)]
    schema = OpSchema(
        function.name,
        DOMAIN.domain,
        DOMAIN.version,
        inputs=given,
        outputs=results,
        type_constraints=[(name, kinds, "") for name in names],
    )
    return Op(DOMAIN, function.name, schema)(*inputs)


def _check_scan(paths: INT64[...] | None, pattern: str) -> None:
    if paths is not None:
        raise UsageError("a scan along paths that are given as a tensor cannot be exported.")
    if pattern not in PATTERNS:
        raise UsageError(
            f"scan pattern {pattern!r} cannot be exported; {', '.join(PATTERNS)} and cascade2d can."
        )


_SCAN_INPUTS = ("x", "proj", "dt_weight", "dt_bias", "A", "D")
_SCAN_SCHEMA = OpSchema(
    "SelectiveScan2d",
    DOMAIN.domain,
    DOMAIN.version,
    inputs=[OpSchema.FormalParameter(name, "tensor(float)") for name in _SCAN_INPUTS],
    outputs=[OpSchema.FormalParameter("y", "tensor(float)")],
    attributes=[OpSchema.Attribute("paths", OpSchema.AttrType.INTS, required=True)],
)


def custom_selective_scan_2d(
    x: FLOAT[...],
    proj: FLOAT[...],
    dt_weight: FLOAT[...],
    dt_bias: FLOAT[...],
    A: FLOAT[...],
    D: FLOAT[...],
    paths: INT64[...] | None,
    pattern: str,
    backend: str,
    save_carries: bool,
):
    """Translates the operator of that name to one of ONNX Runtime's, of our library."""
    del backend, save_carries
    _check_scan(paths, pattern)
    codes = path_codes(ARITHMETIC[pattern])
    scan = Op(DOMAIN, _SCAN_SCHEMA.name, _SCAN_SCHEMA)
    return scan(x, proj, dt_weight, dt_bias, A, D, paths=codes), _nothing()


def selective_scan_2d(
    x: FLOAT[...],
    proj: FLOAT[...],
    dt_weight: FLOAT[...],
    dt_bias: FLOAT[...],
    A: FLOAT[...],
    D: FLOAT[...],
    paths: INT64[...] | None,
    pattern: str,
    backend: str,
    save_carries: bool,
):
    """Translates the operator of that name."""
    del backend, save_carries
    _check_scan(paths, pattern)
    sequences, merge = PATTERNS[pattern]
    u, of_paths, steps = _call(sequences, x, proj)
    raw, B, C = _call(Projections, of_paths, dt_weight, dt_bias, A)
    return _call(merge, _call(_scan_of(A), u, raw, A, B, C, steps), x, D), _nothing()


@script(DOMAIN, default_opset=opset18)
def GroupedSequences(
    u: FLOAT[...],
    delta: FLOAT[...],
    A: FLOAT[...],
    B: FLOAT[...],
    C: FLOAT[...],
    delta_bias: FLOAT[...],
) -> tuple[FLOAT[...], FLOAT[...], FLOAT[...], FLOAT[...], FLOAT[...], INT64[1]]:
    """What `ScanOfStates` takes, of what `mmvmamba_kernels.selective_scan` takes."""
    groups = op.Shape(B, start=1, end=2)
    rest = op.Constant(value_ints=[-1])
    grouped = op.Concat(op.Shape(u, start=0, end=1), groups, rest, op.Shape(u, start=2), axis=0)
    bias = op.Unsqueeze(delta_bias, op.Constant(value_ints=[1]))
    rates = op.Reshape(A, op.Concat(groups, rest, op.Shape(A, start=1), axis=0))
    return (
        op.Transpose(op.Reshape(u, grouped), perm=[1, 0, 3, 2]),
        op.Transpose(op.Reshape(op.Add(delta, bias), grouped), perm=[1, 0, 3, 2]),
        rates,
        op.Transpose(B, perm=[1, 0, 3, 2]),
        op.Transpose(C, perm=[1, 0, 3, 2]),
        op.Shape(u, start=2),
    )


@script(DOMAIN, default_opset=opset18)
def GroupedMerge(y: FLOAT[...], u: FLOAT[...], D: FLOAT[...]) -> FLOAT[...]:
    """The result of `mmvmamba_kernels.selective_scan`, with its skip."""
    skip = op.Mul(u, op.Unsqueeze(D, op.Constant(value_ints=[1])))
    return op.Add(op.Reshape(op.Transpose(y, perm=[1, 0, 3, 2]), op.Shape(u)), skip)


def selective_scan(
    u: FLOAT[...],
    delta: FLOAT[...],
    A: FLOAT[...],
    B: FLOAT[...],
    C: FLOAT[...],
    D: FLOAT[...] | None,
    delta_bias: FLOAT[...] | None,
    delta_softplus: bool,
    out_dtype: int,
    backend: str,
    save_carries: bool,
):
    """Translates the operator of that name, as the models call it."""
    del out_dtype, backend, save_carries
    if D is None or delta_bias is None or not delta_softplus:
        raise UsageError(
            "a selective_scan without D, delta_bias or delta_softplus cannot be exported."
        )
    parts = _call(GroupedSequences, u, delta, A, B, C, delta_bias)
    return _call(GroupedMerge, _call(_scan_of(A), *parts), u, D), _nothing()


@script(DOMAIN, default_opset=opset18)
def Chunks(x: FLOAT[...], size: INT64[1], count: INT64[1]) -> FLOAT[...]:
    """(B, K, L, C) with zeros behind the end, in chunks: (B, K, count, size, C)."""
    padding = op.Sub(op.Mul(size, count), op.Shape(x, start=2, end=3))
    zero = op.Constant(value_ints=[0])
    # What stands before and behind each of the axes.
    before = op.Constant(value_ints=[0, 0, 0, 0, 0, 0])
    padded = op.Pad(x, op.Concat(before, padding, zero, axis=0))
    shape = op.Concat(op.Shape(x, start=0, end=2), count, size, op.Shape(x, start=3), axis=0)
    return op.Reshape(padded, shape)


@script(DOMAIN, default_opset=opset18)
def StateSpaceDual(
    x: FLOAT[...],
    dt: FLOAT[...],
    A: FLOAT[...],
    B: FLOAT[...],
    C: FLOAT[...],
    D: FLOAT[...],
    dt_bias: FLOAT[...],
    most: INT64[1],
) -> FLOAT[...]:
    """`mmvmamba_kernels.state_space_dual`, in chunks of at most so many positions.

    As its reference: products within chunks, and a loop from chunk to chunk.
    """
    one = op.Constant(value_ints=[1])
    last = op.Constant(value_ints=[-1])
    length = op.Shape(x, start=2, end=3)
    count = op.Div(op.Sub(op.Add(length, most), one), most)
    size = op.Div(op.Sub(op.Add(length, count), one), count)
    heads_and_width = op.Shape(x, start=3)
    flat = op.Reshape(x, op.Concat(op.Shape(x, start=0, end=3), last, axis=0))

    steps = Chunks(StepSize(op.Add(dt, op.Unsqueeze(dt_bias, one))), size, count)
    # Of shape (B, K, c, heads, T, 1).
    steps = op.Unsqueeze(op.Transpose(steps, perm=[0, 1, 2, 4, 3]), last)
    rates = op.Unsqueeze(A, op.Constant(value_ints=[1, 3, 4]))
    # From (B, K, c, T, heads, P) to (B, K, c, heads, T, P).
    chunked = op.Concat(op.Shape(x, start=0, end=2), count, size, heads_and_width, axis=0)
    x_heads = op.Reshape(Chunks(flat, size, count), chunked)
    x_heads = op.Transpose(x_heads, perm=[0, 1, 2, 4, 3, 5])
    drive = op.Mul(x_heads, steps)
    # Of shape (B, K, c, 1, T, N).
    B_chunks = op.Unsqueeze(Chunks(B, size, count), op.Constant(value_ints=[3]))
    C_chunks = op.Unsqueeze(Chunks(C, size, count), op.Constant(value_ints=[3]))

    # Row t, column s: the decay from s to t is the sum over what lies between, never a difference.
    exponents = op.Mul(steps, rates)
    square = op.Concat(op.Shape(exponents, start=0, end=5), size, axis=0)
    below = op.Trilu(op.Expand(exponents, square), op.Constant(value_int=-1), upper=0)
    sums = op.CumSum(below, op.Constant(value_int=4))
    between = op.Trilu(op.Exp(sums), upper=0)
    since_start = op.Exp(op.CumSum(exponents, op.Constant(value_int=4)))

    products = op.MatMul(C_chunks, op.Transpose(B_chunks, perm=[0, 1, 2, 3, 5, 4]))
    inside = op.MatMul(op.Mul(products, between), drive)

    # The decay to the end of a chunk is its last row, (B, K, c, heads, T, 1).
    rows = op.Constant(value_ints=[4])
    stop = op.Constant(value_ints=[9223372036854775807])
    until_end = op.Transpose(op.Slice(between, last, stop, rows), perm=[0, 1, 2, 3, 5, 4])
    ends = op.MatMul(op.Transpose(op.Mul(drive, until_end), perm=[0, 1, 2, 3, 5, 4]), B_chunks)
    decays = op.Slice(since_start, last, stop, rows)
    entering = CarriedStates(decays, ends)
    carried = op.MatMul(C_chunks, op.Transpose(entering, perm=[0, 1, 2, 3, 5, 4]))
    y = op.Add(inside, op.Mul(carried, since_start))
    y = op.Transpose(y, perm=[0, 1, 2, 4, 3, 5])
    joined = op.Concat(op.Shape(x, start=0, end=2), last, heads_and_width, axis=0)
    y = op.Slice(
        op.Reshape(y, joined), op.Constant(value_ints=[0]), length, op.Constant(value_ints=[2])
    )
    return op.Add(y, op.Mul(x, op.Unsqueeze(D, one)))


def state_space_dual(
    x: FLOAT[...],
    dt: FLOAT[...],
    A: FLOAT[...],
    B: FLOAT[...],
    C: FLOAT[...],
    D: FLOAT[...] | None,
    dt_bias: FLOAT[...] | None,
    chunk_size: int,
    backend: str,
    save_carries: bool,
):
    """Translates the operator of that name, as the models call it."""
    del backend, save_carries
    if D is None or dt_bias is None:
        raise UsageError("a state_space_dual without D or dt_bias cannot be exported.")
    most = op.Constant(value_ints=[chunk_size])
    return _call(StateSpaceDual, x, dt, A, B, C, D, dt_bias, most), _nothing()


def _nothing() -> FLOAT[...]:
    """What a forward pass saves where no backward pass follows."""
    return op.Constant(value_floats=[0.0])


def translations(custom: bool) -> dict[Callable, Callable]:
    """By operator of PyTorch, what `torch.onnx.export` is to write for it.

    Args:
        custom: Whether 2D scans are to be operators of our library for ONNX Runtime.
    """
    names = torch.ops.mmvmamba
    return {
        names.selective_scan_2d.default: custom_selective_scan_2d if custom else selective_scan_2d,
        names.selective_scan.default: selective_scan,
        names.state_space_dual.default: state_space_dual,
    }


def functions() -> list[OnnxFunction]:
    """Every function that a translation may call, directly or not."""
    return [value for value in globals().values() if isinstance(value, OnnxFunction)]
