"""The reference 1D selective scan against a float64 loop."""

import functools

import comparison
import pytest
import torch

import mmvmamba_kernels
from mmvmamba_kernels.backends.reference import chunked_scan
from mmvmamba_kernels.testing import (
    errors,
    output_and_gradients,
    relative_error,
    selective_scan_arguments,
    selective_scan_oracle,
)

selective_scan = functools.partial(mmvmamba_kernels.selective_scan, backend="reference")

# float64 sums of a few thousand terms of mixed sign: a few hundred roundings of 1.1e-16.
TOLERANCE_64 = 1e-13
# The same in float32, whose rounding is 6e-8; exponents and softplus add a few units each.
TOLERANCE_32 = 2e-5
# One rounding of the result, 2^-8 for bfloat16's 8 bits and 2^-11 for float16's 11, and a little
# for the float32 inside.
TOLERANCE_HALF = {torch.bfloat16: 1.05 * 2**-8, torch.float16: 1.05 * 2**-11}

softplus_scan = functools.partial(selective_scan, delta_softplus=True)
softplus_oracle = functools.partial(selective_scan_oracle, delta_softplus=True)

# (batch, K, D of a group, N, L): one position, shorter and longer than a chunk, odd, prime.
SHAPES = [(2, 1, 3, 1, 1), (1, 2, 3, 2, 3), (2, 4, 5, 1, 97), (1, 3, 2, 5, 64), (2, 1, 1, 16, 33)]


def compare(args, tolerance, scan=softplus_scan, oracle=softplus_oracle):
    comparison.compare(scan, oracle, args, tolerance)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float64_matches_the_definition(shape):
    compare(selective_scan_arguments(*shape, dtype=torch.float64), TOLERANCE_64)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32_matches_the_definition(shape):
    compare(selective_scan_arguments(*shape), TOLERANCE_32)


@pytest.mark.parametrize("dtype", TOLERANCE_HALF, ids=str)
def test_half_precision_rounds_only_the_result(dtype):
    compare(selective_scan_arguments(2, 2, 4, 3, 50, dtype=dtype), TOLERANCE_HALF[dtype])


@pytest.mark.parametrize("absent", [["D"], ["delta_bias"], ["D", "delta_bias"]], ids=str)
@pytest.mark.parametrize("softplus", [True, False])
def test_optional_arguments(absent, softplus):
    args = selective_scan_arguments(2, 2, 3, 2, 41, dtype=torch.float64)
    if not softplus:
        # Steps are then taken as they are; a few are negative, as nothing forbids.
        with torch.no_grad():
            args["delta"].abs_().sub_(0.1)
    for name in absent:
        del args[name]
    compare(
        args,
        TOLERANCE_64,
        functools.partial(selective_scan, delta_softplus=softplus),
        functools.partial(selective_scan_oracle, delta_softplus=softplus),
    )


