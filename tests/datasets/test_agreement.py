"""Config, data, model and metrics agree before the first step, or one message says what does not.

Every check is tried on a copy of our finetune configs and on configs from upstream's bases alone.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
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
    loaders_refused,
    perfect,
    refused,
    some_of_each,
    started,
    training,
    wrapped,
)

from mmvmamba.engine import cli
from mmvmamba.engine.data_checks import base_datasets, build_dataloader, build_dataset
from mmvmamba.engine.errors import DataError, UsageError

pytestmark = pytest.mark.usefixtures("quick_configs")


@each_task
@each_kind
def test_what_agrees_starts_and_counts(task, kind, tmp_path):
    MAKE[task](tmp_path / "data")
    log = started(training(tmp_path, task, kind, f"{tmp_path}/data/"))
    for split, count in (("train", 4), ("val", 2)):
        (line,) = [
            line for line in log.splitlines() if f"{split}: " in line and "per class" in line
        ]
        if task == "mmseg":
            assert f"pixels per class: cat {22 * SIZE * count}, dog {22 * SIZE * count}" in line
        else:
            assert f"per class: cat {count}, dog {count}, horse {count}" in line
        assert "never occur" not in line


# 1. Labels by name.


def told(dataset) -> set[tuple[int, str]]:
    """The columns of the boxes, and the names that the model is told: `boxes` draws one each."""
    (base,) = base_datasets(dataset)
    names = base.metainfo["classes"]
    return {
        (int(one["bbox"][0]) // 20, names[one["bbox_label"]])
        for index in range(len(base))
        for one in base.get_data_info(index)["instances"]
    }


def in_order(train: tuple[int, ...], val: tuple[int, ...]):
    def edit(content, split):
        order = train if split == "train" else val
        content["categories"] = [content["categories"][i] for i in order]

    return edit


@pytest.mark.parametrize("wrapper", ["", "ConcatDataset", "RepeatDataset", "ClassBalancedDataset"])
@each_kind
def test_coco_labels_are_by_name(kind, wrapper, tmp_path):
    boxes(tmp_path / "data", in_order((2, 0, 1), (1, 2, 0)))
    cfg = training(tmp_path, "mmdet", kind, f"{tmp_path}/data/")
    init_default_scope("mmdet")
    for split in ("train", "val"):
        wrapped(cfg[f"{split}_dataloader"], wrapper)
        loader = build_dataloader(cfg[f"{split}_dataloader"], training=split == "train")
        assert told(loader.dataset) == {(0, "cat"), (1, "dog"), (2, "horse")}


@each_kind
def test_metrics_are_by_name(kind, tmp_path):
    """The ids of the categories fall where `classes` rises, and pycocotools sorts them."""
    boxes(tmp_path / "data", in_order((0, 1, 2), (2, 0, 1)))
    cfg = training(tmp_path, "mmdet", kind, f"{tmp_path}/data/", classes=("horse", "dog", "cat"))
    cfg.val_evaluator.classwise = True
    found = perfect(cfg, ("horse", "dog", "cat"), wrong=("cat",))
    assert found["coco/bbox_mAP"] == pytest.approx(2 / 3, abs=1e-3)
    assert [found[f"coco/{name}_precision"] for name in NAMES] == [0.0, 1.0, 1.0]


@each_kind
def test_a_name_that_the_file_does_not_have_is_named(kind, tmp_path):
    boxes(tmp_path / "data")
    cfg = training(tmp_path, "mmdet", kind, f"{tmp_path}/data/", ("cat", "Dog", "horse"))
    message = loaders_refused(cfg, r"has no category 'Dog' \(did you mean 'dog'\?\)")
    assert "annotations/train.json" in message
    assert "Its categories: 'cat', 'dog', 'horse'; the config's classes: 'cat', 'Dog'" in message


def test_a_file_of_some_of_cocos_classes_is_taken(tmp_path):
    """Whose config gives none: the names are upstream's eighty, of which a file may list a few."""
    boxes(tmp_path / "data", in_order((2, 0, 1), (1, 2, 0)))
    cfg = training(tmp_path, "mmdet", "upstream", f"{tmp_path}/data/")
    init_default_scope("mmdet")
    del cfg.val_dataloader.dataset["metainfo"]
    dataset = build_dataloader(cfg.val_dataloader).dataset
    assert told(dataset) == {(0, "cat"), (1, "dog"), (2, "horse")}
    cfg.val_evaluator.classwise = True
    found = perfect(cfg, dataset.metainfo["classes"], wrong=("dog",))
    assert found["coco/bbox_mAP"] == pytest.approx(2 / 3, abs=1e-3)
    assert [found[f"coco/{name}_precision"] for name in NAMES] == [1.0, 0.0, 1.0]
    boxes(tmp_path / "data", lambda c, s: [o.update(name=o["name"] + "2") for o in c["categories"]])
    with pytest.raises(DataError, match=r"val\.json: the file has no category 'person', .*'cat2'"):
        build_dataloader(cfg.val_dataloader)


