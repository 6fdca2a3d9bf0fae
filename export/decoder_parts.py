"""The VAE decoder's parts in a bundle: cut, written, and compared with the original as they work together."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnxruntime

from ..engines.bundle import onnx_name
from ..engines.decoder_parts import cut_decoder
from ..engines.manifest import MEAN, VARIANCE
from .parity import judge
from .pieces import describe_parts, write_parts

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from ..engines.cut import Part
    from ..engines.manifest import Component, TracedPrecision
    from .parity import Case
    from .trace import Signature


def decoder_parts(
    folder: Path, signature: Signature, cases: Sequence[Case], precision: TracedPrecision
) -> tuple[Component, ...]:
    """Cut the decoder that is in a folder into parts, which read its weights where they are.

    Parameters
    ----------
    folder
        Of the bundle that is being built.
    signature, cases
        Of the decoder, and what the original makes of some latents.
    precision
        Of the graph.

    Raises
    ------
    ExportError
        What the parts make together strays from the original.

    """
    decoder = onnx.load(folder / onnx_name("vae_decoder"), load_external_data=False)
    parts = cut_decoder(decoder, signature.inputs[0], signature.outputs[0])
    graphs = write_parts(folder, parts)
    measured = judge("VAE decoder's tiling", _results(folder, parts, cases), precision)
    return describe_parts(folder, parts, graphs, precision, measured)


def _results(
    folder: Path, parts: Sequence[Part], cases: Sequence[Case]
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Give the images that the parts make together, each over the whole picture, and those that they should make."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    graphs = [folder / onnx_name(part.name) for part in parts]
    sessions = [onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"]) for graph in graphs]
    for case in cases:
        for latents, expected in zip(case.inputs[0], case.outputs[0], strict=True):
            values = {parts[0].inputs[0].name: latents.numpy()[None]}
            for part, session in zip(parts, sessions, strict=True):
                given = {spec.name: values[spec.name] for spec in part.inputs if spec.name in values}
                groups = next((spec.shape for spec in part.inputs if spec.name == MEAN), None)
                if groups is not None:
                    normalised = next(iter(given.values())).reshape(*groups, -1).astype(np.float64)
                    given |= {MEAN: np.float32(normalised.mean(1)), VARIANCE: np.float32(normalised.var(1))}
                (values[part.outputs[0].name],) = session.run(None, given)
            yield values[parts[-1].outputs[0].name][0], expected.numpy()
