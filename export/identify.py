"""Telling what a file is, so that what is not Stable Diffusion v1 is refused by its name."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final, Literal

from ..errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

Container = Literal["safetensors", "zip", "pickle"]
Naming = Literal["ldm", "diffusers"]

_LFS: Final = b"version https://git-lfs.github.com/spec/"

_ONLY: Final = "sdrt builds Stable Diffusion v1"

_STARTS: Final[tuple[tuple[bytes, str], ...]] = (
    (b"GGUF", f"is a GGUF file, whose weights are quantised for another program: {_ONLY} from .safetensors or .ckpt"),
    (b"\x1f\x8b", "is compressed with gzip: unpack it first"),
    (b"7z\xbc\xaf", "is a 7-Zip archive: unpack it first"),
    (b"Rar!", "is a RAR archive: unpack it first"),
    (b"\x89HDF", "is an HDF5 file (Keras): take the model as .safetensors or .ckpt"),
    (b"\x89PNG", "is a PNG picture, not a checkpoint"),
    (b"\xff\xd8\xff", "is a JPEG picture, not a checkpoint"),
    (b"{", "is JSON text, not a checkpoint"),
)

_FAMILIES: Final[tuple[tuple[str, str], ...]] = (
    # The first that fits decides, so the particular comes before the general.
    (r"conditioner\.embedders\.|.*add_embedding\.|text_encoder_2\.|.*\.label_emb\.", "Stable Diffusion XL"),
    (r".*joint_blocks\.|.*joint_transformer_blocks", "Stable Diffusion 3"),
    (r".*double_blocks\.|.*single_transformer_blocks\.", "Flux"),
    (r"cond_stage_model\.model\.", "Stable Diffusion 2 (its text encoder is OpenCLIP)"),
    (r".*(lora_(up|down|unet|te|A|B)|lora\.(up|down))|.*\.(hada|lokr)_w1", "a bare LoRA, which changes a model"),
    (r"control_model\.|.*input_hint_block\.|.*controlnet_", "a ControlNet, which steers a model"),
    (r"string_to_(token|param)|emb_params$|clip_[lg]$", "a textual inversion embedding: new words for a model"),
    (r".*motion_modules\.|.*temporal_transformer", "an AnimateDiff motion module"),
    (r"image_proj(_model)?\.|ip_adapter\.", "an IP-Adapter, which steers a model"),
)

_BARE: Final[tuple[tuple[str, str, str], ...]] = (
    # What the names start with, what it is, what is missing.
    (r"(encoder|decoder)\.(conv_in|mid|down|up)|quant_conv", "a bare VAE", "the U-Net and the text encoder"),
    (r"(input_blocks|middle_block|output_blocks)\.", "a bare U-Net", "the VAE and the text encoder"),
    (r"(down_blocks|mid_block|up_blocks)\.", "a bare U-Net", "the VAE and the text encoder"),
    (r"(text_model\.)?(encoder\.layers|embeddings)\.", "a bare text encoder", "the U-Net and the VAE"),
)


def _refuse_placeholder(path: Path, head: bytes, size: int) -> None:
    """Refuse what downloads leave in the place of the file."""
    if not head:
        raise CheckpointError(f"{path} is empty: expected a checkpoint, found 0 bytes; download it again")
    if head.startswith(_LFS):
        whole = re.search(rb"\nsize (\d{1,20})\n", head)
        expected = f"expected {whole[1].decode()} bytes" if whole else "expected a checkpoint"
        raise CheckpointError(
            f"{path} is a Git LFS pointer: {expected}, found {size}; run git lfs pull in its repository"
        )
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html", b"<?xml")):
        raise CheckpointError(f"{path} is a web page of {size} bytes, not a checkpoint: download the file itself")


def sniff(path: Path) -> Container:
    """Tell the container format of a file from its first bytes.

    Raises
    ------
    CheckpointError
        If it is none that holds a checkpoint; the message says what it is instead.

    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    _refuse_placeholder(path, head, size)
    for start, message in _STARTS:
        if head.startswith(start):
            raise CheckpointError(f"{path} {message}")
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    if head[0] == 0x80 and len(head) > 1 and 2 <= head[1] <= 5 and head[8:9] != b"{":
        return "pickle"
    if head[8:9] == b"{":
        return "safetensors"
    if size < 9:
        raise CheckpointError(f"{path} is cut short: it has {size} bytes; download it again")
    raise CheckpointError(f"{path} is no checkpoint that sdrt knows: it begins with {head[:8].hex(' ')}")


def _any(pattern: str, names: Iterable[str]) -> bool:
    matches = re.compile(pattern).match
    return any(matches(name) for name in names)


