"""Compile Triton kernels ahead of their first launch, in several processes, for any GPU.

Launches are recorded in a rehearsal (:mod:`mmvmamba_kernels.rehearsal`), specialised by Triton's
own just-in-time compiler, which asks a hook before it compiles, and handed to worker processes by
that hook. What these compile is where the launch looks for it: in Triton's cache on the disk. No
GPU is needed; ``python -m mmvmamba_kernels.backends.triton.precompile`` is a worker.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import os
import queue
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction, MockTensor

import mmvmamba_kernels
from mmvmamba_kernels import rehearsal
from mmvmamba_kernels.backends.triton.support import compile_hook

logger = logging.getLogger(__name__)

_MOST_JOBS = 16
"""Of what is not asked for: every process holds PyTorch, some hundred megabytes."""

# What takes longest to compile, first.
_ORDER = ("selective_scan_bwd", "selective_scan_fwd", "selective_scan_state", "depthwise_conv_bwd")


class PrecompileError(RuntimeError):
    """Kernels could not be compiled; the message has the first reason."""


@dataclass(frozen=True)
class Target:
    """A GPU as Triton knows it."""

    backend: str
    architecture: int | str
    """Of NVIDIA's, ten times the compute capability."""
    warp: int

    @staticmethod
    def here() -> Target:
        """The current GPU.

        Raises:
            ValueError: If there is none.
        """
        if not torch.cuda.is_available():
            raise ValueError("there is no GPU here: name one to compile for, such as sm_90")
        found = driver.active.get_current_target()
        return Target(found.backend, found.arch, found.warp_size)

    @property
    def name(self) -> str:
        prefix = "sm_" if self.backend == "cuda" else ""
        return f"{prefix}{self.architecture}"

    @staticmethod
    def parse(text: str) -> Target:
        """An NVIDIA GPU by its name, such as 'sm_90'.

        Raises:
            ValueError: If it is no such name.
        """
        number = text.removeprefix("sm_")
        if number == text or not number.isdecimal():
            raise ValueError(f"{text!r} is no target such as sm_90 (ten times compute capability)")
        return Target("cuda", int(number), 32)


@dataclass(frozen=True)
class Specialisation:
    """One kernel as it would be compiled."""

    module: str
    name: str
    """Of the function."""
    data: str
    """What Triton writes down to compile it elsewhere."""

    @property
    def digest(self) -> str:
        """What changes with anything that the machine code depends on in this package."""
        parts = (triton.__version__, self.kernel.cache_key, self.data)
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    @property
    def kernel(self) -> JITFunction:
        return getattr(importlib.import_module(self.module), self.name)

    @property
    def rank(self) -> int:
        starts = (i for i, start in enumerate(_ORDER) if self.name.startswith(start))
        return next(starts, len(_ORDER))


class _Driver:
    """Tells Triton of a GPU that need not be there."""

    def __init__(self, target: Target):
        self._target = GPUTarget(target.backend, target.architecture, target.warp)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0


@contextmanager
def _pretending(target: Target) -> Iterator[None]:
    driver.set_active(_Driver(target))
    try:
        yield
    finally:
        try:
            driver.reset_active()
        except RuntimeError:
            # There is no GPU: as if nobody had asked.
            driver.set_active(None)


_recording = threading.Lock()


@contextmanager
def recording(target: Target) -> Iterator[list[Specialisation]]:
    """Collect the kernels that launches of a rehearsal ask for, instead of launching them.

    Launches of other threads wait meanwhile, for Triton has one driver and one way to launch.

    Args:
        target: The GPU that they would be compiled for.
    """
    found: dict[Specialisation, None] = {}
    result: list[Specialisation] = []
    run = JITFunction.run
    owner, name = compile_hook()
    before = getattr(owner, name)
    caches = {}

    def record(kernel: JITFunction, *args, grid, warmup, **options):
        if not rehearsal.active():
            with _recording:
                return run(kernel, *args, grid=grid, warmup=warmup, **options)
        if kernel not in caches:
            # Those of its own may be of another GPU, or know the kernel already.
            caches[kernel] = kernel.device_caches
            kernel.device_caches = defaultdict(kernel.create_binder)
        args = [MockTensor(a.dtype) if isinstance(a, torch.Tensor) else a for a in args]
        return run(kernel, *args, grid=grid, warmup=True, **options)

    def hook(*args, **details) -> bool | None:
        if not rehearsal.active():
            return before(*args, **details) if before is not None else None
        kernel, data = details["fn"], details["compile"]["specialization_data"]
        found[Specialisation(kernel.module, kernel.name.rpartition(".")[2], data)] = None
        # Do not compile.
        return True

    with _recording, rehearsal.rehearsing(), _pretending(target):
        JITFunction.run = record
        setattr(owner, name, hook)
        try:
            yield result
        finally:
            JITFunction.run = run
            # Unless another one was put in front of it meanwhile, which goes on to call it.
            if getattr(owner, name) is hook:
                setattr(owner, name, before)
            for kernel, cache in caches.items():
                kernel.device_caches = cache
    result += found


