"""COCO's annotation files: counted, and refused for what upstream would not survive.

mmdet leaves annotations out without a word, mixes up images of one id, and pycocotools never
returns from a polygon with NaN, fills a short mask up with whatever is in the memory, and counts an
object whose id is 0 as not found. What has a safe default is filled in: see `complete`.
"""

import json
import math
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from mmvmamba.engine.errors import DataError

# How far outside of its image a polygon may reach, in sides of the image: pycocotools walks along
# every edge, and takes no end with coordinates like 1e9.
MAX_REACH = 10


@dataclass(frozen=True)
class Listed:
    """What a COCO file lists.

    Attributes:
        images: Its images.
        annotations: Its annotations.
        shapeless: Those without a polygon of three points, which mmdet ignores like crowds where
            it reads masks.
        categories: The names of its categories, by id.
        objects: How many annotations of each category's id there are, without the unused.
        unused: How many annotations mmdet leaves out, whatever the classes, by reason.
        filled: How many annotations `complete` added something to, by what.
    """

    images: int
    annotations: int
    shapeless: int
    categories: dict[int, str]
    objects: Counter
    unused: Counter
    filled: Counter


def read_coco(path: Path, masks_evaluated: bool) -> Listed | None:
    """Checks and counts the content of an annotation file.

    Args:
        path: The file.
        masks_evaluated: Whether an evaluation will read its masks. mmdet's trainings ignore those
            without a polygon of three points, its evaluation ends with an error at the first.

    Returns:
        What it lists, or None if it is a JSON file of another kind.

    Raises:
        DataError: If it is no JSON, or has images without an id or a size, two images, categories
            or annotations of one id, or annotations with boxes and polygons that are no finite
            numbers or lie far away, or with run-length masks of another size than their image. It
            names the file, the annotation and the image.
    """
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path} is damaged, it is no JSON: {error}") from error
    if not isinstance(content, dict) or not {"images", "annotations"} <= content.keys():
        return None
    images, annotations = content["images"], content["annotations"]
    try:
        if any("segments_info" in annotation for annotation in annotations):
            # Panoptic maps.
            return None
        _check_ids(images)
        _check_unique(annotations, "annotations")
        _check_unique(content.get("categories", ()), "categories")
        by_id = {image["id"]: image for image in images}
        for annotation in annotations:
            # Those of no listed image are left out, and counted.
            image = by_id.get(annotation.get("image_id"))
            if image is not None:
                _check_annotation(annotation, image, masks_evaluated)
        filled = complete(content)
        objects, unused = Counter(), Counter()
        for annotation in annotations:
            reason = _why_unused(annotation, by_id.get(annotation.get("image_id")))
            if reason:
                unused[reason] += 1
            else:
                objects[annotation["category_id"]] += 1
        names = {one["id"]: one["name"] for one in content.get("categories", ())}
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        missing = isinstance(error, KeyError)
        reason = f"an entry has no {error}." if missing else error
        raise DataError(f"{path}: {reason}") from error
    shapeless = sum(map(_is_shapeless, annotations))
    return Listed(len(images), len(annotations), shapeless, names, objects, unused, filled)


def complete(content: dict) -> Counter:
    """Fills in what the objects of a COCO file's content lack and has a safe default.

    `iscrowd` is 0; `area` is the mask's, or the box's where there is none; an object without a mask
    has one without points, which mmdet ignores like a crowd where it reads masks. Ids that are not
    positive whole numbers are given anew, from 1 on: nothing else refers to them.

    Args:
        content: What the file holds, changed in place.

    Returns:
        How many annotations got what.
    """
    filled = Counter()
    objects = [one for one in content.get("annotations", ()) if "bbox" in one]
    for one in objects:
        if not one.get("segmentation"):
            # A polygon without points.
            one["segmentation"] = [[]]
        if one.get("iscrowd") is None:
            one["iscrowd"] = 0
            filled["iscrowd, as 0"] += 1
        if one.get("area") is None:
            one["area"] = _area(one)
            filled["area, of the mask or the box"] += 1
    if not all(isinstance(one.get("id"), int) and one["id"] > 0 for one in objects):
        for number, one in enumerate(objects, 1):
            one["id"] = number
        filled["id, anew from 1 on, since pycocotools counts an object of id 0 as missed"] = len(
            objects
        )
    return filled


def _area(annotation: dict) -> float:
    mask = annotation["segmentation"]
    if isinstance(mask, dict):
        runs = mask.get("counts") or ()
        return sum((runs if isinstance(runs, list) else _unpacked(runs))[1::2])
    polygons = [polygon for polygon in mask if _is_polygon(polygon)]
    if not polygons:
        return annotation["bbox"][2] * annotation["bbox"][3]
    return sum(map(_polygon_area, polygons))