def test_categories_of_one_name_are_refused(tmp_path):
    def edit(content, split):
        content["categories"].append({"id": 77, "name": "dog"})

    boxes(tmp_path / "data", edit)
    cfg = training(tmp_path, "mmdet", "finetune", f"{tmp_path}/data/")
    loaders_refused(cfg, "more than one category named 'dog'")


def labels_of_folders(dataset) -> set[tuple[str, str]]:
    (base,) = base_datasets(dataset)
    infos = (base.get_data_info(index) for index in range(len(base)))
    return {(Path(i["img_path"]).parent.name, base.CLASSES[i["gt_label"]]) for i in infos}


@pytest.mark.parametrize("wrapper", ["", "ConcatDataset", "RepeatDataset", "ClassBalancedDataset"])
@pytest.mark.parametrize("given", [True, False], ids=["classes", "no-classes"])
@each_kind
def test_folders_are_classes_by_name(kind, given, wrapper, tmp_path):
    images(tmp_path / "data")
    for split in ("train", "val"):
        # What a notebook leaves behind, beside the folders and in one of them.
        hidden = tmp_path / "data" / split / ".ipynb_checkpoints"
        shutil.copytree(tmp_path / "data" / split / "cat", hidden)
        shutil.copytree(hidden, tmp_path / "data" / split / "dog/.ipynb_checkpoints")
    cfg = training(tmp_path, "mmpretrain", kind, f"{tmp_path}/data/", ("horse", "cat", "dog"))
    init_default_scope("mmpretrain")
    for split, count in (("train", 4), ("val", 2)):
        loader = cfg[f"{split}_dataloader"]
        if not given:
            del loader.dataset["classes"]
        wrapped(loader, wrapper)
        dataset = build_dataloader(loader, training=split == "train").dataset
        (base,) = base_datasets(dataset)
        assert labels_of_folders(dataset) == {(name, name) for name in NAMES}
        assert (("horse", "cat", "dog") if given else NAMES) == base.CLASSES
        assert len(base) == 3 * count


@each_kind
def test_other_folders_than_classes_are_named(kind, tmp_path):
    images(tmp_path / "data", ("cat", "dogs", "horse", "zebra"))
    cfg = training(tmp_path, "mmpretrain", kind, f"{tmp_path}/data/")
    message = loaders_refused(cfg, r"Classes without a folder: 'dog' \(did you mean 'dogs'\?\)")
    assert "folders of no class: 'dogs', 'zebra'" in message


@each_kind
def test_folders_of_training_and_validation_agree(kind, tmp_path):
    images(tmp_path / "data")
    shutil.move(tmp_path / "data/val/horse", tmp_path / "data/val/ant")
    cfg = training(tmp_path, "mmpretrain", kind, f"{tmp_path}/data/")
    for split in ("train", "val", "test"):
        del cfg[f"{split}_dataloader"].dataset["classes"]
    message = refused(cfg, "the train and the val data set have different classes")
    assert "train: 'cat', 'dog', 'horse'\n  val: 'ant', 'cat', 'dog'" in message
    cfg.accepted_disagreements = ["class_names"]
    cfg.work_dir += "2"
    cfg.experiment_name += "2"
    started(cfg)


