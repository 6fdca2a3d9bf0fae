"""From a checkpoint to an ONNX bundle: read, trace, compare, hash, publish."""

from __future__ import annotations

import functools
import gc
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import onnx
import torch

from .._version import __version__
from ..engines import store
from ..engines.attention import write_merged
from ..engines.bundle import (
    MANIFEST,
    TOKENIZER,
    Bundle,
    hash_file,
    onnx_data_name,
    onnx_name,
    write_manifest,
)
from ..engines.devices import nvidia_gpus
from ..engines.manifest import Backend, Component, Latent, Manifest, Model, Text, TracedPrecision, utc_now
from ..engines.publish import publishing
from ..engines.shallow import outer_blocks
from ..errors import BundleExistsError, InputError
from . import modules, parity
from .checkpoint import checkpoint_name, read_checkpoint
from .decoder_parts import decoder_parts
from .trace import OPSET, examples, signatures, trace
from .unet_parts import unet_parts
from .vocabulary import write_tokenizer

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import nn

    from ..engines.manifest import Scalar
    from .checkpoint import Checkpoint
    from .parity import Case
    from .trace import Signature

Report = Callable[[str, int, int], None]
"""Told what is being done, how many bytes of it are done, and of how many."""

_DTYPES: Mapping[TracedPrecision, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16}
_TOOLS = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnxruntime")
# Sides above the least that the tracer can tell from a constant, and all different from each other and the channels.
_TRACED = {"batch": 2, "height": 24, "width": 20}
# Graphs and tokenizer beside the weights; measured 2 to 7 MB.
_OVERHEAD = 16 * 2**20


def auto_precision() -> TracedPrecision:
    """Choose fp16 where an NVIDIA GPU will run the bundle, and fp32 where a CPU will, which has no fp16 kernels."""
    return "fp16" if nvidia_gpus() else "fp32"


@dataclass(frozen=True)
class _Options:
    title: str
    precision: TracedPrecision
    ema: bool
    clip_skip: int
    command: str


@dataclass
class _Progress:
    """Counts weights, in bytes, through the stages of a build, and tells the caller."""

    report: Report
    total: int
    done: int = field(default=0, init=False)

    def stage(self, what: str) -> None:
        self.report(what, self.done, self.total)

    def advance(self, what: str, count: int) -> None:
        self.done = min(self.done + count, self.total)
        self.report(what, self.done, self.total)


def build(
    ckpt: str,
    *,
    output: Path | None = None,
    name: str | None = None,
    precision: TracedPrecision | Literal["auto"] = "auto",
    ema: bool = False,
    clip_skip: int = 0,
    force: bool = False,
    command: str = "",
    report: Report = lambda _what, _done, _total: None,
) -> Bundle:
    """Build an ONNX bundle.

    Parameters
    ----------
    ckpt
        What `.checkpoint.read_checkpoint` takes: ``v1-1``, a Hugging Face repository, a folder or a file.
    output
        The bundle's folder; by default one of the store, called `name`.
    name
        The bundle's name; by default the checkpoint's.
    precision
        ``fp32``, ``fp16``, or ``auto`` for `auto_precision`.
    ema
        Take the averaged weights.
    clip_skip
        How many of the text encoder's last layers a run leaves out where it does not say.
    force
        Replace a bundle that exists.
    command
        The command line, for the manifest.
    report
        Called with what is being done, the bytes done and the bytes in all.

    Returns
    -------
    Bundle
        In its place, whole.

    Raises
    ------
    CheckpointError, DownloadError
        The checkpoint cannot be had, or is not what it should be.
    ExportError
        A graph strays from its reference.
    BundleExistsError, BundleBusyError, DiskSpaceError, InputError
        As `..engines.publish.publishing`.

    """
    title = store.title_of(output, name, lambda: checkpoint_name(ckpt))
    _refuse_early(output or store.bundles_folder() / title, force=force)
    checkpoint = read_checkpoint(ckpt, ema=ema, progress=report)
    layers = int(checkpoint.text_encoder.config["num_hidden_layers"])
    check_clip_skip(clip_skip, layers)
    chosen: TracedPrecision = auto_precision() if precision == "auto" else precision
    target = output if output is not None else store.place(title)
    itemsize = _DTYPES[chosen].itemsize
    sizes = {part: itemsize * _parameters(checkpoint, part) for part in ("text_encoder", "unet", "vae")}
    # Each byte is read, traced, compared and hashed.
    progress = _Progress(report, 4 * sum(sizes.values()))
    options = _Options(title, chosen, ema, clip_skip, command)
    needed = sum(sizes.values()) + _OVERHEAD
    with torch.inference_mode(), publishing(target, force=force, expected_bytes=needed) as folder:
        components = _components(checkpoint, folder, chosen, progress, sizes)
        write_tokenizer(folder / TOKENIZER)
        write_manifest(folder, _manifest(checkpoint, folder, components, options))
    return Bundle.open(target)


