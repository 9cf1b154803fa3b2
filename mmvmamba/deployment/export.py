"""Models and modules to files of other runtimes."""

import logging
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from mmvmamba.analysis.pictures import class_metainfo, load_model, test_steps
from mmvmamba.compat import installed_version
from mmvmamba.deployment.deployable import Deployable
from mmvmamba.deployment.models import deployable
from mmvmamba.deployment.record import Record
from mmvmamba.engine.errors import UsageError
from mmvmamba.engine.tasks import scope_of, type_name
from mmvmamba.models import VMamba
from mmvmamba.models.checkpoint import read_checkpoint

FORMATS = {"onnx": ".onnx", "openvino": ".xml", "pt2": ".pt2"}
"""What can be written, and the suffix of its file."""

OPSET = 18
"""Version of ONNX's operators: the first with every one that is needed."""

NEEDED = {"onnx": ("onnx", "onnxscript"), "openvino": ("onnx", "onnxscript", "openvino"), "pt2": ()}
"""Packages that a format is written with."""

# Steps of a pipeline that read labels or hand on, and leave the pixels alone.
_KEEPING = ("LoadAnnotations", "LoadPanopticAnnotations", "Pack", "Collect", "PILToTensor")


@dataclass(frozen=True)
class Loaded:
    """A config's model with its weights, as it is deployed.

    Attributes:
        cfg: The config.
        module: The model.
        classes: Names of its classes, by label.
    """

    cfg: Config
    module: Deployable
    classes: list[str]


def load(cfg: Config, checkpoint: str) -> Loaded:
    """Loads what is to be exported.

    Args:
        cfg: The config.
        checkpoint: The weights, which must fit.

    Raises:
        UsageError: If the model cannot be exported.
        CheckpointError: If the weights cannot be read or do not fit.
    """
    init_default_scope(scope_of(cfg))
    content = read_checkpoint(checkpoint)
    module = deployable(scope_of(cfg), load_model(cfg, content, checkpoint))
    meta = content.get("meta", {}).get("dataset_meta") or class_metainfo(cfg)
    return Loaded(cfg, module, list(meta.get("classes") or meta.get("CLASSES") or ()))


def export_model(
    loaded: Loaded,
    out: Path,
    kind: str,
    size: tuple[int, int] | None = None,
    custom_op: bool = False,
) -> Record:
    """Writes a model, and the JSON beside it.

    Args:
        loaded: The model.
        out: The file to write.
        kind: One of `FORMATS`.
        size: Height and width of the images in pixels, for a graph of fixed size; None for any.
        custom_op: Whether ONNX Runtime is to scan with the C++ kernel, in a library of ours.

    Raises:
        UsageError: If the format, the size or an operator of the model cannot be exported.
    """
    check_format(out, kind)
    cfg, module = loaded.cfg, loaded.module
    program = trace(module, *example_for(module, size, module.batched))
    write(program, out, kind, module.outputs, custom_op)
    record = Record(
        task=scope_of(cfg),
        config=Path(cfg.filename).name,
        classes=loaded.classes,
        outputs=list(module.outputs),
        channels=module.channels,
        transforms=changing_steps(cfg),
        size=list(size) if size else None,
        batched=module.batched,
        least=backbone_of(module).arch.min_size,
        opset=None if kind == "pt2" else OPSET,
        custom_op=custom_op,
        versions={
            name: str(installed_version(name)) for name in ("mmvmamba", "torch", *NEEDED[kind])
        },
    )
    record.save(out)
    return record


def changing_steps(cfg: Config) -> list[dict]:
    """The steps of a config's test pipeline that load or change pixels."""
    return [
        {**step, "type": type_name(step)}
        for step in test_steps(cfg)
        if not type_name(step).startswith(_KEEPING)
    ]


def check_format(out: Path, kind: str) -> None:
    """Refuses what could only fail after the export.

    Raises:
        UsageError: If the file's name does not fit the format, its folder cannot be made, or a
            package is missing.
    """
    if out.suffix != FORMATS[kind]:
        raise UsageError(f"{out}: a file of --format {kind} ends in {FORMATS[kind]}.")
    missing = [name for name in NEEDED[kind] if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"--format {kind} needs {' and '.join(missing)}: pip install {' '.join(missing)}"
        )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{out} cannot be written: {error}.") from error


