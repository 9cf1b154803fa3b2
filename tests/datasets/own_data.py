"""A user's own tiny data and configs, for all three tasks.

Each task has two configs: a copy of ours in configs/finetune, and one that a user writes from
upstream's bases alone.
"""

import json
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.hooks import Hook
from mmengine.registry import METRICS, init_default_scope
from PIL import Image

from mmvmamba.engine import cli
from mmvmamba.engine.data_checks import build_dataloader
from mmvmamba.engine.errors import DataError, UsageError

PROJECT = Path(__file__).resolve().parents[2]
NAMES = ("cat", "dog", "horse")
# Ids of the categories in the files.
IDS = dict(zip(NAMES, (1, 5, 9), strict=True))
SIZE = 64
FINETUNE = {
    "mmdet": "faster-rcnn_vmamba-tiny-s1l8_1xb4-finetune_boxes.py",
    "mmseg": "upernet_vmamba-tiny-s1l8_1xb4-finetune_masks.py",
    "mmpretrain": "vmamba-tiny-s1l8_1xb64-finetune_images.py",
}
SHRUNK = {
    "mmdet": """
load_from, load_ignore = None, None
model["neck"] = dict(in_channels=[16, 32, 64, 128], out_channels=32)
model["rpn_head"] = dict(in_channels=32, feat_channels=32)
model["roi_head"]["bbox_roi_extractor"] = dict(out_channels=32)
model["roi_head"]["bbox_head"].update(in_channels=32, fc_out_channels=32)
model["test_cfg"] = dict(rcnn=dict(score_thr=0.0))
""",
    "mmseg": """
load_from, load_ignore = None, None
model["data_preprocessor"]["size"] = (64, 64)
model["decode_head"].update(in_channels=[16, 32, 64, 128], channels=16)
model["auxiliary_head"].update(in_channels=64, channels=16)
""",
    "mmpretrain": """
load_from, load_ignore = None, None
model["head"].update(in_channels=128)
""",
}
BACKBONE = "dict(_delete_=True, type='mmvmamba.VMamba', arch=dict(dims=16, depths=(1, 1, 1, 1)))"
UPSTREAM = {
    "mmdet": f"""
_base_ = ["mmdet::_base_/models/retinanet_r50_fpn.py", "mmdet::_base_/datasets/coco_detection.py",
          "mmdet::_base_/schedules/schedule_1x.py", "mmdet::_base_/default_runtime.py"]
classes = CLASSES
model = dict(
    backbone={BACKBONE},
    neck=dict(in_channels=[16, 32, 64, 128], out_channels=32),
    bbox_head=dict(num_classes=len(classes), in_channels=32, feat_channels=32),
)
common = dict(data_root=DATA_ROOT, metainfo=dict(classes=classes))
train_dataloader = dict(
    dataset=dict(ann_file="annotations/train.json", data_prefix=dict(img="train/"), **common))
val_dataloader = dict(
    dataset=dict(ann_file="annotations/val.json", data_prefix=dict(img="val/"), **common))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=DATA_ROOT + "annotations/val.json")
test_evaluator = val_evaluator
""",
    "mmseg": f"""
_base_ = ["mmseg::_base_/models/pspnet_r50-d8.py", "mmseg::_base_/datasets/ade20k.py",
          "mmseg::_base_/schedules/schedule_20k.py", "mmseg::_base_/default_runtime.py"]
classes = CLASSES
model = dict(
    pretrained=None,
    data_preprocessor=dict(size=(64, 64)),
    backbone={BACKBONE},
    decode_head=dict(num_classes=len(classes), in_channels=128, channels=16),
    auxiliary_head=dict(num_classes=len(classes), in_channels=64, channels=16),
)
common = dict(
    _delete_=True, type="BaseSegDataset", data_root=DATA_ROOT, metainfo=dict(classes=classes))
load = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations"), dict(type="PackSegInputs")]
train_dataloader = dict(dataset=dict(
    data_prefix=dict(img_path="images/train", seg_map_path="masks/train"), pipeline=load, **common))
val_dataloader = dict(dataset=dict(
    data_prefix=dict(img_path="images/val", seg_map_path="masks/val"), pipeline=load, **common))
test_dataloader = val_dataloader
""",
    "mmpretrain": f"""
_base_ = ["mmpretrain::_base_/models/resnet18.py", "mmpretrain::_base_/datasets/imagenet_bs32.py",
          "mmpretrain::_base_/schedules/imagenet_bs256.py",
          "mmpretrain::_base_/default_runtime.py"]
classes = CLASSES
model = dict(
    backbone={BACKBONE},
    head=dict(num_classes=len(classes), in_channels=128, topk=(1,)),
)
data_preprocessor = dict(num_classes=len(classes))
common = dict(_delete_=True, type="CustomDataset", data_root=DATA_ROOT, classes=classes)
load = [dict(type="LoadImageFromFile"), dict(type="Resize", scale=32), dict(type="PackInputs")]
train_dataloader = dict(dataset=dict(data_prefix="train", pipeline=load, **common))
val_dataloader = dict(dataset=dict(data_prefix="val", pipeline=load, **common))
test_dataloader = val_dataloader
val_evaluator = dict(topk=(1,))
test_evaluator = val_evaluator
""",
}


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(90, 140, (SIZE, SIZE, 3), dtype=np.uint8)


