"""The reference 2D selective scan against a float64 loop, and its own symmetries."""

import functools

import comparison
import hypothesis
import hypothesis.strategies as st
import pytest
import torch

import mmvmamba_kernels
from mmvmamba_kernels.backends.reference import chunked_scan
from mmvmamba_kernels.patterns import PATTERNS
from mmvmamba_kernels.testing import (
    errors,
    output_and_gradients,
    relative_error,
    selective_scan_2d_arguments,
    selective_scan_2d_oracle,
)

selective_scan = functools.partial(mmvmamba_kernels.selective_scan, backend="reference")
selective_scan_2d = functools.partial(mmvmamba_kernels.selective_scan_2d, backend="reference")

# float64 sums of a few thousand terms of mixed sign: a few hundred roundings of 1.1e-16.
TOLERANCE_64 = 1e-13
# The same in float32, whose rounding is 6e-8; exponents and softplus add a few units each.
TOLERANCE_32 = 2e-5
# One rounding of the result, 2^-8 for bfloat16's 8 bits and 2^-11 for float16's 11, and a little
# for the float32 inside.
TOLERANCE_HALF = {torch.bfloat16: 1.05 * 2**-8, torch.float16: 1.05 * 2**-11}

# (batch, H, W, D, R, N): odd, prime, one wide, not square, shorter and longer than a chunk.
SHAPES = [
    (2, 7, 5, 6, 3, 1),
    (1, 1, 1, 4, 1, 1),
    (2, 1, 37, 3, 2, 2),
    (1, 41, 1, 5, 2, 1),
    (1, 13, 11, 4, 6, 1),
    (2, 4, 6, 3, 2, 5),
    (1, 3, 5, 2, 2, 16),
]


def arguments(shape, pattern, **kwargs):
    return selective_scan_2d_arguments(*shape, directions=len(PATTERNS[pattern]), **kwargs)


def compare(args, pattern, tolerance):
    scan = functools.partial(selective_scan_2d, pattern=pattern)
    oracle = functools.partial(selective_scan_2d_oracle, pattern=pattern)
    comparison.compare(scan, oracle, args, tolerance)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float64_matches_the_definition(shape, pattern):
    compare(arguments(shape, pattern, dtype=torch.float64), pattern, TOLERANCE_64)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("shape", SHAPES[:1] + SHAPES[4:6], ids=str)
def test_float32_matches_the_definition(shape, pattern):
    compare(arguments(shape, pattern), pattern, TOLERANCE_32)


@pytest.mark.parametrize("dtype", TOLERANCE_HALF, ids=str)
def test_half_precision_rounds_only_the_result(dtype):
    args = arguments((2, 9, 8, 6, 3, 2), "cross2d", dtype=dtype)
    compare(args, "cross2d", TOLERANCE_HALF[dtype])


def test_mixed_dtypes_as_under_autocast():
    args = arguments((2, 5, 6, 4, 3, 1), "cross2d")
    for name in ("x", "proj"):
        args[name] = args[name].detach().bfloat16().requires_grad_()
    compare(args, "cross2d", TOLERANCE_HALF[torch.bfloat16])


def test_states_in_several_groups(monkeypatch):
    monkeypatch.setattr(chunked_scan, "_GROUP_ELEMENTS", 500)
    compare(arguments((1, 6, 7, 4, 2, 7), "cross2d", dtype=torch.float64), "cross2d", TOLERANCE_64)


@hypothesis.settings(max_examples=20, deadline=None, derandomize=True)
@hypothesis.given(
    shape=st.tuples(*[st.integers(1, top) for top in (2, 9, 9, 5, 4, 3)]),
    pattern=st.sampled_from(sorted(PATTERNS)),
)
def test_any_shape(shape, pattern):
    compare(arguments(shape, pattern, dtype=torch.float64), pattern, TOLERANCE_64)


def test_non_contiguous_inputs_and_output_gradient():
    args = arguments((2, 6, 7, 4, 3, 2), "cross2d", dtype=torch.float64)
    strange = {
        "x": args["x"].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
        "proj": args["proj"].transpose(1, 2).contiguous().transpose(1, 2),
        "dt_weight": args["dt_weight"].mT.contiguous().mT,
        "dt_bias": args["dt_bias"].t().contiguous().t(),
        "A": args["A"].expand(3, *args["A"].shape)[1],
        "D": torch.stack([args["D"], args["D"]], -1)[..., 1],
    }
    assert not any(strange[name].is_contiguous() for name in ("x", "proj", "dt_weight", "D"))
    expected = selective_scan_2d(**args)
    actual = selective_scan_2d(**strange)
    assert relative_error(actual, expected) < TOLERANCE_64
    grad = torch.randn(2, 4, 7, 6, dtype=torch.float64).permute(0, 3, 2, 1)
    wanted = torch.autograd.grad(expected, list(args.values()), grad.contiguous())
    found = torch.autograd.grad(actual, list(args.values()), grad)
    assert all(relative_error(a, b) < TOLERANCE_64 for a, b in zip(found, wanted, strict=True))


