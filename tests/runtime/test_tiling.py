"""Decoding in tiles: the same picture to rounding, chosen where it saves memory, and refused in one line."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sdrt
from sdrt.cli import main
from sdrt.engines.manifest import TILE_MARGIN
from sdrt.errors import InputError
from sdrt.runtime import tiling
from sdrt.runtime.host import HostEngines
from sdrt.runtime.openvino import default_precision
from sdrt.runtime.tiling import Statistics, check_tiling, strips
from tests.engines.example import fill
from tests.runtime.test_approximations import CountedSession

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from tests.runtime.test_approximations import Calls

SMALL_TILES = 2**17
PROMPT = "a cat"


def psnr(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """In dB, of pictures in [0, 1]."""
    return -10 * float(np.log10(np.mean((found.astype(np.float64) - expected) ** 2)))


def latents(width: int, height: int, count: int = 1) -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal((count, 4, height // 8, width // 8), np.float32)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "_TILE_BYTES", SMALL_TILES)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino:fp32"])
@pytest.mark.parametrize("size", [(128, 128), (96, 232), (200, 104), (8, 8), (136, 8)])
def test_tiles_make_the_picture_of_the_whole(tiny_bundle: Path, backend: str, size: tuple[int, int]) -> None:
    pytest.importorskip(backend.partition(":")[0])
    given_latents = latents(*size)
    with sdrt.load(tiny_bundle, backend=backend) as pipe:
        (whole,) = pipe.decode(given_latents, vae_tiling=False)
        (tiled,) = pipe.decode(given_latents, vae_tiling=True)
    assert tiled.shape == whole.shape
    assert psnr(tiled, whole) > 100


@pytest.mark.usefixtures("small_tiles")
def test_tiles_show_no_seams_with_trained_weights() -> None:
    with sdrt.load("demo", backend="onnxruntime") as pipe:
        (made,) = pipe("a large red star on a blue background", num_inference_steps=8, seed=1, output_type="latent")
        wide = np.concatenate([made, made[:, ::-1]], axis=1)[None]
        (whole,), (tiled,) = (pipe.decode(wide, vae_tiling=tiles) for tiles in (False, True))
    assert whole.shape == (256, 128, 3)
    assert psnr(tiled, whole) > 100


@pytest.mark.usefixtures("small_tiles")
def test_tiles_are_as_near_to_the_whole_in_bf16_as_rounding_is(tiny_bundle: Path) -> None:
    if default_precision() != "bf16":
        pytest.skip("this CPU has no instructions for bf16")
    with sdrt.load(tiny_bundle, backend="openvino:bf16") as pipe:
        (whole,), (tiled,) = (pipe.decode(latents(128, 104), vae_tiling=tiles) for tiles in (False, True))
    assert psnr(tiled, whole) > 45


@pytest.mark.usefixtures("small_tiles")
def test_fp16_graphs_decode_in_tiles_as_well(tiny_fp16_bundle: Path) -> None:
    with sdrt.load(tiny_fp16_bundle, backend="onnxruntime") as pipe:
        (whole,), (tiled,) = (pipe.decode(latents(128, 104), vae_tiling=tiles) for tiles in (False, True))
    assert psnr(tiled, whole) > 60


@pytest.mark.usefixtures("small_tiles")
def test_the_pictures_of_a_batch_are_those_of_each_alone(tiny_bundle: Path) -> None:
    several = latents(64, 96, 3)
    with sdrt.load(tiny_bundle, backend="onnxruntime") as pipe:
        together = pipe.decode(several, vae_tiling=True)
        for image, alone in zip(together, several, strict=True):
            assert np.array_equal(image, pipe.decode(alone[None], vae_tiling=True)[0])


@pytest.mark.usefixtures("small_tiles")
def test_large_pictures_are_decoded_in_tiles_unless_that_is_refused(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiling, "LARGEST_WHOLE", 64 * 64)
    calls: Calls = Counter()
    arguments: dict[str, Any] = {"num_inference_steps": 1, "seed": 0, "height": 64}

    def decoders() -> set[str]:
        found = {name for name, _ in calls if name.startswith("vae")}
        calls.clear()
        return found

    with sdrt.load(tiny_bundle, backend="onnxruntime") as pipe:
        engines = pipe.engines
        assert isinstance(engines, HostEngines)
        engines.wrap_sessions(lambda name, session: CountedSession(name, session, calls))
        pipe(PROMPT, width=64, **arguments)
        assert decoders() == {"vae_decoder"}
        (automatic,) = pipe(PROMPT, width=72, **arguments)
        assert len(decoders()) == 15
        (whole,) = pipe(PROMPT, width=72, vae_tiling=False, **arguments)
        assert decoders() == {"vae_decoder"}
        (asked,) = pipe(PROMPT, width=64, vae_tiling=True, output_type="np", **arguments)
        assert "vae_decoder" not in decoders()
        assert asked.shape == (64, 64, 3)
    assert np.abs(np.asarray(automatic, int) - np.asarray(whole, int)).max() <= 1
    assert automatic.info == whole.info


@pytest.fixture
def old_bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A bundle as they were before there were stages."""
    old = tmp_path / "old"
    shutil.copytree(tiny_bundle, old)
    manifest = json.loads((old / "bundle.json").read_text())
    manifest["components"] = [part for part in manifest["components"] if "decoder_" not in part["name"]]
    (old / "bundle.json").write_text(json.dumps(manifest))
    return old


