"""Reads shape, colour, size, place and background out of a picture of the demo model's kind; numpy, nothing learnt.

The background is the border's dominant colour. What differs from it falls into connected components; each one's outline
is where its colour and the background's meet halfway. The shape is the one of six, defined here anew and not by the
renderer, that overlaps best when laid into the same bounding box.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sdrt.export.demo.scenes import COLOURS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sdrt.export.demo.scenes import Scene

_NAMES = tuple(COLOURS)
_PALETTE = np.array(list(COLOURS.values()), np.float64)
_FAR_FROM_BACKGROUND = 45.0  # RGB distance; the closest two colours are 90 apart
_SMALLEST = 0.006  # of the picture's area; a small star covers 0.024
_SIZE_LIMIT = 0.345  # longer side of the bounding box; small ones end at 0.31, large ones begin at 0.38
_CENTRE_LIMIT = 0.11  # offset of the box from the centre; places are 0.21 off
_GRID = 48


@dataclass(frozen=True)
class Found:
    """One object: `x`, `y` are its bounding box's centre, `extent` its longer side, as fractions of the picture."""

    shape: str
    colour: str
    x: float
    y: float
    extent: float

    @property
    def size(self) -> str:
        return "small" if self.extent < _SIZE_LIMIT else "large"

    @property
    def place(self) -> str:
        dx, dy = self.x - 0.5, self.y - 0.5
        if max(abs(dx), abs(dy)) < _CENTRE_LIMIT:
            return "centre"
        if abs(dx) > abs(dy):
            return "left" if dx < 0 else "right"
        return "top" if dy < 0 else "bottom"


@dataclass(frozen=True)
class Reading:
    """Background and objects of a picture, the largest object first."""

    background: str
    objects: tuple[Found, ...]


def read(image: NDArray[np.uint8]) -> Reading:
    """Read a (H, W, 3) uint8 picture."""
    pixels = image.astype(np.float64)
    height, width, _ = image.shape
    sides = (pixels[:4], pixels[-4:], pixels[:, :4], pixels[:, -4:])
    border = np.concatenate([side.reshape(-1, 3) for side in sides])
    names = _nearest(border)
    background = int(np.bincount(names).argmax())
    ground = np.median(border[names == background], axis=0)
    labels = _components(np.linalg.norm(pixels - ground, axis=-1) > _FAR_FROM_BACKGROUND)
    areas = np.bincount(labels.ravel())
    areas[0] = 0
    order = [int(i) for i in np.argsort(-areas) if areas[i] >= _SMALLEST * height * width]
    return Reading(_NAMES[background], tuple(_describe(pixels, labels == label, ground) for label in order))


def _nearest(colours: NDArray[np.float64]) -> NDArray[np.intp]:
    nearest: NDArray[np.intp] = np.linalg.norm(colours[..., None, :] - _PALETTE, axis=-1).argmin(-1)
    return nearest


