"""What each evaluation of the U-Net comes to, from the three options that save work."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdrt.runtime.work import Work, plan

SIGMAS = [14.0, 8.0, 5.0, 3.0, 2.0, 1.0, 0.5, 0.2, 0.1]
WHOLE, OUTER = True, False

falling = st.lists(st.floats(0.01, 200), min_size=1, max_size=60).map(lambda each: sorted(each, reverse=True))
ends = st.tuples(st.floats(0, 100), st.floats(0, 100)).filter(lambda pair: pair[0] < pair[1])


def kinds(interval: tuple[float, float] | None, every: int, *, guided: bool = True) -> list[tuple[bool, bool]]:
    planned = plan(SIGMAS, guided=guided, guidance_interval=interval, cache_interval=every, encoder_interval=1)
    assert not any(work.reuses_encoder for work in planned)
    return [(work.guided, work.whole) for work in planned]


def letters(encoder: int, *, cache: int = 1, interval: tuple[float, float] | None = None, guided: bool = True) -> str:
    """Tell the evaluations: E with the encoder, D the decoder alone, - the outermost blocks; small for one row."""
    planned = plan(SIGMAS, guided=guided, guidance_interval=interval, cache_interval=cache, encoder_interval=encoder)
    each = ("D" if work.reuses_encoder else "E" if work.whole else "-" for work in planned)
    return "".join(letter if work.guided else letter.lower() for letter, work in zip(each, planned, strict=True))


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


def test_the_encoder_runs_once_in_so_many_evaluations() -> None:
    assert letters(1) == "EEEEEEEEE"
    assert letters(2) == "EDEDEDEDE"
    assert letters(4, guided=False) == "edddeddde"
    assert letters(100) == "EDDDDDDDD"


def test_the_encoder_runs_once_in_so_many_of_those_that_run_the_whole() -> None:
    assert letters(2, cache=2) == "E-D-E-D-E"
    assert letters(3, cache=3) == "E--D--D--"
    assert letters(1, cache=2) == "E-E-E-E-E"


def test_guidance_that_sets_in_has_an_encoder_run_of_its_own() -> None:
    assert letters(3, interval=(0.5, 5.0)) == "edEDDEdde"
    # Features of both rows serve the row with the prompt alone.
    assert letters(100, interval=(3.0, math.inf)) == "EDDdddddd"
    assert letters(100, cache=100, interval=(0.5, 5.0)) == "e-E------"


@given(sigmas=falling, interval=ends, cache=st.integers(1, 9), every=st.integers(1, 9))
def test_what_an_encoder_gave_is_there_not_too_old_and_of_all_rows(
    sigmas: list[float], interval: tuple[float, float], cache: int, every: int
) -> None:
    options: dict[str, Any] = {"guided": True, "guidance_interval": interval, "cache_interval": cache}
    planned = plan(sigmas, encoder_interval=every, **options)
    exact = plan(sigmas, encoder_interval=1, **options)
    assert [(work.guided, work.whole) for work in planned] == [(work.guided, work.whole) for work in exact]
    last: tuple[int, Work] | None = None
    for index, work in enumerate(work for work in planned if work.whole):
        if not work.reuses_encoder:
            last = index, work
            continue
        assert last is not None
        assert index - last[0] < every
        assert last[1].guided or not work.guided
    assert not any(work.reuses_encoder for work in planned if not work.whole)
    assert sum(work.whole and not work.reuses_encoder for work in planned) <= math.ceil(len(sigmas) / every) + 1


@given(sigmas=falling, interval=ends, every=st.integers(1, 9))
def test_features_are_there_not_too_old_and_of_all_rows(
    sigmas: list[float], interval: tuple[float, float], every: int
) -> None:
    planned = plan(sigmas, guided=True, guidance_interval=interval, cache_interval=every, encoder_interval=1)
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
