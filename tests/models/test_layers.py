"""Layers on maps: the same numbers whatever route the device takes."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from mmvmamba.models import NAT, VMamba, cpu, layers
from mmvmamba.models.plans import KeepsPrepared


class Projected(KeepsPrepared):
    """A linear layer, called as blocks call theirs."""

    def __init__(self, *args, **kwargs):
        super().__init__()
        self.layer = nn.Linear(*args, **kwargs)

    @property
    def weight(self):
        return self.layer.weight

    @property
    def bias(self):
        return self.layer.bias

    def forward(self, x):
        return layers.project(self.layer, x)


ROUTES = {"AVX2": (True, False), "AVX-512": (True, True), "PyTorch alone": (False, False)}


@pytest.fixture(params=ROUTES)
def route(request, monkeypatch):
    available, avx512 = ROUTES[request.param]
    if available and not cpu.AVAILABLE:
        pytest.skip("this PyTorch has no MKL or no oneDNN, so there is one route only")
    monkeypatch.setattr(cpu, "AVAILABLE", available)
    monkeypatch.setattr(cpu, "AVX512", avx512)
    return request.param


def check_against_float64(module, x, function):
    """Output and gradients of a layer on `x`, and its output in evaluation."""
    x.requires_grad_()
    y = module(x)
    grad = torch.randn_like(y)
    grads = torch.autograd.grad(y, [x, *module.parameters()], grad)

    doubles = [t.detach().double().requires_grad_() for t in (x, *module.parameters())]
    expected = function(*doubles)
    expected_grads = torch.autograd.grad(expected, doubles, grad.double())
    with torch.no_grad():
        evaluated = module.eval()(x)
    # Sums of 12 (outputs) to 630 (a kernel's weights) products in float32, of numbers near one.
    for actual, wanted in zip(
        [y, evaluated, *grads], [expected, expected, *expected_grads], strict=True
    ):
        torch.testing.assert_close(actual, wanted.float(), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("shape", [(2, 5, 7, 12), (1, 1, 1, 12), (0, 4, 4, 12), (3, 1, 9, 12)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_and_gradients_equal_torch_in_float64(shape, bias, route):
    torch.manual_seed(0)
    check_against_float64(Projected(12, 20, bias=bias), torch.randn(shape), F.linear)


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding"),
    [((9, 14), 3, 2, 1), ((8, 13), 2, 2, 0), ((9, 12), 4, 4, 0), ((1, 2), 3, 2, 1)],
)
def test_convolution_and_gradients_equal_torch_in_float64(size, kernel, stride, padding, route):
    torch.manual_seed(0)
    module = layers.Conv2d(5, 8, kernel, stride=stride, padding=padding)
    x = torch.randn(2, 5, *size).contiguous(memory_format=torch.channels_last)
    check_against_float64(module, x, lambda *a: F.conv2d(*a, stride=stride, padding=padding))


needs_packing = pytest.mark.skipif(not cpu.AVAILABLE, reason="this PyTorch packs no weights")


def by_assignment(weight, new):
    weight.data = new.clone()


def by_data(weight, new):
    weight.data.copy_(new)


def of_one_part(weight, new):
    weight.data[:, 1:] = new[:, 1:]


def in_place(weight, new):
    with torch.no_grad():
        weight.copy_(new)


@needs_packing
@pytest.mark.parametrize("change", [by_assignment, by_data, of_one_part, in_place])
@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_evaluation_sees_weights_that_change(change, kind):
    torch.manual_seed(0)
    linear = kind == "linear"
    module = Projected(96, 192) if linear else layers.Conv2d(96, 64, 3, stride=2, padding=1)
    module.eval()
    x = torch.randn(1, 7, 7, 96) if linear else torch.randn(1, 96, 7, 7)
    with torch.no_grad():
        old = module(x)
        assert module.weight in cpu._packed
        assert torch.equal(module(x), old)
        new = module.weight + 1e-3 * torch.randn_like(module.weight)
        change(module.weight, new)
        fresh = copy.deepcopy(module)
        assert fresh.weight not in cpu._packed
        assert torch.equal(module(x), fresh(x))
        assert not torch.equal(module(x), old)


@needs_packing
def test_packed_weights_are_dropped_in_training_and_never_saved():
    module = Projected(96, 192).eval()
    x = torch.randn(1, 7, 7, 96)
    with torch.no_grad():
        y = module(x)
        assert module.weight in cpu._packed
        file = io.BytesIO()
        torch.save(module, file)
        assert file.tell() < 1.2 * 4 * (96 * 192 + 192) + 4000
        file.seek(0)
        assert torch.equal(torch.load(file, weights_only=False)(x), y)
    module.train()
    assert module.weight not in cpu._packed


@needs_packing
def test_packed_weights_do_not_outlive_a_conversion():
    module = Projected(96, 192).eval()
    with torch.no_grad():
        module(torch.randn(1, 7, 7, 96))
    module.double()
    assert module.weight not in cpu._packed


@pytest.mark.parametrize("change", [{"dilation": (2, 2)}, {"padding_mode": "reflect"}])
def test_a_convolution_that_was_changed_is_computed_as_it_says(change, route):
    module = layers.Conv2d(6, 8, 3, padding=1).eval()
    expected = torch.nn.Conv2d(6, 8, 3, padding=1, **change)
    expected.load_state_dict(module.state_dict())
    for name, value in change.items():
        setattr(module, name, value)
    module._reversed_padding_repeated_twice = expected._reversed_padding_repeated_twice
    x = torch.randn(1, 6, 9, 8)
    with torch.no_grad():
        torch.testing.assert_close(module(x), expected(x), rtol=1e-5, atol=1e-5)


@needs_packing
def test_packed_weights_serve_one_shape_after_another():
    torch.manual_seed(0)
    module = Projected(96, 192).eval()
    with torch.no_grad():
        for size in ((7, 7), (3, 50), (60, 70), (7, 7)):
            x = torch.randn(2, *size, 96)
            # Sums of 96 products in float32, of numbers near one.
            torch.testing.assert_close(
                module(x).double(),
                F.linear(x.double(), module.weight.double(), module.bias.double()),
                rtol=1e-5,
                atol=1e-5,
            )


@pytest.mark.parametrize("act", layers.ACTIVATIONS)
def test_a_fused_activation_is_the_activation_and_hooks_see_what_is_before_it(act, route):
    torch.manual_seed(0)
    mlp = layers.Mlp(24, 96, act).eval()
    x = torch.randn(2, 5, 7, 24)
    seen = []
    with torch.no_grad():
        fused = mlp(x)
        handle = mlp.fc1.register_forward_hook(lambda _, args, out: seen.append(out))
        plain = mlp(x)
        handle.remove()
        assert torch.equal(mlp(x), fused)
    double = copy.deepcopy(mlp).double()
    hidden = double.fc1(x.double())
    # Sums of 24 and 96 products in float32, of numbers near one.
    torch.testing.assert_close(seen[0].double(), hidden, rtol=1e-5, atol=1e-5)
    for y in (fused, plain):
        torch.testing.assert_close(y.double(), double(x.double()), rtol=1e-5, atol=1e-5)


def test_counters_see_the_operations_of_evaluation():
    module, x = Projected(8, 24).eval(), torch.randn(1, 3, 4, 8)
    with torch.no_grad():
        module(x)
        with FlopCounterMode(display=False) as counter:
            module(x)
    assert counter.get_total_flops() == 2 * 12 * 8 * 24


def test_a_channels_last_map_stays_one_without_a_copy():
    y = Projected(8, 24)(torch.randn(2, 6, 5, 8))
    assert y.shape == (2, 6, 5, 24)
    assert y.is_contiguous()


def test_other_dtypes_keep_to_the_matrix_product():
    module = Projected(8, 16).double()
    x = torch.randn(1, 3, 4, 8, dtype=torch.double)
    torch.testing.assert_close(module(x), F.linear(x, module.weight, module.bias), rtol=0, atol=0)


@pytest.mark.parametrize(
    "build", [lambda: VMamba.of_one_block_a_stage("tiny"), lambda: NAT("mini")]
)
def test_models_are_made_of_tensors_without_values(build, monkeypatch):
    # As PyTorch 2.14's does.
    monkeypatch.setattr(nn.init, "trunc_normal_", lambda weight, **_: bool(weight.sum()))
    with FakeTensorMode():
        build()
