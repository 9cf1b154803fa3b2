"""Painters of the objects in the sample data set.

A painter is a function of local coordinates: it is given two arrays ``x`` (right) and ``y`` (down),
in which the object fills about the unit disc, and returns the colour at every point and whether the
point belongs to the object. So rotation, foreshortening, scale and anti-aliasing are all a matter
of the coordinates it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np

Array = np.ndarray
Rng = np.random.Generator
Painted = tuple[Array, Array]
Painter = Callable[[Array, Array, Array, Rng], Painted]
"""``(x, y, light, rng) -> (rgb, inside)``: ``light`` is a unit vector (3,) towards the light, in
the object's frame; ``rgb`` is float (..., 3) in about 0..1 and ``inside`` bool (...)."""

BLACK = np.array([0.07, 0.07, 0.08])
WHITE = np.array([0.95, 0.95, 0.93])


def smoothstep(low: float, high: float, value: Array) -> Array:
    """Rise from 0 at ``low`` to 1 at ``high``, flat at both ends; ``low`` may be the larger one."""
    t = np.clip((value - low) / (high - low), 0.0, 1.0)
    return t * t * (3.0 - 2.0 * t)


def value_noise(x: Array, y: Array, rng: Rng, frequency: float) -> Array:
    """Smooth random field in 0..1 that changes over a distance of about ``1 / frequency``."""
    size = 32
    lattice = rng.random((size, size))
    u, v = x * frequency + size / 2, y * frequency + size / 2
    column, row = np.floor(u).astype(np.int64), np.floor(v).astype(np.int64)
    du, dv = smoothstep(0.0, 1.0, u - column), smoothstep(0.0, 1.0, v - row)
    left, right, top, bottom = column % size, (column + 1) % size, row % size, (row + 1) % size
    upper = lattice[top, left] * (1 - du) + lattice[top, right] * du
    lower = lattice[bottom, left] * (1 - du) + lattice[bottom, right] * du
    return upper * (1 - dv) + lower * dv


def _mix(a: Array, b: Array, weight: Array) -> Array:
    """Blend colour ``b`` over colour ``a`` where ``weight`` (no channel axis) is 1."""
    weight = np.asarray(weight, dtype=np.float64)[..., None]
    return a * (1.0 - weight) + b * weight


def _solid(x: Array, colour: Array) -> Array:
    return np.broadcast_to(np.asarray(colour, dtype=np.float64), (*x.shape, 3))


def _jitter(colour: tuple, rng: Rng, amount: float = 0.06) -> Array:
    return np.clip(np.asarray(colour) + rng.uniform(-amount, amount, 3), 0.0, 1.0)


