"""The Triton backend, on a GPU where there is one, else through Triton's interpreter on the CPU."""

import math
import os

import pytest
import torch

from mmvmamba_kernels import BackendError, selective_scan, selective_scan_2d
from mmvmamba_kernels.backends.triton.support import interpreting
from mmvmamba_kernels.patterns import PATTERNS
from mmvmamba_kernels.testing import (
    errors,
    output_and_gradients,
    relative_error,
    selective_scan_2d_arguments,
    selective_scan_2d_oracle,
    selective_scan_arguments,
    selective_scan_oracle,
)

# The deterministic algorithms that the fixtures ask for include cuBLAS's, which wants this.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 2e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}

on_gpu = pytest.mark.skipif(not GPU, reason="no GPU: shapes too large for Triton's interpreter")


@pytest.fixture
def chunks(monkeypatch):
    """Paths are cut into the shortest chunks, as for a GPU with many processors."""
    from mmvmamba_kernels.backends.triton import scan as triton_scan

    monkeypatch.setattr(triton_scan, "multiprocessors", lambda _: 1000)
    monkeypatch.setattr(triton_scan, "_SHORTEST_CHUNK", 1)


def scan_2d(pattern):
    return lambda **tensors: selective_scan_2d(**tensors, pattern=pattern, backend="triton")


def arguments_2d(pattern, shape):
    return selective_scan_2d_arguments(*shape, len(PATTERNS[pattern]), device=DEVICE)


def check_2d(arguments, pattern, tolerance=None):
    """Output and gradients against the oracle."""
    actual = output_and_gradients(scan_2d(pattern), arguments)
    expected = output_and_gradients(
        lambda **tensors: selective_scan_2d_oracle(**tensors, pattern=pattern), arguments
    )
    for name, tensor in actual.items():
        assert tensor.dtype == (arguments["x"] if name == "out" else arguments[name]).dtype
    tolerance = tolerance or TOLERANCE[arguments["x"].dtype]
    found = errors(actual, expected)
    assert max(found.values()) < tolerance, found


@pytest.mark.triton
def test_2d_whole_paths():
    check_2d(arguments_2d("cross2d", (2, 3, 5, 5, 2, 1)), "cross2d")


@pytest.mark.triton
@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize(
    ("pattern", "shape"),
    [
        # batch, height, width, channels, rank, states
        ("cross2d", (2, 3, 5, 5, 2, 1)),
        ("cross2d", (1, 1, 11, 3, 1, 1)),
        ("cross2d", (1, 11, 1, 3, 1, 1)),
        ("bidi", (1, 2, 5, 2, 3, 1)),
        # Parts of those.
        pytest.param("unidi", (1, 3, 3, 2, 1, 1), marks=pytest.mark.slow),
        pytest.param("rows", (1, 2, 9, 2, 2, 1), marks=pytest.mark.slow),
        pytest.param("columns", (1, 9, 2, 2, 2, 1), marks=pytest.mark.slow),
    ],
)
def test_2d_output_and_gradients(pattern, shape):
    check_2d(arguments_2d(pattern, shape), pattern)


# Paths that are shorter than a group of positions, longer than one, and empty.
LISTS = {
    "permutations": [[4, 0, 7, 2, 9, 1, 3, 8, 5, 6], [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]],
    "parts": [[3, 7, 0, 5, 9, 1, 2, 8, 6], [4, 3, -1, -1, -1, -1, -1, -1, -1], [-1] * 9],
}


