"""From an fp32 ONNX bundle to one whose U-Net computes in int8, by post-training quantisation; no torch in sight.

NNCF sees what the layers read while the model denoises, and puts quantisers before them: Jacob et al. 2018
(arXiv:1712.05877), activations with a zero point, weights with a scale for each output channel. Layers that harm the
prediction most are found by measuring it and left in fp32, until its error is within a bound. Text encoder and
autoencoder, which together take less time than a single step, stay as they are.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from .._version import __version__
from ..errors import InputError, MissingDependencyError
from . import store
from .attention import write_merged
from .bundle import Bundle, hash_file, onnx_data_name, onnx_name, write_manifest
from .manifest import UNET_HALVES, Component, Parity, utc_now
from .post_training import QuantizedUnet, Samples
from .publish import publishing
from .quantizers import store_weights
from .shallow import outer_blocks
from .unet_parts import cut_unet
from .verified import verify_once

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import onnx

Report = Callable[[str, int, int], None]
"""Told what is being done, how many bytes of weights were gone through, and of how many."""

_PACKAGES = ("nncf", "onnx", "onnxruntime")
_UNET, _SHALLOW = "unet", "unet_shallow"


def check_source(source: Bundle) -> None:
    """Refuse what cannot be quantised, before any work is done.

    Raises
    ------
    InputError
        The bundle holds engines, or graphs of another precision than fp32.
    MissingDependencyError
        NNCF, or a package that it needs, is not installed.

    """
    check_installed()
    manifest = source.manifest
    found = f"{manifest.precision} graphs" if manifest.kind == "onnx" else f"{manifest.backend.name} engines"
    if (manifest.kind, manifest.precision) != ("onnx", "fp32"):
        raise InputError(
            f"{source.folder} holds {found}, and int8 is made of fp32 graphs: give the fp32 bundle of the model, or "
            "build it with sdrt build --ckpt CKPT --backend onnx --precision fp32"
        )


def check_installed() -> None:
    """Raise `MissingDependencyError` if a package that quantises is not installed."""
    for package in _PACKAGES:
        if find_spec(package) is None:
            raise MissingDependencyError(package, "quantising to int8", "int8")


def default_name(source: str) -> str:
    """Name an int8 bundle after its fp32 one: of ``v1-1`` it is ``v1-1-int8``."""
    return f"{source.removesuffix('-fp32')}-int8"


def quantize_bundle(
    source: Bundle,
    samples: Samples,
    *,
    output: Path | None = None,
    name: str | None = None,
    force: bool = False,
    command: str = "",
    report: Report = lambda _what, _done, _total: None,
) -> Bundle:
    """Build an int8 bundle out of an fp32 one.

    Parameters
    ----------
    source
        The fp32 ONNX bundle.
    samples
        From its own denoising.
    output
        The bundle's folder; by default one of the store, called `name`.
    name
        The bundle's name; by default `default_name`.
    force
        Replace a bundle that exists.
    command
        The command line, for the manifest.
    report
        Called with what is being done, the bytes done and the bytes in all. Whatever it raises cancels the build.

    Returns
    -------
    Bundle
        In its place, whole.

    Raises
    ------
    InputError, MissingDependencyError
        As `check_source`.
    ExportError
        NNCF does not quantise the graph, or no quantised layer leaves the error within its bound.
    BundleCorruptError
        A file of the fp32 bundle is not as it was built.
    BundleExistsError, BundleBusyError, DiskSpaceError
        As `.publish.publishing`.

    """
    check_source(source)
    title = store.title_of(output, name, lambda: default_name(source.name))
    target = output if output is not None else store.place(title)
    others = [part for part in source.manifest.components if part.name not in {_UNET, _SHALLOW, *UNET_HALVES}]
    weights = sum(entry.bytes for entry in source.component(_UNET).files)
    kept = sum(entry.bytes for part in others for entry in part.files)
    with publishing(target, force=force, expected_bytes=kept + weights // 2) as folder:
        progress = _Progress(report, weights, 2 * len(samples.seen) + 4 * len(samples.held_out))
        for part in source.manifest.components:
            progress.tell(f"{part.name}: verifying")
            verify_once(source, part.name)
        made = _quantized(source, samples, folder, progress.tell)
        copied = [*(entry for part in others for entry in part.files), source.manifest.tokenizer]
        for entry in copied:
            shutil.copyfile(source.path(entry), folder / entry.path)
        manifest = dataclasses.replace(
            source.manifest,
            name=title,
            precision="int8",
            created=utc_now(),
            command=command,
            sdrt_version=__version__,
            components=tuple(made.get(part.name, part) for part in source.manifest.components),
            tools=dict(source.manifest.tools) | {"nncf": importlib.metadata.version("nncf")},
        )
        write_manifest(folder, manifest)
    return Bundle.open(target)


@dataclass
class _Progress:
    """Counts evaluations of the U-Net, each of which goes through all weights, and tells the caller."""

    report: Report
    weights: int
    total: int
    done: int = 0

    def tell(self, what: str, count: int = 0) -> None:
        # A search takes as many as it takes.
        self.done = min(self.done + count, self.total)
        self.report(what, self.done * self.weights, self.total * self.weights)


def _quantized(
    source: Bundle, samples: Samples, folder: Path, tell: Callable[[str, int], None]
) -> dict[str, Component]:
    """Write the graphs that compute in int8, and describe them."""
    component = source.component(_UNET)
    unet = QuantizedUnet(source.path(component.graph), samples, tell)
    while True:
        model = unet.model()
        store_weights(model, source.folder, folder / onnx_data_name(_UNET))
        graphs = _save(model, folder, _UNET)
        parity = unet.parity(folder / graphs[-1])
        if parity.relative_l2 <= parity.threshold:
            break
        unet.leave_more_alone(parity.relative_l2)
    paths = (graphs[0], onnx_data_name(_UNET), *graphs[1:])
    made = {_UNET: _described(component, folder, paths, parity)}
    if source.has(_SHALLOW):
        graphs = _save(outer_blocks(model), folder, _SHALLOW)
        parity = unet.parity(folder / graphs[-1])
        made[_SHALLOW] = _described(source.component(_SHALLOW), folder, graphs, parity)
    if source.has(UNET_HALVES[0]):
        parts = cut_unet(model, component.inputs, component.outputs)
        written = [_save(part.model, folder, part.name) for part in parts]
        parity = unet.parity(*(folder / graphs[-1] for graphs in written))
        for part, graphs in zip(parts, written, strict=True):
            made[part.name] = _described(source.component(part.name), folder, graphs, parity)
    return made


def _save(model: onnx.ModelProto, folder: Path, component: str) -> list[str]:
    """Write a graph, and again with attention as one node, and name both."""
    import onnx  # noqa: PLC0415 - only a build makes graphs

    onnx.save(model, folder / onnx_name(component))
    return write_merged(folder, component)


def _described(component: Component, folder: Path, paths: Sequence[str], parity: Parity | None) -> Component:
    files = tuple(hash_file(folder, path) for path in paths)
    return dataclasses.replace(component, precision="int8", files=files, parity=parity)
