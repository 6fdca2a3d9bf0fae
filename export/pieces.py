"""Pieces of a component in a bundle: their graphs, which read its weights where they are, and what is said of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx

from ..engines.attention import write_merged
from ..engines.bundle import hash_file, onnx_name
from ..engines.manifest import Component

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ..engines.cut import Part
    from ..engines.manifest import Parity, TracedPrecision


def write_parts(folder: Path, parts: Sequence[Part]) -> list[list[str]]:
    """Write the graphs of each part into a bundle's folder; give their names, the plain one before the merged one."""
    written = []
    for part in parts:
        onnx.save(part.model, folder / onnx_name(part.name))
        written.append(write_merged(folder, part.name))
    return written


def describe_parts(
    folder: Path, parts: Sequence[Part], written: Sequence[Sequence[str]], precision: TracedPrecision, parity: Parity
) -> tuple[Component, ...]:
    """Describe parts for the manifest, each with the parity that was measured of all together."""
    return tuple(
        Component(
            part.name, precision, tuple(hash_file(folder, graph) for graph in graphs), part.inputs, part.outputs, parity
        )
        for part, graphs in zip(parts, written, strict=True)
    )
