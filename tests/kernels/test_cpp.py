"""The C++ backend against the float64 loops, the reference, and itself."""

import functools
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch
from comparison import compare, doubled

from mmvmamba_kernels import selective_scan, selective_scan_2d
from mmvmamba_kernels.backends.native import build, extension
from mmvmamba_kernels.dispatch import BackendError
from mmvmamba_kernels.patterns import PATTERNS
from mmvmamba_kernels.testing import (
    errors,
    output_and_gradients,
    selective_scan_2d_arguments,
    selective_scan_2d_oracle,
    selective_scan_arguments,
    selective_scan_oracle,
)

scan = functools.partial(selective_scan, delta_softplus=True, backend="cpp")
scan_2d = functools.partial(selective_scan_2d, backend="cpp")

# Largest error over the largest value: some hundred roundings of 1.1e-16 and 6e-8 in sums of mixed
# sign, and for the halves one rounding of the result.
TOLERANCE = {
    torch.float64: 1e-13,
    torch.float32: 2e-5,
    torch.bfloat16: 1.05 * 2**-8,
    torch.float16: 1.05 * 2**-11,
}

# (batch, H, W, D, R, N): one position, one wide, odd, prime; channels and ranks below, at and above
# the lanes of a block; paths below, at and above a tile; more images than a wave.
SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (2, 1, 67, 16, 3, 2),
    (1, 131, 1, 5, 17, 1),
    (2, 8, 8, 20, 6, 1),
    (1, 7, 13, 33, 8, 4),
    (1, 5, 3, 17, 9, 16),
    (1, 3, 2, 3, 1, 64),
    (35, 3, 2, 4, 2, 1),
]


@pytest.fixture(scope="session", autouse=True)
def library():
    """The library, built as the command builds it."""
    try:
        build.find_compiler()
    except build.BuildError as error:
        pytest.skip(str(error))
    path = build.build()
    extension.load.cache_clear()
    assert extension.load() is None
    return path


def compare_2d(args, pattern, tolerance):
    compare(
        functools.partial(scan_2d, pattern=pattern),
        functools.partial(selective_scan_2d_oracle, pattern=pattern),
        args,
        tolerance,
    )


def arguments_2d(shape, pattern="cross2d", **kwargs):
    return selective_scan_2d_arguments(*shape, directions=len(PATTERNS[pattern]), **kwargs)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_2d_matches_the_definition(pattern, dtype):
    compare_2d(arguments_2d((1, 7, 8, 20, 6, 2), pattern, dtype=dtype), pattern, TOLERANCE[dtype])


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_2d_of_any_size(shape, pattern):
    dtype = torch.float64
    compare_2d(arguments_2d(shape, pattern, dtype=dtype), pattern, TOLERANCE[dtype])


def test_2d_of_mixed_dtypes_as_under_autocast():
    args = arguments_2d((2, 5, 6, 20, 3, 1))
    for name in ("x", "proj"):
        args[name] = args[name].detach().bfloat16().requires_grad_()
    compare_2d(args, "cross2d", TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "shape", [(2, 3, 20, 1, 65), (1, 1, 1, 1, 1), (2, 2, 16, 4, 64), (1, 2, 5, 16, 7)], ids=str
)
def test_1d_matches_the_definition(shape, dtype):
    oracle = functools.partial(selective_scan_oracle, delta_softplus=True)
    compare(scan, oracle, selective_scan_arguments(*shape, dtype=dtype), TOLERANCE[dtype])


@pytest.mark.parametrize("softplus", [True, False])
@pytest.mark.parametrize("absent", [("D",), ("delta_bias",), ("D", "delta_bias")], ids="+".join)
def test_1d_with_absent_arguments(absent, softplus):
    args = selective_scan_arguments(2, 2, 5, 2, 70, dtype=torch.float64)
    for name in ("delta", "delta_bias"):
        args[name] = args[name].detach().abs().requires_grad_()
    args = {name: t for name, t in args.items() if name not in absent}
    compare(
        functools.partial(scan, delta_softplus=softplus),
        functools.partial(selective_scan_oracle, delta_softplus=softplus),
        args,
        TOLERANCE[torch.float64],
    )


