"""The Triton kernels of a backbone: how many there are, and that they are compiled ahead."""

import contextlib
import os
from collections import Counter, defaultdict
from types import SimpleNamespace

import pytest
import torch

from mmvmamba.models import VMamba, precompile
from mmvmamba.models.precompile import MODES, SHAPES, Mode, kernels_of
from mmvmamba_kernels import precompile as command
from mmvmamba_kernels.backends.triton.support import interpreting

triton = pytest.importorskip("triton", "3.5", "there is no Triton 3.5 or later")
if interpreting():
    pytest.skip("TRITON_INTERPRET=1: there is nothing to compile", allow_module_level=True)

from mmvmamba_kernels.backends.triton import precompile as compiler  # noqa: E402

TARGET = compiler.Target.parse("sm_90")
SMALL = {"dims": 16, "depths": (1,), "mlp_ratio": 0.0, "dwconv": False, "stem": "v1"}

# What says that it is on a GPU, in the place of images.
IMAGES = SimpleNamespace(
    is_cuda=True, is_meta=False, device=torch.device("cuda"), dtype=torch.float32
)


def tiny():
    return VMamba.of_one_block_a_stage("tiny")


def small():
    return VMamba(SMALL)


@pytest.fixture(scope="module")
def kernels():
    """VMamba-T's kernels in bfloat16 by whether it trains."""
    dtypes = MODES["bf16"]
    return {
        training: kernels_of(tiny, [Mode(*dtypes, training)], TARGET) for training in (False, True)
    }


@pytest.mark.parametrize(("training", "limit"), [(0, 14), (1, 34)], ids=["inference", "training"])
def test_how_many_kernels_vmamba_t_has(training, limit, kernels):
    names = Counter(kernel.name for kernel in kernels[training])
    assert names.total() <= limit, names
    # One for every stage: the rank differs.
    assert names["selective_scan_fwd_kernel"] == 4
    # Forwards, in chunks; in training backwards too.
    assert names["selective_scan_state_kernel"] == 4 * (1 + training)
    # Both passes call the same.
    assert names["selective_scan_carry_kernel"] == 1
    assert names["selective_scan_bwd_kernel"] == 4 * training
    assert all(names[f"{op}_fwd_kernel"] for op in ("layer_norm", "depthwise_conv"))


def test_other_sizes_have_no_other_kernels(kernels):
    mode = Mode(*MODES["bf16"], training=True)
    assert set(kernels_of(tiny, [mode], TARGET, [(7, 225, 1333)])) <= set(kernels[1])


def test_what_was_compiled_is_found_again(kernels, tmp_path, monkeypatch):
    """A process compiles what this one then loads, and a second time nobody compiles.

    What it cannot compile is named, and keeps nothing else from being compiled.
    """
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    (kernel,) = {k for k in kernels[1] if k.name == "sum_buffers_kernel"}
    broken = compiler.Specialisation(kernel.module, kernel.name, "{}")
    told = []
    with pytest.raises(
        compiler.PrecompileError, match="sum_buffers_kernel cannot be compiled: Key"
    ):
        compiler.compile_kernels([broken, kernel], TARGET, 1, lambda *v: told.append(v))
    assert [(name, left) for name, _, left in told] == [(kernel.name, 0)]
    assert compiler.missing([broken, kernel]) == [broken]
    files = set(tmp_path.rglob("*.cubin"))
    assert len(files) == 1
    with compiler._pretending(TARGET):
        assert kernel.kernel.preload(kernel.data).asm["cubin"]
        kernel.kernel.device_caches.clear()
    assert set(tmp_path.rglob("*.cubin")) == files
    monkeypatch.setattr(compiler, "_Workers", None)
    assert compiler.compile_kernels([kernel], TARGET) == 0


def test_a_launch_asks_for_what_was_recorded(kernels, monkeypatch):
    """On tensors that have contents, as far as a launch gets without a GPU."""
    from mmvmamba_kernels.backends.triton.layer_norm_kernels import layer_norm_fwd_kernel
    from mmvmamba_kernels.layer_norm import triton_impl

    asked = []
    monkeypatch.setattr(*compiler.compile_hook(), lambda **details: asked.append(details) or True)
    new = defaultdict(layer_norm_fwd_kernel.create_binder)
    monkeypatch.setattr(layer_norm_fwd_kernel, "device_caches", new)
    x, weight = torch.zeros(2, 7, 5, 384).bfloat16(), torch.ones(384)
    with compiler._pretending(TARGET):
        for scale in (None, torch.ones(2)):
            triton_impl.forward(x, x, scale, weight, weight, 1e-5, torch.bfloat16)
    recorded = {k.data for k in kernels[1] if k.name == "layer_norm_fwd_kernel"}
    (data,) = {details["compile"]["specialization_data"] for details in asked}
    assert data in recorded


