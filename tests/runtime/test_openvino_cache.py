"""What OpenVINO compiled, kept for the next start: found again, bounded, and never in the way."""

from __future__ import annotations

import os
import re
import shutil
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from sdrt.engines import demo, store
from sdrt.engines.bundle import Bundle
from sdrt.errors import InputError, SdrtWarning
from sdrt.runtime.compile_cache import CompileCache
from sdrt.runtime.openvino import OpenVinoSession

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LATENTS = np.linspace(-2, 2, 4 * 8 * 8, dtype=np.float32).reshape(1, 4, 8, 8)


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo.bundle_folder(tmp_path_factory.mktemp("home"))


@pytest.fixture
def bundle(unpacked: Path) -> Bundle:
    return Bundle.open(unpacked)


def decode(bundle: Bundle, cache: CompileCache | None = None) -> tuple[bool, np.ndarray]:
    """Load the decoder, tell whether it came from the cache, and use it."""
    cache = cache or CompileCache(bundle, "openvino")
    component = bundle.component("vae_decoder")
    graph, data = (bundle.path(entry) for entry in component.files[:2])
    with OpenVinoSession(graph, data, component, "fp32", cache) as session:
        binding = session.bind({"latents": LATENTS.shape, "image": (1, 3, 64, 64)})
        binding.inputs["latents"][...] = LATENTS
        binding.run()
        return session._compiled((LATENTS.shape,), ("image",), False)[0].get_property(
            "LOADED_FROM_CACHE"
        ), binding.outputs["image"]


def blobs() -> list[Path]:
    return sorted((store.home() / "compiled" / "openvino").glob("*/*.blob"))


def left_over() -> list[str]:
    """All else in the cache, which is nothing but the lists of bundles."""
    root = store.home() / "compiled" / "openvino"
    return [path.name for path in root.glob("*/*") if path.suffix != ".blob" and path.name != "bundles"]


def test_a_second_process_takes_what_the_first_compiled(bundle: Bundle) -> None:
    """Without the weights, which stay in the bundle."""
    before, first = decode(bundle)
    (blob,) = blobs()
    assert re.fullmatch(r"vae_decoder-fp32-1x4x8x8\.\d+\.[0-9a-f]{16}\.blob", blob.name)
    assert blob.stat().st_size < bundle.component("vae_decoder").files[1].bytes / 2
    after, second = decode(bundle)
    assert (before, after) == (False, True)
    assert np.array_equal(first, second)
    assert blobs() == [blob]
    assert left_over() == []


def test_a_bundle_that_was_built_anew_is_compiled_anew(bundle: Bundle, tmp_path: Path) -> None:
    decode(bundle)
    copy = tmp_path / "copy"
    shutil.copytree(bundle.folder, copy)
    assert decode(Bundle.open(copy))[0] is False
    assert decode(Bundle.open(copy))[0] is True
    assert decode(bundle)[0] is True


@pytest.mark.parametrize(
    "damage",
    [
        lambda _: b"",
        lambda content: content[: len(content) // 2],
        lambda content: content[:-1],
        lambda content: b"\0" * len(content),
        lambda content: content[:200_000] + b"\0\1\2\3" + content[200_004:],
    ],
    ids=["empty", "half", "short", "zeros", "altered"],
)
def test_what_is_damaged_is_compiled_anew(bundle: Bundle, damage: Callable[[bytes], bytes]) -> None:
    _, expected = decode(bundle)
    (blob,) = blobs()
    content = blob.read_bytes()
    blob.write_bytes(damage(content))
    with pytest.warns(SdrtWarning, match=f"{blob.name} is damaged: it is compiled anew"):
        from_cache, found = decode(bundle)
    assert from_cache is False
    assert np.array_equal(found, expected)
    assert decode(bundle)[0] is True
    (again,) = blobs()
    assert again.name.split(".")[:2] == blob.name.split(".")[:2]


def test_a_file_that_is_none_of_ours_stops_nothing(bundle: Bundle) -> None:
    decode(bundle)
    foreign = blobs()[0].parent / "vae_decoder-fp32-1x4x8x8.copy.of.1.blob"
    shutil.copy(blobs()[0], foreign)
    with pytest.warns(SdrtWarning, match=f"{foreign.name} is damaged"):
        assert decode(bundle)[0] is True
    assert not foreign.exists()


def test_a_file_that_another_version_wrote_is_replaced(bundle: Bundle) -> None:
    """It is whole by its name, and OpenVINO itself refuses it."""
    _, expected = decode(bundle)
    (blob,) = blobs()
    with CompileCache(bundle, "openvino").entry("vae_decoder-fp32-1x4x8x8") as folder:
        assert folder is not None
        (copy,) = folder.iterdir()
        content = copy.read_bytes()
        copy.unlink()
        copy.write_bytes(re.sub(rb'(ie|OV)_(version="|VERSION:)20\d\d', rb"\1_\g<2>1999", content))
    (foreign,) = blobs()
    assert foreign.name != blob.name
    from_cache, found = decode(bundle)
    assert from_cache is False
    assert np.array_equal(found, expected)
    assert len(blobs()) == 1
    assert decode(bundle)[0] is True


@pytest.mark.parametrize("place", ["compiled", "compiled/openvino"])
def test_a_place_that_cannot_be_written_stops_nothing(bundle: Bundle, own_home: Path, place: str) -> None:
    (own_home / place).parent.mkdir(parents=True, exist_ok=True)
    (own_home / place).write_text("a file")
    with pytest.warns(SdrtWarning, match=r"cannot be written .*compiled anew at each start") as caught:
        from_cache, found = decode(bundle)
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)
    assert from_cache is False
    assert found.std() > 0.01


