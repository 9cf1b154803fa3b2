"""Building, finding and loading the compiled library."""

import ctypes
import functools
import logging
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import setuptools
import torch

from mmvmamba_kernels import BackendError, dispatch, selective_scan_2d
from mmvmamba_kernels.backends.native import build, compiler, cpp_scan, extension
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


def test_a_library_of_other_sources_is_not_loaded(nothing_built):
    nothing_built[1].mkdir()
    for device, cause in (("cpu", "from other sources"), ("cuda", "for another PyTorch")):
        prefix = extension.library_name(device).split("-")[0]
        (nothing_built[1] / f"{prefix}-0123456789abcdef.so").touch()
        assert cause in extension.load(device)


def test_a_broken_library_is_an_error_with_the_reason(nothing_built):
    nothing_built[0].mkdir()
    (nothing_built[0] / extension.library_name()).write_text("not a library")
    assert "does not load" in extension.load()


def test_a_library_that_does_not_load_hides_no_other_one(nothing_built, monkeypatch, tmp_path):
    """As in a folder that several machines share and this one cannot write to."""
    source = tmp_path / "tiny.cpp"
    source.write_text("int tiny() { return 1; }\n")
    monkeypatch.setattr(compiler, "_units", lambda _: [compiler.Unit("tiny", str(source), ())])
    package, cache = nothing_built
    monkeypatch.setattr(build, "_destination", lambda: cache)
    for folder in nothing_built:
        folder.mkdir()
    (package / extension.library_name()).write_text("not a library")
    assert "does not load" in extension.load()
    library = build.build()
    assert library.parent == cache
    assert extension.load() is None
    assert extension.find_library() == library
    written = library.stat().st_mtime_ns
    assert build.build() == library
    assert library.stat().st_mtime_ns == written


def test_the_library_for_this_gpu_comes_first(nothing_built, monkeypatch):
    package, cache = (
        folder / extension.library_name("cuda", (gpu,))
        for folder, gpu in zip(nothing_built, (80, 120), strict=True)
    )
    for library in (package, cache):
        library.parent.mkdir()
        library.touch()
    gpus = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: gpus[index])
    assert extension.find_library("cuda") == package
    # The drivers of all could translate the package's.
    for gpu, first in (((8, 0), package), ((8, 6), package), ((12, 0), cache)):
        gpus[:] = [gpu]
        assert extension.find_library("cuda") == first
    gpus[:] = [(12, 0), (8, 0), (12, 0)]
    assert extension.find_libraries("cuda") == [package, cache]


def test_the_name_for_gpus_depends_on_the_version_of_pytorch(monkeypatch):
    name, name_for_gpus = extension.library_name(), extension.library_name("cuda")
    monkeypatch.setattr(torch.version, "cuda", "0.1")
    assert extension.library_name() == name
    assert extension.library_name("cuda") != name_for_gpus
    name_for_gpus = extension.library_name("cuda")
    monkeypatch.setattr(torch, "__version__", "0.0.1")
    assert extension.library_name("cuda") != name_for_gpus
    # The CPU's has a C interface, which no PyTorch knows.
    assert extension.library_name() == name


def test_compiling_needs_no_pytorch():
    """setup.py runs the module alone, in an environment that has setuptools and nothing else."""
    subprocess.run([sys.executable, "-I", "-S", compiler.__file__], check=True)


def test_the_library_has_the_callers_idea_of_its_parameters():
    assert extension.load() is None
    params, path = ctypes.c_int64(), ctypes.c_int64()
    extension.library().mmvmamba_sizes(ctypes.byref(params), ctypes.byref(path))
    assert params.value == ctypes.sizeof(cpp_scan._Params)
    assert path.value == ctypes.sizeof(cpp_scan._Path)


def test_the_library_uses_the_openmp_runtime_of_pytorch():
    """A runtime of its own would have threads of its own, and a count of its own."""
    assert extension.load() is None
    mapped = Path("/proc/self/maps").read_text()
    runtimes = {line.split()[-1] for line in mapped.splitlines() if "omp" in line.split("/")[-1]}
    assert len({Path(name).name for name in runtimes if "gomp" in name}) == 1


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


