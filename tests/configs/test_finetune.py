"""Fine-tuning: a copy of each config trains on a user's folders, from weights of other classes."""

import json
import shutil
import uuid

import numpy as np
import pytest
import torch
from PIL import Image
from zoo import PROJECT, build, each_step, load, shrink

from mmvmamba.engine import cli
from mmvmamba.models.checkpoint import CheckpointError

CONFIGS = PROJECT / "configs"
# Config -> the config of the weights that it starts from.
SOURCES = {
    "vmamba-tiny-s1l8_1xb64-finetune_images": "vmamba/vmamba-tiny-s1l8_8xb128_in1k.py",
    "faster-rcnn_vmamba-tiny-s1l8_1xb4-finetune_boxes": (
        "mask_rcnn/mask-rcnn_vmamba-tiny-s1l8_fpn_ms-crop-3x_coco.py"
    ),
    "upernet_vmamba-tiny-s1l8_1xb4-finetune_masks": (
        "upernet/upernet_vmamba-tiny-s1l8_4xb4-160k_ade20k-512x512.py"
    ),
}


def images(sample_data, folder):
    """Folders of images by class."""
    source = sample_data / "imagenet"
    classes = sorted(path.name for path in (source / "train").iterdir())[:2]
    for split in ("train", "val"):
        for name in classes:
            shutil.copytree(source / split / name, folder / split / name)
    return classes


def boxes(sample_data, folder):
    """Images and annotations in COCO's format."""
    source = sample_data / "coco"
    (folder / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        shutil.copytree(source / f"{split}2017", folder / split)
        annotations = source / f"annotations/instances_{split}2017.json"
        shutil.copy(annotations, folder / f"annotations/{split}.json")
    return [category["name"] for category in json.loads(annotations.read_text())["categories"]]


def masks(sample_data, folder):
    """Folders of images and masks."""
    source = sample_data / "ADEChallengeData2016"
    for split, theirs in (("train", "training"), ("val", "validation")):
        shutil.copytree(source / "images" / theirs, folder / "images" / split)
        (folder / "masks" / split).mkdir(parents=True)
        for path in (source / "annotations" / theirs).iterdir():
            labels = np.asarray(Image.open(path)) % 3
            Image.fromarray(labels.astype(np.uint8)).save(folder / "masks" / split / path.name)
    return ["one", "two", "three"]


DATA = dict(zip(SOURCES, (images, boxes, masks), strict=True))


@pytest.fixture(params=SOURCES)
def task(request, sample_data, tmp_path):
    """A user's data, their copy of a config, shrunk, and a checkpoint with other classes."""
    name = request.param
    classes = DATA[name](sample_data, tmp_path / "data")
    lines = (CONFIGS / "finetune" / f"{name}.py").read_text().splitlines()
    edits = {"data_root": f"{tmp_path / 'data'}/", "classes": classes}
    for key, value in edits.items():
        (line,) = [i for i, text in enumerate(lines) if text.startswith(f"{key} = ")]
        # The lines to edit stand together at the top.
        assert line < 10
        lines[line] = f"{key} = {value!r}"
    mine = tmp_path / "mine.py"
    mine.write_text("\n".join(lines))

    weights = tmp_path / "official.pth"
    torch.save(build(shrink(load(CONFIGS / SOURCES[name]))).state_dict(), weights)
    arguments = [str(mine), "--work-dir", str(tmp_path / "out"), "--cfg-options"]
    arguments += [f"experiment_name={uuid.uuid4().hex}", f"load_from={weights}"]
    return arguments, len(classes)


def tiny(cfg):
    """A config that trains for two steps on small images."""
    shrink(cfg)
    each_step(cfg.optim_wrapper)
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.update(batch_size=2, num_workers=0, persistent_workers=False)
        for step in loader.dataset.pipeline:
            if step["type"] in ("Resize", "RandomResize"):
                step.scale = (64, 64)
            elif step["type"] == "RandomCrop":
                step.crop_size = (64, 64)
    if "max_epochs" in cfg.train_cfg:
        cfg.train_cfg.max_epochs = 1
    else:
        cfg.train_cfg.update(max_iters=2, val_interval=2)
        cfg.default_hooks.checkpoint.interval = 2
    return cfg


def test_a_copy_trains_on_a_users_data_from_official_weights(task, tmp_path):
    arguments, classes = task
    cfg = tiny(cli.train_config(cli.parse_train_arguments(arguments)))
    assert cfg.auto_scale_lr.enable
    rate = cfg.optim_wrapper.optimizer.lr
    runner = cli.build_runner(cfg)
    runner.train()
    # Two images a step, on one process.
    expected = pytest.approx(rate * 2 / cfg.auto_scale_lr.base_batch_size)
    groups = runner.optim_wrapper.optimizer.param_groups
    assert sorted({group["initial_lr"] for group in groups}) == [expected]
    (checkpoint,) = [p for p in (tmp_path / "out").glob("*.pth") if not p.stem.startswith("best")]
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    outputs = [v for k, v in state.items() if k.endswith(("head.head.bias", "conv_seg.bias"))]
    outputs += [v[:-1] for k, v in state.items() if k.endswith("fc_cls.bias")]
    assert outputs
    assert all(len(bias) == classes for bias in outputs)


def test_a_test_takes_all_of_a_checkpoint(task, tmp_path):
    """What may differ when fine-tuning begins may not when its result is tested."""
    arguments, _ = task
    weights = arguments[-1].removeprefix("load_from=")
    cfg = tiny(cli.test_config(cli.parse_test_arguments([arguments[0], weights, *arguments[1:3]])))
    with pytest.raises(CheckpointError, match="does not fit the model"):
        cli.build_runner(cfg).test()
