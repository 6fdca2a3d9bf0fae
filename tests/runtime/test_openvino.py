"""OpenVINO beside onnxruntime: the same graphs, component by component and as pictures."""

from __future__ import annotations

import json
import math
import shutil
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import openvino
import pytest

import sdrt
from sdrt.engines import demo, store
from sdrt.engines.bundle import Bundle, hash_file
from sdrt.engines.manifest import DEEP_FEATURES
from sdrt.errors import BackendError, InputError, MissingDependencyError
from sdrt.runtime import backends
from sdrt.runtime.compile_cache import CompileCache
from sdrt.runtime.onnx import OnnxSession
from sdrt.runtime.openvino import OpenVinoSession, default_precision

from . import tensorrt_stand_in

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from sdrt.runtime.openvino import Precision
    from sdrt.runtime.session import Session

Arrays = dict[str, np.ndarray]

PROMPT = "a large red star on a blue background"
SIZE: dict[str, Any] = {"num_inference_steps": 3, "width": 64, "height": 64, "output_type": "np"}
PRECISIONS = ["fp32", pytest.param("bf16", marks=pytest.mark.skipif("default_precision() == 'fp32'"))]
#: Relative L2 errors of one call of a component. A bf16 number has 8 bits.
TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}


@pytest.fixture(scope="module")
def demo_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.open(demo.bundle_folder(tmp_path_factory.mktemp("home")))


def session(bundle: Bundle, name: str, precision: Precision) -> OpenVinoSession:
    opened = backends._openvino_session(bundle, name, precision, CompileCache(bundle, "openvino"))
    assert isinstance(opened, OpenVinoSession)
    return opened


def compute(session: Session, inputs: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]) -> Arrays:
    binding = session.bind({name: array.shape for name, array in inputs.items()} | dict(shapes))
    for name, array in inputs.items():
        binding.inputs[name][...] = array
    binding.run()
    return {name: array.copy() for name, array in binding.outputs.items()}


def example(bundle: Bundle, name: str) -> tuple[Arrays, dict[str, tuple[int, ...]]]:
    """Inputs as a request has them, and the shapes of the outputs."""
    rng = np.random.default_rng(1)
    if name == "text_encoder":
        ids = np.full((2, 77), 49407, np.int64)
        ids[:, 0], ids[1, 1:6] = 49406, rng.integers(300, 5000, 5)
        embedded = (2, 77, bundle.manifest.text.embedding_width)
        return {"input_ids": ids, "clip_skip": np.array([1], np.int64)}, {"text_embeddings": embedded}
    latents = rng.standard_normal((1 if name == "vae_decoder" else 2, 4, 8, 12)).astype(np.float32)
    if name == "vae_decoder":
        return {"latents": latents}, {"image": (1, 3, 64, 96)}
    # Embeddings of real text: on noise, networks magnify every rounding.
    component = bundle.component("text_encoder")
    with OnnxSession(bundle.path(component.graph), component) as encoder:
        embeddings = compute(encoder, *example(bundle, "text_encoder"))["text_embeddings"]
    inputs = {"latents": latents, "timestep": np.array([501], np.float32), "text_embeddings": embeddings}
    if name == "unet_shallow":
        (channels,) = (spec.shape[1] for spec in bundle.component(name).inputs if spec.name == DEEP_FEATURES)
        assert isinstance(channels, int)
        inputs[DEEP_FEATURES] = rng.standard_normal((2, channels, 8, 12)).astype(np.float32)
    return inputs, {"prediction": (2, 4, 8, 12)}


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def psnr(found: np.ndarray, expected: np.ndarray) -> float:
    square = float(np.mean((found.astype(np.float64) - expected) ** 2))
    return math.inf if square == 0 else -10 * math.log10(square)


@pytest.fixture(params=["demo", "tiny", "tiny_fp16"])
def some_bundle(request: pytest.FixtureRequest, demo_bundle: Bundle) -> Bundle:
    if request.param == "demo":
        return demo_bundle
    return Bundle.open(request.getfixturevalue(f"{request.param}_bundle"))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["text_encoder", "unet", "vae_decoder", "unet_shallow"])
