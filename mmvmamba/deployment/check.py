"""Exported models beside the originals: the same images through both."""

import math
import time
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.evaluator import Evaluator
from mmengine.registry import init_default_scope
from mmengine.structures import BaseDataElement
from torch import Tensor, nn

from mmvmamba.analysis.pictures import items, load_model
from mmvmamba.deployment.runtimes import RUNTIMES, Deployed
from mmvmamba.engine.data import check_datasets
from mmvmamba.engine.data_checks import build_dataset
from mmvmamba.engine.tasks import scope_of
from mmvmamba.models.checkpoint import read_checkpoint


@dataclass(frozen=True)
class Comparison:
    """One image through both.

    Attributes:
        path: The image.
        size: Its height and width as the models take it.
        difference: What differs, in words.
        error: The largest difference: of probabilities, scores and boxes relative to the largest
            of them, of labels and mask pixels their share.
        eager: Seconds of the original.
        deployed: Seconds of the exported model.
    """

    path: Path
    size: tuple[int, int]
    difference: str
    error: float
    eager: float
    deployed: float


def compare(
    cfg: Config, checkpoint: str, deployed: Deployed, images: list[Path]
) -> Iterator[Comparison]:
    """Runs images through OpenMMLab's own test step and through an exported model.

    Args:
        cfg: The config.
        checkpoint: The weights.
        deployed: What was exported of them.
        images: Their files.
    """
    models = _both(cfg, checkpoint, deployed)
    for item, path in zip(items(cfg, None, images, None), images, strict=True):
        size = tuple(item["inputs"].shape[-2:])
        # Results in the pixels that the models see.
        item["data_samples"].set_metainfo({"ori_shape": size, "scale_factor": (1.0, 1.0)})
        timed = []
        for one in models:
            data = pseudo_collate([deepcopy(item)])
            begin = time.perf_counter()
            with torch.no_grad():
                [sample] = one.test_step(data)
            timed.append((sample, time.perf_counter() - begin))
        (ours, eager), (theirs, seconds) = timed
        difference, error = _difference(ours, theirs)
        yield Comparison(path, size, difference, error, eager, seconds)


def evaluate(cfg: Config, checkpoint: str, deployed: Deployed) -> list[dict[str, float]]:
    """The metrics of a config's test data, of the original and of what was exported of it.

    Raises:
        UsageError: If the data set is not there.
    """
    check_datasets(cfg, ("test",))
    models = _both(cfg, checkpoint, deployed)
    dataset = build_dataset(cfg.test_dataloader.dataset)
    evaluators = [Evaluator(deepcopy(cfg.test_evaluator)) for _ in models]
    for index in range(len(dataset)):
        item = dataset[index]
        for model, evaluator in zip(models, evaluators, strict=True):
            evaluator.dataset_meta = dataset.metainfo
            data = pseudo_collate([deepcopy(item)])
            with torch.no_grad():
                samples = model.test_step(data)
            evaluator.process(samples, data)
    return [evaluator.evaluate(len(dataset)) for evaluator in evaluators]


def _both(cfg: Config, checkpoint: str, deployed: Deployed) -> tuple[nn.Module, "StandIn"]:
    init_default_scope(scope_of(cfg))
    settings = (cfg.model.get("test_cfg") or {}).get("rcnn") or {}
    return (
        load_model(cfg, read_checkpoint(checkpoint), checkpoint),
        StandIn(deployed, settings.get("mask_thr_binary", 0.5)),
    )


def runtime_of(deployed: Deployed) -> str:
    """The name of what runs an exported model."""
    return RUNTIMES[deployed.path.suffix]


