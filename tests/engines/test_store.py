from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sdrt.engines import store
from sdrt.engines.bundle import MANIFEST, Bundle
from sdrt.engines.devices import Gpu
from sdrt.engines.manifest import Backend, Model, Text
from sdrt.engines.publish import publishing
from sdrt.engines.store import bundles_folder, check_name, home, list_bundles, place, resolve
from sdrt.errors import BundleCorruptError, BundleNotFoundError, InputError

from .example import fill


@pytest.fixture(autouse=True)
def sdrt_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SDRT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def build(name: str, created: str | None = None, **changes: Any) -> Path:
    target = place(name)
    with publishing(target) as folder:
        fill(folder, name=name, created=created, **changes)
    return target


def test_home_is_what_was_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for given, expected in [("~/x", Path.home() / "x"), ("rel", tmp_path / "rel"), (str(tmp_path), tmp_path)]:
        monkeypatch.setenv("SDRT_HOME", given)
        assert home() == expected


@pytest.mark.skipif(sys.platform != "linux", reason="each platform has its own cache folder")
@pytest.mark.parametrize("given", [None, ""])
def test_home_is_else_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, given: str | None) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if given is None:
        monkeypatch.delenv("SDRT_HOME")
    else:
        monkeypatch.setenv("SDRT_HOME", given)
    assert home() == tmp_path / "sdrt"


def test_an_empty_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list_bundles() == []
    with pytest.raises(BundleNotFoundError, match="it holds none; build one with sdrt build --ckpt v1-1"):
        resolve()
    with pytest.raises(BundleNotFoundError, match=r"there is no bundle 'v1-1' in .*: it holds none"):
        resolve("v1-1")
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("SDRT_HOME", str(tmp_path / "file"))
    assert list_bundles() == []
    with pytest.raises(InputError, match="set SDRT_HOME"):
        place("v1")


def test_the_newest_comes_first_whatever_the_way_its_time_is_written() -> None:
    build("b", "2026-01-01T00:00:00.500000Z")
    build("a", "2026-01-01T00:00:00Z")
    build("c", "2025-12-31T23:59:59.999999Z")
    assert [item.name for item in list_bundles()] == ["b", "a", "c"]
    assert resolve().name == "b"


def test_the_newest_that_runs_here_is_taken() -> None:
    build("old", "2026-01-01T00:00:00Z")
    build("new", "2026-01-02T00:00:00Z")
    assert resolve(obstacle=lambda bundle: "needs a GPU" if bundle.name == "new" else None).name == "old"
    assert resolve("new", obstacle=lambda _: "needs a GPU").name == "new"
    with pytest.raises(BundleNotFoundError, match=r"new does not run here \(needs a GPU\); old does not run here"):
        resolve(obstacle=lambda _: "needs a GPU")


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[Gpu]:
    """The GPUs of this machine: none unless a test adds one."""
    found: list[Gpu] = []
    monkeypatch.setattr(store, "nvidia_gpus", lambda: tuple(found))
    return found


def test_graphs_that_engines_were_built_of_do_not_take_the_place_of_the_cpus_own(gpus: list[Gpu]) -> None:
    build("v1-1", "2026-01-01T00:00:00Z")
    build("v1-1-fp16", "2026-01-02T00:00:00Z", precision="fp16")
    engines = {"kind": "engine", "precision": "fp16", "backend": Backend("tensorrt-rtx", "1.7")}
    build("v1-1-rtx-sm86", "2026-01-03T00:00:00Z", **engines)

    def needs_gpu(bundle: Bundle) -> str | None:
        return "needs a GPU" if bundle.manifest.kind == "engine" and not gpus else None

    assert resolve(obstacle=needs_gpu).name == "v1-1"
    assert resolve("v1-1-fp16", obstacle=needs_gpu).name == "v1-1-fp16"
    gpus.append(Gpu(0, "NVIDIA GeForce RTX 3090", "8.6", 24 * 2**30))
    assert resolve(obstacle=needs_gpu).name == "v1-1-rtx-sm86"
    assert resolve(obstacle=lambda bundle: "another version" if bundle.manifest.kind == "engine" else None).name == (
        "v1-1-fp16"
    )


