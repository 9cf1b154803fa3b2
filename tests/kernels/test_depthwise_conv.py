"""The depth-wise convolution, every backend that the machine has."""

import itertools
import os

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from mmvmamba_kernels import BackendError, depthwise_conv
from mmvmamba_kernels.backends.triton.support import interpreting
from mmvmamba_kernels.testing import (
    depthwise_conv_arguments,
    depthwise_conv_oracle,
    errors,
    output_and_gradients,
    relative_error,
)

# The deterministic algorithms that the fixtures ask for include cuBLAS's, which wants this.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
ACTIVATIONS = ("silu", "gelu", "relu", "none")

# float64 and float32: sums of ten products, and for weights of some hundred, each with half a unit
# in the last place. float16 and bfloat16: up to four roundings on the way to a gradient (in PyTorch
# of the convolution's result and of its gradient; of the result; and Triton's interpreter cuts
# bfloat16 off instead of rounding it), each of half a unit, 2**-11 and 2**-8.
TOLERANCE = {
    torch.float64: 1e-14,
    torch.float32: 4e-6,
    torch.float16: 2**-9,
    torch.bfloat16: 2**-6,
}
SHAPES = [
    (2, 5, 7, 5),
    (1, 1, 1, 1),
    (1, 1, 17, 3),
    (1, 5, 1, 3),
    (2, 2, 2, 33),
    (1, 3, 9, 64),
    (1, 7, 4, 31),
    (2, 4, 15, 2),
]

on_gpu = pytest.mark.skipif(not GPU, reason="no GPU: shapes too large for Triton's interpreter")
SLOW = pytest.mark.slow
TRITON = pytest.param("triton", marks=pytest.mark.triton)
BACKENDS = [None, "reference", TRITON]


def conv(**options):
    return lambda **tensors: depthwise_conv(**tensors, **options)


def check(arguments, backend, act="silu", tolerance=None):
    """Output and gradients against the oracle."""
    actual = output_and_gradients(conv(act=act, backend=backend), arguments)
    expected = output_and_gradients(
        lambda **tensors: depthwise_conv_oracle(**tensors, act=act), arguments
    )
    for name, tensor in actual.items():
        wanted = arguments["x" if name == "out" else name]
        assert (tensor.dtype, tensor.shape) == (wanted.dtype, wanted.shape)
    tolerance = tolerance or TOLERANCE[arguments["x"].dtype]
    found = errors(actual, expected)
    assert max(found.values()) < tolerance, found


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_the_oracle_is_the_convolution_of_pytorch(act):
    arguments = depthwise_conv_arguments(2, 5, 7, 3, dtype=torch.float64, device=DEVICE)
    functions = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu, "none": lambda z: z}

    def convolution(x, weight, bias):
        z = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1, groups=3)
        return functions[act](z).permute(0, 2, 3, 1)

    expected = output_and_gradients(convolution, arguments)
    actual = output_and_gradients(lambda **t: depthwise_conv_oracle(**t, act=act), arguments)
    assert max(errors(actual, expected).values()) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradients(shape, backend):
    check(depthwise_conv_arguments(*shape, device=DEVICE), backend)


@pytest.mark.triton
@pytest.mark.parametrize("channels", [65, 128])
def test_warps_of_64_lanes(channels, monkeypatch):
    from mmvmamba_kernels.depthwise_conv import triton_impl

    blocks = []
    monkeypatch.setattr(triton_impl, "lanes", lambda _: 64)

    def recorded(tiling):
        return lambda *values: blocks.append(values[2]) or tiling(*values)

    for name in ("tiling", "stacked_tiling"):
        monkeypatch.setattr(triton_impl, name, recorded(getattr(triton_impl, name)))
    check(depthwise_conv_arguments(1, 2, 3, channels, device=DEVICE), "triton")
    # Forward, and backward: no lane is left without a channel of a block.
    assert blocks == [64 if channels == 65 else 128, 64]


@pytest.mark.triton
@pytest.mark.parametrize(
    ("shape", "longest"),
    # Backwards one program for all maps; programs that begin and end in each row of a map.
    [((1, 19, 4, 3), 256), ((3, 1, 4, 3), 256), ((4, 2, 4, 3), 256), ((4, 3, 8, 3), 5)],
    ids=str,
)
def test_long_programs(shape, longest, monkeypatch):
    """As for so many maps that programs need not be short: here they have two rows at most."""
    from mmvmamba_kernels.depthwise_conv import triton_impl

    monkeypatch.setattr(triton_impl, "multiprocessors", lambda _: 0)
    monkeypatch.setattr(triton_impl, "_LONGEST_BACKWARD", longest)
    check(depthwise_conv_arguments(*shape, device=DEVICE), "triton")


