"""The benchmark script: it checks before it times."""

import csv
import importlib.util
import sys
from pathlib import Path

import pytest

import mmvmamba_kernels
from mmvmamba_kernels import dispatch


@pytest.fixture
def benchmark(monkeypatch):
    path = Path(mmvmamba_kernels.__file__).parents[1] / "benchmarks" / "run.py"
    if not path.exists():
        pytest.skip("the package is installed without its benchmarks")
    spec = importlib.util.spec_from_file_location("kernel_benchmarks", path)
    module = importlib.util.module_from_spec(spec)
    # Where dataclasses look up annotations.
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "shapes", lambda _suite, _gpu: [module.Shape(1, 3, 4, 16)])
    monkeypatch.setattr(module, "copy_rate", lambda _device: 10.0)
    return module


def arguments(op, file, backend="reference"):
    fixed = ["--device", "cpu", "--dtype", "float32", "--seconds", "0"]
    return ["--op", op, "--backends", backend, *fixed, "--csv", str(file)]


@pytest.mark.parametrize(
    "op",
    [
        "add_layer_norm",
        "depthwise_conv",
        "selective_scan",
        "selective_scan_2d",
        "selective_scan_2d_norm",
    ],
)
def test_rows_are_appended(op, benchmark, tmp_path, capsys):
    file = tmp_path / "new" / "rows.csv"
    for _ in range(2):
        benchmark.main(arguments(op, file))
    rows = list(csv.DictReader(file.open(encoding="utf-8")))
    assert [row["passes"] for row in rows] == ["forward", "forward + backward"] * 2
    for row in rows:
        assert (row["op"], row["backend"], row["shape"]) == (op, "reference", "1 x 3 x 4 x 16")
        assert "torch" in row["versions"]
        assert "CPU" in row["device"]
        assert float(row["median_ms"]) > 0
        assert float(row["error"]) < 1e-4
    assert "of copy" in capsys.readouterr().out


def test_a_wrong_result_has_no_time(benchmark, monkeypatch, tmp_path, capsys):
    right = benchmark.runner
    monkeypatch.setattr(
        benchmark, "runner", lambda op, backend: lambda **t: 2 * right(op, backend)(**t)
    )
    file = tmp_path / "rows.csv"
    benchmark.main(arguments("selective_scan", file))
    assert not file.exists()
    assert "wrong, not timed" in capsys.readouterr().out


def test_a_refusal_is_explained(benchmark, monkeypatch, tmp_path, capsys):
    refusing = dispatch.Backend("nowhere", "nowhere", can_run=lambda _: "there is no such machine")
    monkeypatch.setitem(dispatch._registry, "selective_scan", [refusing])
    file = tmp_path / "rows.csv"
    benchmark.main(arguments("selective_scan", file, "nowhere"))
    assert not file.exists()
    assert "there is no such machine" in capsys.readouterr().out
