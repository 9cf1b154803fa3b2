"""Small models of each task: a config, a checkpoint of random weights, and two pictures."""

from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from PIL import Image
from torch import nn

from mmvmamba.engine.tasks import scope_of

CONFIGS = {
    "classifier": "sample/vmamba-sample_imagenet.py",
    "upernet": "sample/upernet_vmamba-sample_ade20k.py",
    "semantic-fpn": "sem_fpn/fpn_vmamba-tiny-s1l8_4xb4-80k_ade20k-512x512.py",
    "retinanet": "retinanet/retinanet_vmamba-tiny-s1l8_fpn_1x_coco.py",
    "faster-rcnn": "finetune/faster-rcnn_vmamba-tiny-s1l8_1xb4-finetune_boxes.py",
    "mask-rcnn": "sample/mask-rcnn_vmamba-sample_coco.py",
    "cascade-rcnn": "cascade_mask_rcnn/cascade-mask-rcnn_vmamba-tiny-s1l8_fpn_ms-crop-3x_coco.py",
}
"""By name, the config below configs/."""

WIDTH, CLASSES = 8, 5
SIZE = (96, 128)
"""Height and width of the images of files of one size."""


def _options(name: str, stages: int) -> dict:
    """What shrinks a config to so many stages of one block, and its pictures."""
    levels = range(stages)
    channels, strides = [WIDTH * 2**i for i in levels], [4 * 2**i for i in levels]
    pixels = {"test_dataloader.dataset.pipeline.1.scale": (160, 128)}
    given = {
        "model.backbone.arch": {
            "_delete_": True,
            "dims": WIDTH,
            "depths": (1,) * stages,
            "mlp_ratio": 2.0,
        },
        "model.backbone.init_cfg": None,
        "model.backbone.out_indices": tuple(levels),
    }
    if name == "classifier":
        head = {"in_channels": channels[-1], "num_classes": CLASSES}
        return given | {"model.backbone.out_indices": (-1,)} | _below("model.head", head)
    if name in ("upernet", "semantic-fpn"):
        head = {"in_channels": channels, "in_index": list(levels), "channels": WIDTH}
        if name == "upernet":
            auxiliary = {"in_channels": channels[0], "in_index": 0, "channels": WIDTH}
            given |= _below("model.auxiliary_head", auxiliary)
        else:
            given |= _neck(channels, stages) | pixels
            head |= {"in_channels": [WIDTH] * stages, "feature_strides": strides}
        return given | _below("model.decode_head", head)
    # Few boxes, so that no two have a score in common, to the last digits.
    few = {"nms_pre": 100, "max_per_img": 20}
    # Levels that the backbone does not have.
    strides += [strides[-1] * 2] if name != "retinanet" else [strides[-1] * 2, strides[-1] * 4]
    if name == "retinanet":
        head = {"in_channels": WIDTH, "feat_channels": WIDTH, "num_classes": CLASSES}
        return {
            **given,
            **_neck(channels, len(strides)),
            **_below("model.bbox_head", head | {"anchor_generator.strides": strides}),
            **_below("model.test_cfg", few | {"score_thr": 0.0}),
            "model.neck.start_level": 0,
            **pixels,
        }
    roi, region = "model.roi_head", {"in_channels": WIDTH, "feat_channels": WIDTH}
    extractor = {"out_channels": WIDTH, "featmap_strides": strides}
    head = {"in_channels": WIDTH, "fc_out_channels": 16, "num_classes": CLASSES}
    heads = [f".{i}" for i in range(3)] if name == "cascade-rcnn" else [""]
    given |= {
        **_neck(channels, len(strides)),
        **_below("model.rpn_head", region | {"anchor_generator.strides": strides}),
        **_below("model.test_cfg.rpn", few),
        "model.test_cfg.rcnn.max_per_img": 20,
        **_below(f"{roi}.bbox_roi_extractor", extractor),
        **pixels,
    }
    for number in heads:
        given |= _below(f"{roi}.bbox_head{number}", head)
    if name != "faster-rcnn":
        mask = {"in_channels": WIDTH, "conv_out_channels": WIDTH, "num_classes": CLASSES}
        given |= _below(f"{roi}.mask_roi_extractor", extractor)
        given |= _below(f"{roi}.mask_head", mask | {"num_convs": 1})
    return given


def _below(prefix: str, options: dict) -> dict:
    return {f"{prefix}.{name}": value for name, value in options.items()}


def _neck(channels: list[int], outputs: int) -> dict:
    neck = {"in_channels": channels, "out_channels": WIDTH, "num_outs": outputs}
    return _below("model.neck", neck)


def make(name: str, project: Path, folder: Path, stages: int = 2) -> tuple[Config, Path]:
    """The config of a small model, and a checkpoint of random weights in the folder."""
    cfg = Config.fromfile(project / "configs" / CONFIGS[name])
    cfg.merge_from_dict(_options(name, stages))
    init_default_scope(scope_of(cfg))
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    make_results_differ(model)
    path = folder / f"{name}.pth"
    meta = {"dataset_meta": {"classes": [f"class {i}" for i in range(CLASSES)]}}
    torch.save({"state_dict": model.state_dict(), "meta": meta}, path)
    return cfg, path


def make_results_differ(model: nn.Module) -> None:
    """Draws the heads' weights anew: untrained ones give nearly the same everywhere."""
    for part, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and not part.startswith("backbone"):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")


def resize(cfg: Config, size: tuple[int, int]) -> None:
    """Makes a config's pictures of one size."""
    step = {"type": "Resize", "scale": size[::-1], "keep_ratio": False}
    cfg.test_dataloader.dataset.pipeline[1:-1] = [step]


def pictures(folder: Path) -> list[Path]:
    """Two pictures, wide and high."""
    paths = []
    for height, width in ((60, 81), (75, 50)):
        rows, columns = np.mgrid[:height, :width]
        waves = [np.sin(columns / 7), np.cos(rows / 11), np.sin((rows + columns) / 5)]
        noise = np.random.default_rng(height).normal(0, 30, (height, width, 3))
        pixels = (np.stack(waves, -1) * 90 + 128 + noise).clip(0, 255).astype(np.uint8)
        paths.append(folder / f"{height}.png")
        Image.fromarray(pixels).save(paths[-1])
    return paths