def _difference(ours: BaseDataElement, theirs: BaseDataElement) -> tuple[str, float]:
    if "pred_score" in ours:
        error = _relative(theirs.pred_score, ours.pred_score)
        return f"probabilities {error:.1e}", error
    if "pred_sem_seg" in ours:
        wrong = (ours.pred_sem_seg.data != theirs.pred_sem_seg.data).float().mean().item()
        return f"{wrong:.4%} of the labels", wrong
    ours, theirs = ours.pred_instances, theirs.pred_instances
    if len(ours) != len(theirs):
        return f"{len(theirs)} boxes for {len(ours)}", 1.0
    if not len(ours):
        return "no box in both", 0.0
    wrong = (ours.labels != theirs.labels).sum().item()
    boxes = (ours.bboxes - theirs.bboxes).abs().max().item()
    error = max(_relative(theirs.scores, ours.scores), _relative(theirs.bboxes, ours.bboxes))
    text = f"{len(ours)} boxes, {boxes:.1e} pixels, boxes and scores {error:.1e}, {wrong} labels"
    if "masks" in ours:
        # Masks of pictures without a box have another type.
        masks = torch.as_tensor(ours.masks)
        pixels = (masks != torch.as_tensor(theirs.masks)).sum().item()
        text += f", {pixels} mask pixels"
        error = max(error, pixels / masks.numel())
    return text, max(error, wrong / len(ours))


def _relative(found: Tensor, expected: Tensor) -> float:
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    # Comparisons with NaN are false: it would pass.
    return math.inf if math.isnan(error) else error


class StandIn(nn.Module):
    """An exported model with the interface of an OpenMMLab model in a test.

    Args:
        deployed: The exported model.
        mask_threshold: From which probability on a pixel is of a mask.
    """

    def __init__(self, deployed: Deployed, mask_threshold: float = 0.5):
        super().__init__()
        self.deployed, self.mask_threshold = deployed, mask_threshold

    def test_step(self, data: dict) -> list[BaseDataElement]:
        """Predicts, as the models of mmengine do, image by image."""
        return [
            self._predict(image, sample)
            for image, sample in zip(data["inputs"], data["data_samples"], strict=True)
        ]

    def _predict(self, image: Tensor, sample: BaseDataElement) -> BaseDataElement:
        pixels = self.deployed.record.pixels(image)
        found = {name: torch.from_numpy(v) for name, v in self.deployed(pixels).items()}
        if "probabilities" in found:
            scores = found["probabilities"][0]
            return sample.set_pred_score(scores).set_pred_label(scores.argmax(0, keepdim=True))
        if "boxes" in found:
            return self._with_instances(sample, found)
        from mmengine.structures import PixelData

        labels = found["labels"]
        if tuple(labels.shape[1:]) != tuple(sample.ori_shape[:2]):
            labels = F.interpolate(labels[None].float(), tuple(sample.ori_shape[:2]))[0].long()
        sample.set_data({"pred_sem_seg": PixelData(data=labels)})
        return sample

    def _with_instances(self, sample: BaseDataElement, found: dict[str, Tensor]):
        from mmengine.structures import InstanceData

        wide, high = sample.scale_factor
        boxes = found["boxes"] / torch.tensor([wide, high, wide, high])
        instances = InstanceData(bboxes=boxes, scores=found["scores"], labels=found["labels"])
        if "masks" in found:
            size = tuple(sample.ori_shape[:2])
            pasted = [
                paste_mask(mask, box, size) >= self.mask_threshold
                for mask, box in zip(found["masks"], boxes, strict=True)
            ]
            instances.masks = torch.stack(pasted) if pasted else torch.zeros(0, *size).bool()
        sample.pred_instances = instances
        return sample


def paste_mask(mask: Tensor, box: Tensor, size: tuple[int, int]) -> Tensor:
    """Lays a mask over an image.

    Args:
        mask: Probabilities within a box, (height, width).
        box: x1, y1, x2, y2 in the image's pixels.
        size: Height and width of the image.

    Returns:
        Probabilities of the image's pixels, (H, W), zero outside of the box.
    """
    x1, y1, x2, y2 = box.tolist()
    rows, columns = (
        (torch.arange(side) + 0.5 - begin) / max(end - begin, np.finfo(np.float32).eps) * 2 - 1
        for side, begin, end in ((size[0], y1, y2), (size[1], x1, x2))
    )
    grid = torch.stack(
        [columns.expand(len(rows), -1), rows[:, None].expand(-1, len(columns))], dim=-1
    )
    return F.grid_sample(mask[None, None], grid[None], align_corners=False)[0, 0]
