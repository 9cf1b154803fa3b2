"""The doctor: all well here, and each fault is its own line with the command that mends it."""

import dataclasses
import importlib.metadata
import io
import json
import os
import subprocess
import sys

import pytest
import torch
from packaging.specifiers import SpecifierSet
from rich.console import Console
from stand_ins import stand_in

from mmvmamba import compat, doctor
from mmvmamba_kernels import dispatch
from mmvmamba_kernels.backends.native import extension
from mmvmamba_kernels.backends.triton import support as triton_support

OPERATORS = {f"{op} on cpu" for op in dispatch.operators()}


def faults() -> dict[str, doctor.Finding]:
    return {f.check: f for f in doctor.examine() if f.status in ("warning", "error")}


def pretend_version(monkeypatch, package: str, version: str | None) -> None:
    real, real_provider = compat.installed_version, compat.provider
    module = compat.module_of(package)

    def provider(name):
        if name != module:
            return real_provider(name)
        return (package, version) if version else None

    monkeypatch.setattr(
        compat, "installed_version", lambda name: version if name == package else real(name)
    )
    monkeypatch.setattr(compat, "provider", provider)


def distribution(module: str) -> str:
    """Of the stack that is installed."""
    [name] = [one for one in compat.stack() if compat.module_of(one) == module]
    return name


@pytest.fixture(autouse=True)
def no_setting(monkeypatch):
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)


