"""Parts of mmdet's detectors that keep coordinates in float32 under mixed precision.

bfloat16 has eight bits for a number: a box at pixel 1000 would move by up to two pixels. And
mmcv's RoIAlign and NMS have no bfloat16 kernels. Convolutions stay in the reduced precision.
"""

import torch
from mmdet.models.dense_heads import RetinaHead, RPNHead
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
from torch import Tensor


class _Float32Outputs:
    """Anchors and boxes take their type from a head's scores."""

    def forward_single(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and box offsets of one level, float32."""
        scores, offsets = super().forward_single(x)
        return scores.float(), offsets.float()


class Float32RPNHead(_Float32Outputs, RPNHead):
    """mmdet's `RPNHead` whose scores and box offsets are float32."""


class Float32RetinaHead(_Float32Outputs, RetinaHead):
    """mmdet's `RetinaHead` whose scores and box offsets are float32."""


class Float32RoIExtractor(SingleRoIExtractor):
    """mmdet's `SingleRoIExtractor` that samples in float32, whatever the type of the maps."""

    def forward(
        self, feats: tuple[Tensor, ...], rois: Tensor, roi_scale_factor: float | None = None
    ) -> Tensor:
        """Samples the boxes' features, (boxes, C, height, width), float32."""
        maps = tuple(level.to(torch.float32) for level in feats)
        return super().forward(maps, rois, roi_scale_factor)
