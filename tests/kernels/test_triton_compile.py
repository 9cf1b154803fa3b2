"""Every Triton kernel compiles for real GPUs, on a machine that has none.

Launches are recorded instead of run, with the arguments that they would have on a GPU of 132
multiprocessors, and compiled as Triton's just-in-time compiler would specialise them.
"""

import importlib
import logging
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, on_architectures

from mmvmamba_kernels.backends.triton.support import interpreting
from mmvmamba_kernels.testing import (
    depthwise_conv_arguments,
    selective_scan_2d_arguments,
    selective_scan_arguments,
)

pytestmark = pytest.mark.skipif(
    interpreting(), reason="TRITON_INTERPRET=1: kernels are Python functions, nothing to compile"
)
triton = pytest.importorskip("triton", "3.5", "there is no Triton 3.5 or later")

logger = logging.getLogger(__name__)

PROCESSORS = 132

SPILL = 32
"""Bytes that a thread may keep in memory: a few loop counters that the assembler moved out."""
KERNELS = (
    "selective_scan_state_kernel",
    "selective_scan_carry_kernel",
    "selective_scan_fwd_kernel",
    "selective_scan_bwd_kernel",
    "sum_buffers_kernel",
    "low_rank_gradients_kernel",
)
TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int32: "i32",
}


@dataclass
class Usage:
    """What a kernel takes of a GPU."""

    kernel: str
    registers: int
    stack: int
    """Bytes a thread spills to memory."""


class Recorder:
    """Stands for a kernel: keeps what it is launched with."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        def launch(*args, **options):
            assert 0 < grid[0] < 2**31
            assert len(grid) == 1
            self.launches.append((self.kernel, args, options))

        return launch


@pytest.fixture
def launches(monkeypatch):
    from mmvmamba_kernels.backends.triton import low_rank
    from mmvmamba_kernels.backends.triton import scan as triton_scan

    recorded = []
    for name in KERNELS:
        module = triton_scan if hasattr(triton_scan, name) else low_rank
        monkeypatch.setattr(module, name, Recorder(getattr(module, name), recorded))
    monkeypatch.setattr(triton_scan, "multiprocessors", lambda _: PROCESSORS)
    return recorded


def run(op, arguments, **options):
    """Both passes of an operator's Triton backend."""
    implementation = importlib.import_module(f"mmvmamba_kernels.{op}.triton_impl")
    record = importlib.import_module(f"mmvmamba_kernels.{op}.arguments").Arguments
    arguments = record(**{name: t.detach() for name, t in arguments.items()}, **options)
    out, carries = implementation.forward(arguments, save_carries=True)
    implementation.backward(out, carries, arguments)


def compile_launch(kernel, args, options, architecture):
    """Compile one recorded launch as the just-in-time compiler would, for an NVIDIA GPU."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for i, (parameter, value) in enumerate(zip(kernel.params, args, strict=False)):
        name = parameter.name
        specialised = not parameter.do_not_specialize
        if isinstance(value, torch.Tensor):
            signature[name] = f"*{TYPES[value.dtype]}"
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif value is None:
            signature[name], constants[name] = "constexpr", None
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1 and specialised:
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if specialised and value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    options = dict(options)
    warps = options.pop("num_warps")
    for fast in {"FAST"} & set(options):
        options[fast] = options["ACC"] == triton.language.float32
    for name, value in options.items():
        signature[name], constants[name] = "constexpr", value
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    target = GPUTarget("cuda", architecture, 32)
    return triton.compile(source, target=target, options={"num_warps": warps})


def usage(compiled, folder):
    """Registers and spills, from the tool that Triton ships beside its assembler."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    file = folder / "kernel.cubin"
    file.write_bytes(compiled.asm["cubin"])
    report = subprocess.run(
        [tool, "-res-usage", file], capture_output=True, text=True, check=True
    ).stdout
    registers, stack, local = (
        int(re.search(rf"{key}:(\d+)", report)[1]) for key in ("REG", "STACK", "LOCAL")
    )
    return Usage(compiled.metadata.name, registers, stack + local)