@pytest.fixture
def cpu_only(monkeypatch):
    """A machine without a GPU or a driver of one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr(doctor.Path, "exists", lambda path: False)
    return torch


def test_nothing_is_wrong_here():
    findings = list(doctor.examine())
    assert [f for f in findings if f.status == "error"] == []
    checks = {f.check: f for f in findings}
    # Advice of a package stands beside what is there.
    said = [f.check for f in findings if f.status != "warning" or f.check not in compat.ADVISED]
    assert len(said) == len(set(said))
    assert set(checks) >= OPERATORS
    for task in doctor.CONFIGS:
        assert checks[f"import {distribution(task)}"].status == "ok"
    # What stands behind "ok" is a number.
    for dtype, tolerance in doctor.TOLERANCES.items():
        found = checks[f"forward and backward, {dtype} on cpu"].found
        assert 0 <= float(found.split()[1]) <= tolerance


@pytest.mark.parametrize(
    ("package", "version"), [("mmcv", "2.4.0"), ("mmengine", "0.11.0"), ("setuptools", "82.0.0")]
)
def test_a_wrong_version_is_one_error_with_its_command(monkeypatch, package, version):
    if package == "setuptools" and package not in compat.stack():
        pytest.skip("OneDL's packages do without setuptools")
    package = distribution(package)
    pretend_version(monkeypatch, package, version)
    errors = {f.check: f for f in doctor.examine() if f.status == "error"}
    assert set(errors) == {package}
    found = errors[package]
    assert (found.found, found.command) == (version, compat.stack_command(package))
    assert f"{package} {version}" in found.problem


@pytest.mark.parametrize(("package", "version"), [("numpy", "2.4.1"), ("torch", "2.9.1")])
def test_what_is_advised_is_a_warning(monkeypatch, package, version):
    pretend_version(monkeypatch, package, version)
    found = faults()[package]
    assert (found.status, found.command) == ("warning", compat.ADVISED[package][1])
    assert str(compat.ADVISED[package][0]) in found.problem


def test_a_mixture_of_stacks_is_one_error_and_is_not_imported(monkeypatch, tmp_path):
    own = distribution("mmdet")
    other = next(one for one in compat.MODULES["mmdet"] if one != own)
    stacks = [one for names in compat.MODULES.values() for one in names if one in compat.stack()]
    versions = [(one, compat.installed_version(one)) for one in stacks]
    stand_in(monkeypatch, tmp_path, *versions, (other, "3.4.9"))
    errors = {f.check: f for f in doctor.examine() if f.status == "error"}
    assert set(errors) == {own}
    found = {own: compat.installed_version(own), other: "3.4.9"}
    both = " and ".join(f"{one} {found[one]}" for one in compat.MODULES["mmdet"])
    assert f"{both} are both installed" in errors[own].problem
    assert errors[own].command == (
        f"pip uninstall -y {' '.join(compat.MODULES['mmdet'])} && {compat.stack()[own][1]}"
    )
    assert f"import {own}" not in {f.check for f in doctor.check_tasks()}


def test_what_no_test_has_seen_is_a_warning(monkeypatch):
    pretend_version(monkeypatch, "torch", "2.15.0")
    found = [f for f in doctor.check_packages() if f.check == "torch"]
    assert [(f.status, f.command) for f in found] == [("warning", compat.STACK["torch"][1])]


def test_a_task_that_is_not_installed_is_no_fault(monkeypatch):
    task = distribution("mmpretrain")
    pretend_version(monkeypatch, task, None)
    findings = {f.check: f for f in doctor.examine()}
    assert findings[task].status == "skipped"
    assert f"import {task}" not in findings
    assert not any(f.status == "error" for f in findings.values())


def test_another_python_is_an_error(monkeypatch):
    monkeypatch.setattr(doctor.platform, "python_version", lambda: "3.9.18")
    found = {f.check: f for f in doctor.check_packages() if f.status == "error"}
    assert set(found) == {"Python"}
    assert str(compat.PYTHON) in found["Python"].problem


def test_the_window_of_python_is_the_one_of_the_package():
    declared = importlib.metadata.metadata("mmvmamba")["Requires-Python"]
    assert SpecifierSet(declared) == compat.PYTHON


def test_mmcv_without_operators_is_one_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "mmcv._ext", None)
    found = {f.check: f for f in doctor.examine() if f.status == "error"}
    assert set(found) == {"mmcv's operators"}
    command = found["mmcv's operators"].command
    # OneDL's builds them unasked.
    assert ("MMCV_WITH_OPS=1" in command) == (compat.stack() is compat.STACK)
    assert "--no-binary" in command
    assert "--force-reinstall" in command
    # Nothing of mmdet or mmseg can be imported without them, so that is not tried.
    assert [f.check for f in doctor.examine() if f.status == "skipped"][-1] == "tasks"


def test_mmcv_lite_is_to_be_removed(monkeypatch):
    monkeypatch.setitem(sys.modules, "mmcv._ext", None)
    pretend_version(monkeypatch, "mmcv-lite", "2.1.0")
    [found] = doctor.check_mmcv()
    assert found.command.startswith("pip uninstall -y mmcv-lite && pip install")


@pytest.mark.parametrize("package", ["numpy", "setuptools"])
def test_a_package_that_everything_needs_is_an_error(monkeypatch, package):
    if package == "setuptools" and compat.stack() is compat.ONEDL:
        pytest.skip("OneDL's packages do not need it")
    pretend_version(monkeypatch, package, None)
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    [found] = [f for f in doctor.check_packages() if f.status == "error"]
    assert found.check == package
    assert found.command.startswith(f'pip install "{package}<')


def test_operators_that_compute_nonsense_are_an_error(monkeypatch):
    import mmcv.ops

    monkeypatch.setattr(mmcv.ops, "nms", lambda boxes, scores, iou: (None, torch.tensor([1])))
    found = faults()["mmcv's operators on cpu"]
    assert (found.status, "[1]" in found.problem) == ("error", True)


@pytest.mark.parametrize(
    ("missing", "command"),
    [
        ("ftfy", "pip install ftfy"),
        ("cv2", "pip install opencv-python-headless"),
        ("pkg_resources", compat.STACK["setuptools"][1]),
    ],
)
def test_a_package_that_a_task_needs_is_named(monkeypatch, missing, command):
    def import_module(name):
        if name == "mmseg.models":
            raise ModuleNotFoundError(f"No module named '{missing}'", name=missing)
        return sys.modules.get(name)

    monkeypatch.setattr(doctor.importlib, "import_module", import_module)
    [found] = [f for f in doctor.check_tasks() if f.status == "error"]
    assert found.check == f"import {distribution('mmseg')}"
    assert found.command == command


def test_a_missing_library_is_one_warning(monkeypatch, tmp_path):
    monkeypatch.setattr(extension, "search_path", lambda: (tmp_path, tmp_path))
    extension.load.cache_clear()
    try:
        found = {f.check: f for f in doctor.check_kernels()}
    finally:
        extension.load.cache_clear()
    faulty = {check for check, f in found.items() if f.status != "ok"}
    assert faulty == {"kernels: CPU library"}
    assert found["kernels: CPU library"].status == "warning"
    assert found["kernels: CPU library"].command == extension.BUILD_COMMAND
    assert "is not built" in found["kernels: CPU library"].problem
    # The operators say what they take instead; why is the library's own finding.
    assert found["selective_scan_2d on cpu"].found == "reference"


def test_a_library_for_other_sources_is_told_from_none(monkeypatch, tmp_path):
    (tmp_path / "libmmvmamba_kernels-0123456789abcdef.so").touch()
    monkeypatch.setattr(extension, "search_path", lambda: (tmp_path, tmp_path))
    extension.load.cache_clear()
    try:
        found = next(f for f in doctor.check_kernels())
    finally:
        extension.load.cache_clear()
    assert found.status == "warning"
    assert "was built from other sources" in found.problem


def test_a_slow_backend_on_a_gpu_is_a_warning(monkeypatch):
    monkeypatch.setattr(doctor, "_devices", lambda: ["cpu", "cuda:0"])
    found = {f.check: f for f in doctor.check_kernels()}
    scan = found["selective_scan_2d on cuda:0"]
    if triton_support.TORCH_IS_OLD:
        assert (scan.status, scan.command) == ("warning", compat.ADVISED["torch"][1])
        assert "the kernels need Triton 3.5" in scan.found
        monkeypatch.setattr(triton_support, "TORCH_IS_OLD", False)
    else:
        assert (scan.found, scan.status) == ("triton", "ok")
    monkeypatch.setattr(torch.version, "cuda", None)
    backends = {
        op: [
            dataclasses.replace(one, can_run=lambda _: "Triton is not installed")
            if one.name == "triton"
            else one
            for one in registered
        ]
        for op, registered in dispatch._registry.items()
    }
    monkeypatch.setattr(dispatch, "_registry", backends)
    found = {f.check: f for f in doctor.check_kernels()}
    scan = found["selective_scan_2d on cuda:0"]
    assert (scan.status, scan.command) == ("warning", "pip install triton")
    assert "triton: Triton is not installed" in scan.found
    assert "cpp: the CUDA kernels need a PyTorch that is built for CUDA" in scan.found
    # The reference of the normalisation is as good as any kernel.
    assert found["layer_norm on cuda:0"].status == "ok"


def test_a_backend_that_is_refused_is_an_error(monkeypatch):
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    findings = list(doctor.examine())
    found = {f.check: f for f in findings if f.status == "error"}
    with_triton = {op for op in dispatch.operators() if "triton" in dispatch.available_backends(op)}
    assert set(found) == {f"{op} on cpu" for op in with_triton}
    assert {f.command for f in found.values()} == {f"unset {dispatch.ENVIRONMENT_VARIABLE}"}
    assert findings[-1].check == "model"
    assert findings[-1].status == "skipped"


def test_a_backend_that_was_asked_for_is_named(monkeypatch):
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "reference")
    found = {f.check: f for f in doctor.check_kernels()}
    assert found["selective_scan_2d on cpu"].found == "reference (asked for)"
    assert found["selective_scan_2d on cpu"].status == "ok"


def test_a_scope_without_configs_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "__file__", str(tmp_path / "mmvmamba/doctor.py"))
    found = {f.check: f for f in doctor.check_configs() if f.status == "error"}
    assert set(found) == {"config scope mmvmamba::"}
    assert found["config scope mmvmamba::"].command.startswith("pip install --force-reinstall")


@pytest.mark.parametrize(("factor", "problem"), [(1.01, "differs"), (float("nan"), "not finite")])
def test_wrong_kernels_are_an_error(monkeypatch, factor, problem):
    real = doctor._step

    def step(model, device, dtype):
        parts = real(model, device, dtype)
        kernels = os.environ.get(dispatch.ENVIRONMENT_VARIABLE) != "reference"
        return [part * factor if kernels else part for part in parts]

    monkeypatch.setattr(doctor, "_step", step)
    found = {f.check: f for f in doctor.check_model() if f.status == "error"}
    # One part in a hundred is within bfloat16's rounding.
    checks = {f"forward and backward, {dtype} on cpu" for dtype in doctor.TOLERANCES}
    assert set(found) == (
        checks if factor != 1.01 else {min(checks, key=lambda c: "float3" not in c)}
    )
    assert all(problem in f.problem for f in found.values())
    assert {f.command for f in found.values()} == {"python -m mmvmamba_kernels.build --force"}


def test_no_gpu_is_no_fault(cpu_only):
    assert {f.check: f.status for f in doctor.check_torch()} == {"GPU": "ok", "triton": "skipped"}


@pytest.mark.parametrize(
    ("hidden", "cuda", "command"),
    [
        ("-1", "13.0", "unset CUDA_VISIBLE_DEVICES"),
        (None, None, "pip install --force-reinstall torch torchvision"),
        (None, "13.0", "nvidia-smi"),
    ],
)
def test_a_gpu_that_torch_does_not_see_is_a_warning(cpu_only, monkeypatch, hidden, cuda, command):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    found = {f.check: f for f in doctor.check_torch()}["GPU"]
    assert (found.status, found.command) == ("warning", command)


def test_a_gpu_without_triton_is_a_warning(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "GPU of a test")
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    found = {f.check: f for f in doctor.check_torch()}
    assert found["GPU"].found.startswith("2 x GPU of a test")
    assert (found["triton"].status, found["triton"].command) == ("warning", "pip install triton")


@pytest.mark.parametrize("status", ["ok", "warning", "error"])
def test_the_exit_status_and_the_json(monkeypatch, capsys, status):
    finding = doctor.Finding("a check", status, "found", "a [problem]", "mend it")
    monkeypatch.setattr(doctor, "examine", lambda: iter([finding]))
    assert doctor.main(["--json"]) == (1 if status == "error" else 0)
    result = json.loads(capsys.readouterr().out)
    assert result["well"] == (status != "error")
    assert result["checks"] == [dataclasses.asdict(finding)]


def test_the_report_has_every_line_and_commands_unwrapped():
    command = "pip install " + "x" * 200
    findings = [
        doctor.Finding("first", "ok", "fine"),
        doctor.Finding("second", "error", "", "a [problem]", command),
    ]
    console = Console(width=60, record=True, file=io.StringIO())
    doctor.report(findings, console)
    text = console.export_text()
    assert f"\n    {command}\n" in text
    assert "a [problem]" in text
    assert "1 errors, 0 warnings" in text


def run_doctor(folder, *blocked: str) -> subprocess.CompletedProcess:
    """Runs the doctor where some modules cannot be imported and are not installed."""
    (folder / "sitecustomize.py").write_text(
        "import importlib.metadata as metadata, sys\n"
        f"blocked = {blocked!r}\n"
        "real = metadata.version\n"
        "def version(name):\n"
        "    if name in blocked:\n"
        "        raise metadata.PackageNotFoundError(name)\n"
        "    return real(name)\n"
        "metadata.version = version\n"
        "sys.modules.update(dict.fromkeys(blocked))\n"
    )
    path = os.pathsep.join([str(folder), *filter(None, sys.path)])
    return subprocess.run(
        [sys.executable, "-m", "mmvmamba.doctor", "--json"],
        env={**os.environ, "PYTHONPATH": path},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.mark.parametrize("package", ["mmcv", "torch", "mmengine"])
def test_it_runs_where_the_stack_is_missing(tmp_path, package):
    name = distribution(package)
    done = run_doctor(tmp_path, package, name)
    assert done.returncode == 1, done.stderr[-3000:]
    findings = json.loads(done.stdout)["checks"]
    errors = [f for f in findings if f["status"] == "error"]
    assert [f["check"] for f in errors] == [name]
    # The stand-in leaves the metadata of what pip would take for installed.
    assert errors[0]["command"].endswith(compat.stack()[name][1])
    assert "is not installed" in errors[0]["problem"]
    assert any(f["problem"] == f"needs {package}, see above" for f in findings)
    assert "Traceback" not in done.stderr


def test_only_the_doctor_is_spared_the_check(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["-m"])
    monkeypatch.setattr(sys, "orig_argv", [sys.executable, "-m", "mmvmamba.doctor"])
    assert compat.imported_for("mmvmamba.doctor")
    for others in (["mmvmamba.engine.launch"], ["other", "mmvmamba.doctor"]):
        monkeypatch.setattr(sys, "orig_argv", [sys.executable, "-m", *others])
        assert not compat.imported_for("mmvmamba.doctor")
    monkeypatch.setattr(sys, "argv", ["train.py", "mmvmamba.doctor"])
    monkeypatch.setattr(sys, "orig_argv", [sys.executable, "train.py", "mmvmamba.doctor"])
    assert not compat.imported_for("mmvmamba.doctor")


def test_the_launcher_is_spared_the_imports_of_trainings():
    """They take as long as its own."""
    command = [sys.executable, "-X", "importtime", "-m", "mmvmamba.engine.launch", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "torch.distributed.run" in imported
    assert not imported & {"torchvision", "mmcv", "mmengine.runner"}
