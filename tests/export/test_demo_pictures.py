"""The demo model's pictures, made by the pipeline from the shipped checkpoint, keep to their prompts.

The fast tests ask for a sample and allow for its size: a model that just meets the full tests' limits fails them about
once in a thousand times.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import sdrt
from sdrt.export.demo import model_folder
from sdrt.runtime.samplers import SAMPLERS
from tests.conftest import build_once
from tests.export.demo_prompts import accuracy, held_out, unseen, unseen_pairs
from tests.judge import read

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from tests.export.demo_prompts import Asked

pytestmark = pytest.mark.skipif(not model_folder().exists(), reason="the demo model does not ship yet")

Images = list["NDArray[np.uint8]"]


@pytest.fixture(scope="module")
def pipe(workshop: Path) -> Iterator[sdrt.Pipeline]:
    weights = (model_folder() / "unet" / "diffusion_pytorch_model.safetensors").stat()
    with sdrt.load(build_once(model_folder(), workshop / f"demo-{weights.st_mtime_ns}", "fp32")) as opened:
        yield opened


def _pictures(pipe: sdrt.Pipeline, prompts: list[str], *, seed: int = 0, **arguments: Any) -> Images:
    settings: dict[str, Any] = {"num_inference_steps": 20, "guidance_scale": 5.0} | arguments
    images: Images = []
    for start in range(0, len(prompts), 20):
        batch = pipe(prompts[start : start + 20], output_type="np", seed=seed + start, **settings)
        images += [np.rint(image * 255).astype(np.uint8) for image in batch]
    return images


def _measured(pipe: sdrt.Pipeline, asked: list[Asked], **arguments: Any) -> dict[str, float]:
    return accuracy(asked, _pictures(pipe, [text for _, text in asked], **arguments))


def _at_least(share: float, count: int) -> float:
    """Limit for a sample of `count`: three standard deviations below a share."""
    return share - 3 * math.sqrt(share * (1 - share) / count)


def test_a_sample_of_unseen_prompts_is_followed(pipe: sdrt.Pipeline) -> None:
    measured = _measured(pipe, unseen(40, seed=100))
    assert measured["all"] >= _at_least(0.9, 40)
    assert measured["size"] >= _at_least(0.85, 20)
    assert measured["place"] >= _at_least(0.85, 20)


def test_a_sample_of_pairs_is_followed(pipe: sdrt.Pipeline) -> None:
    assert _measured(pipe, unseen_pairs(20, seed=200))["pair"] >= _at_least(0.6, 20)


def test_one_seed_gives_one_picture_and_another_seed_another(pipe: sdrt.Pipeline) -> None:
    prompt = ["a large red star on a blue background"]
    first, again, other = (_pictures(pipe, prompt, seed=seed)[0] for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first.astype(int) - other).max() > 50
    for image in (first, other):
        assert read(image).objects[0].shape == "star"


def test_an_empty_prompt_gives_varied_scenes(pipe: sdrt.Pipeline) -> None:
    readings = [read(image) for image in _pictures(pipe, [""] * 12)]
    assert len({reading.background for reading in readings}) >= 4
    kinds = {(found.shape, found.colour) for reading in readings for found in reading.objects}
    assert len(kinds) >= 5


def test_guidance_helps(pipe: sdrt.Pipeline) -> None:
    asked = unseen(40, seed=300)
    assert _measured(pipe, asked, guidance_scale=1.0)["all"] < _measured(pipe, asked)["all"]


def test_a_negative_prompt_keeps_a_colour_away(pipe: sdrt.Pipeline) -> None:
    images = _pictures(pipe, ["a star on a blue background"] * 20, negative_prompt="red")
    assert not any(found.colour == "red" for image in images for found in read(image).objects)


@pytest.mark.full_size
def test_unseen_prompts_are_followed(pipe: sdrt.Pipeline) -> None:
    measured = _measured(pipe, unseen(200, seed=1))
    assert measured["all"] >= 0.9
    assert measured["size"] >= 0.85
    assert measured["place"] >= 0.85


@pytest.mark.full_size
def test_held_out_combinations_are_followed(pipe: sdrt.Pipeline) -> None:
    assert _measured(pipe, held_out(200, seed=2))["all"] >= 0.85


@pytest.mark.full_size
def test_pairs_are_followed(pipe: sdrt.Pipeline) -> None:
    assert _measured(pipe, unseen_pairs(200, seed=3))["pair"] >= 0.6


@pytest.mark.full_size
@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_every_sampler_follows_unseen_prompts(pipe: sdrt.Pipeline, sampler: str) -> None:
    assert _measured(pipe, unseen(200, seed=4), sampler=sampler)["all"] >= 0.85


@pytest.mark.full_size
def test_a_negative_prompt_keeps_a_colour_away_from_200_seeds(pipe: sdrt.Pipeline) -> None:
    images = _pictures(pipe, ["a star on a blue background"] * 200, negative_prompt="red")
    red = [any((found.shape, found.colour) == ("star", "red") for found in read(image).objects) for image in images]
    assert np.mean(red) < 0.02
