"""A user's own annotated images, as `configs/finetune` reads them: split, named and numbered.

Read are labelme's JSON files, COCO files and CVAT's mask exports, masks of labels, and folders of
images by class. Nothing of the source is changed.
"""

import base64
import io
import json
import logging
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

import numpy as np
from mmengine.logging import print_log
from PIL import Image, ImageDraw, UnidentifiedImageError
from rich.console import Console
from rich.progress import track

from mmvmamba.engine.class_names import names_of, near_name
from mmvmamba.engine.coco_file import complete
from mmvmamba.engine.errors import DataError, UsageError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
"""Of the files that count as pictures in a folder: what OpenCV and Pillow read."""
TASKS = ("boxes", "masks", "images")
BACKGROUND, NO_CLASS = "background", 255
# Where masks lie beside images: CVAT's "Segmentation mask 1.1" and Pascal VOC, and the plain way.
FOLDERS = (("JPEGImages", "SegmentationClass"), ("images", "masks"))
EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True)
class Options:
    """What a user may say of a data set.

    Attributes:
        classes: The classes in the order of their labels; None for all that are found.
        ignore: Labels that are no class: such objects are left out, such pixels are 255.
        share: The part of the images that validates.
        seed: Of the draw.
    """

    classes: Sequence[str] | None = None
    ignore: Sequence[str] = ()
    share: float = 0.2
    seed: int = 0


@dataclass(frozen=True)
class Prepared:
    """What was written.

    Attributes:
        classes: In the order of their labels.
        what: What is counted: 'objects' or 'images'.
        counts: How many of each class there are, by split.
        images: How many images there are, by split.
        suffix: That of the images; None where any will do.
    """

    classes: list[str]
    what: str
    counts: dict[str, Counter]
    images: dict[str, int]
    suffix: str | None = None


def prepare_dataset(task: str, source: Path, out: Path, options: Options) -> Prepared:
    """Writes a data set for a config of `configs/finetune`.

    Args:
        task: 'boxes', 'masks' or 'images', as the configs are named.
        source: What the user has; see the module.
        out: The data root to write, which must not have files yet.
        options: What the user says of it.

    Raises:
        UsageError: If something does not fit; nothing is written then.
    """
    source, out = source.expanduser(), out.expanduser()
    if not source.exists():
        raise UsageError(f"{source} does not exist (working directory: {Path.cwd()}).")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(
            f"{out} already contains files, and the new ones would be mixed with them. Delete it, "
            "or choose another folder."
        )
    prepare = {"boxes": _prepare_boxes, "masks": _prepare_masks, "images": _prepare_images}[task]
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as folder:
        made = Path(folder, "made")
        prepared = prepare(source, made, options)
        made.rename(out)
    return prepared


def split(items: Sequence, options: Options, what: str) -> dict[str, list]:
    """Draws the items that validate, at least one; the others train.

    Raises:
        DataError: If there are fewer than two.
    """
    if len(items) < 2:
        raise DataError(
            f"{what}: {len(items)} images found; at least two are needed, one for training "
            "and one for validation."
        )
    order = list(range(len(items)))
    random.Random(options.seed).shuffle(order)
    number = min(max(1, round(options.share * len(items))), len(items) - 1)
    drawn = set(order[:number])
    return {
        "train": [item for index, item in enumerate(items) if index not in drawn],
        "val": [item for index, item in enumerate(items) if index in drawn],
    }


# Files.


def find_pictures(folder: Path) -> list[Path]:
    """The pictures of a folder and its sub-folders, without hidden ones."""
    return [path for path in _visible(folder, "*") if path.suffix.lower() in SUFFIXES]


def _visible(folder: Path, pattern: str) -> list[Path]:
    return [
        path
        for path in sorted(folder.rglob(pattern))
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]