@pytest.mark.triton
@pytest.mark.parametrize(("kind", "states"), [("permutations", 1), ("parts", 1), ("parts", 2)])
def test_2d_lists_of_positions(kind, states, request):
    paths = LISTS[kind]
    arguments = selective_scan_2d_arguments(1, 2, 5, 3, 2, states, len(paths), device=DEVICE)
    lists = torch.tensor(paths, device=DEVICE)
    orders = [[[p for p in path if p >= 0]] for path in paths]
    expected = output_and_gradients(
        lambda **tensors: selective_scan_2d_oracle(**tensors, orders=orders), arguments
    )

    def check(tensors, tolerance):
        actual = output_and_gradients(
            lambda **t: selective_scan_2d(**t, paths=lists, backend="triton"), tensors
        )
        found = errors(actual, expected)
        assert max(found.values()) < tolerance, found

    check(arguments, TOLERANCE[torch.float32])
    request.getfixturevalue("chunks")
    check(arguments, TOLERANCE[torch.float32])
    if states == 1:
        # A buffer for each direction.
        low = {n: t.detach().bfloat16().requires_grad_() for n, t in arguments.items()}
        check(low, TOLERANCE[torch.bfloat16])


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_2d_dtypes(dtype):
    arguments = selective_scan_2d_arguments(1, 2, 5, 3, 2, 1, dtype=dtype, device=DEVICE)
    check_2d(arguments, "cross2d")


@pytest.mark.triton
@pytest.mark.parametrize("shape", [(1, 7, 3, 2, 2, 1), (1, 9, 3, 2, 1, 1)], ids=str)
def test_2d_groups_cross_lines(shape):
    """Of 7 positions, the shortest that are not counted as short; of 9, where rows are unpacked."""
    check_2d(selective_scan_2d_arguments(*shape, dtype=torch.bfloat16, device=DEVICE), "cross2d")


@pytest.mark.triton
def test_2d_warps_of_64_lanes(monkeypatch):
    from mmvmamba_kernels.backends.triton import scan as triton_scan

    monkeypatch.setattr(triton_scan, "lanes", lambda _: 64)
    check_2d(selective_scan_2d_arguments(1, 1, 3, 65, 1, 1, 2, device=DEVICE), "rows")


@pytest.mark.triton
@pytest.mark.parametrize("states", [1, 2])
def test_2d_low_precision_maps_with_float32_parameters(states):
    arguments = selective_scan_2d_arguments(1, 2, 5, 3, 2, states, device=DEVICE)
    for name in ("x", "proj"):
        arguments[name] = arguments[name].detach().bfloat16().requires_grad_()
    check_2d(arguments, "cross2d")


@pytest.mark.triton
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 1, 1, 1),
        (1, 2, 2, 33, 1, 1),
        (1, 2, 5, 2, 1, 2),
        (1, 1, 2, 64, 1, 1),
        (1, 2, 2, 2, 33, 1),
        (1, 2, 3, 2, 65, 1),
        (1, 1, 3, 2, 1, 17),
    ],
    ids=[
        "one element",
        "two channel blocks",
        "two states",
        "two blocks a program",
        "rank 33",
        "rank 65",
        "17 states",
    ],
)
def test_2d_sizes(shape):
    check_2d(selective_scan_2d_arguments(*shape, 2, device=DEVICE), "rows")


@pytest.mark.triton
def test_2d_many_states_take_some_images_at_a_time(monkeypatch):
    from mmvmamba_kernels.backends.triton import scan as triton_scan
    from mmvmamba_kernels.selective_scan_2d import triton_impl

    taken = []
    walk = triton_scan.scan_backward
    monkeypatch.setattr(triton_scan, "_UNSUMMED", 1000)
    monkeypatch.setattr(
        triton_impl,
        "scan_backward",
        lambda layout, *v: taken.append(layout.batch) or walk(layout, *v),
    )
    check_2d(selective_scan_2d_arguments(3, 1, 3, 2, 1, 5, 2, device=DEVICE), "rows")
    assert taken == [2, 1]