def check_clip_skip(clip_skip: int, layers: int) -> None:
    """Refuse to leave out more layers than there are, or all of them."""
    if not 0 <= clip_skip < layers:
        raise InputError(f"clip skip is {clip_skip}: expected 0 to {layers - 1}, the text encoder has {layers} layers")


def _refuse_early(target: Path, *, force: bool) -> None:
    """Say that the place is taken before gigabytes are downloaded; `publishing` looks again, under its lock."""
    if not force and (target / MANIFEST).exists():
        raise BundleExistsError(f"{target} exists already: give --force to replace it, or choose another name")


def _parameters(checkpoint: Checkpoint, part: str) -> int:
    return sum(tensor.numel() for tensor in getattr(checkpoint, part).weights.values())


@dataclass(frozen=True)
class _Job:
    """One component to be made."""

    name: str
    title: str
    size: int
    cases: Callable[[], list[Case]]
    module: Callable[[], nn.Module]


def _components(
    checkpoint: Checkpoint, folder: Path, precision: TracedPrecision, progress: _Progress, sizes: Mapping[str, int]
) -> tuple[Component, ...]:
    """Trace one network after the other, so that no two of them are in memory at once."""
    dtype = _DTYPES[precision]
    described = _described(checkpoint)

    @functools.cache
    def autoencoder_cases() -> tuple[list[Case], list[Case], float]:
        return parity.autoencoder_cases(checkpoint, described["vae_decoder"], described["vae_encoder"])

    def autoencoder() -> tuple[nn.Module, nn.Module]:
        scale = autoencoder_cases()[2] if precision == "fp16" else 1.0
        return modules.autoencoder(checkpoint.vae, dtype, scale)

    @functools.cache
    def unet_cases() -> list[Case]:
        return parity.unet_cases(checkpoint, described["unet"], described["text_encoder"])

    jobs = (
        _Job(
            "text_encoder",
            "text encoder",
            sizes["text_encoder"],
            lambda: parity.text_cases(checkpoint, described["text_encoder"]),
            lambda: modules.text_encoder(checkpoint.text_encoder, dtype),
        ),
        _Job(
            "unet",
            "U-Net",
            sizes["unet"],
            unet_cases,
            lambda: modules.unet(checkpoint.unet, dtype),
        ),
        _Job("vae_decoder", "VAE decoder", sizes["vae"] // 2, lambda: autoencoder_cases()[0], lambda: autoencoder()[0]),
        _Job("vae_encoder", "VAE encoder", sizes["vae"] // 2, lambda: autoencoder_cases()[1], lambda: autoencoder()[1]),
    )
    traced = [_component(job, described[job.name], folder, precision, progress) for job in jobs]
    progress.stage("U-Net: cutting out its outermost blocks")
    shallow = _shallow(folder, described["unet_shallow"], unet_cases(), precision)
    progress.stage("U-Net: cutting it into encoder and decoder")
    halves = unet_parts(folder, described["unet"], unet_cases(), precision)
    progress.stage("VAE decoder: cutting it for tiles")
    tiled = decoder_parts(folder, described["vae_decoder"], autoencoder_cases()[0], precision)
    return (*traced, shallow, *halves, *tiled)


def _described(checkpoint: Checkpoint) -> dict[str, Signature]:
    text = checkpoint.text_encoder.config
    unet = checkpoint.unet.config
    return signatures(
        text["hidden_size"],
        text["max_position_embeddings"],
        text["vocab_size"],
        unet["in_channels"],
        unet["block_out_channels"][0],
    )


def _component(
    job: _Job, signature: Signature, folder: Path, precision: TracedPrecision, progress: _Progress
) -> Component:
    graph, data = onnx_name(job.name), onnx_data_name(job.name)
    progress.stage(f"{job.title}: running the original")
    cases = job.cases()
    progress.advance(f"{job.title}: tracing", job.size)
    module = job.module()
    trace(module, examples(signature, _TRACED, seed=0), signature, folder / graph)
    # The tracer leaves cycles behind that hold the weights; onnxruntime needs the room now.
    del module
    gc.collect()
    progress.advance(f"{job.title}: comparing with the original", job.size)
    graphs = write_merged(folder, job.name)
    measured = parity.measure(job.title, [folder / name for name in graphs], signature, cases, precision)
    progress.advance(f"{job.title}: hashing", job.size)
    hashed = 0

    def advance(count: int) -> None:
        nonlocal hashed
        # What the tracer added to the weights is not in the total.
        progress.advance(f"{job.title}: hashing", min(count, max(job.size - hashed, 0)))
        hashed += count

    files = tuple(hash_file(folder, path, advance) for path in (graph, data, *graphs[1:]))
    progress.advance(f"{job.title}: done", max(job.size - hashed, 0))
    return Component(job.name, precision, files, signature.inputs, signature.outputs, measured)


def _shallow(folder: Path, signature: Signature, cases: list[Case], precision: TracedPrecision) -> Component:
    """Make the U-Net's outermost blocks out of its graph, whose weights they read where they are."""
    name = "unet_shallow"
    unet = onnx.load(folder / onnx_name("unet"), load_external_data=False)
    onnx.save(outer_blocks(unet), folder / onnx_name(name))
    graphs = write_merged(folder, name)
    measured = parity.measure(
        "shallow U-Net", [folder / graph for graph in graphs], signature, parity.shallow_cases(cases), precision
    )
    files = tuple(hash_file(folder, graph) for graph in graphs)
    return Component(name, precision, files, signature.inputs, signature.outputs, measured)


def _manifest(checkpoint: Checkpoint, folder: Path, components: tuple[Component, ...], options: _Options) -> Manifest:
    text, vae = checkpoint.text_encoder.config, checkpoint.vae.config
    return Manifest(
        name=options.title,
        kind="onnx",
        precision=options.precision,
        created=utc_now(),
        command=options.command,
        sdrt_version=__version__,
        model=Model("sd-v1", checkpoint.source, checkpoint.form, options.ema),
        backend=Backend("onnx", importlib.metadata.version("torch"), OPSET),
        latent=Latent(
            checkpoint.unet.config["in_channels"],
            2 ** (len(vae["block_out_channels"]) - 1),
            float(vae.get("scaling_factor", 0.18215)),
            int(checkpoint.unet.config["sample_size"]),
        ),
        text=Text(
            text["hidden_size"],
            text["num_hidden_layers"],
            text["max_position_embeddings"],
            clip_skip=options.clip_skip,
        ),
        scheduler=_schedule(checkpoint.scheduler),
        components=components,
        tokenizer=hash_file(folder, TOKENIZER),
        tools={tool: importlib.metadata.version(tool) for tool in _TOOLS},
    )


def _schedule(scheduler: Mapping[str, Any]) -> dict[str, Scalar | tuple[Scalar, ...]]:
    """Keep what describes the noise, not diffusers' notes about its own classes."""
    return {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in sorted(scheduler.items())
        if not key.startswith("_")
    }
