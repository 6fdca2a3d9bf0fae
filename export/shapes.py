"""The configuration of a network, worked out from the shapes of its weights.

A single file carries no configuration. Widths, depths and channels follow from shapes; what does not is taken as Stable
Diffusion v1 has it: 8 heads in the U-Net, and as many in the text encoder as its width has 64s, at least one.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError
from .ldm import PREFIXES, PartName

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .identify import Naming


@dataclass(frozen=True)
class _Shapes:
    """The shapes of one part's tensors, by their names without the part's prefix."""

    shapes: Mapping[str, tuple[int, ...]]
    prefix: str
    where: str

    def __contains__(self, name: str) -> bool:
        return self.prefix + name in self.shapes

    def get(self, name: str, dimensions: int) -> tuple[int, ...]:
        shape = self.shapes.get(self.prefix + name)
        if shape is None:
            raise CheckpointError(f"{self.where} is incomplete: its tensor {self.prefix + name!r} is missing")
        if len(shape) != dimensions or min(shape, default=0) < 1:
            raise CheckpointError(
                f"{self.where}: tensor {self.prefix + name!r} has the shape {list(shape)}, expected {dimensions} "
                "dimensions"
            )
        return shape

    def count(self, pattern: str) -> int:
        """How many of ``pattern.format(0)``, ``pattern.format(1)`` and so on there are in a row."""
        return next(index for index in itertools.count() if pattern.format(index) not in self)

    def dimensions(self, name: str) -> int:
        return len(self.shapes.get(self.prefix + name, ()))


_CONTEXT = "transformer_blocks.0.attn2.to_k.weight"


def _unet_levels(shapes: _Shapes, naming: Naming) -> list[list[str]]:
    """Names of the residual blocks on the way down, level by level, each with the place of its attention."""
    if naming == "diffusers":
        levels = shapes.count("down_blocks.{}.resnets.0.conv2.weight")
        return [
            [
                f"down_blocks.{level}.{{}}.{layer}"
                for layer in range(shapes.count(f"down_blocks.{level}.resnets.{{}}.conv2.weight"))
            ]
            for level in range(levels)
        ]
    found: list[list[str]] = [[]]
    for block in itertools.count(1):
        if f"input_blocks.{block}.0.op.weight" in shapes:
            found.append([])
        elif f"input_blocks.{block}.0.out_layers.3.weight" in shapes:
            found[-1].append(f"input_blocks.{block}.{{}}")
        else:
            return found
    raise AssertionError


def _unet_config(shapes: _Shapes, naming: Naming) -> dict[str, Any]:
    if naming == "ldm":
        resnet, attention, output, first = ("0", "out_layers.3"), "1", "out.2.weight", "input_blocks.0.0.weight"
        middle = "middle_block.1"
    else:
        resnet, attention, output, first = ("resnets", "conv2"), "attentions", "conv_out.weight", "conv_in.weight"
        middle = "mid_block.attentions.0"
    levels = _unet_levels(shapes, naming)
    if not all(levels):
        raise CheckpointError(f"{shapes.where} is not Stable Diffusion v1: a level of its U-Net has no layers")
    attended = [f"{level[0].format(attention)}.{_CONTEXT}" in shapes for level in levels]
    return {
        "in_channels": shapes.get(first, 4)[1],
        "out_channels": shapes.get(output, 4)[0],
        "block_out_channels": tuple(
            shapes.get(f"{level[0].format(resnet[0])}.{resnet[1]}.weight", 4)[0] for level in levels
        ),
        # Levels of unequal depth are no Stable Diffusion v1; the comparison of names that follows says so.
        "layers_per_block": max(map(len, levels)),
        "down_block_types": tuple("CrossAttnDownBlock2D" if here else "DownBlock2D" for here in attended),
        "up_block_types": tuple("CrossAttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attended)),
        "cross_attention_dim": shapes.get(f"{middle}.{_CONTEXT}", 2)[1],
        "attention_head_dim": 8,
        "use_linear_projection": shapes.dimensions(f"{middle}.proj_in.weight") == 2,
    }


def _vae_config(shapes: _Shapes, naming: Naming) -> dict[str, Any]:
    block = (
        "encoder.down.{}.block.{}.conv1.weight" if naming == "ldm" else "encoder.down_blocks.{}.resnets.{}.conv1.weight"
    )
    levels = max(1, shapes.count(block.format("{}", 0)))
    return {
        "in_channels": shapes.get("encoder.conv_in.weight", 4)[1],
        "out_channels": shapes.get("decoder.conv_out.weight", 4)[0],
        "block_out_channels": tuple(shapes.get(block.format(level, 0), 4)[0] for level in range(levels)),
        "layers_per_block": max(1, shapes.count(block.format(0, "{}"))),
        "latent_channels": shapes.get("post_quant_conv.weight", 4)[0],
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
    }


def _text_config(shapes: _Shapes) -> dict[str, Any]:
    vocabulary, width = shapes.get("embeddings.token_embedding.weight", 2)
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "max_position_embeddings": shapes.get("embeddings.position_embedding.weight", 2)[0],
        "intermediate_size": shapes.get("encoder.layers.0.mlp.fc1.weight", 2)[0],
        "num_hidden_layers": shapes.count("encoder.layers.{}.mlp.fc1.weight"),
        "num_attention_heads": max(1, width // 64),
    }


def infer_configs(shapes: Mapping[str, tuple[int, ...]], naming: Naming, where: str) -> dict[PartName, dict[str, Any]]:
    """Work out the configuration of each network from the shapes in one file.

    Parameters
    ----------
    shapes
        Each tensor's shape, by its name in the file.
    naming
        ``"ldm"``, or ``"diffusers"`` for ``unet.``, ``vae.`` and ``text_encoder.text_model.`` before those names.
    where
        What to call the file in messages.

    Raises
    ------
    CheckpointError
        If a tensor that the others follow from is missing or has another number of dimensions.

    """
    prefixes = PREFIXES if naming == "ldm" else DIFFUSERS_PREFIXES
    parts = {part: _Shapes(shapes, prefix, where) for part, prefix in prefixes.items()}
    return {
        "text_encoder": _text_config(parts["text_encoder"]),
        "unet": _unet_config(parts["unet"], naming),
        "vae": _vae_config(parts["vae"], naming),
    }


DIFFUSERS_PREFIXES: dict[PartName, str] = {
    "text_encoder": "text_encoder.text_model.",
    "unet": "unet.",
    "vae": "vae.",
}
"""What one file with all three diffusers modules puts before their tensors."""
