"""The demo model as it ships: found, unpacked and run by a user who has built nothing."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image

import sdrt
from sdrt.cli import main
from sdrt.engines import demo
from sdrt.engines.bundle import MANIFEST, Bundle
from sdrt.engines.store import home, locate
from sdrt.errors import BundleCorruptError, BundleNotFoundError, InputError
from sdrt.export.checkpoint import read_checkpoint
from sdrt.export.demo import model_folder
from tests.judge import read

if TYPE_CHECKING:
    from collections.abc import Callable

PROMPT = "a large red star on a blue background"


@pytest.fixture(scope="session")
def unpacked_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home in which the demo is unpacked already."""
    folder = tmp_path_factory.mktemp("unpacked")
    demo.bundle_folder(folder)
    return folder


@pytest.fixture
def warm(unpacked_home: Path, own_home: Path) -> Path:
    shutil.copytree(unpacked_home, own_home, dirs_exist_ok=True)
    return own_home


def test_run_with_nothing_built_takes_the_demo_and_says_so(
    own_home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "star.png"
    assert main(["run", PROMPT, "--steps", "20", "--seed", "1", "-o", str(picture)]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{picture} (seed 1)\n"
    (notice,) = [line for line in printed.err.splitlines() if line.startswith("sdrt:")]
    assert "demo" in notice
    assert "sdrt build --ckpt v1-1" in notice
    image = Image.open(picture)
    assert image.size == (128, 128)
    assert "Model: demo" in image.info["parameters"]


def test_json_stays_one_object(warm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", PROMPT, "--steps", "1", "--json", "-o", str(tmp_path / "star.png")]) == 0
    assert json.loads(capsys.readouterr().out)["bundle"] == "demo"


def test_the_picture_shows_what_was_asked(warm: Path) -> None:
    with sdrt.load("demo") as pipe:
        (image,) = pipe(PROMPT, num_inference_steps=20, guidance_scale=5.0, seed=1, output_type="np")
    reading = read((image * 255).round().astype("uint8"))
    (found,) = reading.objects
    assert (found.size, found.colour, found.shape, reading.background) == ("large", "red", "star", "blue")


def test_what_was_built_comes_first(
    own_home: Path, tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_bundle, own_home / "bundles" / "mine")
    command = ["run", PROMPT, "--steps", "1", "-W", "64", "-H", "64", "--json", "-o", str(tmp_path / "a.png")]
    assert main(command) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["bundle"] == "mine"
    assert "demo" not in printed.err


def test_what_was_built_and_is_broken_is_not_passed_over(own_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (own_home / "bundles" / "mine").mkdir(parents=True)
    (own_home / "bundles" / "mine" / MANIFEST).write_text("{}")
    assert main(["run", PROMPT]) == 1
    assert "mine (broken)" in capsys.readouterr().err


def test_load_without_a_name_does_not_take_it(own_home: Path) -> None:
    with pytest.raises(BundleNotFoundError, match="demo"):
        sdrt.load()


def test_a_bundle_of_that_name_wins(own_home: Path, tiny_bundle: Path) -> None:
    shutil.copytree(tiny_bundle, own_home / "bundles" / "demo")
    assert locate("demo") == own_home / "bundles" / "demo"


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_other_commands_know_it(warm: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert main([command, "demo"]) == 0
    assert "demo" in capsys.readouterr().out


def test_it_is_unpacked_once(warm: Path) -> None:
    before = (demo.bundle_folder(home()) / MANIFEST).stat()
    after = (demo.bundle_folder(home()) / MANIFEST).stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_several_may_unpack_it_at_once(own_home: Path) -> None:
    with ThreadPoolExecutor(3) as pool:
        folders = list(pool.map(demo.bundle_folder, [own_home] * 3))
    assert len(set(folders)) == 1
    Bundle.open(folders[0]).verify()
    assert [path.name for path in folders[0].parent.iterdir()] == ["demo"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:100_000]),
        lambda path: path.write_bytes(b"not xz" + path.read_bytes()),
    ],
    ids=["missing", "empty", "short", "other"],
)
def test_a_damaged_archive_is_reported(
    own_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], object]
) -> None:
    archive = Path(shutil.copy(demo.ARCHIVE, tmp_path))
    damage(archive)
    monkeypatch.setattr(demo, "ARCHIVE", archive)
    with pytest.raises(BundleCorruptError, match="install sdrt again"):
        demo.bundle_folder(own_home)
    assert not [path for path in own_home.rglob("*") if path.is_file()]


def test_a_home_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file")
    with pytest.raises(InputError, match="set SDRT_HOME to a folder that can be written"):
        demo.bundle_folder(tmp_path / "home")


def test_it_is_small() -> None:
    assert demo.ARCHIVE.stat().st_size <= 15_000_000


def test_the_packed_checkpoint_is_the_one_in_the_tree(own_home: Path) -> None:
    packed = demo.checkpoint_folder(own_home)
    files = {path.relative_to(packed) for path in packed.rglob("*") if path.is_file()}
    assert files == {path.relative_to(model_folder()) for path in model_folder().rglob("*") if path.suffix != ".md"} - {
        Path(name) for name in ("scheduler", "text_encoder", "unet", "vae")
    }
    for file in files:
        assert (packed / file).read_bytes() == (model_folder() / file).read_bytes()


def test_an_installed_sdrt_builds_from_the_packed_checkpoint(
    own_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdrt.export.demo.model_folder", lambda: tmp_path / "absent")
    found = read_checkpoint("demo")
    assert (found.name, found.source) == ("demo", "demo")


def test_the_shipped_bundle_is_what_a_build_gives(warm: Path, tmp_path: Path) -> None:
    assert (
        main(["build", "--ckpt", "demo", "--backend", "onnx", "--precision", "fp32", "-o", str(tmp_path / "demo")]) == 0
    )
    built, shipped = Bundle.open(tmp_path / "demo"), Bundle.open(locate("demo"))
    assert built.manifest.files == shipped.manifest.files
    for entry in built.manifest.files:
        assert built.path(entry).read_bytes() == shipped.path(entry).read_bytes()
    for field in ("name", "kind", "precision", "model", "latent", "text", "scheduler"):
        assert getattr(built.manifest, field) == getattr(shipped.manifest, field)
