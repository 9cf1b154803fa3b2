"""Pointing a config at its data, and refusing to start without them."""

import pytest
from mmengine.config import Config

from mmvmamba.engine.data import check_datasets, find_data, set_data_root
from mmvmamba.engine.errors import UsageError


def coco(root="data/coco/", **more):
    dataset = {
        "type": "CocoDataset",
        "data_root": root,
        "ann_file": "annotations/train.json",
        "data_prefix": {"img": "train2017/"},
        **more,
    }
    return Config(
        {
            "data_root": root,
            "train_dataloader": {"dataset": {"type": "RepeatDataset", "dataset": dataset}},
            "test_dataloader": {"dataset": dataset},
            "test_evaluator": [{"type": "CocoMetric", "ann_file": root + "annotations/train.json"}],
        }
    )


def make_files(root):
    (root / "annotations").mkdir(parents=True)
    (root / "annotations/train.json").write_text("{}")
    (root / "train2017").mkdir()


def test_the_root_moves_everywhere_at_once(tmp_path):
    cfg = coco()
    set_data_root(cfg, str(tmp_path))
    assert cfg.train_dataloader.dataset.dataset.data_root == f"{tmp_path}/"
    assert cfg.test_evaluator[0].ann_file == f"{tmp_path}/annotations/train.json"
    assert cfg.data_root == f"{tmp_path}/"


def test_a_root_is_not_mistaken_for_a_longer_name():
    cfg = coco()
    cfg.test_evaluator[0].ann_file = "data/coco_extra/train.json"
    set_data_root(cfg, "/elsewhere")
    assert cfg.test_evaluator[0].ann_file == "data/coco_extra/train.json"


def test_several_roots_are_not_moved_together():
    cfg = coco()
    cfg.test_dataloader.dataset.data_root = "data/other/"
    with pytest.raises(UsageError, match="data/coco, data/other"):
        set_data_root(cfg, "/elsewhere")


def test_a_complete_data_set_passes(tmp_path):
    make_files(tmp_path)
    check_datasets(coco(f"{tmp_path}/"), ("train", "test"))


@pytest.mark.parametrize("gone", ["annotations/train.json", "train2017", "."])
def test_what_is_missing_is_named_with_what_to_do(tmp_path, gone):
    root = tmp_path / "coco"
    make_files(root)
    (root / gone).rename(tmp_path / "away")
    with pytest.raises(UsageError, match="data set") as error:
        check_datasets(coco(f"{root}/"), ("train",))
    assert str(root / gone) in str(error.value)
    assert "--data-root" in str(error.value)
    assert "make_sample_data.py" in str(error.value)


def test_only_the_splits_in_use_are_looked_at(tmp_path):
    check_datasets(coco(f"{tmp_path}/nowhere/"), ("val",))


def test_other_storage_and_data_sets_that_fetch_themselves_are_left_alone():
    check_datasets(coco("nowhere/", backend_args={"backend": "petrel"}), ("train",))
    check_datasets(coco("s3://bucket/"), ("train",))
    cifar = {"type": "CIFAR10", "data_root": "nowhere/", "split": "train"}
    check_datasets(Config({"train_dataloader": {"dataset": cifar}}), ("train",))


def test_imagenets_split_folder_is_looked_for(tmp_path):
    imagenet = {"type": "ImageNet", "data_root": str(tmp_path), "split": "val"}
    cfg = Config({"test_dataloader": {"dataset": imagenet}})
    with pytest.raises(UsageError, match=f"{tmp_path}/val does not exist"):
        check_datasets(cfg, ("test",))


def test_data_of_the_checkout_are_found_from_another_directory(tmp_path, monkeypatch):
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    make_files(project / "data/coco")
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    cfg = coco()
    assert find_data(cfg, project) == str(project / "data/coco")
    check_datasets(cfg, ("train",))
    (elsewhere / "data/coco").mkdir(parents=True)
    assert find_data(coco(), project) is None
