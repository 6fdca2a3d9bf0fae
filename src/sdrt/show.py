"""Bundles as tables for people and as dictionaries for programs."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from .engines.bundle import Bundle
    from .engines.manifest import Component, DimRange, TensorSpec
    from .engines.store import Listing


def bundle_facts(bundle: Bundle) -> dict[str, Any]:
    """Give the manifest with the bundle's place and size."""
    return {"name": bundle.name, "path": str(bundle.folder), "bytes": bundle.size} | {
        "manifest": json.loads(bundle.manifest.to_json())
    }


def list_table(listings: Iterable[Listing]) -> str:
    """Lay out the store, a line for each bundle."""
    rows = [("NAME", "KIND", "PRECISION", "SIZE", "BUILT", "FROM")]
    notes = []
    for listing in listings:
        if listing.bundle is None:
            rows.append((listing.name, "broken", "", "", "", ""))
            notes.append(listing.problem or "")
            continue
        manifest = listing.bundle.manifest
        rows.append(
            (
                listing.name,
                manifest.backend.name,
                manifest.precision,
                _size(listing.bundle.size),
                manifest.created[:16].replace("T", " "),
                manifest.model.source,
            )
        )
    return "\n".join([columns(rows), *notes])


def bundle_table(bundle: Bundle) -> str:
    """Lay out one bundle: what it is, and each component with its inputs, outputs and measured parity."""
    manifest = bundle.manifest
    model, backend, text, latent = manifest.model, manifest.backend, manifest.text, manifest.latent
    facts = [
        ("bundle", bundle.name),
        ("folder", str(bundle.folder)),
        ("size", f"{_size(bundle.size)} in {len(manifest.files)} files"),
        ("model", f"{model.family} from {model.source} ({model.form}{', averaged weights' if model.ema else ''})"),
        ("precision", manifest.precision),
        (
            "backend",
            " ".join(
                filter(None, [backend.name, f"opset {backend.opset}" if backend.opset else None, backend.platform])
            ),
        ),
        ("prediction", str(manifest.scheduler["prediction_type"])),
        (
            "betas",
            "{beta_schedule} {beta_start} to {beta_end}, {num_train_timesteps} steps".format_map(manifest.scheduler),
        ),
        ("latents", f"{latent.channels} channels, 1/{latent.scale_factor} size, factor {latent.scaling_factor}"),
        (
            "text",
            f"{text.max_tokens} tokens x {text.embedding_width}, {text.layers} layers, clip skip {text.clip_skip}",
        ),
        ("built", f"{manifest.created} by sdrt {manifest.sdrt_version}"),
        ("command", manifest.command),
        ("tools", ", ".join(f"{tool} {version}" for tool, version in manifest.tools.items())),
    ]
    parts = [("COMPONENT", "SIZE", "INPUTS", "OUTPUTS", "PARITY")]
    parts += [
        (
            component.name,
            _size(sum(entry.bytes for entry in component.files)),
            _tensors(component.inputs),
            _tensors(component.outputs),
            _parity(component),
        )
        for component in manifest.components
    ]
    return f"{columns(facts)}\n\n{columns(parts)}"


def _tensors(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(f"{spec.name} {'x'.join(map(_dim, spec.shape))}" for spec in specs)


def _dim(dim: int | DimRange) -> str:
    return str(dim) if isinstance(dim, int) else dim.name


def _parity(component: Component) -> str:
    parity = component.parity
    if parity is None:
        return "not measured"
    psnr = "exact" if math.isinf(parity.psnr) else f"{parity.psnr:.1f} dB"
    return f"{parity.relative_l2:.1e} relative, {parity.max_abs:.1e} at most, {psnr}"


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def columns(rows: Sequence[tuple[str, ...]]) -> str:
    """Align rows of cells, two spaces apart."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
