"""What labelling tools write becomes the data of configs/finetune, or an error that names it."""

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_api

from mmvmamba.datasets.own_data import Options, prepare_dataset, split
from mmvmamba.engine.coco_file import read_coco
from mmvmamba.engine.errors import UsageError

WIDTH, HEIGHT = 40, 30
SQUARE = [[4, 5], [14, 5], [14, 20], [4, 20]]


def picture(path: Path, size=(WIDTH, HEIGHT), **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (90, 100, 110)).save(path, **options)
    return path


def shape(label: str, points, kind: str | None = "polygon", **more) -> dict:
    return {"label": label, "points": points, "shape_type": kind, "group_id": None, **more}


def bitmap(label: str, left: int, top: int, bits: np.ndarray) -> dict:
    """As labelme notes masks: a PNG of the part inside of two corners."""
    file = io.BytesIO()
    Image.fromarray(bits.astype(np.uint8) * 255).save(file, "PNG")
    corners = [[left, top], [left + bits.shape[1] - 1, top + bits.shape[0] - 1]]
    return shape(label, corners, "mask", mask=base64.b64encode(file.getvalue()).decode())


def labelme(folder: Path, *shapes: list[dict], **changes) -> Path:
    """Images with the shapes, and as many without any as two splits need."""
    for number, one in enumerate([*shapes, *[[]] * max(0, 2 - len(shapes))]):
        name = f"{number}.jpg"
        picture(folder / name)
        content = {"shapes": one, "imagePath": name, "imageData": None}
        content |= {"imageWidth": WIDTH, "imageHeight": HEIGHT, **changes}
        (folder / f"{number}.json").write_text(json.dumps(content))
    return folder


def annotations(out: Path) -> dict[str, list[dict]]:
    """The objects by image, of both splits, which the project's own check must take."""
    found = {}
    for name in ("train", "val"):
        file = out / f"annotations/{name}.json"
        read_coco(file, masks_evaluated=True)
        content = json.loads(file.read_text())
        for image in content["images"]:
            assert (out / name / image["file_name"]).is_file()
            own = [one for one in content["annotations"] if one["image_id"] == image["id"]]
            found[image["file_name"]] = own
    return found


def test_shapes_become_boxes_and_masks(tmp_path):
    bits = np.array([[1, 1, 0], [0, 1, 1]], bool)
    shapes = [
        shape("b", [[30, 20], [20, 10]], "rectangle"),
        shape("a", SQUARE, None),
        shape("a", [[20, 15], [23, 19]], "circle"),
        bitmap("b", 7, 3, bits),
        shape("a", [[0, 0], [2, 0], [2, 2]], group_id=1),
        shape("a", [[8, 8], [9, 8], [9, 9]], group_id=1),
        shape("b", [[30, 20], [50, 20], [50, 40]]),
    ]
    source = labelme(tmp_path / "in", shapes)
    made = prepare_dataset("boxes", source, tmp_path / "out", Options())
    assert made.classes == ["a", "b"]
    assert sum(made.counts.values(), start=type(made.counts["val"])()) == {"a": 3, "b": 3}
    rectangle, polygon, circle, mask, group, outside = annotations(tmp_path / "out")["0.jpg"]
    assert (rectangle["bbox"], rectangle["area"]) == ([20, 10, 10, 10], 100)
    assert (polygon["bbox"], polygon["area"]) == ([4, 5, 10, 15], 150)
    assert circle["bbox"] == pytest.approx([15, 10, 10, 10], abs=0.05)
    assert circle["area"] == pytest.approx(np.pi * 25, rel=0.01)
    assert (mask["bbox"], mask["area"]) == ([7, 3, 3, 2], 4)
    expected = np.zeros((HEIGHT, WIDTH), bool)
    expected[3:5, 7:10] = bits
    np.testing.assert_array_equal(mask_api.decode(mask["segmentation"]), expected)
    assert (group["bbox"], group["area"], len(group["segmentation"])) == ([0, 0, 9, 9], 2.5, 2)
    assert outside["bbox"] == [30, 20, 10, 10]
    assert [one["category_id"] for one in (rectangle, polygon, mask)] == [2, 1, 2]


