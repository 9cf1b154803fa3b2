"""Checks an installation and says how to mend it: `python -m mmvmamba.doctor`.

Whatever is missing, of a wrong version or broken is a line of the report, so nothing but mmvmamba's
own dependencies is imported before it is looked at. See `--help`.
"""

import argparse
import contextlib
import dataclasses
import importlib
import json
import os
import platform
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn
from rich.table import Table

from mmvmamba import compat
from mmvmamba.version import __version__

Status = Literal["ok", "skipped", "warning", "error"]
STYLES: dict[Status, str] = {"ok": "green", "skipped": "dim", "warning": "yellow", "error": "red"}

# What imports of packages that do not fit one another raise: mmdet and mmseg assert their mmcv's
# version, compiled libraries do not load (OSError, RuntimeError), names have moved.
BROKEN = (ImportError, OSError, RuntimeError, AssertionError, AttributeError, TypeError, ValueError)
# A task's module -> one of our configs that is built on its own.
CONFIGS = {
    "mmdet": "mmvmamba::mask_rcnn/mask-rcnn_vmamba-tiny-s1l8_fpn_1x_coco.py",
    "mmseg": "mmvmamba::upernet/upernet_vmamba-tiny-s1l8_4xb4-160k_ade20k-512x512.py",
    "mmpretrain": "mmvmamba::vmamba/vmamba-tiny-s1l8_8xb128_in1k.py",
}
MODEL = {
    "type": "mmvmamba.VMamba",
    "arch": {"dims": 16, "depths": (1, 1), "d_state": 1, "ssm_ratio": 1.0, "mlp_ratio": 2.0},
    "out_indices": (0, 1),
}
# Largest relative errors of outputs and of gradients, as vectors, against the reference backend. In
# bfloat16 the backends round in other places, so that single roundings (2**-8) differ.
TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-2}
PLAIN_BACKEND = "export MMVMAMBA_KERNELS_BACKEND=reference"


@dataclasses.dataclass(frozen=True)
class Finding:
    """A line of the report.

    Attributes:
        check: What was looked at.
        status: 'ok'; 'skipped', where it could not be or need not be looked at; 'warning', which
            works, but slowly or not everywhere; or 'error'.
        found: What is there.
        problem: What is wrong with it, or why it was skipped.
        command: What mends it.
    """

    check: str
    status: Status
    found: str = ""
    problem: str = ""
    command: str = ""


def examine() -> Iterator[Finding]:
    """Looks at the installation, piece by piece.

    Yields:
        The findings, in the order in which they are to be mended.
    """
    # Groups of checks and packages that others need.
    failed: set[str] = set()
    for group, needs, check in (
        ("packages", set(), check_packages),
        ("torch", {"torch"}, check_torch),
        ("mmengine", {"torch", "mmengine"}, lambda: _check_import("mmengine", "mmengine.runner")),
        ("mmcv", {"torch", "mmengine", "mmcv"}, check_mmcv),
        ("tasks", {"torch", "mmengine", "mmcv"}, check_tasks),
        ("kernels", {"torch"}, check_kernels),
        ("configs", {"mmengine", "setuptools"}, check_configs),
        ("model", {"torch", "mmengine", "kernels"}, check_model),
    ):
        missing = sorted(needs & failed)
        if missing:
            failed.add(group)
            yield Finding(group, "skipped", problem=f"needs {', '.join(missing)}, see above")
            continue
        for finding in check():
            if finding.status == "error":
                failed |= {group, compat.module_of(finding.check)}
            yield finding


def check_packages() -> Iterator[Finding]:
    """Compares versions with those that work together."""
    python = platform.python_version()
    if compat.PYTHON.contains(python, prereleases=True):
        yield Finding("Python", "ok", f"{python}, {sys.executable}")
    else:
        yield Finding(
            "Python",
            "error",
            python,
            f"mmvmamba needs {compat.PYTHON}",
            "PYTHON=python3.13 bash tools/setup_env.sh",
        )
    yield Finding("mmvmamba", "ok", f"{__version__}, {Path(__file__).parent}")
    stack = compat.stack()
    for name, (window, _) in stack.items():
        found, problem = compat.stack_version(name), compat.stack_problem(name)
        command = compat.stack_command(name)
        if problem:
            yield Finding(name, "error", found or "not installed", problem, command)
        elif untested := compat.untested(name):
            yield Finding(name, "warning", found, untested, command)
        elif found:
            yield Finding(name, "ok", f"{found} ({window})")
        elif compat.module_of(name) in CONFIGS:
            yield Finding(name, "skipped", "not installed", "needed for its own task only", command)
        elif find_spec(name) is not None:
            yield Finding(name, "ok", "under another name")
        else:
            yield Finding(name, "error", "not installed", f"mmvmamba needs {window}", command)
    for name, (window, command, lost) in compat.ADVISED.items():
        found = compat.installed_version(name)
        fits = found is not None and window.contains(found, prereleases=True)
        if name in stack and (found is None or fits or compat.stack_problem(name)):
            continue
        if found is None:
            yield Finding(name, "error", "not installed", f"mmvmamba needs {name}", command)
        elif fits:
            yield Finding(name, "ok", f"{found} ({window})")
        else:
            problem = f"{name} {found} is not {window}: {lost}"
            yield Finding(name, "warning", found, problem, command)


