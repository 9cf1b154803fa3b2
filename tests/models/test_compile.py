"""The whole backbone as one compiled graph, at sizes that change."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from mmvmamba.models import VMamba
from mmvmamba.models.vmamba import COMPILE_OPTIONS as OURS

SIZES = [(2, 3, 64, 96), (2, 3, 96, 64), (3, 3, 61, 77), (2, 3, 80, 80)]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model, backend, **options):
    counter = CompileCounterWithBackend(backend)
    return torch.compile(model, backend=counter, fullgraph=True, **options), counter


def compare(model, function, image, tolerance):
    """Outputs and gradients of every parameter, compiled and eager."""
    results = []
    for call in (function, model):
        model.zero_grad()
        outs = call(image)
        # Weights of their own: the squares of normalised maps have next to no gradient.
        generator = torch.Generator().manual_seed(1)
        grads = [torch.randn(o.shape, generator=generator) for o in outs]
        torch.autograd.backward(outs, grads)
        grads = [p.grad for p in model.parameters()]
        # One vector each: some gradients, as of a bias before a norm, are sums of roundings alone.
        results.append([torch.cat([t.flatten().detach() for t in part]) for part in (outs, grads)])
    for found, expected in zip(*results, strict=True):
        assert (found - expected).norm() <= tolerance * expected.norm()


ARCHS = {
    "default": {},
    "vanilla": {"gated": True, "stem": "v1", "downsample": "v1", "d_state": 2},
    "bidi": {"depths": [1], "scan": "bidi", "norm": "bn"},
    "cascade2d": {"depths": [1], "scan": "cascade2d", "act": "relu"},
    "mamba2": {"depths": [1], "dims": 32, "mixer": "mamba2", "d_state": 4, "act": "gelu"},
}


@pytest.mark.parametrize(
    ("name", "with_cp"), [*((name, False) for name in ARCHS), ("default", True)], ids=str
)
def test_one_graph_without_breaks(name, with_cp):
    torch.manual_seed(0)
    # A block is recomputed whatever comes after it.
    arch = {"dims": 8, "depths": [1] if with_cp else [1, 1]} | ARCHS[name]
    model = VMamba(arch, drop_path_rate=0.0, with_cp=with_cp).train()
    function, counter = compiled(model, "aot_eager")
    # The same operations in another order of sums.
    compare(model, function, torch.randn(2, 3, 32, 48), 1e-4)
    assert counter.frame_count == 1


def test_sizes_do_not_compile_again_in_inference():
    model = VMamba({"dims": 8, "depths": [1, 1]}).eval()
    function, counter = compiled(model, "eager", dynamic=True)
    for size in SIZES:
        image = torch.randn(size)
        with torch.no_grad():
            for found, expected in zip(function(image), model(image), strict=True):
                torch.testing.assert_close(found, expected)
    assert counter.frame_count == 1


# What Inductor's layout pass would lay out anew, the convolutions of stem and block, and the scan.
LEAN = {"stem": "v1", "mlp_ratio": 0.0}


@pytest.mark.parametrize(
    "changes", [LEAN, pytest.param({}, marks=pytest.mark.slow)], ids=["lean", "default"]
)
def test_inductor_trains_at_changing_sizes(changes, monkeypatch, tmp_path):
    """PyTorch's own compiler, both passes: it stops without `COMPILE_OPTIONS`."""
    # What an earlier run compiled says nothing of the guards of this one.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    # Plain loops compile in half the time, and in half of that without optimisation.
    monkeypatch.setattr("torch._inductor.config.cpp.simdlen", 1)
    monkeypatch.setattr("torch._inductor.config.aot_inductor.debug_compile", True)
    torch.manual_seed(0)
    # Small: generated code is compiled by the C++ compiler, minutes for a real model.
    model = VMamba({"dims": 8, "depths": [1]} | changes, drop_path_rate=0.0).train()
    graphs = torch._dynamo.utils.counters["stats"]
    graphs.clear()
    model.compile(fullgraph=True, dynamic=True)
    for size in SIZES:
        # Calling the model runs the graph, its method `forward` does not.
        compare(model, model.forward, torch.randn(size), 1e-4)
    # Since PyTorch 2.14, Inductor guards the strides of convolutions' gradients where its layout
    # pass is off, and with it on compiles for every size as well.
    expected = len(SIZES) if torch.__version__ >= (2, 14) else 1
    assert graphs["unique_graphs"] == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"backend": "inductor", "mode": None, "options": OURS}),
        (
            {"options": {"max_autotune": True}, "dynamic": True},
            {
                "backend": "inductor",
                "mode": None,
                "options": OURS | {"max_autotune": True},
                "dynamic": True,
            },
        ),
        (
            {"mode": "reduce-overhead"},
            {"backend": "inductor", "mode": None, "options": OURS | {"triton.cudagraphs": True}},
        ),
        (
            {"options": {"layout_optimization": True}},
            {"backend": "inductor", "mode": None, "options": {"layout_optimization": True}},
        ),
        ({"backend": "eager"}, {"backend": "eager", "mode": None, "options": None}),
    ],
    ids=["none", "options", "mode", "other layout", "other backend"],
)
def test_how_the_backbone_is_compiled(given, expected, monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "compile", lambda call, **arguments: seen.append(arguments))
    VMamba({"dims": 8, "depths": [1]}).compile(**given)
    assert seen == [expected]


def test_a_mode_and_options_are_refused_together():
    with pytest.raises(RuntimeError, match="Either mode or options"):
        VMamba({"dims": 8, "depths": [1]}).compile(mode="default", options={"max_autotune": True})


def test_a_cuda_graph_replays_the_backbone():
    if not torch.cuda.is_available():
        pytest.skip("no GPU: CUDA graphs need one")
    model = VMamba({"dims": 16, "depths": [1, 1]}).cuda().eval()
    image = torch.randn(1, 3, 64, 64, device="cuda")
    with torch.no_grad():
        expected = model(image)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            model(image)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outs = model(image)
        graph.replay()
    for found, wanted in zip(outs, expected, strict=True):
        torch.testing.assert_close(found, wanted)