def compile_all(launches, architecture, folder):
    """Compile every launch; the resources of all, which ``--log-cli-level=INFO`` shows."""
    assert launches
    resources = [usage(compile_launch(*launch, architecture), folder) for launch in launches]
    for kernel in resources:
        logger.info("sm_%d %s", architecture, kernel)
    return resources


# For 90 the tests below compile kernels, and one for 120 those of other operators.
@pytest.mark.parametrize(
    "architecture",
    [pytest.param(a, marks=() if a == 80 else pytest.mark.slow) for a in ARCHITECTURES],
)
def test_every_kernel_compiles(architecture, launches, tmp_path):
    # A batch so small that paths are cut into chunks.
    arguments = selective_scan_2d_arguments(1, 56, 56, 96, 6, 1, dtype=torch.bfloat16)
    for name in ("dt_weight", "dt_bias", "A", "D"):
        arguments[name] = arguments[name].float()
    run("selective_scan_2d", arguments, pattern="cross2d")
    resources = compile_all(launches, architecture, tmp_path)
    assert {r.kernel for r in resources} == set(KERNELS)
    assert all(r.stack <= SPILL for r in resources), resources


# Half a minute each, but for the last.
CASES_2D = {
    # batch, height, width, channels, rank, states; dtype
    "stage 2": ((64, 28, 28, 192, 12, 1), torch.bfloat16),
    "stage 3": ((64, 14, 14, 384, 24, 1), torch.bfloat16),
    "float32": ((1, 14, 14, 96, 6, 1), torch.float32),
    "float16, 2 states": ((1, 14, 14, 96, 6, 2), torch.float16),
    "float64": ((1, 9, 9, 8, 2, 2), torch.float64),
    "one channel": ((1, 1, 1, 1, 1, 1), torch.bfloat16),
}


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=() if c == "one channel" else pytest.mark.slow) for c in CASES_2D],
)
def test_2d_cases_compile(case, launches, tmp_path):
    shape, dtype = CASES_2D[case]
    run("selective_scan_2d", selective_scan_2d_arguments(*shape, dtype=dtype), pattern="cross2d")
    resources = compile_all(launches, 90, tmp_path)
    # Twice the registers are too many for two words a number.
    if dtype != torch.float64:
        assert all(r.stack <= SPILL for r in resources), resources


@pytest.mark.parametrize("side", [9, pytest.param(24, marks=pytest.mark.slow)])
def test_lists_of_positions_compile(side, launches, tmp_path):
    arguments = selective_scan_2d_arguments(1, side, side, 32, 2, 1, dtype=torch.bfloat16)
    run("selective_scan_2d", arguments, pattern="atrous2")
    resources = compile_all(launches, 90, tmp_path)
    # A quarter of 24 by 24 positions is cut into chunks, of 9 by 9 it is not.
    absent = {"selective_scan_state_kernel", "selective_scan_carry_kernel"} if side == 9 else set()
    assert {r.kernel for r in resources} == set(KERNELS) - absent
    assert all(r.stack <= SPILL for r in resources), resources


def test_offsets_of_64_bits_compile(launches, monkeypatch, tmp_path):
    from mmvmamba_kernels.backends.triton import scan as triton_scan

    monkeypatch.setattr(triton_scan, "_NARROW", 0)
    arguments = selective_scan_2d_arguments(1, 9, 9, 32, 2, 1, 2, dtype=torch.bfloat16)
    run("selective_scan_2d", arguments, pattern="columns")
    assert any(options.get("INDEX") == triton.language.int64 for _, _, options in launches)
    resources = compile_all(launches, 90, tmp_path)
    assert all(r.stack <= SPILL for r in resources), resources


@pytest.mark.parametrize(
    ("states", "length"),
    [(2, 32), pytest.param(16, 300, marks=pytest.mark.slow, id="Mamba's own, in chunks")],
)
def test_1d_compiles(states, length, launches, tmp_path):
    arguments = selective_scan_arguments(1, 2, 64, states, length, dtype=torch.bfloat16)
    run("selective_scan", arguments, delta_softplus=True, out_dtype=torch.float32)
    resources = compile_all(launches, 90, tmp_path)
    assert all(r.stack <= SPILL for r in resources), resources


