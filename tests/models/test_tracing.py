"""TorchScript's tracer takes the backbone as it is: with gradients on, as most people call it."""

import io

import pytest
import torch

from mmvmamba.models import VMamba

ARCHS = {
    "default": {},
    "vanilla": {"gated": True, "stem": "v1", "downsample": "v1", "d_state": 2},
    "mamba2": {"mixer": "mamba2", "d_state": 4},
}


@pytest.mark.parametrize(
    ("gradients", "training"), [(False, False), (True, False), (True, True)], ids=str
)
@pytest.mark.parametrize("name", ARCHS)
def test_a_saved_trace_gives_the_same_maps_and_gradients(name, gradients, training):
    torch.manual_seed(0)
    arch = {"dims": 16, "depths": (1, 1)} | ARCHS[name]
    # What is drawn at random would differ between the model and its trace.
    model = VMamba(arch, drop_path_rate=0.0).train(training)
    image = torch.randn(1, 3, 64, 64)
    with torch.set_grad_enabled(gradients):
        # It traces twice, the second time without gradients, and compares the graphs.
        traced = torch.jit.trace(model, image)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    # A backend of this machine's may be missing where the file runs.
    assert '"auto:' not in str(loaded.inlined_graph)
    results = []
    for network in (model, loaded):
        maps = network(image)
        sum(one.square().sum() for one in maps).backward()
        results.append([*maps, *(p.grad for _, p in sorted(network.named_parameters()))])
    for found, expected in zip(*results, strict=True):
        # Traced products take another route on CPUs: float32 sums of up to 256 products (maps) and
        # positions (gradients) in another order.
        torch.testing.assert_close(
            found, expected, rtol=1e-4, atol=1e-5 * float(expected.detach().abs().max())
        )
