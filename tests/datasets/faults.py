"""Faults for a data set's files, and what becomes of a training that meets them.

Each fault changes one image, annotation map or entry. Its outcome is that the file is `USED` as it
is, `LEFT_OUT` with a count in the log, or `REFUSED` by its name.
"""

import io
import json
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from pycocotools import mask as mask_api

USED, LEFT_OUT, REFUSED = "used", "left out", "refused"
OPENCV = tuple(map(int, cv2.__version__.split(".")[:2]))


@dataclass(frozen=True)
class Fault:
    """A fault of one file.

    Attributes:
        apply: Changes a data set's files, given its folder, the split ('train' or 'val') and which
            of the split's images is meant; returns what an error must name.
        outcome: What becomes of it.
    """

    apply: Callable[[Path, str, int], str]
    outcome: str


def encode(picture: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def turned(orientation: int) -> Callable[[Image.Image], bytes]:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return lambda picture: encode(picture, "JPEG", exif=exif)


def animated(kind: str) -> Callable[[Image.Image], bytes]:
    return lambda p: encode(p, kind, save_all=True, append_images=[p.rotate(180)])


def sixteen_bits(picture: Image.Image) -> bytes:
    return encode(Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) << 8), "PNG")


def huge(_) -> bytes:
    """A PNG of a few hundred bytes whose header asks for 60000 x 60000 pixels."""
    data = encode(Image.new("1", (8, 8)), "PNG")
    header = b"IHDR" + (60000).to_bytes(4, "big") * 2 + data[24:29]
    return data[:12] + header + zlib.crc32(header).to_bytes(4, "big") + data[33:]


# What an image's file is replaced by, from the picture that it held.
PICTURES: dict[str, tuple[Callable[[Image.Image], bytes | None], str]] = {
    "cut jpeg": (lambda p: encode(p, "JPEG")[:-200], REFUSED),
    "cut png": (lambda p: encode(p, "PNG")[:-200], REFUSED),
    "header alone": (lambda p: encode(p, "JPEG")[:100], REFUSED),
    "empty file": (lambda _: b"", REFUSED),
    "zeros": (lambda _: bytes(5000), REFUSED),
    "web page": (lambda _: b"<!DOCTYPE html><html>404 Not Found</html>", REFUSED),
    "missing": (lambda _: None, REFUSED),
    "decompression bomb": (huge, REFUSED),
    "png": (lambda p: encode(p, "PNG"), USED),
    "webp": (lambda p: encode(p, "WEBP"), USED),
    "gray": (lambda p: encode(p.convert("L"), "JPEG"), USED),
    "cmyk": (lambda p: encode(p.convert("CMYK"), "JPEG"), USED),
    "alpha": (lambda p: encode(p.convert("RGBA"), "PNG"), USED),
    "palette": (lambda p: encode(p.convert("P"), "PNG"), USED),
    "sixteen bits": (sixteen_bits, USED),
    # OpenCV reads them from 4.11 on.
    "animated gif": (animated("GIF"), USED if OPENCV >= (4, 11) else REFUSED),
    "animated png": (animated("PNG"), USED),
    "upside down by exif": (turned(3), USED),
    "progressive": (lambda p: encode(p, "JPEG", progressive=True), USED),
}


def replace(path: Path, data: bytes | None) -> str:
    if data is None:
        path.unlink()
    else:
        path.write_bytes(data)
    return path.name