def test_1d_of_a_million_positions():
    args = selective_scan_arguments(1, 1, 1, 1, 2**20)
    expected = output_and_gradients(
        functools.partial(selective_scan, delta_softplus=True, backend="reference"), doubled(args)
    )
    assert max(errors(output_and_gradients(scan, args), expected).values()) < 1e-4


@pytest.mark.parametrize("function", [scan, scan_2d], ids=["selective_scan", "selective_scan_2d"])
def test_matches_the_reference_on_model_sized_maps(function):
    if function is scan_2d:
        args = arguments_2d((2, 28, 28, 48, 6, 1))
    else:
        args = selective_scan_arguments(2, 2, 48, 1, 784)
    expected = output_and_gradients(functools.partial(function, backend="reference"), doubled(args))
    assert max(errors(output_and_gradients(function, args), expected).values()) < 2e-5


def test_non_contiguous_arguments():
    args = arguments_2d((2, 6, 7, 20, 3, 2), dtype=torch.float64)
    strange = {
        "x": args["x"].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
        "proj": args["proj"].transpose(1, 2).contiguous().transpose(1, 2),
        "dt_weight": args["dt_weight"].mT.contiguous().mT,
        "dt_bias": args["dt_bias"].t().contiguous().t(),
        "A": args["A"].expand(3, *args["A"].shape)[1],
        "D": torch.stack([args["D"], args["D"]], -1)[..., 1],
    }
    grad = torch.randn(2, 20, 7, 6, dtype=torch.float64).permute(0, 3, 2, 1)
    expected = scan_2d(**args)
    actual = scan_2d(**strange)
    assert torch.equal(actual, expected)
    wanted = torch.autograd.grad(expected, list(args.values()), grad.contiguous())
    found = torch.autograd.grad(actual, list(args.values()), grad)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))

    args = selective_scan_arguments(2, 2, 3, 2, 70)
    strange = {name: torch.stack([t, t], -1)[..., 1] for name, t in args.items()}
    assert torch.equal(scan(**strange), scan(**args))


def test_empty_batch():
    for function, args in (
        (scan_2d, arguments_2d((0, 5, 6, 4, 3, 1))),
        (scan, selective_scan_arguments(0, 2, 3, 1, 9)),
    ):
        result = output_and_gradients(function, args)
        first = next(iter(args.values()))
        assert result["out"].shape == first.shape
        assert all(result[name].shape == t.shape for name, t in args.items())
        assert not result["A"].any()


def test_large_values_stay_finite():
    args = arguments_2d((1, 9, 9, 20, 3, 2), dtype=torch.float16)
    args["x"] = torch.full_like(args["x"], 6e4).requires_grad_()
    args["dt_bias"] = torch.full_like(args["dt_bias"], 1e3).requires_grad_()
    # In float32 beside a float16 map, as models keep them: what is large must not overflow inside.
    args = {k: v if k == "x" else v.detach().float().requires_grad_() for k, v in args.items()}
    args["proj"] = (args["proj"].detach() * 1e-4).requires_grad_()
    expected = output_and_gradients(selective_scan_2d_oracle, doubled(args))
    actual = output_and_gradients(scan_2d, args)
    for name, value in expected.items():
        fits = value.abs() < torch.finfo(actual[name].dtype).max
        assert actual[name][fits].isfinite().all(), name
        scale = value[fits].abs().max()
        assert ((actual[name][fits] - value[fits]).abs() <= 2e-3 * scale).all(), name


@pytest.mark.parametrize("raw", [-1e4, -80.0, -20.0, -1e-3, 0.0, 1e-3, 19.9, 20.1, 1e3])
def test_softplus_and_its_slope_over_the_full_range(raw):
    # One position, A = 0 and unit weights: the output is delta, the gradient of delta its slope.
    one = torch.ones(1, 16, 1)
    raw = torch.full((1, 16, 1), raw).requires_grad_()
    A, weights = torch.zeros(16, 1), torch.ones(1, 1, 1, 1)
    out = scan(one, raw, A, weights, weights)
    exact = raw.detach().double()
    expected = torch.nn.functional.softplus(exact, threshold=20)
    slope = torch.where(exact > 20, 1.0, torch.sigmoid(exact))
    torch.testing.assert_close(out.double(), expected, rtol=3e-7, atol=1e-37)
    out.sum().backward()
    torch.testing.assert_close(raw.grad.double(), slope, rtol=3e-7, atol=1e-37)