def recognise(shapes: Mapping[str, tuple[int, ...]], where: str, top: Iterable[str] = ()) -> Naming:
    """Tell how a whole checkpoint names its tensors.

    Parameters
    ----------
    shapes
        Each tensor's shape.
    where
        What to call the file in messages.
    top
        Names at the top of a pickle, beside the weights.

    Returns
    -------
    str
        ``"ldm"`` for the original names, ``"diffusers"`` for ``unet.``, ``vae.`` and ``text_encoder.`` before
        those of diffusers.

    Raises
    ------
    CheckpointError
        If it is something other than a whole Stable Diffusion v1.

    """
    names = [*shapes, *top]
    for pattern, family in _FAMILIES:
        if _any(pattern, names):
            raise CheckpointError(f"{where} is {family}: {_ONLY} only, from a whole checkpoint")
    if _any(r"model\.diffusion_model\.", names):
        found: Naming = "ldm"
        first, context = "model.diffusion_model.input_blocks.0.0.weight", _ldm_context(shapes)
        parts = {"VAE": r"first_stage_model\.", "text encoder": r"cond_stage_model\."}
    elif _any(r"unet\.", names):
        found = "diffusers"
        first, context = "unet.conv_in.weight", _diffusers_context(shapes)
        parts = {"VAE": r"vae\.", "text encoder": r"text_encoder\."}
    else:
        _refuse_part(shapes, names, where)
    missing = [part for part, pattern in parts.items() if not _any(pattern, names)]
    if missing:
        raise CheckpointError(f"{where} is a bare U-Net: the {' and the '.join(missing)} missing; give the whole model")
    refuse_variant(_channels(shapes.get(first, ())), context, where)
    return found


def _refuse_part(shapes: Mapping[str, tuple[int, ...]], names: list[str], where: str) -> Any:
    for pattern, what, missing in _BARE:
        if _any(pattern, names):
            raise CheckpointError(f"{where} is {what}: {missing} are missing; give the whole model")
    if len(shapes) == 1 and len(next(iter(shapes.values()))) <= 2:
        raise CheckpointError(f"{where} is a textual inversion embedding: new words for a model; {_ONLY} only")
    some = ", ".join(repr(name[:60]) for name in names[:3]) or "none"
    raise CheckpointError(f"{where} is not Stable Diffusion v1: none of its {len(names)} names are known ({some})")


def _channels(shape: tuple[int, ...]) -> int | None:
    return shape[1] if len(shape) == 4 else None


def _ldm_context(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    shape = shapes.get("model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight", ())
    return shape[1] if len(shape) == 2 else None


def _diffusers_context(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    shape = shapes.get("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight", ())
    return shape[1] if len(shape) == 2 else None


def refuse_variant(channels: object, context: object, where: str) -> None:
    """Refuse what has the architecture of Stable Diffusion but not the meaning of v1.

    Parameters
    ----------
    channels
        Input channels of the U-Net.
    context
        Width of the text embeddings that it attends to.
    where
        What to call it in messages.

    """
    kinds = {
        9: "an inpainting model",
        8: "an image-editing model (InstructPix2Pix)",
        5: "a depth model (Stable Diffusion 2)",
        7: "an upscaler",
    }
    if isinstance(channels, int) and channels != 4:
        kind = kinds.get(channels, "of another kind")
        raise CheckpointError(f"{where} is {kind}: its U-Net takes {channels} channels, expected 4; {_ONLY} only")
    if context == 1024:
        raise CheckpointError(f"{where} is Stable Diffusion 2: its text width is 1024, expected 768; {_ONLY} only")
    if context == 2048:
        raise CheckpointError(f"{where} is Stable Diffusion XL: its text width is 2048, expected 768; {_ONLY} only")


def recognise_pipeline(index: Mapping[str, Any], where: str) -> None:
    """Refuse a diffusers folder whose ``model_index.json`` is of another pipeline.

    Raises
    ------
    CheckpointError
        Unless it is a ``StableDiffusionPipeline`` with diffusers' own U-Net, autoencoder and CLIP text encoder.

    """
    found = index.get("_class_name")
    if found != "StableDiffusionPipeline":
        raise CheckpointError(f"{where} is for {str(found)[:60]!r}, expected 'StableDiffusionPipeline'; {_ONLY} only")
    for part, expected in (
        ("unet", "UNet2DConditionModel"),
        ("vae", "AutoencoderKL"),
        ("text_encoder", "CLIPTextModel"),
    ):
        entry = index.get(part)
        name = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
        if name != expected:
            raise CheckpointError(f"{where} has the {part} {str(name)[:60]!r}, expected {expected!r}; {_ONLY} only")