def test_empty_batch():
    args = arguments((0, 5, 6, 4, 3, 1), "cross2d")
    result = output_and_gradients(selective_scan_2d, args)
    assert result["out"].shape == (0, 5, 6, 4)
    assert all(result[name].shape == t.shape for name, t in args.items())
    assert not result["dt_weight"].any()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_gradcheck(pattern):
    args = arguments((1, 3, 4, 2, 2, 2), pattern, dtype=torch.float64)
    function = lambda *a: selective_scan_2d(*a, pattern=pattern)  # noqa: E731
    assert torch.autograd.gradcheck(function, tuple(args.values()), fast_mode=False)


def test_adjoint_identity():
    # The scan is linear in x: <scan(v), w> = <v, the gradient of <scan(x), w> at any x>.
    args = arguments((2, 9, 11, 5, 3, 2), "cross2d", dtype=torch.float64)
    v, w = torch.randn(2, *args["x"].shape, dtype=torch.float64)
    (adjoint,) = torch.autograd.grad(selective_scan_2d(**args), args["x"], w)
    forward = selective_scan_2d(**{**args, "x": v})
    assert torch.isclose((forward * w).sum(), (v * adjoint).sum(), rtol=1e-12)


def permuted(args, directions, dims):
    """The map flipped or transposed by ``dims``, the directions reordered."""
    result = {name: t[directions] for name, t in args.items() if name not in ("x", "proj")}
    return {"x": dims(args["x"]), "proj": dims(args["proj"])[:, :, :, directions], **result}


@pytest.mark.parametrize(
    ("directions", "change"),
    [
        ([2, 3, 0, 1], lambda t: t.flip(1, 2)),
        ([1, 0, 3, 2], lambda t: t.transpose(1, 2)),
    ],
    ids=["reversed", "transposed"],
)
def test_changing_the_map_changes_the_directions(directions, change):
    args = arguments((2, 7, 10, 5, 3, 2), "cross2d", dtype=torch.float64)
    expected = change(selective_scan_2d(**args))
    actual = selective_scan_2d(**permuted(args, directions, change))
    assert relative_error(actual, expected) < TOLERANCE_64


@pytest.mark.parametrize("pattern", PATTERNS)
def test_sum_of_single_direction_scans(pattern):
    """The 1D operator on explicitly reordered copies, one direction at a time."""
    args = {
        name: t.detach()
        for name, t in arguments((2, 6, 9, 4, 3, 2), pattern, dtype=torch.float64).items()
    }
    rank, states = 3, 2
    total = torch.zeros_like(args["x"])
    for k, path in enumerate(PATTERNS[pattern]):

        def order(maps, path=path):
            maps = maps.transpose(1, 2) if path.column_major else maps
            sequences = maps.flatten(0, 1) if path.per_line else maps.flatten(1, 2)
            return (sequences.flip(1) if path.reverse else sequences).transpose(1, 2)

        low_rank, B, C = order(args["proj"][:, :, :, k]).split((rank, states, states), 1)
        y = selective_scan(
            order(args["x"]),
            args["dt_weight"][k] @ low_rank,
            args["A"][k],
            B[:, None],
            C[:, None],
            args["D"][k],
            args["dt_bias"][k],
            delta_softplus=True,
        ).transpose(1, 2)
        y = y.flip(1) if path.reverse else y
        shape = total.transpose(1, 2).shape if path.column_major else total.shape
        y = y.reshape(shape)
        total += y.transpose(1, 2) if path.column_major else y
    assert relative_error(selective_scan_2d(**args, pattern=pattern), total) < TOLERANCE_64


@pytest.mark.parametrize("chunk", [1, 2, 7, 63, 1000])
def test_chunk_length_does_not_change_the_result(chunk, monkeypatch):
    args = arguments((1, 9, 14, 4, 3, 2), "cross2d")
    expected = output_and_gradients(selective_scan_2d, args)
    monkeypatch.setattr(chunked_scan, "chunk_length", lambda _: chunk)
    actual = output_and_gradients(selective_scan_2d, args)
    assert max(errors(actual, expected).values()) < TOLERANCE_32