@pytest.mark.triton
def test_2d_strided_arguments():
    arguments = selective_scan_2d_arguments(2, 2, 3, 4, 2, 1, 2, device=DEVICE)
    expected = scan_2d("rows")(**arguments)
    arguments = {
        name: torch.stack([t, t.new_full(t.shape, math.nan)], -1)[..., 0]
        for name, t in arguments.items()
    }
    assert not any(t.is_contiguous() for t in arguments.values())
    assert torch.equal(scan_2d("rows")(**arguments), expected)


@pytest.mark.triton
@pytest.mark.usefixtures("chunks")
def test_offsets_of_64_bits_change_nothing(monkeypatch):
    from mmvmamba_kernels.backends.triton import scan as triton_scan

    arguments = selective_scan_2d_arguments(2, 9, 1, 2, 1, 1, 2, device=DEVICE)
    narrow = output_and_gradients(scan_2d("columns"), arguments)
    monkeypatch.setattr(triton_scan, "_NARROW", 0)
    wide = output_and_gradients(scan_2d("columns"), arguments)
    for name, tensor in narrow.items():
        assert torch.equal(tensor, wide[name]), name


@pytest.mark.triton
@pytest.mark.usefixtures("chunks")
def test_deterministic():
    shape = (2, 14, 14, 96, 6, 1) if GPU else (1, 2, 5, 2, 1, 1)
    arguments = selective_scan_2d_arguments(*shape, device=DEVICE)
    first = output_and_gradients(scan_2d("cross2d"), arguments)
    for _ in range(10 if GPU else 1):
        again = output_and_gradients(scan_2d("cross2d"), arguments)
        for name, tensor in first.items():
            assert torch.equal(tensor, again[name]), name


@pytest.mark.triton
def test_without_gradients_no_states_are_written(monkeypatch):
    from mmvmamba_kernels.backends.triton import scan as triton_scan

    guard = torch.zeros(4096, device=DEVICE)
    walk = triton_scan._Launch.walk

    def guarded(launch, entering, carries, *rest):
        assert carries.numel() == 0
        walk(launch, entering, guard[:0], *rest)

    monkeypatch.setattr(triton_scan._Launch, "walk", guarded)
    with torch.no_grad():
        scan_2d("rows")(**selective_scan_2d_arguments(1, 2, 3, 2, 1, 1, 2, device=DEVICE))
    assert not guard.any()


@pytest.mark.triton
def test_buffers_of_one_number_are_summed():
    from mmvmamba_kernels.backends.triton import scan as triton_scan

    parts = torch.arange(4.0, device=DEVICE).view(4, 1)
    assert triton_scan.sum_buffers(parts, torch.empty(1, device=DEVICE)).tolist() == [6.0]


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_low_rank_gradients_of_many_positions_channels_and_ranks(dtype):
    from mmvmamba_kernels.backends.triton.low_rank import low_rank_gradients

    shape, channels, rank, states = (1, 10, 26), 33, 17, 2
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    raw = torch.randn(2, 260, channels, device=DEVICE).to(dtype)
    factors = torch.randn(1, 260, 2, 2 * states, device=DEVICE).to(dtype)
    proj = torch.randn(*shape, 2, rank + 2 * states, device=DEVICE).to(dtype)
    weight = torch.randn(2, channels, rank, device=DEVICE).to(dtype)
    grad_proj = torch.empty_like(proj)
    grad_weight, grad_bias = low_rank_gradients(raw, factors, proj, weight, grad_proj, wide)
    low = proj.double().flatten(0, 2)[..., :rank]
    of_low = torch.einsum("kpd,kdr->pkr", raw.double(), weight.double())
    of_weight = torch.einsum("kpd,pkr->kdr", raw.double(), low)
    found = grad_proj.flatten(0, 2).split([rank, 2 * states], dim=2)
    assert torch.equal(found[1], factors[0])
    assert relative_error(found[0], of_low) < TOLERANCE[dtype]
    assert relative_error(grad_weight, of_weight) < TOLERANCE[dtype]
    assert relative_error(grad_bias[..., 0], raw.double().sum(1)) < TOLERANCE[wide]
    assert grad_weight.dtype == grad_bias.dtype == wide