def cache_folder() -> Path:
    """Where Triton keeps what it compiled."""
    chosen = os.environ.get("TRITON_CACHE_DIR")
    home = os.environ.get("TRITON_HOME") or Path.home()
    return Path(chosen) if chosen else Path(home) / ".triton" / "cache"


def _mark(specialisation: Specialisation) -> Path:
    """A file beside Triton's that says that a kernel was compiled."""
    return cache_folder() / "mmvmamba_kernels" / specialisation.digest


def missing(kernels: Sequence[Specialisation]) -> list[Specialisation]:
    """Those that were not compiled into this cache before, in the order to compile them."""
    return sorted((k for k in kernels if not _mark(k).exists()), key=lambda k: k.rank)


def compile_kernels(
    kernels: Sequence[Specialisation],
    target: Target,
    jobs: int | None = None,
    progress: Callable[[str, float, int], None] = lambda *_: None,
) -> int:
    """Compile what the cache lacks.

    Processes that do so at the same time, as those of one training do, wait for one another, and
    only the first compiles.

    Args:
        kernels: What :func:`recording` found.
        target: The GPU that it was recorded for.
        jobs: Processes; None for one for each core that this process may use, 16 at most.
        progress: Called after each kernel with its name, the seconds that it took, and how many
            are left.

    Returns:
        How many kernels were compiled.

    Raises:
        PrecompileError: If one cannot be compiled.
    """
    if not missing(kernels):
        return 0
    folder = _mark(kernels[0]).parent
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder / "lock"):
        todo = missing(kernels)
        jobs = min(jobs or min(_cores(), _MOST_JOBS), len(todo))
        _Workers(todo, target, progress).run(jobs)
    return len(todo)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _lock(file: Path) -> Iterator[None]:
    try:
        import fcntl
    except ImportError:
        # Not on Windows: there everyone compiles.
        yield
        return
    with file.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


class _Workers:
    """Processes that take kernels from one list until it is empty."""

    def __init__(self, todo: Sequence[Specialisation], target: Target, progress):
        self._todo: queue.SimpleQueue[Specialisation] = queue.SimpleQueue()
        for kernel in todo:
            self._todo.put(kernel)
        self._target, self._progress = target, progress
        self._left = len(todo)
        self._failures: list[str] = []

    def run(self, jobs: int) -> None:
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(self._serve, range(jobs)))
        if self._failures:
            raise PrecompileError(self._failures[0])

    def _serve(self, _number: int) -> None:
        """Feed one process."""
        package = str(Path(mmvmamba_kernels.__file__).parents[1])
        path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
        command = [sys.executable, "-m", __spec__.name, json.dumps(asdict(self._target))]
        with subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        ) as process:
            while True:
                try:
                    kernel = self._todo.get_nowait()
                except queue.Empty:
                    break
                if not self._compile(process, kernel):
                    break
            # What was not written yet cannot be: the process has ended, as its failure says.
            with suppress(BrokenPipeError):
                process.stdin.close()

    def _compile(self, process: subprocess.Popen, kernel: Specialisation) -> bool:
        """Have one kernel compiled; whether the process goes on."""
        try:
            process.stdin.write(json.dumps(asdict(kernel)) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        found = json.loads(answer) if answer else {"failure": "the process that compiled it ended"}
        self._left -= 1
        if "failure" in found:
            self._failures.append(f"{kernel.name} cannot be compiled: {found['failure']}")
        else:
            _mark(kernel).touch()
            self._progress(kernel.name, found["seconds"], self._left)
        return bool(answer)


def _launcher_builder() -> Callable[..., object]:
    """What builds the C code that launches a kernel, and is of this machine: of a GPU's driver."""
    drivers = [backend.driver for backend in backends.values() if backend.driver.is_active()]
    return drivers[0]().launcher_cls if drivers else lambda *_: None


def _work(target: Target) -> None:
    """Compile what the standard input names, a kernel a line, and answer each with a line."""
    # Where Triton or a compiler prints, it must not be into the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    build_launcher = _launcher_builder()
    with _pretending(target):
        for line in sys.stdin:
            kernel = Specialisation(**json.loads(line))
            start = time.perf_counter()
            try:
                compiled = kernel.kernel.preload(kernel.data)
                build_launcher(compiled.src, compiled.metadata)
                found = {"seconds": time.perf_counter() - start}
            except Exception as error:  # noqa: BLE001 - whatever it is, the process that asked tells
                found = {"failure": f"{type(error).__name__}: {error}"}
            answers.write(json.dumps(found) + "\n")
            answers.flush()


if __name__ == "__main__":
    _work(Target(**json.loads(sys.argv[1])))