def _segment_distance(x: Array, y: Array, start: tuple, end: tuple) -> Array:
    """Distance of every point to the segment from ``start`` to ``end``."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    along = np.clip(((x - start[0]) * dx + (y - start[1]) * dy) / (dx * dx + dy * dy), 0.0, 1.0)
    return np.hypot(x - start[0] - along * dx, y - start[1] - along * dy)


def _polyline_distance(x: Array, y: Array, points: list) -> Array:
    return np.minimum.reduce([_segment_distance(x, y, a, b) for a, b in pairwise(points)])


def _shade_ball(rgb: Array, normal: Array, light: Array, gloss: float) -> Array:
    """Light a sphere: a dim ambient part, a diffuse part and a highlight of strength ``gloss``."""
    diffuse = np.clip(normal @ light, 0.0, 1.0)
    half_way = light + np.array([0.0, 0.0, 1.0])
    half_way /= np.linalg.norm(half_way)
    highlight = gloss * np.clip(normal @ half_way, 0.0, 1.0) ** 30
    return rgb * (0.42 + 0.68 * diffuse)[..., None] + highlight[..., None]


def _shade_flat(rgb: Array, x: Array, y: Array, light: Array) -> Array:
    """Light a flat thing: brighter towards the light."""
    return rgb * (0.92 + 0.16 * (x * light[0] + y * light[1]))[..., None]


def _sphere_normals(x: Array, y: Array) -> Array:
    z = np.sqrt(np.clip(1.0 - x * x - y * y, 0.0, None))
    return np.stack([x, y, z], axis=-1)


def _random_rotation(rng: Rng) -> Array:
    """A rotation matrix, uniform over all rotations (from a random unit quaternion)."""
    w, i, j, k = (q := rng.normal(size=4)) / np.linalg.norm(q)
    return np.array(
        [
            [1 - 2 * (j * j + k * k), 2 * (i * j - k * w), 2 * (i * k + j * w)],
            [2 * (i * j + k * w), 1 - 2 * (i * i + k * k), 2 * (j * k - i * w)],
            [2 * (i * k - j * w), 2 * (j * k + i * w), 1 - 2 * (i * i + j * j)],
        ]
    )


def _icosahedron() -> tuple[Array, Array]:
    """Unit vectors of the 12 vertices and the 20 face centres of an icosahedron."""
    golden = (1 + 5**0.5) / 2
    corners = [(0.0, s, t * golden) for s in (-1, 1) for t in (-1, 1)]
    vertices = np.array([c[-k:] + c[:-k] if k else c for c in corners for k in range(3)])
    vertices /= np.linalg.norm(vertices, axis=1, keepdims=True)
    near = vertices @ vertices.T > 0.4
    faces = [
        vertices[[a, b, c]].mean(axis=0)
        for a in range(12)
        for b in range(a)
        for c in range(b)
        if near[a, b] and near[b, c] and near[a, c]
    ]
    faces = np.array(faces)
    return vertices, faces / np.linalg.norm(faces, axis=1, keepdims=True)


PENTAGONS, HEXAGONS = _icosahedron()


def paint_soccer_ball(x: Array, y: Array, light: Array, rng: Rng) -> Painted:
    """A football: black pentagons on white, with seams between the hexagons."""
    normal = _sphere_normals(x, y)
    turned = normal @ _random_rotation(rng).T
    angle_to_pentagon = np.arccos(np.clip((turned @ PENTAGONS.T).max(axis=-1), -1, 1))
    hexagons = np.sort(turned @ HEXAGONS.T, axis=-1)
    seam = smoothstep(0.035, 0.015, hexagons[..., -1] - hexagons[..., -2])
    rgb = _mix(_solid(x, WHITE), BLACK * 3, 0.7 * seam)
    rgb = _mix(
        rgb, _jitter((0.09, 0.09, 0.11), rng, 0.05), smoothstep(0.37, 0.34, angle_to_pentagon)
    )
    rgb = rgb * (0.93 + 0.1 * value_noise(x, y, rng, 4.0))[..., None]
    return _shade_ball(rgb, normal, light, 0.15), x * x + y * y < 1.0


def paint_basketball(x: Array, y: Array, light: Array, rng: Rng) -> Painted:
    """A basketball: orange-brown leather with four black seams."""
    normal = _sphere_normals(x, y)
    turned = normal @ _random_rotation(rng).T
    a, b, c = turned[..., 0], turned[..., 1], turned[..., 2]
    curved = np.abs(np.abs(a) - 0.45 - 0.35 * b * b)
    seam = np.minimum.reduce([np.abs(b), np.abs(c), curved])
    leather = _jitter((0.72, 0.36, 0.16), rng)
    grain = 0.85 + 0.25 * value_noise(x, y, rng, 14.0)
    rgb = _mix(leather * grain[..., None], BLACK, smoothstep(0.055, 0.03, seam))
    return _shade_ball(rgb, normal, light, 0.12), x * x + y * y < 1.0


def paint_sports_ball(x: Array, y: Array, light: Array, rng: Rng) -> Painted:
    """Either a football or a basketball."""
    painter = paint_soccer_ball if rng.random() < 0.5 else paint_basketball
    return painter(x, y, light, rng)


def paint_orange(x: Array, y: Array, light: Array, rng: Rng) -> Painted:
    """An orange: a pored skin with a green stem."""
    normal = _sphere_normals(x, y)
    rgb = _solid(x, _jitter((0.98, 0.56, 0.07), rng, 0.04))
    pores = value_noise(x, y, rng, 15.0)
    rgb = rgb * (0.86 + 0.22 * pores)[..., None]
    stem_at, stem_turn = rng.uniform(-0.45, 0.45, 2), rng.uniform(0, np.pi)
    radius = np.hypot(x - stem_at[0], y - stem_at[1])
    angle = np.arctan2(y - stem_at[1], x - stem_at[0])
    star = 0.13 + 0.06 * np.cos(5 * angle + stem_turn)
    rgb = _mix(rgb, rgb * 0.75, smoothstep(0.34, 0.1, radius))
    rgb = _mix(rgb, np.array([0.25, 0.42, 0.12]), smoothstep(star + 0.02, star - 0.02, radius))
    return _shade_ball(rgb, normal, light, 0.3), x * x + y * y < 1.0


def paint_banana(x: Array, y: Array, light: Array, rng: Rng) -> Painted:
    """A banana: a bent tapering band with brown tips and spots."""
    # The band follows a circle round (0, -0.35) that opens upwards; scaled to fill the disc.
    x, y = 0.76 * x, 0.76 * y + 0.24
    bend = rng.uniform(0.55, 0.8)
    radius, angle = np.hypot(x, y + 0.35), np.arctan2(x, y + 0.35)
    reach = 0.95 / bend * 0.62 + 0.35
    along = angle / reach
    half_width = 0.235 * np.sqrt(np.clip(1.0 - np.abs(along) ** 3, 0.0, 1.0)) + 0.045
    across = (radius - bend) / half_width
    inside = (np.abs(across) < 1.0) & (np.abs(along) < 1.0)
    yellow = _jitter((0.96, 0.83, 0.2), rng, 0.04)
    if rng.random() < 0.2:
        yellow = yellow * np.array([0.8, 1.0, 0.9])
    rgb = yellow * (0.92 + 0.12 * value_noise(x, y, rng, 3.0))[..., None]
    ridge = smoothstep(0.16, 0.0, np.abs(across - 0.2))
    rgb = rgb * (1.0 - 0.22 * smoothstep(0.2, 1.0, across) - 0.12 * ridge)[..., None]
    spots = smoothstep(0.77, 0.86, value_noise(x, y, rng, 9.0))
    brown = np.array([0.36, 0.23, 0.1])
    rgb = _mix(rgb, brown, 0.7 * spots)
    rgb = _mix(rgb, brown, smoothstep(0.86, 0.96, np.abs(along)))
    # The band is round: its normal leans outwards along the radius.
    lean = np.clip(across, -1, 1)
    outwards = np.stack([x, y + 0.35, np.zeros_like(x)], -1) / np.maximum(radius, 1e-6)[..., None]
    normal = outwards * lean[..., None] + np.array([0, 0, 1]) * np.sqrt(1 - lean**2)[..., None]
    return _shade_ball(rgb, normal, light, 0.1), inside


def paint_pizza(x: Array, y: Array, light: Array, rng: Rng) -> Painted:
    """A pizza: crust, cheese and tomato, slices of sausage, herbs; sometimes a piece is missing."""
    radius, angle = np.hypot(x, y), np.arctan2(y, x)
    phase = rng.uniform(0, 2 * np.pi, 2)
    edge = 0.96 + 0.02 * np.sin(3 * angle + phase[0]) + 0.015 * np.sin(7 * angle + phase[1])
    inside = radius < edge
    if rng.random() < 0.4:
        cut, width = rng.uniform(-np.pi, np.pi), np.pi / rng.integers(4, 9)
        inside &= np.abs((angle - cut + np.pi) % (2 * np.pi) - np.pi) > width
    crust = _jitter((0.78, 0.55, 0.28), rng) * (0.75 + 0.4 * value_noise(x, y, rng, 6.0))[..., None]
    melted = value_noise(x, y, rng, 4.0)[..., None]
    cheese = (
        _jitter((0.95, 0.79, 0.38), rng, 0.04) * (1 - melted)
        + np.array([0.86, 0.42, 0.16]) * melted
    )
    rgb = _mix(crust, cheese, smoothstep(0.02, -0.02, radius - edge + 0.14))
    for _ in range(rng.integers(6, 11)):
        distance, turn = 0.66 * np.sqrt(rng.random()), rng.uniform(0, 2 * np.pi)
        from_slice = np.hypot(x - distance * np.cos(turn), y - distance * np.sin(turn))
        sausage = np.array([0.66, 0.13, 0.09]) * rng.uniform(0.85, 1.15)
        rim = smoothstep(0.11, 0.15, from_slice)[..., None]
        rgb = _mix(rgb, sausage * (1 - 0.35 * rim), smoothstep(0.17, 0.15, from_slice))
    herbs = smoothstep(0.8, 0.84, value_noise(x, y, rng, 10.0)) * (radius < edge - 0.18)
    return _shade_flat(_mix(rgb, np.array([0.2, 0.4, 0.12]), herbs), x, y, light), inside


def _paint_ring(
    x: Array,
    y: Array,
    light: Array,
    rng: Rng,
    *,
    dough: Array,
    hole: float,
    coat: tuple[Array, int],
) -> Painted:
    """A ring of dough with a coat, ``(colour, number of sprinkles)``, on its upper side."""
    radius, angle = np.hypot(x, y), np.arctan2(y, x)
    middle, half_width = (0.97 + hole) / 2, (0.97 - hole) / 2
    across = np.clip((radius - middle) / half_width, -1, 1)
    rgb = dough * (0.82 + 0.3 * value_noise(x, y, rng, 5.0))[..., None]
    colour, sprinkles = coat
    wave = 0.72 + 0.09 * np.sin(rng.integers(5, 10) * angle + rng.uniform(0, 6.3))
    coated = smoothstep(wave, wave - 0.1, np.abs(across))
    rgb = _mix(rgb, colour, coated)
    palette = np.array([[0.95, 0.95, 0.9], [0.2, 0.5, 0.9], [0.95, 0.85, 0.2], [0.3, 0.75, 0.35]])
    for _ in range(sprinkles):
        turn, spin = rng.uniform(0, 2 * np.pi), rng.uniform(0, np.pi)
        distance = middle + rng.uniform(-0.6, 0.6) * half_width
        cx, cy = distance * np.cos(turn), distance * np.sin(turn)
        dx, dy = 0.05 * np.cos(spin), 0.05 * np.sin(spin)
        off = _segment_distance(x, y, (cx - dx, cy - dy), (cx + dx, cy + dy))
        rgb = _mix(rgb, palette[rng.integers(len(palette))], smoothstep(0.04, 0.02, off) * coated)
    outwards = np.stack([x, y, np.zeros_like(x)], -1) / np.maximum(radius, 1e-6)[..., None]
    normal = outwards * across[..., None] + np.array([0, 0, 1]) * np.sqrt(1 - across**2)[..., None]
    return _shade_ball(rgb, normal, light, 0.2), (radius < 0.97) & (radius > hole)


def paint_donut(x: Array, y: Array, light: Array, rng: Rng) -> Painted:
    """A doughnut with pink, chocolate or white icing and sprinkles."""
    icing = [(0.93, 0.5, 0.66), (0.3, 0.16, 0.09), (0.96, 0.93, 0.88)][rng.integers(3)]
    coat = (_jitter(icing, rng, 0.04), int(rng.integers(18, 30)))
    dough = _jitter((0.8, 0.56, 0.27), rng)
    return _paint_ring(x, y, light, rng, dough=dough, hole=0.27, coat=coat)


def paint_bagel(x: Array, y: Array, light: Array, rng: Rng) -> Painted:
    """A bagel: a plain brown ring with a small hole, sprinkled with sesame."""
    coat = (_jitter((0.62, 0.34, 0.12), rng), 0)
    dough = _jitter((0.76, 0.5, 0.22), rng)
    return _paint_ring(x, y, light, rng, dough=dough, hole=0.19, coat=coat)


def paint_clock(x: Array, y: Array, light: Array, rng: Rng) -> Painted:
    """A wall clock: a coloured rim, a white face with twelve marks and two hands."""
    rims = [
        (0.1, 0.1, 0.12),
        (0.45, 0.26, 0.12),
        (0.72, 0.12, 0.12),
        (0.6, 0.62, 0.65),
        (0.1, 0.25, 0.5),
    ]
    rim = _jitter(rims[rng.integers(len(rims))], rng, 0.04)
    radius, angle = np.hypot(x, y), np.arctan2(y, x)
    inside = radius < 0.97
    if rng.random() < 0.25:
        inside = np.maximum(np.abs(x), np.abs(y)) < 0.9
    face = _jitter((0.94, 0.93, 0.88), rng, 0.04)
    rim_rgb = rim * (1 + 0.5 * smoothstep(0.09, 0.0, np.abs(radius - 0.9)))[..., None]
    rgb = _mix(rim_rgb, face, smoothstep(0.82, 0.79, radius))
    to_mark = np.abs((angle * 6 / np.pi + 0.5) % 1.0 - 0.5) * np.pi / 6 * radius
    mark = smoothstep(0.045, 0.025, to_mark) * (radius > 0.62) * (radius < 0.76)
    rgb = _mix(rgb, BLACK, mark)
    minutes = rng.uniform(0, 12 * 60)
    for turn, reach, width in ((minutes / 720, 0.42, 0.06), (minutes / 60, 0.66, 0.04)):
        tip = (reach * np.sin(2 * np.pi * turn), -reach * np.cos(2 * np.pi * turn))
        hand = _segment_distance(x, y, (-0.15 * tip[0], -0.15 * tip[1]), tip)
        rgb = _mix(rgb, BLACK, smoothstep(width + 0.02, width, hand))
    return _shade_flat(rgb, x, y, light), inside


_LETTERS = {
    "S": "9,1.5 6,0 2.5,.5 1,2.5 3,4.5 7,5.5 9,7.8 7,9.7 3.5,10 1,8.5",
    "T": "0,0 10,0 5,0 5,10",
    "O": "5,0 1.5,1.5 .5,5 1.5,8.5 5,10 8.5,8.5 9.5,5 8.5,1.5 5,0",
    "P": "1,10 1,0 6.5,0 9.2,1.5 9.2,4 6.5,5.5 1,5.5",
}
"""Strokes of the letters on a stop sign, each in a box from (0, 0) top left to (10, 10)."""


def paint_stop_sign(x: Array, y: Array, light: Array, rng: Rng) -> Painted:
    """A stop sign: a red octagon with a white border and the word STOP."""
    octagon = np.maximum(np.maximum(np.abs(x), np.abs(y)), (np.abs(x) + np.abs(y)) / 2**0.5)
    red = _jitter((0.74, 0.07, 0.1), rng, 0.04)
    fading = value_noise(x, y, rng, 3.0)
    rgb = _mix(_solid(x, WHITE), red, smoothstep(0.85, 0.83, octagon))
    for index, letter in enumerate("STOP"):
        points = [point.split(",") for point in _LETTERS[letter].split()]
        left = -0.68 + 0.36 * index
        strokes = [(left + 0.028 * float(u), -0.29 + 0.058 * float(v)) for u, v in points]
        rgb = _mix(rgb, WHITE, smoothstep(0.065, 0.04, _polyline_distance(x, y, strokes)))
    return _shade_flat(rgb * (0.85 + 0.2 * fading)[..., None], x, y, light), octagon < 0.93


def paint_kite(x: Array, y: Array, light: Array, rng: Rng) -> Painted:
    """A kite: a diamond of four coloured cloths on two spars, with a short tail of bows."""
    top, bottom, side = -0.97, 0.55, rng.uniform(0.55, 0.7)
    spar = rng.uniform(-0.45, -0.25)
    height = np.where(y < spar, (y - top) / (spar - top), (bottom - y) / (bottom - spar))
    cloth = np.abs(x) < side * height
    palette = np.array(
        [
            [0.88, 0.12, 0.18],
            [0.98, 0.8, 0.1],
            [0.12, 0.4, 0.85],
            [0.1, 0.65, 0.4],
            [0.6, 0.2, 0.7],
            [0.98, 0.5, 0.1],
        ]
    )
    colours = palette[rng.permutation(len(palette))[:3]]
    quarter = (x > 0) ^ (y > spar)
    rgb = _mix(_solid(x, colours[0]), colours[1], quarter)
    stripe = np.abs(height - np.abs(x) / side) < 0.12
    rgb = _mix(rgb, WHITE, stripe & cloth)
    spars = np.minimum(np.abs(x), np.abs(y - spar))
    rgb = _mix(rgb, BLACK * 2, smoothstep(0.03, 0.015, spars))
    rgb = rgb * (0.85 + 0.25 * value_noise(x, y, rng, 3.0))[..., None]
    swing = (
        0.16 * np.sin(6.0 * (y - bottom) + rng.uniform(0, 6.3)) * np.clip((y - bottom) * 6, 0, 1)
    )
    bow = np.abs(np.sin((y - bottom) * np.pi / 0.2))
    tail = (np.abs(x - swing) < 0.035 + 0.1 * bow) & (y > bottom - 0.03) & (y < 0.97)
    return _shade_flat(_mix(rgb, colours[2], tail & ~cloth), x, y, light), cloth | tail


def paint_umbrella(x: Array, y: Array, light: Array, rng: Rng) -> Painted:
    """An open umbrella from the side: a scalloped dome of segments, a stick and a hook."""
    rim = 0.12
    dome = (x / 0.96) ** 2 + ((y - rim) / 0.85) ** 2 < 1
    segments = int(rng.integers(2, 4)) * 2
    # Seams of the segments meet at the top: a column's place on the rim grows with its depth.
    depth = np.sqrt(np.clip(1 - ((y - rim) / 0.85) ** 2, 1e-6, 1))
    place = np.arcsin(np.clip(x / 0.96 / depth, -1, 1)) / np.pi + 0.5
    scallop = 0.1 * np.abs(np.sin(np.pi * place * segments))
    canopy = dome & (y < rim - scallop + 0.02)
    hues = rng.permutation(5)[:2]
    palette = np.array(
        [
            [0.8, 0.1, 0.15],
            [0.95, 0.9, 0.85],
            [0.1, 0.3, 0.65],
            [0.95, 0.75, 0.15],
            [0.15, 0.5, 0.35],
        ]
    )
    rgb = _mix(
        _solid(x, palette[hues[0]]), palette[hues[1]], (place * segments).astype(np.int64) % 2 == 1
    )
    seam = np.abs((place * segments + 0.5) % 1.0 - 0.5)
    rgb = rgb * (1 - 0.3 * smoothstep(0.08, 0.0, seam))[..., None]
    normal = _sphere_normals(np.clip(x, -1, 1), np.clip((y - rim) / 0.85, -1, 1))
    rgb = _shade_ball(rgb, normal, light, 0.1)
    hook = [(0.0, rim - 0.1), (0.0, 0.8), (0.04, 0.9), (0.12, 0.93), (0.19, 0.88), (0.21, 0.78)]
    stick = _polyline_distance(x, y, hook) < 0.035
    wood = _jitter((0.4, 0.25, 0.13), rng, 0.04)
    return _mix(rgb, wood, stick & ~canopy), canopy | stick


class Thing(NamedTuple):
    """A kind of object.

    Attributes:
        painter: draws it.
        tilt: how far it may turn from upright, in radians.
        squeeze: how narrow it may look because it is seen from the side; 1 for round things.
    """

    painter: Painter
    tilt: float
    squeeze: float


ANY_WAY_UP = np.pi

STOP_SIGN = Thing(paint_stop_sign, 0.3, 0.75)
SOCCER_BALL = Thing(paint_soccer_ball, ANY_WAY_UP, 1.0)
BASKETBALL = Thing(paint_basketball, ANY_WAY_UP, 1.0)
SPORTS_BALL = Thing(paint_sports_ball, ANY_WAY_UP, 1.0)
KITE = Thing(paint_kite, 1.0, 0.85)
UMBRELLA = Thing(paint_umbrella, 0.5, 0.9)
BANANA = Thing(paint_banana, ANY_WAY_UP, 0.9)
ORANGE = Thing(paint_orange, ANY_WAY_UP, 0.96)
PIZZA = Thing(paint_pizza, ANY_WAY_UP, 0.8)
DONUT = Thing(paint_donut, ANY_WAY_UP, 0.85)
BAGEL = Thing(paint_bagel, ANY_WAY_UP, 0.85)
CLOCK = Thing(paint_clock, 0.3, 0.75)

SCENE_THINGS = (
    (STOP_SIGN, "stop sign", 44),
    (SPORTS_BALL, "sports ball", 120),
    (KITE, "kite", 0),
    (BANANA, "banana", 121),
    (ORANGE, "orange", 121),
    (PIZZA, "pizza", 121),
    (DONUT, "donut", 121),
    (CLOCK, "clock", 149),
)
"""What the scenes of the COCO and ADE20K samples show: the thing, its COCO category and its label
in ADE20K's annotation pictures (44 signboard, 120 ball, 121 food, 149 clock; it has no kites)."""

IMAGENET_THINGS = {
    "n02708093": (CLOCK, 409),
    "n02802426": (BASKETBALL, 430),
    "n04254680": (SOCCER_BALL, 805),
    "n04507155": (UMBRELLA, 879),
    "n06794110": (STOP_SIGN, 919),
    "n07693725": (BAGEL, 931),
    "n07747607": (ORANGE, 950),
    "n07753592": (BANANA, 954),
}
"""WordNet id -> the thing and its index among ImageNet's 1000 classes (analog clock, basketball,
soccer ball, umbrella, street sign, bagel, orange, banana)."""
