"""The U-Net's two halves in a bundle: cut, written, and compared with the original as they work together."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx

from ..engines.bundle import onnx_name
from ..engines.unet_parts import cut_unet
from .parity import measure_chains
from .pieces import describe_parts, write_parts

if TYPE_CHECKING:
    from pathlib import Path

    from ..engines.manifest import Component, TracedPrecision
    from .parity import Case
    from .trace import Signature


def unet_parts(
    folder: Path, signature: Signature, cases: list[Case], precision: TracedPrecision
) -> tuple[Component, ...]:
    """Cut the U-Net that is in a folder into encoder and decoder, which read its weights where they are.

    Parameters
    ----------
    folder
        Of the bundle that is being built.
    signature, cases
        Of the U-Net, and what the original makes of some latents.
    precision
        Of the graph.

    Raises
    ------
    ExportError
        What the two make together strays from the original.

    """
    unet = onnx.load(folder / onnx_name("unet"), load_external_data=False)
    parts = cut_unet(unet, signature.inputs, signature.outputs)
    graphs = write_parts(folder, parts)
    # The plain graphs first, and then those with attention as one node.
    chains = [[folder / graph for graph in chain] for chain in zip(*graphs, strict=True)]
    measured = measure_chains("U-Net's encoder and decoder", chains, signature, cases, precision)
    return describe_parts(folder, parts, graphs, precision, measured)