def test_decay_over_the_full_range():
    # h_1 = exp(A) h_0 with h_0 = 1 and nothing added at the second position.
    # One unit in the last place and a quarter; torch's own in float64 is as far off.
    for dtype, rtol in ((torch.float32, 1.5e-7), (torch.float64, 5e-16)):
        A = torch.linspace(-120, 80, 4000, dtype=dtype)[:, None]
        u = torch.tensor([1.0, 0.0], dtype=dtype).expand(1, 4000, 2)
        ones = torch.ones(1, 1, 1, 2, dtype=dtype)
        out = selective_scan(u, torch.ones_like(u), A, ones, ones, backend="cpp")[0, :, 1]
        torch.testing.assert_close(out.double(), A[:, 0].double().exp(), rtol=rtol, atol=3e-38)


def test_nan_is_not_hidden():
    for name in ("x", "proj", "dt_weight", "dt_bias", "A", "D"):
        args = {k: t.detach() for k, t in arguments_2d((1, 3, 3, 2, 1, 1)).items()}
        args[name].view(-1)[0] = float("nan")
        assert scan_2d(**args).isnan().any(), name


# Columns of proj: the low rank, B and C.
@pytest.mark.parametrize("column", [0, 9, 10])
def test_what_is_infinite_spoils_no_more_than_in_the_reference(column):
    # Lanes of a block without a channel compute too, and sums over channels leave them out.
    arguments = selective_scan_2d_arguments(1, 1, 8, 5, 9, 1, directions=2, seed=0)
    arguments["proj"].data[0, 0, 5, 0, column] = float("-inf")
    run = functools.partial(selective_scan_2d, **arguments, pattern="rows")
    of_cpp, of_reference = (
        torch.autograd.grad(run(backend=backend).sum(), arguments["proj"])[0].isfinite()
        for backend in ("cpp", "reference")
    )
    assert 0 < of_reference.sum() < of_reference.numel()
    assert torch.equal(of_cpp, of_reference)


@pytest.mark.parametrize("pattern", ["cross2d", "columns"])
def test_backward_is_deterministic(pattern):
    args = arguments_2d((3, 11, 17, 40, 6, 2), pattern)
    function = functools.partial(scan_2d, pattern=pattern)
    first = output_and_gradients(function, args)
    for _ in range(10):
        again = output_and_gradients(function, args)
        assert all(torch.equal(again[k], first[k]) for k in first)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_results_do_not_depend_on_the_number_of_threads(threads):
    before = torch.get_num_threads()
    cases = [
        (scan_2d, arguments_2d((3, 11, 17, 70, 6, 2))),
        # Few enough blocks of channels that directions are computed beside each other.
        (scan_2d, arguments_2d((1, 11, 17, 40, 6, 2))),
        (scan, selective_scan_arguments(3, 2, 40, 1, 150)),
    ]
    expected = [output_and_gradients(*case) for case in cases]
    torch.set_num_threads(threads)
    try:
        actual = [output_and_gradients(*case) for case in cases]
    finally:
        torch.set_num_threads(before)
    for a, b in zip(actual, expected, strict=True):
        assert all(torch.equal(a[k], b[k]) for k in b)


@pytest.mark.parametrize(("threads", "divided"), [(3, False), (4, True)])
def test_gradients_of_few_channels_are_divided_by_directions(threads, divided, monkeypatch):
    library, seen = extension.library(), []

    def backward(params, *how):
        seen.append(params._obj.sum_direction_stride)
        return library.mmvmamba_scan_backward(params, *how)

    spy = SimpleNamespace(
        mmvmamba_scan_forward=library.mmvmamba_scan_forward,
        mmvmamba_scan_backward=backward,
        mmvmamba_make_path=library.mmvmamba_make_path,
    )
    monkeypatch.setattr(extension, "library", lambda: spy)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    output_and_gradients(scan_2d, arguments_2d((1, 3, 4, 96, 6, 1)))
    assert [stride > 0 for stride in seen] == [divided]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_gradcheck_2d(pattern):
    args = arguments_2d((1, 3, 4, 2, 2, 2), pattern, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *a: scan_2d(*a, pattern=pattern), tuple(args.values()))