@some_of_each
def test_classes_of_the_splits_agree(task, kind, tmp_path):
    """The test's too, which a training does not build."""
    MAKE[task](tmp_path / "data")
    cfg = training(tmp_path, task, kind, f"{tmp_path}/data/")
    cfg.test_dataloader = cfg.test_dataloader.copy()
    for key in ("classes", "metainfo"):
        if key in cfg.test_dataloader.dataset:
            names = ["cat", "horse", "dog"]
            cfg.test_dataloader.dataset[key] = names if key == "classes" else {"classes": names}
    message = refused(cfg, "the train and the test data set have different classes, in another")
    assert "test: 'cat', 'horse', 'dog'" in message


def test_two_training_sets_of_other_classes_are_refused(tmp_path):
    """mmdet's ConcatDataset takes them."""
    boxes(tmp_path / "data")
    cfg = training(tmp_path, "mmdet", "finetune", f"{tmp_path}/data/")
    inner = cfg.train_dataloader.dataset
    other = {**inner, "metainfo": {"classes": ["horse", "dog", "cat"]}}
    cfg.train_dataloader.dataset = {"type": "ConcatDataset", "datasets": [inner, other]}
    refused(cfg, "the train data sets have different classes, in another order")


@some_of_each
def test_a_checkpoint_is_tested_with_its_classes(task, kind, tmp_path):
    MAKE[task](tmp_path / "data")
    cfg = training(tmp_path, task, kind, f"{tmp_path}/data/")
    cfg.load_from = None
    runner = cli.build_runner(cfg)
    weights = tmp_path / "weights.pth"
    meta = {"dataset_meta": {"classes": ("cat", "horse", "dog")}}
    content = {"state_dict": runner.model.state_dict(), "meta": meta}
    torch.save(content, weights)
    test = training(tmp_path, task, kind, f"{tmp_path}/data/")
    test.load_from = str(weights)
    with pytest.raises(UsageError, match="was trained with other classes") as error:
        cli.build_runner(test).test()
    assert "checkpoint: 'cat', 'horse', 'dog'\n  test: 'cat', 'dog', 'horse'" in str(error.value)
    # A training that only begins with its weights may have others.
    fine = training(tmp_path, task, kind, f"{tmp_path}/data/")
    fine.load_from, fine.work_dir = str(weights), str(tmp_path / "fine")
    started(fine)


def test_a_list_that_names_its_classes_is_believed(tmp_path):
    images(tmp_path / "data")
    content = {"metainfo": {"classes": NAMES}, "data_list": [{"img_path": "cat/0.jpg"}]}
    content["data_list"][0]["gt_label"] = [0, 2]
    (tmp_path / "data/list.json").write_text(json.dumps(content))
    dataset = {
        "type": "MultiLabelDataset",
        "data_root": f"{tmp_path}/data",
        "data_prefix": "train",
        "ann_file": "list.json",
    }
    init_default_scope("mmpretrain")
    assert build_dataset({**dataset, "classes": NAMES}).metainfo["classes"] == NAMES
    with pytest.raises(DataError, match="numbers of its own classes") as error:
        build_dataset({**dataset, "classes": ("dog", "cat", "horse")})
    assert "file: 'cat', 'dog', 'horse'\n  config: 'dog', 'cat', 'horse'" in str(error.value)


# 2. Numbers of classes.

HEADS = {
    ("mmdet", "finetune"): "roi_head.bbox_head",
    ("mmdet", "upstream"): "bbox_head",
    ("mmseg", "finetune"): "auxiliary_head",
    ("mmseg", "upstream"): "decode_head",
    ("mmpretrain", "finetune"): "head",
    ("mmpretrain", "upstream"): "head",
}


@pytest.mark.parametrize(("kind", "number"), [("finetune", 150), ("upstream", 2)])
@each_task
def test_the_heads_classes_are_the_datas(task, kind, number, tmp_path):
    MAKE[task](tmp_path / "data")
    cfg = training(tmp_path, task, kind, f"{tmp_path}/data/")
    place = HEADS[task, kind]
    cfg.merge_from_dict({f"model.{place}.num_classes": number})
    message = refused(cfg, "numbers of classes are not the data set's")
    assert f"model.{place}.num_classes" in message
    assert f"): {number}\n  train_dataloader.dataset, classes: 3 ('cat', 'dog', 'horse')" in message
    assert 'accepted_disagreements=["class_count"]' in message


