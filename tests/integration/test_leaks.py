"""Long runs hold no more at their end than at their beginning: memory, files, threads, kernels."""

import collections
import importlib
import itertools
import os
import random
import statistics
import sys
from pathlib import Path

import pytest
import torch
from leaks import Sample, mallinfo2
from tiny import run_python
from torch._dynamo.testing import CompileCounterWithBackend

from mmvmamba.models import VMamba

WINDOWS = 4

needs_glibc = pytest.mark.skipif(
    sys.platform != "linux" or mallinfo2() is None,
    reason="what malloc has given out is asked of glibc 2.33 or later",
)


def record(folder: Path, sample_data: Path, *runs: str | int, **environment) -> None:
    """Writes the samples of runs, each given as its name and its steps, below a folder."""
    program = Path(__file__).with_name("leaks.py")
    helpers = (str(program.parents[1]), os.environ.get("PYTHONPATH", ""))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, helpers))
    # A fork would have libraries that have read the sizes of their caches already.
    arguments = (program, folder, sample_data, *map(str, runs))
    run_python(*arguments, cwd=folder, timeout=7200, cold=True, **environment)


def excesses(samples: list[Sample], warm_up: int, bounds: dict[str, float]) -> dict[str, float]:
    """What grew by more than it may from the window after the warm-up to the last one.

    Args:
        samples: All samples, of which the windows are quarters.
        warm_up: How many windows pass before the first that counts.
        bounds: The most that may come on top, by the names of `Sample`'s fields.
    """
    size = len(samples) // WINDOWS
    first, last = samples[warm_up * size : (warm_up + 1) * size], samples[-size:]
    growth = {
        name: statistics.median(getattr(sample, name) for sample in last)
        - statistics.median(getattr(sample, name) for sample in first)
        for name in bounds
    }
    return {name: found for name, found in growth.items() if found > bounds[name]}


# PyTorch's and oneDNN's caches of compiled products and convolutions hold 1,024 each, and sizes are
# new in every step: in short runs they are made so small that they are soon full. With a fixed
# threshold, malloc gives large blocks back at once, and fragments of the heap hide no leak.
SMALL_CACHES = {
    "LRU_CACHE_CAPACITY": "64",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
    "MALLOC_MMAP_THRESHOLD_": "131072",
}
# In MiB and numbers. What malloc has given out moves by a tenth of a MiB; kernels are of several
# sizes. Free parts of the heap are resident too, and blocks of ever other sizes fragment it.
SHORT = {"allocated": 1.0, "resident": 8.0, "compiled": 8.0, "files": 0, "threads": 0}
# mmengine keeps every value that it logs, by design, in a training.
LONG = SHORT | {"allocated": 4.0, "resident": 160.0}
STEPS = {"train": 2000, "infer": 5000}


SHORT_STEPS = {"train-mmseg": 36, "infer-mmdet": 48, "leak-backbone": 40}


@pytest.fixture(scope="module")
def short_runs(sample_data, tmp_path_factory) -> Path:
    """The folder of the short runs' samples."""
    folder = tmp_path_factory.mktemp("leaks")
    record(folder, sample_data, *itertools.chain(*SHORT_STEPS.items()), **SMALL_CACHES)
    return folder


@needs_glibc
@pytest.mark.parametrize("run", ["train-mmseg", "infer-mmdet"])
def test_nothing_is_left_behind(run, short_runs):
    assert not excesses(Sample.read(short_runs / run), 2, SHORT)


@needs_glibc
@pytest.mark.slow
@pytest.mark.parametrize(("run", "steps"), [("train-backbone", 60), ("infer-backbone", 150)])
def test_the_backbone_leaves_nothing_behind(run, steps, sample_data, tmp_path):
    record(tmp_path, sample_data, run, steps, **SMALL_CACHES)
    assert not excesses(Sample.read(tmp_path / run), 2, SHORT)


@needs_glibc
def test_what_is_left_behind_is_noticed(short_runs):
    found = excesses(Sample.read(short_runs / "leak-backbone"), 2, SHORT)
    assert {"allocated", "files", "threads"} <= set(found)


@needs_glibc
@pytest.mark.slow
@pytest.mark.parametrize("name", ["backbone", "mmdet", "mmseg", "mmpretrain"])
@pytest.mark.parametrize("what", STEPS)
def test_nothing_is_left_behind_in_a_long_run(what, name, sample_data, tmp_path):
    run = f"{what}-{name}"
    record(tmp_path, sample_data, run, STEPS[what])
    assert not excesses(Sample.read(tmp_path / run), 1, LONG)


def test_triton_compiles_no_kernel_for_a_size_of_images(monkeypatch):
    """Kernels are compiled for what is constant in them, and for kinds of numbers among arguments.

    Nothing is launched: without a GPU, what would be is recorded.
    """
    pytest.importorskip("triton", "3.5", "there is no Triton 3.5 or later")
    jit = importlib.import_module("triton.runtime.jit")
    # Before the variable below is set: Triton looks at it when it meets a kernel.
    for module in ("selective_scan_2d", "layer_norm", "depthwise_conv"):
        importlib.import_module(f"mmvmamba_kernels.{module}.triton_impl")
    launched = collections.defaultdict(set)

    def record_launch(self, *arguments, grid, warmup, **options):
        constants = tuple(sorted((name, str(value)) for name, value in options.items()))
        launched[self.fn.__name__].add((constants, tuple(map(specialisation, arguments))))

    monkeypatch.setattr(jit.JITFunction, "run", record_launch)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("MMVMAMBA_KERNELS_BACKEND", "triton")
    model = VMamba({"dims": 16, "depths": (1, 1)}, drop_path_rate=0.0)
    counts = []
    random.seed(0)
    for _ in range(2):
        for _ in range(60):
            image = torch.randn(1, 3, random.randint(32, 160), random.randint(32, 160))
            sum(out.sum() for out in model(image)).backward()
        counts.append(
            {
                name: (len({constants for constants, _ in seen}), len(seen))
                for name, seen in launched.items()
            }
        )
    assert counts[0]
    for name, (constants, variants) in counts[1].items():
        # Constants come from the model, and not one more from sixty further sizes.
        assert constants == counts[0][name][0], name
        # Numbers are compiled for being 1, a multiple of 16, or neither.
        assert variants <= 16 * constants, name


def specialisation(argument) -> str:
    """What Triton compiles a kernel for, of an argument that is not a constant of it."""
    if isinstance(argument, torch.Tensor):
        return f"{argument.dtype} {argument.data_ptr() % 16 == 0}"
    if isinstance(argument, int):
        return f"{argument == 1} {argument % 16 == 0} {abs(argument) < 2**31}"
    return type(argument).__name__


def test_torch_compiles_no_graph_for_a_size_of_images():
    """The first sizes show what changes; then graphs are for any size."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    model = VMamba({"dims": 8, "depths": [1]}, drop_path_rate=0.0)
    model.compile(backend=counter)
    random.seed(0)
    counts = []
    for _ in range(8):
        image = torch.randn(1, 3, 4 * random.randint(8, 32), 4 * random.randint(8, 32))
        sum(out.sum() for out in model(image)).backward()
        counts.append(counter.frame_count)
    assert 1 <= counts[3] == counts[-1]
    torch._dynamo.reset()
