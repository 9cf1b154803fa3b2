"""The CUDA kernels against the float64 loops: on a GPU, or without one compiled for the CPU.

`cuda_on_cpu` has the headers that make a C++ compiler take the same sources for a CPU: threads of a
warp are fibers that meet at every warp primitive. What such a run cannot show is speed, and the
last digits of a GPU's fast exponentials and logarithms.
"""

import ctypes
import functools
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from comparison import compare, doubled

from mmvmamba_kernels import BackendError, dispatch, selective_scan, selective_scan_2d
from mmvmamba_kernels.backends.native import build, cuda_scan, extension
from mmvmamba_kernels.patterns import PATTERNS
from mmvmamba_kernels.testing import (
    errors,
    output_and_gradients,
    selective_scan_2d_arguments,
    selective_scan_2d_oracle,
    selective_scan_arguments,
    selective_scan_oracle,
)

EMULATION = Path(__file__).parent / "cuda_on_cpu"


def gpu_and_compiler() -> bool:
    if not torch.cuda.is_available():
        return False
    try:
        build.find_nvcc()
    except build.BuildError:
        return False
    return True


ON_GPU = gpu_and_compiler()
DEVICE = "cuda" if ON_GPU else "cpu"
BACKEND = "cpp" if ON_GPU else "cuda_on_cpu"

emulated = pytest.mark.skipif(ON_GPU, reason="a real GPU cannot be told how to run blocks")

# Largest error over the largest value: some hundred roundings of 1.1e-16 and 6e-8 in sums of mixed
# sign, one rounding of the result in float16, and in bfloat16 one of every direction's as well.
TOLERANCE = {
    torch.float64: 1e-13,
    torch.float32: 2e-5,
    torch.bfloat16: 2**-7,
    torch.float16: 1.05 * 2**-11,
}

# (batch, H, W, D, R, N): one position, one wide, odd, prime; channels below, at and above a warp;
# ranks up to those that are a matrix product; paths below, at and above an interval and a chunk.
SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (2, 1, 67, 32, 3, 2),
    (1, 131, 1, 5, 17, 1),
    (2, 8, 8, 20, 6, 1),
    (1, 7, 19, 33, 8, 4),
    (1, 5, 3, 65, 9, 16),
    (1, 3, 2, 3, 64, 64),
    (1, 11, 13, 7, 65, 1),
    (35, 3, 2, 4, 2, 1),
]

scan = functools.partial(selective_scan, delta_softplus=True, backend=BACKEND)
scan_2d = functools.partial(selective_scan_2d, backend=BACKEND)


@pytest.fixture
def set_device(library):
    """Sets what the emulated device says of itself, and in which order it runs blocks."""

    def set_emulated(multiprocessors, last_block_first=False):
        if not ON_GPU:
            ctypes.CDLL(library).set_device(multiprocessors, last_block_first)

    yield set_emulated
    set_emulated(1)


def build_emulation(folder):
    """The library for the CPU."""
    flags = (
        f"-I{EMULATION}",
        *build._torch_flags(),
        *("-DMMVMAMBA_LIBRARY=mmvmamba_cuda_on_cpu", "-DMMVMAMBA_DEVICE=CPU"),
        *(build.STANDARD, "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas"),
    )
    units = [
        # PyTorch's headers take most of the time; what runs long is in the kernels.
        build.Unit("operators", "cuda/scan_ops.cpp", (*flags, "-O0")),
        build.Unit("device", str(EMULATION / "device.cpp"), (*flags, "-O2")),
        *(
            build.Unit(f"kernels, {dtype}", "cuda/scan_kernels.cu", (*flags, "-O1", *kernels))
            for dtype in build._MAP_DTYPES
            for kernels in [(f"-DMMVMAMBA_MAP={dtype}", "-x", "c++")]
        ),
    ]
    link_flags = [f"-L{Path(torch.__file__).parent / 'lib'}", "-lc10", "-ltorch_cpu"]
    return build.make(units, build.find_compiler(), link_flags, "libcuda_on_cpu.so", folder)


