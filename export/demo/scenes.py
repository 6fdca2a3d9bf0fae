"""What the demo model's pictures show, and how they are drawn.

A scene is one or two flat objects on a flat background. Shapes are signed distance functions: coverage, and with it
anti-aliasing, follows from the distance of a pixel's centre to the outline (Inigo Quilez, "2D distance functions").
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

__all__ = [
    "COLOURS",
    "IMAGE_SIZE",
    "PLACES",
    "RADII",
    "RELATIONS",
    "SHAPES",
    "Scene",
    "SceneObject",
    "draw",
    "held_out",
    "sample_scene",
]

IMAGE_SIZE: Final = 128
SHAPES: Final = ("circle", "square", "triangle", "star", "ring", "cross")
COLOURS: Final[dict[str, tuple[int, int, int]]] = {
    "red": (220, 25, 35),
    "green": (30, 160, 60),
    "blue": (35, 70, 225),
    "yellow": (250, 225, 40),
    "orange": (250, 130, 20),
    "purple": (125, 35, 165),
    "pink": (250, 150, 195),
    "cyan": (60, 205, 225),
    "black": (12, 12, 12),
    "white": (250, 250, 250),
}
PLACES: Final[dict[str, tuple[float, float]]] = {
    "left": (0.29, 0.5),
    "right": (0.71, 0.5),
    "top": (0.5, 0.29),
    "bottom": (0.5, 0.71),
    "centre": (0.5, 0.5),
}
RADII: Final = {"small": 0.15, "large": 0.26}
RELATIONS: Final = ("left", "right", "above", "below")
_PAIR_RADIUS: Final = 0.19
_HELD_OUT_SEED: Final = 20


@dataclass(frozen=True)
class SceneObject:
    """One object; centre and radius (of the circle around it) as fractions of the image's side."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float
    size: str | None = None
    place: str | None = None


@dataclass(frozen=True)
class Scene:
    """One object, or two with the first's `relation` to the second, on a background colour."""

    background: str
    objects: tuple[SceneObject, ...]
    relation: str | None = None


