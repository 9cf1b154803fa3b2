"""Exported models in their runtimes: one way to call them all."""

import re
import tempfile
import zipfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn

from mmvmamba.deployment.export import FORMATS, trace, write
from mmvmamba.deployment.record import Record
from mmvmamba.engine.errors import UsageError
from mmvmamba_kernels.backends.native import compiler, extension

RUNTIMES = {".onnx": "onnxruntime", ".xml": "openvino", ".pt2": "torch"}
"""What runs a file, by its suffix."""


class Deployed:
    """An exported model, with the JSON beside it.

    Args:
        path: The file.
        threads: How many the runtime may use; None for its own choice.

    Raises:
        UsageError: If the file, its JSON or its runtime is missing, or does not fit.
    """

    def __init__(self, path: str | Path, threads: int | None = None):
        self.path = Path(path)
        if self.path.suffix not in RUNTIMES:
            raise UsageError(f"{path}: exported models end in {', '.join(FORMATS.values())}.")
        if not self.path.is_file():
            raise UsageError(f"{path} does not exist (working directory: {Path.cwd()}).")
        self.record = Record.load(self.path)
        self.run = open_file(self.path, threads, self.record.custom_op)

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Runs the model.

        Args:
            images: (B, C, H, W), float32, from 0 to 255.

        Returns:
            The results by name.

        Raises:
            UsageError: If the model was not made for images of that number or size.
        """
        if images.ndim != 4:
            raise UsageError(
                f"{self.path} takes images (B, C, H, W), not an array of shape {images.shape}."
            )
        record, size = self.record, list(images.shape[2:])
        if record.size is not None and size != record.size:
            raise UsageError(
                f"{self.path} was made for images of {record.size[0]}x{record.size[1]} pixels, not "
                f"{size[0]}x{size[1]}: resize them, or export with --dynamic."
            )
        if min(size) < record.least:
            raise UsageError(
                f"{self.path} takes images from {record.least} pixels, not {size[0]}x{size[1]}: "
                "resize or pad them."
            )
        if len(images) != 1 and (record.size is not None or not record.batched):
            raise UsageError(f"{self.path} takes one image a call, not {len(images)}.")
        results = self.run(np.ascontiguousarray(images, dtype=np.float32))
        return dict(zip(record.outputs, results, strict=True))


Run = Callable[[np.ndarray], list[np.ndarray]]


def open_file(path: Path, threads: int | None = None, custom_op: bool = False) -> Run:
    """Opens a file in its runtime; see `Deployed`.

    Args:
        path: The file.
        threads: How many the runtime may use; None for its own choice.
        custom_op: Whether the file needs our library of operators for ONNX Runtime.

    Raises:
        UsageError: If the runtime or the library is missing, or the runtime cannot open the file.
    """
    if path.suffix == ".onnx":
        return _open_onnx(path, threads, _custom_operators() if custom_op else None)
    return (_open_openvino if path.suffix == ".xml" else _open_pt2)(path, threads)


def _custom_operators() -> Path:
    library = extension.find_library(compiler.ONNX_RUNTIME)
    if library is None:
        raise UsageError(
            "the model scans with our C++ kernel, whose library for ONNX Runtime is not built; "
            f"run: {extension.build_command(compiler.ONNX_RUNTIME)}"
        )
    return library


def in_runtime(module: nn.Module, images: Tensor, runtime: str) -> Callable[[Tensor], list[Tensor]]:
    """Exports a module for images of one shape, and runs it in a runtime.

    Args:
        module: In evaluation mode.
        images: An example, (B, C, H, W).
        runtime: 'onnxruntime', 'onnxruntime+cpp' (with our C++ kernel as its operator) or
            'openvino'.
    """
    kind = "openvino" if runtime == "openvino" else "onnx"
    custom_op = runtime.endswith("+cpp")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"model{FORMATS[kind]}"
        write(trace(module, images), path, kind, custom_op=custom_op)
        run = open_file(path, torch.get_num_threads(), custom_op)
    return lambda images: [torch.from_numpy(result) for result in run(images.numpy())]


def check_runtime(path: Path) -> None:
    """Looks for the package that runs a file of such a name.

    Raises:
        UsageError: If it is not installed.
    """
    _runtime(RUNTIMES[path.suffix])


def _runtime(name: str) -> ModuleType:
    try:
        return import_module(name)
    except ImportError as error:
        raise UsageError(f"{name} is not installed: pip install {name}") from error


def _open_onnx(path: Path, threads: int | None, operators: Path | None) -> Run:
    runtime = _runtime("onnxruntime")
    options = runtime.SessionOptions()
    if operators is not None:
        options.register_custom_ops_library(str(operators))
    options.intra_op_num_threads = threads or 0
    # Its warnings of initialisers that it need not copy.
    options.log_severity_level = 3
    state = runtime.capi.onnxruntime_pybind11_state
    refusals = (
        state.Fail,
        state.InvalidArgument,
        state.InvalidGraph,
        state.InvalidProtobuf,
        state.NotImplemented,
    )
    try:
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except refusals as error:
        raise UsageError(_cannot_open(path, str(error))) from error
    [name] = (given.name for given in session.get_inputs())

    def run(images: np.ndarray) -> list[np.ndarray]:
        try:
            return session.run(None, {name: images})
        except (state.InvalidArgument, state.RuntimeException, state.Fail) as error:
            # They derive from Exception alone.
            raise RuntimeError(f"onnxruntime cannot run {path}: {error}") from error

    return run


def _open_openvino(path: Path, threads: int | None) -> Run:
    openvino = _runtime("openvino")
    settings = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    if threads:
        settings = {**settings, "INFERENCE_NUM_THREADS": threads}
    try:
        model = openvino.Core().compile_model(str(path), "CPU", settings)
    except RuntimeError as error:
        raise UsageError(_cannot_open(path, str(error))) from error
    request = model.create_infer_request()

    def run(images: np.ndarray) -> list[np.ndarray]:
        results = request.infer([images])
        return [np.array(results[output]) for output in model.outputs]

    return run


def _open_pt2(path: Path, threads: int | None) -> Run:
    import mmvmamba_kernels  # noqa: F401 (the operators of the file)

    # PyTorch would log a traceback, and try an older format.
    if not zipfile.is_zipfile(path):
        raise UsageError(_cannot_open(path, "it is no zip archive"))
    try:
        module = torch.export.load(path).module()
    except (RuntimeError, ValueError, KeyError) as error:
        raise UsageError(_cannot_open(path, str(error))) from error
    if threads:
        torch.set_num_threads(threads)

    def run(images: np.ndarray) -> list[np.ndarray]:
        with torch.no_grad():
            results = module(torch.from_numpy(images))
        results = results if isinstance(results, tuple | list) else (results,)
        return [result.numpy() for result in results]

    return run


def _cannot_open(path: Path, reason: str) -> str:
    name = RUNTIMES[path.suffix]
    version = import_module(name).__version__.split("-")[0]
    # The last line, without the place in the runtime's own source.
    last = reason.strip().split("\n")[-1]
    last = re.sub(r"^.*? failed:(/\S+:\d+ .*?\) )?", "", last).rstrip(".")
    return (
        f"{name} {version} cannot open {path} ({last[-300:]}): copy it again with the files beside "
        f"it, update {name}, or export the model anew."
    )
