"""Detectors of mmdet from pixels to boxes, scores, labels and masks, NMS included.

As mmdet's `predict`, which looks at the numbers on its way, for one image a call. torchvision's NMS
and RoIAlign stand in for mmcv's, which no exporter knows: they compute the same.
"""

import math
from collections.abc import Iterator

import torch
import torchvision
from mmdet.models.dense_heads import RetinaHead, RPNHead
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.models.detectors import SingleStageDetector, TwoStageDetector
from mmdet.models.roi_heads import CascadeRoIHead, StandardRoIHead
from mmdet.models.roi_heads.bbox_heads.bbox_head import BBoxHead
from mmdet.models.roi_heads.mask_heads import FCNMaskHead
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
from mmdet.models.task_modules.coders import DeltaXYWHBBoxCoder
from mmengine.config import ConfigDict
from torch import Tensor, nn

from mmvmamba.deployment.deployable import Deployable, require
from mmvmamba.engine.errors import UsageError

DETECTORS = "RetinaNet, Faster, Mask and Cascade R-CNN"
# mmdet's limit of how much wider or higher a box is than what it was made of.
MAX_LOG_RATIO = abs(math.log(16 / 1000))


def detector(model: nn.Module) -> Deployable:
    """Makes a detector's deployable form.

    Raises:
        UsageError: If it is not one of `DETECTORS`.
    """
    if isinstance(model, TwoStageDetector):
        return TwoStage(model)
    if isinstance(model, SingleStageDetector):
        return SingleStage(model)
    raise UsageError(f"{type(model).__name__} cannot be exported; exported are {DETECTORS}.")


