"""Fusion reports as tables for people: what `sdrt inspect --layers` prints."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, get_args

from .fusion import FusionReport, PatternKind, load

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from .bundle import Bundle


def table(bundle: Bundle) -> str:
    """Lay out for people what became of each network of an engine bundle, layer by layer.

    Parameters
    ----------
    bundle
        An engine bundle.

    Returns
    -------
    str
        For each component and profile how many layers there are and what is fused, then all that is not fused, then
        every layer.

    """
    reports = [(part.name, report) for part in bundle.manifest.components if (report := load(bundle, part.name))]
    if not reports:
        return f"{bundle.name} has no list of layers: it holds ONNX graphs, engines have one"
    return "\n\n".join([summary(reports), *(_listing(name, report) for name, report in reports)])


def summary(reports: Iterable[tuple[str, FusionReport]]) -> str:
    """Lay out a line for each component and profile, then what is not fused."""
    reports = list(reports)
    kinds: tuple[PatternKind, ...] = get_args(PatternKind)
    rows = [("COMPONENT", "PROFILE", "LAYERS", "COPIES", "TRAFFIC", *(kind.upper() for kind in kinds))]
    for name, report in reports:
        for profile in report.profiles:
            layers = [layer for layer in report.layers if layer.profile == profile]
            counts = [report.count(kind, profile) for kind in kinds]
            rows.append(
                (
                    name,
                    str(profile),
                    str(len(layers)),
                    str(sum(layer.moves_only for layer in layers)),
                    f"{sum(layer.traffic for layer in layers) / 1e6:.0f} MB",
                    *(f"{fused} of {total} fused" if total else "" for fused, total in counts),
                )
            )
    missed = [
        f"not fused: {pattern.kind} before {pattern.where} in {name}, profile {pattern.profile}: "
        f"{len(pattern.layers)} layers"
        for name, report in reports
        for pattern in report.patterns
        if not pattern.fused
    ]
    return "\n".join([_columns(rows), *missed])


def _listing(name: str, report: FusionReport) -> str:
    kinds = Counter(layer.kind for layer in report.layers)
    rows = [(name.upper(), "KIND", "READS", "WRITES", "ONNX NODES")]
    rows += [
        (
            layer.name,
            layer.kind,
            ", ".join(map(str, layer.inputs)),
            ", ".join(map(str, layer.outputs)),
            " ".join(layer.nodes),
        )
        for layer in report.layers
    ]
    total = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    return f"{_columns(rows)}\n{name}: {total}"


def _columns(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [min(60, max(map(len, column))) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