def test_a_full_disk_leaves_nothing_behind(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(bundle.folder)
    monkeypatch.setattr("sdrt.runtime.compile_cache.shutil.disk_usage", lambda _: usage._replace(free=0))
    assert decode(bundle)[0] is False
    assert blobs() == []
    assert left_over() == []


def test_openvino_failing_at_its_cache_stops_nothing(bundle: Bundle) -> None:
    class Nowhere(CompileCache):
        @contextmanager
        def entry(self, name: str) -> Iterator[Path]:
            yield Path("/proc", name)

    with pytest.warns(SdrtWarning, match=r"openvino cannot keep what it compiles of vae_decoder.*/proc/vae_decoder"):
        assert decode(bundle, Nowhere(bundle, "openvino"))[0] is False


def keep(bundle: Bundle, name: str, size: int, age: float = 0.0) -> None:
    """Let a compiler leave a file of a size, that long ago."""
    with CompileCache(bundle, "openvino").entry(name) as folder:
        assert folder is not None
        (folder / "1.blob").write_bytes(name.encode().ljust(size, b"\0"))
    for blob in blobs():
        if blob.name.startswith(f"{name}."):
            os.utime(blob, (blob.stat().st_atime, blob.stat().st_mtime - age))


def kept() -> list[str]:
    return [blob.name.partition(".")[0] for blob in blobs()]


def test_the_least_recently_used_goes_first(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDRT_COMPILED_MB", "3")
    for age, name in ((300, "old"), (200, "older-but-used"), (100, "young")):
        keep(bundle, name, 10**6, age)
    with CompileCache(bundle, "openvino").entry("older-but-used"):
        pass
    keep(bundle, "new", 10**6)
    assert kept() == ["new", "older-but-used", "young"]
    keep(bundle, "large", 2 * 10**6)
    assert kept() == ["large", "new"]


def test_what_is_larger_than_the_limit_is_not_kept(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDRT_COMPILED_MB", "1")
    keep(bundle, "small", 10**6)
    with pytest.warns(SdrtWarning, match=r"compiled as large takes 2 MB, and SDRT_COMPILED_MB allows 1"):
        keep(bundle, "large", 2 * 10**6)
    assert kept() == ["small"]
    monkeypatch.setenv("SDRT_COMPILED_MB", "0")
    with CompileCache(bundle, "openvino").entry("small") as folder:
        assert folder is None


@pytest.mark.parametrize("value", ["-1", "1.5", "much", "5 GB"])
def test_a_limit_that_is_no_number_is_refused(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("SDRT_COMPILED_MB", value)
    with pytest.raises(InputError, match=f"SDRT_COMPILED_MB is {value!r}: expected a number of megabytes"):
        CompileCache(bundle, "openvino")


def test_the_caches_of_bundles_that_are_gone_go(bundle: Bundle, tmp_path: Path) -> None:
    """Whether they were removed, or built anew at their place; a copy keeps them alive."""

    def variant(name: str, sha256: str) -> Bundle:
        folder = tmp_path / name
        shutil.copytree(bundle.folder, folder)
        text = (folder / "bundle.json").read_text()
        entry = bundle.component("unet").graph
        (folder / "bundle.json").write_text(text.replace(entry.sha256, sha256 * 64))
        return Bundle.open(folder)

    removed, replaced, copied = variant("removed", "a"), variant("replaced", "b"), variant("copied", "c")
    copy = tmp_path / "copy"
    shutil.copytree(copied.folder, copy)
    for each, name in ((removed, "one"), (replaced, "two"), (copied, "three"), (Bundle.open(copy), "four")):
        keep(each, name, 10)
    assert sorted(kept()) == ["four", "one", "three", "two"]
    shutil.rmtree(removed.folder)
    shutil.rmtree(copied.folder)
    shutil.rmtree(replaced.folder)
    shutil.copytree(bundle.folder, replaced.folder)
    keep(bundle, "five", 10)
    assert sorted(kept()) == ["five", "four", "three"]
    assert len(list((store.home() / "compiled" / "openvino").iterdir())) == 2


def test_what_a_killed_process_left_goes_after_a_day(bundle: Bundle) -> None:
    keep(bundle, "one", 10)
    folder = blobs()[0].parent
    for name, age in ((".compiling-new", 3600), (".compiling-old", 25 * 3600)):
        (folder / name).mkdir()
        stamp = (folder / name).stat().st_mtime - age
        os.utime(folder / name, (stamp, stamp))
    keep(bundle, "two", 10)
    assert left_over() == [".compiling-new"]


def test_nothing_is_said_where_all_is_well(bundle: Bundle) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode(bundle)
        decode(bundle)