class SingleStage(Deployable):
    """RetinaNet: to boxes (n, 4), x1, y1, x2, y2 in pixels, scores (n,) and labels (n,)."""

    outputs = ("boxes", "scores", "labels")
    batched = False

    def __init__(self, model: nn.Module):
        require(model, SingleStageDetector, "predict", DETECTORS)
        head = model.bbox_head
        require(head, RetinaHead, "predict_by_feat", DETECTORS)
        require(head, BaseDenseHead, "_predict_by_feat_single", DETECTORS)
        _check_coder(head)
        _check_nms(head.test_cfg.nms)
        super().__init__(model)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See the class."""
        head = self.model.bbox_head
        settings = head.test_cfg
        x = self.model.extract_feat(self.normalised(images))
        boxes, scores, labels = [], [], []
        for priors, level_scores, deltas in _levels(head, x):
            classes = level_scores.shape[1]
            best, index = _best(level_scores.flatten(), settings.get("nms_pre", -1))
            place = index // classes
            boxes.append(_decode(head.bbox_coder, priors[place], deltas[place], images))
            scores.append(best)
            labels.append(index % classes)
        boxes, scores, labels = torch.cat(boxes), torch.cat(scores), torch.cat(labels)
        index = (scores > settings.get("score_thr", 0)).nonzero().squeeze(1)
        found = _large(settings, boxes[index], scores[index], labels[index])
        return _suppress(*found, settings, images)


class TwoStage(Deployable):
    """Faster, Mask and Cascade R-CNN: as `SingleStage`, and each box's mask, (n, height, width).

    A mask is its pixels' probabilities within the box, which is cut into so many rows and columns.
    Cascades have several heads, each of which starts from the boxes of the one before it.
    """

    batched = False

    def __init__(self, model: nn.Module):
        require(model, TwoStageDetector, "predict", DETECTORS)
        require(model.rpn_head, RPNHead, "_predict_by_feat_single", DETECTORS)
        roi_head = model.roi_head
        kind = CascadeRoIHead if isinstance(roi_head, CascadeRoIHead) else StandardRoIHead
        require(roi_head, kind, "predict_bbox", DETECTORS)
        require(roi_head, kind, "predict_mask", DETECTORS)
        box_heads, extractors = _all(roi_head.bbox_head), _all(roi_head.bbox_roi_extractor)
        for head in box_heads:
            require(head, BBoxHead, "_predict_by_feat_single", DETECTORS)
        if roi_head.with_mask:
            for head in _all(roi_head.mask_head):
                require(head, FCNMaskHead, "_predict_by_feat_single", DETECTORS)
            extractors = (*extractors, *_all(roi_head.mask_roi_extractor))
        for extractor in extractors:
            require(extractor, SingleRoIExtractor, "map_roi_levels", "SingleRoIExtractor")
        if roi_head.with_shared_head:
            raise UsageError(f"a shared_head cannot be exported; exported are {DETECTORS}.")
        for head in (model.rpn_head, *box_heads):
            _check_coder(head)
        for settings in (model.rpn_head.test_cfg, roi_head.test_cfg):
            _check_nms(settings.nms)
        super().__init__(model)
        masks = ("masks",) if roi_head.with_mask else ()
        self.outputs = ("boxes", "scores", "labels", *masks)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """See the class."""
        roi_head = self.model.roi_head
        x = self.model.extract_feat(self.normalised(images))
        boxes, scores, deltas = self._classified(x, self._proposals(x, images), images)
        classes = scores.shape[1]
        settings = roi_head.test_cfg
        scores = scores.flatten()
        index = (scores > settings.score_thr).nonzero().squeeze(1)
        place, labels = index // classes, index % classes
        head = _all(roi_head.bbox_head)[-1]
        boxes = _decode(
            head.bbox_coder, boxes[place], _of_class(head, deltas, place, labels), images
        )
        boxes, scores, labels = _suppress(boxes, scores[index], labels, settings, images)
        if not roi_head.with_mask:
            return boxes, scores, labels
        extractors, heads = _all(roi_head.mask_roi_extractor), _all(roi_head.mask_head)
        masks = [
            _mask_of_class(head, head(_roi_features(extractor, x, boxes)), labels)
            for extractor, head in zip(extractors, heads, strict=True)
        ]
        return boxes, scores, labels, torch.stack(masks).mean(0)

    def _classified(
        self, x: tuple[Tensor, ...], boxes: Tensor, images: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The boxes that the last head starts from, its offsets, and the scores of all heads."""
        roi_head = self.model.roi_head
        extractors, heads = _all(roi_head.bbox_roi_extractor), _all(roi_head.bbox_head)
        all_logits = []
        for extractor, head in zip(extractors, heads, strict=True):
            logits, deltas = head(_roi_features(extractor, x, boxes))
            all_logits.append(logits)
            if head is not heads[-1]:
                labels = logits[:, :-1].argmax(1)
                own = _of_class(
                    head, deltas, torch.arange(logits.shape[0], device=logits.device), labels
                )
                boxes = _decode(head.bbox_coder, boxes, own, images)
        scores = torch.stack(all_logits).mean(0).softmax(-1)
        return boxes, scores[:, :-1], deltas

    def _proposals(self, x: tuple[Tensor, ...], images: Tensor) -> Tensor:
        """The boxes that the second stage looks at, (n, 4)."""
        head = self.model.rpn_head
        settings = head.test_cfg
        boxes, scores, levels = [], [], []
        for level, (priors, objectness, deltas) in enumerate(_levels(head, x)):
            best, index = _best(objectness.flatten(), settings.get("nms_pre", -1))
            boxes.append(_decode(head.bbox_coder, priors[index], deltas[index], images))
            scores.append(best)
            levels.append(torch.full_like(index, level))
        boxes, scores, levels = torch.cat(boxes), torch.cat(scores), torch.cat(levels)
        return _suppress(*_large(settings, boxes, scores, levels), settings, images)[0]


def _all(modules: nn.Module) -> tuple[nn.Module, ...]:
    """A cascade's heads or extractors, or the one of other detectors."""
    return tuple(modules) if isinstance(modules, nn.ModuleList) else (modules,)


def _of_class(head: nn.Module, deltas: Tensor, place: Tensor, labels: Tensor) -> Tensor:
    """The offsets, (n, 4), of boxes and their classes, of those of all boxes and classes."""
    deltas = deltas.reshape(deltas.shape[0], -1, 4)
    chosen = torch.zeros_like(labels) if head.reg_class_agnostic else labels
    return deltas.flatten(0, 1)[place * deltas.shape[1] + chosen]


def _mask_of_class(head: nn.Module, masks: Tensor, labels: Tensor) -> Tensor:
    """The probabilities, (n, height, width), of the masks of the boxes' classes."""
    chosen = torch.zeros_like(labels) if head.class_agnostic else labels
    chosen = chosen[:, None, None, None].expand(-1, 1, *masks.shape[2:])
    return masks.gather(1, chosen).squeeze(1).sigmoid()