@pytest.mark.triton
def test_2d_empty_batch():
    arguments = selective_scan_2d_arguments(0, 3, 4, 5, 2, 3, device=DEVICE)
    result = output_and_gradients(scan_2d("cross2d"), arguments)
    assert result["out"].shape == (0, 3, 4, 5)
    for name in ("dt_weight", "dt_bias", "A", "D"):
        assert not result[name].any()


@pytest.mark.triton
def test_float16_range():
    """Inputs of 6e4 and steps of 1e3 give no infinity where the result is in float32's range."""
    arguments = selective_scan_2d_arguments(1, 2, 5, 2, 1, 1, device=DEVICE)
    with torch.no_grad():
        arguments["x"].sign_().mul_(6e4)
        arguments["dt_bias"].fill_(1e3)
        arguments["D"].mul_(1e-2)
    arguments["x"] = arguments["x"].detach().half().requires_grad_()
    tensors = {name: t.detach() for name, t in arguments.items()}
    expected = selective_scan_2d_oracle(**tensors)
    # B so small that the sums of the four directions are within float16, the terms hardly.
    scale = 6e4 / expected.abs().max()
    tensors["proj"][..., 1] *= scale
    tensors["D"] *= scale
    expected = selective_scan_2d_oracle(**tensors)
    assert relative_error(selective_scan_2d(**tensors, backend="triton"), expected) < 2e-3
    leaves = {name: t.requires_grad_() for name, t in tensors.items()}
    grads = output_and_gradients(scan_2d("cross2d"), leaves)
    exact = output_and_gradients(selective_scan_2d_oracle, leaves)
    for name in leaves:
        assert grads[name][exact[name].abs() < 6e4].isfinite().all(), name


@pytest.mark.triton
def test_small_steps_keep_their_digits():
    """softplus(z) is about exp(z) for negative z, to the last digits but a few."""
    arguments = selective_scan_2d_arguments(1, 1, 8, 4, 1, 1, 2, device=DEVICE)
    tensors = {name: t.detach() for name, t in arguments.items()}
    tensors["D"].zero_()
    # The series ends between -3.47 and -3.4, where its last term counts most.
    for bias in (-16.0, -8.0, -4.0, -3.47, -3.4, 0.0, 19.9, 20.1):
        tensors["dt_weight"].zero_()
        tensors["dt_bias"].fill_(bias)
        tensors["A"].fill_(-1.0)
        tensors["proj"].abs_()
        tensors["x"].abs_()
        actual = selective_scan_2d(**tensors, pattern="rows", backend="triton").double()
        expected = selective_scan_2d_oracle(**tensors, pattern="rows")
        assert ((actual - expected).abs() / expected).max() < 1e-5, bias


def scan_1d(**options):
    return lambda **tensors: selective_scan(**tensors, **options, backend="triton")


def check_1d(arguments, **options):
    actual = output_and_gradients(scan_1d(**options), arguments)
    expected = output_and_gradients(
        lambda **tensors: selective_scan_oracle(**tensors, **options), arguments
    )
    found = errors(actual, expected)
    assert max(found.values()) < TOLERANCE[arguments["u"].dtype], found


@pytest.mark.triton
@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        # batch, groups, channels, states, length
        ((2, 2, 3, 1, 19), torch.float32),
        ((1, 1, 3, 2, 70), torch.float32),
        # The last chunk has a whole group of positions and a part of one.
        ((1, 1, 3, 2, 27), torch.float32),
        ((1, 2, 2, 16, 9), torch.bfloat16),
        ((1, 1, 2, 5, 9), torch.float64),
        ((1, 3, 2, 1, 1), torch.float16),
    ],
    ids=str,
)
def test_1d_output_and_gradients(shape, dtype):
    check_1d(selective_scan_arguments(*shape, dtype=dtype, device=DEVICE), delta_softplus=True)


