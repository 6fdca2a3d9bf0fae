"""The library's own tests: plain, under valgrind, with sanitizers; against servers that run and servers of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from .conftest import run

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

MEMCHECK = (
    *("valgrind", "--quiet", "--error-exitcode=99", "--leak-check=full"),
    *("--errors-for-leak-kinds=definite,indirect,possible", "--track-origins=yes"),
)


def test_plain(built: Callable[[str], Path], surroundings: dict[str, str]) -> None:
    printed = run("ctest", "--test-dir", built("plain"), "--output-on-failure", env=surroundings)
    assert "100% tests passed, 0 tests failed out of 5" in printed


@pytest.mark.parametrize(
    ("name", "tests"),
    [("unit", ()), ("fault", ()), ("header", ()), ("live", ()), ("own_server", ("closing_ends_it",))],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_valgrind_finds_nothing(
    built: Callable[[str], Path], surroundings: dict[str, str], name: str, tests: tuple[str, ...]
) -> None:
    run(*MEMCHECK, built("plain") / "tests" / f"sdrt-test-{name}", *tests, env=surroundings | {"SDRT_TEST_SHARE": "6"})


@pytest.mark.parametrize("sanitizers", ["address", "thread"])
@pytest.mark.parametrize(
    ("name", "tests"),
    [("unit", ()), ("fault", ()), ("live", ()), ("own_server", ("from_its_start_to_a_crash",))],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_sanitizers_find_nothing(
    built: Callable[[str], Path], surroundings: dict[str, str], sanitizers: str, name: str, tests: tuple[str, ...]
) -> None:
    run(built(sanitizers) / "tests" / f"sdrt-test-{name}", *tests, env=surroundings)
