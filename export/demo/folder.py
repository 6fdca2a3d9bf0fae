"""The trained model as a diffusers folder, laid out like Stable Diffusion v1's on the model hub."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from diffusers import PNDMScheduler

from .autoencoder import LATENT_SCALE

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["write_folder"]

_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def write_folder(path: Path, autoencoder: Any, text_encoder: Any, unet: Any) -> None:
    """Write float16 safetensors and configurations.

    Parameters
    ----------
    path
        The folder; files of the same names are replaced.
    autoencoder, text_encoder, unet
        Trained models; they are converted to float16 in place.

    """
    path.mkdir(parents=True, exist_ok=True)
    autoencoder.register_to_config(scaling_factor=LATENT_SCALE)
    for name, model in (("vae", autoencoder), ("text_encoder", text_encoder), ("unet", unet)):
        model.to(torch.float16).save_pretrained(path / name, safe_serialization=True)
        for weights in (path / name).glob("*.safetensors"):
            weights.chmod(0o644)  # safetensors leaves them to their owner alone
    PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        skip_prk_steps=True,
        set_alpha_to_one=False,
    ).save_pretrained(path / "scheduler")
    (path / "model_index.json").write_text(json.dumps(_INDEX, indent=2) + "\n", encoding="utf-8")