@pytest.fixture(scope="module", autouse=True)
def library(tmp_path_factory):
    """The library: built by the command for a GPU, else by a C++ compiler and chosen by name."""
    if ON_GPU:
        build.build_cuda()
        extension.load.cache_clear()
        assert extension.load("cuda") is None
        yield
        return
    try:
        path = build_emulation(tmp_path_factory.mktemp("cuda_on_cpu"))
    except build.BuildError as error:
        if "found no C++ compiler" in str(error):
            pytest.skip(str(error))
        raise
    torch.ops.load_library(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_scan, "operators", lambda: torch.ops.mmvmamba_cuda_on_cpu)
        for op in ("selective_scan", "selective_scan_2d"):
            module = f"mmvmamba_kernels.{op}.cuda_impl"
            backends = [*dispatch._registry[op], dispatch.Backend(BACKEND, module)]
            patch.setitem(dispatch._registry, op, backends)
        yield path


@pytest.fixture(params=[1, 64], ids=["whole_paths", "chunks"])
def multiprocessors(request, set_device):
    """So few that paths are walked as a whole, and so many that they are cut."""
    set_device(request.param)
    return request.param


def compare_2d(args, pattern, tolerance):
    compare(
        functools.partial(scan_2d, pattern=pattern),
        functools.partial(selective_scan_2d_oracle, pattern=pattern),
        args,
        tolerance,
    )


def arguments_2d(shape, pattern="cross2d", **kwargs):
    directions = len(PATTERNS[pattern])
    return selective_scan_2d_arguments(*shape, directions=directions, device=DEVICE, **kwargs)


def arguments_1d(shape, **kwargs):
    return selective_scan_arguments(*shape, device=DEVICE, **kwargs)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_2d_matches_the_definition(pattern, dtype, multiprocessors):
    args = arguments_2d((1, 17, 8, 40, 6, 2), pattern, dtype=dtype)
    compare_2d(args, pattern, TOLERANCE[dtype])


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_2d_of_any_size(shape, pattern, multiprocessors):
    dtype = torch.float64
    compare_2d(arguments_2d(shape, pattern, dtype=dtype), pattern, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("states", [1, 2, 4, 16, 64])
def test_2d_of_any_state_dimension(states, dtype, multiprocessors):
    args = arguments_2d((1, 5, 14, 34, 3, states), dtype=dtype)
    compare_2d(args, "cross2d", TOLERANCE[dtype])


def test_2d_of_mixed_dtypes_as_under_autocast():
    args = arguments_2d((2, 5, 6, 20, 3, 1))
    for name in ("x", "proj"):
        args[name] = args[name].detach().bfloat16().requires_grad_()
    compare_2d(args, "cross2d", TOLERANCE[torch.bfloat16])


def test_2d_of_mixed_dtypes_with_float64():
    args = arguments_2d((2, 5, 6, 20, 3, 1), dtype=torch.float64)
    args["x"] = args["x"].detach().half().requires_grad_()
    compare_2d(args, "cross2d", TOLERANCE[torch.float16])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "shape", [(2, 3, 20, 1, 65), (1, 1, 1, 1, 1), (2, 2, 33, 4, 130), (1, 35, 2, 7, 9)], ids=str
)
def test_1d_matches_the_definition(shape, dtype, multiprocessors):
    oracle = functools.partial(selective_scan_oracle, delta_softplus=True)
    compare(scan, oracle, arguments_1d(shape, dtype=dtype), TOLERANCE[dtype])


@pytest.mark.parametrize("softplus", [True, False])
@pytest.mark.parametrize("absent", [("D",), ("delta_bias",), ("D", "delta_bias")], ids="+".join)
def test_1d_with_absent_arguments(absent, softplus):
    args = arguments_1d((2, 2, 5, 2, 70), dtype=torch.float64)
    for name in ("delta", "delta_bias"):
        args[name] = args[name].detach().abs().requires_grad_()
    args = {name: t for name, t in args.items() if name not in absent}
    compare(
        functools.partial(scan, delta_softplus=softplus),
        functools.partial(selective_scan_oracle, delta_softplus=softplus),
        args,
        TOLERANCE[torch.float64],
    )