@on_architectures("channels", [96, 768, 3072])
def test_layer_norm_compiles(architecture, channels, monkeypatch, tmp_path):
    from mmvmamba_kernels.layer_norm import triton_impl

    launches = []
    for name in ("layer_norm_fwd_kernel", "layer_norm_bwd_kernel"):
        monkeypatch.setattr(triton_impl, name, Recorder(getattr(triton_impl, name), launches))
    monkeypatch.setattr(triton_impl, "multiprocessors", lambda _: PROCESSORS)
    x = torch.zeros(2, 14, 14, channels)
    branch, scale, weight = x.bfloat16(), torch.ones(2), torch.ones(channels)
    total, out, statistics = triton_impl.forward(
        x, branch, scale, weight, weight, 1e-5, torch.bfloat16
    )
    triton_impl.backward(total, out, total, statistics, scale, weight, weight, torch.bfloat16)
    triton_impl.forward(branch, None, None, weight, weight, 1e-5, torch.bfloat16)
    parts = branch.expand(4, *branch.shape)
    for save in (False, True):
        narrow = torch.bfloat16
        triton_impl.normalise_sum(parts, weight, weight, 1e-5, narrow, narrow, save)
    assert len(launches) == 5
    resources = compile_all(launches, architecture, tmp_path)
    assert all(r.stack <= SPILL for r in resources), resources


BACKWARD_REGISTERS = {2: 255, 4: 168, 8: 168}
"""Most registers of a thread of the backward kernel, by the bytes of a number: 12 warps on a
multiprocessor of sm_90, or 8 where a lane has two channels."""

# Of one warp; what the registers of a multiprocessor, 65536, are shared among.
CASES_CONV = {
    # batch, height, width, channels; dtype, activation, most registers of a thread forwards
    "stage 1": ((128, 56, 56, 96), torch.bfloat16, "silu", 96),
    "stage 2": ((2, 28, 28, 192), torch.bfloat16, "silu", 96),
    "columns left over, gelu": ((1, 50, 50, 192), torch.bfloat16, "gelu", 112),
    "float16, few columns": ((2, 7, 3, 96), torch.float16, "silu", 96),
    "float32, no activation": ((1, 14, 14, 128), torch.float32, "none", 128),
    "float64, channels left over": ((1, 9, 9, 33), torch.float64, "relu", 144),
}


@on_architectures("case", CASES_CONV)
def test_depthwise_conv_compiles(case, architecture, monkeypatch, tmp_path):
    from mmvmamba_kernels.depthwise_conv import triton_impl

    launches = []
    for name in ("depthwise_conv_fwd_kernel", "depthwise_conv_bwd_kernel"):
        monkeypatch.setattr(triton_impl, name, Recorder(getattr(triton_impl, name), launches))
    monkeypatch.setattr(triton_impl, "multiprocessors", lambda _: PROCESSORS)
    shape, dtype, act, registers = CASES_CONV[case]
    run("depthwise_conv", depthwise_conv_arguments(*shape, dtype=dtype), act=act)
    assert len(launches) == 2
    resources = compile_all(launches, architecture, tmp_path)
    forward, backward = resources
    assert forward.registers <= registers, forward
    assert backward.registers <= BACKWARD_REGISTERS[dtype.itemsize], backward
    assert all(r.stack == 0 for r in resources), resources


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape",
    [(8, 7, 7, 768, 48, 1), (1, 14, 14, 96, 6, 16), (1, 14, 14, 96, 6, 64), (1, 14, 14, 96, 64, 1)],
    ids=str,
)
def test_large_kernels_compile(shape, launches, tmp_path):
    arguments = selective_scan_2d_arguments(*shape, dtype=torch.bfloat16)
    run("selective_scan_2d", arguments, pattern="cross2d")
    compile_all(launches, 90, tmp_path)
