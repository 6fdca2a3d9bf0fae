"""The demo model's networks: Stable Diffusion v1's classes and block types, a few hundred times smaller."""

from __future__ import annotations

from typing import Any, Final

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from .scenes import IMAGE_SIZE

__all__ = ["TEXT_WIDTH", "new_autoencoder", "new_text_encoder", "new_unet"]

TEXT_WIDTH: Final = 40
_VOCABULARY: Final = 49408
_DOWN: Final = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")
_UP: Final = ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")


def new_autoencoder() -> Any:
    """Return an untrained AutoencoderKL: factor 8, 4 latent channels."""
    model = AutoencoderKL(
        sample_size=IMAGE_SIZE,
        block_out_channels=(16, 32, 48, 48),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
    )
    _open_path(model)
    return model


def _open_path(model: Any) -> None:
    """Start an autoencoder as one that keeps the mean colour of every 8x8 patch.

    Group normalisation takes a flat picture's colour away, and from a random start it is long before any colour is
    smuggled past it. So the first channels of the residual stream carry red, green and blue unchanged from end to end,
    the residual branches start at zero, and biases on the other channels steady each group's deviation, so that the two
    last normalisations are nearly linear.
    """
    with torch.no_grad():
        for name, module in model.named_modules():
            if name.endswith(("conv2", "to_out.0")):
                module.weight.zero_()
                module.bias.zero_()
            elif name.endswith(("conv_in", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv")):
                _pass_colours(module, average=name.endswith("downsamplers.0.conv"))
        for conv in (model.encoder.conv_out, model.decoder.conv_out):
            _pass_colours(conv, average=False)
            conv.bias.zero_()
        for conv in (model.quant_conv, model.post_quant_conv):
            torch.nn.init.eye_(conv.weight.flatten(1))
            conv.bias.zero_()
        model.quant_conv.bias[4:] = -6  # little noise: with a variance of 1 latents carry nothing at first


def _pass_colours(conv: Any, *, average: bool) -> None:
    weight, bias = conv.weight, conv.bias
    weight[:3] = 0
    weight[3:, :3] *= 3  # the other channels start as features of the colours
    bias.normal_(-0.5, 1.0)
    bias[:3] = 0
    for channel in range(3):
        if average:
            weight[channel, channel, :2, :2] = 0.25
        else:
            weight[channel, channel, weight.shape[2] // 2, weight.shape[3] // 2] = 1


def new_unet() -> Any:
    """Return an untrained UNet2DConditionModel for 4x16x16 latents."""
    return UNet2DConditionModel(
        sample_size=IMAGE_SIZE // 8,
        block_out_channels=(48, 64, 80, 80),
        down_block_types=_DOWN,
        up_block_types=_UP,
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,  # as in SD v1's configuration, this is the number of heads
    )


def new_text_encoder() -> Any:
    """Return an untrained CLIPTextModel over the whole BPE vocabulary, its token table all zeros.

    Only rows of tokens that captions use are ever changed; the others stay zero and cost next to nothing when packed.
    """
    model = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=_VOCABULARY,
            hidden_size=TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=5,
            max_position_embeddings=77,
            hidden_act="quick_gelu",
            bos_token_id=49406,
            eos_token_id=49407,
            pad_token_id=49407,
        )
    )
    with torch.no_grad():
        model.get_input_embeddings().weight.zero_()
    return model
