"""Layers on maps: the same numbers whatever route the device takes."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from mmvmamba.models import layers


@pytest.mark.parametrize("shape", [(2, 5, 7, 12), (1, 1, 1, 12), (0, 4, 4, 12), (3, 1, 9, 12)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("route", [True, False])
def test_linear_and_gradients_equal_torch_in_float64(shape, bias, route, monkeypatch):
    if route and not layers._MKL_AND_ONEDNN:
        pytest.skip("this PyTorch has no MKL or no oneDNN, so there is one route only")
    monkeypatch.setattr(layers, "_MKL_AND_ONEDNN", route)
    torch.manual_seed(0)
    module = layers.Linear(12, 20, bias=bias)
    x = torch.randn(shape, requires_grad=True)
    y = module(x)
    grad = torch.randn_like(y)
    grads = torch.autograd.grad(y, [x, *module.parameters()], grad)

    doubles = [t.detach().double().requires_grad_() for t in (x, *module.parameters())]
    expected = F.linear(*doubles)
    expected_grads = torch.autograd.grad(expected, doubles, grad.double())
    # Sums of 12 (outputs) to 70 (weights) products in float32, of numbers near one.
    for actual, wanted in zip([y, *grads], [expected, *expected_grads], strict=True):
        torch.testing.assert_close(actual, wanted.float(), rtol=1e-5, atol=1e-5)


def test_a_channels_last_map_stays_one_without_a_copy():
    y = layers.Linear(8, 24)(torch.randn(2, 6, 5, 8))
    assert y.shape == (2, 6, 5, 24)
    assert y.is_contiguous()


def test_other_dtypes_keep_to_the_matrix_product():
    module = layers.Linear(8, 16).double()
    x = torch.randn(1, 3, 4, 8, dtype=torch.double)
    torch.testing.assert_close(module(x), F.linear(x, module.weight, module.bias), rtol=0, atol=0)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("frozen", [(), (0,), (1, 2)])
def test_linear_of_gelu_is_what_pytorch_computes(autocast, frozen):
    torch.manual_seed(0)
    tensors = [torch.randn(2, 5, 7, 24), torch.randn(12, 24), torch.randn(12)]
    if autocast:
        tensors[0] = tensors[0].to(autocast)
    for i, tensor in enumerate(tensors):
        tensor.requires_grad_(i not in frozen)
    leaves = [t for t in tensors if t.requires_grad]
    grad = torch.randn(2, 5, 7, 12)
    results = []
    for function in (
        layers.LinearOfGelu.apply,
        lambda x, weight, bias: F.linear(F.gelu(x), weight, bias),
    ):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast is not None):
            y = function(*tensors)
        results.append([y, *torch.autograd.grad(y, leaves, grad.to(y.dtype))])
    # The same products; under autocast their order of sums may differ by a rounding.
    tolerance = 2**-6 if autocast else 1e-6
    for found, expected in zip(*results, strict=True):
        assert found.dtype == expected.dtype
        assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def test_linear_of_gelu_keeps_its_input_alone():
    x = torch.randn(2, 3, 4, 24, requires_grad=True)
    weight, bias = torch.randn(12, 24, requires_grad=True), torch.zeros(12, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layers.LinearOfGelu.apply(x, weight, bias)
    assert [t.data_ptr() for t in saved] == [x.data_ptr(), weight.data_ptr()]


@pytest.mark.parametrize("stand_in", ["hook", "module"])
def test_what_stands_in_for_the_last_layer_is_called(stand_in):
    """On a GPU in training, where the MLP has a function of its own; tensors have no contents."""
    with FakeTensorMode(), torch.device("cuda"):
        mlp = layers.Mlp(8, 16, "gelu")
        calls = []
        if stand_in == "hook":
            mlp.fc2.register_forward_hook(lambda *_: calls.append(1))
        else:
            mlp.fc2 = torch.nn.Sequential(mlp.fc2)
            mlp.fc2.register_forward_hook(lambda *_: calls.append(1))
        x = torch.empty(1, 2, 2, 8, requires_grad=True)
        y = mlp(x)
        assert y.shape == x.shape
        assert calls == [1]
        assert type(layers.Mlp(8, 16, "gelu")(x).grad_fn).__name__.startswith("LinearOf")
