"""What is not Stable Diffusion v1 is told what it is."""

from __future__ import annotations

import json
import shutil
import zipfile
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdrt.errors import CheckpointError
from sdrt.export.checkpoint import read_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 4265380512\n"


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(str(path))
    message = str(caught.value)
    assert "\n" not in message
    assert path.name in message
    return message


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty: expected a checkpoint, found 0 bytes"),
        (LFS, "is a Git LFS pointer: expected 4265380512 bytes, found 135; run git lfs pull"),
        (b"\n<!DOCTYPE html><html>Sign in</html>", "is a web page of 36 bytes"),
        (b"<HTML><body>", "is a web page"),
        (b"GGUF\x03\x00\x00\x00" + bytes(100), "is a GGUF file"),
        (b"\x1f\x8b\x08\x00" + bytes(100), "is compressed with gzip"),
        (b'{"error": "Entry not found"}', "is JSON text"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "is a PNG picture"),
        (b"abc", "is cut short: it has 3 bytes"),
        (b"\x10\x00\x00\x00\x00\x00\x00\x00{", "is cut short: its header ends at byte 24, the file has 9"),
        (b"\xff\xff\xff\xff\xff\xff\xff\x7f{}" + bytes(20), "its header would have 9223372036854775807 bytes"),
        (b"no checkpoint at all", "is no checkpoint that sdrt knows: it begins with 6e 6f 20"),
        (b"PK\x03\x04" + bytes(1000), "is cut short or damaged: a zip archive ends with a directory"),
    ],
)
@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_what_downloads_leave(tmp_path: Path, content: bytes, said: str, suffix: str) -> None:
    path = tmp_path / f"model.{suffix}"
    path.write_bytes(content)
    assert said in refusal(path)