def on_its_side(picture: Image.Image) -> bytes:
    """EXIF data that turn an image which is not square: otherwise nobody could tell."""
    if picture.width == picture.height:
        picture = picture.crop((0, 0, picture.width // 2, picture.height))
    return turned(6)(picture)


# Those whose size does not fit the annotations, where there are any of a size.
RESIZED = {
    "on its side by exif": on_its_side,
    "one pixel": lambda p: encode(p.resize((1, 1)), "JPEG"),
    "a row": lambda p: encode(p.resize((p.width, 1)), "JPEG"),
    "another size": lambda p: encode(p.resize((p.width + 3, p.height)), "JPEG"),
}


def on_picture(images: Callable[[Path, str], list[Path]], make):
    def apply(root, split, index):
        found = images(root, split)
        # Another fault may have taken one away.
        path = found[index % len(found)]
        with Image.open(path) as picture:
            return replace(path, make(picture.convert("RGB")))

    return apply


def picture_faults(images: Callable[[Path, str], list[Path]], sized: bool) -> dict[str, Fault]:
    faults = {
        name: Fault(on_picture(images, make), outcome) for name, (make, outcome) in PICTURES.items()
    }
    for name, make in RESIZED.items():
        faults[name] = Fault(on_picture(images, make), REFUSED if sized else USED)
    return faults


# COCO


def coco_file(root: Path, split: str) -> Path:
    return root / "annotations" / f"instances_{split}2017.json"


def coco_images(root: Path, split: str) -> list[Path]:
    return sorted((root / f"{split}2017").glob("*.jpg"))


def on_coco(change: Callable[[dict, dict, list[dict]], None], whole_file: bool = False):
    """A fault of a file's content, of an image's entry and its annotations."""

    def apply(root, split, index):
        path = coco_file(root, split)
        content = json.loads(path.read_text())
        image = sorted(content["images"], key=lambda image: image["file_name"])[index]
        own = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        change(content, image, own)
        path.write_text(json.dumps(content))
        return path.name if whole_file else image["file_name"]

    return apply


def on_first(**values) -> Callable:
    """Sets entries of an image's first annotation."""
    return on_coco(lambda _, __, own: own[0].update(values))


def set_mask(make: Callable[[int, int], object], **values) -> Callable:
    def change(_, image, own):
        own[0].update(segmentation=make(image["height"], image["width"]), **values)

    return on_coco(change)


def runs(height: int, width: int, compressed: bool = True) -> dict:
    mask = np.zeros((height, width), np.uint8, order="F")
    mask[height // 4 : height // 2, width // 4 : width // 2] = 1
    if not compressed:
        ends = np.flatnonzero(np.diff(mask.ravel(order="F"), prepend=0, append=2)).tolist()
        counts = np.diff([0, *ends]).tolist()
        return {"size": [height, width], "counts": counts}
    encoded = mask_api.encode(mask)
    return {"size": [height, width], "counts": encoded["counts"].decode()}


def without_annotations(content, image, own):
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != image["id"]]


def crowds_alone(_, image, own):
    for annotation in own:
        annotation.update(iscrowd=1, segmentation=runs(image["height"], image["width"]))


def add(key: str, *change: Callable[[dict], None]):
    def apply(content, image, own):
        entry = dict(own[0] if key == "annotations" else image)
        for one in change:
            one(entry)
        content[key].append(entry)

    return apply


def cut_file(path: Callable[[Path, str], Path]):
    def apply(root, split, _):
        file = path(root, split)
        file.write_bytes(file.read_bytes()[:-100])
        return file.name

    return apply


NAN, INF = float("nan"), float("inf")
FAR = [[1.0, 1.0, 1e9, 1.0, 1.0, 9.0]]
COCO = {
    **picture_faults(coco_images, sized=True),
    "box without area": Fault(on_first(bbox=[5.0, 5.0, 0.0, 0.0]), LEFT_OUT),
    "box of negative size": Fault(on_first(bbox=[50.0, 50.0, -9.0, -9.0]), LEFT_OUT),
    "box outside": Fault(on_first(bbox=[5000.0, 5.0, 20.0, 20.0]), LEFT_OUT),
    "no area": Fault(on_first(area=0), LEFT_OUT),
    "unknown category": Fault(on_first(category_id=999), LEFT_OUT),
    "to be ignored": Fault(on_first(ignore=1), LEFT_OUT),
    "annotation of no image": Fault(
        on_coco(add("annotations", lambda a: a.update(id=10**6, image_id=10**6))), LEFT_OUT
    ),
    "box partly outside": Fault(on_first(bbox=[-20.0, -20.0, 60.0, 50.0]), USED),
    "polygon partly outside": Fault(
        set_mask(lambda h, w: [[-9.0, -9.0, w + 9.0, 5.0, 9.0, h + 9.0]]), USED
    ),
    "crowds alone": Fault(on_coco(crowds_alone), USED),
    "compressed mask": Fault(set_mask(runs), USED),
    "uncompressed mask": Fault(set_mask(lambda h, w: runs(h, w, compressed=False)), USED),
    "empty mask": Fault(set_mask(lambda h, w: {"size": [h, w], "counts": [h * w]}), USED),
    "masks mixed": Fault(
        on_coco(lambda _, i, own: own[-1].update(segmentation=runs(i["height"], i["width"]))), USED
    ),
    "box with nan": Fault(on_first(bbox=[5.0, NAN, 20.0, 20.0]), REFUSED),
    "box with infinity": Fault(on_first(bbox=[5.0, 5.0, INF, 20.0]), REFUSED),
    "box of three": Fault(on_first(bbox=[5.0, 5.0, 20.0]), REFUSED),
    "box of text": Fault(on_first(bbox=["5", "5", "20", "20"]), REFUSED),
    "polygon with nan": Fault(on_first(segmentation=[[1.0, NAN, 9.0, 1.0, 9.0, 9.0]]), REFUSED),
    "polygon far away": Fault(on_first(segmentation=FAR), REFUSED),
    "mask of another size": Fault(set_mask(lambda h, w: runs(h + 1, w)), REFUSED),
    "huge mask": Fault(set_mask(lambda h, w: {**runs(h, w), "size": [10**6, 10**6]}), REFUSED),
    "short mask": Fault(set_mask(lambda h, w: {"size": [h, w], "counts": [0, 10]}), REFUSED),
    "long mask": Fault(set_mask(lambda h, w: {"size": [h, w], "counts": [h * w, 5]}), REFUSED),
    "negative run": Fault(
        set_mask(lambda h, w: {"size": [h, w], "counts": [-5, h * w + 5]}), REFUSED
    ),
    "garbage mask": Fault(
        set_mask(lambda h, w: {"size": [h, w], "counts": "no runs at all"}), REFUSED
    ),
    "another height": Fault(
        on_coco(
            lambda _, image, own: (
                image.update(height=image["height"] + 1) or own[0].update(segmentation=[])
            )
        ),
        REFUSED,
    ),
    "image without a size": Fault(
        on_coco(lambda _, image, own: image.pop("height"), whole_file=True), REFUSED
    ),
    "annotation without a box": Fault(
        on_coco(lambda _, __, own: own[0].pop("bbox"), whole_file=True), REFUSED
    ),
    "image twice": Fault(on_coco(add("images"), whole_file=True), REFUSED),
    "annotation twice": Fault(on_coco(add("annotations"), whole_file=True), REFUSED),
    "cut file": Fault(cut_file(coco_file), REFUSED),
    "no json": Fault(
        lambda root, split, _: replace(coco_file(root, split), b"<html>404</html>"), REFUSED
    ),
}
# Which differ between a training, whose pipeline leaves them out, and a test.
NO_POLYGON = {
    "two points": on_first(segmentation=[[1.0, 1.0, 9.0, 9.0]]),
    "one point": on_first(segmentation=[[1.0, 1.0]]),
    "odd numbers": on_first(segmentation=[[1.0, 1.0, 9.0, 9.0, 5.0, 5.0, 3.0]]),
}


# ADE20K


def ade_images(root: Path, split: str) -> list[Path]:
    folder = {"train": "training", "val": "validation"}[split]
    return sorted((root / "images" / folder).glob("*.jpg"))


def ade_map(root: Path, split: str, index: int) -> Path:
    found = ade_images(root, split)
    image = found[index % len(found)]
    return root / "annotations" / image.parent.name / f"{image.stem}.png"


def on_map(change: Callable[[np.ndarray], np.ndarray | Image.Image | bytes | None]):
    def apply(root, split, index):
        path = ade_map(root, split, index)
        with Image.open(path) as picture:
            changed = change(np.array(picture))
        if isinstance(changed, np.ndarray):
            changed = Image.fromarray(changed)
        if isinstance(changed, Image.Image):
            changed = encode(changed, "PNG")
        return replace(path, changed)

    return apply


def with_label(label: int):
    def change(labels):
        labels[2:5, 3:7] = label
        return labels

    return change


def stray(name: str, folder: Callable[[Path, str], Path]):
    def apply(root, split, _):
        (folder(root, split) / name).write_bytes(b"stray")
        return name

    return apply


ADE = {
    **picture_faults(ade_images, sized=True),
    # What is in the folder is the list: its map is left over.
    "missing": Fault(on_picture(ade_images, lambda _: None), LEFT_OUT),
    "label 151": Fault(on_map(with_label(151)), REFUSED),
    "label 254": Fault(on_map(with_label(254)), REFUSED),
    "label 255": Fault(on_map(with_label(255)), USED),
    "no labels": Fault(on_map(np.zeros_like), USED),
    "palette map": Fault(on_map(lambda labels: Image.fromarray(labels, "P")), USED),
    "map of another size": Fault(on_map(lambda labels: labels[:-3]), REFUSED),
    "map of colours": Fault(on_map(lambda labels: np.stack([labels] * 3, -1)), REFUSED),
    "map of 16 bits": Fault(on_map(lambda labels: labels.astype(np.uint16)), USED),
    "labels of 16 bits": Fault(on_map(lambda labels: labels.astype(np.uint16) + 256), REFUSED),
    "map missing": Fault(on_map(lambda _: None), REFUSED),
    "map cut": Fault(on_map(lambda labels: encode(Image.fromarray(labels), "PNG")[:-60]), REFUSED),
    "map empty": Fault(on_map(lambda _: b""), REFUSED),
    "stray text": Fault(stray("notes.txt", lambda *at: ade_images(*at)[0].parent), LEFT_OUT),
    "image of another suffix": Fault(
        stray("one.jpeg", lambda *at: ade_images(*at)[0].parent), LEFT_OUT
    ),
    "map without image": Fault(stray("map.png", lambda *at: ade_map(*at, 0).parent), LEFT_OUT),
}


# ImageNet


def imagenet_list(root: Path, split: str) -> Path:
    return root / "meta" / f"{split}.txt"


def imagenet_images(root: Path, split: str) -> list[Path]:
    lines = imagenet_list(root, split).read_text().splitlines()
    return [root / split / line.split()[0] for line in lines if line]


def on_line(change: Callable[[str, str], str], whole_file: bool = False):
    def apply(root, split, index):
        path = imagenet_list(root, split)
        lines = path.read_text().splitlines()
        name, label = lines[index].split()
        lines[index] = change(name, label)
        path.write_text("\n".join(lines) + "\n")
        return path.name if whole_file else Path(name).name

    return apply


IMAGENET = {
    **picture_faults(imagenet_images, sized=False),
    "label 1000": Fault(on_line(lambda name, _: f"{name} 1000"), REFUSED),
    "label -1": Fault(on_line(lambda name, _: f"{name} -1"), REFUSED),
    "no label": Fault(on_line(lambda name, _: name, whole_file=True), REFUSED),
    "label of text": Fault(on_line(lambda name, _: f"{name} cat", whole_file=True), REFUSED),
    "blank line": Fault(on_line(lambda *_: "", whole_file=True), REFUSED),
    "listed twice": Fault(on_line(lambda name, label: f"{name} {label}\n{name} {label}"), USED),
}

FAULTS = {"mmdet": COCO, "mmseg": ADE, "mmpretrain": IMAGENET}
DATA = {"mmdet": "coco", "mmseg": "ADEChallengeData2016", "mmpretrain": "imagenet"}


def copy_of(sample_data: Path, task: str, folder: Path) -> Path:
    """An own copy of a task's data."""
    return Path(shutil.copytree(sample_data / DATA[task], folder / DATA[task]))