def _check_coder(head: nn.Module) -> None:
    coder = head.bbox_coder
    if type(coder) is not DeltaXYWHBBoxCoder or coder.add_ctr_clamp or not coder.clip_border:
        raise UsageError(
            f"a {type(coder).__name__} (bbox_coder) cannot be exported; exported is "
            "DeltaXYWHBBoxCoder as it is by default."
        )


def _check_nms(settings: ConfigDict) -> None:
    known = {"type", "iou_threshold"}
    if settings.get("type", "nms") != "nms" or set(settings) - known:
        raise UsageError(
            f"{dict(settings)} cannot be exported; exported is nms with iou_threshold."
        )


def _levels(head: nn.Module, x: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Of every level the anchors, (n, 4), scores, (n, classes), and offsets, (n, 4)."""
    all_scores, all_deltas = head(x)
    sizes = [scores.shape[-2:] for scores in all_scores]
    all_priors = head.prior_generator.grid_priors(
        sizes, dtype=all_scores[0].dtype, device=all_scores[0].device
    )
    for priors, scores, deltas in zip(all_priors, all_scores, all_deltas, strict=True):
        flat = scores[0].permute(1, 2, 0).reshape(-1, head.cls_out_channels)
        flat = flat.sigmoid() if head.use_sigmoid_cls else flat.softmax(-1)[:, :-1]
        yield priors, flat, deltas[0].permute(1, 2, 0).reshape(-1, 4)


def _large(settings: ConfigDict, boxes: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """The boxes of more than `min_bbox_size` pixels a side, and what belongs to them."""
    least = settings.get("min_bbox_size", -1)
    if least < 0:
        return boxes, *others
    index = ((boxes[:, 2:] - boxes[:, :2]).amin(1) > least).nonzero().squeeze(1)
    return boxes[index], *(other[index] for other in others)


def _best(scores: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The best scores and where they are, at most so many; all for -1."""
    count = scores.shape[0]
    return scores.topk(torch.sym_min(most, count) if most > 0 else count)


def _sides(images: Tensor) -> Tensor:
    """Width and height of images, (2,)."""
    height, width = images.shape[2:]
    return torch.stack([torch.scalar_tensor(side, dtype=images.dtype) for side in (width, height)])


def _decode(coder: DeltaXYWHBBoxCoder, boxes: Tensor, deltas: Tensor, images: Tensor) -> Tensor:
    """What offsets make of boxes, (n, 4), within the image; see mmdet's `delta2bbox`."""
    deltas = deltas * deltas.new_tensor(coder.stds) + deltas.new_tensor(coder.means)
    extent = boxes[:, 2:] - boxes[:, :2]
    centre = (boxes[:, :2] + boxes[:, 2:]) * 0.5 + extent * deltas[:, :2]
    half = extent * deltas[:, 2:].clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp() * 0.5
    sides = _sides(images)
    corners = [torch.minimum((centre + way * half).clamp(min=0), sides) for way in (-1, 1)]
    return torch.cat(corners, dim=1)


def _suppress(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    settings: ConfigDict,
    images: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """NMS among boxes of one label, and the best of what is left, best first."""
    # As mmcv does: labels are moved apart, so that one NMS serves them all.
    apart = labels.to(boxes.dtype) * (_sides(images).amax(0) + 1)
    keep = torchvision.ops.nms(boxes + apart[:, None], scores, settings.nms.iou_threshold)
    keep = keep[: settings.max_per_img]
    return boxes[keep], scores[keep], labels[keep]


def _roi_features(extractor: nn.Module, features: tuple[Tensor, ...], boxes: Tensor) -> Tensor:
    """Features of boxes, (n, C, height, width), each from the level that fits its size.

    Every level samples all boxes, but those of others as empty ones, which costs nothing: no shape
    depends on how many a level has.
    """
    features = features[: extractor.num_inputs]
    rois = torch.cat([torch.zeros_like(boxes[:, :1]), boxes], dim=1)
    levels = extractor.map_roi_levels(rois, len(features))
    total = None
    for level, (layer, x) in enumerate(zip(extractor.roi_layers, features, strict=True)):
        own = (levels == level)[:, None]
        found = torchvision.ops.roi_align(
            x,
            rois * own,
            layer.output_size,
            layer.spatial_scale,
            layer.sampling_ratio,
            layer.aligned,
        )
        found = torch.where(own[:, :, None, None], found, 0.0)
        total = found if total is None else total + found
    return total
