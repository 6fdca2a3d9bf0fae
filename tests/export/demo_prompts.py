"""Prompts that the demo model never saw in training, its pictures of them, and how well these keep to them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from sdrt.export.demo.captions import caption
from sdrt.export.demo.scenes import Scene, sample_scene
from tests.judge import verdicts

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    import sdrt

Asked = tuple[Scene, str]


def unseen(count: int, seed: int) -> list[Asked]:
    """Prompts that never appeared, half of them for held-out combinations of shape, colour and background."""
    return [*held_out(count // 2, seed), *_prompts(count - count // 2, seed + 1, held=False, pairs=False)]


def held_out(count: int, seed: int) -> list[Asked]:
    return _prompts(count, seed, held=True, pairs=False)


def unseen_pairs(count: int, seed: int) -> list[Asked]:
    return _prompts(count, seed, held=False, pairs=True)


def _prompts(count: int, seed: int, *, held: bool, pairs: bool) -> list[Asked]:
    """Draw prompts: of held-out combinations in any wording, of others in a wording reserved for tests."""
    rng = np.random.default_rng(seed)
    asked: list[Asked] = []
    while len(asked) < count:
        scene = sample_scene(rng, held=held)
        if (scene.relation is not None) != pairs:
            continue
        text = caption(scene, rng, unseen=not held or bool(rng.integers(2)), partial=False)
        if text:
            asked.append((scene, text))
    return asked


def pictures(pipe: sdrt.Pipeline, prompts: list[str], *, seed: int = 0, **arguments: Any) -> list[NDArray[np.uint8]]:
    """Draw each prompt with a seed of its own; 20 steps and guidance 5 unless told otherwise."""
    settings: dict[str, Any] = {"num_inference_steps": 20, "guidance_scale": 5.0} | arguments
    images: list[NDArray[np.uint8]] = []
    for start in range(0, len(prompts), 20):
        batch = pipe(prompts[start : start + 20], output_type="np", seed=seed + start, **settings)
        images += [np.rint(image * 255).astype(np.uint8) for image in batch]
    return images


def measured(pipe: sdrt.Pipeline, asked: list[Asked], **arguments: Any) -> dict[str, float]:
    """Draw prompts and judge the pictures."""
    return accuracy(asked, pictures(pipe, [text for _, text in asked], **arguments))


def accuracy(asked: Iterable[Asked], images: Iterable[NDArray[np.uint8]]) -> dict[str, float]:
    """Share of pictures that have an attribute, among those whose prompt names it."""
    answers: dict[str, list[bool]] = {}
    for (scene, text), image in zip(asked, images, strict=True):
        for name, right in verdicts(image, scene, text).items():
            answers.setdefault(name, []).append(right)
    return {name: float(np.mean(right)) for name, right in answers.items()}
