"""Which backend runs, who is told, and what is refused."""

import importlib
import subprocess
import sys
import textwrap
import types
import warnings
from pathlib import Path

import pytest
import torch

import mmvmamba_kernels
from mmvmamba_kernels import BackendError, available_backends, dispatch, selective_scan
from mmvmamba_kernels.dispatch import Backend, Problem, pin, register_backend, resolve
from mmvmamba_kernels.testing import selective_scan_2d_arguments, selective_scan_arguments

OPERATORS = ("depthwise_conv", "selective_scan", "selective_scan_2d", "state_space_dual")
CPU = Problem(torch.device("cpu"), torch.float32, states=1, work=10)
GPU = Problem(torch.device("cuda"), torch.float32, states=1, work=10)


@pytest.fixture
def registry(monkeypatch):
    """An operator 'op' with a fast backend for float32 on the GPU before the slow reference."""
    modules = {}
    for name in ("fast", "reference"):
        modules[name] = types.ModuleType(f"op_{name}")
        monkeypatch.setitem(sys.modules, f"op_{name}", modules[name])

    def can_run(problem):
        if problem.device.type != "cuda":
            return "it needs a GPU"
        return None if problem.states <= 4 else f"d_state {problem.states} is above 4"

    monkeypatch.setattr(dispatch, "_registry", {})
    monkeypatch.setattr(dispatch, "_warned", set())
    register_backend("op", Backend("fast", "op_fast", can_run))
    register_backend("op", Backend("reference", "op_reference", slow=True))
    register_backend("other", Backend("reference", "op_reference", slow=True))
    return modules


def test_every_operator_has_the_reference():
    for op in OPERATORS:
        assert "reference" in available_backends(op)
    assert "reference" in available_backends()
    with pytest.raises(ValueError, match="unknown operator 'scan', choose from .*selective_scan,"):
        available_backends("scan")


def test_an_unknown_backend_is_refused_with_the_existing_ones():
    args = selective_scan_arguments(1, 1, 1, 1, 3)
    with pytest.raises(BackendError, match="no backend 'nowhere'. Existing backends: .*reference"):
        selective_scan(**args, backend="nowhere")
    with pytest.raises(BackendError, match="selective_scan_2d has no backend"):
        mmvmamba_kernels.selective_scan_2d(
            **selective_scan_2d_arguments(1, 2, 2, 1, 1, 1), backend="mamba_ssm"
        )


def test_the_reference_can_be_asked_for(monkeypatch):
    args = selective_scan_arguments(1, 1, 1, 1, 3)
    asked = selective_scan(**args, backend="reference")
    monkeypatch.setenv("MMVMAMBA_KERNELS_BACKEND", "reference")
    assert torch.equal(selective_scan(**args), asked)


def test_automatic_choice_takes_the_first_that_can_run(registry):
    assert resolve("op", "auto", GPU) is registry["fast"]
    assert resolve("op", "auto", CPU) is registry["reference"]


def test_a_named_backend_never_falls_back(registry):
    with pytest.raises(BackendError, match="op cannot run with backend='fast': it needs a GPU"):
        resolve("op", "fast", CPU)
    large = Problem(torch.device("cuda"), torch.float32, states=16, work=10)
    with pytest.raises(BackendError, match="d_state 16 is above 4"):
        resolve("op", "fast", large)
    with pytest.raises(
        BackendError, match="no backend 'quick'. Existing backends: fast, reference"
    ):
        resolve("op", "quick", CPU)


def test_no_backend_can_run(registry, monkeypatch):
    register_backend("gpu_only", dispatch._registry["op"][0])
    with pytest.raises(BackendError, match="gpu_only has no backend that can run.*needs a GPU"):
        resolve("gpu_only", "auto", CPU)


def test_a_backend_is_registered_once(registry):
    with pytest.raises(ValueError, match="op cannot register backend 'fast'"):
        register_backend("op", Backend("fast", "op_fast"))


def test_environment_sets_the_default(registry, monkeypatch):
    monkeypatch.setenv("MMVMAMBA_KERNELS_BACKEND", "reference")
    assert resolve("op", "auto", GPU) is registry["reference"]
    assert resolve("op", "fast", GPU) is registry["fast"]
    monkeypatch.setenv("MMVMAMBA_KERNELS_BACKEND", "auto")
    assert resolve("op", "auto", GPU) is registry["fast"]
    monkeypatch.setenv("MMVMAMBA_KERNELS_BACKEND", "fast")
    with pytest.raises(BackendError, match="MMVMAMBA_KERNELS_BACKEND='fast': it needs a GPU"):
        resolve("op", "auto", CPU)
    # A default that one operator has does not stop another that has not.
    assert resolve("other", "auto", CPU) is registry["reference"]


