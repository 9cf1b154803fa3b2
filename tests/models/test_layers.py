"""Layers on maps: the same numbers whatever route the device takes."""

import pytest
import torch
import torch.nn.functional as F

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