@pytest.mark.triton
@pytest.mark.parametrize("absent", [("D",), ("delta_bias",), ("D", "delta_bias")])
@pytest.mark.parametrize("softplus", [False, True])
def test_1d_options(absent, softplus):
    arguments = selective_scan_arguments(1, 2, 2, 1, 9, device=DEVICE)
    if not softplus:
        arguments["delta"] = arguments["delta"].detach().abs().requires_grad_()
    for name in absent:
        del arguments[name]
    check_1d(arguments, delta_softplus=softplus)


@pytest.mark.triton
def test_1d_out_dtype():
    arguments = selective_scan_arguments(1, 1, 2, 1, 9, dtype=torch.float16, device=DEVICE)
    tensors = {name: t.detach() for name, t in arguments.items()}
    out = selective_scan(**tensors, out_dtype=torch.float32, backend="triton")
    assert out.dtype == torch.float32
    assert relative_error(out, selective_scan_oracle(**tensors)) < 1e-5


@pytest.mark.triton
def test_registration():
    arguments = selective_scan_2d_arguments(1, 2, 2, 2, 1, 1, 2, device=DEVICE)
    torch.library.opcheck(
        torch.ops.mmvmamba.selective_scan_2d.default,
        (*arguments.values(), None, "rows", "triton", True),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )
    compiled = torch.compile(scan_2d("rows"), fullgraph=True, backend="aot_eager")
    expected = output_and_gradients(scan_2d("rows"), arguments)
    for name, tensor in output_and_gradients(compiled, arguments).items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.triton(elsewhere=True)
def test_refusals():
    arguments = selective_scan_2d_arguments(1, 1, 1, 1, 1, 65, device=DEVICE)
    if GPU or interpreting():
        expected = "at most 64 states per channel, A has 65"
    else:
        expected = "needs a tensor on cuda or xpu, this one is on 'cpu'"
    with pytest.raises(BackendError, match=expected):
        selective_scan_2d(**arguments, backend="triton")


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        # batch, height, width, channels, rank, states
        (4, 56, 56, 96, 6, 1),
        (4, 28, 28, 192, 12, 1),
        (4, 14, 14, 384, 24, 1),
        (4, 7, 7, 768, 48, 1),
        (1, 200, 320, 96, 6, 1),
        (2, 56, 56, 192, 6, 16),
        (1, 13, 17, 31, 5, 64),
        (2, 1, 2**15, 16, 1, 1),
        (1, 2**10, 2**10, 16, 1, 1),
    ],
    ids=str,
)
def test_full_shapes(shape, dtype):
    """Against the reference in float32, which other tests hold against the oracle."""
    arguments = selective_scan_2d_arguments(*shape, dtype=dtype, device=DEVICE)
    actual = output_and_gradients(scan_2d("cross2d"), arguments)
    wide = {name: t.detach().float().requires_grad_() for name, t in arguments.items()}
    expected = output_and_gradients(
        lambda **tensors: selective_scan_2d(**tensors, backend="reference"), wide
    )
    found = errors(actual, expected)
    assert max(found.values()) < 5 * TOLERANCE[dtype], found


@on_gpu
def test_more_sequences_than_a_grid_axis_has_programs():
    arguments = selective_scan_2d_arguments(1, 70_000, 2, 4, 1, 1, 2, device=DEVICE)
    expected = output_and_gradients(
        lambda **tensors: selective_scan_2d(**tensors, pattern="rows", backend="reference"),
        arguments,
    )
    found = errors(output_and_gradients(scan_2d("rows"), arguments), expected)
    assert max(found.values()) < TOLERANCE[torch.float32], found


@on_gpu
def test_other_devices_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    arguments = selective_scan_2d_arguments(1, 4, 5, 8, 2, 1, device="cuda:1")
    check_2d(arguments, "cross2d")