def test_float16_extremes_stay_finite():
    # Steps near 1000 and inputs of 6e4: states pass float16's largest value, outputs do not.
    args = arguments((1, 6, 7, 4, 2, 2), "cross2d", dtype=torch.float16)
    with torch.no_grad():
        args["x"].copy_(torch.where(args["x"] > 0, 6e4, -6e4))
        args["dt_bias"].fill_(1e3)
        args["A"].mul_(1e-3)
        args["proj"][..., 2:] *= 3e-3
        args["D"].mul_(0.1)
    exact = {name: t.detach().double().requires_grad_() for name, t in args.items()}
    out = selective_scan_2d(**args)
    assert relative_error(out, selective_scan_2d_oracle(**exact)) < TOLERANCE_HALF[torch.float16]
    # Some gradients pass it too: float32 leaves get them.
    single = {name: t.detach().float().requires_grad_() for name, t in args.items()}
    compare(single, "cross2d", TOLERANCE_32)


def test_saved_memory_is_the_inputs_and_few_carries():
    args = arguments((1, 48, 48, 8, 2, 1), "cross2d")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        selective_scan_2d(**args)
    inputs = {t.data_ptr() for t in args.values()}
    extra = sum(t.numel() for t in saved if t.data_ptr() not in inputs)
    # Four directions' states would be 4 maps.
    assert extra <= 0.2 * args["x"].numel()


def test_number_of_steps_grows_with_the_square_root():
    from torch.utils._python_dispatch import TorchDispatchMode

    from mmvmamba_kernels.selective_scan_2d import reference
    from mmvmamba_kernels.selective_scan_2d.arguments import Arguments

    class Counter(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.calls += "addcmul" in str(func)
            return func(*args, **(kwargs or {}))

    length = 4096
    args = arguments((1, 64, 64, 2, 1, 1), "cross2d")
    with Counter() as counter, torch.no_grad():
        reference.forward(Arguments(**args, pattern="cross2d"), save_carries=False)
    assert counter.calls < 4 * 3 * length**0.5


def test_long_narrow_map():
    # Positions do not depend on later ones: the first of 2^20 agree with a short map's.
    length, prefix = 2**20, 200
    args = arguments((1, 1, length, 2, 1, 1), "rows")
    result = output_and_gradients(lambda **a: selective_scan_2d(**a, pattern="rows"), args)
    assert all(t.isfinite().all() for t in result.values())
    with torch.no_grad():
        args["proj"][:, :, :, 1] = 0
        out = selective_scan_2d(**args, pattern="rows")
        short = {n: t[:, :, :prefix] if n in ("x", "proj") else t for n, t in args.items()}
        expected = selective_scan_2d_oracle(**short, pattern="rows")
    assert relative_error(out[:, :, :prefix], expected) < TOLERANCE_32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"x": torch.zeros(2, 4, 5)},
            r"x must be \(B, H, W, D\), 4-dimensional, got .*\(2, 4, 5\)",
        ),
        ({"x": torch.zeros(1, 0, 5, 4)}, "H must be at least 1"),
        ({"proj": torch.zeros(2, 4, 5, 4, 6)}, r"proj must be .*= \(2, 4, 5, 4, 5\), got"),
        (
            {"dt_weight": torch.zeros(3, 4, 3)},
            r"dt_weight must be \(K, D, R\) with pattern 'cross2d'",
        ),
        ({"dt_bias": torch.zeros(16)}, r"dt_bias must be \(K, D\) = \(4, 4\), got shape \(16,\)"),
        ({"A": torch.zeros(16, 1)}, r"A must be \(K, D, N\), 3-dimensional"),
        ({"D": torch.zeros(4, 5)}, r"D must be \(K, D\) = \(4, 4\)"),
        ({"D": torch.zeros(4, 4, device="meta")}, "D is on meta but x is on cpu"),
        ({"pattern": "spiral"}, "pattern must be one of cross2d, unidi, bidi, rows, columns"),
        ({"pattern": "rows"}, "with pattern 'rows'"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    args = {
        name: t.detach()
        for name, t in selective_scan_2d_arguments(2, 4, 5, 4, rank=3, states=1).items()
    }
    with pytest.raises(ValueError, match=message):
        selective_scan_2d(**{**args, **change})


def test_wrong_types_are_named():
    args = arguments((1, 2, 2, 2, 1, 1), "cross2d")
    with pytest.raises(TypeError, match="proj must be float16, .* got torch.int64"):
        selective_scan_2d(**{**args, "proj": args["proj"].long()})
    with pytest.raises(TypeError, match="A must be a tensor, got float"):
        selective_scan_2d(**{**args, "A": 1.0})
