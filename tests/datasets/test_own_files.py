"""What a user's files lack or hold: filled in, counted, or refused with the file and the remedy."""

import shutil
from pathlib import Path

import pytest
from mmengine.registry import init_default_scope

pytest.importorskip("mmdet", reason="own data are those of three tasks")
pytest.importorskip("mmseg", reason="own data are those of three tasks")
pytest.importorskip("mmpretrain", reason="own data are those of three tasks")

from own_data import (
    MAKE,
    NAMES,
    SIZE,
    boxes,
    each_kind,
    each_task,
    images,
    line_of,
    loaders_refused,
    masks,
    perfect,
    refused,
    some_of_each,
    started,
    training,
    wrapped,
)

from mmvmamba.engine import cli
from mmvmamba.engine.coco_file import complete, has_outline
from mmvmamba.engine.data_checks import build_dataloader
from mmvmamba.engine.errors import UsageError

pytestmark = pytest.mark.usefixtures("quick_configs")


def without(*keys):
    def edit(content, split):
        for annotation in content["annotations"]:
            for key in keys:
                del annotation[key]

    return edit


# 3. Classes that never occur.


@pytest.mark.parametrize(
    ("task", "kind", "wrapper"),
    [
        *((task, "finetune", "") for task in MAKE),
        *((task, "upstream", "ConcatDataset") for task in MAKE),
        ("mmdet", "finetune", "MultiImageMixDataset"),
        ("mmseg", "upstream", "MultiImageMixDataset"),
        ("mmpretrain", "finetune", "RepeatDataset"),
        ("mmpretrain", "upstream", "ClassBalancedDataset"),
    ],
)
def test_a_class_that_never_occurs_is_named(task, kind, wrapper, tmp_path):
    if task == "mmdet":
        boxes(tmp_path / "data", lambda c, s: [a.update(category_id=1) for a in c["annotations"]])
    elif task == "mmseg":
        masks(tmp_path / "data", (0, 0, 1))
    else:
        images(tmp_path / "data")
        for path in (tmp_path / "data").rglob("horse/*"):
            path.unlink()
    cfg = training(tmp_path, task, kind, f"{tmp_path}/data/")
    wrapped(cfg.train_dataloader, wrapper)
    log = started(cfg)
    for split in ("train", "val"):
        line = line_of(log, f"{split}: ", "Classes that never occur")
        assert "WARNING" in line
        assert "'horse'" in line
        assert "'cat'" not in line


@each_kind
def test_maps_of_0_and_255_are_explained(kind, tmp_path):
    masks(tmp_path / "data", (0, 255))
    log = started(training(tmp_path, "mmseg", kind, f"{tmp_path}/data/", ("none", "road")))
    line = line_of(log, "train: pixels per class")
    assert f"none {4 * SIZE * (SIZE // 2 + 1)}, road 0. Classes that never occur: 'road'" in line
    assert "0 and 255 alone, and 255 stands for no class: write 1" in line


@each_kind
def test_a_reduced_zero_label_is_explained(kind, tmp_path):
    masks(tmp_path / "data")
    cfg = training(tmp_path, "mmseg", kind, f"{tmp_path}/data/")
    cfg.train_dataloader.dataset.reduce_zero_label = True
    for step in cfg.train_dataloader.dataset.pipeline:
        if step["type"] == "LoadAnnotations":
            step["reduce_zero_label"] = True
    line = line_of(started(cfg), "train: pixels per class")
    assert "Classes that never occur: 'horse'" in line
    assert "reduce_zero_label=True takes 0 for no class" in line


def test_a_palettes_numbers_are_explained(tmp_path):
    masks(tmp_path / "data", (0, 1), mode="P")
    log = started(training(tmp_path, "mmseg", "finetune", f"{tmp_path}/data/"))
    assert "with a palette, whose colours' numbers are the labels: 0, 1" in log
    masks(tmp_path / "data2", (0, 77), mode="P")
    refused(
        training(tmp_path / "data2", "mmseg", "finetune", f"{tmp_path}/data2/"),
        r"labels 77\. There are 3 classes.*It is a picture with a palette",
    )


def test_counting_ends_in_time(tmp_path, monkeypatch):
    monkeypatch.setattr("mmvmamba.engine.class_counts.MOST_SECONDS", 0)
    masks(tmp_path / "data")
    log = started(training(tmp_path, "mmseg", "upstream", f"{tmp_path}/data/"))
    assert "per class in 1 of 4 images, drawn at random" in line_of(log, "train: pixels")


# 4. Wrong metrics.


def first_id(first):
    def edit(content, split):
        for number, annotation in enumerate(content["annotations"]):
            annotation["id"] = first + number

    return edit