@pytest.mark.parametrize(
    "other",
    [
        {"model": Model("sd-v1", "v1-4", "diffusers", ema=False)},
        {"model": Model("sd-v1", "v1-1", "diffusers", ema=True)},
        {"text": Text(embedding_width=768, layers=12, clip_skip=1)},
        {"precision": "fp16"},
    ],
)
def test_fp16_graphs_are_taken_where_no_fp32_ones_are_of_the_same_model(gpus: list[Gpu], other: dict[str, Any]) -> None:
    build("other", "2026-01-01T00:00:00Z", **other)
    build("v1-1-fp16", "2026-01-02T00:00:00Z", precision="fp16")
    assert resolve().name == "v1-1-fp16"


def test_int8_comes_last_whatever_its_age(gpus: list[Gpu]) -> None:
    build("v1-1-int8", "2026-01-03T00:00:00Z", precision="int8")
    assert resolve().name == "v1-1-int8"
    build("v1-1-fp16", "2026-01-02T00:00:00Z", precision="fp16")
    assert resolve().name == "v1-1-fp16"
    build("v1-1", "2026-01-01T00:00:00Z")
    assert resolve().name == "v1-1"
    assert resolve("v1-1-int8").name == "v1-1-int8"
    assert resolve(obstacle=lambda bundle: None if "int8" in bundle.name else "no backend").name == "v1-1-int8"


def test_broken_bundles_are_listed_with_the_reason_and_not_taken() -> None:
    build("whole", "2026-01-01T00:00:00Z")
    short = build("short")
    (short / "unet.onnx").write_bytes(b"x")
    (build("torn") / MANIFEST).write_text('{"schema_version": 9}')
    (bundles_folder() / "empty").mkdir()
    (bundles_folder() / "file").write_bytes(b"")
    (bundles_folder() / ".hidden").mkdir()
    listed = list_bundles()
    assert [item.name for item in listed] == ["whole", "empty", "short", "torn"]
    assert [item.bundle is None for item in listed] == [item.problem is not None for item in listed]
    assert "unet.onnx has 1 bytes, expected" in str(listed[2].problem)
    assert "schema_version is 9, expected 1: update sdrt" in str(listed[3].problem)
    assert resolve().name == "whole"
    with pytest.raises(BundleCorruptError, match=r"unet\.onnx"):
        resolve("short")
    with pytest.raises(BundleNotFoundError, match=r"there are whole, empty \(broken\), short \(broken\), torn"):
        resolve("other")


def test_names_and_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = build("v1")
    outside = tmp_path / "outside"
    with publishing(outside) as folder:
        fill(folder)
    (tmp_path / "no-bundle").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve("v1").folder == kept
    for path in ("outside", "./outside", "outside/", str(outside), outside, Path("outside")):
        assert resolve(path).folder == outside
    monkeypatch.chdir(outside)
    assert resolve(".").folder == outside
    monkeypatch.chdir(tmp_path)
    with publishing(tmp_path / "v1") as folder:
        fill(folder)
    assert resolve("v1").folder == kept
    assert resolve("./v1").folder == tmp_path / "v1"
    for missing in ("no-bundle", "./none", "~nosuchuser/x", tmp_path / "none", "/", Path("x" * 5000), "./" + "x" * 250):
        with pytest.raises((BundleNotFoundError, BundleCorruptError)) as caught:
            resolve(missing)
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "name", ["", "..", ".", ".x", "a/b", "../x", "/x", "a\\b", "C:x", "a b", "a\0b", "a\nb", "é", "-x", "x" * 101]
)
def test_tricky_names_are_refused(name: str) -> None:
    with pytest.raises(InputError) as caught:
        check_name(name)
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(InputError):
        place(name)


@pytest.mark.parametrize("name", ["", "a b", "a\0b", "a\\b", "é", "./a\0b"])
def test_what_is_neither_a_name_nor_a_path_is_refused(name: str) -> None:
    with pytest.raises(InputError):
        resolve(name)


def test_a_copied_bundle_is_found_by_its_new_name() -> None:
    build("v1").rename(bundles_folder() / "renamed")
    assert resolve("renamed").name == "renamed"
    assert resolve("renamed").manifest.name == "v1"


def test_opening_needs_neither_numpy_nor_platformdirs(tmp_path: Path) -> None:
    with publishing(tmp_path / "v1") as folder:
        fill(folder)
    program = (
        "import sys; from sdrt.engines.store import resolve; resolve(sys.argv[1]);"
        "print(*{'numpy', 'platformdirs', 'torch', 'onnx', 'onnxruntime'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "v1")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "\n"
    Bundle.open(tmp_path / "v1").verify()
