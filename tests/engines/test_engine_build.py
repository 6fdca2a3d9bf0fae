"""From an ONNX bundle to an engine bundle, on real graphs at small scale, and at full size under its marker."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from sdrt.engines import build as build_module
from sdrt.engines import fusion, fusion_table
from sdrt.engines import targets as targets_module
from sdrt.engines import tensorrt as tensorrt_module
from sdrt.engines.build import build_engines, default_choice, default_name
from sdrt.engines.bundle import Bundle
from sdrt.engines.devices import Gpu
from sdrt.engines.manifest import DEEP_FEATURES
from sdrt.engines.targets import host_platform
from sdrt.errors import BackendError, BundleCorruptError, BundleExistsError, InputError

if TYPE_CHECKING:
    from pathlib import Path

ADA, HOPPER = Gpu(0, "NVIDIA L4", "8.9", 24 * 2**30), Gpu(0, "NVIDIA H200", "9.0", 139 * 2**30)


@pytest.fixture(scope="module")
def source(tiny_fp16_bundle: Path) -> Bundle:
    return Bundle.open(tiny_fp16_bundle)


@pytest.fixture(scope="module")
def reports() -> list[tuple[str, int, int]]:
    return []


@pytest.fixture(scope="module")
def engines(source: Bundle, reports: list[tuple[str, int, int]], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return build_engines(
        source,
        backend="tensorrt-rtx",
        targets=["rtx3090"],
        sizes=[(64, 64)],
        output=tmp_path_factory.mktemp("engines") / "tiny-engines",
        command="sdrt build --from tiny",
        report=lambda *told: reports.append(told),
    )


def test_the_bundle_is_whole_and_says_what_it_is_for(engines: Bundle, source: Bundle) -> None:
    engines.verify()
    manifest, backend = engines.manifest, engines.manifest.backend
    assert (manifest.kind, manifest.precision, manifest.name) == ("engine", "fp16", "tiny-engines")
    assert (backend.name, backend.opset, backend.compute_capabilities) == ("tensorrt-rtx", None, ("8.6",))
    assert (backend.version, backend.platform) == (manifest.tools["tensorrt_rtx"], host_platform())
    assert manifest.tools["torch"] == source.manifest.tools["torch"]
    assert (manifest.model, manifest.scheduler) == (source.manifest.model, source.manifest.scheduler)
    assert (engines.folder / "tokenizer.json").read_bytes() == (source.folder / "tokenizer.json").read_bytes()


def test_every_component_has_a_plan_its_layers_and_its_profiles(engines: Bundle, source: Bundle) -> None:
    for component in engines.manifest.components:
        names = [entry.path for entry in component.files]
        assert names == [f"{component.name}.plan", f"{component.name}.layers.json"]
        assert component.parity is None
        assert component.graph.bytes > source.component(component.name).files[1].bytes / 2
    # Feature caching runs on no GPU so far: neither its graph nor what it keeps is in an engine.
    assert [component.name for component in engines.manifest.components] == [
        "text_encoder",
        "unet",
        "vae_decoder",
        "vae_encoder",
    ]
    assert [tensor.name for tensor in source.component("unet").outputs] == ["prediction", DEEP_FEATURES]
    assert [tensor.name for tensor in engines.component("unet").outputs] == ["prediction"]
    report = fusion.load(engines, "unet")
    assert report is not None
    assert not [layer for layer in report.layers if DEEP_FEATURES in str(layer)]
    profiles = engines.component("unet").profiles
    assert [profile["latents"].opt for profile in profiles] == [(2, 4, 8, 8), (1, 4, 8, 8)]
    assert engines.component("vae_decoder").outputs[0].shape == (1, 3, 64, 64)


def test_layers_can_be_shown(engines: Bundle, source: Bundle) -> None:
    report = fusion.load(engines, "unet")
    assert report is not None
    assert report.profiles == (0, 1)
    assert report.count("attention", 0)[1] == 32
    assert report.count("geglu", 0)[1] == 16
    assert report.count("group_norm", 0)[1] == 61
    shown = fusion_table.table(engines)
    assert shown.startswith("COMPONENT")
    assert all(layer.name in shown for layer in report.layers)
    with pytest.raises(InputError, match="has no list of layers, since it holds ONNX graphs"):
        fusion_table.table(source)


def test_damaged_layers_are_an_error_of_the_bundle(engines: Bundle, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in engines.folder.iterdir():
        (copy / path.name).symlink_to(path)
    damaged = Bundle(engines.folder, engines.manifest)
    assert fusion.load(damaged, "unet") is not None
    (copy / "unet.layers.json").unlink()
    (copy / "unet.layers.json").write_text(json.dumps({"layers": [{}], "patterns": []}))
    with pytest.raises(BundleCorruptError, match=r"unet.layers.json cannot be read"):
        fusion.load(Bundle(copy, engines.manifest), "unet")


def test_progress_is_told_in_bytes_up_to_all(engines: Bundle, reports: list[tuple[str, int, int]]) -> None:
    assert engines.size > 0
    done = [told[1] for told in reports]
    assert done == sorted(done)
    assert len({told[2] for told in reports}) == 1
    assert reports[-1] == ("VAE encoder: done", reports[-1][2], reports[-1][2])
    assert {told[0].partition(":")[0] for told in reports} == {"text encoder", "U-Net", "VAE decoder", "VAE encoder"}


def test_engines_are_not_built_of_engines(engines: Bundle, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds tensorrt-rtx engines, expected ONNX graphs"):
        build_engines(engines, backend="tensorrt-rtx", output=tmp_path / "engines")


def test_fp32_graphs_are_refused_unless_asked_for(tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="fp32 graphs, of which engines would be slow and large"):
        build_engines(Bundle.open(tiny_bundle), backend="tensorrt-rtx", output=tmp_path / "engines")


def test_an_existing_bundle_stays(engines: Bundle, source: Bundle) -> None:
    before = (engines.folder / "bundle.json").read_bytes()
    with pytest.raises(BundleExistsError):
        build_engines(source, backend="tensorrt-rtx", output=engines.folder)
    assert (engines.folder / "bundle.json").read_bytes() == before


def test_a_damaged_graph_is_refused_and_nothing_is_left(source: Bundle, tmp_path: Path) -> None:
    copy, output = tmp_path / "copy", tmp_path / "out" / "engines"
    copy.mkdir()
    output.parent.mkdir()
    for path in source.folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    data = copy / "text_encoder.onnx.data"
    content = bytearray(data.read_bytes())
    content[1000] ^= 1
    data.write_bytes(content)
    with pytest.raises(BundleCorruptError, match=r"text_encoder.onnx.data has SHA-256"):
        build_engines(Bundle.open(copy), backend="tensorrt-rtx", output=output)
    assert [path.name for path in output.parent.iterdir() if not path.name.endswith("-lock")] == []


def test_hopper_is_refused_for_rtx(source: Bundle, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"h200 has compute capability 9.0, .* builds for sm75"):
        build_engines(source, backend="tensorrt-rtx", targets=["h200"], output=tmp_path / "engines")


def test_names_tell_backend_and_targets() -> None:
    assert default_name("v1-1-fp16", "tensorrt-rtx", ("8.6", "8.9")) == "v1-1-rtx-sm86-sm89"
    assert default_name("v1-1", "tensorrt", ("9.0",)) == "v1-1-trt-sm90"


RTX, TRT = {"tensorrt_rtx"}, {"tensorrt"}


@pytest.mark.parametrize(
    ("gpus", "installed", "named", "backend", "targets", "says"),
    [
        ((), RTX, [], "tensorrt-rtx", ("rtx3090",), "no NVIDIA GPU here: building engines for the rtx3090"),
        ((), RTX | TRT, [], "tensorrt-rtx", ("rtx3090",), "with tensorrt-rtx"),
        ((), RTX, ["rtx4090"], "tensorrt-rtx", ("rtx4090",), "building engines with tensorrt-rtx"),
        ((), RTX, ["h100"], "tensorrt-rtx", ("h100",), "tensorrt-rtx"),
        ((), TRT, [], None, (), "pip install 'sdrt[rtx]'"),
        ((), set(), ["rtx3090"], None, (), "pip install 'sdrt[rtx]'"),
        ((ADA,), RTX, [], "tensorrt-rtx", ("native",), "NVIDIA L4 (compute capability 8.9) of this machine"),
        ((ADA,), RTX | TRT, [], "tensorrt", ("native",), "with tensorrt for the NVIDIA L4"),
        ((ADA,), RTX | TRT, ["rtx3090", "l4"], "tensorrt-rtx", ("rtx3090", "l4"), "with tensorrt-rtx"),
        ((ADA,), set(), [], None, (), "pip install 'sdrt[rtx]' or 'sdrt[trt]'"),
        ((HOPPER,), RTX, [], None, (), "NVIDIA H200 (compute capability 9.0) of this machine, pip install 'sdrt[trt]'"),
        ((HOPPER,), RTX | TRT, [], "tensorrt", ("native",), "with tensorrt for the NVIDIA H200"),
    ],
)
def test_what_is_built_where_nobody_said(
    monkeypatch: pytest.MonkeyPatch,
    gpus: tuple[Gpu, ...],
    installed: set[str],
    named: list[str],
    backend: str | None,
    targets: tuple[str, ...],
    says: str,
) -> None:
    for module in (build_module, targets_module, tensorrt_module):
        monkeypatch.setattr(module, "nvidia_gpus", lambda: gpus)
    monkeypatch.setattr(build_module, "find_spec", lambda name: name if name in installed else None)
    choice = default_choice(named)
    assert (choice.backend, choice.targets) == (backend, targets)
    assert (choice.missing is None) == (backend is not None)
    assert says in choice.why


def test_full_tensorrt_asks_for_a_gpu_before_anything_is_written(
    source: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_module, "nvidia_gpus", tuple)
    with pytest.raises(BackendError, match="tensorrt builds engines on the GPU"):
        build_engines(source, backend="tensorrt", output=tmp_path / "engines")
    assert list(tmp_path.iterdir()) == []