def test_1d_of_mixed_dtypes():
    # As mamba's layers have them, and with an output that is wider than the input.
    args = arguments_1d((2, 2, 20, 2, 70))
    for name in ("u", "B", "C"):
        args[name] = args[name].detach().bfloat16().requires_grad_()
    compare(
        functools.partial(scan, out_dtype=torch.float32),
        functools.partial(selective_scan_oracle, delta_softplus=True),
        args,
        TOLERANCE[torch.bfloat16],
    )


def test_1d_of_a_long_sequence(multiprocessors):
    args = arguments_1d((1, 1, 1, 1, 2**14))
    expected = output_and_gradients(
        functools.partial(selective_scan, delta_softplus=True, backend="reference"), doubled(args)
    )
    assert max(errors(output_and_gradients(scan, args), expected).values()) < 1e-4


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
    grad = torch.randn(2, 20, 7, 6, dtype=torch.float64, device=DEVICE).permute(0, 3, 2, 1)
    expected = scan_2d(**args)
    actual = scan_2d(**strange)
    assert torch.equal(actual, expected)
    wanted = torch.autograd.grad(expected, list(args.values()), grad.contiguous())
    found = torch.autograd.grad(actual, list(args.values()), grad)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_empty_batch():
    for function, args in (
        (scan_2d, arguments_2d((0, 3, 4, 5, 2, 2))),
        (scan, arguments_1d((0, 2, 5, 2, 70))),
    ):
        result = output_and_gradients(function, args)
        for name, t in args.items():
            assert result[name].shape == t.shape
            assert not result[name].any()


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


@pytest.mark.parametrize("raw", [-80.0, -20.0, -3.5, -3.4, -1e-3, 0.0, 1e-3, 19.9, 20.1, 1e3])
def test_softplus_and_its_slope_over_the_full_range(raw):
    # One position, A = 0 and unit weights: the output is delta, the gradient of delta its slope.
    one = torch.ones(1, 16, 1, device=DEVICE)
    raw = torch.full((1, 16, 1), raw, device=DEVICE).requires_grad_()
    A, weights = one[0] * 0, torch.ones(1, 1, 1, 1, device=DEVICE)
    out = scan(one, raw, A, weights, weights)
    exact = raw.detach().double()
    expected = torch.nn.functional.softplus(exact, threshold=20)
    slope = torch.where(exact > 20, 1.0, torch.sigmoid(exact))
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-37)
    out.sum().backward()
    torch.testing.assert_close(raw.grad.double(), slope, rtol=1e-5, atol=1e-37)


def test_nan_is_not_hidden():
    for name in ("x", "proj", "dt_weight", "dt_bias", "A", "D"):
        args = {k: t.detach() for k, t in arguments_2d((1, 3, 3, 2, 1, 1)).items()}
        args[name].view(-1)[0] = float("nan")
        assert scan_2d(**args).isnan().any(), name


@pytest.mark.parametrize("states", [1, 3])
@pytest.mark.parametrize("pattern", ["cross2d", "columns"])
def test_two_runs_agree_bit_for_bit(pattern, states, multiprocessors, set_device):
    args = arguments_2d((2, 11, 17, 40, 6, states), pattern)
    function = functools.partial(scan_2d, pattern=pattern)
    first = output_and_gradients(function, args)
    for run in range(10 if ON_GPU else 2):
        set_device(multiprocessors, last_block_first=run == 1)
        again = output_and_gradients(function, args)
        assert all(torch.equal(again[k], first[k]) for k in first)


def test_chunks_change_nothing_beyond_rounding(set_device):
    args = arguments_2d((1, 24, 24, 34, 6, 2), dtype=torch.float64)
    expected = output_and_gradients(selective_scan_2d_oracle, args)
    for count in (1, 2, 3, 8, 1000):
        set_device(count)
        found = errors(output_and_gradients(scan_2d, args), expected)
        assert max(found.values()) < TOLERANCE[torch.float64], (count, found)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_gradcheck_2d(pattern):
    args = arguments_2d((1, 3, 4, 2, 2, 2), pattern, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *a: scan_2d(*a, pattern=pattern), tuple(args.values()))


