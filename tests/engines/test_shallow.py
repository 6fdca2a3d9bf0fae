"""The U-Net's outermost blocks: the same prediction from the deep features as from the whole, and no weights twice."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnxruntime
import pytest

from sdrt.engines.bundle import Bundle
from sdrt.engines.manifest import DEEP_FEATURES
from sdrt.engines.shallow import outer_blocks
from sdrt.engines.verified import verify_once
from sdrt.errors import BundleCorruptError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

PRECISIONS = ["tiny_bundle", "tiny_fp16_bundle"]


@pytest.fixture(params=PRECISIONS)
def built(request: pytest.FixtureRequest) -> Bundle:
    return Bundle.open(request.getfixturevalue(request.param))


def run(graph: Path, inputs: dict[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, map(np.asarray, session.run(names, inputs)), strict=True))


@pytest.mark.parametrize("graph", ["{}.onnx", "{}.merged.onnx"])
@pytest.mark.parametrize("size", [(2, 8, 8), (1, 13, 9), (3, 1, 5)])
def test_the_outer_blocks_on_the_deep_features_predict_what_the_whole_does(
    built: Bundle, graph: str, size: tuple[int, int, int]
) -> None:
    batch, height, width = size
    rng = np.random.default_rng(0)
    inputs = {
        "latents": rng.standard_normal((batch, 4, height, width), np.float32),
        "timestep": np.array([321.5], np.float32),
        "text_embeddings": rng.standard_normal((batch, 77, built.manifest.text.embedding_width), np.float32),
    }
    whole = run(built.folder / graph.format("unet"), inputs)
    assert set(whole) == {"prediction", DEEP_FEATURES}
    (spec,) = (tensor for tensor in built.component("unet").outputs if tensor.name == DEEP_FEATURES)
    assert whole[DEEP_FEATURES].shape == (batch, spec.shape[1], height, width)
    shallow = built.folder / graph.format("unet_shallow")
    found = run(shallow, inputs | {DEEP_FEATURES: whole[DEEP_FEATURES]})["prediction"]
    peak = np.abs(whole["prediction"]).max()
    np.testing.assert_allclose(found, whole["prediction"], atol=1e-5 * peak)
    # And it is the features that it goes by.
    other = run(shallow, inputs | {DEEP_FEATURES: -whole[DEEP_FEATURES]})["prediction"]
    assert np.abs(other - found).max() > 1e-2 * peak


def test_the_outer_blocks_have_no_weights_of_their_own(built: Bundle) -> None:
    shallow, unet = built.component("unet_shallow"), built.component("unet")
    assert [entry.path for entry in shallow.files] == ["unet_shallow.onnx", "unet_shallow.merged.onnx"]
    weights = {
        name: {
            tensor.name: [(entry.key, entry.value) for entry in tensor.external_data]
            for tensor in onnx.load(built.folder / name, load_external_data=False).graph.initializer
            if tensor.external_data
        }
        for name in ("unet.onnx", "unet_shallow.onnx")
    }
    assert weights["unet_shallow.onnx"].items() < weights["unet.onnx"].items()
    assert {dict(place)["location"] for place in weights["unet_shallow.onnx"].values()} == {unet.files[1].path}
    nodes = [len(onnx.load(built.folder / f"{name}.onnx").graph.node) for name in ("unet_shallow", "unet")]
    assert nodes[0] < nodes[1] / 5
    assert shallow.parity is not None
    assert shallow.parity.relative_l2 < shallow.parity.threshold


def test_the_whole_is_left_as_it_is(built: Bundle) -> None:
    model = onnx.load(built.folder / "unet.onnx", load_external_data=False)
    before = model.SerializeToString()
    outer_blocks(model)
    assert model.SerializeToString() == before


def test_altered_weights_are_found_before_the_outer_blocks_read_them(built: Bundle, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(built.folder, copy)
    verify_once(Bundle.open(copy), "unet_shallow")
    with (copy / "unet.onnx.data").open("r+b") as file:
        file.write(b"\0\1\2\3")
    with pytest.raises(BundleCorruptError, match=r"unet\.onnx\.data has SHA-256"):
        verify_once(Bundle.open(copy), "unet_shallow")
