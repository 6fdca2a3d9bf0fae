"""Torch modules to ONNX graphs that hold for every batch and size."""

from __future__ import annotations

import contextlib
import logging
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import onnx_ir
import torch
from torch._dynamo.exc import UserError

from ..engines.manifest import DEEP_FEATURES, DimRange, TensorSpec
from ..errors import ExportError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor, nn

OPSET = 20
"""At 20 TensorRT-RTX fuses GEGLU and all attention; below, Gelu is spelled with Erf; above, the VAE does not build."""

_BATCH = DimRange("batch", 1, 64)
_HEIGHT = DimRange("height", 1, 512)
_WIDTH = DimRange("width", 1, 512)


def _pixels(side: DimRange) -> DimRange:
    return DimRange(f"image_{side.name}", 8 * side.min, 8 * side.max, multiple_of=8)


@dataclass(frozen=True)
class Signature:
    """The inputs and outputs of a component.

    Attributes
    ----------
    inputs, outputs
        Names, dtypes and dimensions, in the graph's order.
    tokens
        How many different tokens there are.

    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    tokens: int


def signatures(
    text_width: int, length: int, tokens: int, latent_channels: int, feature_channels: int = 320
) -> dict[str, Signature]:
    """Describe the components of a model with these widths; `feature_channels` is that of the U-Net's first level."""
    latent = (_BATCH, latent_channels, _HEIGHT, _WIDTH)
    image = (_BATCH, 3, _pixels(_HEIGHT), _pixels(_WIDTH))
    embeddings = TensorSpec("text_embeddings", "float32", (_BATCH, length, text_width))
    latents = TensorSpec("latents", "float32", latent)
    told = (latents, TensorSpec("timestep", "float32", (1,)), embeddings)
    prediction = TensorSpec("prediction", "float32", latent)
    features = TensorSpec(DEEP_FEATURES, "float32", (_BATCH, feature_channels, _HEIGHT, _WIDTH))
    return {
        "text_encoder": Signature(
            (TensorSpec("input_ids", "int64", (_BATCH, length)), TensorSpec("clip_skip", "int64", (1,))),
            (embeddings,),
            tokens,
        ),
        "unet": Signature(told, (prediction, features), tokens),
        "vae_decoder": Signature((latents,), (TensorSpec("image", "float32", image),), tokens),
        "vae_encoder": Signature(
            (TensorSpec("image", "float32", image),),
            (TensorSpec("mean", "float32", latent), TensorSpec("deviation", "float32", latent)),
            tokens,
        ),
        "unet_shallow": Signature((*told, features), (prediction,), tokens),
    }


def _torch_dims(inputs: tuple[TensorSpec, ...]) -> tuple[dict[int, Any], ...]:
    """Say the same dimensions in torch.export's terms.

    The tracer takes a side of 1 to be always 1, on the smallest level of the U-Net too; so the least side it is told
    is the least that stays above 1 there. The graph itself has no such bound.
    """
    unit = {"batch": torch.export.Dim("batch"), **{s: torch.export.Dim(s, min=9) for s in ("height", "width")}}

    def dim(wanted: DimRange) -> Any:
        if wanted.name.startswith("image_"):
            return wanted.multiple_of * unit[wanted.name.removeprefix("image_")]
        return unit[wanted.name]

    return tuple(
        {axis: dim(size) for axis, size in enumerate(spec.shape) if isinstance(size, DimRange)} for spec in inputs
    )


def trace(module: nn.Module, examples: tuple[Tensor, ...], signature: Signature, path: Path) -> None:
    """Write a module as an ONNX graph, its weights beside it in ``path`` with ``.data`` appended.

    Parameters
    ----------
    module
        One of `.modules`.
    examples
        Inputs to trace with, every dynamic side at least 9.
    signature
        Names and dimensions.
    path
        The ``.onnx`` file to write.

    Raises
    ------
    ExportError
        torch could not trace the module.

    """
    # The batch of an example must not be 1, which the tracer would take for a constant.
    with _quiet():
        try:
            program = torch.export.export(
                module,
                examples,
                dynamic_shapes=_torch_dims(signature.inputs),
                strict=False,
                prefer_deferred_runtime_asserts_over_guards=True,
            )
            exported = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                input_names=[spec.name for spec in signature.inputs],
                output_names=[spec.name for spec in signature.outputs],
                dynamic_shapes=_torch_dims(signature.inputs),
                verbose=False,
            )
        except (RuntimeError, torch.onnx.OnnxExporterError, UserError) as error:
            first = str(error).strip().splitlines()[0]
            raise ExportError(f"{type(module).__name__} could not be traced to ONNX: {first}") from error
        assert exported is not None
        _anonymise(exported.model)
        _name_dims(exported.model, signature)
        exported.save(path, external_data=True)


def _anonymise(model: Any) -> None:
    """Drop what the tracer writes about the machine (stack traces, paths), so that equal weights give equal files."""
    for graph in model.graphs():
        graph.metadata_props.clear()
        for node in graph:
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()
        for value in (*graph.inputs, *graph.initializers.values()):
            value.metadata_props.clear()
    model.metadata_props.clear()


def _name_dims(model: Any, signature: Signature) -> None:
    """Give the dimensions the names of the signature where the tracer left formulas."""
    values = (*model.graph.inputs, *model.graph.outputs)
    for value, spec in zip(values, signature.inputs + signature.outputs, strict=True):
        value.shape = onnx_ir.Shape([size if isinstance(size, int) else size.name for size in spec.shape])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's notes about itself off the terminal: what concerns a user becomes an error or a figure."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def examples(signature: Signature, sizes: dict[str, int], seed: int) -> tuple[Tensor, ...]:
    """Draw random inputs of a component.

    Parameters
    ----------
    signature
        What the component reads.
    sizes
        ``batch``, ``height`` and ``width``, the latter two in latent pixels.
    seed
        Of the generator.

    """
    generator = torch.Generator().manual_seed(seed)
    sizes = sizes | {f"image_{side}": 8 * sizes[side] for side in ("height", "width")}

    def draw(spec: TensorSpec) -> Tensor:
        shape = [size if isinstance(size, int) else sizes[size.name] for size in spec.shape]
        if spec.name == "input_ids":
            return torch.randint(signature.tokens, shape, generator=generator)
        if spec.name == "clip_skip":
            return torch.zeros(shape, dtype=torch.int64)
        if spec.name == "timestep":
            return torch.rand(shape, generator=generator) * 999
        if spec.name == "image":
            return torch.rand(shape, generator=generator) * 2 - 1
        return torch.randn(shape, generator=generator)

    return tuple(draw(spec) for spec in signature.inputs)