def check_torch() -> Iterator[Finding]:
    """Imports PyTorch and looks for GPUs and Triton."""
    failure = _import("torch")
    if failure:
        yield Finding("import torch", "error", "", *failure)
        return
    import torch

    runtime = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    if torch.version.hip:
        runtime = f"built for ROCm {torch.version.hip}"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus:
        names = ", ".join(dict.fromkeys(torch.cuda.get_device_name(i) for i in range(gpus)))
        yield Finding("GPU", "ok", f"{gpus} x {names}; torch is {runtime}")
        yield _check_triton()
        return
    yield _missing_gpu(runtime, torch.version.cuda, [str(one.message) for one in caught])
    yield Finding("triton", "skipped", problem="no GPU, on which alone its kernels run")


def _missing_gpu(runtime: str, cuda: str | None, complaints: Sequence[str]) -> Finding:
    driver = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    found = f"none; torch is {runtime}"
    if not driver:
        return Finding("GPU", "ok", f"{found}: everything runs on the CPU")
    if hidden in ("", "-1"):
        problem = f"hidden by CUDA_VISIBLE_DEVICES={hidden!r}"
        return Finding("GPU", "warning", found, problem, "unset CUDA_VISIBLE_DEVICES")
    if cuda is None:
        problem = "there is a driver, but this PyTorch is built for the CPU alone"
        command = "pip install --force-reinstall torch torchvision"
        return Finding("GPU", "warning", found, problem, command)
    problem = "; ".join(complaints) or "there is a driver, but torch sees no GPU"
    problem += f". This PyTorch needs a driver for CUDA {cuda}; what there is shows:"
    return Finding("GPU", "warning", found, problem, "nvidia-smi")


def _check_triton() -> Finding:
    found = compat.installed_version("triton")
    if find_spec("triton") is None:
        problem = "not installed: without it the scan is slow on this GPU"
        return Finding("triton", "warning", "", problem, "pip install triton")
    failure = _import("triton")
    if failure:
        return Finding("triton", "warning", found or "", *failure)
    return Finding("triton", "ok", found or "")


def check_mmcv() -> Iterator[Finding]:
    """Runs one of mmcv's compiled operators, on the GPU too if there is one."""
    import torch

    command = compat.install_command("mmcv")
    # pip would otherwise keep what is there, or take the wheel that it built last time.
    command += " --force-reinstall --no-deps --no-cache-dir"
    if compat.installed_version("mmcv-lite"):
        command = f"pip uninstall -y mmcv-lite && {command}"
    try:
        importlib.import_module("mmcv._ext")
        from mmcv.ops import nms
    except BROKEN as error:
        yield Finding("mmcv's operators", "error", "", _first_line(error), command)
        return
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 1, 10, 10], [20, 20, 30, 30]])
    for device in _devices():
        check = f"mmcv's operators on {device}"
        try:
            _, kept = nms(boxes.to(device), torch.tensor([0.9, 0.8, 0.7], device=device), 0.5)
        except BROKEN as error:
            yield Finding(check, "error", "", _first_line(error), command)
            continue
        if kept.tolist() == [0, 2]:
            yield Finding(check, "ok", "nms runs")
        else:
            problem = f"nms keeps boxes {kept.tolist()} where 0 and 2 are right"
            yield Finding(check, "error", "", problem, command)


def check_tasks() -> Iterator[Finding]:
    """Imports what each task's package brings, for those that are installed."""
    for name in _usable_tasks():
        # All that the task needs.
        yield from _check_import(name, f"{compat.module_of(name)}.models")


def _usable_tasks() -> list[str]:
    """The tasks' packages that are installed and fit."""
    return [
        name
        for name in compat.stack()
        if compat.module_of(name) in CONFIGS
        and compat.stack_version(name)
        and compat.stack_problem(name) is None
    ]


def _check_import(name: str, module: str) -> Iterator[Finding]:
    failure = _import(module)
    if failure:
        yield Finding(f"import {name}", "error", "", *failure)
    else:
        yield Finding(f"import {name}", "ok")