@pytest.mark.parametrize(
    "edit", [first_id(0), first_id(-3), without("id")], ids=["from 0", "below 0", "none"]
)
@each_kind
def test_perfect_predictions_are_perfect_whatever_the_ids(kind, edit, tmp_path):
    boxes(tmp_path / "data", edit)
    cfg = training(tmp_path, "mmdet", kind, f"{tmp_path}/data/")
    assert perfect(cfg)["coco/bbox_mAP"] == 1.0


@each_kind
def test_ids_that_are_twice_are_refused(kind, tmp_path):
    def edit(content, split):
        content["annotations"][4]["id"] = content["annotations"][2]["id"]

    boxes(tmp_path / "data", edit)
    cfg = training(tmp_path, "mmdet", kind, f"{tmp_path}/data/")
    loaders_refused(cfg, r"train\.json: 2 of its annotations have the id 3")


@each_kind
def test_the_evaluator_reads_the_data_sets_file(kind, tmp_path):
    boxes(tmp_path / "data")
    annotations = tmp_path / "data/annotations"
    cfg = training(tmp_path, "mmdet", kind, f"{tmp_path}/data/")
    cfg.val_evaluator = {**cfg.val_evaluator, "ann_file": str(annotations / "train.json")}
    message = refused(cfg, "val_evaluator.ann_file is not the val data set's file")
    assert f"evaluator: {annotations}/train.json\n  data set: {annotations}/val.json" in message


def test_other_forms_of_the_same_file_are_taken(tmp_path, monkeypatch):
    boxes(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "link").symlink_to(tmp_path / "data")
    shutil.copy("data/annotations/val.json", "copy.json")
    names = ("~/data/annotations/val.json", "./data/../link/annotations/val.json", "copy.json")
    for number, name in enumerate(names):
        folder = tmp_path / str(number)
        folder.mkdir()
        more = f"\nval_evaluator = test_evaluator = dict(ann_file={name!r})\n"
        started(training(folder, "mmdet", "upstream", "data/", more=more))


def test_a_data_set_of_fewer_images_than_the_evaluators_is_noticed(tmp_path):
    boxes(tmp_path / "data")
    cfg = training(tmp_path, "mmdet", "finetune", f"{tmp_path}/data/")
    cfg.val_dataloader.dataset.indices = 1
    line_of(started(cfg), "WARNING", "the val data set gives 1 images, val_evaluator counts all 2")


# 6. A training without a step.


@some_of_each
def test_a_training_without_a_step_is_refused(task, kind, tmp_path):
    MAKE[task](tmp_path / "data")
    cfg = training(tmp_path, task, kind, f"{tmp_path}/data/")
    loader = cfg.train_dataloader
    loader.update(drop_last=True, batch_size=20)
    loader.sampler = {"type": "DefaultSampler", "shuffle": True}
    if "batch_sampler" in loader:
        loader.batch_sampler = {**loader.batch_sampler, "drop_last": True}
    number = 12 if task == "mmpretrain" else 4
    message = refused(cfg, "would not take one step")
    assert f"has {number} images, train_dataloader.batch_size is 20" in message


# 7. Files that lack something.


@each_kind
def test_what_has_a_default_is_filled_in_and_counted(kind, tmp_path):
    boxes(tmp_path / "data", without("iscrowd", "area", "segmentation"))
    cfg = training(tmp_path, "mmdet", kind, f"{tmp_path}/data/")
    log = started(cfg)
    for split, count in (("train", 12), ("val", 6)):
        line = line_of(log, f"annotations/{split}.json", "are used")
        assert f"filled in: {count} iscrowd, as 0, {count} area, of the mask or the box" in line
    assert perfect(cfg)["coco/bbox_mAP"] == 1.0


def test_areas_are_those_of_pycocotools():
    from pycocotools import mask as mask_api

    triangle = [10.0, 10.0, 50.0, 10.0, 10.0, 50.0]
    square = [
        [0.0, 0.0, 8.0, 0.0, 8.0, 8.0, 0.0, 8.0],
        [20.0, 20.0, 28.0, 20.0, 28.0, 28.0, 20.0, 28.0],
    ]
    runs = mask_api.frPyObjects([triangle], SIZE, SIZE)[0]
    compressed = {"size": runs["size"], "counts": runs["counts"].decode()}
    boxed = {"bbox": [0, 0, 5, 4]}
    annotations = [
        {**boxed, "segmentation": [triangle]},
        {**boxed, "segmentation": square},
        {**boxed, "segmentation": compressed},
        {**boxed, "segmentation": {"size": [2, 3], "counts": [1, 2, 1, 2]}},
        {**boxed, "segmentation": []},
        {**boxed, "segmentation": [[1.0, 1.0, 2.0, 2.0]]},
    ]
    complete({"annotations": annotations})
    areas = [annotation["area"] for annotation in annotations]
    assert areas == [800.0, 128.0, mask_api.area(runs), 4, 20, 20]
    assert [annotation["id"] for annotation in annotations] == [1, 2, 3, 4, 5, 6]