def test_components_compute_what_they_do_in_onnxruntime(some_bundle: Bundle, name: str, precision: Precision) -> None:
    """And the very same when they are compiled again, or what was kept is taken."""
    inputs, shapes = example(some_bundle, name)
    component = some_bundle.component(name)
    with OnnxSession(some_bundle.path(component.graph), component) as reference:
        (expected,) = compute(reference, inputs, shapes).values()
    runs = []
    for from_cache in (False, True):
        with session(some_bundle, name, precision) as one:
            (found,) = compute(one, inputs, shapes).values()
            given = tuple(inputs[spec.name].shape for spec in component.inputs)
            compiled, programs = one._compiled(given, tuple(shapes), False)
            # OpenVINO's cache does not take our operations.
            assert compiled.get_property("LOADED_FROM_CACHE") is (from_cache and not programs)
            runs.append(found)
    fp16 = some_bundle.manifest.precision == "fp16"
    assert relative(runs[0], expected) < (max(TOLERANCE[precision], 1e-2) if fp16 else TOLERANCE[precision])
    assert np.array_equal(runs[0], runs[1])


def resident(file: Path) -> int:
    """kB of a file that are mapped and in memory."""
    found, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(maxsplit=1)[0]:
            ours = line.endswith(f" {file}")
        elif ours and line.startswith("Rss:"):
            found += int(line.split()[1])
    return found


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="this is not Linux")
def test_the_file_of_the_weights_takes_no_memory_beside_what_was_compiled(demo_bundle: Bundle, tmp_path: Path) -> None:
    folder = tmp_path / "a folder"
    shutil.copytree(demo_bundle.folder, folder)
    weights = folder / "unet.onnx.data"
    model = openvino.Core().read_model(folder / "unet.onnx")
    compiled = openvino.compile_model(model, "CPU")
    assert resident(weights) * 1024 > weights.stat().st_size * 0.8
    with session(Bundle.open(folder), "unet", "fp32") as one:
        found = compute(one, *example(demo_bundle, "unet"))["prediction"]
        assert resident(weights) * 1024 < weights.stat().st_size * 0.4  # some are read in place
    with session(demo_bundle, "unet", "fp32") as one:
        assert np.array_equal(compute(one, *example(demo_bundle, "unet"))["prediction"], found)
    del model, compiled


