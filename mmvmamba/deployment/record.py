"""What is known of an exported model: the JSON file beside it."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from mmvmamba.engine.errors import UsageError

FORMAT = 2
"""Version of the JSON's format. Files of earlier versions stay readable."""


@dataclass(frozen=True)
class Record:
    """What a runtime cannot tell of an exported model.

    Attributes:
        task: 'mmpretrain', 'mmdet' or 'mmseg', the package whose model it is.
        config: Name of its config.
        classes: Names of the classes, by label.
        outputs: Names of the results, in their order.
        channels: Order of the images' channels: 'RGB', or 'as loaded' for what the first of
            `transforms` loads, BGR by default.
        transforms: The steps of the test pipeline that change an image, in mmcv's words.
        size: Height and width of the images in pixels; None for any.
        batched: Whether a call takes several images.
        least: The smallest side of an image in pixels.
        opset: Of ONNX's operators; None in other formats.
        versions: Of the packages that made the file.
        custom_op: Whether it needs our library of operators for ONNX Runtime.
        format: `FORMAT` at that time.
        scans: What is in the file beside the model that `scans_path` names; None without one.
            'divisor': images are padded to multiples of it. 'stages': for each its 'stage', the
            'block' of it, both from 1, and its 'paths', as `mmvmamba_kernels.patterns.Path`.
    """

    task: str
    config: str
    classes: list[str]
    outputs: list[str]
    channels: str
    transforms: list[dict]
    size: list[int] | None
    batched: bool
    least: int
    opset: int | None
    versions: dict[str, str]
    custom_op: bool = False
    format: int = FORMAT
    scans: dict | None = None

    def pixels(self, image: Tensor) -> np.ndarray:
        """An image (C, H, W) of OpenMMLab's pipeline as the model takes it, (1, C, H, W)."""
        pixels = image.float().numpy()[None]
        # Pipelines load BGR.
        return np.ascontiguousarray(pixels[:, ::-1] if self.channels == "RGB" else pixels)

    def save(self, model: Path) -> None:
        """Writes the JSON beside a model's file."""
        path_of(model).write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, model: Path) -> "Record":
        """Reads the JSON beside a model's file.

        Raises:
            UsageError: If it is not there, damaged, or of a later version.
        """
        path = path_of(model)
        if not path.is_file():
            raise UsageError(f"{path} is missing: copy it along with {model.name}, or export anew.")
        try:
            content = json.loads(path.read_text())
            version = content["format"]
            if version > FORMAT:
                raise UsageError(
                    f"{path} has format {version}, this version of mmvmamba reads up to {FORMAT}: "
                    "update mmvmamba."
                )
            return cls(**content)
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UsageError(f"{path} is no record of an export ({error}): export anew.") from error


def path_of(model: Path) -> Path:
    """The JSON file beside a model's file."""
    return model.with_name(f"{model.name}.json")


def scans_path(model: Path) -> Path:
    """The file beside a model's file with what drives its scans."""
    return model.with_suffix(f".scans{model.suffix}")
