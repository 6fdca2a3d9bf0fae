"""The judge reads what the renderer drew, also through blur and noise, and tells wrong pictures from right ones."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from sdrt.export.demo.captions import caption
from sdrt.export.demo.scenes import COLOURS, SHAPES, Scene, SceneObject, draw, sample_scene
from tests.judge import read, verdicts

if TYPE_CHECKING:
    from numpy.typing import NDArray


def _scenes(count: int, seed: int) -> list[tuple[Scene, str]]:
    rng = np.random.default_rng(seed)
    scenes = [sample_scene(rng, held=i % 2 == 1) for i in range(count)]
    return [
        (scene, caption(scene, rng, partial=False) or caption(scene, rng, partial=False, unseen=True))
        for scene in scenes
    ]


def _blurred(image: NDArray[Any]) -> NDArray[np.float64]:
    padded = np.pad(image.astype(float), ((1, 1), (1, 1), (0, 0)), mode="edge")
    rows = (padded[:-2] + 2 * padded[1:-1] + padded[2:]) / 4
    both: NDArray[np.float64] = (rows[:, :-2] + 2 * rows[:, 1:-1] + rows[:, 2:]) / 4
    return both


@pytest.mark.parametrize("seed", [0, 1])
def test_at_least_99_percent_of_rendered_scenes_are_read_right(seed: int) -> None:
    answers = [verdicts(draw(scene), scene, text) for scene, text in _scenes(400, seed)]
    for name in ("shape", "colour", "background", "all", "size", "place", "pair"):
        asked = [answer[name] for answer in answers if name in answer]
        assert len(asked) > 50
        assert np.mean(asked) >= 0.99, name


def test_blur_and_noise_like_an_autoencoders_do_not_mislead_it() -> None:
    rng = np.random.default_rng(2)
    right: list[bool] = []
    for scene, text in _scenes(300, 3):
        image = _blurred(_blurred(draw(scene))) + rng.normal(0, 5, (128, 128, 3))
        right += verdicts(image.clip(0, 255).astype(np.uint8), scene, text).values()
    assert np.mean(right) >= 0.98


def test_it_says_no_to_every_other_shape_colour_size_place_and_background() -> None:
    asked = SceneObject("star", "red", 0.5, 0.5, 0.15, "small", "centre")
    scene, text = Scene("blue", (asked,)), "a small red star in the centre on blue"
    assert all(verdicts(draw(scene), scene, text).values())
    for shape in set(SHAPES) - {"star"}:
        other = draw(Scene("blue", (replace(asked, shape=shape),)))
        assert verdicts(other, scene, text) == {
            "shape": False, "colour": True, "background": True, "all": False, "size": True, "place": True,
        }  # fmt: skip
    for colour in set(COLOURS) - {"red", "blue"}:
        assert not verdicts(draw(Scene("blue", (replace(asked, colour=colour),))), scene, text)["colour"]
        assert not verdicts(draw(Scene(colour, (asked,))), scene, text)["background"]
    assert not verdicts(draw(Scene("blue", (replace(asked, radius=0.26),))), scene, text)["size"]
    assert not verdicts(draw(Scene("blue", (replace(asked, x=0.29),))), scene, text)["place"]


def test_a_pair_is_right_only_as_asked() -> None:
    first, second = SceneObject("star", "red", 0.26, 0.5, 0.19), SceneObject("ring", "cyan", 0.74, 0.5, 0.19)
    image = draw(Scene("white", (first, second)))
    assert verdicts(image, Scene("white", (first, second), "left"), "") == {"pair": True}
    assert verdicts(image, Scene("white", (second, first), "right"), "") == {"pair": True}
    for wrong in (
        Scene("white", (second, first), "left"),
        Scene("white", (first, second), "above"),
        Scene("black", (first, second), "left"),
        Scene("white", (replace(first, colour="cyan"), replace(second, colour="red")), "left"),
    ):
        assert verdicts(image, wrong, "") == {"pair": False}


def test_pictures_without_an_object_or_full_of_noise_are_read_without_error() -> None:
    assert read(np.full((128, 128, 3), 250, np.uint8)).objects == ()
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    assert read(noise).background in COLOURS
