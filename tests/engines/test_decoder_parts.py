"""The VAE decoder in parts: the same weights, and a manifest that says how they go together."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import onnx
import pytest

from sdrt.engines.bundle import Bundle
from sdrt.engines.decoder_parts import cut_decoder
from sdrt.engines.manifest import DECODER_HEAD
from sdrt.engines.manifest_parser import parse_manifest
from sdrt.errors import BundleCorruptError

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(params=["tiny_bundle", "tiny_fp16_bundle"])
def built(request: pytest.FixtureRequest) -> Bundle:
    return Bundle.open(request.getfixturevalue(request.param))


def weights(graph: Path) -> dict[str, list[tuple[str, str]]]:
    return {
        tensor.name: [(entry.key, entry.value) for entry in tensor.external_data]
        for tensor in onnx.load(graph, load_external_data=False).graph.initializer
        if tensor.external_data
    }


def test_the_parts_share_the_decoders_weights_and_need_all_of_them(built: Bundle) -> None:
    whole = weights(built.folder / "vae_decoder.onnx")
    parts: dict[str, list[tuple[str, str]]] = {}
    for component in (built.component(DECODER_HEAD), *built.manifest.decoder_stages):
        assert all(entry.path.endswith(".onnx") for entry in component.files)
        parts |= weights(built.path(component.graph))
    assert parts == whole


def test_each_convolution_is_in_one_part(built: Bundle) -> None:
    def convolutions(graph: Path) -> list[str]:
        return [
            node.input[1] for node in onnx.load(graph, load_external_data=False).graph.node if node.op_type == "Conv"
        ]

    parts = (built.component(DECODER_HEAD), *built.manifest.decoder_stages)
    found = [name for component in parts for name in convolutions(built.path(component.graph))]
    assert sorted(found) == sorted(convolutions(built.folder / "vae_decoder.onnx"))


def test_the_decoder_is_left_as_it_is(built: Bundle) -> None:
    model = onnx.load(built.folder / "vae_decoder.onnx", load_external_data=False)
    before = model.SerializeToString()
    decoder = built.component("vae_decoder")
    cut_decoder(model, decoder.inputs[0], decoder.outputs[0])
    assert model.SerializeToString() == before


def without(name: str, components: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [component for component in components if component["name"] != name]


def test_parts_that_do_not_go_together_are_refused(tiny_bundle: Path) -> None:
    text = (tiny_bundle / "bundle.json").read_text(encoding="ascii")
    components = json.loads(text)["components"]

    def parse(changed: list[dict[str, Any]]) -> None:
        parse_manifest(json.dumps(json.loads(text) | {"components": changed}))

    parse(components)
    parse([component for component in components if "decoder_" not in component["name"]])
    with pytest.raises(BundleCorruptError, match="has vae_decoder_stage_1 in the place of vae_decoder_head"):
        parse(without(DECODER_HEAD, components))
    with pytest.raises(BundleCorruptError, match="has vae_decoder_stage_4 in the place of vae_decoder_stage_3"):
        parse(without("vae_decoder_stage_3", components))
    with pytest.raises(BundleCorruptError, match="and none gives 'image'"):
        parse(components[:-1])
    swapped = [*components[:-2], components[-1], components[-2]]
    with pytest.raises(BundleCorruptError, match="in the place of vae_decoder_stage_13"):
        parse(swapped)
    early = json.loads(json.dumps(components))
    (stage,) = (component for component in early if component["name"] == "vae_decoder_stage_2")
    stage["inputs"][0]["name"] = "hidden_9"
    with pytest.raises(BundleCorruptError, match='vae_decoder_stage_2, which takes "hidden_9", and no part before it'):
        parse(early)
    with pytest.raises(BundleCorruptError, match=r"name is .*vae_decoder_stage_0.*, expected one of"):
        parse([*components, components[-1] | {"name": "vae_decoder_stage_0"}])
