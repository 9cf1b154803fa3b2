"""What GPU backends of the 2D scan share beside their kernels."""

from types import SimpleNamespace

import pytest
import torch

from mmvmamba_kernels.backends import gpu_scan
from mmvmamba_kernels.backends.native import cuda_scan
from mmvmamba_kernels.backends.triton import support


@pytest.mark.parametrize("positions", [3, 8, 11])
def test_sums_over_positions_are_added_in_parts(positions, monkeypatch):
    monkeypatch.setattr(cuda_scan, "_PART", 4)
    a = torch.randn(2, positions, 3, dtype=torch.float64)
    b = torch.randn(2, positions, 5, dtype=torch.float64)
    found = cuda_scan.sum_of_products(a, b, torch.float64)
    torch.testing.assert_close(found, a.mT @ b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_products_of_step_sizes_are_exact_whatever_is_allowed(precision, monkeypatch):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    matmul = torch.backends.cuda.matmul
    seen = []
    product = torch.bmm

    def bmm(*args, **options):
        newer = getattr(matmul, "fp32_precision", None)
        seen.append(newer in ("ieee", "none") if newer else not matmul.allow_tf32)
        return product(*args, **options)

    monkeypatch.setattr(torch, "bmm", bmm)
    proj, weight = torch.randn(1, 2, 3, 2, 4), torch.randn(2, 5, 2)
    raw = gpu_scan.raw_step_sizes(proj, weight, torch.float32)
    factors = torch.randn(2, 6, 2)
    cuda_scan.low_rank_gradients(raw, factors, proj, weight, torch.float32)
    after = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(before)
    assert seen == [True] * 3
    assert after == precision


@pytest.mark.parametrize("capturing", [False, True])
def test_kernels_are_not_compiled_in_a_capture(capturing, monkeypatch):
    knobs = pytest.importorskip("triton.knobs", reason="Triton before 3.4 keeps its hook elsewhere")
    called = []
    with knobs.runtime.scope():
        knobs.runtime.jit_cache_hook = lambda **details: called.append(details)
        support._refuse_to_compile_in_capture.__wrapped__()
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
        hook = knobs.runtime.jit_cache_hook
        others = SimpleNamespace(module="somebody.else", name="kernel")
        ours = SimpleNamespace(module="mmvmamba_kernels.backends.triton.scan_kernels", name="walk")
        hook(fn=others)
        if capturing:
            with pytest.raises(
                RuntimeError, match="walk is not compiled yet .* before the capture"
            ):
                hook(fn=ours)
        else:
            hook(fn=ours)
        assert [details["fn"] for details in called] == [others] + [ours] * (not capturing)