@pytest.mark.parametrize(
    ("dtype", "act", "backend"),
    [
        *itertools.product(TOLERANCE, ACTIVATIONS, BACKENDS[:2]),
        # Of Triton's, two activations of each type, and two types of each activation.
        *(
            pytest.param(dtype, act, "triton", marks=[pytest.mark.triton, *[SLOW] * ((i + j) % 2)])
            for i, dtype in enumerate(TOLERANCE)
            for j, act in enumerate(ACTIVATIONS)
        ),
    ],
    ids=str,
)
def test_dtypes_and_activations(dtype, act, backend):
    # Two channel blocks, rows and columns left over.
    arguments = depthwise_conv_arguments(1, 3, 3, 33, dtype=dtype, device=DEVICE)
    check(arguments, backend, act)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_maps_with_float32_parameters(dtype, backend):
    # Three tiles for the Triton kernels, whose programs take two.
    arguments = depthwise_conv_arguments(1, 2, 17, 4, device=DEVICE)
    arguments["x"] = arguments["x"].detach().to(dtype).requires_grad_()
    check(arguments, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_double_argument_makes_sums_double(backend):
    arguments = depthwise_conv_arguments(1, 3, 5, 2, device=DEVICE)
    arguments["bias"] = arguments["bias"].detach().double().requires_grad_()
    check(arguments, backend, tolerance=1.2e-7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_without_a_bias(act, backend):
    arguments = depthwise_conv_arguments(2, 3, 2, 3, device=DEVICE)
    del arguments["bias"]
    check(arguments, backend, act)


@pytest.mark.parametrize("backend", BACKENDS)
def test_activations_far_from_zero(backend):
    arguments = depthwise_conv_arguments(1, 2, 3, 4, device=DEVICE)
    for act in ACTIVATIONS:
        for size in (30.0, 1e3, 1e18):
            tensors = {name: t.detach().clone() for name, t in arguments.items()}
            tensors["x"] *= size
            tensors = {name: t.requires_grad_() for name, t in tensors.items()}
            check(tensors, backend, act, tolerance=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("act", ["silu", "gelu", "relu"])
def test_sums_below_the_range_of_float16_are_not_nan(act, backend):
    arguments = depthwise_conv_arguments(1, 4, 5, 3, device=DEVICE)
    tensors = {name: t.detach() for name, t in arguments.items()}
    tensors["x"].fill_(-6e4)
    tensors["weight"].fill_(1.0)
    tensors = {name: t.half().requires_grad_() for name, t in tensors.items()}
    result = output_and_gradients(conv(act=act, backend=backend), tensors)
    for name, tensor in result.items():
        assert not tensor.any(), name


@pytest.mark.triton
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_large_float16_gradients_do_not_overflow_inside(act):
    """Derivatives reach 1.13 and gradients 65504: their product is not a float16 number."""
    arguments = depthwise_conv_arguments(1, 3, 3, 3, device=DEVICE)
    with torch.no_grad():
        arguments["weight"] /= 16
        arguments["bias"].fill_(1.5)
    arguments = {name: t.detach().half().requires_grad_() for name, t in arguments.items()}
    arguments["weight"] = arguments["weight"].detach().float().requires_grad_()
    leaves = [arguments["x"], arguments["weight"]]
    out = depthwise_conv(**arguments, act=act, backend="triton")
    exact = depthwise_conv_oracle(**arguments, act=act)
    grad = torch.full_like(out, 65504)
    actual = torch.autograd.grad(out, leaves, grad)
    expected = torch.autograd.grad(exact, leaves, grad.double())
    for a, e in zip(actual, expected, strict=True):
        assert relative_error(a, e) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_arguments(backend):
    arguments = depthwise_conv_arguments(2, 2, 3, 4, device=DEVICE)
    expected = output_and_gradients(conv(backend=backend), arguments)

    def beside_nan(tensor, dim):
        return torch.stack([tensor, torch.full_like(tensor, torch.nan)], dim).select(dim, 0)

    x, weight, bias = (arguments[name].detach() for name in ("x", "weight", "bias"))
    wide = torch.cat([torch.full_like(x, torch.nan), x, torch.full_like(x, torch.nan)], -1)
    others = [
        {"x": wide[..., 4:8]},
        {"x": beside_nan(x, 4)},
        {"x": beside_nan(x, 2)},
        {"x": x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)},
        {"x": x.transpose(1, 2).contiguous().transpose(1, 2)},
        {"weight": weight.contiguous(memory_format=torch.channels_last)},
        {"weight": weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)},
        {"weight": beside_nan(weight, 4), "bias": beside_nan(bias, 1)},
    ]
    for change in others:
        tensors = {name: change.get(name, t).detach() for name, t in arguments.items()}
        leaves = {name: t.requires_grad_() for name, t in tensors.items()}
        found = errors(output_and_gradients(conv(backend=backend), leaves), expected)
        assert max(found.values()) < TOLERANCE[torch.float32], (change, found)


@pytest.mark.triton
def test_a_strided_gradient_of_the_output():
    arguments = depthwise_conv_arguments(2, 3, 4, 5, device=DEVICE)
    leaves = list(arguments.values())
    out = depthwise_conv(**arguments, backend="triton")
    grad = torch.randn(2, 5, 3, 4, device=DEVICE).permute(0, 2, 3, 1)
    first = torch.autograd.grad(out, leaves, grad, retain_graph=True)
    second = torch.autograd.grad(out, leaves, grad.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend):
    arguments = depthwise_conv_arguments(0, 3, 4, 5, device=DEVICE)
    result = output_and_gradients(conv(backend=backend), arguments)
    assert result["out"].shape == result["x"].shape == (0, 3, 4, 5)
    assert not result["weight"].any()
    assert not result["bias"].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_deterministic(backend):
    shape = (1, 3, 3, 33) if interpreting() else (4, 56, 56, 96)
    arguments = depthwise_conv_arguments(*shape, device=DEVICE)
    first = output_and_gradients(conv(backend=backend), arguments)
    for _ in range(1 if interpreting() else 5):
        again = output_and_gradients(conv(backend=backend), arguments)
        assert all(torch.equal(again[name], first[name]) for name in first)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_gradcheck(act):
    arguments = depthwise_conv_arguments(1, 3, 4, 2, dtype=torch.float64, device=DEVICE)
    torch.autograd.gradcheck(
        lambda *tensors: depthwise_conv(*tensors, act=act, backend="reference"),
        tuple(arguments.values()),
    )


@pytest.mark.parametrize("backend", ["reference", TRITON])
def test_only_the_input_is_saved(backend):
    arguments = depthwise_conv_arguments(1, 9, 9, 8, device=DEVICE)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda t: t):
        depthwise_conv(**arguments, backend=backend)
    assert any(t is arguments["x"] for t in saved)
    assert sum(t.numel() for t in saved) == sum(t.numel() for t in arguments.values())