def fake_nvcc(folder, release="13.0", known="compute_80 compute_90"):
    """A CUDA_HOME whose compiler only answers questions."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(
        "#!/bin/sh\n"
        f'[ "$1" = --version ] && echo "Cuda compilation tools, release {release}, V{release}"\n'
        f'[ "$1" = --list-gpu-arch ] && echo "{known}"\n'
        "exit 0\n"
    )
    nvcc.chmod(0o755)
    return folder


def test_a_missing_nvcc_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(build.BuildError, match="no bin/nvcc in CUDA_HOME=.*CUDA toolkit 13"):
        build.build_cuda()
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setattr(build.shutil, "which", lambda _: None)
    with pytest.raises(build.BuildError, match="found no nvcc. Install the CUDA toolkit 13"):
        build.find_nvcc()


def test_an_install_without_nvcc_names_the_one_that_needs_none(monkeypatch, tmp_path, project):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("MMVMAMBA_WITH_EXT", "1")
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.setattr(sys, "path", list(sys.path))
    build_kernels = runpy.run_path(str(project / "setup.py"))["build_kernels"]
    with pytest.raises(SystemExit, match=r"no bin/nvcc in CUDA_HOME.*MMVMAMBA_WITH_EXT=cpu"):
        build_kernels(tmp_path / "lib")
    assert not list((tmp_path / "lib").iterdir())


def test_an_nvcc_of_another_major_version_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(fake_nvcc(tmp_path, release="12.8")))
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    assert build.find_nvcc() == str(tmp_path / "bin" / "nvcc")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(build.BuildError, match=r"is of CUDA 12\.8, .* built with CUDA 13\.0"):
        build.find_nvcc()
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(build.BuildError, match="need a PyTorch that is built for CUDA"):
        build.find_nvcc()


@pytest.mark.parametrize(
    ("text", "expected"),
    [("8.0;9.0", (80, 90)), ("12.0, 8.0 8.0", (80, 120)), (" 9.0a+PTX ", (90,))],
)
def test_lists_of_architectures(text, expected):
    assert build.parse_architectures(text) == expected


@pytest.mark.parametrize("text", ["", ";", "80", "Hopper", "8.0;x"])
def test_what_is_no_list_of_architectures(text):
    with pytest.raises(build.BuildError, match="is not a list of compute capabilities"):
        build.parse_architectures(text)


def test_the_choice_of_architectures(monkeypatch, tmp_path):
    nvcc = str(fake_nvcc(tmp_path, known="compute_80 compute_90 compute_100") / "bin" / "nvcc")
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert build.choose_architectures(nvcc) == (80, 90, 100)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert build.choose_architectures(nvcc) == (90,)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 10.0+PTX")
    assert build.choose_architectures(nvcc) == (80, 100)
    assert build.choose_architectures(nvcc, "9.0") == (90,)
    with pytest.raises(build.BuildError, match=r"capability 7\.0, 12\.0.*knows 8\.0, 9\.0, 10\.0"):
        build.choose_architectures(nvcc, "7.0;9.0;12.0")


def test_which_gpus_a_library_is_for():
    library = compiler.SOURCES / extension.library_name("cuda", (80, 90))
    assert extension.compiled_architectures(library) == (80, 90)
    fits = extension.architectures_fit
    assert fits((80, 90), (8, 0))
    assert fits((80, 90), (8, 9))
    assert fits((80, 90), (12, 0))
    assert not fits((80, 90), (7, 5))
    assert not fits((86, 90), (8, 0))
    # Neither code of its generation nor anything that a driver could translate.
    assert not fits((80, 120), (9, 0))


def test_a_gpu_that_the_library_is_not_for_is_refused(nothing_built, monkeypatch):
    nothing_built[1].mkdir()
    (nothing_built[1] / extension.library_name("cuda", (80, 90))).touch()
    monkeypatch.setattr(torch.version, "cuda", torch.version.cuda or "13.0")
    monkeypatch.setattr(extension, "find_library", lambda _: next(nothing_built[1].iterdir()))
    monkeypatch.setattr(extension, "load", functools.cache(lambda _: None))
    capability = {0: (7, 5), 1: (9, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d: capability[d.index])
    extension._no_kernels_for.cache_clear()
    reasons = [
        extension.can_run(dispatch.Problem(torch.device("cuda", i), torch.float32, 1, 1))
        for i in capability
    ]
    extension._no_kernels_for.cache_clear()
    assert reasons[1] is None
    assert "8.0, 9.0, this one has 7.5; run: python -m mmvmamba_kernels.build --cuda" in reasons[0]


def test_libraries_of_devices_do_not_depend_on_one_another(nothing_built):
    assert extension.library_name() != extension.library_name("cuda")
    nothing_built[0].mkdir()
    (nothing_built[0] / extension.library_name("cuda", (90,))).touch()
    assert extension.find_library() is None
    assert extension.find_library("cuda").name.endswith("-sm90.so")
    assert "is not built" in extension.load()


@pytest.mark.slow  # test_cuda_compile and test_cuda compile the same sources, in parts.
def test_the_cuda_library_builds_and_loads_without_a_gpu(nothing_built, monkeypatch):
    try:
        nvcc = build.find_nvcc()
    except build.BuildError as error:
        pytest.skip(str(error))
    latest = max(build.known_architectures(nvcc))
    stale = nothing_built[0] / extension.library_name("cuda", (50,))
    stale.parent.mkdir()
    stale.touch()
    library = build.build_cuda(f"{latest // 10}.{latest % 10}")
    assert extension.find_library("cuda") == library
    assert not stale.exists()
    assert build.build_cuda(f"{latest // 10}.{latest % 10}") == library
    code = (
        f"import torch\ntorch.ops.load_library({str(library)!r})\n"
        "torch.ops.mmvmamba_cuda.scan_forward, torch.ops.mmvmamba_cuda.scan_backward\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_architectures_need_the_option_that_they_belong_to(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["build", "--arch", "9.0"])
    with pytest.raises(SystemExit):
        build.main()
    assert "--arch needs --cuda" in capsys.readouterr().err