def test_files_that_are_cut_short(tiny_ldm: Path, tiny_ckpt: Path, tmp_path: Path) -> None:
    size = tiny_ldm.stat().st_size
    for keep in (size - 1, size // 2):
        path = tmp_path / "cut.safetensors"
        path.write_bytes(tiny_ldm.read_bytes()[:keep])
        assert f"is cut short: expected {size} bytes, found {keep}" in refusal(path)
    (tmp_path / "cut.safetensors").write_bytes(tiny_ldm.read_bytes()[:100_000])
    assert "is cut short: its header ends at byte" in refusal(tmp_path / "cut.safetensors")
    for keep in (tiny_ckpt.stat().st_size - 100, 1_000_000, 100):
        path = tmp_path / "cut.ckpt"
        path.write_bytes(tiny_ckpt.read_bytes()[:keep])
        assert f"none was found in its {keep} bytes" in refusal(path)


FAMILIES: dict[str, tuple[dict[str, tuple[int, ...]], str]] = {
    "sdxl": ({"conditioner.embedders.0.transformer.x": (2,), "model.diffusion_model.x": (2,)}, "Stable Diffusion XL"),
    "sdxl diffusers": ({"unet.add_embedding.linear_1.weight": (2, 2)}, "Stable Diffusion XL"),
    "sd3": ({"model.diffusion_model.joint_blocks.0.x": (2,)}, "Stable Diffusion 3"),
    "flux": ({"double_blocks.0.img_attn.qkv.weight": (2, 2)}, "Flux"),
    "sd2": ({"cond_stage_model.model.ln_final.weight": (2,), "model.diffusion_model.x": (2,)}, "Stable Diffusion 2"),
    "lora": ({"lora_unet_down_blocks_0_attentions_0.lora_up.weight": (2, 2)}, "a bare LoRA"),
    "lora diffusers": ({"unet.down_blocks.0.attentions.0.to_k.lora_A.weight": (2, 2)}, "a bare LoRA"),
    "controlnet": ({"control_model.input_hint_block.0.weight": (2,)}, "a ControlNet"),
    "controlnet diffusers": (
        {"controlnet_cond_embedding.conv_in.weight": (2,), "conv_in.weight": (2,)},
        "a ControlNet",
    ),
    "inversion": ({"emb_params": (3, 768)}, "a textual inversion embedding"),
    "inversion by token": ({"<cat-toy>": (1, 768)}, "a textual inversion embedding"),
    "vae ldm": ({"encoder.conv_in.weight": (2,), "decoder.mid.attn_1.q.weight": (2,)}, "a bare VAE: the U-Net and"),
    "unet ldm": ({"input_blocks.0.0.weight": (2,)}, "a bare U-Net: the VAE and the text encoder are missing"),
    "unet diffusers": ({"down_blocks.0.x": (2,), "conv_in.weight": (2,)}, "a bare U-Net: the VAE and the text"),
    "unet in a model": ({"model.diffusion_model.out.2.weight": (2,)}, "the VAE and the text encoder missing"),
    "no text": ({"model.diffusion_model.x": (2,), "first_stage_model.x": (2,)}, "the text encoder missing"),
    "text": ({"text_model.encoder.layers.0.x": (2,)}, "a bare text encoder"),
    "something": ({"fc1.weight": (2, 2), "fc2.weight": (2, 2)}, "none of its 2 names are known ('fc1.weight'"),
    "nothing": ({}, "none of its 0 names are known (none)"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_other_models_are_told_what_they_are(tmp_path: Path, family: str) -> None:
    shapes, said = FAMILIES[family]
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "x.safetensors")
    assert said in refusal(tmp_path / "x.safetensors")
    torch.save({"state_dict": tensors}, tmp_path / "x.ckpt")
    assert said in refusal(tmp_path / "x.ckpt")


def test_an_embedding_as_its_training_code_saved_it(tmp_path: Path) -> None:
    contents = {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": {"*": torch.zeros(1, 768)}}
    torch.save(contents, tmp_path / "x.pt")
    assert "a textual inversion embedding" in refusal(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        (
            "input_blocks.0.0.weight",
            lambda old: torch.zeros(len(old), 9, 3, 3),
            "an inpainting model: its U-Net takes 9",
        ),
        ("input_blocks.0.0.weight", lambda old: torch.zeros(len(old), 8, 3, 3), "InstructPix2Pix"),
        (
            "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
            lambda old: torch.zeros(len(old), 1024),
            "Stable Diffusion 2: its text width is 1024",
        ),
        (
            "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight",
            lambda old: torch.zeros(len(old), 7),
            "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight' is [64, 7], expected [64, 64]",
        ),
    ],
)
def test_variants_are_told_by_their_shapes(
    tiny_ldm: Path, tmp_path: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor], said: str
) -> None:
    tensors = load_file(tiny_ldm)
    name = f"model.diffusion_model.{name}"
    tensors[name] = change(tensors[name])
    save_file(tensors, tmp_path / "x.safetensors")
    assert said in refusal(tmp_path / "x.safetensors")


def test_original_files_that_lack_something(tiny_ldm: Path, tmp_path: Path) -> None:
    sound = load_file(tiny_ldm)
    for lost in (
        "model.diffusion_model.input_blocks.0.0.weight",
        "model.diffusion_model.out.2.bias",
        "first_stage_model.decoder.up.3.block.0.conv1.weight",
        "first_stage_model.encoder.down.0.block.0.conv1.weight",
        "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight",
    ):
        save_file({name: tensor for name, tensor in sound.items() if name != lost}, tmp_path / "x.safetensors")
        assert lost in refusal(tmp_path / "x.safetensors")


def test_folders_that_are_no_model(tiny_checkpoint: Path, tmp_path: Path) -> None:
    assert "expected model_index.json, but there is no such file" in refusal(tmp_path)
    for lost in ("unet/config.json", "scheduler/scheduler_config.json", "unet/diffusion_pytorch_model.safetensors"):
        folder = shutil.copytree(tiny_checkpoint, tmp_path / "copy", dirs_exist_ok=True)
        (folder / lost).unlink()
        assert "is incomplete" in refusal(folder)
    assert "it seems to be one part of a model" in refusal(tiny_checkpoint / "unet")
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "lfs")
    (folder / "vae/diffusion_pytorch_model.safetensors").write_bytes(LFS)
    with pytest.raises(CheckpointError, match=r"diffusion_pytorch_model\.safetensors is a Git LFS pointer"):
        read_checkpoint(str(folder))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "FluxPipeline"}))
    with pytest.raises(CheckpointError, match="is for 'FluxPipeline', expected 'StableDiffusionPipeline'"):
        read_checkpoint(str(folder))


def test_a_zip_archive_of_a_folder(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.ckpt", "w") as file:
        file.writestr("model_index.json", "{}")
    assert "not one that torch.save wrote" in refusal(tmp_path / "x.ckpt")
