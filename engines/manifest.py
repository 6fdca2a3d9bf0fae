"""What ``bundle.json`` says, as frozen dataclasses; ``engines/README.md`` documents every field for other languages.

These classes check nothing: :func:`~.manifest_parser.parse_manifest` does, and all that is written or read passes it.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any, Literal

SCHEMA_VERSION = 1

#: The U-Net's encoder and decoder, which make together what the whole does.
UNET_HALVES = ("unet_encoder", "unet_decoder")

#: The parts of Stable Diffusion v1, in the order in which they run; the first three make images of prompts. The VAE
#: encoder is for image-to-image, the U-Net's outermost blocks for feature caching, and its halves for encoder reuse.
COMPONENT_NAMES = ("text_encoder", "unet", "vae_decoder", "vae_encoder", "unet_shallow", *UNET_HALVES)
REQUIRED_COMPONENTS = COMPONENT_NAMES[:3]

#: What `unet` gives beside the prediction, and `unet_shallow` takes.
DEEP_FEATURES = "deep_features"

#: What `unet_encoder` hands to `unet_decoder`: the features of its levels, in order, and those of the middle block.
SKIP = "skip_{}"
MIDDLE = "middle"

#: The VAE decoder in parts, for decoding in tiles: its beginning, which runs whole, and the stages after it, from 1.
DECODER_HEAD = "vae_decoder_head"
DECODER_STAGE = "vae_decoder_stage_{}"

#: What the parts hand on: the head gives the first, each stage the next, and the last stage the image.
HIDDEN = "hidden_{}"

#: What most stages take besides: of each group of channels of the whole picture, for the normalisation.
MEAN, VARIANCE = "mean", "variance"

#: So many rows and columns at a tile's edge are wrong for want of its neighbours, in pixels of what a stage takes.
TILE_MARGIN = 2

Kind = Literal["onnx", "engine"]
TracedPrecision = Literal["fp32", "fp16"]
Precision = Literal[TracedPrecision, "int8"]
Metric = Literal["max_abs", "relative_l2", "psnr"]
Scalar = str | int | float | bool | None


@dataclass(frozen=True)
class DimRange:
    """A dimension that is chosen at run time: ``min <= n <= max`` and ``n % multiple_of == 0``."""

    name: str
    min: int
    max: int
    multiple_of: int = 1


Dim = int | DimRange


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a component; ``dtype`` is numpy's name, such as ``float32``."""

    name: str
    dtype: str
    shape: tuple[Dim, ...]


