"""Elementary functions of the reference backends."""

import pytest
import torch
import torch.nn.functional as F

from mmvmamba_kernels.backends.reference.numerics import softplus


def test_softplus_in_float32():
    # Down to where float32 becomes subnormal; PyTorch's own is within 1.2e-7 there.
    z = torch.linspace(-86, 100, 100001)
    expected = F.softplus(z.double(), threshold=20)
    assert ((softplus(z) - expected) / expected).abs().max() < 3e-7


def test_softplus_is_the_identity_beyond_its_threshold():
    z = torch.tensor([20.001, 21, 1e3, 3e38, float("inf")])
    assert torch.equal(softplus(z), z)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_softplus_far_below_zero_and_of_nan(dtype):
    result = softplus(torch.tensor([-200.0, -1e30, float("-inf"), 0, float("nan")], dtype=dtype))
    assert (result[:3] < 1e-30).all()
    assert torch.isclose(result[3], torch.tensor(2, dtype=dtype).log())
    assert result[4].isnan()
