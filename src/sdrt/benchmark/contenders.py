"""Those who can take part, by name."""

from __future__ import annotations

import importlib.util
import os
import shutil
import time
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from ..engines.bundle import Bundle
from ..errors import InputError
from ..runtime.samplers import SAMPLERS
from .contender import Turn
from .settings import SEED

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from ..export.peers import Diffusers
    from .contender import Contender
    from .settings import Settings

OWN: Final = "sdrt"
FLOOR: Final = "floor"


@dataclass(frozen=True)
class Peer:
    """Somebody to compare with.

    Attributes
    ----------
    modules
        What has to be installed.
    extra
        The extra of sdrt that installs it.
    copies
        How much memory it holds when it is idle, in fp32 weights of the whole model.
    precision, compiled
        Of diffusers.

    """

    modules: tuple[str, ...]
    extra: str
    copies: float
    precision: Literal["fp32", "bf16"] = "fp32"
    compiled: bool = False


_EXPORT: Final = ("torch", "diffusers", "transformers")

PEERS: Final[Mapping[str, Peer]] = MappingProxyType(
    {
        "diffusers": Peer(_EXPORT, "export", 1.0),
        "diffusers-bf16": Peer(_EXPORT, "export", 0.6, "bf16"),
        "diffusers-compile": Peer(_EXPORT, "export", 1.0, "bf16", compiled=True),
        "openvino-raw": Peer(("openvino",), "openvino", 1.5),
        "openvino-raw-fp32": Peer(("openvino",), "openvino", 1.5),
        "onnxruntime-raw": Peer(("onnxruntime",), "cpu", 2.0),
    }
)
"""``diffusers`` in fp32, in bf16 with channels last, and that compiled; OpenVINO with its defaults and in fp32, and
onnxruntime with its defaults, on the bundle's graphs."""


def parse_peers(given: str | None) -> tuple[str, ...]:
    """Read names with commas between them, each taken once.

    Raises
    ------
    InputError
        One of them is unknown; the message lists those that there are.

    """
    names = tuple(dict.fromkeys(name.strip() for name in (given or "").split(",") if name.strip()))
    for name in names:
        if name not in PEERS:
            raise InputError(f"there is no peer {name!r} to compare with: expected some of {', '.join(PEERS)}")
    return names


def reason_to_skip(name: str, settings: Settings) -> str | None:
    """Tell in one line why a peer cannot take part here; None if it can."""
    peer = PEERS[name]
    missing = [module for module in peer.modules if importlib.util.find_spec(module) is None]
    if missing:
        return f"{', '.join(missing)} not installed: run pip install 'sdrt[{peer.extra}]'"
    if "torch" in peer.modules and settings.checkpoint is None:
        return "the checkpoint that the bundle was made of is not found: give it with --ckpt"
    if peer.compiled and not _has_compiler():
        return "torch.compile needs a C++ compiler, and there is none: install g++, or set CXX"
    return None


def _has_compiler() -> bool:
    return any(shutil.which(name) for name in (os.environ.get("CXX"), "g++", "clang++", "cl") if name)


def make(name: str, settings: Settings) -> Contender:
    """Load a contender: sdrt itself, or a peer."""
    if name == OWN:
        from .own import Sdrt  # noqa: PLC0415 - each contender has a process that loads what it needs, and no more

        return Sdrt(settings)
    if name in {"openvino-raw", "openvino-raw-fp32"}:
        from .raw import RawOpenVino  # noqa: PLC0415

        return RawOpenVino(settings, "f32" if name == "openvino-raw-fp32" else None)
    if name == "onnxruntime-raw":
        from .raw import RawOnnxRuntime  # noqa: PLC0415

        return RawOnnxRuntime(settings)
    return _Diffusers(settings, PEERS[name])


class _Diffusers:
    """A contender: diffusers' own pipeline."""

    def __init__(self, settings: Settings, peer: Peer) -> None:
        from ..export.peers import Diffusers  # noqa: PLC0415 - torch, for this contender alone

        assert settings.checkpoint is not None  # else it were skipped
        manifest = Bundle.open(settings.bundle).manifest
        self._settings, self._peer = settings, peer
        self._pipeline: Diffusers = Diffusers(
            settings.checkpoint,
            scheduler=SAMPLERS[settings.sampler].diffusers,
            ema=manifest.model.ema,
            clip_skip=manifest.text.clip_skip,
            precision=peer.precision,
            compiled=peer.compiled,
        )
        noise = np.random.default_rng(SEED)
        rows = settings.batch * (2 if settings.guided else 1)
        self._latents = noise.standard_normal(settings.latent_shape, np.float32)
        text = manifest.text
        embeddings = noise.standard_normal((rows, text.max_tokens, text.embedding_width), np.float32)
        self._pipeline.prepare(self._latents, embeddings)
        self._images: NDArray[np.float32] = np.empty(0, np.float32)

    @property
    def about(self) -> dict[str, Any]:
        """Tell the precision and the threads."""
        return {"precision": self._peer.precision, **self._pipeline.about}

    def text(self, turn: int) -> Turn:
        """Encode one prompt."""
        began = time.perf_counter()
        self._pipeline.embed(self._settings.prompt(turn))
        return Turn(time.perf_counter() - began)

    def step(self, turn: int) -> Turn:
        """Run the U-Net and the arithmetic of guidance."""
        began = time.perf_counter()
        self._pipeline.predict(1.0 + turn, self._settings.cfg_scale)
        return Turn(time.perf_counter() - began)

    def decode(self, _turn: int) -> Turn:
        """Decode latents."""
        began = time.perf_counter()
        self._pipeline.decode(self._latents)
        return Turn(time.perf_counter() - began)

    def picture(self, turn: int) -> Turn:
        """Make images as the pipeline of diffusers makes them."""
        settings = self._settings
        began = time.perf_counter()
        self._images = self._pipeline.generate(
            settings.prompt(turn),
            steps=settings.steps,
            guidance_scale=settings.cfg_scale,
            width=settings.width,
            height=settings.height,
            images=settings.batch,
            seed=SEED,
        )
        return Turn(time.perf_counter() - began)

    def pixels(self) -> NDArray[np.float32]:
        """Give the last images."""
        return self._images