def _import(module: str) -> tuple[str, str] | None:
    """Imports a module; what is wrong with it and the command that mends it, or None."""
    package = module.partition(".")[0]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(module)
    except BROKEN as error:
        missing = (error.name or "").partition(".")[0] if isinstance(error, ImportError) else ""
        text = _first_line(error)
        if isinstance(error, ModuleNotFoundError) and missing and missing != package:
            command = _install_command(missing)
        elif "libGL" in text:
            command = (
                "pip uninstall -y opencv-python opencv-python-headless && "
                "pip install opencv-python-headless"
            )
        elif "torchvision" in text:
            command = "pip install --force-reinstall torch torchvision"
        else:
            command = f"{_install_command(package)} --force-reinstall --no-deps"
        return text, command
    return None


def _install_command(module: str) -> str:
    if module == "pkg_resources":
        return compat.STACK["setuptools"][1]
    return compat.install_command("opencv-python-headless" if module == "cv2" else module)


def check_kernels() -> Iterator[Finding]:
    """Says which backend each operator takes on each device, and why not a preferred one."""
    # It registers the operators.
    failure = _import("mmvmamba_kernels")
    if failure:
        yield Finding("import mmvmamba_kernels", "error", "", failure[0], _reinstall_command())
        return
    import torch

    from mmvmamba_kernels import dispatch
    from mmvmamba_kernels.backends.native import extension
    from mmvmamba_kernels.backends.triton import support as triton_support

    reason = extension.load("cpu")
    if reason is None:
        found = extension.find_library("cpu")
        yield Finding("kernels: CPU library", "ok", found.name if found else "loaded")
    else:
        problem = f"{reason.partition('; run: ')[0]}: the scan is slower on the CPU"
        command = extension.build_command("cpu")
        yield Finding("kernels: CPU library", "warning", "", problem, command)
    for device in _devices():
        for op in dispatch.operators():
            problem = dispatch.Problem(torch.device(device), torch.float32, states=1, work=0)
            check = f"{op} on {device}"
            try:
                choice, asked, reasons = dispatch.choose(op, dispatch.AUTO, problem)
            except dispatch.BackendError as error:
                command = f"unset {dispatch.ENVIRONMENT_VARIABLE}"
                yield Finding(check, "error", "", _first_line(error), command)
                continue
            # That the CPU has no Triton needs no word; what it lacks beside has its own finding.
            why = [] if device == "cpu" else reasons
            found = "; ".join([choice.name + (" (asked for)" if asked else ""), *why])
            if choice.slow and not asked and device != "cpu":
                text = "plain PyTorch operations, slow on a GPU"
                old, newer = triton_support.TORCH_IS_OLD, compat.ADVISED["torch"][1]
                yield Finding(check, "warning", found, text, newer if old else "pip install triton")
            else:
                yield Finding(check, "ok", found)


def check_configs() -> Iterator[Finding]:
    """Resolves `mmvmamba::` names and builds the backbone by its registered name."""
    compat.register_config_scope()
    folder, command = Path(__file__).resolve().parent, _reinstall_command()
    if not (folder / ".mim" / "configs").is_dir():
        problem = f"{folder / '.mim' / 'configs'} is not there"
        yield Finding("config scope mmvmamba::", "error", "", problem, command)
        return
    from mmengine.hub import get_config

    usable = [compat.module_of(name) for name in _usable_tasks()]
    if not usable:
        problem = f"its configs begin with those of {', '.join(CONFIGS)}, none of which is there"
        yield Finding("config scope mmvmamba::", "skipped", problem=problem)
    for module in usable[:1]:
        try:
            backbone = get_config(CONFIGS[module]).model.backbone.type
        except (*BROKEN, KeyError) as error:
            yield Finding("config scope mmvmamba::", "error", "", _first_line(error), command)
        else:
            yield Finding("config scope mmvmamba::", "ok", f"{CONFIGS[module]}: {backbone}")


def _reinstall_command() -> str:
    checkout = Path(__file__).resolve().parents[1]
    if (checkout / "pyproject.toml").is_file():
        return f"pip install --no-build-isolation --no-deps -e {checkout}"
    return "pip install --force-reinstall --no-deps mmvmamba"


def check_model() -> Iterator[Finding]:
    """Runs a tiny model forward and backward, and compares it with the reference backend."""
    import torch
    from mmengine.registry import MODELS

    try:
        torch.manual_seed(0)
        model = MODELS.build(MODEL)
    except (*BROKEN, KeyError) as error:
        yield Finding("registry", "error", "", _first_line(error), _reinstall_command())
        return
    yield Finding("registry", "ok", f"{MODEL['type']} builds: {type(model).__name__}")
    for device in _devices():
        for dtype in TOLERANCES:
            yield _check_step(model, device, dtype)


