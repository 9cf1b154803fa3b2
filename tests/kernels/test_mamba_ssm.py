"""The optional mamba_ssm backend, against a stand-in with that package's interface.

The package itself needs a GPU and a compiler; where both are, its own kernels are tested.
"""

import dataclasses
import importlib.util
import sys
import types
from importlib.machinery import ModuleSpec

import pytest
import torch

from mmvmamba_kernels import BackendError, dispatch, selective_scan
from mmvmamba_kernels.backends import mamba_ssm
from mmvmamba_kernels.dispatch import Problem
from mmvmamba_kernels.selective_scan import reference
from mmvmamba_kernels.selective_scan.arguments import Arguments
from mmvmamba_kernels.testing import (
    errors,
    output_and_gradients,
    selective_scan_arguments,
    selective_scan_oracle,
)

GPU = Problem(torch.device("cuda"), torch.float16, states=16, work=10)
IMPLEMENTATION = "mmvmamba_kernels.selective_scan.mamba_ssm_impl"


class StandIn(torch.autograd.Function):
    """mamba-ssm's function: its checks of dtypes and layouts, the reference's numbers."""

    @staticmethod
    def forward(ctx, *arguments):
        u, delta, A, B, C, D, bias, _ = arguments
        assert u.dtype == delta.dtype == B.dtype == C.dtype
        assert all(t is None or t.dtype == torch.float32 for t in (A, D, bias))
        assert all(t is None or t.is_contiguous() for t in (u, delta, A, B, C, D, bias))
        out, carries = reference.forward(Arguments(*arguments, u.dtype), save_carries=True)
        ctx.arguments, ctx.carries = arguments, carries
        return out

    @staticmethod
    def backward(ctx, grad):
        grads = reference.backward(grad, ctx.carries, Arguments(*ctx.arguments, grad.dtype))
        return (*grads, None)


def stand_in_function(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
    assert z is None
    return StandIn.apply(u, delta, A, B, C, D, delta_bias, delta_softplus)


@pytest.fixture
def package(monkeypatch):
    """The stand-in under the package's name, allowed on the CPU."""
    names = ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.selective_scan_interface")
    for name in names:
        module = types.ModuleType(name)
        module.__spec__ = importlib.util.spec_from_loader(name, loader=None)
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules[names[-1]].selective_scan_fn = stand_in_function
    monkeypatch.delitem(sys.modules, IMPLEMENTATION, raising=False)
    monkeypatch.setattr(
        dispatch,
        "_registry",
        {
            "selective_scan": [
                dispatch.Backend(b.name, b.module, slow=b.slow, automatic=b.automatic)
                if b.name == "mamba_ssm"
                else b
                for b in dispatch._registry["selective_scan"]
            ]
        },
    )
    yield
    sys.modules.pop(IMPLEMENTATION, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("optional", [True, False])
def test_output_and_gradients(package, dtype, optional):
    arguments = selective_scan_arguments(2, 2, 3, 4, 17, dtype)
    if not optional:
        arguments = {k: v for k, v in arguments.items() if k not in ("D", "delta_bias")}

    def run(**tensors):
        return selective_scan(**tensors, delta_softplus=True, backend="mamba_ssm")

    actual = output_and_gradients(run, arguments)
    expected = output_and_gradients(
        lambda **t: selective_scan_oracle(**t, delta_softplus=True), arguments
    )
    # Conversions round; nothing else differs from the oracle.
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    assert all(actual[k].dtype == dtype for k in actual)
    assert max(errors(actual, expected).values()) < tolerance


def test_mixed_dtypes_and_a_wider_output(package):
    arguments = selective_scan_arguments(1, 1, 4, 2, 9)
    arguments["u"] = (arguments["u"].detach() * 1e5).half().clamp(-6e4, 6e4).requires_grad_()
    out = selective_scan(**arguments, out_dtype=torch.float32, backend="mamba_ssm")
    assert out.dtype == torch.float32
    expected = selective_scan_oracle(**arguments)
    torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1.0)


def test_strided_arguments(package):
    arguments = selective_scan_arguments(2, 1, 4, 2, 9)
    strided = {
        k: (v.detach().transpose(-1, -2).contiguous().transpose(-1, -2) if v.ndim > 1 else v)
        for k, v in arguments.items()
    }
    assert torch.equal(
        selective_scan(**strided, backend="mamba_ssm"),
        selective_scan(**arguments, backend="mamba_ssm"),
    )


def test_float64_beside_float32_is_refused(package):
    arguments = selective_scan_arguments(1, 1, 4, 2, 9)
    arguments["A"] = arguments["A"].double()
    with pytest.raises(TypeError, match="'mamba_ssm' computes in float32 and an argument is float"):
        selective_scan(**arguments, backend="mamba_ssm")


@pytest.mark.skipif(importlib.util.find_spec("mamba_ssm") is not None, reason="it is installed")
def test_without_the_package_the_answer_says_so():
    with pytest.raises(BackendError, match="mamba-ssm is not installed"):
        selective_scan(**selective_scan_arguments(1, 1, 1, 1, 3), backend="mamba_ssm")


@pytest.fixture
def any_algorithm():
    """PyTorch's default; the other tests ask for deterministic algorithms."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(before)


def test_what_it_cannot_run_is_refused_with_the_reason(monkeypatch, any_algorithm):
    monkeypatch.setattr(mamba_ssm.importlib.util, "find_spec", lambda name: ModuleSpec(name, None))

    def replace(**changes):
        return mamba_ssm.can_run(dataclasses.replace(GPU, **changes))

    assert replace() is None
    assert "on 'cpu'" in replace(device=torch.device("cpu"))
    assert "float64" in replace(dtype=torch.float64)
    assert "at most 256 states" in replace(states=257)
    torch.use_deterministic_algorithms(True)
    assert "not deterministic" in replace()


def test_it_is_never_chosen_unasked(monkeypatch):
    monkeypatch.setattr(mamba_ssm.importlib.util, "find_spec", lambda name: ModuleSpec(name, None))
    backends = dispatch._registry["selective_scan"]
    monkeypatch.setattr(
        dispatch,
        "_registry",
        {"selective_scan": [b for b in backends if b.name in ("mamba_ssm", "reference")]},
    )
    assert dispatch.resolve("selective_scan", "auto", GPU, quiet=True).__name__.endswith(
        ".reference"
    )


@pytest.mark.skipif(
    importlib.util.find_spec("mamba_ssm") is None or not torch.cuda.is_available(),
    reason="mamba-ssm or a GPU is missing",
)
@pytest.mark.parametrize("states", [1, 16])
def test_the_package_itself(states, any_algorithm):
    arguments = selective_scan_arguments(2, 2, 32, states, 300, device="cuda")
    actual = output_and_gradients(
        lambda **t: selective_scan(**t, delta_softplus=True, backend="mamba_ssm"), arguments
    )
    expected = output_and_gradients(
        lambda **t: selective_scan_oracle(**t, delta_softplus=True), arguments
    )
    # float32 sums over 300 positions, with the fast exponentials of the GPU.
    assert max(errors(actual, expected).values()) < 1e-4