@pytest.mark.parametrize(
    ("bias", "backend"),
    [
        *((bias, "reference") for bias in (False, True)),
        pytest.param(False, "triton", marks=[pytest.mark.triton, SLOW]),
        pytest.param(True, "triton", marks=pytest.mark.triton),
    ],
)
def test_opcheck(bias, backend):
    arguments = depthwise_conv_arguments(2, 2, 1, 3, device=DEVICE)
    x, weight, shift = arguments.values()
    torch.library.opcheck(
        torch.ops.mmvmamba.depthwise_conv.default,
        (x, weight, shift if bias else None, "gelu", backend, True),
    )


@pytest.mark.parametrize("backend", ["reference", TRITON])
def test_a_named_backend_is_one_operator_of_a_compiled_graph(backend):
    arguments = depthwise_conv_arguments(2, 2, 3, 4, device=DEVICE)
    named = conv(backend=backend)
    graph, compiled = captured(named)
    expected = output_and_gradients(named, arguments)
    actual = output_and_gradients(compiled, arguments)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert "mmvmamba.depthwise_conv" in graph[0]
    assert "conv2d" not in graph[0]


@pytest.mark.triton(elsewhere=True)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_by_itself_it_is_the_convolution_of_pytorch(dynamic):
    graphs, compiled = captured(conv(act="silu"), dynamic=dynamic)
    # Sizes that differ from one another: a compiler takes equal ones for the same.
    for size in (5, 9) if dynamic else (5,):
        arguments = depthwise_conv_arguments(2, size, size + 1, 7, device=DEVICE)
        expected = output_and_gradients(conv(act="silu", backend="reference"), arguments)
        found = errors(output_and_gradients(compiled, arguments), expected)
        assert max(found.values()) < TOLERANCE[torch.float32], found
    assert len(graphs) == 1
    assert "conv2d" in graphs[0]
    assert "mmvmamba" not in graphs[0]


