"""diffusers as a peer is diffusers as it is: the pictures that its own loading of the same folder makes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import diffusers
import numpy as np
import pytest
import torch
import transformers

from sdrt.errors import CheckpointError
from sdrt.export.peers import Diffusers, Precision, multiplier
from sdrt.export.vocabulary import read_merges, vocabulary

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

PROMPT = "a castle of glass"


def make(checkpoint: Path, precision: Precision = "fp32", *, clip_skip: int = 0) -> Diffusers:
    return Diffusers(
        str(checkpoint),
        scheduler="EulerDiscreteScheduler",
        ema=False,
        clip_skip=clip_skip,
        precision=precision,
        compiled=False,
    )


def small_picture(peer: Diffusers) -> NDArray[np.float32]:
    return peer.generate(PROMPT, steps=2, guidance_scale=5.0, width=64, height=64, images=1, seed=7)


@pytest.fixture(scope="module")
def peer(tiny_checkpoint: Path) -> Diffusers:
    return make(tiny_checkpoint)


@pytest.fixture(scope="module")
def original(tiny_checkpoint: Path) -> Any:
    """The pipeline of what `from_pretrained` makes of the folder."""
    pipeline = diffusers.StableDiffusionPipeline(
        unet=diffusers.UNet2DConditionModel.from_pretrained(tiny_checkpoint / "unet"),
        vae=diffusers.AutoencoderKL.from_pretrained(tiny_checkpoint / "vae"),
        text_encoder=transformers.CLIPTextModel.from_pretrained(tiny_checkpoint / "text_encoder"),
        scheduler=diffusers.EulerDiscreteScheduler.from_pretrained(tiny_checkpoint / "scheduler"),
        tokenizer=transformers.CLIPTokenizer(
            vocab=vocabulary(),
            merges=[tuple(merge.split(" ")) for merge in read_merges()],
            pad_token="<|endoftext|>",
            model_max_length=77,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_pictures_are_those_of_diffusers(peer: Diffusers, original: Any) -> None:
    found = peer.generate(PROMPT, steps=2, guidance_scale=5.0, width=64, height=96, images=2, seed=7)
    expected = original(
        PROMPT,
        num_inference_steps=2,
        guidance_scale=5.0,
        width=64,
        height=96,
        num_images_per_prompt=2,
        generator=[torch.Generator().manual_seed(seed) for seed in (7, 8)],
        output_type="np",
    ).images
    assert found.shape == (2, 96, 64, 3)
    np.testing.assert_array_equal(found, expected)


def test_a_step_is_the_network_with_its_guidance(peer: Diffusers, original: Any) -> None:
    noise = np.random.default_rng(0)
    latents = noise.standard_normal((1, 4, 8, 8), np.float32)
    embeddings = noise.standard_normal((2, 77, original.unet.config.cross_attention_dim), np.float32)
    with torch.inference_mode():
        rows = [
            original.unet(torch.from_numpy(latents), 500.0, torch.from_numpy(row[None]), return_dict=False)[0].numpy()
            for row in embeddings
        ]
    peer.prepare(latents, embeddings)
    guided = peer.predict(500.0, 3.0)
    np.testing.assert_allclose(guided, rows[0] + 3.0 * (rows[1] - rows[0]), atol=1e-4)
    peer.prepare(latents, embeddings[1:])
    np.testing.assert_allclose(peer.predict(500.0, 3.0), rows[1], atol=1e-4)


def test_latents_are_decoded_as_diffusers_does(peer: Diffusers, original: Any) -> None:
    latents = np.random.default_rng(0).standard_normal((1, 4, 8, 8), np.float32)
    with torch.inference_mode():
        (expected,) = original.vae.decode(
            torch.from_numpy(latents) / original.vae.config.scaling_factor, return_dict=False
        )
    np.testing.assert_array_equal(peer.decode(latents), expected.numpy())


def test_bf16_is_bf16_with_channels_last(tiny_checkpoint: Path, peer: Diffusers) -> None:
    narrow = make(tiny_checkpoint, "bf16")
    for module in (narrow._pipeline.unet, narrow._pipeline.vae, narrow._pipeline.text_encoder):
        assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
    weight = narrow._pipeline.unet.mid_block.resnets[0].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()
    found, exact = small_picture(narrow), small_picture(peer)
    assert found.dtype == np.float32
    assert 0 < float(np.abs(found - exact).mean()) < 0.05


def test_layers_of_the_text_encoder_are_left_out(tiny_checkpoint: Path, peer: Diffusers) -> None:
    skipping = make(tiny_checkpoint, clip_skip=1)
    skipping.embed(PROMPT)
    assert np.abs(small_picture(skipping) - small_picture(peer)).max() > 1e-4


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no diffusers folder"):
        make(tmp_path)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_multiplying_takes_time(precision: Precision) -> None:
    assert multiplier(64, precision)() > 0
