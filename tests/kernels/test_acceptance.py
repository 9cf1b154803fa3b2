"""The acceptance run of a machine with a GPU, on one without: tiny sizes, every part that can."""

import contextlib
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mmvmamba_kernels
from mmvmamba_kernels.backends.triton.support import interpreting

FOLDER = Path(mmvmamba_kernels.__file__).parents[1] / "benchmarks"
CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(
    not (FOLDER / "acceptance").exists(), reason="the package is installed without its benchmarks"
)


@pytest.fixture
def part(monkeypatch):
    """A module of the run by name."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return lambda name: importlib.import_module(f"acceptance.{name}")


@pytest.fixture
def run(part):
    """A run of tiny sizes."""
    backend = "triton" if interpreting() else None
    return part("run").Run(CPU, backend, tiny=True, deadline=float("inf"))


def graph(function):
    """Stands in for a CUDA graph: a replay computes again into the same tensors."""
    outputs = function()

    def replay():
        for name, tensor in function().items():
            outputs[name].copy_(tensor)

    return replay, outputs


@pytest.mark.triton
def test_the_operators_parts_through_the_interpreter(run, part):
    operators = part("operators")
    rows = operators.check_values(run)
    assert {row["case"].split()[0] for row in rows} == set(operators.ORACLES)
    assert all(row["right"] and row["error"] > 0 for row in rows)
    operators.check_tf32(run)
    assert all(row["equal"] for row in operators.check_repeats(run))
    assert {row["passes"] for row in operators.check_graphs(run, graph)} == {
        "forward",
        "both passes",
    }
    assert run.status == 0
    assert {verdict.section for verdict in run.verdicts} == {"values", "repeats", "graphs"}


def test_wrong_results_are_noticed(run, part, monkeypatch):
    operators = part("operators")
    (case,) = operators.large_cases(tiny=True)
    monkeypatch.setattr(operators, "cases", lambda _tiny: [case])
    right, calls = operators.Case.run, []

    def wrong(case, backend, **tensors):
        calls.append(case)
        return right(case, backend, **tensors) * (1 + 0.01 * len(calls))

    monkeypatch.setattr(operators.Case, "run", wrong)
    assert not any(row["right"] for row in operators.check_values(run))
    assert not any(row["equal"] for row in operators.check_repeats(run))
    assert not any(row["equal"] for row in operators.check_graphs(run, graph))
    assert {verdict.verdict for verdict in run.verdicts} == {"wrong"}
    assert run.status == 1


def test_a_part_that_fails_is_a_verdict_and_time_is_kept(run):
    def broken(_):
        raise ValueError("no such thing")

    run.section("core", broken)
    run.deadline = 0
    run.section("models", lambda _: pytest.fail("there is no time"))
    found = {v["section"]: (v["verdict"], v["found"]) for v in run.record()["verdicts"]}
    assert found["core"] == ("wrong", "ValueError: no such thing")
    assert found["models"][0] == "left out"
    assert run.status == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_a_line(part, capsys, tmp_path):
    main = part("__main__")
    assert main.main(["--out", str(tmp_path / "none.json")]) == main.NO_GPU
    assert capsys.readouterr().out.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(interpreting(), reason="TRITON_INTERPRET=1: there is nothing to compile")
@pytest.mark.parametrize("tiny", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_what_the_cases_call_is_compiled_first(tiny, run, part, monkeypatch):
    pytest.importorskip("triton", "3.5", "there is no Triton 3.5 or later")
    compiler = importlib.import_module("mmvmamba_kernels.backends.triton.precompile")
    target, asked = compiler.Target.parse("sm_90"), []
    monkeypatch.setattr(compiler.Target, "here", lambda: target)
    monkeypatch.setattr(compiler, "compile_kernels", lambda *call: asked.append(call) or 5)
    run.backend, run.tiny = "triton", tiny
    assert part("operators").compile_cases(run)["kernels"] == 5
    ((kernels, of),) = asked
    assert of is target
    names = {kernel.name for kernel in kernels}
    passes = ("fwd", "bwd") if tiny else ("fwd", "bwd", "state", "carry")
    assert {f"selective_scan_{p}_kernel" for p in passes} <= names
    assert {
        f"{op}_{p}_kernel" for op in ("layer_norm", "depthwise_conv") for p in ("fwd", "bwd")
    } <= names


@pytest.mark.parametrize("refused", [True, False])
def test_whether_a_capture_was_refused_is_seen(refused, run, part, monkeypatch):
    def call(**_):
        if refused:
            raise RuntimeError("not compiled: run the model once before the capture")

    monkeypatch.setattr(mmvmamba_kernels, "selective_scan_2d", call)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", lambda _: contextlib.nullcontext())
    part("operators").check_refusal(run)
    assert [v.verdict for v in run.verdicts] == ["met" if refused else "wrong"]


BLOCKED = """
import sys
class Blocker:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in ("mmengine", "mmcv", "mmdet", "mmseg", "mmpretrain"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: (
    None if name in ("mmengine", "mmcv") else find_spec(name, package)
)
"""


@pytest.mark.skipif(interpreting(), reason="TRITON_INTERPRET=1: there is nothing to compile")
def test_a_checkout_without_openmmlab_is_timed(part, tmp_path):
    """As a user starts it, from JSON to Markdown, but for what the interpreter runs above.

    The model that is timed is the one that the project has.
    """
    pytest.importorskip("timm")
    (tmp_path / "sitecustomize.py").write_text(BLOCKED)
    file = tmp_path / "run.json"
    command = [sys.executable, str(FOLDER / "acceptance"), "--device", "cpu", "--backend", "auto"]
    done = subprocess.run(
        [
            *command,
            "--tiny",
            "--out",
            str(file),
            "--only",
            "compiling",
            "core",
            "states",
            "models",
            "backbones",
        ],
        env={**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert file.exists(), done.stdout + done.stderr
    record = json.loads(file.read_text())
    assert "without mmengine" in record["about"]["backbone"]
    wrong = [v for v in record["verdicts"] if v["verdict"] == "wrong"]
    assert not wrong, wrong
    # 30.2 million in the paper's table 8.
    ours = [row for row in record["models"] if row["model"] == "vmamba-tiny"]
    assert {row["params"] for row in ours} == {30_249_064}
    assert [row["case"]["passes"] for row in record["backbones"]] == ["inference"]
    assert set(record["compiling"]["kernels"]) == {"fp32, inference"}
    text = part("report").markdown(record)
    for cell in ("| 1, 2, 3, 32 |", "| inference, 2x32x32, images/s (peak GB) | vmamba-tiny |"):
        assert cell in text, text