def captured(function, dynamic=None):
    """A list of the graphs' sources, and the function compiled as one graph."""
    from torch._dynamo.backends.debugging import aot_eager

    sources = []

    def backend(graph, inputs):
        sources.append(graph.code)
        return aot_eager(graph, inputs)

    return sources, torch.compile(function, fullgraph=True, backend=backend, dynamic=dynamic)


@pytest.mark.skipif(GPU or interpreting(), reason="backend=None is Triton here")
def test_on_the_cpu_there_is_no_operator_around_the_convolution():
    arguments = depthwise_conv_arguments(1, 3, 4, 2)
    out = depthwise_conv(**arguments)
    (grad,) = torch.autograd.grad(out.sum(), arguments["x"], create_graph=True)
    grad.sum().backward()
    with FlopCounterMode(display=False) as counter:
        depthwise_conv(**arguments)
    assert list(map(str, counter.get_flop_counts()["Global"])) == ["aten.convolution"]
    assert counter.get_total_flops() == 2 * 9 * out.numel()


@pytest.mark.triton(elsewhere=True)
def test_the_environment_names_a_backend(monkeypatch):
    arguments = depthwise_conv_arguments(1, 3, 4, 2, device=DEVICE)
    monkeypatch.setenv("MMVMAMBA_KERNELS_BACKEND", "triton")
    if not GPU and not interpreting():
        with pytest.raises(BackendError, match="BACKEND='triton': Triton needs a tensor on"):
            depthwise_conv(**arguments)
        return
    graphs, compiled = captured(conv())
    compiled(**arguments)
    assert "mmvmamba.depthwise_conv" in graphs[0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_casts_nothing(backend):
    arguments = depthwise_conv_arguments(2, 3, 4, 5, device=DEVICE)
    expected = output_and_gradients(conv(backend=backend), arguments)
    with torch.autocast(DEVICE, torch.bfloat16):
        actual = output_and_gradients(conv(backend=backend), arguments)
    assert actual["out"].dtype == torch.float32
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.triton(elsewhere=True)
@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_casts_nothing_in_a_compiled_graph(compiled):
    arguments = depthwise_conv_arguments(2, 2, 3, 4, dtype=torch.bfloat16, device=DEVICE)
    arguments["weight"] = arguments["weight"].detach().float().requires_grad_()
    function = captured(conv())[1] if compiled else conv(backend="reference")
    with torch.autocast(DEVICE, torch.float16):
        actual = output_and_gradients(function, arguments)
    assert {name: t.dtype for name, t in actual.items()} == {
        "out": torch.bfloat16,
        **{name: t.dtype for name, t in arguments.items()},
    }
    expected = output_and_gradients(depthwise_conv_oracle, arguments)
    assert max(errors(actual, expected).values()) < TOLERANCE[torch.bfloat16]


@pytest.mark.triton(elsewhere=True)
def test_meta_tensors_have_a_shape():
    arguments = depthwise_conv_arguments(2, 3, 4, 5)
    out = depthwise_conv(**{name: t.detach().to("meta") for name, t in arguments.items()})
    assert (out.shape, out.device.type) == ((2, 3, 4, 5), "meta")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(3, 4, 5)}, ValueError, r"x must be \(B, H, W, C\)"),
        ({"x": torch.ones(1, 0, 4, 5)}, ValueError, "H must be at least 1"),
        ({"x": torch.ones(1, 3, 4, 5, dtype=torch.int32)}, TypeError, "x must be float16"),
        ({"weight": torch.ones(5, 3, 3)}, ValueError, r"weight must be \(C, 1, 3, 3\)"),
        ({"weight": torch.ones(4, 1, 3, 3)}, ValueError, r"weight must be .* = \(5, 1, 3, 3\)"),
        ({"bias": torch.ones(4)}, ValueError, r"bias must be \(C,\) = \(5,\)"),
        ({"bias": 1.0}, TypeError, "bias must be a tensor, got float"),
        ({"act": "swish"}, ValueError, "act must be one of silu, gelu, relu, none, got 'swish'"),
        ({"backend": "cpp"}, BackendError, "depthwise_conv has no backend 'cpp'"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named(change, error, message):
    arguments = depthwise_conv_arguments(2, 3, 4, 5)
    with pytest.raises(error, match=message):
        depthwise_conv(**{**arguments, **change})


@pytest.mark.parametrize("multiprocessors", [1, 132])
@pytest.mark.parametrize("longest", [16, 64])
@pytest.mark.parametrize(("block", "columns"), [(32, 8), (64, 7), (128, 4)])
def test_programs_cover_the_map_once(block, columns, longest, multiprocessors):
    pytest.importorskip("triton", reason="Triton is not installed")
    from mmvmamba_kernels.depthwise_conv.triton_impl import tiling

    for height in (1, 3, 7, 14, 17, 56, 200):
        for width in (1, 4, 5, 7, 8, 28, 50, 1000):
            for batch, channels in ((1, 5), (128, 96), (2, 768)):
                shape = torch.Size((batch, height, width, channels))
                tiles = tiling(shape, columns, block, longest, multiprocessors)
                assert tiles.rows * (tiles.chunks - 1) < height <= tiles.rows * tiles.chunks
                assert tiles.columns * (tiles.strips - 1) < width <= tiles.columns * tiles.strips
                assert tiles.rows <= longest
                assert tiles.programs == batch * tiles.strips * tiles.chunks
                assert tiles.blocks * block >= channels > (tiles.blocks - 1) * block
                if tiles.chunks > -(-height // longest):
                    # Cut further than it must be: only for work, and not into single rows.
                    assert tiles.rows > 1
                    assert batch * tiles.strips * tiles.blocks < multiprocessors * 16


@pytest.mark.parametrize("multiprocessors", [1, 132])
@pytest.mark.parametrize(("together", "most"), [(1, 12), (2, 8)])
def test_backward_programs_cover_all_maps_once(together, most, multiprocessors):
    pytest.importorskip("triton", reason="Triton is not installed")
    from mmvmamba_kernels.depthwise_conv.triton_impl import stacked_tiling

    for height in (1, 7, 17, 56, 200):
        for width in (1, 7, 8, 50, 1000):
            for batch, channels in ((1, 5), (128, 96), (2, 768)):
                shape = torch.Size((batch, height, width, channels))
                tiles = stacked_tiling(shape, 7, 32, together, multiprocessors)
                total = batch * (height + 1)
                assert tiles.rows * (tiles.chunks - 1) < total <= tiles.rows * tiles.chunks
                assert tiles.columns * (tiles.strips - 1) < width <= tiles.columns * tiles.strips
                assert tiles.programs == tiles.strips * tiles.chunks
                assert tiles.blocks * 32 >= channels > (tiles.blocks - 1) * 32
                assert 2 <= tiles.rows <= 256
                slots = multiprocessors * most * together
                if tiles.rows < 256 and tiles.strips * tiles.blocks <= slots:
                    # All at once on the GPU.
                    assert tiles.programs * tiles.blocks <= slots


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (128, 56, 56, 96),
        (128, 28, 28, 192),
        (128, 14, 14, 384),
        (128, 7, 7, 768),
        (2, 200, 320, 96),
        (2, 25, 40, 768),
        (1, 1, 2**16, 33),
        (70_000, 2, 1, 3),
    ],
    ids=str,
)
def test_full_shapes(shape, dtype):
    """Against the reference in float32, which other tests hold against the oracle."""
    arguments = depthwise_conv_arguments(*shape, dtype=dtype, device=DEVICE)
    actual = output_and_gradients(conv(backend="triton"), arguments)
    wide = {name: t.detach().float().requires_grad_() for name, t in arguments.items()}
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        expected = output_and_gradients(conv(backend="reference"), wide)
    found = errors(actual, expected)
    # Gradients of parameters are sums over all positions.
    assert max(found.values()) < 10 * TOLERANCE[dtype], found


@on_gpu
def test_more_elements_than_32_bits_number():
    x = torch.zeros(1, 2**15, 2**11 + 1, 33, dtype=torch.bfloat16, device=DEVICE)
    assert x.numel() > 2**31
    end = torch.randn(1, 20, *x.shape[2:], device=DEVICE).bfloat16()
    x[:, -20:] = end
    tensors = depthwise_conv_arguments(1, 1, 1, 33, dtype=torch.bfloat16, device=DEVICE)
    weight, bias = tensors["weight"].detach(), tensors["bias"].detach()
    actual = depthwise_conv(x, weight, bias, backend="triton")[:, -19:]
    expected = depthwise_conv(end, weight, bias, backend="reference")[:, 1:]
    assert relative_error(actual, expected) < TOLERANCE[torch.bfloat16]


@on_gpu
def test_other_devices_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    check(depthwise_conv_arguments(1, 4, 5, 8, device="cuda:1"), "triton")
