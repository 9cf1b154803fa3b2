"""The reference scan of Mamba-2 against a float64 loop."""

import functools

import pytest
import torch

import mmvmamba_kernels
from mmvmamba_kernels.testing import (
    errors,
    output_and_gradients,
    relative_error,
    state_space_dual_arguments,
    state_space_dual_oracle,
)

selective_scan = functools.partial(mmvmamba_kernels.selective_scan, backend="reference")
state_space_dual = functools.partial(mmvmamba_kernels.state_space_dual, backend="reference")

# float64 sums of a few thousand terms of mixed sign: a few hundred roundings of 1.1e-16.
TOLERANCE_64 = 1e-13
# The same in float32, whose rounding is 6e-8; matrix products of a chunk add their own.
TOLERANCE_32 = 2e-5
# One rounding of the result, 2^-8 for bfloat16's 8 bits and 2^-11 for float16's 11, and a little
# for the float32 inside.
TOLERANCE_HALF = {torch.bfloat16: 1.05 * 2**-8, torch.float16: 1.05 * 2**-11}

# (batch, K, L, heads, P, N), chunk size: one position, shorter than a chunk, one more, a prime.
CASES = [
    ((2, 4, 1, 2, 3, 2), 64),
    ((1, 2, 5, 3, 2, 4), 64),
    ((2, 1, 65, 2, 4, 3), 64),
    ((1, 4, 97, 2, 3, 5), 16),
    ((2, 2, 48, 1, 1, 1), 16),
    ((1, 1, 9, 2, 2, 3), 1),
]


def compare(args, tolerance, chunk_size=16):
    """Check output and all gradients against the float64 loop on the same values."""
    exact = {name: t.detach().double().requires_grad_() for name, t in args.items()}
    expected = output_and_gradients(state_space_dual_oracle, exact)
    actual = output_and_gradients(functools.partial(state_space_dual, chunk_size=chunk_size), args)
    for name, t in args.items():
        assert actual[name].dtype == t.dtype
        assert actual[name].shape == t.shape
    found = errors(actual, expected)
    assert max(found.values()) < tolerance, found


@pytest.mark.parametrize(("shape", "chunk_size"), CASES, ids=str)
def test_float64_matches_the_definition(shape, chunk_size):
    args = state_space_dual_arguments(*shape, dtype=torch.float64)
    compare(args, TOLERANCE_64, chunk_size)


@pytest.mark.parametrize(("shape", "chunk_size"), CASES, ids=str)
def test_float32_matches_the_definition(shape, chunk_size):
    compare(state_space_dual_arguments(*shape), TOLERANCE_32, chunk_size)


@pytest.mark.parametrize("dtype", TOLERANCE_HALF, ids=str)
def test_half_precision_rounds_only_the_result(dtype):
    args = state_space_dual_arguments(2, 2, 40, 2, 3, 4, dtype=dtype)
    compare(args, TOLERANCE_HALF[dtype])


@pytest.mark.parametrize("absent", [["D"], ["dt_bias"], ["D", "dt_bias"]], ids=str)
def test_optional_arguments(absent):
    args = state_space_dual_arguments(1, 2, 30, 2, 3, 4, dtype=torch.float64)
    for name in absent:
        del args[name]
    compare(args, TOLERANCE_64)


def test_equals_the_selective_scan_with_shared_rates():
    args = state_space_dual_arguments(2, 3, 50, 2, 4, 5, dtype=torch.float64)
    _, directions, _, heads, width = args["x"].shape

    def per_channel(t):
        """(..., heads) -> (..., heads * P)."""
        return t.repeat_interleave(width, -1)

    out = selective_scan(
        args["x"].flatten(3).transpose(2, 3).flatten(1, 2),
        per_channel(args["dt"]).transpose(2, 3).flatten(1, 2),
        per_channel(args["A"]).flatten()[:, None].expand(-1, 5),
        args["B"].transpose(2, 3),
        args["C"].transpose(2, 3),
        args["D"].flatten(),
        per_channel(args["dt_bias"]).flatten(),
        delta_softplus=True,
    )
    out = out.unflatten(1, (directions, -1)).transpose(2, 3).unflatten(3, (heads, width))
    assert relative_error(state_space_dual(**args), out) < TOLERANCE_64


@pytest.mark.parametrize("chunk_size", [1, 2, 13, 99, 1000])
def test_chunk_size_does_not_change_the_result(chunk_size):
    args = state_space_dual_arguments(1, 2, 100, 2, 3, 4)
    expected = output_and_gradients(state_space_dual, args)
    actual = output_and_gradients(functools.partial(state_space_dual, chunk_size=chunk_size), args)
    assert max(errors(actual, expected).values()) < TOLERANCE_32


