"""Bundles as tables for people and as dictionaries for programs."""

from __future__ import annotations

import json
import math
import shlex
from typing import TYPE_CHECKING, Any

from .engines.devices import nvidia_gpus
from .engines.fusion_table import reports_of
from .engines.manifest import UNET_HALVES, is_decoder_part
from .engines.table import columns
from .engines.targets import describe, sm_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from .engines.bundle import Bundle
    from .engines.manifest import Component, DimRange, InputRange, Manifest, TensorSpec
    from .engines.store import Listing


def bundle_facts(bundle: Bundle) -> dict[str, Any]:
    """Give the manifest with the bundle's place and size."""
    return {"name": bundle.name, "path": str(bundle.folder), "bytes": bundle.size} | {
        "manifest": json.loads(bundle.manifest.to_json())
    }


def layer_facts(bundle: Bundle) -> dict[str, Any]:
    """Give the layers of each engine, and what of its network is fused, as the bundle keeps them.

    Raises
    ------
    InputError, BundleCorruptError
        As `.engines.fusion_table.reports_of`.

    """
    return {"layers": {name: json.loads(report.to_json()) for name, report in reports_of(bundle).items()}}


def build_facts(bundles: Sequence[Bundle]) -> dict[str, Any]:
    """Give the bundle that was asked for, and where the others are that were built with it."""
    first, *others = bundles
    also = [{"name": bundle.name, "path": str(bundle.folder), "bytes": bundle.size} for bundle in others]
    return bundle_facts(first) | {"also_built": also}


def built(bundles: Sequence[Bundle], output: Path | None) -> str:
    """Tell what was built and what can be done with it, in a line for each bundle."""
    first, *others = bundles
    argument = f" --bundle {shlex.quote(str(output))}" if output else ""
    run = f'sdrt run "Great Wall photo"{argument}'
    return "\n".join([_built(first, run), *(_built(bundle, None) for bundle in others)])


def _built(bundle: Bundle, run: str | None) -> str:
    manifest = bundle.manifest
    here = f"built {bundle.folder} ({_size(bundle.size)}): "
    if manifest.kind == "onnx":
        return here + (run or f"graphs for engines for other GPUs: sdrt build --from {bundle.name} --target NAME")
    capabilities = manifest.backend.compute_capabilities
    if run and not {gpu.compute_capability for gpu in nvidia_gpus()}.isdisjoint(capabilities):
        return here + run
    return f"{here}engines for {', '.join(map(describe, capabilities))}: copy them to a machine with such a GPU"


def list_table(listings: Iterable[Listing]) -> str:
    """Lay out the store, a line for each bundle."""
    rows = [("NAME", "KIND", "PRECISION", "FOR", "SIZE", "BUILT", "FROM")]
    notes = []
    for listing in listings:
        if listing.bundle is None:
            rows.append((listing.name, "broken", "", "", "", "", ""))
            notes.append(listing.problem or "")
            continue
        manifest = listing.bundle.manifest
        rows.append(
            (
                listing.name,
                manifest.backend.name,
                manifest.precision,
                _purpose(manifest),
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
        ("backend", _backend(manifest)),
        ("targets", ", ".join(map(describe, backend.compute_capabilities)) or "any"),
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
        if _stands_alone(component)
    ]
    parts += _cut("unet", [each for each in manifest.components if each.name in UNET_HALVES])
    parts += _cut("vae_decoder", [each for each in manifest.components if is_decoder_part(each.name)])
    profiles = [("COMPONENT", "PROFILE", "INPUTS")]
    profiles += [
        (component.name, str(index), ", ".join(f"{name} {_range(each)}" for name, each in profile.items()))
        for component in manifest.components
        for index, profile in enumerate(component.profiles)
    ]
    tables = [columns(facts), columns(parts), *([columns(profiles)] if len(profiles) > 1 else [])]
    return "\n\n".join(tables)


def _stands_alone(component: Component) -> bool:
    return component.name not in UNET_HALVES and not is_decoder_part(component.name)


def _cut(whole: str, parts: Sequence[Component]) -> list[tuple[str, str, str, str, str]]:
    """Lay out the parts of a component as one: they are of no use but together."""
    if not parts:
        return []
    size = _size(sum(entry.bytes for part in parts for entry in part.files))
    first, last = parts[0], parts[-1]
    return [(f"{whole} in {len(parts)} parts", size, _tensors(first.inputs), _tensors(last.outputs), _parity(last))]


def _backend(manifest: Manifest) -> str:
    backend = manifest.backend
    if manifest.kind == "engine":
        return f"{backend.name} {backend.version}, {backend.platform or 'any platform'}"
    return f"{backend.name} opset {backend.opset}"


def _purpose(manifest: Manifest) -> str:
    """Name the GPUs and the image sizes of an engine bundle; graphs are for any."""
    if manifest.kind == "onnx":
        return "any"
    unet = next(component for component in manifest.components if component.name == "unet")
    sizes = dict.fromkeys(_pixels(profile, manifest.latent.scale_factor) for profile in unet.profiles)
    return f"{', '.join(map(sm_name, manifest.backend.compute_capabilities))} at {', '.join(sizes)}"


def _pixels(profile: Mapping[str, InputRange], factor: int) -> str:
    latents = profile["latents"]
    least, most = (f"{shape[3] * factor}x{shape[2] * factor}" for shape in (latents.min, latents.max))
    return least if least == most else f"{least} to {most}"


def _range(shapes: InputRange) -> str:
    sides = zip(shapes.min, shapes.max, strict=True)
    return "x".join(str(least) if least == most else f"{least}..{most}" for least, most in sides)


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
