"""Fusion reports as tables for people: what `sdrt inspect --layers` prints."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, get_args

from ..errors import InputError
from .fusion import FusionReport, PatternKind, load
from .table import columns

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .bundle import Bundle

# Names of generated kernels grow with what is fused into them.
_WIDEST = 60


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

    Raises
    ------
    InputError, BundleCorruptError
        As `reports_of`.

    """
    reports = reports_of(bundle)
    return "\n\n".join([summary(reports.items()), *(_listing(name, report) for name, report in reports.items())])


def reports_of(bundle: Bundle) -> dict[str, FusionReport]:
    """Read the reports of all components of an engine bundle.

    Raises
    ------
    InputError
        The bundle has none, since it holds ONNX graphs.
    BundleCorruptError
        A file is not as sdrt writes it.

    """
    found = {part.name: report for part in bundle.manifest.components if (report := load(bundle, part.name))}
    if not found:
        raise InputError(
            f"{bundle.folder} has no list of layers, since it holds ONNX graphs: build engines of it with "
            f"sdrt build --from {bundle.name}"
        )
    return found


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
    return "\n".join([columns(rows), *missed])


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
    return f"{columns(rows, _WIDEST)}\n{name}: {total}"
