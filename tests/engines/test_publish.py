from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from sdrt.engines import lock
from sdrt.engines.bundle import MANIFEST, Bundle
from sdrt.engines.publish import publishing, scratch
from sdrt.engines.store import list_bundles, place, resolve
from sdrt.errors import (
    BundleBusyError,
    BundleCorruptError,
    BundleError,
    BundleExistsError,
    DiskSpaceError,
    ExportError,
    InputError,
)

from .example import fill

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).resolve().parents[2]

posix_only = pytest.mark.skipif(sys.platform == "win32", reason="needs fork, SIGKILL and flock")


class Publisher:
    """The process of publisher.py."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.engines.publisher"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def say(self, line: str) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        return json.loads(answer) if answer else None

    def hold(self, target: Path) -> None:
        assert self.say(json.dumps(["hold", str(target)])) == "held"

    def crash(self, target: Path, *, force: bool, content: str, at: int) -> int:
        status = self.say(json.dumps(["crash", str(target), force, content, at]))
        assert isinstance(status, int)
        return status

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def publisher() -> Iterator[Publisher]:
    one = Publisher()
    try:
        yield one
    finally:
        one.kill()
        one.process.communicate()


def build(target: Path, content: bytes = b"new", **options: Any) -> None:
    with publishing(target, **options) as folder:
        fill(folder, content, name=target.name)


def content(folder: Path) -> bytes:
    return (folder / "unet.onnx").read_bytes().removeprefix(b"unet.onnx")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_bundle_appears_whole_and_nothing_beside_it(tmp_path: Path) -> None:
    with publishing(tmp_path / "v1") as folder:
        assert folder.parent == tmp_path
        assert not list(folder.iterdir())
        fill(folder)
        assert not (tmp_path / "v1").exists()
    Bundle.open(tmp_path / "v1").verify()
    assert names(tmp_path) == ["v1"]


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("error", [ExportError("no"), KeyboardInterrupt(), OSError("no")])
def test_a_build_that_fails_leaves_all_as_it_was(tmp_path: Path, error: BaseException, force: bool) -> None:
    if force:
        build(tmp_path / "v1", b"old")

    def fail() -> None:
        with publishing(tmp_path / "v1", force=force) as folder:
            fill(folder)
            raise error

    with pytest.raises(type(error)) as caught:
        fail()
    assert caught.value is error
    assert names(tmp_path) == (["v1"] if force else [])
    if force:
        assert content(tmp_path / "v1") == b"old"


@pytest.mark.parametrize("spoil", [MANIFEST, "unet.onnx"])
def test_what_is_no_whole_bundle_is_not_published(tmp_path: Path, spoil: str) -> None:
    def forget() -> None:
        with publishing(tmp_path / "v1") as folder:
            fill(folder)
            (folder / spoil).unlink()

    with pytest.raises(BundleCorruptError, match=spoil):
        forget()
    assert names(tmp_path) == []


def test_an_existing_bundle_needs_force(tmp_path: Path) -> None:
    build(tmp_path / "v1", b"old")
    with pytest.raises(BundleExistsError, match="exists already: give --force"):
        build(tmp_path / "v1")
    assert content(tmp_path / "v1") == b"old"
    build(tmp_path / "v1", b"new", force=True)
    assert content(tmp_path / "v1") == b"new"
    assert names(tmp_path) == ["v1"]


def test_the_old_bundle_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    build(tmp_path / "v1", b"old")
    with publishing(tmp_path / "v1", force=True) as folder:
        fill(folder)
        Bundle.open(tmp_path / "v1").verify()
        assert content(tmp_path / "v1") == b"old"


def test_a_broken_bundle_can_be_replaced(tmp_path: Path) -> None:
    build(tmp_path / "v1", b"old")
    (tmp_path / "v1" / MANIFEST).write_text("{")
    build(tmp_path / "v1", force=True)
    Bundle.open(tmp_path / "v1").verify()


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "v1").mkdir()
    build(tmp_path / "v1")
    assert names(tmp_path) == ["v1"]


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_of_other_things_is_never_replaced(tmp_path: Path, force: bool) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "cat.png").write_bytes(b"cat")
    with pytest.raises(InputError, match="holds other files and no bundle"):
        build(tmp_path / "pictures", force=force)
    assert names(tmp_path / "pictures") == ["cat.png"]


def test_places_where_no_bundle_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.chdir(tmp_path)
    for target, says in [
        ("file", "is a file, expected a folder"),
        ("link", "is a link"),
        ("loop", "loop"),
        ("file/v1", "is not a folder, expected a folder to put v1 in"),
        ("none/v1", "does not exist, expected a folder to put v1 in: make it first"),
        ("/", "choose another name"),
        (".v1.sdrt-old", "choose another name"),
        ("a\0b", "cannot be a bundle's folder"),
        ("x" * 250, "cannot be written"),
        ("x" * 5000, "cannot be"),
        (".", "holds other files"),
    ]:
        for force in (False, True):
            with pytest.raises(InputError, match=says) as caught:
                build(Path(target), force=force)
            assert len(str(caught.value).splitlines()) == 1
    assert (tmp_path / "file").read_bytes() == b"mine"
    assert names(tmp_path) == ["file", "link", "loop"]


def test_relative_targets_and_dots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    build(Path("../over"))
    build(Path("v1"))
    build(Path("v1/../v2"))
    assert names(tmp_path) == ["here", "over"]
    assert names(tmp_path / "here") == ["v1", "v2"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(InputError, match=r"cannot be written .*Permission denied"):
            build(tmp_path / "v1")
    finally:
        tmp_path.chmod(0o700)


@posix_only
def test_a_second_build_of_one_bundle_is_refused_and_of_another_is_not(tmp_path: Path) -> None:
    with publisher() as other:
        other.hold(tmp_path / "v1")
        with pytest.raises(BundleBusyError, match=rf"v1 is being built by process {other.process.pid} since 20.* UTC"):
            build(tmp_path / "v1", force=True)
        build(tmp_path / "v2")
        assert other.say("end") == "done"
    assert names(tmp_path) == ["v1", "v2"]
    Bundle.open(tmp_path / "v1").verify()


@posix_only
def test_a_second_build_waits_if_told_to(tmp_path: Path) -> None:
    with publisher() as other:
        other.hold(tmp_path / "v1")
        caught: list[BaseException] = []

        def second() -> None:
            try:
                build(tmp_path / "v1", wait=True)
            except BundleError as error:
                caught.append(error)

        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(2 * lock.GRACE_S)
        assert thread.is_alive()
        assert other.say("end") == "done"
        thread.join(30)
    # the first one has built it meanwhile
    assert [type(error) for error in caught] == [BundleExistsError]
    assert names(tmp_path) == ["v1"]


def test_two_threads_of_one_process_do_not_build_one_bundle(tmp_path: Path) -> None:
    with publishing(tmp_path / "v1") as folder:
        with pytest.raises(BundleBusyError, match=f"process {os.getpid()}"):
            build(tmp_path / "v1")
        fill(folder)
    assert names(tmp_path) == ["v1"]


@posix_only
def test_what_a_build_needs_and_nobody_keeps_is_not_listed_and_goes(own_home: Path) -> None:
    target = place("graphs")
    with scratch(target) as folder:
        with publishing(folder / "inner") as inner:
            fill(inner)
        assert Bundle.open(folder / "inner").name == "inner"
        assert list_bundles() == []
        with publishing(place("other")) as other:
            fill(other)
        assert (folder / "inner" / MANIFEST).exists(), "another build cleans up after the dead alone"
    assert [path.name for path in target.parent.iterdir()] == ["other"]
    # As a killed build leaves it.
    folder.mkdir()
    fill(folder)
    with publishing(place("next")) as following:
        fill(following)
    assert sorted(path.name for path in target.parent.iterdir()) == ["next", "other"]


def test_a_lock_that_its_holder_removed_is_taken_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lock"
    try_lock = lock._try_lock
    opened = 0

    def late(descriptor: int) -> bool:
        nonlocal opened
        opened += 1
        if opened == 1:  # the holder ends between our opening the file and our locking it
            path.unlink()
        return try_lock(descriptor)

    monkeypatch.setattr(lock, "_try_lock", late)
    with lock.locked(path, "it"):
        assert path.exists()
        with pytest.raises(BundleBusyError), lock.locked(path, "it", patience_s=0):
            pass
    assert not path.exists()


@posix_only
def test_many_at_once_end_with_one_whole_bundle(tmp_path: Path) -> None:
    outcomes: list[str] = []

    def one(index: int) -> None:
        try:
            build(tmp_path / "v1", str(index).encode(), force=True, wait=index % 2 == 0)
            outcomes.append("built")
        except BundleBusyError:
            outcomes.append("busy")

    threads = [threading.Thread(target=one, args=(index,)) for index in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(outcomes) == 12
    assert outcomes.count("built") >= 6
    assert names(tmp_path) == ["v1"]
    Bundle.open(tmp_path / "v1").verify()


@posix_only
def test_a_killed_build_leaves_no_bundle_and_the_next_cleans_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDRT_HOME", str(tmp_path))
    with publisher() as killed, publisher() as living:
        killed.hold(place("killed"))
        living.hold(place("living"))
        killed.process.send_signal(signal.SIGKILL)
        killed.process.wait()
        assert ".killed.sdrt-building" in names(tmp_path / "bundles")
        assert list_bundles() == []
        build(place("other"))
        assert names(tmp_path / "bundles") == [".living.sdrt-building", ".living.sdrt-lock", "other"]
        build(place("killed"))
        assert living.say("end") == "done"
    assert names(tmp_path / "bundles") == ["killed", "living", "other"]


def read_next(_target: Path, _process: Publisher, old: bytes | None) -> None:
    if old is not None:
        resolve("v1").verify()


def list_next(target: Path, _process: Publisher, old: bytes | None) -> None:
    listed = [item.name for item in list_bundles() if item.problem is None]
    assert listed == visible(target.parent)
    assert listed == ["v1"] or old is None


def build_next(target: Path, _process: Publisher, _old: bytes | None) -> None:
    build(target, b"third", force=True)
    assert content(target) == b"third"
    assert names(target.parent) == ["v1"]


def build_another_next(target: Path, _process: Publisher, old: bytes | None) -> None:
    build(target.with_name("v2"))
    assert names(target.parent) == visible(target.parent)
    assert "v1" in names(target.parent) or old is None


def crash_again(target: Path, process: Publisher, old: bytes | None) -> None:
    """Kill the next one as well, which may be cleaning up after the first."""
    at = sum(map(ord, target.parts[-3])) * 7 % 40
    assert process.crash(target, force=True, content="third", at=at) in (0, -signal.SIGKILL)
    read_next(target, process, old)


@posix_only
@pytest.mark.parametrize("then", [read_next, list_next, build_next, build_another_next, crash_again])
@pytest.mark.parametrize("old", [None, b"old"])
def test_a_crash_at_any_point_leaves_the_old_or_the_new_bundle(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    then: Callable[[Path, Publisher, bytes | None], None],
    old: bytes | None,
) -> None:
    outcomes: list[bytes | None] = []
    between_two_renames = 0
    with publisher() as process:
        for at in range(500):
            monkeypatch.setenv("SDRT_HOME", str(tmp_path / str(at)))
            target = place("v1")
            if old is not None:
                build(target, old)
            status = process.crash(target, force=old is not None, content="new", at=at)
            if status == 0:
                break
            assert status == -signal.SIGKILL
            assert set(visible(target.parent)) <= {"v1"}
            aside = target.with_name(".v1.sdrt-old")
            if aside.exists():
                Bundle.open(aside).verify()
            between_two_renames += aside.exists() and not target.exists()
            then(target, process, old)
            outcomes.append(content(target) if target.exists() else None)
            if target.exists():
                Bundle.open(target).verify()
    assert 30 < at < 499
    assert between_two_renames == (1 if old is not None else 0)
    if then is build_next:
        assert set(outcomes) == {b"third"}
    elif then is crash_again:
        assert set(outcomes) <= {old, b"new", b"third"}
    else:
        # it changes at one point, once and for all
        assert outcomes == sorted(outcomes, key=[old, b"new", b"third"].index)
        assert {old, b"new"} == set(outcomes)


def visible(folder: Path) -> list[str]:
    return [name for name in names(folder) if not name.startswith(".")]


def test_a_reader_in_the_moment_between_two_renames_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDRT_HOME", str(tmp_path))
    build(place("v1"), b"old")
    rename = Path.rename
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.append(content(resolve("v1").folder)))

    def slow(self: Path, target: Path) -> Path:
        moved = rename(self, target)
        if Path(target).name == ".v1.sdrt-old":
            reader.start()
            time.sleep(lock.GRACE_S / 2)
        return moved

    monkeypatch.setattr(Path, "rename", slow)
    build(place("v1"), force=True)
    reader.join(30)
    assert found == [b"new"]


@pytest.mark.parametrize("fails", [1, 2])
def test_a_rename_that_fails_brings_the_old_bundle_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: int
) -> None:
    build(tmp_path / "v1", b"old")
    rename = Path.rename
    calls = 0

    def broken(self: Path, target: Path) -> Path:
        nonlocal calls
        calls += 1
        if calls >= fails and self.name != ".v1.sdrt-old":
            raise PermissionError(errno.EACCES, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", broken)
    with pytest.raises(BundleError, match="could not be put in its place"):
        build(tmp_path / "v1", force=True)
    assert content(tmp_path / "v1") == b"old"
    assert names(tmp_path) == ["v1"]


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_too_small_a_disk_is_refused_before_starting(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    started = False
    with (
        pytest.raises(DiskSpaceError, match=rf"needs {free * 2} bytes and the disk has \d+ bytes free"),
        publishing(tmp_path / "v1", expected_bytes=free * 2),
    ):
        started = True
    assert not started
    assert names(tmp_path) == []
    build(tmp_path / "v1", expected_bytes=1000)


def device_full(folder: Path) -> None:
    with Path("/dev/full").open("wb", buffering=0) as file:  # the kernel answers each write with ENOSPC
        (folder / "part").write_bytes(b"x" * 1000)
        file.write(b"x")


def wrapped(folder: Path) -> None:
    try:
        device_full(folder)
    except OSError as error:
        raise ExportError("a library's own error") from error


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("write", [device_full, wrapped])
def test_a_disk_that_runs_full_is_reported_with_what_was_needed(tmp_path: Path, write: Callable[[Path], None]) -> None:
    def fail() -> None:
        with publishing(tmp_path / "v1", expected_bytes=5000) as folder:
            write(folder)

    with pytest.raises(DiskSpaceError, match=r"ran full after 1000 bytes of which 5000 are needed \(\d+ are free\)"):
        fail()
    assert names(tmp_path) == []


def test_a_library_that_hides_why_a_write_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        with publishing(tmp_path / "v1"):
            monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9, 4096))
            raise OSError("4096 requested and 0 written")

    with pytest.raises(DiskSpaceError, match="ran full after 0 bytes"):
        fail()


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of one MiB; needs the right to mount, which continuous integration seldom has."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    options = ["-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if mount is None or subprocess.run([mount, *options], capture_output=True, check=False).returncode != 0:
        pytest.skip("may not mount a small file system")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_real_disk_that_runs_full(tiny_disk: Path) -> None:
    build(tiny_disk / "v1", b"old")
    with pytest.raises(DiskSpaceError, match="ran full after"):
        build(tiny_disk / "v1", b"x" * 2**20, force=True)
    assert names(tiny_disk) == ["v1"]
    assert content(tiny_disk / "v1") == b"old"
    with pytest.raises(DiskSpaceError, match=f"needs {2**21} bytes"):
        build(tiny_disk / "v1", force=True, expected_bytes=2**21)