@pytest.mark.parametrize("classes", ["cat", ["cat", "dog", "cat"]], ids=["text", "twice"])
@each_task
@each_kind
def test_classes_are_a_list_of_different_names(task, kind, classes, tmp_path):
    """A tuple of one name needs a comma."""
    MAKE[task](tmp_path / "data")
    cfg = training(tmp_path, task, kind, f"{tmp_path}/data/", classes)
    text = r"classes is the text 'cat'.*classes = \('cat',\)"
    loaders_refused(cfg, text if classes == "cat" else "classes has 'cat' more than once")


@each_kind
def test_a_softmax_over_one_class_is_refused(kind, tmp_path):
    MAKE["mmseg"](tmp_path / "data", (0, 0))
    cfg = training(tmp_path, "mmseg", kind, f"{tmp_path}/data/", ("road",))
    refused(cfg, r"model\.decode_head \(.*\) has one class under a softmax")
    images(tmp_path / "folders", ("cat",))
    cfg = training(tmp_path, "mmpretrain", kind, f"{tmp_path}/folders/", ("cat",))
    refused(cfg, r"model\.head \(.*\) has one class under a softmax")
    # Of boxes, the background is another.
    boxes(tmp_path / "boxes")
    cfg = training(tmp_path, "mmdet", kind, f"{tmp_path}/boxes/", ("cat",))
    cfg.work_dir += "2"
    started(cfg)


def test_a_sigmoid_of_one_output_is_fine(tmp_path):
    MAKE["mmseg"](tmp_path / "data", (0, 1))
    cfg = training(tmp_path, "mmseg", "upstream", f"{tmp_path}/data/", NAMES[:2])
    for head in (cfg.model.decode_head, cfg.model.auxiliary_head):
        head.out_channels, head.threshold = 1, 0.5
        head.loss_decode.use_sigmoid = True
    started(cfg)


def test_the_preprocessors_classes_are_the_datas(tmp_path):
    images(tmp_path / "data")
    cfg = training(tmp_path, "mmpretrain", "upstream", f"{tmp_path}/data/")
    cfg.data_preprocessor.num_classes = 1000
    refused(cfg, r"data_preprocessor\.num_classes \(ClsDataPreprocessor\): 1000")
    cfg.accepted_disagreements = ["class_count"]
    cfg.work_dir += "2"
    cfg.experiment_name += "2"
    started(cfg)


@pytest.mark.parametrize(
    ("key", "place"),
    [
        ("model.decode_head.ignore_index", "model.decode_head.ignore_index: 0"),
        ("model.data_preprocessor.seg_pad_val", "model.data_preprocessor.seg_pad_val: 0"),
        ("val_evaluator.ignore_index", r"val_evaluator.ignore_index \(IoUMetric\): 0"),
    ],
)
@each_kind
def test_the_label_for_no_class_is_everywhere_the_same(kind, key, place, tmp_path):
    MAKE["mmseg"](tmp_path / "data")
    cfg = training(tmp_path, "mmseg", kind, f"{tmp_path}/data/")
    cfg.merge_from_dict({key: 0})
    refused(cfg, rf"{place}\n  (train|val)_dataloader.dataset.ignore_index: 255")


def test_class_weights_are_as_many_as_classes(tmp_path):
    MAKE["mmseg"](tmp_path / "data")
    cfg = training(tmp_path, "mmseg", "upstream", f"{tmp_path}/data/")
    cfg.model.decode_head.loss_decode.class_weight = [1.0, 2.0]
    refused(cfg, "loss_decode.class_weight has 2 numbers for 3 classes")


@each_kind
def test_labels_of_a_list_are_classes_of_the_head(kind, tmp_path):
    """A list of files and numbers has no names."""
    images(tmp_path / "data")
    lines = [f"{n}/0.jpg {label}" for n, label in zip(NAMES, (0, 1, 3), strict=True)]
    (tmp_path / "data/train.txt").write_text("\n".join(lines))
    cfg = training(tmp_path, "mmpretrain", kind, f"{tmp_path}/data/")
    cfg.train_dataloader.dataset.ann_file = "train.txt"
    for split in ("train", "val", "test"):
        del cfg[f"{split}_dataloader"].dataset["classes"]
    refused(cfg, "the train data set has labels of no class: 3. There are 3 classes, from 0 on")
