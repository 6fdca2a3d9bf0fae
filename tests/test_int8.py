"""`sdrt build --precision int8`, with NNCF on small models, and what it makes on both backends."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

import sdrt
from sdrt import build as building
from sdrt.cli import main
from sdrt.engines import demo, post_training, quantize
from sdrt.engines.bundle import Bundle
from sdrt.engines.deviation import deviation
from sdrt.engines.manifest import Backend, DimRange
from sdrt.engines.publish import publishing
from sdrt.engines.quantizers import groups, weighted_layers
from sdrt.runtime import backends
from sdrt.runtime.common_rows import compute_once
from sdrt.runtime.compile_cache import CompileCache
from sdrt.runtime.openvino import OpenVinoSession

from .engines.example import fill

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sdrt.engines.post_training import Samples

# The extra has neither PyTorch nor the exporter. NNCF looks for frameworks before it imports them.
EXTRA_ONLY = """
import sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        missing = name.partition(".")[0] in {"torch", "diffusers", "transformers", "onnxscript"}
        return None if missing else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = map(Without, sys.meta_path)
from sdrt.cli import main
sys.exit(main(sys.argv[1:]))
"""
PROMPT = "a large red star on a blue background"


def quantized_layers(bundle: Bundle, component: str = "unet") -> tuple[set[str], set[str]]:
    """Names of all layers with weights, and of those that have quantisers."""
    graph = onnx.load(bundle.path(bundle.component(component).graph), load_external_data=False).graph
    return set(weighted_layers(graph)), {layer for group in groups(graph) for layer in group.layers}


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.open(demo.bundle_folder(tmp_path_factory.mktemp("home")))


@pytest.fixture(scope="module")
def built(exact: Bundle, tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, subprocess.CompletedProcess[str]]:
    """int8 of the demo model, built where nothing of PyTorch can be imported, and what was said."""
    folder = tmp_path_factory.mktemp("int8")
    command = ["build", "--from", str(exact.folder), "--precision", "int8", "-o", str(folder / "it"), "--json"]
    done = subprocess.run(
        [sys.executable, "-c", EXTRA_ONLY, *command], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return Bundle.open(folder / "it"), done


@pytest.fixture
def int8(built: tuple[Bundle, object]) -> Bundle:
    return built[0]


def test_the_bundle_is_whole_and_says_what_it_is(
    built: tuple[Bundle, subprocess.CompletedProcess[str]], exact: Bundle
) -> None:
    int8, done = built
    int8.verify()
    facts = json.loads(done.stdout)
    assert (facts["path"], facts["manifest"]["precision"]) == (str(int8.folder), "int8")
    assert "U-Net: finding the ranges of its layers" in done.stderr.splitlines()
    manifest = int8.manifest
    assert (manifest.kind, manifest.precision, manifest.name) == ("onnx", "int8", "it")
    assert {"nncf", "torch"} <= manifest.tools.keys()
    assert manifest.command.endswith("--json")
    assert (manifest.model, manifest.scheduler) == (exact.manifest.model, exact.manifest.scheduler)
    for component in manifest.components:
        of_unet = component.name.startswith("unet")
        original = exact.component(component.name)
        assert component.precision == ("int8" if of_unet else "fp32")
        assert (component == original) is not of_unet
        assert (component.inputs, component.outputs) == (original.inputs, original.outputs)
        assert component.parity is not None
        if of_unet:
            parity = component.parity
            assert (parity.metric, parity.threshold) == ("relative_l2", post_training.LARGEST_ERROR)
            assert 1e-4 < parity.relative_l2 <= parity.threshold
            assert parity.reference.startswith("its fp32 graph in onnxruntime ")
    sizes = [bundle.path(bundle.component("unet").files[1]).stat().st_size for bundle in (int8, exact)]
    assert sizes[0] < 0.3 * sizes[1]


def test_most_layers_are_quantised_and_none_of_what_has_no_weights(int8: Bundle) -> None:
    layers, quantized = quantized_layers(int8)
    assert 0.9 * len(layers) < len(quantized) < len(layers)
    unet = int8.component("unet")
    assert [entry.path for entry in unet.files] == ["unet.onnx", "unet.onnx.data", "unet.merged.onnx"]
    graph = onnx.load(int8.path(unet.graph), load_external_data=False).graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    pairs = [node for node in graph.node if node.op_type == "DequantizeLinear"]
    stored = [weights[node.input[0]].data_type for node in pairs if node.input[0] in weights]
    assert stored == [TensorProto.INT8] * len(quantized)
    read = [weights[node.input[2]].data_type for node in pairs if node.input[0] not in weights]
    assert set(read) == {TensorProto.UINT8}
    # Attention is between the layers, whole as it was.
    merged = onnx.load(int8.path(int8.merged_graph(unet)), load_external_data=False).graph
    assert not [node for node in merged.node if node.op_type == "Softmax"]
    assert quantized_layers(int8, "unet_shallow")[1] < quantized
    halves = [quantized_layers(int8, name)[1] for name in ("unet_encoder", "unet_decoder")]
    assert all(halves)
    assert halves[0] | halves[1] == quantized


def test_what_both_rows_of_a_guided_step_have_in_common_is_computed_once(int8: Bundle) -> None:
    sizes = {"batch": 2, "height": 16, "width": 16}
    given = tuple(
        tuple(sizes[dim.name] if isinstance(dim, DimRange) else dim for dim in spec.shape)
        for spec in int8.component("unet").inputs
    )
    with backends._openvino_session(int8, "unet", "fp32", CompileCache(int8, "openvino")) as session:
        assert isinstance(session, OpenVinoSession)
        model = session._read(given, ("prediction",))
    assert compute_once(model)
    rows = {node.get_output_shape(0)[0] for node in model.get_ordered_ops() if node.get_type_name() == "Convolution"}
    assert rows == {1, 2}


def picture(bundle: Bundle, backend: str, **approximations: Any) -> NDArray[np.float32]:
    with sdrt.load(bundle.folder, backend=backend) as pipe:
        (image,) = pipe(
            PROMPT,
            num_inference_steps=20,
            seed=4,
            sampler="dpmpp_2m",
            output_type="np",
            **approximations,
        )
    return image


@pytest.mark.parametrize("every", [{}, {"cache_interval": 2}, {"encoder_interval": 2}], ids=str)
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino:fp32", "openvino"])
def test_pictures_are_close_to_the_exact_ones(int8: Bundle, exact: Bundle, backend: str, every: dict[str, int]) -> None:
    """At once, and with OpenVINO again from what was compiled; the outermost blocks work on the features of int8."""
    expected = picture(exact, "onnxruntime", **every)
    found = picture(int8, backend, **every)
    square = float(np.mean((found - expected) ** 2))
    assert 28 < -10 * math.log10(square) < 70
    assert np.array_equal(picture(int8, backend, **every), found)


def test_a_tighter_bound_leaves_more_layers_alone(
    int8: Bundle, exact: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parity = int8.component("unet").parity
    assert parity is not None
    monkeypatch.setattr(post_training, "LARGEST_ERROR", parity.relative_l2 / 2)
    assert main(["build", "--from", str(exact.folder), "--precision", "int8", "-o", str(tmp_path / "better")]) == 0
    better = Bundle.open(tmp_path / "better")
    found = better.component("unet").parity
    assert found is not None
    assert found.relative_l2 <= found.threshold == parity.relative_l2 / 2
    layers, quantized = quantized_layers(better)
    assert 0.5 * len(layers) < len(quantized) < len(quantized_layers(int8)[1])


def left_in(folder: Path) -> list[str]:
    """Name all that is in a folder, hidden or not, but for locks."""
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith("-lock"))


@pytest.mark.parametrize("stage", ["calibrating: denoising", "U-Net: finding the ranges of its layers"])
def test_what_is_interrupted_leaves_nothing(
    exact: Bundle, tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopped(BaseException):
        pass

    def report(what: str, done: int, total: int) -> None:
        assert 0 <= done <= total
        if what == stage and done:
            raise Stopped

    order = building.Order(source=str(exact.folder), output=tmp_path / "it", precision="int8")
    with pytest.raises(Stopped):
        building.build(order, building.decide(order), report)
    assert left_in(tmp_path) == []


def test_a_checkpoint_is_built_quantised_and_its_graphs_are_not_kept(
    exact: Bundle, own_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stands in for export and quantisation, which are tested by themselves; the prompts are the user's."""
    import sdrt.export.build as export_module

    asked: dict[str, Any] = {}
    given: list[Any] = []

    def build(ckpt: str, *, output: Path, **options: Any) -> Bundle:
        asked.update(options, ckpt=ckpt)
        shutil.copytree(exact.folder, output)
        return Bundle.open(output)

    def quantized(source: Bundle, samples: Samples, *, output: Path, **_: Any) -> Bundle:
        given.extend([*samples.seen, *samples.held_out])
        shutil.copytree(source.folder, output)
        return Bundle.open(output)

    monkeypatch.setattr(export_module, "build", build)
    monkeypatch.setattr(building, "quantize_bundle", quantized)
    (tmp_path / "prompts.txt").write_text("a red star\n\n  a blue ring on white \n", encoding="utf-8")
    options = ["--calibration-prompts", str(tmp_path / "prompts.txt"), "--clip-skip", "1", "--ema"]
    assert main(["build", "--ckpt", "v1-1", "--precision", "int8", *options]) == 0
    assert (asked["ckpt"], asked["precision"], asked["clip_skip"], asked["ema"]) == ("v1-1", "fp32", 1, True)
    assert left_in(own_home / "bundles") == ["v1-1-int8"]
    with sdrt.load(exact.folder, backend="onnxruntime") as pipe:
        expected = pipe.embed(["a red star", "a blue ring on white"])
    for sample in given:
        assert sample["latents"].shape == (2, 4, 16, 16)
        assert np.array_equal(*sample["latents"])
        assert min(deviation(sample["text_embeddings"][1], one)[1] for one in expected) < 0.05
    assert len({float(sample["timestep"][0]) for sample in given}) == 12