def test_masks_have_the_classes_numbers_in_the_order_of_shapes(tmp_path):
    bits = np.ones((2, 3), bool)
    shapes = [
        shape("road", [[0, 10], [39, 10], [39, 29], [0, 29]]),
        shape("car", [[20, 25], [10, 20]], "rectangle"),
        bitmap("glass", 12, 22, bits),
    ]
    source = labelme(tmp_path / "in", shapes)
    expected = np.zeros((HEIGHT, WIDTH), np.uint8)
    expected[10:] = 1
    expected[20:26, 10:21] = 2
    expected[22:24, 12:15] = 255
    options = Options(["background", "road", "car"], ["glass"])
    made = prepare_dataset("masks", source, tmp_path / "out", options)
    (mask,) = (tmp_path / "out/masks").rglob("0.png")
    np.testing.assert_array_equal(np.array(Image.open(mask)), expected)
    assert made.suffix == ".jpg"
    # Without a class for it, what no shape covers is of none.
    prepare_dataset("masks", source, tmp_path / "two", Options(["road", "car"], ["glass"]))
    (mask,) = (tmp_path / "two/masks").rglob("0.png")
    without = np.where(expected == 0, 255, np.where(expected == 255, 255, expected - 1))
    np.testing.assert_array_equal(np.array(Image.open(mask)), without)
    names = prepare_dataset("masks", source, tmp_path / "all", Options()).classes
    assert names == ["background", "car", "glass", "road"]


def test_the_draw_is_that_of_the_seed_and_takes_every_image_once():
    parts = split(range(50), Options(seed=3), "")
    assert sorted(parts["train"] + parts["val"]) == list(range(50))
    assert len(parts["val"]) == 10
    assert parts == split(range(50), Options(seed=3), "")
    assert parts != split(range(50), Options(seed=4), "")
    for share in (0.01, 0.99):
        assert set(map(len, split("abc", Options(share=share), "").values())) in ({1, 2},)


def cvat_boxes(folder: Path) -> Path:
    """As CVAT exports 'COCO 1.0'."""
    images, objects = [], []
    for number in range(1, 7):
        name = f"camera/{number}.png"
        picture(folder / "images/default" / name)
        images.append({"id": number, "file_name": name, "width": WIDTH, "height": HEIGHT})
        for category in (1, 2):
            box = {"bbox": [1.0, 2.0, 9.0, 8.0], "area": 72.0, "iscrowd": 0, "segmentation": []}
            numbers = {"id": len(objects) + 1, "image_id": number, "category_id": category}
            objects.append(numbers | box | {"attributes": {"occluded": False}})
    categories = [{"id": 1, "name": "nut"}, {"id": 2, "name": "bolt"}]
    content = {"licenses": [], "info": {}, "categories": categories}
    content |= {"images": images, "annotations": objects}
    (folder / "annotations").mkdir()
    (folder / "annotations/instances_default.json").write_text(json.dumps(content))
    return folder


def test_coco_files_are_split(tmp_path):
    source = cvat_boxes(tmp_path / "in")
    made = prepare_dataset("boxes", source, tmp_path / "out", Options(["bolt", "nut"], share=0.5))
    assert made.classes == ["bolt", "nut"]
    assert made.images == {"train": 3, "val": 3}
    assert made.counts == {"train": {"nut": 3, "bolt": 3}, "val": {"nut": 3, "bolt": 3}}
    for name in ("train", "val"):
        content = json.loads((tmp_path / f"out/annotations/{name}.json").read_text())
        assert {one["id"]: one["name"] for one in content["categories"]} == {1: "nut", 2: "bolt"}
        assert len(content["annotations"]) == 6
        for image in content["images"]:
            assert (tmp_path / "out" / name / image["file_name"]).is_file()
    file = source / "annotations/instances_default.json"
    made = prepare_dataset("boxes", file, tmp_path / "other", Options(ignore=["nut"]))
    assert made.classes == ["bolt"]
    assert sum(map(sum, (counts.values() for counts in made.counts.values()))) == 6


def masks(folder: Path, images: str, masks: str, array: np.ndarray, labelmap="") -> Path:
    for number in range(2):
        picture(folder / images / f"{number}.JPEG")
        (folder / masks).mkdir(exist_ok=True)
        Image.fromarray(array).save(folder / masks / f"{number}.png")
    if labelmap:
        (folder / "labelmap.txt").write_text(labelmap)
    return folder


