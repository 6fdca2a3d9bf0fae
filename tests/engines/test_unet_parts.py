"""The U-Net's halves: together what the whole does, and no weights twice."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime
import pytest

from sdrt.engines.bundle import Bundle
from sdrt.engines.manifest import DEEP_FEATURES, UNET_HALVES, DimRange
from sdrt.engines.unet_parts import cut_unet

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

Values = dict[str, "NDArray[np.float32]"]


@pytest.fixture(params=["tiny_bundle", "tiny_fp16_bundle"])
def built(request: pytest.FixtureRequest) -> Bundle:
    return Bundle.open(request.getfixturevalue(request.param))


def drawn(bundle: Bundle, batch: int, height: int, width: int) -> Values:
    rng = np.random.default_rng(0)
    return {
        "latents": rng.standard_normal((batch, 4, height, width), np.float32),
        "timestep": np.array([321.5], np.float32),
        "text_embeddings": rng.standard_normal((batch, 77, bundle.manifest.text.embedding_width), np.float32),
    }


def in_onnxruntime(graph: Path, known: Values) -> Values:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    told = {each.name: known[each.name] for each in session.get_inputs()}
    return dict(zip(names, map(np.asarray, session.run(names, told)), strict=True))


def in_openvino(graph: Path, known: Values) -> Values:
    openvino = pytest.importorskip("openvino")
    compiled = openvino.Core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    ends = onnx.load(graph, load_external_data=False).graph  # OpenVINO has further names for them
    found = compiled({each.name: known[each.name] for each in ends.input})
    return {each.name: found[each.name].copy() for each in ends.output}


@pytest.mark.parametrize(
    ("run", "graph"), [(in_onnxruntime, "{}.onnx"), (in_onnxruntime, "{}.merged.onnx"), (in_openvino, "{}.onnx")]
)
@pytest.mark.parametrize("size", [(2, 8, 8), (1, 13, 9), (3, 1, 5)])
def test_the_halves_make_together_what_the_whole_does(
    built: Bundle, run: Any, graph: str, size: tuple[int, int, int]
) -> None:
    known = drawn(built, *size)
    whole = run(built.folder / graph.format("unet"), known)
    assert set(whole) == {"prediction", DEEP_FEATURES}
    encoder, decoder = (built.folder / graph.format(name) for name in UNET_HALVES)
    features = run(encoder, known)
    found = run(decoder, known | features)
    # The text is noise, on which networks magnify every rounding.
    tolerance = 2e-4 if built.manifest.precision == "fp32" or run is in_onnxruntime else 1e-2
    for name, expected in whole.items():
        np.testing.assert_allclose(found[name], expected, atol=tolerance * np.abs(expected).max())
    # And every feature counts, and the present timestep does.
    for name in (*features, "timestep"):
        other = run(decoder, known | features | {name: known.get(name, features.get(name)) / 2})["prediction"]
        assert np.abs(other - found["prediction"]).max() > 1e-5 * np.abs(other).max(), name


def test_features_have_the_sizes_that_the_manifest_tells(built: Bundle) -> None:
    encoder, decoder = (built.component(name) for name in UNET_HALVES)
    assert decoder.inputs[2:] == encoder.outputs
    assert [spec.name for spec in encoder.outputs] == [*(f"skip_{number}" for number in range(12)), "middle"]
    batch, height, width = 2, 13, 9
    sizes = {"batch": batch} | {
        f"{name}_{factor}" if factor > 1 else name: -(-side // factor)
        for (name, side), factor in itertools.product((("height", height), ("width", width)), (1, 2, 4, 8))
    }
    features = in_onnxruntime(built.path(encoder.graph), drawn(built, batch, height, width))
    for spec in encoder.outputs:
        expected = tuple(sizes[dim.name] if isinstance(dim, DimRange) else dim for dim in spec.shape)
        assert features[spec.name].shape == expected
        assert features[spec.name].dtype == np.float32


def test_the_halves_have_no_weights_of_their_own(built: Bundle) -> None:
    unet = built.component("unet")

    def weights(name: str) -> dict[str, dict[str, str]]:
        return {
            tensor.name: {entry.key: entry.value for entry in tensor.external_data}
            for tensor in onnx.load(built.folder / f"{name}.onnx", load_external_data=False).graph.initializer
            if tensor.external_data
        }

    whole, encoder, decoder = (weights(name) for name in ("unet", *UNET_HALVES))
    assert encoder | decoder == whole
    assert {place["location"] for place in whole.values()} == {unet.files[1].path}
    # Both know the time; convolutions and attention are in one of them alone.
    assert all("time_emb" in name for name in encoder.keys() & decoder.keys())
    for name in UNET_HALVES:
        half = built.component(name)
        assert [entry.path for entry in half.files] == [f"{name}.onnx", f"{name}.merged.onnx"]
        assert half.parity is not None
        assert half.parity.relative_l2 < half.parity.threshold


def test_the_whole_is_left_as_it_is(built: Bundle) -> None:
    model = onnx.load(built.folder / "unet.onnx", load_external_data=False)
    before = model.SerializeToString()
    unet = built.component("unet")
    cut_unet(model, unet.inputs, unet.outputs)
    assert model.SerializeToString() == before
