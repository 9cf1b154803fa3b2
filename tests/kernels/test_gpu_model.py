"""The model of GPU times: it gives what it was calibrated to, and it knows the kernels."""

import importlib
from pathlib import Path

import pytest

import mmvmamba_kernels
from mmvmamba_kernels.backends.triton.support import interpreting

pytestmark = pytest.mark.skipif(
    interpreting(), reason="TRITON_INTERPRET=1: kernels are Python functions, nothing to compile"
)
triton = pytest.importorskip("triton", reason="Triton is not installed")

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
# The cheapest to replay; the others are as long as the model's use.
FIRST = (128, 7, 7, 768)


@pytest.fixture
def model(monkeypatch, tmp_path):
    """A module of the model by name; what it compiles goes to a folder of the test."""
    if not (FOLDER / "gpu_model").exists():
        pytest.skip("the package is installed without its benchmarks")
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setenv("GPU_MODEL_OUT", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    return lambda name: importlib.import_module(f"gpu_model.{name}")


@pytest.mark.skipif(triton.__version__ != VERSION, reason=f"the table is of Triton {VERSION}")
@pytest.mark.parametrize(
    "shape", [pytest.param(s, marks=() if s == FIRST else pytest.mark.slow) for s in TABLE], ids=str
)
def test_the_calibration_is_what_the_readme_says(shape, model):
    predicted, _ = model("calibrate").serial_scans(shape)
    assert predicted == pytest.approx(TABLE[shape], abs=6e-4)
    row = f"| {', '.join(map(str, shape))} | {TABLE[shape]:.3f} |"
    assert row in (FOLDER / "gpu_model" / "README.md").read_text()


def test_it_predicts_a_kernel_of_the_package(model):
    record, predict = model("record"), model("predict")
    shape = (128, 7, 7, 96)
    launch, norm = record.core_launches(shape)["inference forward"]
    assert (launch.name, norm.name) == ("selective_scan_fwd_kernel", "layer_norm_fwd_kernel")
    found = predict.predict(launch, shape)
    assert 0 < found.ms < 1
    assert found.resident > 0
    assert predict.predict(norm, shape).ms > 0
