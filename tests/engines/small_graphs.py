"""An ONNX bundle whose networks have the inputs and outputs of Stable Diffusion v1 and next to nothing in between.

TensorRT builds its engines in a second, so that what is around the builder can be tested with the builder itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from sdrt.engines.bundle import TOKENIZER, hash_file, onnx_data_name, onnx_name, write_manifest
from sdrt.engines.manifest import Backend, Component, DimRange, Latent, Manifest, Model, TensorSpec, Text, utc_now

if TYPE_CHECKING:
    from pathlib import Path

    from sdrt.engines.manifest import Precision

WIDTH = 8
_TYPES = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}
_BATCH, _HEIGHT, _WIDTH = DimRange("batch", 1, 64), DimRange("height", 1, 512), DimRange("width", 1, 512)
_LATENT = (_BATCH, 4, _HEIGHT, _WIDTH)
_IMAGE = (_BATCH, 3, DimRange("image_height", 8, 4096, 8), DimRange("image_width", 8, 4096, 8))
_IDS, _SKIP = TensorSpec("input_ids", "int64", (_BATCH, 77)), TensorSpec("clip_skip", "int64", (1,))
_TEXT = TensorSpec("text_embeddings", "float32", (_BATCH, 77, WIDTH))
_LATENTS, _TIME = TensorSpec("latents", "float32", _LATENT), TensorSpec("timestep", "float32", (1,))
_PREDICTION, _PICTURE = TensorSpec("prediction", "float32", _LATENT), TensorSpec("image", "float32", _IMAGE)
_MEAN, _DEVIATION = TensorSpec("mean", "float32", _LATENT), TensorSpec("deviation", "float32", _LATENT)


class _Network(NamedTuple):
    """Nodes as operator, inputs, outputs and attributes; weights as the shape of a tensor, or a list of integers."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    nodes: list[tuple[str, list[str], list[str], dict[str, Any]]]
    weights: dict[str, tuple[int, ...] | list[int]]


_NETWORKS = {
    "text_encoder": _Network(
        (_IDS, _SKIP),
        (_TEXT,),
        [
            ("Gather", ["table", "input_ids"], ["rows"], {}),
            ("Cast", ["clip_skip"], ["skip"], {"to": "own"}),
            ("Add", ["rows", "skip"], ["sum"], {}),
            ("Cast", ["sum"], ["text_embeddings"], {"to": "float32"}),
        ],
        {"table": (49408, WIDTH)},
    ),
    "unet": _Network(
        (_LATENTS, _TIME, _TEXT),
        (_PREDICTION,),
        [
            ("Cast", ["latents"], ["x"], {"to": "own"}),
            ("Conv", ["x", "kernel"], ["seen"], {"pads": [1, 1, 1, 1]}),
            ("Cast", ["seen"], ["wide"], {"to": "float32"}),
            ("ReduceMean", ["text_embeddings", "axes"], ["mean"], {"keepdims": 1}),
            ("Unsqueeze", ["mean", "axis"], ["told"], {}),
            ("Add", ["wide", "told"], ["both"], {}),
            ("Mul", ["both", "timestep"], ["prediction"], {}),
        ],
        {"kernel": (4, 4, 3, 3), "axes": [1, 2], "axis": [3]},
    ),
    "vae_decoder": _Network(
        (_LATENTS,),
        (_PICTURE,),
        [
            ("Cast", ["latents"], ["x"], {"to": "own"}),
            ("ConvTranspose", ["x", "kernel"], ["seen"], {"strides": [8, 8]}),
            ("Cast", ["seen"], ["image"], {"to": "float32"}),
        ],
        {"kernel": (4, 3, 8, 8)},
    ),
    "vae_encoder": _Network(
        (_PICTURE,),
        (_MEAN, _DEVIATION),
        [
            ("Cast", ["image"], ["x"], {"to": "own"}),
            ("Conv", ["x", "kernel"], ["seen"], {"strides": [8, 8]}),
            ("Cast", ["seen"], ["mean"], {"to": "float32"}),
            ("Exp", ["mean"], ["deviation"], {}),
        ],
        {"kernel": (4, 3, 8, 8)},
    ),
}


def fill(folder: Path, precision: Precision = "fp16", *, name: str = "small", source: str = "small") -> Manifest:
    """Write the bundle into an empty folder."""
    (folder / TOKENIZER).write_bytes(b"{}")
    components = []
    for part, (inputs, outputs, nodes, weights) in _NETWORKS.items():
        own = {"fp16": TensorProto.FLOAT16, "fp32": TensorProto.FLOAT}[precision]
        types = {"own": own, **_TYPES}
        graph = helper.make_graph(
            [
                helper.make_node(
                    op, takes, gives, **{key: types.get(str(value), value) for key, value in given.items()}
                )
                for op, takes, gives, given in nodes
            ],
            part,
            [_value(spec) for spec in inputs],
            [_value(spec) for spec in outputs],
            [_weight(key, shape, precision) for key, shape in weights.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        data = onnx_data_name(part)
        onnx.save(model, folder / onnx_name(part), save_as_external_data=True, location=data, size_threshold=0)
        files = tuple(hash_file(folder, path) for path in (onnx_name(part), data))
        components.append(Component(part, precision, files, inputs, outputs, None))
    manifest = Manifest(
        name=name,
        kind="onnx",
        precision=precision,
        created=utc_now(),
        command="",
        sdrt_version="0.1.0",
        model=Model("sd-v1", source, "diffusers", ema=False),
        backend=Backend("onnx", "1.23.0", opset=20),
        latent=Latent(),
        text=Text(embedding_width=WIDTH, layers=2),
        scheduler={
            "num_train_timesteps": 1000,
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "prediction_type": "epsilon",
        },
        components=tuple(components),
        tokenizer=hash_file(folder, TOKENIZER),
        tools={"onnx": onnx.__version__},
    )
    write_manifest(folder, manifest)
    return manifest


def _value(spec: TensorSpec) -> onnx.ValueInfoProto:
    shape = [dim if isinstance(dim, int) else dim.name for dim in spec.shape]
    return helper.make_tensor_value_info(spec.name, _TYPES[spec.dtype], shape)


def _weight(name: str, shape: tuple[int, ...] | list[int], precision: Precision) -> onnx.TensorProto:
    if isinstance(shape, list):
        return numpy_helper.from_array(np.array(shape, np.int64), name)
    dtype = np.float16 if precision == "fp16" else np.float32
    return numpy_helper.from_array(np.random.default_rng(0).standard_normal(shape).astype(dtype), name)