def test_gradcheck_1d():
    args = arguments_1d((1, 2, 2, 2, 5), dtype=torch.float64)
    assert torch.autograd.gradcheck(scan, tuple(args.values()))


def test_opcheck():
    args = tuple(arguments_2d((2, 5, 6, 3, 2, 2)).values())
    operator = torch.ops.mmvmamba.selective_scan_2d.default
    torch.library.opcheck(operator, (*args, None, "cross2d", BACKEND, True))
    args = tuple(arguments_1d((2, 2, 3, 2, 70)).values())
    operator = torch.ops.mmvmamba.selective_scan.default
    torch.library.opcheck(operator, (*args, True, torch.float32, BACKEND, True))


def test_what_the_library_cannot_run_is_refused_with_the_reason():
    x = torch.zeros(1, 4, 8, device=DEVICE)
    proj, rates = torch.zeros(4, 1, 3, device=DEVICE), torch.zeros(1, 1, 8, device=DEVICE)
    weight, rest = torch.zeros(1, 1, 8, device=DEVICE), (1, 2, 2, [0], True)
    forward = cuda_scan.operators().scan_forward
    wrong = [
        (x, None, proj, None, None, rates, None, *rest, x, None),
        (x.mT.contiguous().mT, None, proj, weight, None, rates, None, *rest, x, None),
        (x.half(), None, proj, weight, None, rates.double(), None, *rest, x, None),
        (x, None, proj, weight, None, rates, None, 1, 2, 2, [0, 0], True, x, None),
        (x, None, proj, weight, None, rates, None, *rest, x, x),
    ]
    reasons = ["dt weights", "contiguous channels", "dtypes", "a path for each", "carries"]
    for arguments, reason in zip(wrong, reasons, strict=True):
        with pytest.raises(RuntimeError, match=reason):
            forward(*arguments)


def test_the_automatic_choice_on_a_gpu(monkeypatch):
    # Triton comes first where it is; the compiled library is next.
    problem = dispatch.Problem(torch.device("cuda", 0), torch.float32, 1, 1)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(extension, "load", lambda device: {"cuda": None}[device])
    monkeypatch.setattr(extension, "_no_kernels_for", lambda _: None)
    for op in ("selective_scan", "selective_scan_2d"):
        names = dispatch.available_backends(op)
        assert names.index("triton") < names.index("cpp") < names.index("reference")
        backend = next(b for b in dispatch._registry[op] if b.name == "cpp")
        assert backend.can_run(problem) is None
    monkeypatch.setattr(extension, "load", lambda _: "it is not built; run: this")
    assert extension.can_run(problem) == "it is not built; run: this"


@emulated
def test_offsets_beyond_32_bits(tmp_path):
    # Maps in files of 8 GiB that are almost all hole: four positions, 2^30 elements apart.
    distance, channels = 2**30, 33

    def spread(name):
        storage = torch.from_file(
            str(tmp_path / name), shared=True, size=4 * distance, dtype=torch.bfloat16
        )
        return storage.as_strided((1, 4, channels), (channels, distance, 1))

    args = {k: t.detach() for k, t in arguments_2d((1, 2, 2, channels, 2, 1), "rows").items()}
    x = args["x"].bfloat16().flatten(1, 2)
    proj = args["proj"].flatten(0, 2)[:, :1].contiguous()
    parameters = (args["dt_weight"].mT, args["dt_bias"], args["A"].mT, args["D"])
    weight, bias, rates, skip = (t[:1].contiguous() for t in parameters)
    outputs = []
    for map_in, map_out in ((x, torch.empty_like(x)), (spread("x").copy_(x), spread("y"))):
        cuda_scan.operators().scan_forward(
            map_in, None, proj, weight, bias, rates, skip, 1, 2, 2, [0], True, map_out, None
        )
        outputs.append(map_out)
    assert torch.equal(*outputs)