def test_a_rehearsal_leaves_triton_as_it_was(kernels):
    from triton.runtime.jit import JITFunction

    run, caches = JITFunction.run, kernels[1][0].kernel.device_caches
    kernels_of(small, [Mode(torch.float32, None, True)], TARGET, [(1, 32, 32)])
    assert JITFunction.run is run
    assert kernels[1][0].kernel.device_caches is caches
    owner, name = compiler.compile_hook()
    assert getattr(getattr(owner, name), "__module__", "") != compiler.__name__


def test_the_backbone_compiles_once_for_every_mode(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(precompile, "choose", lambda *_: [SimpleNamespace(name="triton")])
    monkeypatch.setattr(compiler.Target, "here", staticmethod(lambda: TARGET))
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    asked = []
    monkeypatch.setattr(
        compiler, "compile_kernels", lambda kernels, *_, **__: asked.append(kernels)
    )
    model = VMamba(SMALL)
    for training in (False, True):
        mode = Mode(torch.float32, torch.bfloat16, training)
        precompile._compile(model, torch.empty(3, 3, 40, 48), mode)
        assert set(asked[-1]) == set(kernels_of(small, [mode], TARGET, (*SHAPES, (3, 40, 48))))
    assert len(set(asked[0])) < len(set(asked[1]))


def test_what_fails_ahead_leaves_the_call_alone(monkeypatch):
    """It is told of, and tried once."""
    tried, told = [], []

    def fail(*call):
        tried.append(call)
        raise KeyError("specialization_data")

    monkeypatch.setattr(precompile, "_compile", fail)
    monkeypatch.setattr(precompile, "_known", set())
    monkeypatch.setattr(precompile, "needs_dispatcher", lambda _: False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(precompile, "print_log", lambda text, **_: told.append(text))
    model = VMamba(SMALL)
    for _ in range(2):
        precompile.prepare(model, IMAGES)
    assert len(tried) == 1
    assert "one by one, since compiling them ahead failed with KeyError" in told[0]


def test_a_backbone_on_the_cpu_compiles_nothing(monkeypatch):
    monkeypatch.setattr(precompile, "_compile", lambda *_: pytest.fail("on the CPU"))
    with torch.no_grad():
        VMamba(SMALL)(torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tini", "--target", "sm_90"], "did you mean 'tiny'?"),
        (["tiny", "--target", "H200"], "'H200' is no target such as sm_90"),
        pytest.param(
            ["tiny"],
            "there is no GPU here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_wrong_arguments_are_explained(arguments, message, caplog):
    assert command.main(arguments) == 1
    assert message in caplog.text


def test_the_command_lists_kernels(kernels, caplog, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    caplog.set_level("INFO")
    sizes = ["--passes", "inference", "--list"]
    assert command.main(["tiny", "--dtype", "bf16", "--target", "sm_90", *sizes]) == 0
    number = len(kernels[0])
    assert f"tiny on sm_90: {number} kernels, {number} to compile" in caplog.text
    assert caplog.text.count("_kernel ") == number
    assert not os.listdir(tmp_path)


def test_every_mode_of_an_architecture_is_prepared_once(monkeypatch):
    compiled = []
    monkeypatch.setattr(precompile, "_compile", lambda *call: compiled.append(call))
    monkeypatch.setattr(precompile, "_known", set())
    monkeypatch.setattr(precompile, "needs_dispatcher", lambda _: False)
    capturing = True
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    model, alike, other = VMamba(SMALL), VMamba(SMALL), VMamba({**SMALL, "dims": 32})
    precompile.prepare(model, IMAGES)
    assert not compiled
    capturing = False
    for each in (model, model, alike):
        precompile.prepare(each, IMAGES)
        with torch.no_grad():
            precompile.prepare(each, IMAGES)
    precompile.prepare(other, IMAGES)
    modes = [Mode(torch.float32, None, training) for training in (True, False, True)]
    assert compiled == [
        (model, IMAGES, modes[0]),
        (model, IMAGES, modes[1]),
        (other, IMAGES, modes[2]),
    ]
