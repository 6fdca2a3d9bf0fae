"""Regions of POSIX shared memory: what may be registered, and what becomes of one that is changed meanwhile."""

from __future__ import annotations

import gc
import os
import secrets
from multiprocessing import shared_memory
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sdrt.serve.shared_memory import (
    MOST_REGIONS,
    RegionError,
    RegionExistsError,
    RegionMissingError,
    Regions,
    SharedMemoryOffError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

FOLDER = Path("/dev/shm")


@pytest.fixture
def regions() -> Regions:
    return Regions(allowed=True)


@pytest.fixture
def memory() -> Iterator[shared_memory.SharedMemory]:
    """An object of 8192 bytes, made by the standard library."""
    made = shared_memory.SharedMemory(create=True, size=8192)
    yield made
    made.close()
    made.unlink()


def buffer(memory: shared_memory.SharedMemory) -> memoryview:
    assert memory.buf is not None
    return memory.buf


@pytest.fixture
def beside() -> Iterator[Path]:
    """A name in the folder of shared memory at which a test puts something else."""
    path = FOLDER / f"sdrt-{secrets.token_hex(8)}"
    yield path
    path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def test_both_sides_see_what_the_other_writes(regions: Regions, memory: shared_memory.SharedMemory) -> None:
    regions.register("pixels", f"/{memory.name}", 64, 1000)
    buffer(memory)[64 + 8 : 64 + 12] = b"seen"
    view = regions.view("pixels", 8, 4)
    assert view.read() == b"seen"
    view.write(memoryview(b"here"))
    assert bytes(buffer(memory)[64 + 6 : 64 + 14]) == b"\0\0here\0\0"
    with pytest.raises(RegionError, match=r"5 bytes do not fit into 4 of shared memory region 'pixels'"):
        view.write(b"fives")
    assert regions.view("pixels", 1000, 0).read() == b""


def test_the_slash_may_be_left_out(regions: Regions, memory: shared_memory.SharedMemory) -> None:
    region = regions.register("pixels", memory.name, 0, 8192)
    assert regions.status() == regions.status("pixels") == [region]
    assert (region.name, region.key, region.offset, region.byte_size) == ("pixels", memory.name, 0, 8192)


@pytest.mark.parametrize(
    "key", ["", "/", ".", "/..", "//x", "/../etc/passwd", "a/b", "/x\0y", "/proc/self/mem", "\ud800", "x" * 300]
)
def test_no_key_is_a_path(regions: Regions, key: str) -> None:
    with pytest.raises(RegionError, match=r"expected the name of a POSIX shared memory object|cannot be opened"):
        regions.register("pixels", key, 0, 1)
    assert regions.status() == []


def test_links_pipes_and_folders_are_left_alone(regions: Regions, beside: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    makers: list[Callable[[], object]] = [lambda: beside.symlink_to(secret), beside.mkdir, lambda: os.mkfifo(beside)]
    for make in makers:
        make()
        with pytest.raises(RegionError, match=r"cannot be opened|is no shared memory object"):
            regions.register("pixels", beside.name, 0, 1)
        beside.rmdir() if beside.is_dir() and not beside.is_symlink() else beside.unlink()
    with pytest.raises(RegionError, match="No such file or directory"):
        regions.register("pixels", beside.name, 0, 1)


@pytest.mark.parametrize(
    ("offset", "size"), [(-1, 1), (0, 0), (0, -5), (0, 8193), (8192, 1), (1 << 80, 1), (1, 1 << 80)]
)
def test_a_region_lies_within_its_object(
    regions: Regions, memory: shared_memory.SharedMemory, offset: int, size: int
) -> None:
    with pytest.raises(RegionError, match=f"is to have {size} bytes from {offset} on: expected at least 1 of the 8192"):
        regions.register("pixels", memory.name, offset, size)


@pytest.mark.parametrize(("offset", "size"), [(-1, 1), (0, -1), (0, 101), (100, 1), (1 << 80, 0), (0, 1 << 80)])
def test_a_view_lies_within_its_region(
    regions: Regions, memory: shared_memory.SharedMemory, offset: int, size: int
) -> None:
    regions.register("pixels", memory.name, 0, 100)
    with pytest.raises(RegionError, match="expected a part of its 100 bytes"):
        regions.view("pixels", offset, size)


def test_an_object_that_is_cut_short(regions: Regions, beside: Path) -> None:
    """As its owner may do at any time: mapped, it would end the process."""
    beside.write_bytes(b"x" * 8192)
    regions.register("pixels", beside.name, 0, 8192)
    view = regions.view("pixels", 4096, 4096)
    os.truncate(beside, 5000)
    uses: list[Callable[[], object]] = [view.read, lambda: view.write(b"y" * 4096)]
    for use in uses:
        with pytest.raises(
            RegionError, match=r"'pixels' was cut short: expected 'sdrt-\w+' to have at least 8192 bytes"
        ):
            use()
    assert beside.stat().st_size == 5000
    assert regions.view("pixels", 0, 5000).read() == b"x" * 5000


def test_names_are_taken_once(regions: Regions, memory: shared_memory.SharedMemory) -> None:
    regions.register("pixels", memory.name, 0, 1)
    with pytest.raises(RegionExistsError, match="'pixels' is registered already: unregister it first"):
        regions.register("pixels", memory.name, 0, 1)
    with pytest.raises(RegionError, match="is empty"):
        regions.register("", memory.name, 0, 1)
    regions.unregister("pixels")
    regions.unregister("pixels")
    regions.register("pixels", memory.name, 0, 1)
    regions.register("more", memory.name, 0, 1)
    regions.unregister(None)
    assert regions.status() == []
    with pytest.raises(RegionMissingError, match="no shared memory region is called 'pixels'"):
        regions.status("pixels")
    with pytest.raises(RegionMissingError, match="no shared memory region is called 'pixels'"):
        regions.view("pixels", 0, 1)


def descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_descriptors_are_kept_as_long_as_they_are_used(regions: Regions, memory: shared_memory.SharedMemory) -> None:
    gc.collect()  # what earlier tests have left may hold some
    before = descriptors()
    regions.register("pixels", memory.name, 0, 4)
    view = regions.view("pixels", 0, 4)
    regions.unregister("pixels")
    view.write(b"late")
    assert bytes(buffer(memory)[:4]) == b"late"
    del view
    with pytest.raises(RegionError):
        regions.register("too large", memory.name, 0, 10_000)
    gc.collect()
    assert descriptors() == before


def test_there_are_not_too_many(regions: Regions, memory: shared_memory.SharedMemory) -> None:
    for number in range(MOST_REGIONS):
        regions.register(str(number), memory.name, 0, 1)
    with pytest.raises(RegionError, match=f"{MOST_REGIONS} shared memory regions are registered"):
        regions.register("one more", memory.name, 0, 1)


def test_it_is_off_unless_allowed(memory: shared_memory.SharedMemory) -> None:
    off = Regions(allowed=False)
    for use in (
        lambda: off.register("pixels", memory.name, 0, 1),
        lambda: off.unregister(None),
        off.status,
        lambda: off.view("pixels", 0, 1),
    ):
        with pytest.raises(SharedMemoryOffError, match="start sdrt serve with --allow-shared-memory"):
            use()
