"""COCO's annotation files: counted, and refused for what upstream would not survive.

mmdet leaves annotations out without a word, mixes up images of one id, and pycocotools never
returns from a polygon with NaN and fills a short mask up with whatever is in the memory.
"""

import json
import math
from collections import Counter
from dataclasses import dataclass
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
        shapeless: Those without a polygon of three points, which mmdet ignores like crowds.
    """

    images: int
    annotations: int
    shapeless: int


def read_coco(path: Path, masks_evaluated: bool) -> Listed | None:
    """Checks and counts the content of an annotation file.

    Args:
        path: The file.
        masks_evaluated: Whether an evaluation will read its masks. mmdet's trainings ignore those
            without a polygon of three points, its evaluation ends with an error at the first.

    Returns:
        What it lists, or None if it is a JSON file of another kind.

    Raises:
        DataError: If it is no JSON, or has images without an id or a size or of one id, or
            annotations with boxes and polygons that are no finite numbers or lie far away, or with
            run-length masks of another size than their image. It names the file, the annotation and
            the image.
    """
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path} is damaged, it is no JSON: {error}") from error
    if not isinstance(content, dict) or not {"images", "annotations"} <= content.keys():
        return None
    images, annotations = content["images"], content["annotations"]
    try:
        _check_ids(images)
        by_id = {image["id"]: image for image in images}
        for annotation in annotations:
            # Those of no listed image are left out, and counted.
            image = by_id.get(annotation.get("image_id"))
            if image is not None:
                _check_annotation(annotation, image, masks_evaluated)
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise DataError(f"{path}: {error}") from error
    return Listed(len(images), len(annotations), sum(map(_is_shapeless, annotations)))


def _check_ids(images: list[dict]) -> None:
    for image in images:
        missing = {"id", "height", "width"} - image.keys()
        if missing:
            raise ValueError(f"its image {image} has no {', '.join(sorted(missing))}.")
    ((most, count),) = Counter(image["id"] for image in images).most_common(1) or [(None, 1)]
    if count > 1:
        raise ValueError(f"{count} of its images have the id {most!r}, which would be mixed up.")


def _check_annotation(annotation: dict, image: dict, masks_evaluated: bool) -> None:
    try:
        box, mask = annotation.get("bbox"), annotation.get("segmentation")
        if box is not None and not (len(box) == 4 and all(map(math.isfinite, box))):
            raise ValueError(f"its box {box} is not of four finite numbers.")
        if isinstance(mask, dict):
            _check_runs(mask, image["height"], image["width"])
        else:
            if masks_evaluated and not (mask and len(mask[0]) >= 6):
                raise ValueError(f"its mask {mask} is no polygon of three points or more.")
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


def _is_shapeless(annotation: dict) -> bool:
    mask = annotation.get("segmentation")
    return (
        isinstance(mask, list)
        and len(mask) > 0
        and not any(len(polygon) >= 6 and len(polygon) % 2 == 0 for polygon in mask)
    )