@pytest.mark.skipif("default_precision() == 'fp32'")
@pytest.mark.parametrize("order", [("fp32", "bf16"), ("bf16", "fp32")])
def test_what_was_compiled_for_one_precision_is_not_taken_for_the_other(
    demo_bundle: Bundle, order: tuple[Precision, Precision], monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenVINO names both alike, and bf16 from what was compiled for fp32 gave NaN."""
    inputs, shapes = example(demo_bundle, "unet")
    found = {}
    for precision in order:
        with session(demo_bundle, "unet", precision) as one:
            found[precision] = compute(one, inputs, shapes)["prediction"]
    monkeypatch.setenv("SDRT_COMPILED_MB", "0")
    for precision in order:
        with session(demo_bundle, "unet", precision) as one:
            assert np.array_equal(compute(one, inputs, shapes)["prediction"], found[precision])
    assert 0 < relative(found["bf16"], found["fp32"]) < TOLERANCE["bf16"]


@pytest.fixture(scope="module")
def pipe(demo_bundle: Bundle) -> Iterator[sdrt.Pipeline]:
    with sdrt.Pipeline(demo_bundle, backend="openvino:fp32") as pipeline:
        yield pipeline


def test_fp32_pictures_are_those_of_onnxruntime(pipe: sdrt.Pipeline, demo_bundle: Bundle) -> None:
    with sdrt.Pipeline(demo_bundle, backend="onnxruntime") as reference:
        assert (pipe.backend, reference.backend) == ("openvino:fp32", "onnxruntime")
        for options in (
            {},
            {"guidance_scale": 1.0},
            {"height": 72},
            {"clip_skip": 1, "num_images_per_prompt": 2},
            {"cache_interval": 2, "guidance_interval": (0.0, 10.0)},
            {"encoder_interval": 2, "height": 72},
        ):
            pictures = [each(PROMPT, seed=3, **(SIZE | options)) for each in (pipe, reference)]
            for found, expected in zip(*pictures, strict=True):
                assert found.std() > 0.01
                assert psnr(found, expected) >= 80


def test_threads_get_the_pictures_that_they_would_get_alone(pipe: sdrt.Pipeline) -> None:
    options: list[dict[str, Any]] = [{"seed": 1}, {"seed": 2}, {"seed": 1, "width": 72}, {"guidance_scale": 1.0}]
    alone = [pipe(PROMPT, **(SIZE | {"seed": 5} | each))[0] for each in options]
    together: dict[int, np.ndarray] = {}

    def work(index: int) -> None:
        together[index] = pipe(PROMPT, **(SIZE | {"seed": 5} | options[index]))[0]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(options))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, expected in enumerate(alone):
        assert np.array_equal(together[index], expected)


def test_more_sizes_than_are_kept_come_and_go(demo_bundle: Bundle) -> None:
    with session(demo_bundle, "vae_decoder", "fp32") as decoder:
        inputs = [np.full((1, 4, 8, 8 + width), 0.5, np.float32) for width in range(6)]
        first, again = (
            [compute(decoder, {"latents": each}, {"image": (1, 3, 64, 8 * each.shape[3])})["image"] for each in inputs]
            for _ in range(2)
        )
        assert decoder._compiled.cache_info().currsize == 4
    for one, other in zip(first, again, strict=True):
        assert np.array_equal(one, other)


def test_a_graph_that_it_does_not_take_is_reported(demo_bundle: Bundle, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(demo_bundle.folder, folder)
    (folder / "unet.onnx").write_bytes(b"no graph")
    manifest = json.loads((folder / "bundle.json").read_text())
    (unet,) = (component for component in manifest["components"] if component["name"] == "unet")
    entry = hash_file(folder, "unet.onnx")
    unet["files"][0] |= {"bytes": entry.bytes, "sha256": entry.sha256}
    (folder / "bundle.json").write_text(json.dumps(manifest))
    with sdrt.load(folder, backend="openvino:fp32") as pipeline:
        with pytest.raises(BackendError, match=r"openvino does not compile .*unet\.onnx: Unable to read") as caught:
            pipeline(PROMPT, **SIZE)
        assert "\n" not in str(caught.value)


def test_auto_takes_the_fastest_that_computes_exactly(demo_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "nvidia_gpus", tuple)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert backends.choose(demo_bundle) == backends.fastest() == "openvino:fp32"
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert backends.choose(demo_bundle) == backends.fastest() == "onnxruntime"
    monkeypatch.setattr(backends, "_installed", lambda module: module == "openvino")
    assert backends.fastest() == "openvino:fp32"
    monkeypatch.setattr(backends, "_installed", lambda _module: False)
    assert backends.fastest() is None
    assert backends.obstacle(demo_bundle) == "onnxruntime is not installed: run pip install 'sdrt[cpu]'"


def test_the_precision_is_that_of_the_cpu_unless_it_is_named(
    demo_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert backends.choose(demo_bundle, "openvino") == f"openvino:{default_precision()}"
    monkeypatch.setattr("sdrt.runtime.openvino.default_precision", lambda: "fp32")
    assert backends.choose(demo_bundle, "openvino") == "openvino:fp32"
    with pytest.raises(BackendError, match="no instructions for bf16: take openvino:fp32"):
        backends.choose(demo_bundle, "openvino:bf16")


def test_without_openvino_the_extra_is_named(demo_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert backends.fastest() == "onnxruntime"
    with pytest.raises(BackendError, match=r"openvino is not installed: run pip install 'sdrt\[openvino\]'"):
        sdrt.Pipeline(demo_bundle, backend="openvino")
    monkeypatch.setattr("sdrt.runtime.openvino._core", sdrt.runtime.openvino._core.__wrapped__)
    with pytest.raises(MissingDependencyError, match=r"run pip install 'sdrt\[openvino\]'"):
        session(demo_bundle, "unet", "fp32")


@pytest.mark.parametrize("backend", ["", "cpu", "OpenVINO", "openvino:int8", "openvino:"])
def test_a_backend_that_does_not_exist_is_refused(demo_bundle: Bundle, backend: str) -> None:
    with pytest.raises(InputError, match=r"expected one of auto, onnxruntime, openvino, openvino:bf16, openvino:fp32"):
        sdrt.load(demo_bundle.folder, backend=backend)


def test_engines_decide_by_themselves_what_runs_them(demo_bundle: Bundle, tmp_path: Path) -> None:
    engines = Bundle(tmp_path, tensorrt_stand_in.manifest())
    wrong = "its engines are for tensorrt-rtx, and openvino was asked for: leave the backend out"
    assert backends.obstacle(engines, "openvino") == wrong
    assert backends.obstacle(engines, "tensorrt-rtx") == backends.obstacle(engines)
    graphs = "it holds graphs, and tensorrt-rtx runs engines: sdrt build --from demo --backend tensorrt-rtx"
    assert backends.obstacle(demo_bundle, "tensorrt-rtx") == graphs
    with pytest.raises(BackendError, match="it holds graphs"):
        sdrt.Pipeline(demo_bundle, backend="tensorrt-rtx")
    shutil.copytree(demo_bundle.folder, store.bundles_folder() / "graphs")
    assert store.resolve(None, obstacle=lambda each: backends.obstacle(each, "openvino")).name == "graphs"