def failure(capsys: pytest.CaptureFixture[str], *arguments: str, code: int) -> str:
    """Run a command that must end in one line on standard error and nothing on standard output."""
    assert main(arguments) == code
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1), err
    return err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--backend", "tensorrt-rtx"], "makes graphs for CPUs, and --backend tensorrt-rtx is for engines"),
        (["--backend", "tensorrt"], "makes graphs for CPUs, and --backend tensorrt is for engines"),
        (["--target", "rtx3090"], "makes graphs for CPUs, and --target is for engines"),
        (["--backend", "onnx", "--dynamic"], "makes graphs for CPUs, and --dynamic is for engines"),
        (
            ["--calibration-prompts", "nowhere.txt"],
            "nowhere.txt cannot be read (No such file or directory): give a text",
        ),
        (["--calibration-prompts", "empty.txt"], "empty.txt holds no prompt: give a text file with a prompt a line"),
        (["--calibration-prompts", "latin.txt"], "latin.txt is not UTF-8: give a text file"),
        (["--name", "../x"], "no name for a bundle"),
        (["--name", "../x", "-o", "fine"], "no name for a bundle"),
        (["-o", "nowhere/it"], "expected a folder to put it in: make it first"),
    ],
)
@pytest.mark.parametrize("of", ["--ckpt", "--from"])
def test_what_makes_no_sense_is_refused_before_any_work(
    exact: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    of: str,
    options: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text(" \n\n", encoding="utf-8")
    Path("latin.txt").write_bytes("für".encode("latin-1"))
    source = {"--ckpt": "v1-1", "--from": str(exact.folder)}[of]
    assert message in failure(capsys, "build", of, source, "--precision", "int8", *options, code=2)
    assert left_in(tmp_path) == ["empty.txt", "latin.txt"]


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        (
            {"precision": "fp16"},
            ["--precision", "int8"],
            "holds fp16 graphs, and int8 is made of fp32 graphs: give the",
        ),
        ({"precision": "int8"}, ["--precision", "int8"], "holds int8 graphs, and int8 is made of fp32 graphs"),
        (
            {"kind": "engine", "backend": Backend("tensorrt", "11.0")},
            ["--precision", "int8"],
            "holds tensorrt engines, and int8 is made of fp32 graphs",
        ),
        ({"precision": "int8"}, ["--target", "rtx3090"], "holds int8 graphs, which are for CPUs, expected fp16 ones"),
        ({}, ["--precision", "int8", "--ema"], "--ema is decided when graphs are made of a checkpoint"),
        ({}, ["--calibration-prompts", "x"], "--calibration-prompts is for int8: give --precision int8 with it"),
    ],
)
def test_bundles_that_cannot_be_quantised_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], arguments: list[str], message: str
) -> None:
    with publishing(tmp_path / "source") as folder:
        fill(folder, **changes)
    assert message in failure(capsys, "build", "--from", str(tmp_path / "source"), *arguments, code=2)


@pytest.mark.parametrize("package", ["nncf", "onnx", "onnxruntime"])
@pytest.mark.parametrize("of", ["--ckpt", "--from"])
def test_without_the_extra_it_is_named(
    exact: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], of: str, package: str
) -> None:
    monkeypatch.setattr(quantize, "find_spec", lambda name: None if name == package else name)
    err = failure(capsys, "build", of, str(exact.folder), "--precision", "int8", code=1)
    assert err == f"sdrt: {package} is not installed and quantising to int8 needs it: run pip install 'sdrt[int8]'\n"


def test_a_place_that_is_taken_is_told_before_any_work(
    exact: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with publishing(tmp_path / "taken") as folder:
        fill(folder)
    command = ["build", "--from", str(exact.folder), "--precision", "int8", "-o", str(tmp_path / "taken")]
    assert "exists already: give --force to replace it" in failure(capsys, *command, code=1)