def test_gradcheck_1d():
    args = selective_scan_arguments(1, 2, 2, 2, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(scan, tuple(args.values()))


def test_opcheck():
    args = tuple(arguments_2d((2, 5, 6, 3, 2, 2)).values())
    operator = torch.ops.mmvmamba.selective_scan_2d.default
    torch.library.opcheck(operator, (*args, None, "cross2d", "cpp", True))
    args = tuple(selective_scan_arguments(2, 2, 3, 2, 70).values())
    operator = torch.ops.mmvmamba.selective_scan.default
    torch.library.opcheck(operator, (*args, True, torch.float32, "cpp", True))


@pytest.fixture
def fresh_compiler():
    """Compilations of one function are limited per process; other tests need theirs."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("function", [scan, scan_2d], ids=["selective_scan", "selective_scan_2d"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_break(function, dynamic, fresh_compiler):
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for size in (5, 9) if dynamic else (5,):
        if function is scan_2d:
            args = arguments_2d((2, size, size + 2, 3, 2, 2))
        else:
            args = selective_scan_arguments(2, 2, 3, 2, 10 * size)
        expected, actual = (output_and_gradients(f, args) for f in (function, compiled))
        assert all(torch.equal(actual[k], expected[k]) for k in expected)


# Instruction sets are chosen once a process: others than this one's need one of their own.
_ONE_CAPABILITY = textwrap.dedent("""
    import functools
    import torch
    from mmvmamba_kernels import selective_scan_2d
    from mmvmamba_kernels.testing import errors, output_and_gradients, selective_scan_2d_arguments

    for dtype, tolerance in ((torch.float32, 2e-5), (torch.float64, 1e-13)):
        args = selective_scan_2d_arguments(2, 9, 8, 20, 6, 2, dtype=dtype)
        exact = {k: t.detach().double().requires_grad_() for k, t in args.items()}
        expected, actual = (
            output_and_gradients(functools.partial(selective_scan_2d, backend=name), a)
            for name, a in (("reference", exact), ("cpp", args))
        )
        found = errors(actual, expected)
        assert max(found.values()) < tolerance, found
""")


_CAPABILITIES = ("default", "avx2", "avx512")


@pytest.mark.parametrize("capability", _CAPABILITIES)
def test_every_instruction_set(capability, monkeypatch):
    highest = torch.backends.cpu.get_cpu_capability().lower()
    if highest == capability:
        exec(_ONE_CAPABILITY, {})
        return
    # PyTorch and the library would take a name for granted that the processor does not have.
    if highest in _CAPABILITIES[: _CAPABILITIES.index(capability)]:
        pytest.skip(f"the processor has {highest} at most")
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", capability)
    done = subprocess.run([sys.executable, "-c", _ONE_CAPABILITY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_automatic_choice_on_a_cpu(monkeypatch):
    args = arguments_2d((1, 9, 8, 20, 3, 1))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert torch.equal(selective_scan_2d(**args), scan_2d(**args))


def test_what_it_cannot_run_is_refused_with_the_reason():
    scan_2d(**arguments_2d((1, 2, 2, 1, 1, 64)))
    args = arguments_2d((1, 2, 2, 1, 1, 65))
    with pytest.raises(BackendError, match="at most 64 states per channel, A has 65"):
        scan_2d(**args)


def test_initial_and_last_state():
    args = selective_scan_arguments(2, 2, 17, 2, 67)
    args["initial_state"] = torch.randn(2, 34, 2, requires_grad=True)

    def joined(function, **tensors):
        return torch.cat(function(**tensors, return_last_state=True), 2)

    oracle = functools.partial(selective_scan_oracle, delta_softplus=True)
    functions = (functools.partial(joined, function) for function in (scan, oracle))
    compare(*functions, args, TOLERANCE[torch.float32])
