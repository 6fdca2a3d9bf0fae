"""Modules, parity and the build as a whole."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import sdrt
from sdrt.engines import store
from sdrt.engines.bundle import Bundle
from sdrt.errors import BundleExistsError, ExportError, InputError
from sdrt.export import modules, parity
from sdrt.export.build import build
from sdrt.export.checkpoint import Checkpoint, Part, read_checkpoint
from sdrt.export.trace import OPSET, examples, signatures

SIGNATURES = signatures(64, 77, 49408, 4, 32)


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path) -> Checkpoint:
    return read_checkpoint(str(tiny_checkpoint))


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@torch.inference_mode()
def test_the_traced_modules_compute_what_the_originals_do(checkpoint: Checkpoint) -> None:
    decoded, encoded, scale = parity.autoencoder_cases(checkpoint, SIGNATURES["vae_decoder"], SIGNATURES["vae_encoder"])
    assert scale == 1.0
    decoder, encoder = modules.autoencoder(checkpoint.vae, torch.float32)
    for module, cases in (
        (
            modules.text_encoder(checkpoint.text_encoder, torch.float32),
            parity.text_cases(checkpoint, SIGNATURES["text_encoder"]),
        ),
        (
            modules.unet(checkpoint.unet, torch.float32),
            parity.unet_cases(checkpoint, SIGNATURES["unet"], SIGNATURES["text_encoder"]),
        ),
        (decoder, decoded),
        (encoder, encoded),
    ):
        assert len(cases) == 2
        for case in cases:
            outputs = module(*case.inputs)
            for found, expected in zip(
                outputs if isinstance(outputs, tuple) else (outputs,), case.outputs, strict=True
            ):
                assert found.dtype == torch.float32
                assert relative(found, expected) < 1e-5


def loud(vae: Part, factor: float) -> Part:
    """An autoencoder whose activations are too large for float16 and whose output is as ever."""
    weights = {
        name: tensor * factor
        if name.endswith(("conv2.weight", "conv2.bias", "conv_in.weight", "conv_in.bias"))
        else tensor
        for name, tensor in vae.weights.items()
    }
    return Part(vae.config, weights)


@torch.inference_mode()
def test_an_autoencoder_that_would_overflow_float16_is_scaled_to_fit(checkpoint: Checkpoint) -> None:
    shouting = replace(checkpoint, vae=loud(checkpoint.vae, 3e5))
    decoded, encoded, scale = parity.autoencoder_cases(shouting, SIGNATURES["vae_decoder"], SIGNATURES["vae_encoder"])
    assert scale < 1
    assert np.log2(scale) == int(np.log2(scale))
    plain, _ = modules.autoencoder(shouting.vae, torch.float16)
    assert not torch.isfinite(plain(*decoded[0].inputs)).all(), "the test's model does not overflow"
    decoder, encoder = modules.autoencoder(shouting.vae, torch.float16, scale)
    for module, case in ((decoder, decoded[0]), (encoder, encoded[0])):
        outputs = module(*case.inputs)
        for found, expected in zip(outputs if isinstance(outputs, tuple) else (outputs,), case.outputs, strict=True):
            assert relative(found, expected) < 2e-2


@torch.inference_mode()
def test_scaling_the_stream_changes_nothing_in_float32(checkpoint: Checkpoint) -> None:
    (latents,) = examples(SIGNATURES["vae_decoder"], {"batch": 1, "height": 8, "width": 9}, 3)
    plain, _ = modules.autoencoder(checkpoint.vae, torch.float32)
    scaled, _ = modules.autoencoder(checkpoint.vae, torch.float32, 2.0**-5)
    assert relative(scaled(latents), plain(latents)) < 1e-5


def test_a_graph_that_strays_fails_the_build(checkpoint: Checkpoint, tiny_bundle: Path) -> None:
    signature = SIGNATURES["text_encoder"]
    with torch.inference_mode():
        cases = parity.text_cases(checkpoint, signature)
    graph = tiny_bundle / "text_encoder.onnx"
    assert parity.measure("text encoder", [graph], signature, cases, "fp32").relative_l2 < 1e-5
    wrong = [replace(case, outputs=(case.outputs[0] * 1.001,)) for case in cases]
    with pytest.raises(ExportError, match=r"the text encoder graph strays from torch by (1\.00|9\.99)e-0"):
        parity.measure("text encoder", [graph], signature, wrong, "fp32")
    broken = [replace(case, outputs=(case.outputs[0] * float("nan"),)) for case in cases]
    with pytest.raises(ExportError, match="nan"):
        parity.measure("text encoder", [graph], signature, broken, "fp32")


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_bundle_records_its_parity_and_its_origin(
    request: pytest.FixtureRequest, tiny_checkpoint: Path, precision: str
) -> None:
    bundle = Bundle.open(request.getfixturevalue("tiny_bundle" if precision == "fp32" else "tiny_fp16_bundle"))
    bundle.verify()
    manifest = bundle.manifest
    assert (manifest.kind, manifest.precision, manifest.backend.opset) == ("onnx", precision, OPSET)
    assert manifest.model.source == tiny_checkpoint.name
    assert manifest.scheduler["beta_schedule"] == "scaled_linear"
    assert manifest.tools["torch"] == torch.__version__
    assert [component.name for component in manifest.components] == [
        "text_encoder",
        "unet",
        "vae_decoder",
        "vae_encoder",
        "unet_shallow",
        "unet_encoder",
        "unet_decoder",
        "vae_decoder_head",
        *(f"vae_decoder_stage_{number}" for number in range(1, 15)),
    ]
    for component in manifest.components:
        assert component.parity is not None
        assert 0 < component.parity.relative_l2 < component.parity.threshold
        assert component.parity.psnr > (90 if precision == "fp32" else 35)


def test_graphs_are_dynamic_and_name_no_path_of_the_builder(tiny_bundle: Path, tiny_fp16_bundle: Path) -> None:
    for folder in (tiny_bundle, tiny_fp16_bundle):
        for component in Bundle.open(folder).manifest.components:
            path = folder / component.graph.path
            graph = onnx.load(path, load_external_data=False)
            onnx.checker.check_model(path)
            assert {entry.version for entry in graph.opset_import if entry.domain == ""} == {OPSET}
            for value, spec in zip(
                (*graph.graph.input, *graph.graph.output), component.inputs + component.outputs, strict=True
            ):
                dims = [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
                assert value.name == spec.name
                assert dims == [dim if isinstance(dim, int) else dim.name for dim in spec.shape]
            text = path.read_bytes()
            assert b"site-packages" not in text
            assert str(Path(__file__).parents[2]).encode() not in text


def test_fp16_graphs_keep_float32_where_it_must_be(tiny_fp16_bundle: Path) -> None:
    for name, convolutions in (("unet", 40), ("vae_decoder", 20)):
        model = onnx.shape_inference.infer_shapes(
            onnx.load(tiny_fp16_bundle / f"{name}.onnx", load_external_data=False)
        )
        types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
        types |= {value.name: value.data_type for value in model.graph.initializer}
        by_kind: dict[str, set[int]] = {}
        for node in model.graph.node:
            by_kind.setdefault(node.op_type, set()).add(types.get(node.output[0], 0))
        half, single = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
        assert by_kind["Conv"] == {half}
        assert sum(node.op_type == "Conv" for node in model.graph.node) >= convolutions
        assert by_kind["Softmax"] == {single}
        assert by_kind["InstanceNormalization"] == {single}
        assert by_kind.get("LayerNormalization", {single}) == {single}
        # a SiLU follows the normalisation before it; those of the U-Net's timestep follow none
        assert by_kind["Sigmoid"] == ({single} if name == "vae_decoder" else {single, half})


def test_fp16_images_are_close_to_fp32(tiny_bundle: Path, tiny_fp16_bundle: Path) -> None:
    images: list[np.ndarray] = []
    for folder in (tiny_bundle, tiny_fp16_bundle):
        with sdrt.load(folder) as pipe:
            images += pipe("Great Wall photo", num_inference_steps=4, width=64, height=64, seed=1, output_type="np")
    error = float(np.mean((np.asarray(images[0]) - np.asarray(images[1])) ** 2))
    assert 0 < error < 1e-4


@pytest.mark.parametrize("clip_skip", [-1, 2])
def test_clip_skip_is_bounded_by_the_layers(tiny_checkpoint: Path, tmp_path: Path, clip_skip: int) -> None:
    with pytest.raises(InputError, match="the text encoder has 2 layers"):
        build(str(tiny_checkpoint), output=tmp_path / "bundle", clip_skip=clip_skip)
    assert not list(tmp_path.iterdir())


def test_a_taken_place_is_told_before_anything_is_read(tiny_bundle: Path) -> None:
    with pytest.raises(BundleExistsError, match="--force"):
        build("no/such-checkpoint", output=tiny_bundle)
    shutil.copytree(tiny_bundle, store.place("v1-1"))
    with pytest.raises(BundleExistsError, match="--force"):
        build("v1-1")


def start_build(checkpoint: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "sdrt", "build", "--ckpt", str(checkpoint), "--name", "it"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_rivals_are_refused_and_a_killed_or_interrupted_build_leaves_nothing(
    tiny_checkpoint: Path, own_home: Path
) -> None:
    scratch = own_home / "bundles" / ".it.sdrt-building"
    first = start_build(tiny_checkpoint)
    deadline = time.monotonic() + 120
    while not scratch.exists():
        assert first.poll() is None, first.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    second = start_build(tiny_checkpoint)
    _, err = second.communicate(timeout=120)
    assert second.returncode == 1
    assert str(first.pid) in err
    assert err.count("\n") == 1 or err.splitlines()[-1].startswith("sdrt: ")
    first.kill()
    first.wait()
    assert scratch.exists()
    assert store.list_bundles() == []
    left = (scratch / "text_encoder.onnx").exists() and (scratch / "text_encoder.onnx").stat().st_mtime_ns
    third = start_build(tiny_checkpoint)
    # What the killed one left is cleaned first; the graph that counts is the third one's own.
    while not (scratch / "text_encoder.onnx").exists() or (scratch / "text_encoder.onnx").stat().st_mtime_ns == left:
        assert third.poll() is None, third.communicate()
        time.sleep(0.05)
    third.send_signal(signal.SIGINT)
    _, err = third.communicate(timeout=60)
    assert third.returncode == 130
    assert err.splitlines()[-1] == "sdrt: interrupted"
    assert not scratch.exists()
    assert store.list_bundles() == []


def test_inspect_reads_the_manifest_without_torch(tiny_bundle: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None; from sdrt.cli import main; "
        f"sys.exit(main(['inspect', '--json', {str(tiny_bundle)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["manifest"]["precision"] == "fp32"
