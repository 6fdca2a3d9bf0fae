"""The demo model: a small latent diffusion model of Stable Diffusion v1's architecture, trained on scenes drawn here.

No weights can be assumed on a fresh machine, so this one ships with the project. It knows six shapes, ten colours, two
sizes and five places, and the pictures it makes can be judged by counting pixels.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["model_folder"]


def model_folder() -> Path:
    """Return the diffusers folder of the shipped checkpoint (fp16 safetensors and its model card)."""
    return Path(__file__).parent / "model"
