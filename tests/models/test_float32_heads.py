"""Boxes stay in float32 under mixed precision."""

import pytest
import torch
from mmengine.config import ConfigDict

from mmvmamba.registry import MODELS

ROI_LAYER = {"type": "RoIAlign", "output_size": 3, "sampling_ratio": 0}
EXTRACTOR = {
    "roi_layer": ROI_LAYER,
    "out_channels": 4,
    "featmap_strides": [4, 8],
    "_scope_": "mmdet",
}
BOXES = torch.tensor([[0.0, 1.0, 2.0, 30.0, 40.0], [1.0, 5.0, 3.0, 250.0, 251.0]])


def maps(dtype):
    torch.manual_seed(0)
    return tuple(torch.randn(2, 4, 64 // s, 64 // s).to(dtype) for s in (1, 2))


def test_boxes_are_sampled_in_float32():
    extractor = MODELS.build(EXTRACTOR | {"type": "mmvmamba.Float32RoIExtractor"})
    rounded = maps(torch.bfloat16)
    out = extractor(rounded, BOXES)
    expected = MODELS.build(EXTRACTOR | {"type": "SingleRoIExtractor"})(
        tuple(level.float() for level in rounded), BOXES
    )
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


def test_upstreams_extractor_cannot():
    with pytest.raises(RuntimeError, match="BFloat16"):
        MODELS.build(EXTRACTOR | {"type": "SingleRoIExtractor"})(maps(torch.bfloat16), BOXES)


def test_gradients_reach_maps_in_reduced_precision():
    extractor = MODELS.build(EXTRACTOR | {"type": "mmvmamba.Float32RoIExtractor"})
    levels = tuple(level.requires_grad_() for level in maps(torch.bfloat16))
    extractor(levels, BOXES).sum().backward()
    assert all(level.grad.dtype == torch.bfloat16 for level in levels)
    assert all(level.grad.abs().sum() > 0 for level in levels)


ANCHORS = {"type": "AnchorGenerator", "ratios": [1.0], "strides": [4, 8]}


def test_proposals_are_float32_under_autocast():
    torch.manual_seed(0)
    head = MODELS.build(
        ConfigDict(
            type="mmvmamba.Float32RPNHead",
            _scope_="mmdet",
            in_channels=4,
            feat_channels=4,
            num_classes=1,
            anchor_generator=ANCHORS | {"scales": [8]},
            bbox_coder={"type": "DeltaXYWHBBoxCoder"},
            test_cfg={
                "nms_pre": 50,
                "max_per_img": 5,
                "min_bbox_size": 0,
                "nms": {"type": "nms", "iou_threshold": 0.7},
            },
        )
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores, offsets = head(maps(torch.float32))
        assert {x.dtype for x in (*scores, *offsets)} == {torch.float32}
        (proposals, _) = head.predict_by_feat(
            scores, offsets, batch_img_metas=[{"img_shape": (256, 256)}] * 2
        )
    assert proposals.bboxes.dtype == torch.float32


def test_one_stage_boxes_are_float32_under_autocast():
    head = MODELS.build(
        ConfigDict(
            type="mmvmamba.Float32RetinaHead",
            _scope_="mmdet",
            num_classes=2,
            in_channels=4,
            feat_channels=4,
            stacked_convs=1,
            anchor_generator=ANCHORS | {"scales": [4]},
        )
    )
    seen = []
    head.retina_cls.register_forward_hook(lambda *values: seen.append(values[-1].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores, offsets = head(maps(torch.float32))
    assert set(seen) == {torch.bfloat16}
    assert {x.dtype for x in (*scores, *offsets)} == {torch.float32}
