"""Makes the sample data set: small files in the exact layout of COCO 2017, ADE20K and ImageNet.

Scenes are drawn objects (:mod:`mmvmamba.datasets.sample_objects`) in front of the photographs and
textures that are packaged inside scikit-image, with occlusion, shadows and real annotation formats,
so that the upstream data sets, pipelines and metrics of mmdet, mmseg and mmpretrain read them
unchanged. Nothing is downloaded.

Layout under the output folder::

    coco/annotations/instances_{train,val}2017.json
    coco/{train,val}2017/000000000001.jpg
    ADEChallengeData2016/{images,annotations}/{training,validation}/ADE_train_00000001.{jpg,png}
    imagenet/{train,val}/n02708093/n02708093_1.JPEG
    imagenet/meta/{train,val}.txt
    manifest.json

Equal parameters and library versions give equal files, byte for byte.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from importlib import metadata
from pathlib import Path

import numpy as np
from PIL import Image

from mmvmamba.datasets.sample_objects import (
    IMAGENET_THINGS,
    SCENE_THINGS,
    Thing,
    smoothstep,
    value_noise,
)

FORMAT = 1
"""Raise it whenever the same parameters give other files."""

MANIFEST = "manifest.json"
DATA_SETS = ("coco", "ADEChallengeData2016", "imagenet")
SPLITS = ("train", "val")

# Labels in ADE20K's annotation pictures: 0 is "other", the classes count from 1.
ADE_OTHER, ADE_WALL, ADE_SKY, ADE_FLOOR, ADE_GRASS, ADE_EARTH, ADE_PAINTING = 0, 1, 3, 4, 10, 14, 23

COCO_CATEGORIES = {
    "person": "1 person",
    "vehicle": "2 bicycle, 3 car, 4 motorcycle, 5 airplane, 6 bus, 7 train, 8 truck, 9 boat",
    "outdoor": "10 traffic light, 11 fire hydrant, 13 stop sign, 14 parking meter, 15 bench",
    "animal": "16 bird, 17 cat, 18 dog, 19 horse, 20 sheep, 21 cow, 22 elephant, 23 bear, "
    "24 zebra, 25 giraffe",
    "accessory": "27 backpack, 28 umbrella, 31 handbag, 32 tie, 33 suitcase",
    "sports": "34 frisbee, 35 skis, 36 snowboard, 37 sports ball, 38 kite, 39 baseball bat, "
    "40 baseball glove, 41 skateboard, 42 surfboard, 43 tennis racket",
    "kitchen": "44 bottle, 46 wine glass, 47 cup, 48 fork, 49 knife, 50 spoon, 51 bowl",
    "food": "52 banana, 53 apple, 54 sandwich, 55 orange, 56 broccoli, 57 carrot, 58 hot dog, "
    "59 pizza, 60 donut, 61 cake",
    "furniture": "62 chair, 63 couch, 64 potted plant, 65 bed, 67 dining table, 70 toilet",
    "electronic": "72 tv, 73 laptop, 74 mouse, 75 remote, 76 keyboard, 77 cell phone",
    "appliance": "78 microwave, 79 oven, 80 toaster, 81 sink, 82 refrigerator",
    "indoor": "84 book, 85 clock, 86 vase, 87 scissors, 88 teddy bear, 89 hair drier, "
    "90 toothbrush",
}
"""Supercategory -> its categories with COCO's ids, 80 in all."""


def coco_categories() -> list[dict]:
    """The ``categories`` of a COCO annotation file."""
    categories = []
    for group, members in COCO_CATEGORIES.items():
        for member in members.split(", "):
            number, name = member.split(" ", 1)
            categories.append({"supercategory": group, "id": int(number), "name": name})
    return categories


_COCO_IDS = {category["name"]: category["id"] for category in coco_categories()}

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "stereo_motorcycle")

SUPERSAMPLING = 3
"""Points per pixel and axis at which an object is drawn; their mean is the anti-aliased pixel."""

