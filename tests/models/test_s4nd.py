"""S4ND against direct convolutions with kernels that recurrences give, in float64."""

import itertools

import golden
import numpy as np
import pytest
import torch

from mmvmamba.models import S4ND, S4NDViT
from mmvmamba.models.arguments import ArgumentError
from mmvmamba.models.compared.s4nd import S4DKernel, initial_states
from mmvmamba.registry import MODELS


def states(kernel, length):
    """The kernels as impulse responses, a step of the recurrence at a time.

    x' = A x + B u with zero-order hold: x_l = exp(dt A) x_(l-1) + A^-1 (exp(dt A) - 1) B u_l, and
    y_l = 2 Re(C x_l).
    """
    numbers = {name: p.detach().numpy() for name, p in kernel.named_parameters()}
    dim, sets = len(numbers["inv_dt"]), len(numbers["A_real"])
    out = np.zeros((len(numbers["C"]), dim, length))
    for channel in range(dim):
        a = -np.exp(numbers["A_real"][channel % sets]) - 1j * numbers["A_imag"][channel % sets]
        b = numbers["B"][0, channel % sets] @ np.array([1, 1j])
        decay = np.exp(np.exp(numbers["inv_dt"][channel, 0]) * a)
        state = (decay - 1) / a * b
        for step in range(length):
            for i, c in enumerate(numbers["C"][:, channel] @ np.array([1, 1j])):
                out[i, channel, step] = 2 * (c * state).sum().real
            state = decay * state
    return out


def both_ways(kernel, length):
    """Values at -length ... length - 1: forward ones from 0 on, backward ones before."""
    forth, back = np.split(states(kernel, length), 2)
    return np.concatenate([back[..., ::-1], forth], -1)


def by_loops(layer, x):
    """The sum over all pairs of positions that a kernel reaches."""
    x = x.numpy()
    sizes = x.shape[2:]
    lengths = [min(size, layer.l_max or size) for size in sizes]
    kernels = [both_ways(*pair) for pair in zip(layer.kernel, lengths, strict=True)]
    out = np.zeros((x.shape[0], kernels[0].shape[0], *x.shape[1:]))
    for here, there in itertools.product(np.ndindex(*sizes), np.ndindex(*sizes)):
        offsets = [h - t + n for h, t, n in zip(here, there, lengths, strict=True)]
        if all(0 <= o < 2 * n for o, n in zip(offsets, lengths, strict=True)):
            factor = np.prod([k[..., o] for k, o in zip(kernels, offsets, strict=True)], axis=0)
            out[(..., *here)] += factor * x[:, None][(..., *there)]
    if layer.out_channels is not None:
        return torch.from_numpy(out.sum(2))
    skip = layer.D.detach().numpy()
    skip = skip.reshape(*skip.shape, *(1 for _ in sizes))
    return torch.from_numpy(out + skip * x[:, None]).flatten(1, 2)


