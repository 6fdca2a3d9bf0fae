"""What each evaluation of the U-Net comes to, from the two options that save work."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdrt.runtime.work import Work, plan

SIGMAS = [14.0, 8.0, 5.0, 3.0, 2.0, 1.0, 0.5, 0.2, 0.1]
WHOLE, OUTER = True, False

falling = st.lists(st.floats(0.01, 200), min_size=1, max_size=60).map(lambda each: sorted(each, reverse=True))
ends = st.tuples(st.floats(0, 100), st.floats(0, 100)).filter(lambda pair: pair[0] < pair[1])


def kinds(interval: tuple[float, float] | None, every: int, *, guided: bool = True) -> list[tuple[bool, bool]]:
    planned = plan(SIGMAS, guided=guided, guidance_interval=interval, cache_interval=every)
    return [(work.guided, work.whole) for work in planned]


@pytest.mark.parametrize("interval", [None, (0.0, math.inf), (0.0, 14.0)])
@pytest.mark.parametrize("guided", [True, False])
def test_nothing_is_saved_where_the_options_cover_everything(
    interval: tuple[float, float] | None, guided: bool
) -> None:
    assert set(kinds(interval, 1, guided=guided)) == {(guided, WHOLE)}


def test_guidance_is_within_the_interval_whose_upper_end_belongs_to_it() -> None:
    assert [both for both, _ in kinds((0.5, 5.0), 1)] == [False, False, True, True, True, True, False, False, False]
    assert [both for both, _ in kinds((0.5, 5.0), 1, guided=False)] == [False] * 9


def test_the_whole_network_runs_once_in_so_many_evaluations() -> None:
    assert [whole for _, whole in kinds(None, 3)] == [WHOLE, OUTER, OUTER] * 3
    assert [whole for _, whole in kinds(None, 100)] == [WHOLE] + [OUTER] * 8
    assert [whole for _, whole in kinds(None, 4, guided=False)] == [WHOLE, *[OUTER] * 3, WHOLE, *[OUTER] * 3, WHOLE]


def test_guidance_that_sets_in_has_features_of_its_own() -> None:
    assert kinds((0.5, 5.0), 4) == [
        (False, WHOLE),
        (False, OUTER),
        (True, WHOLE),  # earlier than due, and counted from here
        (True, OUTER),
        (True, OUTER),
        (True, OUTER),
        (False, WHOLE),
        (False, OUTER),
        (False, OUTER),
    ]
    # Features of both rows serve the row with the prompt alone.
    assert kinds((3.0, math.inf), 100) == [(True, WHOLE), (True, OUTER), (True, OUTER), *[(False, OUTER)] * 6]


@given(sigmas=falling, interval=ends, every=st.integers(1, 9))
def test_features_are_there_not_too_old_and_of_all_rows(
    sigmas: list[float], interval: tuple[float, float], every: int
) -> None:
    planned = plan(sigmas, guided=True, guidance_interval=interval, cache_interval=every)
    assert len(planned) == len(sigmas)
    last: tuple[int, Work] | None = None
    for index, (sigma, work) in enumerate(zip(sigmas, planned, strict=True)):
        assert work.guided == (interval[0] < sigma <= interval[1])
        if work.whole:
            last = index, work
            continue
        assert last is not None
        assert index - last[0] < every
        assert last[1].guided or not work.guided
    # Noise levels fall, so that guidance sets in once at most.
    assert sum(work.whole for work in planned) <= math.ceil(len(sigmas) / every) + 1