def example_for(
    module: nn.Module, size: tuple[int, int] | None, batched: bool
) -> tuple[Tensor, tuple]:
    """Images to trace a module with, and the dimensions in which others may differ.

    Args:
        module: The module, with a VMamba in it.
        size: Height and width of the images, one a call; None for any.
        batched: Whether a call takes several images of any size.

    Raises:
        UsageError: If the size is too small for the module, or it has no VMamba.
    """
    backbone = backbone_of(module)
    least = backbone.arch.min_size
    if size is not None:
        if min(size) < least:
            raise UsageError(
                f"--size {size[0]} {size[1]}: the model takes images from {least} pixels on."
            )
        return torch.rand(1, backbone.in_channels, *size), ()
    # The smallest map is 3 by 4: what is 1 or equals its neighbour in the example is taken for
    # fixed. Maps that patch merging pads are odd, or it would be taken for never padding.
    stride = _largest_stride(module, backbone)
    example = torch.rand(2 if batched else 1, backbone.in_channels, 2 * stride + 6, 3 * stride + 5)
    return example, (0, 2, 3) if batched else (2, 3)


def _largest_stride(module: nn.Module, backbone: VMamba) -> int:
    """Pixels of the image for one position of the smallest map, necks included."""
    strides = [info["reduction"] for info in backbone.feature_info]
    for part in module.modules():
        # A detector's, whose neck may have maps of its own.
        if generator := getattr(part, "prior_generator", None):
            strides += [side for stride in generator.strides for side in stride]
    return max(strides)


def backbone_of(module: nn.Module) -> VMamba:
    """The VMamba in a module.

    Raises:
        UsageError: If there is none, or more than one.
    """
    found = [part for part in module.modules() if isinstance(part, VMamba)]
    if len(found) != 1:
        raise UsageError(f"the model has {len(found)} VMambas in it; exported are models with one.")
    return found[0]


def trace(module: nn.Module, images: Tensor, dynamic: Sequence[int] = ()) -> ExportedProgram:
    """The operations of a module, as PyTorch exports them.

    Args:
        module: In evaluation mode.
        images: An example, (B, C, H, W).
        dynamic: The dimensions in which other images may differ.
    """
    shapes = (dict.fromkeys(dynamic, Dim.DYNAMIC),) if dynamic else None
    with torch.no_grad(), _undisturbed():
        return torch.export.export(module, (images,), dynamic_shapes=shapes, strict=False)


def write(
    program: ExportedProgram,
    out: Path,
    kind: str,
    outputs: Sequence[str] | None = None,
    custom_op: bool = False,
) -> None:
    """Writes what was traced.

    Args:
        program: As `trace` gives it.
        out: The file to write.
        kind: One of `FORMATS`.
        outputs: Names of the results; None for the exporter's.
        custom_op: See `export_model`.
    """
    if kind == "pt2":
        torch.export.save(program, out)
    elif kind == "onnx":
        to_onnx(program, outputs, custom_op).save(out)
    else:
        write_openvino(to_onnx(program, outputs), out)


def write_openvino(model: torch.onnx.ONNXProgram, out: Path) -> None:
    """Writes an ONNX graph as OpenVINO's .xml, and the .bin with its weights."""
    import onnx
    import openvino
    from onnx.inliner import inline_local_functions

    with tempfile.TemporaryDirectory() as folder:
        # OpenVINO's reader knows no functions.
        plain = Path(folder) / "plain.onnx"
        onnx.save(inline_local_functions(model.model_proto), plain)
        openvino.save_model(openvino.convert_model(plain), out, compress_to_fp16=False)


def to_onnx(
    program: ExportedProgram, outputs: Sequence[str] | None, custom_op: bool = False
) -> torch.onnx.ONNXProgram:
    """The ONNX graph of what was traced, with the operators as functions.

    Raises:
        UsageError: If an operator has no translation for what it was called with.
    """
    import onnx_ir
    from onnxscript import optimizer

    from mmvmamba.deployment import operators

    try:
        with _undisturbed():
            model = torch.onnx.export(
                program,
                (),
                dynamo=True,
                opset_version=OPSET,
                input_names=["images"],
                output_names=outputs and list(outputs),
                custom_translation_table=operators.translations(custom_op),
                # It would write out every function at each of its places.
                optimize=False,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        # What a translation says stands behind what the exporter says of it.
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, UsageError):
            cause = cause.__cause__
        if cause is None:
            raise
        raise UsageError(str(cause)) from error
    model.model.opset_imports[operators.DOMAIN.domain] = operators.DOMAIN.version
    for function in operators.functions():
        written = onnx_ir.from_proto(function.to_function_proto())
        model.model.functions[written.identifier()] = written
    with _undisturbed():
        optimizer.optimize(model.model, inline=False)
    return model


@contextmanager
def _undisturbed():
    """Silences what exporters say of themselves and of the packages that they look for."""
    logger = logging.getLogger("onnx_ir")
    level = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)
