"""Layer normalisation and the residual sum before it, every backend that the machine has."""

import pytest
import torch

from mmvmamba_kernels import BackendError, add_layer_norm, layer_norm
from mmvmamba_kernels.testing import add_layer_norm_oracle, errors

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"

# The rounding of one number of the dtype, and for float32 and float64 of sums over C numbers.
TOLERANCE = {
    torch.float64: 1e-13,
    torch.float32: 3e-6,
    torch.float16: 2**-10,
    torch.bfloat16: 2**-7,
}
SHAPES = [(2, 3, 5, 96), (1, 1, 1, 2), (3, 1, 7, 33), (1, 17, 2, 192), (2, 70, 8), (5, 3072)]

BACKENDS = [None, "reference", pytest.param("triton", marks=pytest.mark.triton)]


def arguments(shape, dtype=torch.float32, branch_dtype=None, scale=False, seed=0):
    """Leaves that need gradients; parameters are float32 beside narrower maps."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    parameters = torch.promote_types(dtype, torch.float32)
    tensors = {
        "x": (normal(*shape) + 3).to(DEVICE, dtype),
        "branch": normal(*shape).to(DEVICE, branch_dtype or dtype),
        "weight": normal(shape[-1]).to(DEVICE, parameters),
        "bias": normal(shape[-1]).to(DEVICE, parameters),
    }
    tensors = {name: t.requires_grad_() for name, t in tensors.items()}
    if scale:
        # Drop path drops the first sample.
        factors = torch.full((shape[0],), 1.25, device=DEVICE)
        factors[0] = 0
        tensors["scale"] = factors
    return tensors


def run(function, tensors, **options):
    """Outputs and gradients for a random gradient of each, alike for every dtype."""
    total, out = function(**tensors, **options)
    generator = torch.Generator().manual_seed(1)
    grads = [
        torch.randn(t.shape, generator=generator).bfloat16().to(t.device, t.dtype)
        for t in (total, out)
    ]
    leaves = {name: t for name, t in tensors.items() if t.requires_grad}
    gradients = torch.autograd.grad([total, out], list(leaves.values()), grads)
    return {"total": total, "out": out} | dict(zip(leaves, gradients, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sum_norm_and_gradients(shape, scale, backend):
    tensors = arguments(shape, scale=scale)
    actual = run(add_layer_norm, tensors, backend=backend)
    expected = run(add_layer_norm_oracle, tensors)
    found = errors(actual, expected)
    assert max(found.values()) < TOLERANCE[torch.float32] * max(1, shape[-1] / 96), found


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_dtypes(dtype, backend):
    tensors = arguments((2, 9, 5, 48), dtype, scale=True)
    actual = run(add_layer_norm, tensors, backend=backend)
    assert actual["total"].dtype == actual["out"].dtype == actual["x"].dtype == dtype
    assert actual["weight"].dtype == tensors["weight"].dtype
    expected = run(add_layer_norm_oracle, tensors)
    # The norm of a rounded sum differs by that rounding over the standard deviation, about one.
    found = errors(actual, expected)
    assert max(found.values()) < 4 * TOLERANCE[dtype], found


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_float32_stream_with_a_narrow_branch_and_output(backend):
    tensors = arguments((2, 9, 5, 48), torch.float32, branch_dtype=torch.bfloat16)
    actual = run(add_layer_norm, tensors, backend=backend, out_dtype=torch.bfloat16)
    assert actual["total"].dtype == actual["x"].dtype == torch.float32
    assert actual["out"].dtype == actual["branch"].dtype == torch.bfloat16
    expected = run(add_layer_norm_oracle, tensors)
    found = errors(actual, expected)
    for name, value in found.items():
        narrow = name in ("out", "branch")
        assert value < TOLERANCE[torch.bfloat16 if narrow else torch.float32], found


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_branch(backend):
    tensors = arguments((2, 9, 5, 48))
    del tensors["branch"]
    grad = torch.randn_like(tensors["x"])
    actual = layer_norm(**tensors, backend=backend)
    expected = torch.nn.functional.layer_norm(
        tensors["x"].double(), (48,), tensors["weight"].double(), tensors["bias"].double()
    )
    leaves = list(tensors.values())
    pairs = zip(
        [actual, *torch.autograd.grad(actual, leaves, grad)],
        [expected, *torch.autograd.grad(expected, leaves, grad.double())],
        strict=True,
    )
    for a, e in pairs:
        assert (a.double() - e).abs().max() < TOLERANCE[torch.float32] * e.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_output_alone_is_differentiated(backend):
    tensors = arguments((2, 3, 8))
    for pick in (0, 1):
        loss = add_layer_norm(**tensors, backend=backend)[pick]
        expected = add_layer_norm_oracle(**tensors)[pick]
        leaves = [tensors["x"], tensors["branch"]]
        grad = torch.randn_like(loss)
        a = torch.autograd.grad(loss, leaves, grad)
        e = torch.autograd.grad(expected, leaves, grad.double())
        for actual, wanted in zip(a, e, strict=True):
            torch.testing.assert_close(actual.double(), wanted.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_float16_values_do_not_overflow_inside(backend):
    tensors = arguments((2, 3, 64), torch.float16)
    tensors["x"] = (tensors["x"].detach() * 8000).requires_grad_()
    actual = run(add_layer_norm, tensors, backend=backend)
    expected = run(add_layer_norm_oracle, tensors)
    found = errors(actual, expected)
    assert max(found.values()) < 4 * TOLERANCE[torch.float16], found


@pytest.mark.triton
def test_the_longest_rows_of_triton():
    tensors = arguments((1, 2**16))
    _, out = add_layer_norm(**tensors, backend="triton")
    _, expected = add_layer_norm_oracle(**tensors)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="at most 65536 channels, got 65537"):
        add_layer_norm(**arguments((1, 2**16 + 1)), backend="triton")


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_empty_batches_and_repeats(backend):
    tensors = arguments((2, 6, 5, 16))
    plain = run(add_layer_norm, tensors, backend=backend)
    strided = {
        name: t.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_()
        for name, t in tensors.items()
    }
    for other in (strided, tensors):
        again = run(add_layer_norm, other, backend=backend)
        assert all(torch.equal(again[name], plain[name]) for name in plain)
    empty = run(add_layer_norm, arguments((0, 4, 16)), backend=backend)
    assert empty["out"].shape == (0, 4, 16)
    assert not empty["weight"].any()


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=pytest.mark.triton)])
def test_the_operator_keeps_its_promises_to_pytorch(backend):
    tensors = arguments((2, 3, 8), scale=True)
    overload = torch.ops.mmvmamba.layer_norm.default
    narrow = torch.bfloat16
    torch.library.opcheck(
        overload,
        (
            *(tensors[name] for name in ("x", "branch", "scale", "weight", "bias")),
            1e-5,
            narrow,
            torch.float32,
            backend,
        ),
    )
    x, weight, bias = (tensors[name] for name in ("x", "weight", "bias"))
    torch.library.opcheck(
        overload, (x, None, None, weight, bias, 1e-5, torch.float32, None, backend)
    )
    out = layer_norm(x, weight, bias, backend=backend)
    (grad,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated only once"):
        grad.sum().backward()


@pytest.mark.triton(elsewhere=True)
def test_compiled_it_is_plain_operations_in_one_graph():
    tensors = arguments((2, 4, 8), scale=True)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(add_layer_norm, fullgraph=True, backend=backend)
    expected = run(add_layer_norm, tensors, backend="reference")
    found = errors(run(compiled, tensors), expected)
    assert max(found.values()) < TOLERANCE[torch.float32], found
    assert len(graphs) == 1
    assert "layer_norm" in graphs[0].code
    assert "mmvmamba" not in graphs[0].code


@pytest.mark.triton(elsewhere=True)
@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
def test_autocast_casts_nothing(precision):
    tensors = arguments((2, 4, 8))
    expected = add_layer_norm(**tensors)
    with torch.autocast(DEVICE, precision):
        actual = add_layer_norm(**tensors)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, e)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(7)}, r"x must be \(\.\.\., C\) with C = 7"),
        ({"bias": torch.ones(7)}, r"bias must be \(C,\)"),
        ({"branch": torch.ones(2, 3, 7)}, "branch must be the shape of x"),
        ({"scale": torch.ones(3)}, r"scale must be \(B,\)"),
        ({"x": torch.ones(8)}, r"x must be \(\.\.\., C\)"),
    ],
)
def test_shapes_that_do_not_fit_are_named(change, message):
    tensors = arguments((2, 3, 8)) | {k: v.to(DEVICE) for k, v in change.items()}
    with pytest.raises(ValueError, match=message):
        add_layer_norm(**tensors)


def test_wrong_dtypes_and_backends_are_named():
    tensors = arguments((2, 3, 8))
    with pytest.raises(TypeError, match="out_dtype must be a floating-point"):
        add_layer_norm(**tensors, out_dtype=torch.int32)
    with pytest.raises(BackendError, match="layer_norm has no backend 'cuda'"):
        add_layer_norm(**tensors, backend="cuda")