def test_colours_become_numbers(tmp_path):
    labels = np.zeros((HEIGHT, WIDTH), np.uint8)
    labels[5:9], labels[9:12], labels[20:] = 1, 2, 255
    palette = np.zeros((256, 3), np.uint8)
    palette[[1, 2, 255]] = (250, 50, 83), (51, 221, 255), (1, 1, 1)
    text = "# label:color_rgb:parts:actions\nbackground:0,0,0::\nroad:250,50,83::\n"
    text += "car:51,221,255::\nrim:1,1,1::\n"
    source = masks(tmp_path / "in", "JPEGImages", "SegmentationClass", palette[labels], text)
    made = prepare_dataset("masks", source, tmp_path / "out", Options(ignore=["rim"]))
    assert made.classes == ["background", "road", "car"]
    for file in (tmp_path / "out/masks").rglob("*.png"):
        np.testing.assert_array_equal(np.array(Image.open(file)), labels)
    assert made.suffix == ".jpg"
    assert len(list((tmp_path / "out/images").rglob("*.jpg"))) == 2
    # Two shades.
    shades = np.where(labels == 1, 255, 0).astype(np.uint8)
    text = "background:0,0,0::\nroad:255,255,255::"
    source = masks(tmp_path / "two", "images", "masks", shades, text)
    prepare_dataset("masks", source, tmp_path / "shades", Options())
    for file in (tmp_path / "shades/masks").rglob("*.png"):
        np.testing.assert_array_equal(np.array(Image.open(file)), labels == 1)
    # Numbers stay.
    source = masks(tmp_path / "three", "images", "masks", labels)
    prepare_dataset("masks", source, tmp_path / "numbers", Options(["background", "a", "b"]))
    for file in (tmp_path / "numbers/masks").rglob("*.png"):
        np.testing.assert_array_equal(np.array(Image.open(file)), labels)


def folders(folder: Path, **numbers: int) -> Path:
    for name, number in numbers.items():
        (folder / name).mkdir(parents=True)
        for index in range(number):
            picture(folder / name / f"{index}.jpg")
    return folder


def test_every_class_is_in_both_splits(tmp_path):
    source = folders(tmp_path / "in", dog=10, cat=5, rare=2)
    (source / ".ipynb_checkpoints").mkdir()
    picture(source / "cat/.hidden.jpg")
    (source / "cat/notes.txt").touch()
    made = prepare_dataset("images", source, tmp_path / "out", Options())
    assert made.classes == ["cat", "dog", "rare"]
    assert made.counts["train"] == {"cat": 4, "dog": 8, "rare": 1}
    assert made.counts["val"] == {"cat": 1, "dog": 2, "rare": 1}
    assert len(list((tmp_path / "out").rglob("*.jpg"))) == 17


def turned(folder: Path) -> Path:
    """A phone's picture: lying pixels, and a note that it stands."""
    labelme(folder, [shape("a", SQUARE)], imageWidth=HEIGHT, imageHeight=WIDTH)
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("0.jpg", "1.jpg"):
        picture(folder / name, exif=exif)
    return folder


def test_pictures_are_turned_as_labelme_shows_them(tmp_path):
    prepare_dataset("boxes", turned(tmp_path / "in"), tmp_path / "out", Options())
    for name in ("train", "val"):
        content = json.loads((tmp_path / f"out/annotations/{name}.json").read_text())
        assert [(one["width"], one["height"]) for one in content["images"]] == [(HEIGHT, WIDTH)]


def without_image(folder: Path) -> Path:
    labelme(folder, [shape("a", SQUARE)])
    (folder / "0.jpg").unlink()
    return folder


def damaged(folder: Path) -> Path:
    labelme(folder, [shape("a", SQUARE)])
    (folder / "1.json").write_text("{")
    return folder


def foreign(folder: Path) -> Path:
    labelme(folder, [shape("a", SQUARE)])
    (folder / "z.json").write_text("{}")
    return folder


def coco_without_image(folder: Path) -> Path:
    cvat_boxes(folder)
    (folder / "images/default/camera/3.png").unlink()
    return folder


def coco_counted_from_0(folder: Path) -> Path:
    [file] = cvat_boxes(folder).glob("annotations/*.json")
    content = json.loads(file.read_text())
    for one in content["annotations"]:
        one["category_id"] -= 1
    file.write_text(json.dumps(content))
    return folder


def coco_beside_images(folder: Path) -> Path:
    [file] = cvat_boxes(folder).glob("annotations/*.json")
    file.rename(folder / "boxes.json")
    return folder


def two_coco_files(folder: Path) -> Path:
    cvat_boxes(folder)
    text = (folder / "annotations/instances_default.json").read_text()
    (folder / "annotations/instances_val.json").write_text(text)
    return folder


def mixed(folder: Path) -> Path:
    masks(folder, "images", "masks", np.ones((HEIGHT, WIDTH), np.uint8))
    (folder / "images/0.JPEG").rename(folder / "images/0.png")
    return folder


def without_mask(folder: Path) -> Path:
    masks(folder, "images", "masks", np.ones((HEIGHT, WIDTH), np.uint8))
    (folder / "masks/1.png").unlink()
    return folder


