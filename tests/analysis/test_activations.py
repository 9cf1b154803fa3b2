"""Activations kept for backward: computed on fake tensors as they are on real ones."""

import pytest
import torch
from torch import nn

from mmvmamba.analysis.activations import count_activations, saved_bytes
from mmvmamba.analysis.measured import Subject
from mmvmamba.analysis.passes import Case
from mmvmamba.analysis.reports import activations_panels, activations_tables, make_figure
from mmvmamba.analysis.subjects import find_subject
from mmvmamba.engine.errors import UsageError
from mmvmamba.models import VMamba


def count(name, precision="fp32", batch=2, size=(64, 96), backbone_only=False, **kwargs):
    subject = find_subject(name, backbone_only)
    return count_activations(subject, Case("training", precision, batch, size), **kwargs)


def test_storages_are_counted_once_and_parameters_not():
    x = torch.randn(6, 10, requires_grad=True)
    weight = nn.Parameter(torch.randn(10, 10))

    def forward():
        y = x @ weight
        return (y * y).sum() + (x.t()[:3] @ y).sum()

    # x, which two products save, one of them as a view of a part, and y.
    assert saved_bytes(forward, [weight]) == 4 * (60 + 60)
    assert saved_bytes(forward, []) == 4 * (60 + 60 + 100)


@pytest.fixture
def one_block_a_stage(monkeypatch):
    """VMamba-T as shallow as it can be: its other blocks keep what the first ones keep."""
    arch = vars(VMamba.find_arch("tiny")) | {"depths": (1, 1, 1, 1)}
    monkeypatch.setitem(VMamba.arch_settings, "tiny-s1l8", VMamba.find_arch(arch))


@pytest.mark.usefixtures("one_block_a_stage")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "autocast-bf16"])
@pytest.mark.parametrize("name", ["tiny", "tiny+cp"])
def test_fake_tensors_keep_what_real_ones_keep(name, precision):
    fake, real = (count(name, precision, device="cpu", fake=fake) for fake in (True, False))
    assert not fake.failure
    assert fake.bytes == real.bytes > 10**6


@pytest.mark.parametrize("precision", ["fp32", "bf16", "autocast-bf16"])
def test_peers_keep_the_same_too(precision):
    fake, real = (count("resnet18", precision, device="cpu", fake=fake) for fake in (True, False))
    # Fake batch norm keeps its statistics in the images' dtype, the CPU's in float32.
    assert fake.bytes == pytest.approx(real.bytes, rel=1e-3 if "autocast" in precision else 0)


def test_large_batches_need_no_memory_and_no_gpu():
    whole = count("tiny", "autocast-bf16", 128, (224, 224))
    checkpointed = count("tiny+cp", "autocast-bf16", 128, (224, 224))
    half = count("tiny", "autocast-bf16", 64, (224, 224))
    assert not whole.failure
    assert 2e9 < whole.bytes < 2e10
    assert checkpointed.bytes < whole.bytes / 3
    # All but autocast's copies of the weights, 2 bytes for each parameter at most.
    assert abs(whole.bytes - 2 * half.bytes) <= 2 * whole.params
    assert count("tiny", "fp32", 128, (224, 224)).bytes > whole.bytes


def test_a_pytorch_that_asks_for_a_driver_is_named(monkeypatch):
    def contiguous(*_, **__):
        # As PyTorch 2.7 does.
        raise RuntimeError("CUDA error: CUDA driver version is insufficient\nand more")

    monkeypatch.setattr(torch.Tensor, "contiguous", contiguous)
    with pytest.raises(UsageError, match=r"needs an NVIDIA driver.*insufficient\)\. Use PyTorch"):
        count("tiny")


def test_autocast_follows_the_rules_of_the_device():
    """On GPUs it normalises in float32, on the CPU in the input's dtype."""
    gpu, cpu = (
        count("convnext_atto", "autocast-bf16", device=device) for device in ("cuda", "cpu")
    )
    assert gpu.bytes > cpu.bytes
    assert not torch.is_autocast_enabled("cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU chooses the kernel itself")
def test_attention_is_not_kept_as_a_matrix():
    few, many = (count("deit-tiny", "fp32", 4, (side, side)) for side in (224, 448))
    assert not few.failure
    # Linear in the number of tokens, the one for the class included.
    assert many.bytes / few.bytes == pytest.approx((28**2 + 1) / (14**2 + 1), rel=0.01)


def test_what_depends_on_values_has_a_reason():
    class ByValue(nn.Module):
        def forward(self, images):
            return images[images > 0].sum() * float(images.sum())

    subject = Subject("by-value", lambda size: ByValue())
    result = count_activations(subject, Case("training", "fp32", 1, (8, 8)))
    assert result.failure
    assert result.bytes is None
    (table,) = activations_tables([result])
    assert table.rows == (("by-value", "failed"),)
    assert table.notes[0].startswith("by-value, 1x8x8: ")


def test_tables_and_panels():
    results = [
        count(name, precision, size=size, backbone_only=True)
        for precision in ("fp32", "bf16")
        for size in ((32, 32), (64, 64))
        for name in ("resnet18",)
    ]
    assert [t.header for t in activations_tables(results)] == [("model", "2x32x32", "2x64x64")] * 2
    (table,) = activations_tables(results[::2])
    assert table.header == ("model", "fp32", "bf16")
    fp32, bf16 = make_figure(activations_panels(results)).axes
    assert list(fp32.lines[0].get_ydata()) == [r.bytes / 1e9 for r in results[:2]]
    assert "bf16" in bf16.get_title()