def test_a_bundle_without_stages_decodes_whole_and_says_what_to_build(
    old_bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tiling, "LARGEST_WHOLE", 0)
    says = "no graphs for decoding in tiles: build it again with sdrt build --ckpt tiny --force"
    with sdrt.load(old_bundle, backend="onnxruntime") as pipe:
        assert pipe.decode(latents(64, 64))[0].shape == (64, 64, 3)
        with pytest.raises(InputError, match=says):
            pipe.decode(latents(64, 64), vae_tiling=True)
        with pytest.raises(InputError, match=says):
            pipe(PROMPT, vae_tiling=True)
    picture = tmp_path / "cat.png"
    command = ["run", PROMPT, "--bundle", str(old_bundle), "--steps", "1", "-W", "64", "-H", "64", "-o", str(picture)]
    assert main([*command, "--vae-tiling"]) == 2
    assert says in capsys.readouterr().err
    assert not picture.exists()
    assert main([*command, "--no-vae-tiling"]) == 0
    assert picture.exists()


def test_engines_refuse_tiles_before_they_begin(tmp_path: Path) -> None:
    manifest = fill(tmp_path, kind="engine")
    with pytest.raises(InputError, match="no graphs for decoding in tiles: leave it out, or run an ONNX bundle"):
        check_tiling(True, manifest)
    assert check_tiling(None, manifest) is None


def test_a_gpu_refuses_tiles_before_the_first_step(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HostEngines, "tiles", False)
    with sdrt.load(tiny_bundle, backend="onnxruntime") as pipe:
        with pytest.raises(InputError, match="runs on a GPU here, which decodes pictures whole: leave vae tiling out"):
            next(pipe.steps(PROMPT, num_inference_steps=1, vae_tiling=True))
        with pytest.raises(InputError, match="runs on a GPU here"):
            pipe.decode(latents(64, 64), vae_tiling=True)


@pytest.mark.parametrize("value", ["yes", 1, 0])
def test_what_is_neither_yes_nor_no_is_refused(bundle: sdrt.Bundle, value: Any) -> None:
    with pytest.raises(InputError, match=f"vae tiling is {value!r}: expected True, False, or None"):
        check_tiling(value, bundle.manifest)


@given(st.integers(1, 3000), st.integers(1, 400))
def test_strips_cover_every_row_once_and_keep_off_inner_edges(height: int, most: int) -> None:
    rows, tiles = strips(height, most)
    assert rows <= max(most, min(height, 6 * TILE_MARGIN))
    assert [tile.begin for tile in tiles] == [0, *(tile.end for tile in tiles[:-1])]
    assert tiles[-1].end == height
    for tile in tiles:
        assert 0 <= tile.first <= height - rows
        assert tile.begin < tile.end
        assert tile.begin >= tile.first + TILE_MARGIN * (tile.first > 0)
        assert tile.end <= tile.first + rows - TILE_MARGIN * (tile.first + rows < height)


@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_statistics_are_those_of_all_parts_together(offset: float) -> None:
    whole = np.random.default_rng(0).standard_normal((12, 50, 40), np.float32) + np.float32(offset)
    whole[:3] *= 20
    found = Statistics(4)
    for begin, end in [(0, 7), (7, 8), (8, 41), (41, 50)]:
        found.add(whole[:, begin:end])
    by_group = whole.astype(np.float64).reshape(4, -1)
    np.testing.assert_allclose(found.mean, by_group.mean(1), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found.variance, by_group.var(1), rtol=1e-5)