def map_of(values: tuple[int, ...], labelmap: str = "", size=(HEIGHT, WIDTH), mode: str = "L"):
    def make(folder: Path) -> Path:
        array = np.resize(np.array(values, np.uint8), size)
        if mode == "RGB":
            array = np.stack([array] * 3, -1)
        return masks(folder, "images", "masks", array, labelmap)

    return make


def shapes_of(*shapes: dict, **changes):
    return lambda folder: labelme(folder, list(shapes), **changes)


TWO = Options(["background", "road"])
FAULTS = [
    ("boxes", Path, Options(), r"does not exist"),
    ("boxes", lambda f: folders(f, a=2), Options(), r"no labelme JSON file.*own_data\.md"),
    ("boxes", damaged, Options(), r"1\.json is damaged, it is no JSON"),
    ("boxes", foreign, Options(), r"z\.json is not a labelme file: it has no 'shapes'"),
    ("boxes", without_image, Options(), r"0\.json: its image .*0\.jpg is not there"),
    (
        "boxes",
        shapes_of(shape("a", SQUARE), imageWidth=50),
        Options(),
        r"0\.json is for an image of 50x30 pixels, .*0\.jpg has 40x30",
    ),
    (
        "boxes",
        shapes_of(shape("blot", SQUARE)),
        Options(["bolt", "nut"]),
        r"0\.json: the label 'blot' is not in --classes .*did you mean 'bolt'\?",
    ),
    (
        "boxes",
        shapes_of(shape("a", SQUARE[:2], "line")),
        Options(),
        r"0\.json: 'a' is a line of 2 points, which encloses nothing.*--ignore 'a'",
    ),
    (
        "boxes",
        coco_without_image,
        Options(),
        r"no files in .* are its image 'camera/3\.png'; expected one.*Save images",
    ),
    (
        "boxes",
        coco_counted_from_0,
        Options(),
        r"annotation 1 has the category_id 0, but the ids of the file's categories are 1, 2\.",
    ),
    ("boxes", coco_beside_images, Options(), r"boxes\.json is a COCO file: name it in place of"),
    ("boxes", two_coco_files, Options(), r"has 2 COCO files: name the one.*instances_val"),
    ("boxes", cvat_boxes, Options(["bolt"]), r"the label 'nut' is not in --classes"),
    ("masks", map_of((0, 1)), Options(), r"has numbers without names: .*--classes"),
    ("masks", map_of((0, 255)), TWO, r"have only the values 0 and 255.*labelmap\.txt"),
    ("masks", map_of((0, 128)), TWO, r"[01]\.png has the values 0, 128 for 2 classes.*shades"),
    ("masks", map_of((0, 9), mode="RGB"), TWO, r"[01]\.png is a colour picture \(RGB\)"),
    ("masks", map_of((0, 1), size=(9, 9)), TWO, r"[01]\.png has 9x9 pixels, .*JPEG has 40x30"),
    ("masks", map_of((0, 9), "road:0,0,0::"), Options(), r"the colour \(9, 9, 9\) is not in"),
    ("masks", map_of((0, 9), "road"), Options(), r"expected NAME:R,G,B::, found 'road'"),
    ("masks", mixed, TWO, r"several file types \(1 \.\w+, 1 \.\w+\).*Save all of them in one"),
    ("masks", without_mask, TWO, r"1\.JPEG has no mask in"),
    ("images", lambda f: folders(f, cat=4, dog=1), Options(), r"dog: 1 images found; at least two"),
    ("images", lambda f: folders(f, train=4, val=4), Options(), r"is already split into"),
    ("images", lambda f: folders(f, cat=4), Options(["cat", "dog"]), r"no folder 'dog'"),
    (
        "images",
        lambda f: labelme(f, []),
        Options(),
        r"has no folders; expected one folder for each",
    ),
]


@pytest.mark.parametrize(("task", "make", "options", "message"), FAULTS, ids=[f[3] for f in FAULTS])
def test_faults_are_named_and_nothing_is_written(task, make, options, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        prepare_dataset(task, make(tmp_path / "in"), tmp_path / "out", options)
    assert {path.name for path in tmp_path.iterdir()} <= {"in"}


def test_files_are_not_mixed_with_older_ones(tmp_path):
    source = folders(tmp_path / "in", cat=4)
    prepare_dataset("images", source, tmp_path / "out", Options())
    with pytest.raises(UsageError, match="already contains files"):
        prepare_dataset("images", source, tmp_path / "out", Options())