def test_a_wrong_environment_is_an_error(monkeypatch):
    monkeypatch.setenv("MMVMAMBA_KERNELS_BACKEND", "cudda")
    args = selective_scan_arguments(1, 1, 1, 1, 3)
    with pytest.raises(
        BackendError, match="MMVMAMBA_KERNELS_BACKEND='cudda' is not a backend.*auto"
    ):
        selective_scan(**args)


def test_slow_choice_on_a_gpu_warns_once(registry):
    large = Problem(torch.device("cuda"), torch.float32, states=16, work=10)
    with pytest.warns(UserWarning, match="could not run it: fast: d_state 16.*backend='reference'"):
        resolve("op", "auto", large)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resolve("op", "auto", large)
        resolve("op", "auto", CPU)
    with pytest.warns(UserWarning, match="no faster backend of other for 'cuda'"):
        resolve("other", "auto", GPU)


def test_slow_choice_for_a_large_cpu_problem_warns_once(registry):
    large = Problem(torch.device("cpu"), torch.float32, states=1, work=dispatch.LARGE_CPU_PROBLEM)
    with pytest.warns(UserWarning, match="torch.set_num_threads"):
        resolve("other", "auto", large)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resolve("other", "auto", large)


def test_a_deliberate_choice_does_not_warn(registry, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resolve("op", "reference", GPU)
        resolve("op", "auto", Problem(GPU.device, GPU.dtype, 16, 10), quiet=True)
        monkeypatch.setenv("MMVMAMBA_KERNELS_BACKEND", "reference")
        resolve("other", "auto", GPU)


def test_a_pinned_choice_stays(registry, monkeypatch):
    assert pin("op", GPU.device, GPU.dtype, 1) == "auto:fast"
    assert pin("op", CPU.device, CPU.dtype, 1) == "auto:reference"
    # A better backend that appears, or another default, does not come between the two passes.
    with pytest.warns(UserWarning, match="runs on the 'reference' backend"):
        assert resolve("op", "auto:reference", GPU) is registry["reference"]
    monkeypatch.setenv("MMVMAMBA_KERNELS_BACKEND", "reference")
    assert resolve("op", "auto:fast", GPU) is registry["fast"]
    assert pin("op", GPU.device, GPU.dtype, 1) == "reference"
    with pytest.raises(BackendError, match="compiled, with 'fast'. fast: it needs a GPU"):
        resolve("op", "auto:fast", CPU)


def test_the_default_may_change_between_forward_and_backward(monkeypatch):
    args = selective_scan_arguments(1, 1, 1, 1, 30)
    monkeypatch.setenv("MMVMAMBA_KERNELS_BACKEND", "reference")
    out = selective_scan(**args)
    monkeypatch.delenv("MMVMAMBA_KERNELS_BACKEND")
    out.sum().backward()


def test_forward_and_backward_must_use_one_backend(monkeypatch):
    args = selective_scan_arguments(1, 1, 1, 1, 30)
    out = selective_scan(**args, backend="reference")
    reference = importlib.import_module("mmvmamba_kernels.selective_scan.reference")
    monkeypatch.setattr(reference, "carries_shape", lambda _: (7,))
    with pytest.raises(RuntimeError, match="Forward and backward must run on one backend"):
        out.sum().backward()


def test_cold_import_needs_torch_alone_and_loads_no_library():
    """In a process where triton and every mm* package are missing, import and run."""
    source = """
        import sys

        class Missing:
            def find_spec(self, name, path=None, target=None):
                root = name.partition(".")[0]
                openmmlab = root.startswith("mm") and root not in ("mmap", "mmvmamba_kernels")
                if openmmlab or root in ("triton", "mamba_ssm"):
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        sys.meta_path.insert(0, Missing())
        import mmvmamba_kernels
        from mmvmamba_kernels.testing import selective_scan_2d_arguments

        import torch
        assert "libmmvmamba_kernels" not in open("/proc/self/maps").read()
        args = selective_scan_2d_arguments(1, 3, 3, 2, 1, 1)
        mmvmamba_kernels.selective_scan_2d(**args).sum().backward()
        loaded = {name.partition(".")[0] for name in sys.modules}
        assert "triton" not in loaded and "mmengine" not in loaded, loaded
    """
    folder = str(Path(mmvmamba_kernels.__file__).parent.parent)
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(source)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=folder,
    )
    assert result.returncode == 0, result.stderr
