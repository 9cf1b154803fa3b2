"""The 2D scan with its normalisation: the same as one after the other, wherever it runs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mmvmamba_kernels import layer_norm, selective_scan_2d, selective_scan_2d_norm
from mmvmamba_kernels.testing import (
    errors,
    output_and_gradients,
    selective_scan_2d_norm_arguments,
    selective_scan_2d_norm_oracle,
    selective_scan_2d_oracle,
)

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# In one process with Triton's operator, in one without.
pytestmark = pytest.mark.triton(elsewhere=True)
# Those of the scan, beside which the normalisation's are small.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 4e-2}


def arguments(dtype=torch.float32, batch=1, shape=(2, 3, 6, 2, 1), **options):
    return selective_scan_2d_norm_arguments(batch, *shape, dtype=dtype, device=DEVICE, **options)


def one_after_the_other(norm_weight, norm_bias, **scan):
    return layer_norm(selective_scan_2d(**scan), norm_weight, norm_bias)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_output_and_gradients(dtype):
    # Triton's interpreter takes twice as long for two.
    tensors = arguments(dtype, batch=2 if dtype == torch.float32 else 1)
    actual = output_and_gradients(selective_scan_2d_norm, tensors)
    assert all(t.dtype == (tensors.get(k, tensors["x"])).dtype for k, t in actual.items())
    found = errors(actual, output_and_gradients(selective_scan_2d_norm_oracle, tensors))
    assert max(found.values()) < TOLERANCE[dtype], found


def test_sums_beyond_float16_are_normalised():
    """The scan's sum lies outside of float16's range, its normalisation and gradients do not."""
    tensors = arguments(torch.float16)
    for name in ("x", "D"):
        tensors[name] = (100 * tensors[name].detach()).requires_grad_()
    scan = {name: t.float() for name, t in tensors.items() if "norm" not in name}
    assert selective_scan_2d_oracle(**scan).abs().max() > torch.finfo(torch.float16).max
    found = errors(
        output_and_gradients(selective_scan_2d_norm, tensors),
        output_and_gradients(selective_scan_2d_norm_oracle, tensors),
    )
    assert max(found.values()) < TOLERANCE[torch.float16], found


@pytest.mark.parametrize(
    ("dtype", "pattern"),
    [
        (torch.float32, "unidi"),
        (torch.bfloat16, "bidi"),
        pytest.param(torch.float32, "bidi", marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, "unidi", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_same_bit_for_bit_as_one_after_the_other(dtype, pattern):
    tensors = arguments(dtype, shape=(2, 3, 8, 1, 2))

    def run(function):
        return output_and_gradients(lambda **t: function(**t, pattern=pattern), tensors)

    fused, separate = run(selective_scan_2d_norm), run(one_after_the_other)
    assert all(torch.equal(fused[name], separate[name]) for name in fused)


def test_what_is_saved_only_where_gradients_are_needed():
    tensors = {k: t.detach() for k, t in arguments(torch.bfloat16).items()}
    with torch.inference_mode():
        wide = selective_scan_2d_norm(**tensors, out_dtype=torch.float32)
        expected = layer_norm(
            selective_scan_2d(**{k: t for k, t in tensors.items() if "norm" not in k}),
            tensors["norm_weight"],
            tensors["norm_bias"],
            out_dtype=torch.float32,
        )
    assert wide.dtype == torch.float32
    assert torch.equal(wide, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_sum_makes_the_result_again(dtype):
    tensors = arguments(dtype)
    found = []

    def run(**kwargs):
        out, total = selective_scan_2d_norm(**kwargs, return_sum=True)
        found.append(total)
        return out

    expected = output_and_gradients(selective_scan_2d_norm, tensors)
    actual = output_and_gradients(run, tensors)
    assert all(torch.equal(actual[k], expected[k]) for k in expected)
    (total,) = found
    assert not total.requires_grad
    norm = tensors["norm_weight"], tensors["norm_bias"]
    out = run(**tensors)
    assert torch.equal(layer_norm(total, *norm, out_dtype=dtype), out)
    with torch.no_grad():
        assert torch.equal(run(**tensors), out)
    assert found[-1] is None


def test_flops_are_those_of_the_scan():
    with FlopCounterMode(display=False) as counter:
        selective_scan_2d_norm(**arguments(batch=2))
    assert counter.get_total_flops() == 4 * 2 * 2 * 3 * 6 * (9 + 1)


def test_compiled_it_is_the_scan_and_plain_operations():
    graphs = []

    def backend(graph, _):
        graphs.append(graph.code)
        return graph.forward

    tensors = arguments()
    compiled = torch.compile(selective_scan_2d_norm, fullgraph=True, backend=backend)
    actual = output_and_gradients(compiled, tensors)
    found = errors(actual, output_and_gradients(selective_scan_2d_norm_oracle, tensors))
    assert max(found.values()) < TOLERANCE[torch.float32], found
    (code,) = graphs
    assert "mmvmamba.selective_scan_2d.default" in code
    assert "selective_scan_2d_norm" not in code


@pytest.mark.triton
def test_the_operator_keeps_its_promises_to_pytorch():
    overload = torch.ops.mmvmamba.selective_scan_2d_norm.default
    # It runs the operator again and again.
    tensors = arguments(shape=(1, 2, 3, 1, 1))
    torch.library.opcheck(overload, (*tensors.values(), 1e-5, torch.float32, "cross2d", True))
    plain = tuple(t.detach() for t in tensors.values())
    torch.library.opcheck(overload, (*plain, 1e-5, torch.bfloat16, "bidi", False))
    out = selective_scan_2d_norm(**tensors)
    (grad,) = torch.autograd.grad(out.sum(), tensors["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated only once"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"norm_weight": torch.ones(5)}, ValueError, "weight"),
        ({"out_dtype": torch.int32}, TypeError, "out_dtype must be a floating-point"),
        ({"pattern": "spiral"}, ValueError, "pattern must be one of cross2d"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    change = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in change.items()}
    with pytest.raises(error, match=message):
        selective_scan_2d_norm(**(arguments() | change))