def test_decays_after_a_huge_step_keep_their_digits():
    # One step of 1e5 in a chunk of small ones: differences of running sums would lose 0.01.
    args = state_space_dual_arguments(1, 1, 32, 2, 2, 3)
    with torch.no_grad():
        args["A"].fill_(-1)
        args["dt"][:, :, 3] = 1e5
    compare(args, TOLERANCE_32, chunk_size=32)


def test_float16_extremes_stay_finite():
    args = state_space_dual_arguments(1, 2, 40, 2, 3, 4, dtype=torch.float16)
    with torch.no_grad():
        args["x"].copy_(torch.where(args["x"] > 0, 6e4, -6e4))
        args["dt"].copy_(torch.where(args["dt"] > 0, 1e3, -1e3))
        args["A"].mul_(1e-3)
        for name in ("B", "C"):
            args[name].mul_(3e-3)
        args["D"].mul_(0.1)
    exact = {name: t.detach().double() for name, t in args.items()}
    error = relative_error(state_space_dual(**args), state_space_dual_oracle(**exact))
    assert error < TOLERANCE_HALF[torch.float16]
    compare({n: t.detach().float().requires_grad_() for n, t in args.items()}, TOLERANCE_32)


def test_non_contiguous():
    args = state_space_dual_arguments(2, 2, 30, 2, 3, 4, dtype=torch.float64)
    strange = {name: t.mT.contiguous().mT if t.ndim > 1 else t for name, t in args.items()}
    assert not strange["x"].is_contiguous()
    expected, actual = state_space_dual(**args), state_space_dual(**strange)
    assert relative_error(actual, expected) < TOLERANCE_64
    found = torch.autograd.grad(actual.sum(), list(args.values()))
    wanted = torch.autograd.grad(expected.sum(), list(args.values()))
    assert all(relative_error(a, b) < TOLERANCE_64 for a, b in zip(found, wanted, strict=True))


def test_empty_batch():
    args = state_space_dual_arguments(0, 2, 30, 2, 3, 4)
    result = output_and_gradients(state_space_dual, args)
    assert all(result[name].shape == t.shape for name, t in args.items())
    assert not result["A"].any()


def test_gradcheck():
    args = state_space_dual_arguments(1, 1, 5, 2, 2, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda *a: state_space_dual(*a[:-1], dt_bias=a[-1], chunk_size=2), tuple(args.values())
    )


def test_adjoint_identity():
    args = state_space_dual_arguments(2, 2, 50, 2, 3, 4, dtype=torch.float64)
    v, w = torch.randn(2, *args["x"].shape, dtype=torch.float64)
    (adjoint,) = torch.autograd.grad(state_space_dual(**args), args["x"], w)
    forward = state_space_dual(**{**args, "x": v})
    assert torch.isclose((forward * w).sum(), (v * adjoint).sum(), rtol=1e-12)


def test_long_sequence():
    # Positions do not depend on later ones: the first of 2^20 agree with a short sequence's.
    length, prefix = 2**20, 200
    args = state_space_dual_arguments(1, 1, length, 1, 2, 2)
    result = output_and_gradients(state_space_dual, args)
    assert all(t.isfinite().all() for t in result.values())
    short = {n: t[:, :, :prefix] if n in ("x", "dt", "B", "C") else t for n, t in args.items()}
    error = relative_error(result["out"][:, :, :prefix], state_space_dual_oracle(**short))
    assert error < TOLERANCE_32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(1, 2, 5, 6)}, r"x must be \(B, K, L, heads, P\), 5-dimensional"),
        (
            {"dt": torch.zeros(1, 2, 5, 3)},
            r"dt must be .* = \(1, 2, 5, 2\), got shape \(1, 2, 5, 3\)",
        ),
        ({"A": torch.zeros(2, 2, 3)}, r"A must be \(K, heads\) = \(2, 2\)"),
        ({"B": torch.zeros(1, 2, 4, 4)}, r"B must be .* = \(1, 2, 5, 4\)"),
        ({"C": torch.zeros(1, 2, 5, 3)}, r"C must be .* = \(1, 2, 5, 4\)"),
        ({"D": torch.zeros(2, 2)}, r"D must be \(K, heads, P\) = \(2, 2, 3\)"),
        ({"dt_bias": torch.zeros(4)}, r"dt_bias must be \(K, heads\) = \(2, 2\)"),
        ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    args = {name: t.detach() for name, t in state_space_dual_arguments(1, 2, 5, 2, 3, 4).items()}
    with pytest.raises(ValueError, match=message):
        state_space_dual(**{**args, **change})


def test_wrong_types_are_named():
    args = state_space_dual_arguments(1, 2, 5, 2, 3, 4)
    with pytest.raises(TypeError, match="chunk_size must be an integer, got 2.0"):
        state_space_dual(**args, chunk_size=2.0)
    with pytest.raises(TypeError, match="x must be float16"):
        state_space_dual(**{**args, "x": args["x"].to(torch.int8)})
