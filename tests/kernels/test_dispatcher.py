"""Calls pass PyTorch's dispatcher by where it would do nothing but call the function."""

import contextlib
import functools

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

from mmvmamba_kernels import layer_norm, selective_scan_2d
from mmvmamba_kernels.testing import (
    add_layer_norm_arguments,
    output_and_gradients,
    selective_scan_2d_arguments,
)


def layer_norm_arguments():
    tensors = add_layer_norm_arguments(2, 3, 4, 8)
    del tensors["branch"]
    return tensors


# By itself the first would be PyTorch's own operations on the CPU.
FUNCTIONS = {
    "layer_norm": (functools.partial(layer_norm, backend="reference"), layer_norm_arguments),
    "selective_scan_2d": (
        functools.partial(selective_scan_2d, backend="reference"),
        lambda: selective_scan_2d_arguments(2, 3, 4, 2, 1, 1),
    ),
}


@pytest.fixture(params=FUNCTIONS)
def name(request):
    return request.param


@pytest.fixture
def function(name):
    return FUNCTIONS[name][0]


@pytest.fixture
def arguments(name):
    return FUNCTIONS[name][1]()


class Passing(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Noting(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.add(str(function))
        return function(*args, **(kwargs or {}))


def test_both_ways_give_the_same_bits(name, function, arguments):
    results = []
    operators = {f"mmvmamba::{name}", f"mmvmamba::{name}_backward"}
    for mode, expected in ((contextlib.nullcontext(), set()), (Passing(), operators)):
        with profile(activities=[ProfilerActivity.CPU]) as profiler, mode:
            results.append(output_and_gradients(function, arguments))
        seen = {event.key for event in profiler.key_averages()}
        assert seen & operators == expected
        # Without an operator, profiles still have its name in the graph's node.
        assert (f"{name}Backward" in seen) == (not expected)
    direct, dispatched = results
    assert all(torch.equal(direct[k], dispatched[k]) for k in dispatched)


def test_modes_see_the_operator(name, function, arguments):
    with Noting() as mode:
        function(**arguments)
    assert any(f"mmvmamba.{name}" in seen for seen in mode.seen)


@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_tracers_see_the_operator(name, function, arguments, pre_dispatch):
    plain = {key: t.detach() for key, t in arguments.items()}
    graph = make_fx(lambda a: function(**a), pre_dispatch=pre_dispatch)(plain)
    assert f"mmvmamba.{name}" in graph.code


def test_traces_have_the_operator(name, function, arguments):
    keys = list(arguments)
    traced = torch.jit.trace(
        lambda *tensors: function(**dict(zip(keys, tensors, strict=True))),
        tuple(t.detach() for t in arguments.values()),
    )
    assert f"mmvmamba::{name}" in str(traced.inlined_graph)


def test_tensors_of_other_classes_have_their_say(function, arguments):
    """Those of this class have the dispatcher do everything with two tensors."""
    plain = {key: t.detach() for key, t in arguments.items()}
    out = function(**{key: TwoTensor(t, t.clone()) for key, t in plain.items()})
    assert isinstance(out, TwoTensor)
    expected = function(**plain)
    assert torch.equal(out.a, expected)
    assert torch.equal(out.b, expected)


def test_meta_tensors_have_a_shape(function, arguments):
    out = function(**{key: t.detach().to("meta") for key, t in arguments.items()})
    assert out.is_meta
    assert out.shape == arguments["x"].shape


def test_negated_views_are_negated(function, arguments):
    negated = {k: torch._neg_view(t.detach()).requires_grad_() for k, t in arguments.items()}
    assert all(t.is_neg() for t in negated.values())
    copies = {k: t.detach().resolve_neg().requires_grad_() for k, t in negated.items()}
    found, expected = (output_and_gradients(function, tensors) for tensors in (negated, copies))
    assert all(torch.equal(found[k], expected[k]) for k in expected)


def test_gradients_that_are_zero_or_batched(function, arguments):
    out = function(**arguments)
    leaves = list(arguments.values())
    zeros = torch.autograd.grad(out, leaves, torch._efficientzerotensor(out.shape), True)
    assert not any(t.any() for t in zeros)
    grads = torch.randn(3, *out.shape)
    batched = torch.autograd.grad(out, leaves, grads, True, is_grads_batched=True)
    for i, grad in enumerate(grads):
        single = torch.autograd.grad(out, leaves, grad, True)
        torch.testing.assert_close(tuple(t[i] for t in batched), single)


class WithoutGradient(torch.autograd.Function):
    """Passes a tensor on, and nothing back."""

    @staticmethod
    def forward(ctx, tensor):
        return tensor.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


@pytest.mark.parametrize("mode", [contextlib.nullcontext, Passing])
def test_where_nothing_comes_back_nothing_is_computed(function, arguments, mode):
    with mode():
        out = WithoutGradient.apply(function(**arguments))
        leaves = list(arguments.values())
        grads = torch.autograd.grad(out, leaves, torch.ones_like(out), allow_unused=True)
    assert all(grad is None for grad in grads)


def test_inference_mode(function, arguments):
    expected = function(**arguments).detach()
    with torch.inference_mode():
        assert torch.equal(function(**arguments), expected)
        fresh = {key: t.clone() for key, t in arguments.items()}
        assert torch.equal(function(**fresh), expected)
