"""Record the launches that the project's launchers would make, and compile them for sm_90."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

PROCESSORS = 132
"""Multiprocessors of the GPU that the launchers are told they have: an H200's."""


def output_folder() -> Path:
    """Where compiled kernels, the model's program and traces go."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    # The user's own, since a program is run from there.
    folder = Path(os.environ.get("GPU_MODEL_OUT") or Path(cache) / "mmvmamba_kernels/gpu_model")
    folder.mkdir(parents=True, exist_ok=True)
    return folder.resolve()


os.environ.setdefault("TRITON_CACHE_DIR", str(output_folder() / "triton"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from gpu_model.sass import Instruction, parse  # noqa: E402

_DISASSEMBLER = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
_TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int32: "i32",
}
_ALIGNED = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Launch:
    """One launch of a Triton kernel, on tensors without data."""

    kernel: JITFunction
    grid: tuple[int, ...]
    args: tuple
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.__name__

    @property
    def programs(self) -> int:
        return math.prod(self.grid)

    @property
    def integers(self) -> dict[str, int]:
        pairs = zip(self.kernel.params, self.args, strict=False)
        return {parameter.name: value for parameter, value in pairs if isinstance(value, int)}

    def specialise(self) -> tuple[dict, dict, dict, dict]:
        """Signature, constants, attributes and compiler's options, as the JIT would choose them."""
        signature, constants, attributes = {}, {}, {}
        for i, (parameter, value) in enumerate(zip(self.kernel.params, self.args, strict=False)):
            name = parameter.name
            special = not parameter.do_not_specialize
            if isinstance(value, torch.Tensor):
                signature[name] = "*" + _TYPES[value.dtype]
                attributes[(i,)] = _ALIGNED
            elif parameter.is_constexpr or value is None:
                signature[name], constants[name] = "constexpr", value
            elif isinstance(value, float):
                signature[name] = "fp32"
            elif value == 1 and special:
                signature[name], constants[name] = "constexpr", 1
            else:
                signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                if special and value % 16 == 0:
                    attributes[(i,)] = _ALIGNED
        names = {parameter.name for parameter in self.kernel.params}
        options = dict(self.options)
        for name in {"FAST"} & set(options):
            # The launchers ask for a CUDA tensor, which a tensor without data is not.
            options[name] = options.get("ACC", tl.float32) == tl.float32
        for name in names & set(options):
            signature[name], constants[name] = "constexpr", options.pop(name)
        return signature, constants, attributes, {"num_warps": 4, **options}

    @property
    def key(self) -> str:
        """What two launches share if and only if the JIT compiles one kernel for both."""
        parts = [sorted((str(k), str(v)) for k, v in part.items()) for part in self.specialise()]
        text = repr((self.name, self.kernel.cache_key, triton.__version__, parts))
        return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()[:10]

    def compile(self) -> Kernel:
        """The kernel for sm_90, from the output folder if it is there."""
        return _compile(self.key, self)


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel and what it takes of a multiprocessor."""

    name: str
    registers: int
    stack: int
    """Bytes a thread; registers that were spilled."""
    shared: int
    """Bytes a block."""
    warps: int
    seconds: float
    """That its compilation took."""
    sass: str
    """File with the machine code."""

    @cached_property
    def instructions(self) -> list[Instruction]:
        return parse(Path(self.sass))


_compiled: dict[str, Kernel] = {}


def _compile(key: str, launch: Launch) -> Kernel:
    if key not in _compiled:
        folder = output_folder() / "kernels"
        folder.mkdir(exist_ok=True)
        name = f"{launch.name}-{key}"
        record = folder / f"{name}.json"
        if not record.exists():
            kernel = _compile_afresh(launch, name, folder)
            new = record.with_suffix(f".{os.getpid()}")
            new.write_text(json.dumps(asdict(kernel)))
            new.replace(record)
        _compiled[key] = Kernel(**json.loads(record.read_text()))
    return _compiled[key]


def _compile_afresh(launch: Launch, name: str, folder: Path) -> Kernel:
    signature, constants, attributes, options = launch.specialise()
    source = ASTSource(
        fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes
    )
    start = time.time()
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    seconds = round(time.time() - start, 1)
    binary = folder / f"{name}.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    usage = _disassemble("-res-usage", binary)
    sass = folder / f"{name}.sass"
    sass.write_text(_disassemble("-sass", binary))
    return Kernel(
        name=name,
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        stack=int(re.search(r"STACK:(\d+)", usage)[1]),
        shared=compiled.metadata.shared,
        warps=compiled.metadata.num_warps,
        seconds=seconds,
        sass=str(sass),
    )


def _disassemble(what: str, binary: Path) -> str:
    command = [_DISASSEMBLER, what, binary]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


class _Recorder:
    """Stands in for a kernel in its launcher's module."""

    def __init__(self, kernel: JITFunction, log: list[Launch]):
        self._kernel, self._log = kernel, log

    def __getitem__(self, grid):
        def launch(*args, **options):
            self._log.append(Launch(self._kernel, tuple(grid), args, options))

        return launch


@contextmanager
def recording(*modules: ModuleType) -> Iterator[list[Launch]]:
    """Record what the modules' launchers launch instead of launching it."""
    log: list[Launch] = []
    replaced = []
    for module in modules:
        for name, value in list(vars(module).items()):
            if isinstance(value, JITFunction) and not name.startswith("_"):
                new = _Recorder(value, log)
            elif name == "multiprocessors":
                new = _processors
            else:
                continue
            replaced.append((module, name, value))
            setattr(module, name, new)
    try:
        yield log
    finally:
        for module, name, value in replaced:
            setattr(module, name, value)


def _processors(_device: object) -> int:
    return PROCESSORS


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """A tensor without data."""
    return torch.empty(*shape, dtype=dtype, device="meta")
