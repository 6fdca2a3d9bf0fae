"""What a scene is called: several phrasings, each naming all of it or a part.

A tenth of all captions, chosen by the caption's own checksum, never appears in training, so that prompts can be drawn
that the model has not seen although it knows every word in them.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import numpy as np

    from .scenes import Scene

__all__ = ["caption", "reserved", "word"]

_PLACE_WORDS: Final = {
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
    "centre": "in the centre",
}
_RELATION_WORDS: Final = {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"}
_ENDINGS: Final = (" on a {} background", " on {}", ", {} background")


def reserved(text: str) -> bool:
    """Tell whether this caption is one of the tenth that training never sees."""
    return zlib.crc32(text.encode()) % 10 == 0


def caption(scene: Scene, rng: np.random.Generator, *, unseen: bool = False, partial: bool = True) -> str:
    """Describe a scene in one of several phrasings.

    Parameters
    ----------
    scene
        What to describe.
    rng
        Chooses the phrasing, and which attributes are named.
    unseen
        Choose among the captions that are reserved for tests, instead of among those for training.
    partial
        Leave out a colour or the background now and then.

    Returns
    -------
    The caption; empty if no phrasing of the asked kind turned up, as happens where all three of a pair are reserved.

    """
    for _ in range(100):
        text = _pair(scene, rng) if scene.relation else _single(scene, rng, partial=partial)
        if reserved(text) == unseen:
            return text
    return ""


def word(scene: Scene, rng: np.random.Generator) -> str:
    """Name the shape or the colour of one of a scene's objects, and nothing else."""
    item = scene.objects[rng.integers(len(scene.objects))]
    return item.shape if rng.random() < 0.5 else item.colour


def _single(scene: Scene, rng: np.random.Generator, *, partial: bool) -> str:
    item = scene.objects[0]
    words = [item.shape]
    if not partial or rng.random() > 0.1:
        words.insert(0, item.colour)
    if item.size and rng.random() < 0.5:
        words.insert(0, item.size)
    ending = _ENDINGS[rng.integers(3)]
    article = "" if ending.startswith(",") and rng.random() < 0.7 else "a "
    if article and words[0] == "orange":
        article = "an "
    place = " " + _PLACE_WORDS[item.place] if item.place and rng.random() < 0.5 else ""
    if partial and rng.random() < 0.05:
        ending = ""
    background = scene.background
    text = article + " ".join(words) + place + ending.format(background)
    return text.replace("on a orange", "on an orange")


def _pair(scene: Scene, rng: np.random.Generator) -> str:
    first, second = (f"{'an' if item.colour == 'orange' else 'a'} {item.colour} {item.shape}" for item in scene.objects)
    ending = _ENDINGS[rng.integers(3)].format(scene.background)
    text = f"{first} {_RELATION_WORDS[scene.relation or '']} {second}{ending}"
    return text.replace("on a orange", "on an orange")
