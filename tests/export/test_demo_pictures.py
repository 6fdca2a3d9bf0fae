"""The demo model's pictures, made by the pipeline from the shipped bundle, keep to their prompts.

The fast tests ask for a sample and allow for its size: a model that just meets the full tests' limits fails them about
once in a thousand times.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pytest

import sdrt
from sdrt.engines import demo
from sdrt.runtime.samplers import SAMPLERS
from tests.export.demo_prompts import held_out, measured, pictures, unseen, unseen_pairs
from tests.judge import read

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Iterator[sdrt.Pipeline]:
    with sdrt.load(demo.bundle_folder(tmp_path_factory.mktemp("home"))) as opened:
        yield opened


def _at_least(share: float, count: int) -> float:
    """Limit for a sample of `count`: three standard deviations below a share."""
    return share - 3 * math.sqrt(share * (1 - share) / count)


def test_a_sample_of_unseen_prompts_is_followed(pipe: sdrt.Pipeline) -> None:
    shares = measured(pipe, unseen(40, seed=100))
    assert shares["all"] >= _at_least(0.9, 40)
    assert shares["size"] >= _at_least(0.85, 20)
    assert shares["place"] >= _at_least(0.85, 20)


def test_a_sample_of_pairs_is_followed(pipe: sdrt.Pipeline) -> None:
    assert measured(pipe, unseen_pairs(20, seed=200))["pair"] >= _at_least(0.6, 20)


def test_one_seed_gives_one_picture_and_another_seed_another(pipe: sdrt.Pipeline) -> None:
    prompt = ["a large red star on a blue background"]
    first, again, other = (pictures(pipe, prompt, seed=seed)[0] for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first.astype(int) - other).max() > 50
    for image in (first, other):
        assert read(image).objects[0].shape == "star"


def test_an_empty_prompt_gives_varied_scenes(pipe: sdrt.Pipeline) -> None:
    readings = [read(image) for image in pictures(pipe, [""] * 12)]
    assert len({reading.background for reading in readings}) >= 4
    kinds = {(found.shape, found.colour) for reading in readings for found in reading.objects}
    assert len(kinds) >= 5


def test_guidance_helps(pipe: sdrt.Pipeline) -> None:
    asked = unseen(40, seed=300)
    assert measured(pipe, asked, guidance_scale=1.0)["all"] < measured(pipe, asked)["all"]


def test_a_negative_prompt_keeps_a_colour_away(pipe: sdrt.Pipeline) -> None:
    images = pictures(pipe, ["a star on a blue background"] * 20, negative_prompt="red")
    assert not any(found.colour == "red" for image in images for found in read(image).objects)


@pytest.mark.full_size
def test_unseen_prompts_are_followed(pipe: sdrt.Pipeline) -> None:
    shares = measured(pipe, unseen(200, seed=1))
    assert shares["all"] >= 0.9
    assert shares["size"] >= 0.85
    assert shares["place"] >= 0.85


@pytest.mark.full_size
def test_held_out_combinations_are_followed(pipe: sdrt.Pipeline) -> None:
    assert measured(pipe, held_out(200, seed=2))["all"] >= 0.85


@pytest.mark.full_size
def test_pairs_are_followed(pipe: sdrt.Pipeline) -> None:
    assert measured(pipe, unseen_pairs(200, seed=3))["pair"] >= 0.6


@pytest.mark.full_size
@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_every_sampler_follows_unseen_prompts(pipe: sdrt.Pipeline, sampler: str) -> None:
    assert measured(pipe, unseen(200, seed=4), sampler=sampler)["all"] >= 0.85


@pytest.mark.full_size
def test_a_negative_prompt_keeps_a_colour_away_from_200_seeds(pipe: sdrt.Pipeline) -> None:
    images = pictures(pipe, ["a star on a blue background"] * 200, negative_prompt="red")
    red = [any((found.shape, found.colour) == ("star", "red") for found in read(image).objects) for image in images]
    assert np.mean(red) < 0.02
