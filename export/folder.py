"""Which files of a diffusers folder make up the model, in a folder on disk as on the hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ..errors import CheckpointError
from .ldm import PREFIXES, PartName

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

INDEX: Final = "model_index.json"

_STEMS: Final[dict[PartName, tuple[str, ...]]] = {
    "text_encoder": ("model", "pytorch_model"),
    "unet": ("diffusion_pytorch_model",),
    "vae": ("diffusion_pytorch_model",),
}

_CHOICES: Final = tuple((variant, suffix) for variant in ("", ".fp16") for suffix in ("safetensors", "bin"))
"""The order of preference: full precision before half, and of two alike the format that holds no code."""


@dataclass(frozen=True)
class Layout:
    """The files to read, relative to the folder, with ``/`` between."""

    configs: Mapping[PartName, str]
    weights: Mapping[PartName, tuple[str, ...]]
    scheduler: str

    @property
    def files(self) -> tuple[str, ...]:
        """All of them, the index included."""
        weights = [name for part in self.weights.values() for name in part]
        return (INDEX, self.scheduler, *self.configs.values(), *weights)


def _shards(files: Collection[str], part: PartName, variant: str, suffix: str, where: str) -> tuple[str, ...]:
    """One file, or the numbered pieces that large ones are cut into; empty where there is neither."""
    for stem in _STEMS[part]:
        whole = f"{part}/{stem}{variant}.{suffix}"
        if whole in files:
            return (whole,)
        piece = re.compile(rf"{part}/{stem}{re.escape(variant)}-(\d{{5}})-of-(\d{{5}})\.{suffix}")
        found = sorted(name for name in files if piece.fullmatch(name))
        if found:
            count = int(found[0][-len(suffix) - 6 : -len(suffix) - 1])
            if len(found) != count:
                raise CheckpointError(f"{where} is incomplete: {found[0]} is one of {count} pieces, found {len(found)}")
            return tuple(found)
    return ()


def choose_files(files: Collection[str], where: str, *, ema: bool) -> Layout:
    """Choose what to read of a diffusers folder.

    Parameters
    ----------
    files
        What there is, relative to the folder.
    where
        What to call the folder in messages.
    ema
        Insist on averaged weights. A folder holds them as its plain files when it has ``non_ema`` ones besides.

    Raises
    ------
    CheckpointError
        If something is missing, or averaged weights are asked for and there are none.

    """
    if INDEX not in files:
        kind = "there is no such file"
        if any(name in files for name in ("config.json", "diffusion_pytorch_model.safetensors", "model.safetensors")):
            kind = "it seems to be one part of a model, give the folder around it"
        raise CheckpointError(f"{where} is no diffusers folder: expected {INDEX}, but {kind}")
    weights: dict[PartName, tuple[str, ...]] = {}
    for part in PREFIXES:
        non_ema = {suffix: _shards(files, part, ".non_ema", suffix, where) for suffix in ("safetensors", "bin")}
        if ema and part == "unet" and not any(non_ema.values()):
            raise CheckpointError(
                f"{where} has one set of U-Net weights, so there are no averaged ones to choose: leave --ema away"
            )
        found = (_shards(files, part, variant, suffix, where) for variant, suffix in _CHOICES)
        weights[part] = next((names for names in (*found, *({} if ema else non_ema).values()) if names), ())
        if not weights[part]:
            raise CheckpointError(f"{where} is incomplete: {part}/ holds no weights (.safetensors or .bin)")
    configs = {part: f"{part}/config.json" for part in PREFIXES}
    scheduler = "scheduler/scheduler_config.json"
    for name in (*configs.values(), scheduler):
        if name not in files:
            raise CheckpointError(f"{where} is incomplete: {name} is missing")
    return Layout(configs, weights, scheduler)
