"""Every config builds, takes a training step and predicts; the metafiles name what exists."""

from pathlib import Path

import pytest
import torch
import yaml
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData, PixelData

from mmvmamba.registry import MODELS

PROJECT = Path(__file__).resolve().parents[2]
CONFIGS = sorted(p for p in (PROJECT / "configs").rglob("*.py") if "_base_" not in p.parts)
METAFILES = sorted((PROJECT / "configs").rglob("metafile.yml"))
SIZE = 64


def detection_sample():
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks

    boxes = torch.tensor([[4.0, 6.0, 40.0, 50.0], [10.0, 10.0, 60.0, 30.0]])
    masks = torch.zeros(2, SIZE, SIZE, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
        mask[top:bottom, left:right] = 1
    sample = DetDataSample(metainfo=metainfo())
    sample.gt_instances = InstanceData(
        bboxes=boxes,
        labels=torch.tensor([0, 1]),
        masks=BitmapMasks(masks.numpy(), SIZE, SIZE),
    )
    sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0).long())
    return sample


def segmentation_sample():
    from mmseg.structures import SegDataSample

    sample = SegDataSample(metainfo=metainfo())
    sample.gt_sem_seg = PixelData(data=torch.randint(0, 150, (1, SIZE, SIZE)))
    return sample


def classification_sample():
    from mmpretrain.structures import DataSample

    return DataSample(metainfo=metainfo()).set_gt_label(3)


def metainfo():
    shape = (SIZE, SIZE)
    return {
        "img_shape": shape,
        "ori_shape": shape,
        "pad_shape": shape,
        "batch_input_shape": shape,
        "scale_factor": (1.0, 1.0),
        "num_classes": 1000,
    }


SAMPLES = {
    "mmdet": detection_sample,
    "mmseg": segmentation_sample,
    "mmpretrain": classification_sample,
}


def shrunk(path):
    """A config whose backbone has the same channels and one block per stage."""
    cfg = Config.fromfile(path)
    backbone = cfg.model.backbone
    backbone.init_cfg = None
    if isinstance(backbone.arch, str):
        from mmvmamba.models import VMamba

        arch = vars(VMamba.find_arch(backbone.arch)) | {"depths": (1,) * 4}
        backbone.arch = dict(arch)
    return cfg


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_a_training_step_and_a_prediction(path):
    torch.manual_seed(0)
    cfg = shrunk(path)
    init_default_scope(cfg.default_scope)
    if cfg.default_scope == "mmseg":
        from mmengine.model import revert_sync_batchnorm

        # SyncBN needs a GPU.
        model = revert_sync_batchnorm(MODELS.build(cfg.model | {"_scope_": "mmseg"}))
    else:
        model = MODELS.build(cfg.model | {"_scope_": cfg.default_scope})
    optim_wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    sample = SAMPLES[cfg.default_scope]

    def batch():
        images = [torch.randint(0, 256, (3, SIZE, SIZE), dtype=torch.uint8) for _ in range(2)]
        if cfg.default_scope == "mmpretrain":
            # Its loader stacks the images.
            images = torch.stack(images)
        return {"inputs": images, "data_samples": [sample(), sample()]}

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = model.train().train_step(batch(), optim_wrapper)
    assert torch.isfinite(losses["loss"])
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert {"backbone.patch_embed.0.weight", "backbone.layers.3.blocks.0.op.A_logs"} <= changed
    assert len(model.eval().test_step(batch())) == 2


@pytest.mark.parametrize("path", METAFILES, ids=lambda p: p.parent.name)
def test_metafiles_agree_with_the_configs(path):
    meta = yaml.safe_load(path.read_text())
    index = yaml.safe_load((PROJECT / "model-index.yml").read_text())["Import"]
    assert str(path.relative_to(PROJECT)) in index
    for model in meta["Models"]:
        config = PROJECT / model["Config"]
        assert config.stem == model["Name"]
        cfg = Config.fromfile(config)
        for key, value in (
            ("Epochs", cfg.train_cfg.get("max_epochs")),
            ("Iterations", cfg.train_cfg.get("max_iters")),
            ("Batch Size", cfg.auto_scale_lr.base_batch_size),
        ):
            if key in model["Metadata"]:
                assert model["Metadata"][key] == value, (model["Name"], key)


def test_configs_and_metafiles_are_found():
    assert len(CONFIGS) >= 6
    assert len(METAFILES) >= 3