MIN_VISIBLE_SHARE = 0.35
"""No object shows less than this share of itself: the rest is hidden or outside of the image."""


class SampleDataError(RuntimeError):
    """The sample data could not be made; the message says why and what to do."""


@dataclasses.dataclass(frozen=True)
class SampleDataParams:
    """What decides the content of the sample data.

    Attributes:
        num_train: images in each training set.
        num_val: images in each validation set.
        seed: seed of all random choices; training and validation images draw from separate
            streams of it.
        image_size: longer side of the scenes in pixels; classification images are half as large.

    Raises:
        ValueError: a number is out of its range.
    """

    num_train: int = 300
    num_val: int = 60
    seed: int = 0
    image_size: int = 256

    def __post_init__(self) -> None:
        limits = {
            "num_train": (1, 100_000),
            "num_val": (1, 100_000),
            "seed": (0, 2**63 - 1),
            "image_size": (96, 2048),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name} must be from {low} to {high}, but is {value}")

    @property
    def num_images(self) -> int:
        """Number of images that are drawn: scenes (for COCO and ADE20K) and ImageNet images."""
        return 2 * (self.num_train + self.num_val)


@dataclasses.dataclass
class _Sprite:
    """An object in its place: colour and coverage over the whole image."""

    kind: int
    rgb: np.ndarray
    alpha: np.ndarray
    crowd: bool = False


@dataclasses.dataclass
class _Scene:
    image: np.ndarray
    stuff: np.ndarray
    sprites: list[_Sprite]

    def visible(self) -> Iterator[tuple[_Sprite, np.ndarray]]:
        """Each object with its visible coverage: its own, less what lies in front of it."""
        uncovered = np.ones(self.stuff.shape)
        pairs = []
        for sprite in reversed(self.sprites):
            pairs.append((sprite, sprite.alpha * uncovered))
            uncovered = uncovered * (1.0 - sprite.alpha)
        return reversed(pairs)


@cache
def _picture(name: str, split: str) -> Image.Image:
    """The part of a packaged picture that ``split`` may show.

    Training crops come from the first 60 % along the longer side and validation crops from the last
    35 %, so that no pixel of a validation background was seen in training.
    """
    from skimage import data

    pixels = getattr(data, name)()
    if name == "stereo_motorcycle":
        pixels = pixels[0]
    if name == "brick":
        # The picture shows a wall that lies on its side.
        pixels = np.rot90(pixels)
    length = max(pixels.shape[:2])
    part = slice(0, int(0.6 * length)) if split == "train" else slice(int(0.65 * length), length)
    pixels = pixels[part] if pixels.shape[0] == length else pixels[:, part]
    return Image.fromarray(np.ascontiguousarray(pixels))


def _crop(name: str, split: str, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """A random crop of a picture, perhaps mirrored, as float (height, width[, 3]) in 0..1."""
    picture = _picture(name, split)
    largest = min(picture.width / width, picture.height / height)
    zoom = largest * rng.uniform(0.45, 1.0)
    left = rng.uniform(0, picture.width - zoom * width)
    top = rng.uniform(0, picture.height - zoom * height)
    box = (left, top, left + zoom * width, top + zoom * height)
    crop = np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC, box=box)) / 255.0
    return crop[:, ::-1] if rng.random() < 0.5 else crop


def _tinted(grey: np.ndarray, colour: tuple, rng: np.random.Generator) -> np.ndarray:
    """Colour a grey texture: its mean becomes about ``colour``."""
    tint = np.asarray(colour) * rng.uniform(0.8, 1.2) * rng.uniform(0.92, 1.08, 3)
    contrast = rng.uniform(0.7, 1.1)
    return tint * (1.0 + contrast * (grey / max(grey.mean(), 0.05) - 1.0))[..., None]