def _held_out_combinations() -> frozenset[tuple[str, str, str]]:
    combinations = [(s, c, b) for s in SHAPES for c in COLOURS for b in COLOURS if c != b]
    order = np.random.default_rng(_HELD_OUT_SEED).permutation(len(combinations))
    return frozenset(combinations[i] for i in order[: len(combinations) // 10])


_HELD_OUT: Final = _held_out_combinations()


def held_out(shape: str, colour: str, background: str) -> bool:
    """Tell whether this combination is one of the 10% that training never sees."""
    return (shape, colour, background) in _HELD_OUT


def sample_scene(rng: np.random.Generator, *, held: bool = False) -> Scene:
    """Draw a scene at random, one in four with two objects: one that training may see, or, if `held`, may not."""
    colours = tuple(COLOURS)
    while True:
        background = colours[rng.integers(len(colours))]
        pair = rng.random() < 0.25
        relation = RELATIONS[rng.integers(4)] if pair else None
        objects = _sample_pair(rng, relation) if relation else (_sample_single(rng),)
        kinds = {(o.shape, o.colour) for o in objects}
        if len(kinds) < len(objects):
            continue
        if any(o.colour == background for o in objects):
            continue
        if any(held_out(o.shape, o.colour, background) for o in objects) != held:
            continue
        return Scene(background, objects, relation)


def _sample_single(rng: np.random.Generator) -> SceneObject:
    shape, colour = SHAPES[rng.integers(len(SHAPES))], tuple(COLOURS)[rng.integers(len(COLOURS))]
    size, place = tuple(RADII)[rng.integers(2)], tuple(PLACES)[rng.integers(5)]
    x, y = (c + rng.uniform(-0.025, 0.025) for c in PLACES[place])
    return SceneObject(shape, colour, x, y, RADII[size] * rng.uniform(0.93, 1.07), size, place)


def _sample_pair(rng: np.random.Generator, relation: str) -> tuple[SceneObject, SceneObject]:
    ends = (0.26, 0.74) if relation in {"left", "above"} else (0.74, 0.26)
    objects = []
    for end in ends:
        along, across = end + rng.uniform(-0.02, 0.02), 0.5 + rng.uniform(-0.06, 0.06)
        x, y = (along, across) if relation in {"left", "right"} else (across, along)
        shape, colour = SHAPES[rng.integers(len(SHAPES))], tuple(COLOURS)[rng.integers(len(COLOURS))]
        objects.append(SceneObject(shape, colour, x, y, _PAIR_RADIUS * rng.uniform(0.93, 1.07)))
    return objects[0], objects[1]


def draw(scene: Scene, size: int = IMAGE_SIZE) -> npt.NDArray[np.uint8]:
    """Draw a scene.

    Returns
    -------
    (size, size, 3) uint8 RGB.

    """
    image = np.empty((size, size, 3), np.float32)
    image[:] = COLOURS[scene.background]
    for item in scene.objects:
        _draw_object(image, item)
    return np.rint(image).astype(np.uint8)


def _draw_object(image: npt.NDArray[np.float32], item: SceneObject) -> None:
    size = image.shape[0]
    radius, x0, y0 = item.radius * size, item.x * size, item.y * size
    rows = slice(max(0, int(y0 - radius) - 2), min(size, int(y0 + radius) + 3))
    columns = slice(max(0, int(x0 - radius) - 2), min(size, int(x0 + radius) + 3))
    y = np.arange(rows.start, rows.stop, dtype=np.float32)[:, None] + 0.5 - y0
    x = np.arange(columns.start, columns.stop, dtype=np.float32)[None, :] + 0.5 - x0
    coverage = np.clip(0.5 - _distance(item.shape, x, y, radius), 0, 1)[..., None]
    image[rows, columns] += coverage * (np.asarray(COLOURS[item.colour], np.float32) - image[rows, columns])


def _distance(shape: str, x: npt.NDArray[np.float32], y: npt.NDArray[np.float32], r: float) -> npt.NDArray[np.float32]:
    """Signed distance in pixels, negative inside, to a shape of circumradius `r` around the origin; y points down."""
    if shape == "circle":
        return np.hypot(x, y) - np.float32(0.92 * r)
    if shape == "ring":
        return np.abs(np.hypot(x, y) - np.float32(0.74 * r)) - np.float32(0.22 * r)
    if shape == "square":
        return _box(x, y, 0.8 * r, 0.8 * r)
    if shape == "cross":
        return np.minimum(_box(x, y, 0.95 * r, 0.3 * r), _box(x, y, 0.3 * r, 0.95 * r))
    spikes = 5 if shape == "star" else 3
    radii = (r, 0.42 * r) if shape == "star" else (r,)
    count = spikes * len(radii)
    # A triangle's box is taller above its centre than below: shift it so that the box is centred.
    shift = 0.25 * r if shape == "triangle" else 0.0
    corners = [
        (
            radii[i % len(radii)] * math.sin(2 * math.pi * i / count),
            shift - radii[i % len(radii)] * math.cos(2 * math.pi * i / count),
        )
        for i in range(count)
    ]
    return _polygon(x, y, corners)


def _box(x: npt.NDArray[np.float32], y: npt.NDArray[np.float32], w: float, h: float) -> npt.NDArray[np.float32]:
    dx, dy = np.abs(x) - np.float32(w), np.abs(y) - np.float32(h)
    outside: npt.NDArray[np.float32] = np.hypot(np.maximum(dx, 0), np.maximum(dy, 0))
    return outside + np.minimum(np.maximum(dx, dy), 0)


def _polygon(
    x: npt.NDArray[np.float32], y: npt.NDArray[np.float32], corners: list[tuple[float, float]]
) -> npt.NDArray[np.float32]:
    nearest = np.full(np.broadcast_shapes(x.shape, y.shape), np.inf, np.float32)
    inside = np.zeros(nearest.shape, bool)
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True):
        ex, ey = bx - ax, by - ay
        along = np.clip(((x - ax) * ex + (y - ay) * ey) / (ex * ex + ey * ey), 0, 1)
        nearest = np.minimum(nearest, np.hypot(x - ax - along * ex, y - ay - along * ey))
        if ay != by:  # even-odd rule: count the edges that a ray to the right crosses
            inside ^= ((ay > y) != (by > y)) & (x < ax + (y - ay) / ey * ex)
    return np.where(inside, -nearest, nearest).astype(np.float32)