# Every argument ends where memory that must not be touched begins.
_GUARDED = textwrap.dedent("""
    import ctypes
    import mmap
    import sys
    import torch
    from mmvmamba_kernels.backends.native import cuda_scan
    from mmvmamba_kernels.selective_scan_2d import cuda_impl
    from mmvmamba_kernels.selective_scan_2d.arguments import Arguments
    from mmvmamba_kernels.testing import selective_scan_2d_arguments

    torch.ops.load_library(sys.argv[1])
    cuda_scan.operators = lambda: torch.ops.mmvmamba_cuda_on_cpu
    libc = ctypes.CDLL(None, use_errno=True)
    pages = []

    def guarded(t):
        size = -(-t.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        memory = mmap.mmap(-1, size + mmap.PAGESIZE)
        pages.append(memory)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        assert libc.mprotect(ctypes.c_void_p(address + size), mmap.PAGESIZE, 0) == 0
        copy = torch.frombuffer(memory, dtype=t.dtype, count=t.numel(), offset=size - t.nbytes)
        return copy.view(t.shape).copy_(t.detach())

    for shape in ((2, 7, 11, 33, 6, 1), (1, 9, 1, 3, 2, 5), (1, 5, 13, 40, 65, 1)):
        for pattern, count in (("cross2d", 1), ("cross2d", 64), ("columns", 64)):
            ctypes.CDLL(sys.argv[1]).set_device(count, False)
            directions = 4 if pattern == "cross2d" else 2
            arguments = selective_scan_2d_arguments(*shape, directions)
            arguments = {name: guarded(t) for name, t in arguments.items()}
            scan = Arguments(**arguments, pattern=pattern)
            out, carries = cuda_impl.forward(scan, save_carries=True)
            grads = cuda_impl.backward(guarded(out), guarded(carries), scan)
            assert all(g.isfinite().all() for g in grads)
""")


@emulated
def test_nothing_is_read_behind_the_arguments(library):
    done = subprocess.run(
        [sys.executable, "-c", _GUARDED, str(library)],
        capture_output=True,
        text=True,
        env=dict(os.environ),
    )
    assert done.returncode == 0, done.stderr


def test_threads_that_do_not_meet_are_noticed(tmp_path):
    # The emulation itself: a barrier that half of a warp passes by is an error, not a hang.
    source = tmp_path / "kernel.cpp"
    source.write_text(
        '#include "cuda_runtime.h"\n'
        "__global__ void kernel(int) { if (threadIdx.x < 16) __syncwarp(); }\n"
        "int main() {\n"
        "  int argument = 0;\n"
        "  void* arguments[] = {&argument};\n"
        "  try { cudaLaunchKernel(kernel, dim3(1), dim3(32), arguments, 0, nullptr); }\n"
        "  catch (const std::exception&) { return 3; }\n"
        "  return 0;\n"
        "}\n"
    )
    program = tmp_path / "program"
    command = [*build.find_compiler(), f"-I{EMULATION}", build.STANDARD, str(source)]
    build.run([*command, str(EMULATION / "device.cpp"), "-o", str(program)])
    assert subprocess.run([program]).returncode == 3


def test_a_gpu_without_the_library_is_told_what_to_run(monkeypatch, tmp_path):
    monkeypatch.setattr(extension, "search_path", lambda: (tmp_path,))
    extension.load.cache_clear()
    problem = dispatch.Problem(torch.device("cuda", 0), torch.float32, 1, 1)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    reason = extension.can_run(problem)
    extension.load.cache_clear()
    assert reason.endswith("is not built; run: python -m mmvmamba_kernels.build --cuda")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built for CUDA" in extension.can_run(problem)
    many = dispatch.Problem(torch.device("cuda", 0), torch.float32, 65, 1)
    assert "at most 64 states" in extension.can_run(many)


def test_a_named_backend_is_never_replaced():
    with pytest.raises(BackendError, match="no backend 'cuda'"):
        selective_scan_2d(**arguments_2d((1, 2, 2, 1, 1, 1)), backend="cuda")