def mask_rcnn(cfg):
    """Turns a Faster R-CNN into a Mask R-CNN."""
    roi_head = cfg.model.roi_head
    roi_head.type = "StandardRoIHead"
    align = {"type": "RoIAlign", "output_size": 14, "sampling_ratio": 0}
    roi_head.mask_roi_extractor = {
        "type": "SingleRoIExtractor",
        "roi_layer": align,
        "out_channels": 32,
        "featmap_strides": [4, 8, 16, 32],
    }
    loss = {"type": "CrossEntropyLoss", "use_mask": True, "loss_weight": 1.0}
    roi_head.mask_head = {"type": "FCNMaskHead", "num_convs": 1, "in_channels": 32}
    roi_head.mask_head.update(conv_out_channels=32, num_classes=3, loss_mask=loss)
    cfg.model.train_cfg.rcnn.mask_size = 28
    cfg.model.test_cfg.rcnn.mask_thr_binary = 0.5
    for step in cfg.train_dataloader.dataset.pipeline:
        if step["type"] == "LoadAnnotations":
            step["with_mask"] = True
    return cfg


@pytest.mark.parametrize("mask", ["missing", [], [[]], None], ids=str)
def test_objects_without_masks_among_others_are_ignored_and_counted(mask, tmp_path):
    def edit(content, split):
        for annotation in content["annotations"][::3] if split == "train" else ():
            if mask == "missing":
                del annotation["segmentation"]
            else:
                annotation["segmentation"] = mask

    boxes(tmp_path / "data", edit)
    cfg = mask_rcnn(training(tmp_path, "mmdet", "finetune", f"{tmp_path}/data/"))
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    runner = cli.build_runner(cfg)
    runner.train()
    (path,) = (tmp_path / "out").rglob("*.log")
    line = line_of(path.read_text(), "objects are used")
    assert "left out: 4 masks without a polygon of three points, as crowds" in line
    assert "WARNING" in line
    samples = [runner.train_dataloader.dataset[index]["data_samples"] for index in range(4)]
    assert sum(len(sample.ignored_instances) for sample in samples) == 4
    assert sum(len(sample.gt_instances) for sample in samples) == 8


def test_an_outline_has_three_points():
    triangle = [0.0, 0.0, 4.0, 0.0, 4.0, 4.0]
    for mask in ([triangle], [triangle, []], {"size": [4, 4], "counts": [16]}):
        assert has_outline({"segmentation": mask})
    for mask in ([], [[]], [triangle[:4]], [triangle[:4], triangle], None):
        assert not has_outline({"segmentation": mask})
    assert not has_outline({})


def test_masks_are_there_where_they_are_learnt_or_evaluated(tmp_path):
    boxes(tmp_path / "data", without("segmentation"))
    cfg = mask_rcnn(training(tmp_path, "mmdet", "finetune", f"{tmp_path}/data/"))
    loaders_refused(cfg, r"none of its 12 objects has a mask of three points.*Faster R-CNN")
    boxes(tmp_path / "other", lambda c, s: s == "val" and c["annotations"][1].pop("segmentation"))
    cfg = mask_rcnn(training(tmp_path / "other", "mmdet", "finetune", f"{tmp_path}/other/"))
    cfg.val_evaluator = {**cfg.val_evaluator, "metric": ["bbox", "segm"]}
    refused(
        cfg,
        r"evaluates masks \(metric='segm'\), and annotation 2 of image 1 has no mask of three",
    )


@each_kind
def test_a_box_that_is_missing_is_named(kind, tmp_path):
    boxes(tmp_path / "data", lambda content, split: content["annotations"][3].pop("bbox"))
    cfg = training(tmp_path, "mmdet", kind, f"{tmp_path}/data/")
    loaders_refused(
        cfg, r"train\.json: annotation 4 of train_1\.png has no bbox: \[x, y, width, height\]"
    )


