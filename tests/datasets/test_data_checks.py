"""What upstream trains with is not refused, and what may pass is not taken for damage."""

import errno
import json

import numpy as np
import pytest
from mmdet.datasets import BaseVideoDataset
from mmdet.datasets.samplers import TrackImgSampler
from mmengine.dataset import BaseDataset, DefaultSampler
from mmengine.registry import init_default_scope
from mmpretrain.datasets import CustomDataset
from mmseg.datasets import BaseSegDataset
from PIL import Image

from mmvmamba.engine.data_checks import build_dataloader
from mmvmamba.engine.errors import DataError
from mmvmamba.engine.seeds import build_train_dataloader

HEIGHT, WIDTH = 6, 8


@pytest.fixture(autouse=True)
def own_transforms():
    init_default_scope("mmengine")


def loader(dataset: dict, **options):
    config = {"sampler": {"type": DefaultSampler, "shuffle": False}, "num_workers": 0, **options}
    config = {"collate_fn": {"type": "pseudo_collate"}, "batch_size": 1, **config}
    return build_dataloader({"dataset": dataset, **config})


def image(path, array=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.zeros((HEIGHT, WIDTH, 3), np.uint8) if array is None else array
    Image.fromarray(array).save(path)


class Failing:
    """A transform."""

    def __init__(self, error: Exception):
        self.error = error

    def __call__(self, data: dict) -> dict:
        raise self.error


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(errno.ESTALE, "Stale file handle"), RuntimeError),
        (OSError(errno.EMFILE, "Too many open files"), RuntimeError),
        (MemoryError(), RuntimeError),
        (FileNotFoundError(errno.ENOENT, "No such file"), DataError),
        (ValueError("damaged"), DataError),
    ],
    ids=str,
)
def test_what_may_be_well_the_next_time_is_no_fault_of_the_file(error, kind):
    """A user's mistake ends the job, any other error is worth another start."""
    dataset = BaseDataset(lazy_init=True)
    dataset.data_list, dataset._fully_initialized = [{"img_path": "a.png"}], True
    dataset.serialize_data = False
    dataset.pipeline.transforms = [Failing(error)]
    with pytest.raises(RuntimeError, match=r"a\.png cannot be used: Failing failed") as raised:
        next(iter(loader(dataset)))
    assert isinstance(raised.value, DataError) == (kind is DataError)


def test_videos_are_read_as_upstream_reads_them(tmp_path):
    image(tmp_path / "0.png"), image(tmp_path / "1.png")
    frames = [
        {"id": i, "file_name": f"{i}.png", "height": HEIGHT, "width": WIDTH}
        | {"video_id": 1, "frame_id": i}
        for i in (0, 1)
    ]
    box = {"category_id": 1, "bbox": [1, 1, 2, 2], "area": 4, "video_id": 1, "instance_id": 1}
    content = {
        "videos": [{"id": 1, "name": "v"}],
        "images": frames,
        "annotations": [box | {"id": i, "image_id": i} for i in (0, 1)],
        "categories": [{"id": 1, "name": "thing"}],
    }
    (tmp_path / "ann.json").write_text(json.dumps(content))
    transforms = [{"type": "mmdet.LoadImageFromFile"}]
    dataset = {
        "type": BaseVideoDataset,
        "data_root": str(tmp_path),
        "ann_file": "ann.json",
        "data_prefix": {"img_path": ""},
        "metainfo": {"classes": ("thing",)},
        "filter_cfg": {"min_size": 1},
        "pipeline": [{"type": "mmdet.TransformBroadcaster", "transforms": transforms}],
    }
    dataset["pipeline"].insert(0, {"type": "mmdet.UniformRefFrameSample", "num_ref_imgs": 1})
    config = {"sampler": {"type": TrackImgSampler}, "num_workers": 0, "batch_size": 1}
    config["collate_fn"] = {"type": list}
    (sample,) = next(iter(build_train_dataloader({"dataset": dataset, **config}, 0)))
    assert [frame.shape for frame in sample["img"]] == [(HEIGHT, WIDTH, 3)] * 2


def maps(tmp_path, labels, suffix=".png", **load):
    """A segmentation data set of one image and map."""
    image(tmp_path / "images/a.jpg")
    path = tmp_path / f"maps/a{suffix}"
    path.parent.mkdir()
    if suffix == ".npy":
        np.save(path, labels)
    else:
        Image.fromarray(labels).save(path)
    return {
        "type": BaseSegDataset,
        "data_root": str(tmp_path),
        "data_prefix": {"img_path": "images", "seg_map_path": "maps"},
        "seg_map_suffix": suffix,
        "metainfo": {"classes": ("a", "b")},
        "pipeline": [{"type": "mmseg.LoadImageFromFile"}, load],
    }


class LoadArray:
    """A loader of a user's own."""

    def __call__(self, data: dict) -> dict:
        data["gt_seg_map"] = np.load(data["seg_map_path"])
        return data


def test_maps_of_16_bits_with_small_labels_are_used(tmp_path):
    labels = np.ones((HEIGHT, WIDTH), np.uint16)
    dataset = maps(tmp_path, labels, type="mmseg.LoadAnnotations")
    (batch,) = loader(dataset)
    assert (batch["gt_seg_map"][0] == 1).all()


def test_maps_of_16_bits_with_labels_beyond_8_are_refused(tmp_path):
    dataset = maps(tmp_path, np.full((HEIGHT, WIDTH), 300, np.uint16), type="mmseg.LoadAnnotations")
    with pytest.raises(DataError, match=r"maps/a\.png is of the kind .*labels up to 300"):
        next(iter(loader(dataset)))


def test_loaders_of_a_users_own_are_trusted(tmp_path):
    labels = np.ones((HEIGHT, WIDTH), np.int64)
    (batch,) = loader(maps(tmp_path, labels, ".npy", type=LoadArray))
    assert (batch["gt_seg_map"][0] == 1).all()


def test_labels_may_come_from_folders(tmp_path):
    image(tmp_path / "cat/a.png")
    dataset = {"type": CustomDataset, "data_prefix": str(tmp_path), "ann_file": None}
    (batch,) = loader({**dataset, "pipeline": [{"type": "mmpretrain.LoadImageFromFile"}]})
    assert batch["gt_label"][0] == 0