def _sky(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """A day sky: blue that pales downwards, with clouds."""
    x, y = np.meshgrid(np.linspace(-1, 1, width), np.linspace(-1, 1, height))
    clouds = sum(value_noise(x, 2.0 * y, rng, f) / f for f in (2.0, 4.0, 8.0, 16.0)) / 0.9375
    top, low = np.array([0.25, 0.48, 0.8]), np.array([0.68, 0.82, 0.93])
    blue = top + (low - top) * ((y + 1) / 2)[..., None]
    cover = smoothstep(0.55, 0.8, clouds + rng.uniform(-0.15, 0.1))[..., None]
    return blue * (1 - cover) + np.array([0.93, 0.94, 0.96]) * cover


def _planks(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """A wooden floor: boards of slightly different colour with grain along them."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, height / width, height))
    boards = rng.uniform(5, 9)
    board = np.floor(y * boards).astype(np.int64)
    tone = rng.uniform(0.8, 1.1, 64)[board % 64]
    grain = value_noise(3.0 * x + 7.0 * board, 40.0 * y, rng, 1.0)
    gap = smoothstep(0.04, 0.0, (y * boards) % 1.0)
    wood = np.array([0.58, 0.38, 0.22]) * rng.uniform(0.8, 1.2, 3)
    return wood * (tone * (0.8 + 0.35 * grain) * (1 - 0.5 * gap))[..., None]


def _background(
    height: int, width: int, split: str, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A background and its ADE20K labels: outdoors, a room, or a whole photograph ("other")."""
    kind = rng.choice(["outdoors", "room", "photograph"], p=[0.45, 0.3, 0.25])
    if kind == "photograph":
        photograph = _crop(str(rng.choice(PHOTOGRAPHS)), split, height, width, rng)
        return photograph, np.full((height, width), ADE_OTHER, np.uint8)

    if kind == "outdoors":
        if rng.random() < 0.75:
            back, back_label = _sky(height, width, rng), ADE_SKY
        else:
            back, back_label = _crop("hubble_deep_field", split, height, width, rng), ADE_SKY
        if rng.random() < 0.6:
            front = _tinted(_crop("grass", split, height, width, rng), (0.3, 0.42, 0.14), rng)
            front_label = ADE_GRASS
        else:
            front = _tinted(_crop("gravel", split, height, width, rng), (0.5, 0.44, 0.36), rng)
            front_label = ADE_EARTH
    else:
        bricks = [(0.6, 0.33, 0.26), (0.62, 0.58, 0.52), (0.72, 0.66, 0.5)]
        wall = _crop("brick", split, height, width, rng)
        back, back_label = _tinted(wall, bricks[rng.integers(len(bricks))], rng), ADE_WALL
        front, front_label = _planks(height, width, rng), ADE_FLOOR

    labels = np.full((height, width), back_label, np.uint8)
    horizon = rng.uniform(0.35, 0.75) * height
    if kind == "room" and rng.random() < 0.6:
        _hang_painting(back, labels, int(horizon), split, rng)
    slope = rng.uniform(-0.12, 0.12) if kind == "outdoors" else rng.uniform(-0.03, 0.03)
    column, row = np.meshgrid(np.arange(width), np.arange(height))
    below = row - horizon - slope * (column - width / 2)
    weight = smoothstep(-1.0, 1.0, below)[..., None]
    labels[below > 0] = front_label
    return back * (1 - weight) + front * weight, labels


def _hang_painting(
    wall: np.ndarray, labels: np.ndarray, horizon: int, split: str, rng: np.random.Generator
) -> None:
    """Put a framed photograph on the wall above the horizon, in place."""
    height = int(rng.uniform(0.45, 0.8) * horizon)
    width = min(int(height * rng.uniform(0.8, 1.5)), wall.shape[1] - 4)
    frame = max(2, height // 16)
    top = int(rng.integers(1, max(2, horizon - height)))
    left = int(rng.integers(0, wall.shape[1] - width))
    inner = (height - 2 * frame, width - 2 * frame)
    wall[top : top + height, left : left + width] = np.array([0.3, 0.2, 0.1]) * rng.uniform(0.5, 2)
    canvas = _crop(str(rng.choice(PHOTOGRAPHS)), split, *inner, rng)
    wall[top + frame : top + frame + inner[0], left + frame : left + frame + inner[1]] = canvas
    labels[top : top + height, left : left + width] = ADE_PAINTING


def _draw(
    thing: Thing,
    shape: tuple[int, int],
    centre: tuple[float, float],
    diameter: float,
    *,
    light: np.ndarray,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray, float]:
    """Draw one object into an empty image.

    Returns:
        Colour (H, W, 3), coverage (H, W) and the share of the object that lies inside of the image.
    """
    height, width = shape
    squeeze, tilt = rng.uniform(thing.squeeze, 1.0), rng.uniform(-thing.tilt, thing.tilt)
    reach = diameter / 2
    x0, y0 = math.floor(centre[0] - reach), math.floor(centre[1] - reach)
    size = math.ceil(2 * reach) + 1
    offsets = (np.arange(size * SUPERSAMPLING) + 0.5) / SUPERSAMPLING
    dx, dy = np.meshgrid(x0 + offsets - centre[0], y0 + offsets - centre[1])
    cos, sin = math.cos(tilt), math.sin(tilt)
    x, y = (cos * dx + sin * dy) / reach / squeeze, (cos * dy - sin * dx) / reach
    local_light = np.array(
        [cos * light[0] + sin * light[1], cos * light[1] - sin * light[0], light[2]]
    )
    rgb, inside = thing.painter(x, y, local_light, rng)

    blocks = (size, SUPERSAMPLING, size, SUPERSAMPLING)
    alpha = inside.reshape(blocks).mean(axis=(1, 3))
    rgb = (np.clip(rgb, 0, 1) * inside[..., None]).reshape(*blocks, 3).mean(axis=(1, 3))
    rgb = rgb / np.maximum(alpha, 1e-6)[..., None]

    top, left = max(y0, 0), max(x0, 0)
    bottom, right = min(y0 + size, height), min(x0 + size, width)
    full_rgb, full_alpha = np.zeros((height, width, 3)), np.zeros((height, width))
    window = (slice(top - y0, bottom - y0), slice(left - x0, right - x0))
    full_rgb[top:bottom, left:right] = rgb[window]
    full_alpha[top:bottom, left:right] = alpha[window]
    return full_rgb, full_alpha, full_alpha.sum() / max(alpha.sum(), 1e-6)


def _random_light(rng: np.random.Generator) -> np.ndarray:
    light = np.array([rng.uniform(-0.7, 0.7), rng.uniform(-0.8, -0.2), 0.75])
    return light / np.linalg.norm(light)


def _compose(
    background: np.ndarray, sprites: list[_Sprite], light: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Lay the objects over the background, each with a soft shadow, and photograph the scene."""
    from scipy import ndimage

    image = background
    for sprite in sprites:
        size = math.sqrt(sprite.alpha.sum())
        away = (-0.16 * size * light[1], -0.16 * size * light[0])
        shadow = ndimage.gaussian_filter(
            ndimage.shift(sprite.alpha, away, order=1), 0.05 * size + 0.5
        )
        image = image * (1.0 - 0.45 * shadow)[..., None]
        alpha = sprite.alpha[..., None]
        image = image * (1 - alpha) + sprite.rgb * alpha
    exposure, gamma = rng.uniform(0.8, 1.15), rng.uniform(0.85, 1.15)
    image = np.clip(image * exposure * rng.uniform(0.96, 1.04, 3), 0, 1) ** gamma
    image = image + rng.normal(0, rng.uniform(0.004, 0.02), image.shape)
    return np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)


def _place_objects(
    shape: tuple[int, int], light: np.ndarray, rng: np.random.Generator
) -> list[_Sprite]:
    """Two to seven objects from far to near, none of them hidden; sometimes also a crowd."""
    height, width = shape
    side = max(shape)
    sprites: list[_Sprite] = []
    full_areas: list[float] = []

    def try_to_place(kind: int, diameter: float, centre: tuple, crowd: bool) -> bool:
        thing = SCENE_THINGS[kind][0]
        rgb, alpha, share = _draw(thing, shape, centre, diameter, light=light, rng=rng)
        area = alpha.sum() / max(share, 1e-6)
        if alpha.sum() < max(MIN_VISIBLE_SHARE * area, 0.0004 * side * side):
            return False
        uncovered = 1.0 - alpha
        for sprite, full_area in zip(reversed(sprites), reversed(full_areas), strict=True):
            left = (sprite.alpha * uncovered).sum()
            if not (sprite.crowd and crowd) and left < MIN_VISIBLE_SHARE * full_area:
                return False
            uncovered = uncovered * (1.0 - sprite.alpha)
        sprites.append(_Sprite(kind, rgb, alpha, crowd))
        full_areas.append(area)
        return True

    if rng.random() < 0.06:
        kind = int(rng.integers(len(SCENE_THINGS)))
        middle = rng.uniform(0.25, 0.75, 2) * (width, height)
        for _ in range(rng.integers(10, 16)):
            spot = middle + rng.normal(0, 0.07 * side, 2)
            try_to_place(kind, side * rng.uniform(0.07, 0.1), (spot[0], spot[1]), crowd=True)

    diameters = side * np.exp(rng.uniform(math.log(0.13), math.log(0.5), rng.integers(2, 8)))
    # Near things look larger, so the larger ones tend to be in front; not always.
    for diameter in sorted(diameters, key=lambda d: d * rng.uniform(0.4, 1.6)):
        kind = int(rng.integers(len(SCENE_THINGS)))
        for _ in range(12):
            centre = (rng.uniform(0.04, 0.96) * width, rng.uniform(0.04, 0.96) * height)
            if try_to_place(kind, diameter, centre, crowd=False):
                break
    return sprites


def _render_scene(params: SampleDataParams, split: str, index: int) -> _Scene:
    """Scene number ``index`` of a split, which depends on no other scene."""
    rng = np.random.default_rng([params.seed, SPLITS.index(split), index])
    short = int(0.75 * params.image_size)
    shapes = [
        (short, params.image_size),
        (params.image_size, short),
        (params.image_size, params.image_size),
    ]
    shape = shapes[rng.choice(3, p=[0.6, 0.2, 0.2])]
    background, stuff = _background(*shape, split, rng)
    light = _random_light(rng)
    sprites: list[_Sprite] = []
    while not any(not sprite.crowd for sprite in sprites):
        sprites = _place_objects(shape, light, rng)
    return _Scene(_compose(background, sprites, light, rng), stuff, sprites)


def _render_classification(
    params: SampleDataParams, split: str, index: int, wnid: str
) -> np.ndarray:
    """One large object on a background."""
    rng = np.random.default_rng([params.seed, 2 + SPLITS.index(split), index])
    side = params.image_size // 2
    shape = [(side, side), (side, int(1.25 * side)), (int(1.25 * side), side)][rng.integers(3)]
    background, _ = _background(*shape, split, rng)
    light = _random_light(rng)
    diameter = side * rng.uniform(0.55, 0.95)
    spread = rng.uniform(-0.1, 0.1, 2)
    centre = ((0.5 + spread[0]) * shape[1], (0.5 + spread[1]) * shape[0])
    rgb, alpha, _ = _draw(IMAGENET_THINGS[wnid][0], shape, centre, diameter, light=light, rng=rng)
    return _compose(background, [_Sprite(0, rgb, alpha)], light, rng)


def mask_to_polygons(coverage: np.ndarray, min_area: float = 4.0) -> list[list[float]]:
    """Outline a mask as COCO does: a list of flat ``[x0, y0, x1, y1, ...]`` polygons without holes.

    Args:
        coverage: (H, W) in 0..1; the outline follows the level 0.5 with sub-pixel precision.
        min_area: fragments smaller than this (in square pixels) are left out.

    Returns:
        Polygons in COCO's coordinates, in which the pixel at row r, column c covers the square from
        (c, r) to (c + 1, r + 1). COCO polygons cannot have holes, so a mask with a hole is cut in
        two through the hole.
    """
    from skimage.measure import approximate_polygon, find_contours

    height, width = coverage.shape
    outlines, holes = [], []
    for contour in find_contours(np.pad(coverage, 1), 0.5):
        x, y = contour[:, 1] - 0.5, contour[:, 0] - 0.5
        # Outlines and holes run in opposite senses, so the signed area tells them apart.
        area = 0.5 * float(np.sum(x[:-1] * y[1:] - x[1:] * y[:-1]))
        if abs(area) >= min_area:
            (outlines if area > 0 else holes).append(contour)
    if holes:
        cut = int(np.clip(np.round(holes[0][:, 1].mean() - 0.5), 1, width - 1))
        parts = [coverage.copy(), coverage.copy()]
        parts[0][:, cut:] = 0
        parts[1][:, :cut] = 0
        return [polygon for part in parts for polygon in mask_to_polygons(part, min_area)]
    polygons = []
    for contour in outlines:
        points = approximate_polygon(contour, 0.2)[:-1, ::-1] - 0.5
        if len(points) >= 3:
            points = np.clip(points, 0, (width, height)).round(2)
            polygons.append([float(number) for number in points.ravel()])
    return polygons


def _coco_annotations(scene: _Scene) -> list[dict]:
    """The annotations of one scene, without ids: polygons, and a run-length mask for a crowd."""
    from pycocotools import mask as mask_api

    height, width = scene.stuff.shape
    annotations, crowd, crowd_kind = [], np.zeros((height, width)), None
    for sprite, visible in scene.visible():
        if sprite.crowd:
            crowd, crowd_kind = crowd + visible, sprite.kind
            continue
        polygons = mask_to_polygons(visible)
        if not polygons:
            continue
        encoded = mask_api.merge(mask_api.frPyObjects(polygons, height, width))
        annotations.append(_coco_annotation(sprite.kind, polygons, encoded, is_crowd=False))
    if crowd_kind is not None and (crowd > 0.5).any():
        encoded = mask_api.encode(np.asfortranarray(crowd > 0.5, dtype=np.uint8))
        runs = {"counts": _run_lengths(crowd > 0.5), "size": [height, width]}
        annotations.append(_coco_annotation(crowd_kind, runs, encoded, is_crowd=True))
    return annotations


def _coco_annotation(
    kind: int, segmentation: list | dict, encoded: dict, *, is_crowd: bool
) -> dict:
    """Area and box are those of the mask that pycocotools makes of the segmentation."""
    from pycocotools import mask as mask_api

    return {
        "segmentation": segmentation,
        "area": float(mask_api.area(encoded)),
        "iscrowd": int(is_crowd),
        "bbox": [float(number) for number in mask_api.toBbox(encoded)],
        "category_id": _COCO_IDS[SCENE_THINGS[kind][1]],
    }


def _run_lengths(mask: np.ndarray) -> list[int]:
    """COCO's uncompressed run lengths: column by column, first a run of zeros (maybe empty)."""
    flat = mask.ravel(order="F").astype(np.int8)
    changes = np.flatnonzero(np.diff(flat, prepend=0))
    return np.diff(np.concatenate([[0], changes, [flat.size]])).tolist()


def _ade_labels(scene: _Scene) -> np.ndarray:
    labels = scene.stuff.copy()
    for sprite in scene.sprites:
        labels[sprite.alpha > 0.5] = SCENE_THINGS[sprite.kind][2]
    return labels


class _Writer:
    """Writes files under a root, each of them whole or not at all, and remembers their sizes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.sizes: dict[str, int] = {}

    def bytes(self, name: str, content: bytes) -> None:
        path = self.root / name
        unfinished = path.with_name(path.name + ".part")
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_bytes(content)
        os.replace(unfinished, path)
        self.sizes[name] = len(content)

    def json(self, name: str, content: dict) -> None:
        self.bytes(name, json.dumps(content, separators=(",", ":")).encode())


def _encode(image: np.ndarray, kind: str) -> bytes:
    buffer = io.BytesIO()
    options = {"quality": 92, "subsampling": 0} if kind == "JPEG" else {}
    Image.fromarray(image).save(buffer, kind, **options)
    return buffer.getvalue()


def _write_scenes(
    writer: _Writer, params: SampleDataParams, split: str, on_image: Callable[[], None]
) -> None:
    """The scenes of a split, as COCO and as ADE20K."""
    count, first = (
        (params.num_train, 1) if split == "train" else (params.num_val, params.num_train + 1)
    )
    folder = {"train": "training", "val": "validation"}[split]
    images, annotations = [], []
    for index in range(count):
        scene = _render_scene(params, split, index)
        jpeg, image_id = _encode(scene.image, "JPEG"), first + index
        height, width = scene.stuff.shape
        file_name = f"{image_id:012d}.jpg"
        writer.bytes(f"coco/{split}2017/{file_name}", jpeg)
        images.append(
            {
                "license": 1,
                "file_name": file_name,
                "coco_url": "",
                "height": height,
                "width": width,
                "date_captured": "2026-01-01 00:00:00",
                "flickr_url": "",
                "id": image_id,
            }
        )
        for annotation in _coco_annotations(scene):
            number = (1 if split == "train" else 10_000_000) + len(annotations)
            annotations.append({**annotation, "image_id": image_id, "id": number})
        ade = f"ADE_{split}_{index + 1:08d}"
        writer.bytes(f"ADEChallengeData2016/images/{folder}/{ade}.jpg", jpeg)
        labels = _encode(_ade_labels(scene), "PNG")
        writer.bytes(f"ADEChallengeData2016/annotations/{folder}/{ade}.png", labels)
        on_image()
    writer.json(
        f"coco/annotations/instances_{split}2017.json",
        {
            "info": {
                "description": f"mmvmamba sample data in the format of COCO 2017, {split} set",
                "url": "",
                "version": str(FORMAT),
                "year": 2026,
                "contributor": "mmvmamba",
                "date_created": "2026/01/01",
            },
            "licenses": [
                {
                    "url": "https://www.apache.org/licenses/LICENSE-2.0",
                    "id": 1,
                    "name": "Apache License 2.0",
                }
            ],
            "images": images,
            "annotations": annotations,
            "categories": coco_categories(),
        },
    )


def _write_classification(
    writer: _Writer, params: SampleDataParams, split: str, on_image: Callable[[], None]
) -> None:
    """ImageNet folders, and the lists of class indices: with them, some classes may be missing."""
    count = params.num_train if split == "train" else params.num_val
    lines = []
    for index in range(count):
        wnid = list(IMAGENET_THINGS)[index % len(IMAGENET_THINGS)]
        stem = f"{wnid}_{index + 1}" if split == "train" else f"ILSVRC2012_val_{index + 1:08d}"
        name = f"{wnid}/{stem}.JPEG"
        image = _render_classification(params, split, index, wnid)
        writer.bytes(f"imagenet/{split}/{name}", _encode(image, "JPEG"))
        lines.append(f"{name} {IMAGENET_THINGS[wnid][1]}\n")
        on_image()
    writer.bytes(f"imagenet/meta/{split}.txt", "".join(sorted(lines)).encode())


def read_manifest(out_dir: str | os.PathLike) -> dict | None:
    """The manifest of a sample data set, or None where there is none.

    Raises:
        SampleDataError: the file is there and is no manifest.
    """
    path = Path(out_dir) / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        manifest["format"], manifest["parameters"], manifest["files"]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise SampleDataError(
            f"{path} is not a manifest of the sample data; move {out_dir} away or choose another "
            "folder"
        ) from error
    return manifest


def is_complete(out_dir: str | os.PathLike, params: SampleDataParams) -> bool:
    """Whether ``out_dir`` holds the finished data with these parameters, every file in full."""
    manifest = read_manifest(out_dir)
    if manifest is None or not manifest["files"] or not _same(manifest, params):
        return False
    for name, size in manifest["files"].items():
        path = Path(out_dir) / name
        if not path.is_file() or path.stat().st_size != size:
            return False
    return True


def _same(manifest: dict, params: SampleDataParams) -> bool:
    return manifest["format"] == FORMAT and manifest["parameters"] == dataclasses.asdict(params)


def _require_packages() -> None:
    """The pictures come from scikit-image; masks are measured by COCO's own code, pycocotools."""
    missing = [
        package
        for package, module in (("scikit-image", "skimage"), ("pycocotools", "pycocotools"))
        if importlib.util.find_spec(module) is None
    ]
    if missing:
        raise SampleDataError(
            f"making the sample data needs {' and '.join(missing)}: pip install {' '.join(missing)}"
        )


def _prepare(root: Path, params: SampleDataParams, overwrite: bool) -> None:
    """Make room in ``root``, without ever removing what another program wrote there."""
    links = [name for name in DATA_SETS if (root / name).is_symlink()]
    if links:
        raise SampleDataError(
            f"in {root}, {', '.join(links)} is a link: its target is not changed; remove the "
            "link or choose another output folder"
        )
    manifest = read_manifest(root)
    if manifest is None:
        foreign = [name for name in DATA_SETS if (root / name).exists()]
        if foreign:
            raise SampleDataError(
                f"{root} already holds {', '.join(foreign)} and no {MANIFEST}: it is not sample "
                "data and is not changed; choose another output folder"
            )
    elif not _same(manifest, params):
        if manifest["files"] and not overwrite:
            raise SampleDataError(
                f"{root} holds sample data of format {manifest['format']} made with "
                f"{manifest['parameters']}, not of format {FORMAT} with "
                f"{dataclasses.asdict(params)}; choose another output folder or overwrite it "
                "(--overwrite)"
            )
        for name in DATA_SETS:
            shutil.rmtree(root / name, ignore_errors=True)


def make_sample_data(
    out_dir: str | os.PathLike,
    params: SampleDataParams | None = None,
    *,
    overwrite: bool = False,
    on_image: Callable[[], None] = lambda: None,
) -> bool:
    """Make the sample data set, unless it is there already.

    Every file is written whole or not at all and the manifest is completed last, so a run that was
    interrupted is noticed and made again.

    Args:
        out_dir: folder that receives the three data sets and the manifest.
        params: what to make; None means the defaults.
        overwrite: replace a finished sample data set that was made with other parameters.
        on_image: called after each of ``params.num_images`` images.

    Returns:
        True if the data were made, False if the finished data set was there.

    Raises:
        SampleDataError: a package is missing, the folder cannot be written, or it holds data that
            must not be replaced.
    """
    params = params or SampleDataParams()
    root = Path(out_dir)
    if is_complete(root, params):
        return False
    _require_packages()
    try:
        _prepare(root, params, overwrite)
        writer = _Writer(root)
        manifest = {"format": FORMAT, "parameters": dataclasses.asdict(params), "files": None}
        writer.json(MANIFEST, manifest)
        writer.sizes.clear()
        for split in SPLITS:
            _write_scenes(writer, params, split, on_image)
            _write_classification(writer, params, split, on_image)
        packages = ("numpy", "pillow", "pycocotools", "scikit-image")
        manifest["made_with"] = {name: metadata.version(name) for name in packages}
        manifest["files"] = dict(writer.sizes)
        writer.json(MANIFEST, manifest)
    except OSError as error:
        raise SampleDataError(
            f"cannot write the sample data to {root}: {error}; check the folder and the free "
            "space, or choose another output folder"
        ) from error
    return True