def save(path: Path, array: np.ndarray, mode: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    if mode == "P":
        image = Image.frombytes("P", image.size, array.tobytes())
        image.putpalette([value for number in range(256) for value in (number, 0, 255 - number)])
    image.save(path)


def boxes(
    root: Path,
    edit: Callable[[dict, str], None] = lambda content, split: None,
    counts: tuple[int, int] = (4, 2),
) -> None:
    """COCO files of images with a box and a mask of each category, in the order of `NAMES`."""
    for split, count in zip(("train", "val"), counts, strict=True):
        images, annotations = [], []
        for index in range(count):
            name = f"{split}_{index}.png"
            save(root / split / name, picture(index))
            images.append({"id": index + 1, "file_name": name, "height": SIZE, "width": SIZE})
            for place, category in enumerate(IDS.values()):
                x, y, side = 20 * place, 10 + 5 * index, 18
                polygon = [x, y, x + side, y, x + side, y + side, x, y + side]
                annotations.append(
                    {"id": len(annotations) + 1, "image_id": index + 1, "category_id": category}
                    | {"bbox": [x, y, side, side], "area": side**2, "iscrowd": 0}
                    | {"segmentation": [polygon]}
                )
        categories = [{"id": number, "name": name} for name, number in IDS.items()]
        content = {"images": images, "annotations": annotations, "categories": categories}
        edit(content, split)
        path = root / "annotations" / f"{split}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))


def masks(
    root: Path,
    values: tuple[int, ...] = (0, 1, 2),
    mode: str | None = None,
    counts: tuple[int, int] = (4, 2),
) -> None:
    """Images and maps, in stripes of the values."""
    for split, count in zip(("train", "val"), counts, strict=True):
        for index in range(count):
            save(root / "images" / split / f"{index}.jpg", picture(index))
            labels = np.repeat(values, SIZE // len(values) + 1)[:SIZE].astype(np.uint8)
            save(root / "masks" / split / f"{index}.png", np.tile(labels, (SIZE, 1)), mode)


def images(root: Path, names: tuple[str, ...] = NAMES, counts: tuple[int, int] = (4, 2)) -> None:
    """Folders of images by class."""
    for split, count in zip(("train", "val"), counts, strict=True):
        for name in names:
            for index in range(count):
                save(root / split / name / f"{index}.jpg", picture(index))


MAKE = {"mmdet": boxes, "mmseg": masks, "mmpretrain": images}


def write_config(
    folder: Path, task: str, kind: str, root: str, classes=NAMES, more: str = ""
) -> Path:
    """Writes a user's config.

    Args:
        folder: Where it is written.
        task: 'mmdet', 'mmseg' or 'mmpretrain'.
        kind: 'finetune' or 'upstream'.
        root: The data root, as the user writes it.
        classes: The classes.
        more: What the user adds at the end.
    """
    if kind == "finetune":
        values = {"data_root": root, "classes": classes, "max_epochs": 1, "max_iters": 1}
        lines = (PROJECT / "configs/finetune" / FINETUNE[task]).read_text().splitlines()
        for number, line in enumerate(lines):
            key = line.partition(" = ")[0]
            if key in values:
                lines[number] = f"{key} = {values[key]!r}"
        tiny = "dict(_delete_=True, dims=16, depths=(1, 1, 1, 1))"
        backbone = f"\nmodel.setdefault('backbone', dict()).update(arch={tiny})\n"
        text = "\n".join(lines) + backbone + SHRUNK[task]
    else:
        text = UPSTREAM[task].replace("CLASSES", repr(classes)).replace("DATA_ROOT", repr(root))
    path = folder / f"{kind}_{task}.py"
    path.write_text(text + more)
    return path


def options(work_dir: Path) -> list[str]:
    """What makes a training one step long and gives it a name of its own."""
    name = uuid.uuid4().hex
    loaders = [
        f"{split}_dataloader.{key}"
        for split in ("train", "val", "test")
        for key in ("num_workers=0", "persistent_workers=False")
    ]
    return [
        *("--work-dir", str(work_dir), "--cfg-options", "train_dataloader.batch_size=2"),
        *(f"experiment_name={name}", f"visualizer.name={name}", *loaders),
    ]


def shorten(cfg: Config) -> Config:
    """Makes a config's training one epoch or step of small images."""
    for split in ("train", "val", "test"):
        for step in cfg[f"{split}_dataloader"].dataset.get("pipeline", ()):
            if step["type"] in ("Resize", "RandomResize"):
                step["scale"] = (SIZE, SIZE)
            elif step["type"] == "RandomCrop":
                step["crop_size"] = (SIZE, SIZE)
    # Warm-ups of 500 steps do not fit.
    cfg.param_scheduler = None
    if cfg.train_cfg.get("max_iters"):
        cfg.train_cfg.update(max_iters=1, val_interval=1)
    else:
        cfg.train_cfg.update(max_epochs=1)
    return cfg


def training(
    folder: Path, task: str, kind: str, root: str, classes=NAMES, more: str | None = None
) -> Config:
    """The config that `tools/train.py` runs, shortened.

    Args:
        folder: Where config and results are written.
        task: See `write_config`.
        kind: See `write_config`.
        root: The data root.
        classes: The classes.
        more: What the user adds to the config, which then has the root in it as it is written.
            Otherwise `--data-root` says where the data are, and one config serves many tests.
    """
    written = "data/own/" if more is None else root
    config = write_config(folder, task, kind, written, classes, more or "")
    moved = ["--data-root", root] if more is None else []
    arguments = [str(config), *moved, *options(folder / "out")]
    return shorten(cli.train_config(cli.parse_train_arguments(arguments)))


TASKS = tuple(MAKE)
KINDS = ("finetune", "upstream")
each_kind = pytest.mark.parametrize("kind", KINDS)
each_task = pytest.mark.parametrize("task", TASKS)
# Where the three tasks share a check and the configs differ in little.
some_of_each = pytest.mark.parametrize(
    ("task", "kind"),
    [("mmdet", "finetune"), ("mmseg", "upstream"), ("mmpretrain", "finetune")],
)


class StartedError(Exception):
    """Nothing was refused."""


class StopBeforeTheFirstStep(Hook):
    def before_train(self, runner):
        raise StartedError


def started(cfg) -> str:
    """The log of a training that is stopped when its first step would begin."""
    runner = cli.build_runner(cfg)
    runner.register_hook(StopBeforeTheFirstStep())
    with pytest.raises(StartedError):
        runner.train()
    (path,) = Path(cfg.work_dir).rglob("*.log")
    return path.read_text()


def refused(cfg, match: str) -> str:
    """What refuses a training before its first step."""
    runner = cli.build_runner(cfg)
    runner.register_hook(StopBeforeTheFirstStep())
    with pytest.raises(UsageError, match=match) as error:
        runner.train()
    return str(error.value)


def _both_loaders(cfg):
    build_dataloader(cfg.train_dataloader, training=True)
    build_dataloader(cfg.val_dataloader)


def loaders_refused(cfg, match: str) -> str:
    """What refuses the data of a training, whatever its model."""
    init_default_scope(cfg.default_scope)
    with pytest.raises(DataError, match=match) as error:
        _ = [
            build_dataloader(cfg.train_dataloader, training=True),
            build_dataloader(cfg.val_dataloader),
        ]
    return str(error.value)


def line_of(log: str, *texts: str) -> str:
    """The one line of a log that has all of the texts."""
    (line,) = [line for line in log.splitlines() if all(text in line for text in texts)]
    return line


def wrapped(loader: ConfigDict, wrapper: str) -> None:
    inner = loader.dataset
    if wrapper == "ConcatDataset":
        inner = {"type": wrapper, "datasets": [inner]}
    elif wrapper == "MultiImageMixDataset":
        inner = {"type": wrapper, "dataset": inner, "pipeline": []}
    elif wrapper:
        more = {"times": 2} if wrapper == "RepeatDataset" else {"oversample_thr": 0.1}
        inner = {"type": wrapper, "dataset": inner, **more}
    loader.dataset = inner


def perfect(cfg, names=NAMES, wrong=()) -> dict:
    """The metrics of predictions that are the annotations, by the config's evaluator.

    Args:
        cfg: The config.
        names: The classes.
        wrong: Names whose objects are not predicted.
    """
    init_default_scope("mmdet")
    dataset = build_dataloader(cfg.val_dataloader).dataset
    metric = METRICS.build(cfg.val_evaluator)
    metric.dataset_meta = dataset.metainfo
    for index in range(len(dataset)):
        info = dataset.get_data_info(index)
        objects = [o for o in info["instances"] if names[o["bbox_label"]] not in wrong]
        predicted = {
            "bboxes": torch.tensor([o["bbox"] for o in objects]).float(),
            "scores": torch.ones(len(objects)),
            "labels": torch.tensor([o["bbox_label"] for o in objects]),
        }
        sample = {"img_id": info["img_id"], "ori_shape": (SIZE, SIZE), "pred_instances": predicted}
        metric.process({}, [sample])
    return metric.evaluate(len(dataset))