CASES = {
    "depth-wise": ({}, (5, 4)),
    "cut": ({"l_max": 2}, (5, 4)),
    "one wide": ({"n_ssm": 3}, (1, 6)),
    "sequence": ({"axes": 1, "channels": 2, "init": "legs", "dt_min": 1e-2, "dt_max": 0.1}, (9,)),
    "to other channels": ({"out_channels": 4, "l_max": 3}, (4, 5)),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_a_convolution_with_its_kernels(case):
    options, size = CASES[case]
    torch.manual_seed(0)
    layer = S4ND(3, d_state=4, **options).double()
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    torch.testing.assert_close(layer(x), by_loops(layer, x))


def test_gradients():
    torch.manual_seed(0)
    layer = S4ND(2, d_state=4, l_max=2).double()
    x = torch.randn(1, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    # Parameters are arguments too, by their names.
    names, values = zip(*layer.named_parameters(), strict=True)

    def call(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *values))


def test_the_first_states_are_those_of_s4d():
    a, b = initial_states("lin", 6)
    torch.testing.assert_close(a, -0.5 - 1j * torch.pi * torch.arange(3, dtype=torch.float64))
    assert (b == 1).all()
    # HiPPO-LegS and its low-rank term, as the S4 papers define them.
    n = 8
    hippo = torch.zeros(n, n, dtype=torch.float64)
    for i, j in itertools.product(range(n), range(n)):
        if i > j:
            hippo[i, j] = -(((2 * i + 1) * (2 * j + 1)) ** 0.5)
        elif i == j:
            hippo[i, j] = -(i + 1)
    low_rank = (torch.arange(n, dtype=torch.float64) + 0.5).sqrt()
    normal = hippo + low_rank[:, None] * low_rank
    values = torch.linalg.eigvals(normal)
    a, b = initial_states("legs", n)
    found = torch.cat([a, a.conj()])
    torch.testing.assert_close(
        found.imag.sort().values, values.imag.sort().values, atol=1e-9, rtol=0
    )
    torch.testing.assert_close(found.real, values.real, atol=1e-9, rtol=0)
    # Impulse responses of both bases with C = B^T are the same.
    roots = (2 * torch.arange(n, dtype=torch.float64) + 1).sqrt()
    response = roots @ torch.linalg.matrix_exp(0.1 * normal) @ roots
    torch.testing.assert_close(2 * ((0.1 * a).exp() * b.abs().square()).sum().real, response)
    with pytest.raises(ArgumentError, match="init='hippo' is unknown, choose from lin, legs"):
        initial_states("hippo", 6)


def test_initial_steps_and_weights():
    torch.manual_seed(0)
    kernel = S4DKernel(4000, 2, 4, 1, dt_min=0.01, dt_max=0.1, init="lin")
    logarithms = kernel.inv_dt.detach() / np.log(10)
    assert -2 <= logarithms.min() < -1.98
    assert -1.02 < logarithms.max() <= -1
    assert abs(logarithms.mean() + 1.5) < 0.02
    assert abs(torch.view_as_complex(kernel.C.detach()).abs().square().mean() - 1) < 0.05


@pytest.mark.parametrize("precision", ["autocast", "bfloat16", "float16"])
def test_transforms_stay_in_float32(precision):
    torch.manual_seed(0)
    layer = S4ND(4, d_state=8)
    layer.D.data = layer.D.data.bfloat16().half().float()
    x = torch.randn(2, 4, 9, 7).bfloat16().half().float()
    expected = layer(x)
    if precision == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(layer(x), expected)
        return
    dtype = getattr(torch, precision)
    out = layer.to(dtype)(x.to(dtype))
    assert out.dtype == dtype
    assert layer.kernel[0].A_real.dtype == torch.float32
    torch.testing.assert_close(out, expected.to(dtype))


def convnext(**options):
    return MODELS.build({"type": "mmvmamba.S4NDConvNeXt", **options})


def count(model):
    return sum(p.numel() for p in model.parameters())


def test_published_parameters():
    """30.0 and 88.8 M with a linear head of 1000 classes (arXiv 2210.06583, table 1)."""
    with torch.device("meta"):
        vit = S4NDViT()
    assert round((count(vit) + 769 * 1000) / 1e6, 1) == 88.8
    assert round((count(convnext()) + 769 * 1000) / 1e6, 1) == 30.0


SMALL = {"arch": {"depths": [1, 1, 1, 1], "channels": [8, 16, 24, 32]}, "d_state": 4}
SMALL_VIT = {"dim": 16, "depth": 2, "patch_size": 8, "d_state": 4}


@pytest.mark.parametrize("downsample", ["conv", "s4nd"])
def test_convnext_takes_any_size_and_learns(downsample):
    torch.manual_seed(0)
    model = convnext(
        **SMALL, downsample=downsample, out_indices=[0, 3], gap_before_final_norm=False
    )
    with torch.no_grad():
        for size in ((32, 32), (70, 45)):
            first, last = model(torch.randn(2, 3, *size))
            assert first.shape == (2, 8, *(side // 4 for side in size))
            assert last.shape == (2, 32, *(side // 32 for side in size))
    every_parameter_learns(model, (64, 45))
    with pytest.raises(ArgumentError, match="downsample='pool' is unknown"):
        convnext(**SMALL, downsample="pool")


def test_convnext_is_as_wide_as_the_images_it_was_made_for():
    """The stem's kernels reach 16 pixels, those of a stage its map at `img_size`."""
    model = convnext(**SMALL, img_size=64, downsample="s4nd")
    reach = [part.l_max for part in model.modules() if isinstance(part, S4ND)]
    assert reach == [16, 16, 8, 4, 16, 8, 4, 2]


@pytest.mark.parametrize("size", [(32, 32), (5, 41)])
def test_vit_takes_any_size_and_learns(size):
    torch.manual_seed(0)
    model = S4NDViT(**SMALL_VIT)
    (out,) = model.eval()(torch.randn(2, 3, *size))
    assert out.shape == (2, 16, *(-(-side // 8) for side in size))
    every_parameter_learns(model.train(), size)
    with pytest.raises(ValueError, match="takes floating-point images"):
        model(torch.zeros(1, 4, *size))


def every_parameter_learns(model, size):
    outs = model(torch.randn(2, 3, *size))
    sum((x * torch.linspace(-1, 1, x.shape[1])[:, None, None]).sum() for x in outs).backward()
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.any(), name


def test_vit_sees_its_patches_as_one_sequence():
    """A change of the first patch of a row reaches the end of the row before, its neighbour."""
    torch.manual_seed(0)
    model = S4NDViT(**SMALL_VIT).eval()
    images = torch.randn(1, 3, 16, 32, requires_grad=True)
    (out,) = model(images)
    (gradient,) = torch.autograd.grad(out[0, :, 0, 3].square().sum(), images)
    assert gradient[..., 8:, :8].any()
    assert golden.relative_error(model(images)[0], out) == 0


def test_the_memory_format_of_the_weights_changes_nothing():
    mixer, x = S4ND(4), torch.randn(1, 4, 5, 6)
    expected = mixer(x)
    assert torch.equal(mixer.to(memory_format=torch.channels_last)(x), expected)
