"""Throughput: the right models in the right modes, and a command line that reports them."""

import csv
import subprocess
import sys

import pytest
import torch

from mmvmamba.analysis.throughput import Case, build_classifier, measure

CPU = torch.device("cpu")


def test_our_classifier_is_the_official_one_in_size():
    with torch.device("meta"):
        model = build_classifier("tiny-s1l8")
    assert sum(p.numel() for p in model.parameters()) == 30249064


def test_unknown_model_is_named():
    with pytest.raises(ValueError, match="'swin_t' is neither an arch of VMamba"):
        build_classifier("swin_t")


@pytest.mark.parametrize("precision", ["fp32", "autocast", "bf16"])
@pytest.mark.parametrize("passes", ["inference", "training"])
def test_a_measurement(passes, precision):
    result = measure("tiny-s1l8", Case(passes, precision, 1, 32), CPU, seconds=0)
    assert result.p20 <= result.seconds <= result.p80
    assert result.images_per_second == pytest.approx(1 / result.seconds)
    assert result.params == 30249064


def test_command_line(project, tmp_path):
    file = tmp_path / "new" / "rows.csv"
    command = [sys.executable, project / "tools/analysis_tools/benchmark.py"]
    options = ["tiny", "resnet18", "--sizes", "32", "64", "--seconds", "0", "--device", "cpu"]
    run = subprocess.run(
        [*command, *options, "--passes", "inference", "--csv", file],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env={"COLUMNS": "200", "PATH": "/usr/bin:/bin"},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    rows = list(csv.DictReader(file.open(encoding="utf-8")))
    assert [(row["model"], row["size"]) for row in rows] == [
        ("tiny", "32"),
        ("resnet18", "32"),
        ("tiny", "64"),
        ("resnet18", "64"),
    ]
    assert all(float(row["seconds"]) > 0 for row in rows)
    assert "x first" in run.stdout
