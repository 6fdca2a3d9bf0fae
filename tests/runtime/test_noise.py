from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdrt.errors import InputError
from sdrt.runtime.noise import TorchGenerator, batch_noise

SEEDS = st.one_of(
    st.integers(-(2**63), 2**64 - 1), st.sampled_from([0, 1, 42, -1, 2**31, 2**32, 2**63, 2**64 - 1, -(2**63)])
)
# Small sizes on both sides of 16 and its multiples, where torch changes its way, and some large ones.
SHAPES = st.one_of(
    st.lists(st.integers(0, 40), min_size=1, max_size=1),
    st.lists(st.integers(0, 9), min_size=0, max_size=4),
    st.tuples(st.just(4), st.integers(8, 64), st.integers(8, 64)),
).map(tuple)


@given(seed=SEEDS, shapes=st.lists(SHAPES, min_size=1, max_size=8))
@settings(deadline=None, max_examples=200)
def test_draws_follow_torch(seed: Any, shapes: list[tuple[int, ...]]) -> None:
    theirs = torch.Generator().manual_seed(seed)
    ours = TorchGenerator(seed)
    for shape in shapes:
        draw = ours.randn(shape)
        assert draw.dtype == np.float32
        assert draw.shape == shape
        np.testing.assert_allclose(draw, torch.randn(shape, generator=theirs).numpy(), rtol=0, atol=1e-6)


def test_a_spare_gaussian_waits_while_large_tensors_are_drawn() -> None:
    theirs = torch.Generator().manual_seed(5)
    ours = TorchGenerator(5)
    for size in (1, 4096, 1, 3, 17, 1):
        np.testing.assert_allclose(ours.randn((size,)), torch.randn(size, generator=theirs).numpy(), rtol=0, atol=1e-6)


def test_known_values() -> None:
    # torch.manual_seed(0); torch.randn(4), printed in countless tutorials; and the first of a 4x64x64 draw.
    np.testing.assert_allclose(TorchGenerator(0).randn((4,)), [1.5410, -0.2934, -2.1788, 0.5684], atol=5e-5)
    assert TorchGenerator(0).randn((4, 64, 64))[0, 0, 0] == pytest.approx(-1.1258, abs=5e-5)


def test_a_long_draw_is_a_unit_gaussian_without_infinities() -> None:
    draw = TorchGenerator(2).randn((4, 512, 512))
    assert np.isfinite(draw).all()
    assert abs(draw.mean()) < 5e-3
    assert abs(draw.std() - 1) < 5e-3


def test_each_image_of_a_batch_has_its_own_generator() -> None:
    draw = batch_noise(range(7, 10), (4, 3, 5))
    first, second = draw(), draw()
    assert first.shape == (3, 4, 3, 5)
    for image, seed in enumerate(range(7, 10)):
        generator = torch.Generator().manual_seed(seed)
        for batch in (first, second):
            expected = torch.randn((1, 4, 3, 5), generator=generator).numpy()[0]
            np.testing.assert_allclose(batch[image], expected, rtol=0, atol=1e-6)


def test_draws_stay_valid_after_the_next_one() -> None:
    draw = batch_noise([3], (4, 2, 2))
    first = draw()
    kept = first.copy()
    draw()
    np.testing.assert_array_equal(first, kept)


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1, 1.0, "1", None, True, np.float32(2)])
def test_bad_seeds_are_refused(seed: Any) -> None:
    with pytest.raises(InputError, match=r"seed is .*expected an integer from"):
        TorchGenerator(seed)


def test_integers_of_numpy_are_seeds() -> None:
    seed: Any = np.int64(9)
    np.testing.assert_array_equal(TorchGenerator(seed).randn((16,)), TorchGenerator(9).randn((16,)))