def _check_step(model, device: str, dtype: str) -> Finding:
    import torch

    from mmvmamba_kernels.backends.native.extension import build_command
    from mmvmamba_kernels.dispatch import ENVIRONMENT_VARIABLE

    check = f"forward and backward, {dtype} on {device}"
    asked = os.environ.get(ENVIRONMENT_VARIABLE)
    command = f"{build_command('cpu')} --force" if device == "cpu" else PLAIN_BACKEND
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            actual = _step(model, device, getattr(torch, dtype))
            with _environment(ENVIRONMENT_VARIABLE, "reference"):
                expected = _step(model, device, getattr(torch, dtype))
    except BROKEN as error:
        return Finding(check, "error", "", _first_line(error), command)
    if not all(part.isfinite().all() for part in actual):
        return Finding(check, "error", "", "results are not finite", command)
    error = max(float((a - b).norm() / b.norm()) for a, b in zip(actual, expected, strict=True))
    if error > TOLERANCES[dtype]:
        problem = f"differs from the reference by {error:.1e}, allowed is {TOLERANCES[dtype]:.0e}"
        return Finding(check, "error", f"backend {asked or 'chosen'}", problem, command)
    return Finding(check, "ok", f"finite, {error:.1e} from the reference")


def _step(model, device: str, dtype) -> list:
    """All outputs and all gradients of one step, each as a vector in float32 on the CPU."""
    import torch

    # No stochastic depth, which two steps would draw differently.
    model = model.to(device).eval()
    images = torch.randn(2, 3, 40, 56, generator=torch.Generator().manual_seed(0))
    images = images.to(device).requires_grad_()
    with torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32):
        outputs = model(images)
    loss = sum(output.float().square().mean() for output in outputs)
    inputs = [images, *model.parameters()]
    gradients = torch.autograd.grad(loss, inputs, materialize_grads=True)
    return [
        torch.cat([tensor.detach().float().cpu().flatten() for tensor in tensors])
        for tensors in (outputs, gradients)
    ]


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def _devices() -> list[str]:
    """The CPU, and one GPU of each kind."""
    import torch

    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    kinds = {torch.cuda.get_device_name(index): f"cuda:{index}" for index in reversed(gpus)}
    return ["cpu", *sorted(kinds.values())]


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def report(findings: Sequence[Finding], console: Console) -> None:
    """Prints the findings as a table, and the commands below it, to be copied."""
    table = Table("check", "", "found")
    for finding in findings:
        style = STYLES[finding.status]
        text = "; ".join(filter(None, (finding.found, finding.problem)))
        table.add_row(finding.check, f"[{style}]{finding.status}[/]", escape(text))
    console.print(table)
    for status in ("error", "warning"):
        for finding in findings:
            if finding.status == status:
                # A command that is wrapped cannot be copied.
                console.print(
                    f"[{STYLES[status]}]{status}[/]: {finding.check}: {escape(finding.problem)}\n"
                    f"    {escape(finding.command)}",
                    soft_wrap=True,
                    highlight=False,
                )
    counts = {status: sum(f.status == status for f in findings) for status in STYLES}
    verdict = "[red]does not work[/]" if counts["error"] else "[green]works[/]"
    console.print(
        f"The installation {verdict}: {counts['error']} errors, {counts['warning']} warnings "
        f"(it works, but slower or in part), {counts['ok']} ok, {counts['skipped']} skipped",
        highlight=False,
    )


def main(arguments: list[str] | None = None) -> int:
    """The command line.

    Returns:
        The exit status: 0 if there is no error.
    """
    parser = argparse.ArgumentParser(
        prog="python -m mmvmamba.doctor",
        description="Check the installation that mmvmamba runs on, and name the command that fixes "
        "each fault. Exit status 0: no errors (there may be warnings: slow, but it works).",
    )
    parser.add_argument("--json", action="store_true", help="machine-readable, on standard output")
    parser.add_argument(
        "--config", help="also look at this config's data: tools/dataset_tools/check_dataset.py"
    )
    options = parser.parse_args(arguments)
    findings: list[Finding] = []
    progress = Progress(
        SpinnerColumn(), TextColumn("{task.description}"), console=Console(stderr=True)
    )
    # Packages that are imported write to standard output, where the JSON is to stand alone.
    with progress, contextlib.redirect_stdout(sys.stderr):
        task = progress.add_task("looking")
        for finding in examine():
            findings.append(finding)
            progress.update(task, description=f"{finding.check}: {finding.status}")
        progress.update(task, visible=False)
    well = not any(finding.status == "error" for finding in findings)
    if options.json:
        checks = [dataclasses.asdict(finding) for finding in findings]
        json.dump({"well": well, "checks": checks}, sys.stdout, indent=1)
        sys.stdout.write("\n")
    else:
        report(findings, Console())
    if well and options.config:
        # A process of its own: this one has not set the stack up.
        return subprocess.call(
            [sys.executable, "-m", "mmvmamba.analysis.data_report", options.config]
        )
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