@each_kind
def test_what_is_left_out_is_counted_by_reason(kind, tmp_path):
    def edit(content, split):
        content["categories"].append({"id": 7, "name": "zebra"})
        changes = (
            {"category_id": 7},
            {"category_id": 7},
            {"category_id": 99},
            {"ignore": 1},
            {"bbox": [500, 5, 9, 9]},
            {"bbox": [5, 5, 0.5, 9]},
            {"image_id": 77},
            {"area": 0},
        )
        for annotation, change in zip(content["annotations"], changes, strict=False):
            annotation.update(change)

    boxes(tmp_path / "data", edit)
    log = started(training(tmp_path, "mmdet", kind, f"{tmp_path}/data/"))
    line = line_of(log, "annotations/train.json", "are used")
    for text in (
        "4 of 4 images and 4 of 12 objects are used" if kind == "val" else "of 12 objects are used",
        "2 objects of categories that are not in classes ('zebra')",
        "1 objects whose category_id (99) is none of the file's categories",
        "1 objects marked to be ignored",
        "1 objects outside of their image",
        "1 objects smaller than a pixel",
        "1 objects of no listed image",
        "1 objects without an area",
    ):
        assert text in line


# 8. Paths.


@each_task
@each_kind
def test_paths_are_joined_and_home_is_expanded(task, kind, tmp_path, monkeypatch):
    """Without the last slash, which configs of detectors add to the evaluator's file."""
    MAKE[task](tmp_path / "data")
    monkeypatch.setenv("HOME", str(tmp_path))
    cfg = training(tmp_path, task, kind, "~/data", more="\n")
    log = started(cfg)
    assert f"{tmp_path}/data" in log
    if task == "mmdet":
        assert Path(cfg.val_evaluator.ann_file) == tmp_path / "data/annotations/val.json"


def test_a_loader_alone_expands_home_too(tmp_path, monkeypatch):
    boxes(tmp_path / "data")
    monkeypatch.setenv("HOME", str(tmp_path))
    cfg = training(tmp_path, "mmdet", "upstream", f"{tmp_path}/data")
    init_default_scope("mmdet")
    wrapped(cfg.val_dataloader, "ConcatDataset")
    cfg.val_dataloader.dataset.datasets[0].data_root = "~/data"
    assert len(build_dataloader(cfg.val_dataloader).dataset) == 2


def test_an_evaluators_file_that_is_missing_is_named(tmp_path):
    boxes(tmp_path / "data")
    more = "val_evaluator = dict(ann_file='elsewhere/val.json')"
    with pytest.raises(UsageError, match=r"val evaluator's file is not there: elsewhere/val\.json"):
        training(tmp_path, "mmdet", "upstream", f"{tmp_path}/data/", more=more)


def test_a_root_relative_to_the_configs_folder_is_found(tmp_path, monkeypatch):
    boxes(tmp_path / "mine/data")
    monkeypatch.chdir(tmp_path)
    cfg = training(tmp_path / "mine", "mmdet", "finetune", "data", more="\n")
    assert cfg.train_dataloader.dataset.data_root == str(tmp_path / "mine/data")
    assert Path(cfg.val_evaluator.ann_file) == tmp_path / "mine/data/annotations/val.json"


# 10. Single images through batch norm.


@each_kind
def test_single_images_for_batch_norm_are_refused(kind, tmp_path):
    masks(tmp_path / "data", counts=(3, 1))
    cfg = training(tmp_path, "mmseg", kind, f"{tmp_path}/data/")
    cfg.train_dataloader.batch_size = 1
    message = refused(cfg, r"model\.decode_head\.psp_modules\[?.*train_dataloader.batch_size is 1")
    assert "batch_size to 2 or more" in message
    cfg = training(tmp_path, "mmseg", kind, f"{tmp_path}/data/")
    cfg.work_dir += "2"
    cfg.train_dataloader.sampler = {"type": "DefaultSampler", "shuffle": True}
    refused(cfg, r"the last batch of an epoch has one image \(3 images, .*drop_last=True")


def test_single_images_that_cannot_be_foreseen_are_named_in_the_step(tmp_path):
    """Three pixels of a map pooled by a network of one's own."""
    masks(tmp_path / "data")
    cfg = training(tmp_path, "mmseg", "upstream", f"{tmp_path}/data/")
    cfg.model.decode_head = {**cfg.model.decode_head, "pool_scales": (2,)}
    cfg.model.decode_head.update(type="APCHead", pool_scales=(1,), fusion=True)
    cfg.train_dataloader.batch_size = 1
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    with pytest.raises(UsageError, match=r"Expected more than 1 value per channel.*batch_size to"):
        cli.build_runner(cfg).train()


# 11. The best five of two.


@pytest.mark.parametrize("place", ["val_evaluator", "model.head"])
@each_kind
def test_the_best_five_of_two_classes_are_refused(kind, place, tmp_path):
    images(tmp_path / "data", NAMES[:2])
    cfg = training(tmp_path, "mmpretrain", kind, f"{tmp_path}/data/", NAMES[:2])
    cfg.merge_from_dict({f"{place}.topk": (1, 5)})
    cfg.model.head.cal_acc = True
    refused(cfg, rf"{place}\.topk=\(1, 5\) asks for the best 5 of 2 classes")
