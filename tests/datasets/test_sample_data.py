"""The sample data set: exact layouts, exact annotations, determinism, restart and clear errors."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import warm
from PIL import Image

pytest.importorskip("skimage", reason="the sample data needs scikit-image")
mask_api = pytest.importorskip("pycocotools.mask", reason="the sample data needs pycocotools")

from pycocotools.coco import COCO  # noqa: E402

from mmvmamba.datasets import (  # noqa: E402
    SampleDataError,
    SampleDataParams,
    is_complete,
    make_sample_data,
    sample_data,
)
from mmvmamba.datasets.sample_objects import IMAGENET_THINGS, SCENE_THINGS  # noqa: E402

TOOL = Path(__file__).parents[2] / "tools/dataset_tools/make_sample_data.py"
# Enough scenes for every kind of background, every class and a crowd, still a matter of seconds.
PARAMS = SampleDataParams(num_train=24, num_val=8, seed=3, image_size=128)
TINY = SampleDataParams(num_train=2, num_val=1, seed=5, image_size=96)


def digests(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def sample(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("sample")
    calls = []
    assert make_sample_data(root, PARAMS, on_image=lambda: calls.append(1))
    assert len(calls) == PARAMS.num_images
    return root


@pytest.fixture(scope="module", params=["train", "val"])
def coco(request, sample) -> COCO:
    api = COCO(str(sample / f"coco/annotations/instances_{request.param}2017.json"))
    api.folder = sample / f"coco/{request.param}2017"
    return api


def test_layout(sample):
    files = digests(sample)
    for split, folder, count in (("train", "training", 24), ("val", "validation", 8)):
        jpegs = [name for name in files if name.startswith(f"coco/{split}2017/")]
        assert len(jpegs) == count
        for index in range(1, count + 1):
            stem = f"ADE_{split}_{index:08d}"
            assert f"ADEChallengeData2016/images/{folder}/{stem}.jpg" in files
            assert f"ADEChallengeData2016/annotations/{folder}/{stem}.png" in files
        classes = {Path(n).parts[2] for n in files if n.startswith(f"imagenet/{split}/")}
        assert classes == set(IMAGENET_THINGS)
        lines = (sample / f"imagenet/meta/{split}.txt").read_text().splitlines()
        assert len(lines) == count
        for line in lines:
            name, label = line.split()
            assert f"imagenet/{split}/{name}" in files
            assert IMAGENET_THINGS[name.split("/")[0]][1] == int(label)
    assert "coco/train2017/000000000001.jpg" in files
    assert not [name for name in files if name.endswith(".part")]


def test_coco_annotations_agree_with_pycocotools(coco):
    assert len(coco.cats) == 80
    assert max(coco.cats) == 90
    seen = set()
    for image_id, image in coco.imgs.items():
        size = image["height"], image["width"]
        with Image.open(coco.folder / image["file_name"]) as picture:
            assert picture.size == size[::-1]
        annotations = coco.imgToAnns[image_id]
        assert any(not annotation["iscrowd"] for annotation in annotations)
        drawn = np.zeros(size, int)
        for annotation in annotations:
            encoded = coco.annToRLE(annotation)
            assert annotation["area"] == mask_api.area(encoded) > 0
            assert annotation["bbox"] == mask_api.toBbox(encoded).tolist()
            drawn += mask_api.decode(encoded)
            seen.add(coco.cats[annotation["category_id"]]["name"])
            if annotation["iscrowd"]:
                assert sum(annotation["segmentation"]["counts"]) == size[0] * size[1]
            else:
                for polygon in annotation["segmentation"]:
                    assert len(polygon) >= 6
                    assert len(polygon) % 2 == 0
                    assert min(polygon) >= 0
                    assert max(polygon[0::2]) <= size[1]
                    assert max(polygon[1::2]) <= size[0]
        # Masks are the visible parts: they share only the pixels that outlines run through.
        assert (drawn > 1).sum() < 0.02 * drawn.size
    assert seen <= {name for _, name, _ in SCENE_THINGS}


def test_coco_has_crowds_occlusion_and_several_scales(sample):
    coco = COCO(str(sample / "coco/annotations/instances_train2017.json"))
    annotations = list(coco.anns.values())
    assert any(annotation["iscrowd"] for annotation in annotations)
    assert any(len(a["segmentation"]) > 1 for a in annotations if not a["iscrowd"])
    sides = [a["area"] ** 0.5 for a in annotations if not a["iscrowd"]]
    assert max(sides) > 3 * min(sides)
    assert {a["category_id"] for a in annotations} == {13, 37, 38, 52, 55, 59, 60, 85}
    assert len({a["id"] for a in annotations}) == len(annotations)


@pytest.mark.parametrize("texture", ["_sky", "_planks"])
def test_drawn_textures_are_neither_cut_at_black_nor_at_white(texture):
    for seed in range(5):
        values = getattr(sample_data, texture)(24, 32, np.random.default_rng(seed))
        assert values.shape == (24, 32, 3)
        assert 0 <= values.min() < values.max() <= 1


@pytest.mark.parametrize("side", [-1, 1])
@pytest.mark.parametrize("axis", [0, 1])
def test_shadows_fall_away_from_the_light(axis, side):
    white, alpha = np.ones((60, 60, 3)), np.zeros((60, 60))
    alpha[20:40, 20:40] = 1
    # Its first number points along a row.
    light = np.zeros(3)
    light[1 - axis] = side
    sprite = sample_data._Sprite(0, white, alpha)
    picture = sample_data._compose(white, [sprite], light, np.random.default_rng(0))
    brightness = picture.mean(axis=(1 - axis, 2))
    before, behind = brightness[17:20].mean(), brightness[40:43].mean()
    assert (before < behind) == (side > 0)
    # It touches what it belongs to.
    assert brightness[:12].mean() == pytest.approx(brightness[48:].mean(), rel=0.01)


def test_polygons_reproduce_masks_with_holes():
    yy, xx = np.mgrid[:80, :90]
    radius = np.hypot(xx - 45, yy - 40)
    ring = np.clip(30.5 - radius, 0, 1) * np.clip(radius - 12.5, 0, 1)
    ring[:, 70:] = 0
    polygons = sample_data.mask_to_polygons(ring)
    encoded = mask_api.merge(mask_api.frPyObjects(polygons, 80, 90))
    wrong = mask_api.decode(encoded).astype(bool) ^ (ring > 0.5)
    assert wrong.sum() <= 0.02 * (ring > 0.5).sum()
    assert not mask_api.decode(encoded)[40, 45]


def test_run_lengths_start_with_zeros():
    mask = np.array([[1, 0], [1, 1]], bool)
    assert sample_data._run_lengths(mask) == [0, 2, 1, 1]
    assert sample_data._run_lengths(~mask) == [2, 1, 1]
    runs = mask_api.frPyObjects({"counts": [0, 2, 1, 1], "size": [2, 2]}, 2, 2)
    assert (mask_api.decode(runs) == mask).all()


def test_ade_labels_are_ade20k_classes(sample):
    labels = set()
    for path in (sample / "ADEChallengeData2016/annotations").rglob("*.png"):
        with Image.open(path) as picture:
            assert picture.mode == "L"
            labels |= set(np.unique(np.asarray(picture)).tolist())
    assert labels <= {0, 1, 3, 4, 10, 14, 23, 44, 120, 121, 149}
    assert {0, 1, 3, 4, 120, 121} <= labels


def test_equal_parameters_give_equal_bytes(tmp_path):
    make_sample_data(tmp_path / "a", TINY)
    make_sample_data(tmp_path / "b", TINY)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    make_sample_data(tmp_path / "c", SampleDataParams(2, 1, seed=6, image_size=96))
    first = "coco/train2017/000000000001.jpg"
    assert digests(tmp_path / "a")[first] != digests(tmp_path / "c")[first]


def test_training_and_validation_backgrounds_never_overlap():
    from skimage import data

    full = data.coffee()
    train, val = (np.asarray(sample_data._picture("coffee", split)) for split in sample_data.SPLITS)
    assert (full[:, : train.shape[1]] == train).all()
    assert (full[:, -val.shape[1] :] == val).all()
    assert train.shape[1] + val.shape[1] < full.shape[1]


def test_finished_data_are_not_made_again(tmp_path):
    assert make_sample_data(tmp_path, TINY)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert not make_sample_data(tmp_path, TINY)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


def test_interrupted_run_is_completed(tmp_path):
    reference, interrupted = tmp_path / "reference", tmp_path / "interrupted"
    make_sample_data(reference, TINY)

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_sample_data(interrupted, TINY, on_image=stop)
    assert not is_complete(interrupted, TINY)
    assert make_sample_data(interrupted, TINY)
    assert digests(reference) == digests(interrupted)


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"short")])
def test_damaged_data_are_made_again(tmp_path, damage):
    make_sample_data(tmp_path, TINY)
    before = digests(tmp_path)
    damage(tmp_path / "coco/val2017/000000000003.jpg")
    assert make_sample_data(tmp_path, TINY)
    assert digests(tmp_path) == before


def test_other_parameters_need_overwrite(tmp_path):
    make_sample_data(tmp_path, TINY)
    other = SampleDataParams(1, 1, seed=5, image_size=96)
    with pytest.raises(SampleDataError, match="--overwrite"):
        make_sample_data(tmp_path, other)
    assert make_sample_data(tmp_path, other, overwrite=True)
    assert len(list((tmp_path / "coco/train2017").iterdir())) == 1
    assert is_complete(tmp_path, other)


def test_foreign_data_are_left_alone(tmp_path):
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco/mine.txt").write_text("precious")
    with pytest.raises(SampleDataError, match="not changed"):
        make_sample_data(tmp_path, TINY, overwrite=True)
    assert (tmp_path / "coco/mine.txt").read_text() == "precious"


def test_data_behind_a_link_are_left_alone(tmp_path):
    root, real = tmp_path / "sample", tmp_path / "real"
    make_sample_data(root, TINY)
    (root / "coco").rename(real)
    (real / "annotations/instances_train2017.json").write_text("precious")
    (root / "coco").symlink_to(real)
    with pytest.raises(SampleDataError, match="coco is a link"):
        make_sample_data(root, TINY, overwrite=True)
    assert (real / "annotations/instances_train2017.json").read_text() == "precious"


def test_foreign_manifest_is_an_error(tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps({"name": "something else"}))
    with pytest.raises(SampleDataError, match="not a manifest"):
        make_sample_data(tmp_path, TINY)


def test_unwritable_folder_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SampleDataError, match="cannot write the sample data"):
        make_sample_data(tmp_path / "file/sample", TINY)


def test_missing_package_is_a_clear_error(tmp_path, monkeypatch):
    found = sample_data.importlib.util.find_spec
    monkeypatch.setattr(
        sample_data.importlib.util,
        "find_spec",
        lambda name: None if name == "skimage" else found(name),
    )
    with pytest.raises(SampleDataError, match="pip install scikit-image"):
        make_sample_data(tmp_path, TINY)


@pytest.mark.parametrize(
    ("name", "value"), [("num_train", 0), ("num_val", -1), ("seed", -1), ("image_size", 8)]
)
def test_silly_parameters_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name} must be from .* but is {value}"):
        SampleDataParams(**{name: value})


def test_command_line_from_another_directory(tmp_path):
    command = [sys.executable, str(TOOL), "--num-train=1", "--num-val=1", "--image-size=96"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    first, second, wrong = (
        warm.run([*command, *extra], cold=cold, tasks=False, cwd=tmp_path, timeout=120, **pipes)
        for extra, cold in (([], True), ([], False), (["--image-size=7"], False))
    )
    assert first.returncode == 0, first.stderr
    assert "Made" in first.stderr
    assert (tmp_path / "data/sample/coco/train2017/000000000001.jpg").is_file()
    assert "Found complete" in second.stderr
    assert wrong.returncode == 1
    assert "image_size must be from" in wrong.stderr
    assert "Traceback" not in wrong.stderr


def test_mmdet_reads_it(sample):
    datasets = pytest.importorskip("mmdet.datasets")
    from mmdet.utils import register_all_modules

    register_all_modules()
    pipeline = [
        {"type": "LoadImageFromFile"},
        {"type": "LoadAnnotations", "with_bbox": True, "with_mask": True},
        {"type": "Resize", "scale": (96, 96), "keep_ratio": True},
        {"type": "PackDetInputs"},
    ]
    dataset = datasets.CocoDataset(
        data_root=str(sample / "coco"),
        ann_file="annotations/instances_train2017.json",
        data_prefix={"img": "train2017/"},
        filter_cfg={"filter_empty_gt": True, "min_size": 32},
        pipeline=pipeline,
    )
    assert len(dataset) == PARAMS.num_train
    names = {name for _, name, _ in SCENE_THINGS}
    ignored = 0
    for index in range(len(dataset)):
        item = dataset[index]
        instances = item["data_samples"].gt_instances
        assert len(instances) == len(instances.masks) > 0
        assert {dataset.metainfo["classes"][label] for label in instances.labels} <= names
        ignored += len(item["data_samples"].ignored_instances)
    assert ignored > 0


def test_mmseg_reads_it(sample):
    datasets = pytest.importorskip("mmseg.datasets")
    from mmseg.utils import register_all_modules

    register_all_modules()
    dataset = datasets.ADE20KDataset(
        data_root=str(sample / "ADEChallengeData2016"),
        data_prefix={"img_path": "images/training", "seg_map_path": "annotations/training"},
        pipeline=[
            {"type": "LoadImageFromFile"},
            {"type": "LoadAnnotations", "reduce_zero_label": True},
            {"type": "PackSegInputs"},
        ],
    )
    assert len(dataset) == PARAMS.num_train
    classes = set()
    for index in range(len(dataset)):
        item = dataset[index]
        labels = item["data_samples"].gt_sem_seg.data
        assert labels.shape[-2:] == item["inputs"].shape[-2:]
        present = np.unique(labels[labels != 255])
        classes |= {dataset.metainfo["classes"][label] for label in present}
    assert {"wall", "sky", "floor", "ball", "food"} <= classes
    assert classes <= {
        "wall", "sky", "floor", "grass", "earth", "painting", "signboard", "ball", "food", "clock",
    }  # fmt: skip


def test_mmpretrain_reads_it(sample):
    datasets = pytest.importorskip("mmpretrain.datasets")
    from mmpretrain.utils import register_all_modules

    register_all_modules()
    dataset = datasets.ImageNet(
        data_root=str(sample / "imagenet"),
        split="val",
        pipeline=[
            {"type": "LoadImageFromFile"},
            {"type": "ResizeEdge", "scale": 72, "edge": "short"},
            {"type": "CenterCrop", "crop_size": 64},
            {"type": "PackInputs"},
        ],
    )
    assert len(dataset) == PARAMS.num_val
    labels = {int(dataset[index]["data_samples"].gt_label) for index in range(len(dataset))}
    expected = {
        "analog clock", "basketball", "soccer ball", "umbrella", "street sign", "bagel", "orange",
        "banana",
    }  # fmt: skip
    assert {dataset.CLASSES[label].split(",")[0] for label in labels} == expected