@dataclass(frozen=True)
class FileEntry:
    """A file of the bundle: its path relative to the folder, with ``/``, its size, its SHA-256 in hexadecimal."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Parity:
    """How far a component strayed from its reference on random inputs, measured when it was built.

    Attributes
    ----------
    max_abs
        Largest absolute difference.
    relative_l2
        L2 norm of the difference over that of the reference.
    psnr
        Peak signal-to-noise ratio in dB, the reference's range being the peak; ``math.inf`` (``null`` in the file)
        where both are equal.
    metric, threshold
        The figure that the build was judged by, and its bound: an upper one, or a lower one for ``psnr``.
    reference
        What it was compared with, such as ``torch 2.13.0 fp32``.

    """

    max_abs: float
    relative_l2: float
    psnr: float
    metric: Metric
    threshold: float
    reference: str


@dataclass(frozen=True)
class InputRange:
    """The shapes of one input that an engine takes in one profile, and the one that it is fastest at."""

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]


@dataclass(frozen=True)
class Component:
    """One network of the model.

    Attributes
    ----------
    files
        The ONNX graph, its external data, and the graph again with attention as one node where it has any; or the
        plan and the list of its layers.
    profiles
        Of an engine: for each optimisation profile, in TensorRT's order, the range of every input by its name. Empty
        where any shape within `inputs` is taken, as in an ONNX bundle.

    """

    name: str
    precision: Precision
    files: tuple[FileEntry, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    parity: Parity | None
    profiles: tuple[Mapping[str, InputRange], ...] = ()

    def __post_init__(self) -> None:
        """Freeze the mappings."""
        object.__setattr__(self, "profiles", tuple(MappingProxyType(dict(profile)) for profile in self.profiles))

    @property
    def graph(self) -> FileEntry:
        """The ONNX graph or the plan."""
        return self.files[0]


@dataclass(frozen=True)
class Model:
    """Where the weights came from: the ``--ckpt`` given, its form, and whether the averaged weights were taken."""

    family: str
    source: str
    form: str
    ema: bool


@dataclass(frozen=True)
class Backend:
    """What the graphs or plans are for.

    ``opset`` is ``None`` for plans; ``compute_capabilities`` (``8.6``, ``8.9``) is empty and ``platform``
    (``linux_x86_64``) is ``None`` where the files run anywhere, as ONNX does. ``version`` is that of the tool that
    wrote them.
    """

    name: str
    version: str
    opset: int | None = None
    compute_capabilities: tuple[str, ...] = ()
    platform: str | None = None


@dataclass(frozen=True)
class Latent:
    """The latent space: channels, image pixels to a latent pixel, and the factor that gives latents unit variance.

    ``sample_size`` is the height and width, in latent pixels, of the pictures that the model was trained on.
    """

    channels: int = 4
    scale_factor: int = 8
    scaling_factor: float = 0.18215
    sample_size: int = 64


@dataclass(frozen=True)
class Text:
    """What the text encoder reads and gives; ``clip_skip`` is the default count of final layers to leave out."""

    embedding_width: int
    layers: int
    max_tokens: int = 77
    bos_token_id: int = 49406
    eos_token_id: int = 49407
    pad_token_id: int = 49407
    clip_skip: int = 0


@dataclass(frozen=True)
class Manifest:
    """All of ``bundle.json``.

    Attributes
    ----------
    name
        What the bundle was called when it was built; the folder may have another name since.
    created
        UTC, ISO 8601, ending in ``Z``.
    command
        The command line that built it.
    scheduler
        The training schedule under diffusers' keys; ``num_train_timesteps``, ``beta_start``, ``beta_end``,
        ``beta_schedule`` and ``prediction_type`` are always there.
    tools
        Versions of the packages that built it.

    """

    name: str
    kind: Kind
    precision: Precision
    created: str
    command: str
    sdrt_version: str
    model: Model
    backend: Backend
    latent: Latent
    text: Text
    scheduler: Mapping[str, Scalar | tuple[Scalar, ...]]
    components: tuple[Component, ...]
    tokenizer: FileEntry
    tools: Mapping[str, str]
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        """Freeze the two mappings."""
        scheduler = {key: tuple(value) if isinstance(value, list) else value for key, value in self.scheduler.items()}
        object.__setattr__(self, "scheduler", MappingProxyType(scheduler))
        object.__setattr__(self, "tools", MappingProxyType(dict(self.tools)))

    @property
    def decoder_stages(self) -> tuple[Component, ...]:
        """The stages of the VAE decoder after its head, in order; empty in a bundle that is without them."""
        return tuple(part for part in self.components if is_decoder_part(part.name) and part.name != DECODER_HEAD)

    @property
    def files(self) -> tuple[FileEntry, ...]:
        """Every file of the bundle but ``bundle.json`` itself."""
        return (*(entry for component in self.components for entry in component.files), self.tokenizer)

    def to_json(self) -> str:
        """Write the text of ``bundle.json``: ASCII, keys in the order of the README, the same for the same manifest."""
        plain = {"schema_version": self.schema_version} | _plain(self)
        return json.dumps(plain, indent=2, allow_nan=False) + "\n"


def is_decoder_part(component: str) -> bool:
    """Tell whether a component is one of the parts of the VAE decoder."""
    return component == DECODER_HEAD or component.startswith(DECODER_STAGE.format(""))


def weights_owner(component: str) -> str | None:
    """Name the component whose external data a component's graphs read, where they have no weights of their own."""
    if is_decoder_part(component):
        return "vae_decoder"
    return "unet" if component.startswith("unet_") else None


def utc_now() -> str:
    """Give the present time as :attr:`Manifest.created` has it."""
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, str) and not value.isprintable():
        # the command line may hold any bytes, and readers refuse what could not be shown
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in value)
    # JSON has no infinity; only the PSNR of equal outputs can be infinite
    return None if value == math.inf else value