def _components(mask: NDArray[np.bool_]) -> NDArray[np.intp]:
    """Label 4-connected components, each by the largest number of its pixels, counted from 1."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        wide = np.pad(labels, 1)
        spread = np.maximum(np.maximum(wide[:-2, 1:-1], wide[2:, 1:-1]), np.maximum(wide[1:-1, :-2], wide[1:-1, 2:]))
        spread = np.where(mask, np.maximum(spread, labels), 0)
        if np.array_equal(spread, labels):
            return labels
        labels = spread


def _grown(mask: NDArray[np.bool_], by: int) -> NDArray[np.bool_]:
    for _ in range(by):
        wide = np.pad(mask, 1)
        mask = wide[1:-1, 1:-1] | wide[:-2, 1:-1] | wide[2:, 1:-1] | wide[1:-1, :-2] | wide[1:-1, 2:]
    return mask


def _describe(pixels: NDArray[np.float64], mask: NDArray[np.bool_], ground: NDArray[np.float64]) -> Found:
    inner = ~_grown(~mask, 2)
    colour = np.median(pixels[inner if inner.any() else mask], axis=0)
    towards = (colour - ground) / max(1e-9, float(((colour - ground) ** 2).sum()))
    outline = _grown(mask, 2) & ((pixels - ground) @ towards > 0.5)
    rows, columns = np.flatnonzero(outline.any(1)), np.flatnonzero(outline.any(0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    steps = (np.arange(_GRID) + 0.5) / _GRID
    box = outline[np.ix_((top + steps * (bottom - top)).astype(int), (left + steps * (right - left)).astype(int))]
    overlaps = {name: (box & ideal).sum() / (box | ideal).sum() for name, ideal in _IDEALS.items()}
    shape = max(overlaps, key=lambda name: float(overlaps[name]))
    height, width = mask.shape
    return Found(
        shape,
        _NAMES[int(_nearest(colour))],
        (left + right) / 2 / width,
        (top + bottom) / 2 / height,
        max((bottom - top) / height, (right - left) / width),
    )


def _ideals() -> dict[str, NDArray[np.bool_]]:
    """The six shapes on a grid over their bounding boxes."""
    v, u = np.mgrid[0:_GRID, 0:_GRID] / (_GRID / 2) + 1 / _GRID - 1
    radius = np.hypot(u, v)
    # A star's spike, folded: between a tip at distance 1 and a notch at 0.42, a tenth of a turn apart.
    x, y = u * np.sin(0.4 * np.pi), (v + 1) / 2 * (1 + np.cos(0.2 * np.pi)) - 1
    angle = np.abs((np.arctan2(x, -y) + 0.2 * np.pi) % (0.4 * np.pi) - 0.2 * np.pi)
    notch_x, notch_y = 0.42 * np.cos(0.2 * np.pi), 0.42 * np.sin(0.2 * np.pi)
    along, across = np.hypot(x, y) * np.cos(angle), np.hypot(x, y) * np.sin(angle)
    return {
        "circle": radius < 1,
        "square": radius < 2,
        "triangle": np.abs(u) < (v + 1) / 2,
        "star": along * notch_y + across * (1 - notch_x) < notch_y,
        "ring": (radius < 1) & (radius > 0.54),
        "cross": (np.abs(u) < 0.32) | (np.abs(v) < 0.32),
    }


_IDEALS = _ideals()


def verdicts(image: NDArray[np.uint8], scene: Scene, prompt: str) -> dict[str, bool]:
    """Tell which of the attributes that a prompt names the picture has.

    The keys for one object are shape, colour and background, `all` for these three together, and size and place where
    the prompt names them; for two objects there is `pair`: both objects, their relation and the background.
    """
    reading = read(image)
    right_background = reading.background == scene.background
    if scene.relation:
        return {"pair": right_background and _right_pair(reading, scene)}
    asked = scene.objects[0]
    found = reading.objects[0] if len(reading.objects) == 1 else None
    verdict = {
        "shape": found is not None and found.shape == asked.shape,
        "colour": found is not None and found.colour == asked.colour,
        "background": right_background,
    }
    verdict["all"] = all(verdict.values())
    words = prompt.replace(",", " ").split()
    if asked.size in words:
        verdict["size"] = found is not None and found.size == asked.size
    if asked.place in words:
        verdict["place"] = found is not None and found.place == asked.place
    return verdict


def _right_pair(reading: Reading, scene: Scene) -> bool:
    if len(reading.objects) != 2:
        return False
    axis, sign = {"left": ("x", -1), "right": ("x", 1), "above": ("y", -1), "below": ("y", 1)}[scene.relation or ""]
    ordered = sorted(reading.objects, key=lambda found: -sign * float(getattr(found, axis)))
    other = "y" if axis == "x" else "x"
    apart = abs(getattr(ordered[0], axis) - getattr(ordered[1], axis))
    aside = abs(getattr(ordered[0], other) - getattr(ordered[1], other))
    return apart > aside and all(
        (found.shape, found.colour) == (asked.shape, asked.colour)
        for found, asked in zip(ordered, scene.objects, strict=True)
    )