def _polygon_area(polygon: list[float]) -> float:
    points = list(zip(polygon[::2], polygon[1::2], strict=True))
    return abs(sum(x * w - z * y for (x, y), (z, w) in pairwise([*points, points[0]]))) / 2


def _why_unused(annotation: dict, image: dict | None) -> str | None:
    """Why mmdet's `CocoDataset` leaves an annotation out, in its order; None if it does not."""
    if image is None:
        return "of no listed image"
    if annotation.get("ignore"):
        return "marked to be ignored"
    if "bbox" not in annotation:
        raise ValueError(
            f"annotation {annotation.get('id')} of {image.get('file_name', image['id'])} has no "
            "bbox: [x, y, width, height] in pixels."
        )
    x, y, width, height = annotation["bbox"]
    if width <= 0 or height <= 0 or annotation["area"] <= 0:
        return "without an area"
    if min(x + width, image["width"]) <= max(x, 0) or min(y + height, image["height"]) <= max(y, 0):
        return "outside of their image"
    return "smaller than a pixel" if width < 1 or height < 1 else None


def _check_unique(entries: list[dict], what: str) -> None:
    ((most, count),) = Counter(
        one["id"] for one in entries if one.get("id") is not None
    ).most_common(1) or [(None, 1)]
    if count > 1:
        raise ValueError(
            f"{count} of its {what} have the id {most!r}, which would be mixed up: number them 1, "
            "2, 3, ..., and leave out what is listed twice."
        )


def _check_ids(images: list[dict]) -> None:
    for image in images:
        missing = {"id", "height", "width"} - image.keys()
        if missing:
            raise ValueError(f"its image {image} has no {', '.join(sorted(missing))}.")
    _check_unique(images, "images")


def _check_annotation(annotation: dict, image: dict, masks_evaluated: bool) -> None:
    try:
        box, mask = annotation.get("bbox"), annotation.get("segmentation")
        if box is not None and not (len(box) == 4 and all(map(math.isfinite, box))):
            raise ValueError(f"its box {box} is not of four finite numbers.")
        if isinstance(mask, dict):
            _check_runs(mask, image["height"], image["width"])
        else:
            if masks_evaluated and not has_outline(annotation):
                raise ValueError(
                    f"its mask {mask} is no polygon of three points or more, and masks are "
                    "evaluated. Give it one, or leave the annotation out."
                )
            _check_polygons(mask or (), MAX_REACH * max(image["height"], image["width"]))
    except (ValueError, TypeError, LookupError, ArithmeticError) as error:
        raise ValueError(
            f"annotation {annotation.get('id')} of {image.get('file_name', image['id'])}: {error}"
        ) from error


def _check_polygons(polygons: list[list[float]], reach: float) -> None:
    for polygon in polygons:
        # The sum tells of NaN, which compares with nothing.
        if polygon and not (
            -reach <= min(polygon) and max(polygon) <= reach and math.isfinite(sum(polygon))
        ):
            raise ValueError(
                f"a point of its polygon is no number or far outside of the image: {polygon[:12]}."
            )


def _check_runs(mask: dict, height: int, width: int) -> None:
    """Refuses a run-length mask that pycocotools would fill up with whatever is in the memory."""
    counts, size = mask.get("counts"), mask.get("size")
    if counts is None or size is None:
        # mmdet ignores it.
        return
    if list(size) != [height, width]:
        raise ValueError(f"its mask has {size} pixels, its image {[height, width]}.")
    runs = counts if isinstance(counts, list) else _unpacked(counts)
    if sum(runs) != height * width or min(runs, default=0) < 0:
        raise ValueError(
            f"the runs of its mask cover {sum(runs)} pixels, its image has {height * width}."
        )


def _unpacked(counts: str | bytes) -> list[int]:
    """The runs of a compressed mask.

    As pycocotools writes them: five bits a character, the lowest first, the sixth telling that more
    follow; from the fourth on each is the difference to the run two before.
    """
    runs: list[int] = []
    value = shift = 0
    for byte in counts.encode() if isinstance(counts, str) else counts:
        bits = byte - 48
        value |= (bits & 0x1F) << shift
        shift += 5
        if not bits & 0x20:
            value -= (bits >> 4 & 1) << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return runs


def has_outline(annotation: dict) -> bool:
    """Whether pycocotools can evaluate an annotation's mask."""
    mask = annotation.get("segmentation")
    return isinstance(mask, dict) or (bool(mask) and len(mask[0]) >= 6)


def _is_shapeless(annotation: dict) -> bool:
    mask = annotation.get("segmentation")
    return isinstance(mask, list) and len(mask) > 0 and not any(map(_is_polygon, mask))


def _is_polygon(points: list[float]) -> bool:
    return len(points) >= 6 and len(points) % 2 == 0
