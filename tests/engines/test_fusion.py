"""What TensorRT makes of the networks, read from the log of real builds.

The kernels are chosen by the widths of the network, so that the small model of the other tests says nothing: the
blocks here have the widths of Stable Diffusion v1.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from sdrt.engines import fusion
from sdrt.engines.fusion import BuildLog, FusionReport, Tensor
from sdrt.engines.fusion_table import summary
from sdrt.engines.manifest import InputRange

LOG = [
    "node_matmul [MatMul] inputs: [q -> (-1, 8, -1, 40)[HALF]], [k -> (-1, 8, 40, -1)[HALF]], ",
    "node_matmul [MatMul] outputs: [scores -> (-1, 8, -1, -1)[HALF]], ",
    "node_cast [Cast] inputs: [scores -> (-1, 8, -1, -1)[HALF]], ",
    "node_cast [Cast] outputs: [wide -> (-1, 8, -1, -1)[FLOAT]], ",
    "node_softmax [Softmax] inputs: [wide -> (-1, 8, -1, -1)[FLOAT]], ",
    "node_softmax [Softmax] outputs: [softmax -> (-1, 8, -1, -1)[FLOAT]], ",
    "node_matmul_1 [MatMul] inputs: [softmax -> (-1, 8, -1, -1)[FLOAT]], [v -> (-1, 8, -1, 40)[HALF]], ",
    "node_matmul_1 [MatMul] outputs: [mixed -> (-1, 8, -1, 40)[HALF]], ",
    "node_out [Add] inputs: [mixed -> (-1)[HALF]], [model.mid.attn1.to_out.0.bias -> (320)[HALF]], ",
    "Searching for input: softmax",
]


def line(
    name: str, kind: str, nodes: list[str], inputs: str = "{ Name: x, Dimensions: [2,64], Datatype: Half }"
) -> str:
    onnx = "".join(f"[ONNX Layer: {node}]" for node in nodes)
    output = "{ Name: y, Dimensions: [2,64], Strides: [64,1], StrideOrder: [1,0], Datatype: Float, Format: (Linear) }"
    constant = (
        "{ Name: c, Dimensions: [1], Strides: [1], StrideOrder: [0], Datatype: Float, Format: (Linear) Row major }"
    )
    return (
        f"Name: {name}, LayerType: {kind}, Inputs: [ {inputs}], Constants: [ {constant}, {constant}], "
        f"Outputs: [ {output}], TacticName: t, StreamId: 0, Metadata: {onnx}"
    )


def read(*layers: str) -> FusionReport:
    log = BuildLog()
    for message in [*LOG, "\n".join(["Layers:", *layers, "", "I/O Tensors:", " Name: latents, IOMode: Input"])]:
        log.feed(message)
    return log.report()


def test_an_attention_in_one_layer_is_fused() -> None:
    report = read(line("_gemm_mha_v2_myl0_5", "kgen", ["node_matmul", "node_cast", "node_softmax", "node_matmul_1"]))
    (pattern,) = report.patterns
    assert (pattern.kind, pattern.where, pattern.fused) == ("attention", "mid.attn1.to_out.0", True)
    (layer,) = report.layers
    assert (layer.inputs, layer.outputs) == ((Tensor("Half", (2, 64)),), (Tensor("Float", (2, 64)),))
    assert layer.traffic == 2 * 64 * (2 + 4)


def test_an_attention_in_three_layers_is_not() -> None:
    parts = [["node_matmul"], ["node_cast", "node_softmax"], ["node_matmul_1"]]
    report = read(*(line(f"part_myl0_{index}", "gemm", nodes) for index, nodes in enumerate(parts)))
    assert report.count("attention", 0) == (0, 1)
    assert "not fused: attention before mid.attn1.to_out.0 in unet, profile 0: 3 layers" in summary([("unet", report)])


def test_an_attention_with_a_layer_beside_it_is_not() -> None:
    whole = ["node_matmul", "node_cast", "node_softmax", "node_matmul_1"]
    beside = line("__myl_MoveConc_myl0_4", "kgen", ["node_matmul_1"])
    assert read(beside, line("_gemm_mha_v2_myl0_5", "kgen", whole)).count("attention", 0) == (0, 1)
    counter = line("__myl_Move_myl0_4", "kgen", ["node_matmul_1"], inputs="")
    assert read(counter, line("_gemm_mha_v2_myl0_5", "kgen", whole)).count("attention", 0) == (1, 1)


def test_an_attention_that_no_layer_names_is_not() -> None:
    assert read(line("other_myl0_0", "kgen", ["node_other"])).count("attention", 0) == (0, 1)


def test_profiles_are_told_apart() -> None:
    whole = ["node_matmul", "node_softmax", "node_matmul_1"]
    first, second = line("_gemm_mha_v2_myl0_5", "kgen", whole), line("softmax_myl1_3", "kgen", ["node_softmax"])
    report = read(first, second)
    assert report.profiles == (0, 1)
    assert [report.count("attention", profile) for profile in report.profiles] == [(1, 1), (0, 1)]


def test_a_report_survives_the_way_through_its_file() -> None:
    report = read(line("_gemm_mha_v2_myl0_5", "kgen", ["node_matmul", "node_softmax", "node_matmul_1"]))
    assert fusion._parse(json.loads(report.to_json())) == report


@pytest.mark.parametrize("broken", [{"name": "a\x1b[2J"}, {"name": 1}, {"inputs": ["half 2xy"]}, {"profile": None}])
def test_a_file_that_was_tampered_with_is_not_shown(broken: dict[str, Any]) -> None:
    document = json.loads(read(line("a_myl0_0", "kgen", [])).to_json())
    document["layers"][0] |= broken
    with pytest.raises((ValueError, TypeError)):
        fusion._parse(document)


@pytest.fixture(scope="module")
def block_report(tmp_path_factory: pytest.TempPathFactory) -> FusionReport:
    """Build an engine of a U-Net with the two upper levels of Stable Diffusion v1 in their real widths."""
    import torch
    from bench.checkpoints import configs
    from diffusers import UNet2DConditionModel

    from sdrt.engines.tensorrt import Builder
    from sdrt.export import modules
    from sdrt.export.parts import Part
    from sdrt.export.trace import examples, signatures, trace

    folder = tmp_path_factory.mktemp("blocks")
    config = configs("full")["unet"] | {
        "block_out_channels": [320, 640],
        "layers_per_block": 1,
        "down_block_types": ["CrossAttnDownBlock2D"] * 2,
        "up_block_types": ["CrossAttnUpBlock2D"] * 2,
    }
    torch.manual_seed(0)
    part = Part(config, UNet2DConditionModel.from_config(config).state_dict())
    signature = signatures(768, 77, 49408, 4)["unet"]
    sizes = {"batch": 2, "height": 24, "width": 20}
    with torch.inference_mode():
        module = modules.unet(part, torch.float16)
        trace(module, examples(signature, sizes, seed=0), signature, folder / "unet.onnx")
    shapes = {"latents": (2, 4, 64, 64), "timestep": (1,), "text_embeddings": (2, 77, 768)}
    profile = {name: InputRange(shape, shape, shape) for name, shape in shapes.items()}
    return Builder("tensorrt-rtx", ["8.6"]).build(folder / "unet.onnx", folder, "unet", [profile]).fusion


def test_attention_geglu_and_group_norm_of_the_real_widths_are_fused(block_report: FusionReport) -> None:
    # down 1 + 1, middle 1, up 2 + 2: each with self-attention, cross-attention and GEGLU
    assert block_report.count("attention", 0) == (14, 14)
    assert block_report.count("geglu", 0) == (7, 7)
    # two in each of the 8 residual blocks, one in each of the 7 transformers, one at the end
    assert block_report.count("group_norm", 0) == (24, 24)
    assert not [pattern for pattern in block_report.patterns if pattern.kind == "attention" and not pattern.fused]


def test_every_silu_rides_on_what_is_before_it(block_report: FusionReport) -> None:
    # two in each of the 8 residual blocks, one at the end; the timestep's two ride on matrix multiplications
    assert block_report.count("silu", 0) == (19, 19)


def test_fixed_shapes_leave_no_arithmetic_about_shapes(block_report: FusionReport) -> None:
    integers = [
        layer.name
        for layer in block_report.layers
        if layer.inputs and {tensor.dtype for tensor in (*layer.inputs, *layer.outputs)} <= {"Int32", "Int64", "Bool"}
    ]
    assert integers == []
    assert all(-1 not in tensor.shape for layer in block_report.layers for tensor in (*layer.inputs, *layer.outputs))
