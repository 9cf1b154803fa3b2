"""ONNX models with products of 8-bit integers, by ONNX Runtime's static quantisation."""

import shutil
import tempfile
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

from mmengine.config import Config
from mmengine.registry import init_default_scope

from mmvmamba.analysis.pictures import items
from mmvmamba.deployment.record import Record
from mmvmamba.engine.tasks import scope_of

PRODUCTS = ["MatMul", "Gemm", "Conv"]
"""What is quantised: the scans and everything else stay in float32."""


def quantize(cfg: Config, path: Path, images: list[Path]) -> None:
    """Quantises an exported model's products, in its file.

    Args:
        cfg: The model's config.
        path: The exported ONNX file.
        images: Files from which the ranges of the activations are taken.
    """
    from onnxruntime.quantization import QuantType, quantize_static

    init_default_scope(scope_of(cfg))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / path.name
        quantize_static(
            path,
            out,
            _Pixels(cfg, Record.load(path), images),
            op_types_to_quantize=PRODUCTS,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        shutil.copyfile(out, path)


class _Pixels:
    """Images one by one, as ONNX Runtime's calibration asks for them."""

    def __init__(self, cfg: Config, record: Record, images: list[Path]):
        self.feeds = self._feeds(deepcopy(cfg), record, images)

    @staticmethod
    def _feeds(cfg: Config, record: Record, images: list[Path]) -> Iterator[dict]:
        for item in items(cfg, None, images, None):
            yield {"images": record.pixels(item["inputs"])}

    def get_next(self) -> dict | None:
        """The next feed, or None at the end."""
        return next(self.feeds, None)
