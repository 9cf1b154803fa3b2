"""The model of GPU times: it gives what it was calibrated to, and it knows the kernels."""

import importlib
import json
import weakref
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mmvmamba_kernels
from mmvmamba_kernels.backends.triton.support import interpreting

pytestmark = pytest.mark.skipif(
    interpreting(), reason="TRITON_INTERPRET=1: kernels are Python functions, nothing to compile"
)
triton = pytest.importorskip("triton", "3.5", "there is no Triton 3.5 or later")

FOLDER = Path(mmvmamba_kernels.__file__).parents[1] / "benchmarks"

# Milliseconds that the table of the model's README predicts, with this version's compiler.
VERSION = "3.6.0"
TABLE = {
    (128, 56, 56, 96): 0.843,
    (128, 28, 28, 192): 0.448,
    (128, 14, 14, 384): 0.209,
    (128, 7, 7, 768): 0.175,
    (2, 200, 320, 96): 0.306,
    (2, 100, 160, 192): 0.155,
}
# The cheapest to replay.
FIRST = (128, 7, 7, 768)

# Where waits cost most.
SHAPE = (128, 56, 56, 96)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A module of the model by name; what it compiles goes to a folder of the tests."""
    if not (FOLDER / "gpu_model").exists():
        pytest.skip("the package is installed without its benchmarks")
    folder = tmp_path_factory.mktemp("gpu_model")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        patch.setenv("GPU_MODEL_OUT", str(folder))
        patch.setenv("TRITON_CACHE_DIR", str(folder / "triton"))
        yield lambda name: importlib.import_module(f"gpu_model.{name}")


@pytest.mark.skipif(triton.__version__ != VERSION, reason=f"the table is of Triton {VERSION}")
@pytest.mark.parametrize(
    "shape", [pytest.param(s, marks=() if s == FIRST else pytest.mark.slow) for s in TABLE], ids=str
)
def test_the_calibration_is_what_the_readme_says(shape, model):
    predicted, _ = model("calibrate").serial_scans(shape)
    assert predicted == pytest.approx(TABLE[shape], abs=6e-4)
    row = f"| {', '.join(map(str, shape))} | {TABLE[shape]:.3f} |"
    assert row in (FOLDER / "gpu_model" / "README.md").read_text()


def test_the_saved_predictions_are_what_the_readme_says(model):
    saved = json.loads((FOLDER / "gpu_model" / "predictions.json").read_text())
    assert set(saved) == {",".join(map(str, shape)) for shape in model("record").SHAPES}
    readme = (FOLDER.parent / "README.md").read_text()
    for shape, phases in saved.items():
        times = [phases[phase] for phase in model("record").PHASES]
        row = " | ".join([shape.replace(",", ", "), *(f"{ms:.3f}" for ms in times)])
        assert f"| {row} |" in readme


WALKS = [
    ("training forward", "selective_scan_fwd_kernel"),
    ("training backward", "selective_scan_bwd_kernel"),
]


@pytest.mark.parametrize(("phase", "name"), WALKS)
def test_walks_wait_for_memory_twice_a_group_at_most(phase, name, model):
    from mmvmamba_kernels.backends.triton import scan

    (walk,) = (x for x in model("record").core_launches(SHAPE)[phase] if x.name == name)
    kernel = walk.compile()
    share = model("sim").dram_share(SHAPE)
    profile = model("profile")
    assert profile.exposed(profile.profile_launch(walk, share)[2]) <= 2
    assert kernel.stack == 0
    warps = scan._FORWARD_WARPS if "fwd" in name else scan._BACKWARD_WARPS
    assert model("sim").resident_blocks(kernel) >= warps.full
    found = model("predict").predict(walk, SHAPE)
    assert 0 < found.ms < 1


def test_a_walk_that_loads_where_it_computes_is_noticed(model):
    walk, *_ = model("record").serial_launches(SHAPE)
    profile = model("profile")
    share = model("sim").dram_share(SHAPE)
    assert profile.exposed(profile.profile_launch(walk, share)[2]) > 2


class Memory(TorchDispatchMode):
    """Counts the bytes of tensors that are alive, of those made in it."""

    def __init__(self, launches):
        super().__init__()
        self._launches, self._alive = launches, {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        # What a launch takes lives no longer for it.
        self._launches.clear()
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage()
            if id(storage) not in self._alive:
                self._alive[id(storage)] = storage.nbytes()
                weakref.finalize(storage, self._alive.pop, id(storage))
        self.peak = max(self.peak, sum(self._alive.values()))
        return result


@pytest.mark.parametrize(("states", "maps"), [(1, 9), (16, 9)])
def test_the_memory_that_a_backward_pass_takes_for_itself(states, maps, model):
    from mmvmamba_kernels.backends.triton import low_rank, scan
    from mmvmamba_kernels.selective_scan_2d import triton_impl
    from mmvmamba_kernels.selective_scan_2d.arguments import Arguments

    harness, record = model("harness"), model("record")
    with harness.recording(scan, low_rank) as launches, Memory(launches) as memory:
        arguments = Arguments(**record.core_arguments(SHAPE, states))
        carries = harness.meta(*triton_impl.carries_shape(arguments), dtype=torch.float32)
        grad = harness.meta(*SHAPE)
        grads = triton_impl.backward(grad, carries, arguments)
    given = sum(t.nbytes for t in (*arguments[:6], carries, grad, *grads))
    assert maps - 1 < (memory.peak - given) / grad.nbytes < maps
