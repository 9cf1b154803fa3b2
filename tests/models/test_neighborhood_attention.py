"""Neighbourhood attention against loops over positions, in float64."""

import itertools
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mmvmamba.models.compared import neighborhood_attention
from mmvmamba.models.compared.neighborhood_attention import (
    neighborhood_attention_2d,
    through_natten,
)


def window(position, length, kernel):
    """The neighbours of a position: around it, or moved inwards at a border."""
    first = min(max(position - kernel // 2, 0), length - kernel)
    return range(first, first + kernel)


def by_loops(q, k, v, rpb):
    """Equation 1 and section 3.1 of arXiv 2204.07143, a position and a head at a time."""
    kernel = (rpb.shape[-1] + 1) // 2
    _, height, width, heads, _ = q.shape
    out = torch.zeros_like(q)
    for i, j, h in itertools.product(range(height), range(width), range(heads)):
        near = [(r, c) for r in window(i, height, kernel) for c in window(j, width, kernel)]
        scores = [
            (q[:, i, j, h] * k[:, r, c, h]).sum(-1) + rpb[h, r - i + kernel - 1, c - j + kernel - 1]
            for r, c in near
        ]
        weights = torch.stack(scores, -1).softmax(-1)
        values = torch.stack([v[:, r, c, h] for r, c in near], 1)
        out[:, i, j, h] = (weights[..., None] * values).sum(1)
    return out


def arguments(height, width, kernel, heads=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(height * width)
    maps = torch.randn(4, 2, height, width, heads, 3, generator=generator, dtype=torch.float64)
    rpb = torch.randn(heads, 2 * kernel - 1, 2 * kernel - 1, generator=generator).double()
    inputs = [x.to(dtype).requires_grad_() for x in (*maps[:3], rpb)]
    return inputs, maps[3]


# One tile; several whole ones; a last one that is cut; one side shorter than what a tile can reach.
SIZES = [(3, 3, 3), (6, 9, 3), (7, 4, 3), (5, 11, 5), (1, 4, 1)]


@pytest.mark.parametrize(("height", "width", "kernel"), SIZES)
def test_values_and_gradients(height, width, kernel):
    inputs, grad = arguments(height, width, kernel)
    out, expected = neighborhood_attention_2d(*inputs), by_loops(*inputs)
    torch.testing.assert_close(out, expected)
    for found, wanted in zip(
        torch.autograd.grad(out, inputs, grad),
        torch.autograd.grad(expected, inputs, grad),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted)


def test_strides_and_types():
    """Maps that are not contiguous, in bfloat16 beside a table in float32, as autocast has them."""
    (q, k, v, rpb), grad = arguments(6, 9, 3)
    expected = by_loops(*(x.bfloat16().double() for x in (q, k, v)), rpb.float().double())
    q, k, v = (x.bfloat16().transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    out = neighborhood_attention_2d(q, k, v, rpb.float())
    assert out.dtype == torch.bfloat16
    # Results and biases are rounded to eight bits.
    torch.testing.assert_close(out.double(), expected, atol=2e-2, rtol=2e-2)
    grads = torch.autograd.grad(out, (q, rpb), grad.bfloat16())
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float64]


def test_it_is_an_operator():
    inputs, _ = arguments(4, 5, 3)
    torch.library.opcheck(torch.ops.mmvmamba.neighborhood_attention_2d, inputs)


def test_flops_are_those_of_the_neighbours():
    (q, k, v, rpb), _ = arguments(6, 9, 3)
    with FlopCounterMode(display=False) as counter:
        neighborhood_attention_2d(q, k, v, rpb)
    # Scores and sums, of 9 neighbours; a multiply-add is two.
    assert counter.get_total_flops() == 2 * 2 * 9 * q.numel()


@pytest.mark.parametrize(("height", "width", "kernel"), [(2, 5, 3), (5, 5, 4)])
def test_windows_that_cannot_be(height, width, kernel):
    inputs, _ = arguments(height, width, kernel)
    with pytest.raises(ValueError, match=rf"windows of {kernel} x {kernel} .* {height} x {width}"):
        neighborhood_attention_2d(*inputs)


def test_natten_is_called_as_its_functions_are():
    """Stand-ins by loops, with the meaning and the layout that natten 0.17 documents."""

    def na2d_qk(query, key, kernel_size, dilation, rpb):
        assert dilation == 1
        assert query.is_contiguous()
        _, _, height, width, _ = query.shape
        scores = query.new_zeros(*query.shape[:-1], kernel_size**2)
        for i, j in itertools.product(range(height), range(width)):
            near = itertools.product(window(i, height, kernel_size), window(j, width, kernel_size))
            for n, (r, c) in enumerate(near):
                bias = rpb[:, r - i + kernel_size - 1, c - j + kernel_size - 1]
                scores[:, :, i, j, n] = (query[:, :, i, j] * key[:, :, r, c]).sum(-1) + bias
        return scores

    def na2d_av(attn, value, kernel_size, dilation):
        assert dilation == 1
        _, _, height, width, _ = value.shape
        out = torch.zeros_like(value)
        for i, j in itertools.product(range(height), range(width)):
            near = itertools.product(window(i, height, kernel_size), window(j, width, kernel_size))
            for n, (r, c) in enumerate(near):
                out[:, :, i, j] += attn[:, :, i, j, n, None] * value[:, :, r, c]
        return out

    inputs, _ = arguments(4, 5, 3)
    functions = SimpleNamespace(na2d_qk=na2d_qk, na2d_av=na2d_av)
    torch.testing.assert_close(through_natten(functions, *inputs), by_loops(*inputs))


def with_bias(query, key, kernel_size, dilation=1, additional_keys=None, is_causal=False, rpb=None):
    """natten 0.17."""


def without_bias(query, key, kernel_size, dilation, additional_keys=None):
    """natten 0.15, where biases are another function's."""


@pytest.mark.parametrize(
    ("functions", "taken"),
    [({"na2d_qk": with_bias}, True), ({"na2d_qk": without_bias}, False), ({"na2d": ...}, False)],
    ids=["0.17", "0.15", "0.20"],
)
def test_a_natten_without_biases_is_left_alone(monkeypatch, functions, taken):
    functional = SimpleNamespace(**functions)
    monkeypatch.setitem(sys.modules, "natten", SimpleNamespace(functional=functional))
    found = neighborhood_attention._natten.__wrapped__()
    assert found is (functional if taken else None)