def _copy(file: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(file, target)


def _tracked(items: Sequence, description: str) -> Iterable:
    return track(items, description, console=Console(stderr=True), transient=True)


def _picture_size(file: Path) -> tuple[int, int]:
    """Width and height, turned as the EXIF data say: as labelme shows it and mmdet loads it."""
    try:
        with Image.open(file) as image:
            turned = image.getexif().get(EXIF_ORIENTATION, 1) >= 5
            return image.size[::-1] if turned else image.size
    except (OSError, UnidentifiedImageError) as error:
        raise DataError(f"{file} cannot be read as a picture: {error}") from error


def _read_json(file: Path) -> dict:
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise DataError(f"{file} is damaged, it is no JSON: {error}") from error
    return content if isinstance(content, dict) else {}


def _order_classes(found: dict[str, Path], options: Options) -> list[str]:
    """The classes in the order of their labels.

    Args:
        found: The names that there are, and a file that has each.
        options: The user's.

    Raises:
        DataError: If a name is of no class.
    """
    names = [name for name in found if name not in options.ignore]
    if options.classes is None:
        return sorted(names)
    for name in names:
        if name not in options.classes:
            raise DataError(
                f"{found[name]}: the label {name!r} is not in --classes "
                f"({names_of(options.classes)}){near_name(name, options.classes)}. Correct it in "
                f"the file, add it to --classes, or leave it out: --ignore {name!r}."
            )
    return list(options.classes)


# labelme.


@dataclass(frozen=True)
class Labelled:
    """An image and what labelme noted of it.

    Attributes:
        file: The image.
        name: Its path in the new data set.
        notes: labelme's file.
        size: Width and height.
        shapes: The shapes.
    """

    file: Path
    name: PurePosixPath
    notes: Path
    size: tuple[int, int]
    shapes: list[dict]


def read_labelme(source: Path, ignore: Sequence[str]) -> list[Labelled]:
    """Reads a folder of labelme's JSON files, without the shapes that are to be ignored.

    Raises:
        DataError: If there is none, one is damaged, or its image is missing or of another size.
    """
    files = _visible(source, "*.json") if source.is_dir() else [source]
    found = []
    for file in _tracked(files, "reading"):
        content = _read_json(file)
        if {"images", "annotations"} <= content.keys():
            raise DataError(f"{file} is a COCO file: name it in place of the folder {source}.")
        if not isinstance(content.get("shapes"), list):
            raise DataError(
                f"{file} is not a labelme file: it has no 'shapes'. Move it out of {source}, "
                "which should contain images and one JSON file for each."
            )
        image = _image_of(file, content)
        size = _picture_size(image)
        noted = content.get("imageWidth"), content.get("imageHeight")
        if None not in noted and noted != size:
            raise DataError(
                f"{file} is for an image of {noted[0]}x{noted[1]} pixels, {image} has "
                f"{size[0]}x{size[1]}. Give it the image that was annotated."
            )
        shapes = [one for one in content["shapes"] if one.get("label") not in ignore]
        name = PurePosixPath(image.relative_to(source) if source in image.parents else image.name)
        found.append(Labelled(image, name, file, size, shapes))
    twice = [name for name, count in Counter(one.name for one in found).items() if count > 1]
    if twice:
        raise DataError(f"{source} has more than one JSON for the image {twice[0]}.")
    if not found:
        raise DataError(
            f"{source} has no labelme JSON file, no COCO file annotations/*.json and no "
            "folders images/ and masks/. docs/own_data.md lists the supported layouts."
        )
    without = len(set(find_pictures(source)) - {one.file for one in found})
    if without:
        _warn(f"{without} images in {source} have no JSON file and are skipped.")
    return found


def _warn(text: str) -> None:
    print_log(text, logger="current", level=logging.WARNING)


def _image_of(file: Path, content: dict) -> Path:
    noted = file.parent / str(content.get("imagePath") or "").replace("\\", "/")
    beside = [file.with_suffix(suffix) for suffix in (*SUFFIXES, *map(str.upper, SUFFIXES))]
    for image in (noted, *beside):
        if image.is_file():
            return image
    raise DataError(f"{file}: its image {noted} is not there. Put it beside the JSON.")


def _outline(shape: dict, file: Path) -> np.ndarray:
    """The corners of a shape, (N, 2)."""
    kind, points = shape.get("shape_type") or "polygon", np.array(shape["points"], float)
    if kind == "rectangle" and len(points) >= 2:
        (left, top), (right, bottom) = points.min(0), points.max(0)
        return np.array([[left, top], [right, top], [right, bottom], [left, bottom]])
    if kind == "circle" and len(points) == 2:
        angles = np.linspace(0, 2 * np.pi, 64, endpoint=False)
        circle = np.stack([np.cos(angles), np.sin(angles)], 1)
        return points[0] + np.linalg.norm(points[1] - points[0]) * circle
    if kind == "polygon" and len(points) >= 3:
        return points
    raise DataError(
        f"{file}: {shape['label']!r} is a {kind} of {len(points)} points, which encloses nothing. "
        "Draw a polygon, a rectangle or a circle instead, delete it, or leave its label out: "
        f"--ignore {shape['label']!r}."
    )


def _paint(labels: np.ndarray, shape: dict, value: int, file: Path) -> np.ndarray:
    """A map of labels, (H, W), with a shape painted over it."""
    if shape.get("shape_type") != "mask":
        image = Image.fromarray(labels)
        corners = [tuple(point) for point in _outline(shape, file)]
        ImageDraw.Draw(image).polygon(corners, fill=value, outline=value)
        return np.array(image)
    with Image.open(io.BytesIO(base64.b64decode(shape["mask"]))) as image:
        bits = np.array(image).astype(bool)
    left, top = (round(one) for one in shape["points"][0])
    painted = labels.copy()
    part = painted[top : top + bits.shape[0], left : left + bits.shape[1]]
    part[bits[: part.shape[0], : part.shape[1]]] = value
    return painted


def _coco_object(shapes: list[dict], one: Labelled) -> dict:
    """Box and mask of an object, which may have several parts."""
    if any(shape.get("shape_type") == "mask" for shape in shapes):
        from pycocotools import mask as mask_api

        bits = np.zeros(one.size[::-1], np.uint8)
        for shape in shapes:
            bits = _paint(bits, shape, 1, one.notes)
        runs = mask_api.encode(np.asfortranarray(bits))
        box = mask_api.toBbox(runs).tolist()
        mask = {"size": list(map(int, runs["size"])), "counts": runs["counts"].decode()}
        return {"bbox": box, "segmentation": mask}
    outlines = [_outline(shape, one.notes).clip(0, one.size) for shape in shapes]
    (left, top), (right, bottom) = (
        limit(np.concatenate(outlines), axis=0).tolist() for limit in (np.min, np.max)
    )
    polygons = [outline.ravel().tolist() for outline in outlines]
    return {"bbox": [left, top, right - left, bottom - top], "segmentation": polygons}


def _labels_of(labelled: Sequence[Labelled]) -> dict[str, Path]:
    return {str(shape["label"]): one.notes for one in labelled for shape in one.shapes}


# Boxes.


def _prepare_boxes(source: Path, out: Path, options: Options) -> Prepared:
    coco = _find_coco(source)
    content, files = _read_coco(*coco, options) if coco else _coco_of_labelme(source, options)
    names = {one["id"]: one["name"] for one in content["categories"]}
    parts = split(content["images"], options, str(source))
    counts = {}
    (out / "annotations").mkdir(parents=True)
    for name, images in parts.items():
        ids = {image["id"] for image in images}
        annotations = [one for one in content["annotations"] if one["image_id"] in ids]
        counts[name] = Counter(names[one["category_id"]] for one in annotations)
        part = {**content, "images": images, "annotations": annotations}
        (out / f"annotations/{name}.json").write_text(json.dumps(part))
        for image in _tracked(images, f"copying the {name} images"):
            _copy(files[image["id"]], out / name / image["file_name"])
    images = {name: len(part) for name, part in parts.items()}
    return Prepared(list(names.values()), "objects", counts, images)


def _coco_of_labelme(source: Path, options: Options) -> tuple[dict, dict[int, Path]]:
    labelled = read_labelme(source, options.ignore)
    classes = _order_classes(_labels_of(labelled), options)
    images, annotations = [], []
    for number, one in enumerate(labelled, 1):
        width, height = one.size
        images.append({"id": number, "file_name": str(one.name), "width": width, "height": height})
        objects: dict[object, list[dict]] = {}
        for index, shape in enumerate(one.shapes):
            # Shapes of one label and group are parts of one object.
            group = shape.get("group_id")
            key = ("single", index) if group is None else (shape["label"], group)
            objects.setdefault(key, []).append(shape)
        for shapes in objects.values():
            numbers = {"id": len(annotations) + 1, "image_id": number}
            numbers["category_id"] = classes.index(str(shapes[0]["label"])) + 1
            annotations.append(numbers | _coco_object(shapes, one))
    categories = [{"id": number, "name": name} for number, name in enumerate(classes, 1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    complete(content)
    return content, dict(enumerate((one.file for one in labelled), 1))


def _find_coco(source: Path) -> tuple[Path, dict] | None:
    """The COCO file of a source and its content, None if it is a folder of labelme's."""
    if source.is_file():
        return source, _read_json(source)
    contents = {file: _read_json(file) for file in sorted((source / "annotations").glob("*.json"))}
    files = [file for file, one in contents.items() if {"images", "annotations"} <= one.keys()]
    if len(files) > 1:
        raise UsageError(
            f"{source}/annotations has {len(files)} COCO files: name the one to split instead of "
            f"the folder ({', '.join(file.name for file in files)}). If they are train and val "
            "already, rename them to annotations/train.json and val.json: there is nothing to "
            "prepare then."
        )
    return (files[0], contents[files[0]]) if files else None


def _read_coco(file: Path, content: dict, options: Options) -> tuple[dict, dict[int, Path]]:
    """A COCO file's content without what is ignored, and its images' files by id."""
    if not {"images", "annotations", "categories"} <= content.keys():
        raise DataError(f"{file} is not a COCO file: it has no images, annotations or categories.")
    categories = [one for one in content["categories"] if one["name"] not in options.ignore]
    classes = _order_classes({one["name"]: file for one in categories}, options)
    if options.classes is not None:
        categories.sort(key=lambda one: classes.index(one["name"]))
    names = {one["id"]: one["name"] for one in content["categories"]}
    unlisted = [one for one in content["annotations"] if one["category_id"] not in names]
    if unlisted:
        raise DataError(
            f"{file}: annotation {unlisted[0].get('id')} has the category_id "
            f"{unlisted[0]['category_id']!r}, but the ids of the file's categories are "
            f"{names_of(names)}. If one list counts from 0 and the other from 1, every object has "
            "a wrong class: correct the file."
        )
    annotations = [one for one in content["annotations"] if names[one["category_id"]] in classes]
    folder = file.parent.parent if file.parent.name == "annotations" else file.parent
    by_name: dict[str, list[Path]] = {}
    for path in find_pictures(folder):
        by_name.setdefault(path.name, []).append(path)
    images, files = [], {}
    for image in content["images"]:
        name = PurePosixPath(str(image["file_name"]).replace("\\", "/"))
        found = by_name.get(name.name, [])
        if len(found) > 1:
            found = [path for path in found if path.parts[-len(name.parts) :] == name.parts]
        if len(found) != 1:
            raise DataError(
                f"{file}: {len(found) or 'no'} files in {folder} and the folders below it are its "
                f"image {str(name)!r}; expected one. Export with the images (CVAT: 'Save images'), "
                "or put them there."
            )
        files[image["id"]] = found[0]
        if name.is_absolute() or ".." in name.parts:
            name = PurePosixPath(name.name)
        images.append({**image, "file_name": str(name)})
    new = {"images": images, "annotations": annotations, "categories": categories}
    return {**content, **new}, files


# Masks.


@dataclass(frozen=True)
class Masked:
    """An image and how to make its map of labels.

    Attributes:
        file: The image.
        name: Its path in the new data set.
        draw: Makes the map, (H, W), uint8.
    """

    file: Path
    name: PurePosixPath
    draw: Callable[[], np.ndarray]


def _prepare_masks(source: Path, out: Path, options: Options) -> Prepared:
    for images, masks in FOLDERS:
        if (source / masks).is_dir():
            classes, items = _read_masks(source / images, source / masks, options)
            break
    else:
        classes, items = _masks_of_labelme(source, options)
    suffix = _one_suffix(items)
    parts = split(items, options, str(source))
    counts, seen = {name: Counter() for name in parts}, set()
    for name, part in parts.items():
        for item in _tracked(part, f"writing the {name} masks"):
            labels = item.draw()
            values = np.unique(labels).tolist()
            seen.update(values)
            counts[name].update(classes[i] for i in values if i != NO_CLASS)
            _copy(item.file, (out / "images" / name / item.name).with_suffix(suffix))
            target = (out / "masks" / name / item.name).with_suffix(".png")
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(labels).save(target)
    if seen == {0, NO_CLASS} and len(classes) > 1 and (source / masks).is_dir():
        raise DataError(
            f"the masks have only the values 0 and {NO_CLASS}. {_meaning(classes, source / masks)}"
        )
    return Prepared(classes, "images", counts, {n: len(part) for n, part in parts.items()}, suffix)


def _one_suffix(items: Sequence[Masked]) -> str:
    same = {".jpeg": ".jpg", ".tiff": ".tif"}
    suffixes = Counter(
        same.get(item.file.suffix.lower(), item.file.suffix.lower()) for item in items
    )
    if len(suffixes) > 1:
        counted = ", ".join(f"{count} {suffix}" for suffix, count in suffixes.most_common())
        raise DataError(
            f"the images have several file types ({counted}), and a config has one image_suffix. "
            "Save all of them in one type, e.g. as .png."
        )
    return next(iter(suffixes))


def _masks_of_labelme(source: Path, options: Options) -> tuple[list[str], list[Masked]]:
    labelled = read_labelme(source, ())
    found = {BACKGROUND: source, **_labels_of(labelled)}
    if options.classes is not None and BACKGROUND not in options.classes:
        del found[BACKGROUND]
    classes = _order_classes(found, options)
    if options.classes is None and BACKGROUND in classes:
        classes.sort(key=lambda name: name != BACKGROUND)
    # What nobody painted is the background, or of no class if that is none.
    numbers = dict.fromkeys((*options.ignore, BACKGROUND), NO_CLASS)
    numbers |= {name: number for number, name in enumerate(classes)}

    def draw(one: Labelled) -> np.ndarray:
        labels = np.full(one.size[::-1], numbers[BACKGROUND], np.uint8)
        for shape in one.shapes:
            labels = _paint(labels, shape, numbers[str(shape["label"])], one.notes)
        return labels

    return classes, [Masked(one.file, one.name, lambda one=one: draw(one)) for one in labelled]


def _read_masks(images: Path, masks: Path, options: Options) -> tuple[list[str], list[Masked]]:
    colours = _read_labelmap(masks.parent / "labelmap.txt")
    if colours:
        found = dict.fromkeys(colours.values(), masks.parent / "labelmap.txt")
        if options.classes is not None and BACKGROUND not in options.classes:
            found.pop(BACKGROUND, None)
        classes = [name for name in found if name not in options.ignore]
        if options.classes is not None:
            classes = _order_classes(found, options)
    elif options.classes is None:
        raise UsageError(
            f"{masks} has numbers without names: give the names in order, --classes NAME ..."
        )
    else:
        classes = list(options.classes)
    by_stem = {path.relative_to(masks).with_suffix(""): path for path in find_pictures(masks)}
    items = []
    for file in find_pictures(images) if images.is_dir() else ():
        name = file.relative_to(images)
        mask = by_stem.pop(name.with_suffix(""), None)
        if mask is None:
            raise DataError(f"{file} has no mask in {masks}: add one, or remove the image.")
        draw = lambda mask=mask, file=file: _read_mask(mask, file, colours, classes)  # noqa: E731
        items.append(Masked(file, PurePosixPath(name), draw))
    if by_stem:
        raise DataError(
            f"{next(iter(by_stem.values()))} has no image of the same name in {images}."
        )
    return classes, items


def _read_labelmap(file: Path) -> dict[tuple[int, ...], str]:
    """The names of colours: lines NAME:R,G,B:: as CVAT writes them."""
    colours = {}
    for line in file.read_text().splitlines() if file.is_file() else ():
        if not line.strip() or line.startswith("#"):
            continue
        try:
            name, colour, *_ = line.split(":")
            colours[tuple(map(int, colour.split(",")))] = name.strip()
        except ValueError as error:
            raise DataError(f"{file}: expected NAME:R,G,B::, found {line!r}.") from error
    return colours


def _read_mask(
    file: Path, image: Path, colours: dict[tuple[int, ...], str], classes: list[str]
) -> np.ndarray:
    with Image.open(file) as opened:
        mode, mask = opened.mode, opened.convert("RGB") if colours else opened.copy()
    size = _picture_size(image)
    if mask.size != size:
        raise DataError(
            f"{file} has {mask.width}x{mask.height} pixels, {image} has {size[0]}x{size[1]}."
        )
    if colours:
        return _numbered(np.array(mask), file, colours, classes)
    labels = np.array(mask)
    if labels.ndim != 2:
        raise DataError(
            f"{file} is a colour picture ({mode}), and its colours have no names. Write "
            f"{file.parent.parent}/labelmap.txt with a line NAME:R,G,B:: for each colour."
        )
    values = np.unique(labels).tolist()
    if any(value >= len(classes) and value != NO_CLASS for value in values):
        raise DataError(
            f"{file} has the values {names_of(values)} for {len(classes)} classes. "
            + _meaning(classes, file.parent)
        )
    return labels.astype(np.uint8)


def _meaning(classes: list[str], masks: Path) -> str:
    return (
        f"0 to {len(classes) - 1} are the classes, {NO_CLASS} is none of them. If the values are "
        f"shades instead, write {masks.parent}/labelmap.txt with a line for each, e.g. "
        "background:0,0,0:: and road:255,255,255::"
    )


def _numbered(
    pixels: np.ndarray, file: Path, colours: dict[tuple[int, ...], str], classes: list[str]
) -> np.ndarray:
    """The labels of a picture of colours, (H, W, 3)."""
    codes = pixels.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1])
    labels, known = np.full(codes.shape, NO_CLASS, np.uint8), np.zeros(codes.shape, bool)
    for colour, name in colours.items():
        here = codes == np.dot(colour, [1 << 16, 1 << 8, 1])
        known |= here
        if name in classes:
            labels[here] = classes.index(name)
    if not known.all():
        unknown = tuple(pixels[~known][0].tolist())
        raise DataError(
            f"{file}: the colour {unknown} is not in labelmap.txt, {int((~known).sum())} pixels "
            "have none of its colours. Add a line for it, and save masks as PNG: JPEG blurs them."
        )
    return labels


# Folders.


def _prepare_images(source: Path, out: Path, options: Options) -> Prepared:
    if not source.is_dir():
        raise UsageError(
            f"{source} is not a folder; expected a folder with one folder for each class."
        )
    folders = {
        path.name: path
        for path in sorted(source.iterdir())
        if path.is_dir() and not path.name.startswith(".")
    }
    if {"train", "val"} <= folders.keys():
        raise UsageError(
            f"{source} is already split into {names_of(folders)}: there is nothing to prepare, "
            "use it as data_root in the config."
        )
    classes = _order_classes(folders, options)
    parts: dict[str, list[tuple[str, Path]]] = {"train": [], "val": []}
    for name in classes:
        if name not in folders:
            raise DataError(
                f"{source} has no folder {name!r}{near_name(name, folders)}; its folders: "
                f"{names_of(folders)}."
            )
        for part, files in split(find_pictures(folders[name]), options, str(folders[name])).items():
            parts[part] += [(name, file) for file in files]
    if not classes:
        raise DataError(f"{source} has no folders; expected one folder for each class.")
    for part, items in parts.items():
        for name, file in _tracked(items, f"copying the {part} images"):
            _copy(file, out / part / name / file.relative_to(folders[name]))
    counts = {part: Counter(name for name, _ in items) for part, items in parts.items()}
    return Prepared(classes, "images", counts, {part: len(items) for part, items in parts.items()})