@pytest.mark.parametrize("out_dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_output_dtype(out_dtype):
    args = selective_scan_arguments(1, 1, 3, 2, 20, dtype=torch.bfloat16)
    out = softplus_scan(**args, out_dtype=out_dtype)
    assert out.dtype == out_dtype
    tolerance = TOLERANCE_HALF.get(out_dtype, TOLERANCE_32)
    assert relative_error(out, softplus_oracle(**args)) < tolerance
    out.sum().backward()
    assert args["u"].grad.dtype == torch.bfloat16


def test_mixed_dtypes():
    args = selective_scan_arguments(1, 2, 3, 2, 30)
    for name in ("u", "delta", "B", "C"):
        args[name] = args[name].detach().half().requires_grad_()
    compare(args, TOLERANCE_HALF[torch.float16])


def test_non_contiguous():
    args = selective_scan_arguments(2, 2, 3, 2, 37, dtype=torch.float64)
    strange = {
        "u": args["u"].mT.contiguous().mT,
        "delta": args["delta"][:, :, None].expand(-1, -1, 2, -1)[:, :, 1],
        "A": args["A"].t().contiguous().t(),
        "B": args["B"].transpose(1, 3).contiguous().transpose(1, 3),
        "C": args["C"].flip(0).flip(0)[:],
        "D": torch.stack([args["D"]] * 2, 1)[:, 0],
        "delta_bias": args["delta_bias"],
    }
    expected = output_and_gradients(softplus_scan, args)
    out = softplus_scan(**strange)
    assert relative_error(out, expected["out"]) < TOLERANCE_64
    assert out.is_contiguous()
    # An expanded output gradient, as sum() produces.
    found = torch.autograd.grad(out.sum(), list(args.values()))
    wanted = torch.autograd.grad(softplus_oracle(**args).sum(), list(args.values()))
    assert all(relative_error(a, b) < TOLERANCE_64 for a, b in zip(found, wanted, strict=True))


def test_empty_batch():
    args = selective_scan_arguments(0, 2, 3, 2, 10)
    result = output_and_gradients(softplus_scan, args)
    assert all(result[name].shape == t.shape for name, t in args.items())
    assert not result["A"].any()


def test_gradcheck():
    args = selective_scan_arguments(2, 2, 2, 2, 9, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda *a: selective_scan(*a, delta_softplus=True), tuple(args.values())
    )


def test_adjoint_identity():
    args = selective_scan_arguments(2, 2, 3, 2, 50, dtype=torch.float64)
    v, w = torch.randn(2, *args["u"].shape, dtype=torch.float64)
    (adjoint,) = torch.autograd.grad(softplus_scan(**args), args["u"], w)
    forward = softplus_scan(**{**args, "u": v})
    assert torch.isclose((forward * w).sum(), (v * adjoint).sum(), rtol=1e-12)


@pytest.mark.parametrize("chunk", [1, 2, 17, 100, 5000])
def test_chunk_length_does_not_change_the_result(chunk, monkeypatch):
    args = selective_scan_arguments(2, 2, 3, 2, 100)
    expected = output_and_gradients(softplus_scan, args)
    monkeypatch.setattr(chunked_scan, "chunk_length", lambda _: chunk)
    actual = output_and_gradients(softplus_scan, args)
    assert max(errors(actual, expected).values()) < TOLERANCE_32


def test_float16_extremes_stay_finite():
    # Products of inputs of 6e4 and steps of 1000 reach 1e16 and more; float32 outputs hold them.
    args = selective_scan_arguments(1, 2, 3, 2, 40, dtype=torch.float16)
    with torch.no_grad():
        for name in ("u", "B", "C"):
            args[name].copy_(torch.where(args[name] > 0, 6e4, -6e4))
        args["delta"].copy_(torch.where(args["delta"] > 0, 1e3, -1e3))
        args["A"].mul_(1e-3)
    out = softplus_scan(**args, out_dtype=torch.float32)
    assert relative_error(out, softplus_oracle(**args)) < TOLERANCE_32
    single = {name: t.detach().float().requires_grad_() for name, t in args.items()}
    compare(single, TOLERANCE_32)


@pytest.mark.parametrize("value", [-1e4, -90.0, -20.0, 19.9, 20.1, 1e3, 6e4])
def test_softplus_is_stable(value):
    args = selective_scan_arguments(1, 1, 2, 1, 5)
    with torch.no_grad():
        args["delta"].fill_(value)
        args["delta_bias"].zero_()
        args["A"].fill_(-1e-5)
    if value > -50:
        compare(args, TOLERANCE_32)
    else:
        # The exact steps and their gradients are below float32's smallest number.
        result = output_and_gradients(softplus_scan, args)
        assert all(t.isfinite().all() for t in result.values())
        assert not result["delta"].abs().max() > 1e-30


def test_long_sequence():
    # Positions do not depend on later ones: the first of 2^20 agree with a short sequence's.
    length, prefix = 2**20, 200
    args = selective_scan_arguments(1, 1, 2, 1, length)
    result = output_and_gradients(softplus_scan, args)
    assert all(t.isfinite().all() for t in result.values())
    short = {n: t[..., :prefix] if n in ("u", "delta", "B", "C") else t for n, t in args.items()}
    assert relative_error(result["out"][..., :prefix], softplus_oracle(**short)) < TOLERANCE_32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"u": torch.zeros(6, 5)},
            r"u must be \(batch, K\*D, L\), 3-dimensional, got shape \(6, 5\)",
        ),
        ({"u": torch.zeros(1, 6, 0)}, "L must be at least 1, got 0"),
        ({"delta": torch.zeros(1, 6, 4)}, r"delta must be .* = \(1, 6, 5\), got shape \(1, 6, 4\)"),
        ({"A": torch.zeros(6)}, r"A must be \(K\*D, N\), 2-dimensional, got shape \(6,\)"),
        ({"A": torch.zeros(5, 2)}, r"A must be \(K\*D, N\) = \(6, 2\)"),
        ({"B": torch.zeros(1, 2, 5)}, r"B must be \(batch, K, N, L\), 4-dimensional"),
        (
            {"B": torch.zeros(1, 4, 2, 5)},
            "u has 6 channels, which cannot be divided into the 4 groups",
        ),
        ({"C": torch.zeros(1, 2, 2, 4)}, r"C must be .* = \(1, 2, 2, 5\)"),
        ({"D": torch.zeros(2, 3)}, r"D must be \(K\*D,\) = \(6,\), got shape \(2, 3\)"),
        ({"delta_bias": torch.zeros(3)}, r"delta_bias must be \(K\*D,\) = \(6,\)"),
        ({"delta": torch.zeros(1, 4, 5)}, r"K\*D = 6 a multiple of G, got shape \(1, 4, 5\)"),
        ({"delta": torch.zeros(1, 3, 5)}, r"delta_bias must be \(G,\) = \(3,\), got shape \(6,\)"),
        ({"initial_state": torch.zeros(1, 6, 3)}, r"initial_state must be .* = \(1, 6, 2\)"),
        ({"C": torch.zeros(1, 2, 2, 5, device="meta")}, "C is on meta but u is on cpu"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    args = {name: t.detach() for name, t in selective_scan_arguments(1, 2, 3, 2, 5).items()}
    with pytest.raises(ValueError, match=message):
        selective_scan(**{**args, **change})


def test_wrong_dtypes_are_named():
    args = selective_scan_arguments(1, 2, 3, 2, 5)
    with pytest.raises(TypeError, match="out_dtype must be a floating-point torch.dtype"):
        selective_scan(**args, out_dtype=torch.int32)
    with pytest.raises(TypeError, match="delta must be a tensor, got NoneType"):
        selective_scan(**{**args, "delta": None})


def with_states(function, **options):
    """Output and last state side by side, so that both have a gradient."""
    return lambda **args: torch.cat(function(**args, return_last_state=True, **options), 2)


@pytest.mark.parametrize(("states", "groups"), [(1, 3), (3, 2)], ids=str)
@pytest.mark.parametrize("softplus", [True, False])
def test_initial_and_last_state(states, groups, softplus):
    args = selective_scan_arguments(2, groups, 2, states, 19, dtype=torch.float64)
    if not softplus:
        with torch.no_grad():
            args["delta"].abs_()
            args["delta_bias"].abs_()
    args["initial_state"] = torch.randn(
        2, groups * 2, states, dtype=torch.float64, requires_grad=True
    )
    scan, oracle = (
        with_states(f, delta_softplus=softplus) for f in (selective_scan, selective_scan_oracle)
    )
    compare(args, TOLERANCE_64, scan, oracle)


def test_a_sequence_in_two_parts():
    args = selective_scan_arguments(2, 2, 3, 2, 31, dtype=torch.float16)
    whole, last = softplus_scan(**args, return_last_state=True, out_dtype=torch.float32)
    assert last.dtype == torch.float32
    state, parts = None, []
    for part in (slice(12), slice(12, None)):
        positions = {n: args[n][..., part] for n in ("u", "delta", "B", "C")}
        out, state = softplus_scan(
            **{**args, **positions},
            initial_state=state,
            return_last_state=True,
            out_dtype=torch.float32,
        )
        parts.append(out)
    assert relative_error(torch.cat(parts, 2), whole) < TOLERANCE_32
    assert relative_error(state, last) < TOLERANCE_32
    assert softplus_scan(**args, initial_state=last).dtype == torch.float16


@pytest.mark.parametrize("steps", [1, 3])
def test_channels_share_step_sizes(steps):
    args = selective_scan_arguments(2, 2, 3, 2, 17, dtype=torch.float64)
    args["delta"] = args["delta"].detach()[:, :steps].requires_grad_()
    args["delta_bias"] = args["delta_bias"].detach()[:steps].requires_grad_()
    compare(args, TOLERANCE_64)


def test_states_compile_in_one_graph():
    args = selective_scan_arguments(1, 2, 2, 2, 9)
    args["initial_state"] = torch.randn(1, 4, 2)
    function = functools.partial(softplus_scan, return_last_state=True)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, compiled(**args), function(**args)))
