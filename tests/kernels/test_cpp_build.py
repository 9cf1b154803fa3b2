"""Building, finding and loading the compiled library."""

import logging
import os
import subprocess
import sys
import warnings

import pytest
import torch

from mmvmamba_kernels import BackendError, build, dispatch, extension, selective_scan_2d
from mmvmamba_kernels.testing import selective_scan_2d_arguments


@pytest.fixture
def nothing_built(tmp_path, monkeypatch):
    """An empty search path."""
    folders = (tmp_path / "package", tmp_path / "cache")
    monkeypatch.setattr(extension, "search_path", lambda: folders)
    extension.load.cache_clear()
    yield folders
    extension.load.cache_clear()


def test_without_the_library_an_explicit_choice_says_what_to_run(nothing_built):
    args = selective_scan_2d_arguments(1, 2, 2, 1, 1, 1)
    with pytest.raises(
        BackendError, match="library is not built; run: python -m mmvmamba_kernels.build"
    ):
        selective_scan_2d(**args, backend="cpp")


def test_without_the_library_the_reference_takes_over_with_one_warning(nothing_built, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(dispatch, "_warned", set())
    monkeypatch.setattr(dispatch, "LARGE_CPU_PROBLEM", 1)
    args = selective_scan_2d_arguments(1, 2, 2, 1, 1, 1)
    with pytest.warns(UserWarning, match="python -m mmvmamba_kernels.build"):
        out = selective_scan_2d(**args)
    assert torch.equal(out, selective_scan_2d(**args, backend="reference"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        selective_scan_2d(**args)


def test_a_library_of_another_pytorch_is_not_loaded(nothing_built):
    nothing_built[1].mkdir()
    (nothing_built[1] / "libmmvmamba_kernels-0123456789abcdef.so").touch()
    assert "for another PyTorch" in extension.load()


def test_a_broken_library_is_an_error_with_the_reason(nothing_built):
    nothing_built[0].mkdir()
    (nothing_built[0] / extension.library_name()).write_text("not a library")
    assert "does not load" in extension.load()


def test_the_name_depends_on_the_version_of_pytorch(monkeypatch):
    name = extension.library_name()
    monkeypatch.setattr(torch, "__version__", "0.0.1")
    assert extension.library_name() != name


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    with pytest.raises(build.BuildError, match="CXX='?no-such-compiler -O2'? was not found"):
        build.find_compiler()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(build.BuildError, match="found no C\\+\\+ compiler. Install one"):
        build.find_compiler()


def test_what_the_compiler_says_is_passed_on(nothing_built, monkeypatch):
    monkeypatch.setenv("CXX", f"{sys.executable} -c 'raise SystemExit(\"out of memory\")'")
    with pytest.raises(build.BuildError, match="(?s)exit status 1.*out of memory"):
        build.build()
    assert extension.find_library() is None


def test_a_folder_that_cannot_be_written_is_passed_over(nothing_built, caplog):
    caplog.set_level(logging.INFO)
    package, cache = nothing_built
    # A file where the folder should be stops even root.
    package.touch()
    assert build._destination() == cache
    assert str(package) in caplog.text
    cache.rmdir()
    cache.touch()
    with pytest.raises(build.BuildError, match="XDG_CACHE_HOME"):
        build._destination()


def test_importing_neither_builds_nor_loads():
    code = (
        "import torch, mmvmamba_kernels\n"
        "assert not hasattr(torch.ops.mmvmamba_cpp, 'scan_forward')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr
