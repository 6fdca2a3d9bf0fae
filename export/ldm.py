"""How the original Stable Diffusion code (CompVis, "LDM") names the tensors that diffusers names otherwise.

The map goes one way, from a diffusers name to the original one. Reading a file starts from the module that its shapes
call for, so every name that is wanted is known; writing one (``bench/checkpoints.py``) starts from a module as well.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

PartName = Literal["text_encoder", "unet", "vae"]

PREFIXES: Final[dict[PartName, str]] = {
    "text_encoder": "cond_stage_model.transformer.text_model.",
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
}
"""What the original code puts before each part's tensors."""

EMA_PREFIX: Final = "model_ema."
"""The averaged U-Net: its names have lost their dots, so ``model_ema.diffusion_modelout0weight``."""

_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}

_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")


def _rename_first(name: str, table: Mapping[str, str]) -> str:
    """Replace the leading module name of `name` by what the table says, where it says something."""
    for ours, theirs in table.items():
        if name.startswith(ours + "."):
            return theirs + name[len(ours) :]
    return name


def _unet_name(name: str, layers_per_block: int, up_block_types: tuple[str, ...]) -> str:
    if middle := _MIDDLE.fullmatch(name):
        kind, index, rest = middle[1], int(middle[2]), middle[3]
        place = 2 * index if kind == "resnets" else 1
        return f"middle_block.{place}.{_rename_first(rest, _UNET_RESNET)}"
    block = _BLOCK.fullmatch(name)
    if block is None:
        return _rename_first(name, _UNET_OUTSIDE)
    side, level, kind, index, rest = block[1], int(block[2]), block[3], int(block[4]), block[5]
    # The original counts blocks through all levels; a level has one more than its layers: on the way down the
    # downsampler, on the way up the layer that takes the skip from that downsampler.
    first = level * (layers_per_block + 1)
    if kind == "downsamplers":
        return f"input_blocks.{first + layers_per_block + 1}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        place = 2 if "CrossAttn" in up_block_types[level] else 1
        return f"output_blocks.{first + layers_per_block}.{place}.{rest}"
    blocks = f"input_blocks.{first + 1 + index}" if side == "down" else f"output_blocks.{first + index}"
    return f"{blocks}.1.{rest}" if kind == "attentions" else f"{blocks}.0.{_rename_first(rest, _UNET_RESNET)}"


def _vae_name(name: str, levels: int) -> str:
    half, _, inner = name.partition(".")
    if half not in {"encoder", "decoder"}:
        return name
    if middle := _MIDDLE.fullmatch(inner):
        kind, index, rest = middle[1], int(middle[2]), middle[3]
        if kind == "attentions":
            return f"{half}.mid.attn_1.{_rename_first(rest, _VAE_ATTENTION)}"
        return f"{half}.mid.block_{index + 1}.{rest}"
    block = _BLOCK.fullmatch(inner)
    if block is None:
        return f"{half}.{_rename_first(inner, {'conv_norm_out': 'norm_out'})}"
    side, level, kind, rest = block[1], int(block[2]), block[3], block[5]
    # The original numbers the decoder's levels from the finest, diffusers from the coarsest.
    place = f"{half}.{side}.{level if side == 'down' else levels - 1 - level}"
    if kind == "resnets":
        return f"{place}.block.{block[4]}.{_rename_first(rest, {'conv_shortcut': 'nin_shortcut'})}"
    return f"{place}.{side}sample.{rest}"


def ldm_names(part: PartName, names: Iterable[str], config: Mapping[str, Any]) -> dict[str, str]:
    """Map the tensor names of a diffusers module to those of an original checkpoint.

    Parameters
    ----------
    part
        Which module: ``"text_encoder"``, ``"unet"`` or ``"vae"``.
    names
        Names in the module's ``state_dict()``.
    config
        The module's configuration: ``layers_per_block`` and ``up_block_types`` of a U-Net, ``block_out_channels``
        of an autoencoder, nothing of a text encoder.

    Returns
    -------
    dict
        The original name, prefix included, for each name.

    """
    prefix = PREFIXES[part]
    if part == "text_encoder":
        return {name: prefix + name.removeprefix("text_model.") for name in names}
    if part == "vae":
        levels = len(config["block_out_channels"])
        return {name: prefix + _vae_name(name, levels) for name in names}
    layers, up_types = int(config["layers_per_block"]), tuple(config["up_block_types"])
    return {name: prefix + _unet_name(name, layers, up_types) for name in names}


def ema_name(original: str) -> str:
    """Name under which the averaged copy of ``model.diffusion_model.*`` is kept (LitEma of the original code)."""
    return EMA_PREFIX + original.removeprefix("model.").replace(".", "")
