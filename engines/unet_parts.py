"""The U-Net in two halves, so that what the first one finds can be used again.

The encoder, the way down and the middle, gives features that change little from one step to the next; those of the
decoder, the way up, change more. Li et al. 2023 (Faster Diffusion, arXiv:2312.09608) therefore run the encoder in some
steps alone, and the decoder in every step, told its timestep and the text, on the features at hand.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .cut import Part, channels_of, copy_making, dtype_of, set_ends
from .manifest import MIDDLE, SKIP, DimRange, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx

# In an int8 graph whoever reads the latents may be given what they are after quantisation.
_SAME_SHAPE = {"Cast", "QuantizeLinear", "DequantizeLinear"}


def cut_unet(unet: onnx.ModelProto, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> tuple[Part, Part]:
    """Cut a U-Net into its encoder and its decoder.

    Parameters
    ----------
    unet
        A U-Net of this project's export, weights loaded or not; it is left as it is.
    inputs, outputs
        What it takes and gives.

    Returns
    -------
    tuple of Part
        The encoder, from all inputs to the features; and the decoder, from these and all inputs but the latents to
        the outputs.

    """
    latents, *told = inputs
    features = _features(unet, latents)
    dtype = dtype_of(unet, next(iter(features)))
    encoder = copy_making(unet, list(unet.graph.node), list(features))
    set_ends(encoder, inputs, {}, features, dtype)
    nodes = _measured_elsewhere(unet, latents.name, next(iter(features)))
    decoder = copy_making(
        unet, [node for node in nodes if features.keys().isdisjoint(node.output)], [spec.name for spec in outputs]
    )
    taken = (*told, *features.values())
    set_ends(decoder, taken, features, {spec.name: spec for spec in outputs}, dtype)
    return (
        Part("unet_encoder", encoder, tuple(inputs), tuple(features.values())),
        Part("unet_decoder", decoder, taken, tuple(outputs)),
    )


def _features(unet: onnx.ModelProto, latents: TensorSpec) -> dict[str, TensorSpec]:
    """Find what crosses from the encoder to the decoder: skips, in the encoder's order, and the middle block's output.

    The decoder begins where the first skip, the encoder's last, is appended to what the middle block gives, and goes
    up a level with each upsampling.
    """
    levels = 2 ** sum(node.op_type == "Resize" for node in unet.graph.node)
    sources: list[tuple[str, int]] = []
    for node in unet.graph.node:
        if node.op_type == "Resize":
            levels //= 2
        elif node.op_type == "Concat" and node.attribute[0].i == 1:
            below, skip = node.input
            if not sources:
                middle = below, levels
            sources.append((skip, levels))
    named = [(SKIP.format(number), *source) for number, source in enumerate(reversed(sources))]
    batch, _, *sides = latents.shape
    return {
        source: TensorSpec(name, latents.dtype, (batch, channels_of(unet, source), *(_down(s, factor) for s in sides)))
        for name, source, factor in (*named, (MIDDLE, *middle))
    }


def _down(side: int | DimRange, factor: int) -> int | DimRange:
    """Give a side's length on a level of the U-Net."""
    if factor == 1:
        return side
    if isinstance(side, int):
        return -(-side // factor)
    return DimRange(f"{side.name}_{factor}", -(-side.min // factor), -(-side.max // factor))


def _measured_elsewhere(unet: onnx.ModelProto, latents: str, skip: str) -> list[onnx.NodeProto]:
    """Give the nodes of a U-Net, those that find the latents' batch and sides finding them by the first skip.

    That one is the first convolution's output, which has all but the channels in common with the latents.
    """
    import onnx  # noqa: PLC0415 - only a build makes graphs

    nodes = []
    of_that_shape = {latents}
    for node in unet.graph.node:
        if node.op_type in _SAME_SHAPE and node.input[0] in of_that_shape:
            of_that_shape.update(node.output)
        if node.op_type == "Shape" and node.input[0] in of_that_shape:
            found = onnx.NodeProto()
            found.CopyFrom(node)
            found.input[0] = skip
            nodes.append(found)
        else:
            nodes.append(node)
    return nodes
