"""From an ONNX bundle to an engine bundle; no torch and no onnx in sight."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from .._version import __version__
from ..errors import InputError
from . import store
from .bundle import TOKENIZER, Bundle, hash_file, layers_name, write_manifest
from .devices import nvidia_gpus
from .manifest import DEEP_FEATURES, Backend, Component, utc_now, weights_owner
from .profiles import check_sizes, profiles_of, tensors_of
from .publish import publishing
from .targets import DEFAULT_TARGET, capabilities_of, host_platform, parse_targets, sm_name
from .tensorrt import MODULES, BackendName, Builder, Options, supported_capabilities
from .verified import verify_once

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from .devices import Gpu
    from .manifest import InputRange

Report = Callable[[str, int, int], None]
"""Told what is being done, how many bytes of it are done, and of how many."""

_TITLES = {"text_encoder": "text encoder", "unet": "U-Net", "vae_decoder": "VAE decoder", "vae_encoder": "VAE encoder"}
_SHORT: Mapping[BackendName, str] = {"tensorrt-rtx": "rtx", "tensorrt": "trt"}
# Kernels, which each profile has of its own, beside the weights, which they share; measured 10 to 45 MB a profile.
_PROFILE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Choice:
    """What `sdrt build` makes where nobody said.

    Attributes
    ----------
    backend
        Of the engines; None to build no engines.
    targets
        What to give `build_engines`.
    missing
        The backend that would have to be installed for engines, where there are none.
    why
        One line for the user: why this, and what to install for more.

    """

    backend: BackendName | None
    targets: tuple[str, ...]
    missing: BackendName | None
    why: str


def default_choice(targets: Sequence[str] = ()) -> Choice:
    """Choose for this machine: engines for its GPU; without one but with TensorRT-RTX, for the RTX 3090; or none.

    Parameters
    ----------
    targets
        What was named, if anything was: then the backend is one that builds for it.

    Raises
    ------
    InputError
        A target is not known.
    BackendError
        A backend is installed and does not load.

    """
    gpus = nvidia_gpus()
    wanted = tuple(targets) or ("native" if gpus else DEFAULT_TARGET,)
    capabilities = set(parse_targets(wanted).values())
    candidates: tuple[BackendName, ...] = ("tensorrt", "tensorrt-rtx") if gpus else ("tensorrt-rtx",)
    installed = [backend for backend in candidates if find_spec(MODULES[backend][0]) is not None]
    suitable = [backend for backend in installed if capabilities <= set(supported_capabilities(backend))]
    # Where none builds for what was named, the last says for what it builds.
    if found := suitable[:1] or (installed[-1:] if targets else []):
        if targets:
            why = f"building engines with {found[0]}"
        elif gpus:
            why = f"building engines with {found[0]} for the {_described(gpus[0])} of this machine"
        else:
            why = f"there is no NVIDIA GPU here: building engines for the {DEFAULT_TARGET} with {found[0]}"
        return Choice(found[0], wanted, None, why)
    missing: BackendName = "tensorrt" if installed else "tensorrt-rtx"
    purpose = f"the {_described(gpus[0])} of this machine" if gpus else "NVIDIA GPUs"
    extras = "'sdrt[trt]'" if installed else "'sdrt[rtx]' or 'sdrt[trt]'" if gpus else "'sdrt[rtx]'"
    why = f"building ONNX graphs alone: for engines for {purpose}, pip install {extras}"
    return Choice(None, (), missing, why)


def _described(gpu: Gpu) -> str:
    return f"{gpu.name} (compute capability {gpu.compute_capability})"


def build_engines(
    source: Bundle,
    *,
    backend: BackendName,
    targets: Sequence[str] = (),
    sizes: Sequence[tuple[int, int]] = (),
    images: Sequence[int] = (1,),
    dynamic: bool = False,
    output: Path | None = None,
    name: str | None = None,
    force: bool = False,
    options: Options | None = None,
    allow_fp32: bool = False,
    command: str = "",
    report: Report = lambda _what, _done, _total: None,
) -> Bundle:
    """Build an engine bundle out of an ONNX bundle.

    Parameters
    ----------
    source
        The ONNX bundle.
    backend
        ``tensorrt-rtx``, which needs no GPU, or ``tensorrt``, which builds on the GPU that will run the engines.
    targets
        Cards or compute capabilities, as `.targets.capabilities_of` takes them; all of them share one set of plans. By
        default the RTX 3090 for ``tensorrt-rtx`` and the GPU of this machine for ``tensorrt``.
    sizes
        Width and height of images in pixels; by default what the model was trained for.
    images
        How many images a request makes.
    dynamic
        Engines that take every size and count from the least to the most of those given, rather than those alone.
        They are slower.
    output
        The bundle's folder; by default one of the store, called `name`.
    name
        The bundle's name; by default `default_name`.
    force
        Replace a bundle that exists.
    options
        What may be asked of the builder.
    allow_fp32
        Take a float32 bundle too: its engines are several times slower and twice as large.
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
    InputError
        The bundle holds engines, or float32; a target, size or option makes no sense.
    MissingDependencyError
        The backend is not installed.
    BackendError
        The backend needs a GPU and there is none, does not take a graph, or cannot build an engine.
    BundleCorruptError
        A file of the ONNX bundle is not as it was built.
    BundleExistsError, BundleBusyError, DiskSpaceError
        As `.publish.publishing`.

    """
    _check_source(source, allow_fp32=allow_fp32)
    builder = builder_for(backend, targets, options)
    shapes, factor = tuple(sizes) or (_trained_size(source),), source.manifest.latent.scale_factor
    check_sizes(source.component("unet").inputs, factor, shapes, images, dynamic=dynamic)
    chosen = [
        (component, profiles_of(component, shapes, images, factor, dynamic=dynamic))
        for component in source.manifest.components
        if weights_owner(component.name) is None  # feature caching and tiles run on no GPU so far
    ]
    title = store.title_of(output, name, lambda: default_name(source.name, backend, builder.capabilities))
    target = output if output is not None else store.place(title)
    weights = {component.name: sum(entry.bytes for entry in component.files) for component, _ in chosen}
    expected = sum(weights[component.name] + _PROFILE_BYTES * len(profiles) for component, profiles in chosen)
    # Each profile of a component is compiled by itself.
    work = {component.name: weights[component.name] * len(profiles) for component, profiles in chosen}
    progress = _Progress(report, sum(work.values()))
    with publishing(target, force=force, expected_bytes=expected) as folder:
        components = []
        for component, profiles in chosen:
            progress.begin(_TITLES[component.name], work[component.name])
            components.append(
                _component(source, component, profiles, builder=builder, folder=folder, progress=progress)
            )
        shutil.copyfile(source.path(source.manifest.tokenizer), folder / TOKENIZER)
        manifest = dataclasses.replace(
            source.manifest,
            name=title,
            kind="engine",
            created=utc_now(),
            command=command,
            sdrt_version=__version__,
            backend=Backend(
                backend, builder.version, compute_capabilities=builder.capabilities, platform=host_platform()
            ),
            components=tuple(components),
            tokenizer=hash_file(folder, TOKENIZER),
            tools=dict(source.manifest.tools) | {MODULES[backend][0]: builder.version},
        )
        write_manifest(folder, manifest)
    return Bundle.open(target)


def default_name(source: str, backend: BackendName, capabilities: Sequence[str]) -> str:
    """Name an engine bundle after its ONNX bundle, backend and targets: of ``v1-1-fp16`` it is ``v1-1-rtx-sm86``."""
    return "-".join([source.removesuffix("-fp16"), _SHORT[backend], *map(sm_name, capabilities)])


def builder_for(backend: BackendName, targets: Sequence[str] = (), options: Options | None = None) -> Builder:
    """Set a builder up, which tells all that is wrong with a request but for the sizes.

    Parameters
    ----------
    backend, targets, options
        As `build_engines`.

    Raises
    ------
    InputError, MissingDependencyError, BackendError
        As `build_engines`.

    """
    default = "native" if backend == "tensorrt" else DEFAULT_TARGET
    capabilities = capabilities_of(targets or (default,), supported_capabilities(backend))
    if backend == "tensorrt" and len(capabilities) > 1:
        raise InputError("tensorrt builds for one GPU at a time: give one target, or use tensorrt-rtx for several")
    cache = store.home() / "timing" / f"{backend}-{'-'.join(map(sm_name, capabilities))}.cache"
    return Builder(backend, capabilities, options, cache)


def _check_source(source: Bundle, *, allow_fp32: bool) -> None:
    manifest = source.manifest
    if manifest.kind != "onnx":
        raise InputError(
            f"{source.folder} holds {manifest.backend.name} engines, expected ONNX graphs to build engines of: "
            "give the bundle that it was built from"
        )
    if manifest.precision == "int8":
        raise InputError(
            f"{source.folder} holds int8 graphs, which are for CPUs, expected fp16 ones to build engines of: give the "
            "fp16 bundle of the model, or build it with sdrt build --ckpt CKPT --backend onnx --precision fp16"
        )
    if manifest.precision == "fp32" and not allow_fp32:
        raise InputError(
            f"{source.folder} holds fp32 graphs, of which engines would be slow and large: build an fp16 bundle with "
            "sdrt build --ckpt CKPT --backend onnx --precision fp16, or ask for fp32 engines with --precision fp32"
        )


def _trained_size(source: Bundle) -> tuple[int, int]:
    side = source.manifest.latent.sample_size * source.manifest.latent.scale_factor
    return side, side


@dataclass
class _Progress:
    """Counts the bytes of weights that were compiled, and tells the caller."""

    report: Report
    total: int
    before: int = 0
    title: str = ""
    size: int = 0

    def begin(self, title: str, size: int) -> None:
        self.before += self.size
        self.title, self.size = title, size
        self.advance("verifying", 0.0)

    def advance(self, what: str, fraction: float) -> None:
        self.report(f"{self.title}: {what}", self.before + int(fraction * self.size), self.total)


def _component(
    source: Bundle,
    component: Component,
    profiles: Sequence[Mapping[str, InputRange]],
    *,
    builder: Builder,
    folder: Path,
    progress: _Progress,
) -> Component:
    verify_once(source, component.name)
    plan = builder.build(source.path(component.graph), folder, component.name, profiles, progress.advance)
    layers = layers_name(component.name)
    (folder / layers).write_text(plan.fusion.to_json(), encoding="ascii", newline="\n")
    inputs, outputs = tensors_of(component, profiles)
    outputs = tuple(tensor for tensor in outputs if tensor.name != DEEP_FEATURES)
    return Component(
        component.name,
        component.precision,
        (plan.file, hash_file(folder, layers)),
        inputs,
        outputs,
        parity=None,  # no engine runs on the machine that builds it
        profiles=tuple(profiles),
    )
