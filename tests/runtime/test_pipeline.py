"""The pipeline against diffusers' own, with the same weights, prompts, seeds and samplers."""

from __future__ import annotations

import json
import math
import shutil
import threading
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import sdrt
from sdrt.errors import BackendError, BundleCorruptError, InputError, SdrtWarning
from sdrt.export.vocabulary import read_merges, vocabulary
from sdrt.runtime.request import make_request
from sdrt.runtime.samplers import SAMPLERS
from sdrt.runtime.schedule import Schedule

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PROMPT, NEGATIVE = "Great Wall photo", "blurry, low quality"


@pytest.fixture(scope="module")
def pipe(tiny_bundle: Path) -> Iterator[sdrt.Pipeline]:
    with sdrt.load(tiny_bundle, backend="onnxruntime") as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def reference(tiny_checkpoint: Path) -> Any:
    """diffusers' StableDiffusionPipeline on the checkpoint that the bundle was built of."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)  # the layers are so small that a second thread costs more than it gives
    parts = {
        "unet": diffusers.UNet2DConditionModel.from_pretrained(tiny_checkpoint / "unet"),
        "vae": diffusers.AutoencoderKL.from_pretrained(tiny_checkpoint / "vae"),
        "text_encoder": transformers.CLIPTextModel.from_pretrained(tiny_checkpoint / "text_encoder"),
        "scheduler": diffusers.PNDMScheduler.from_pretrained(tiny_checkpoint / "scheduler"),
    }
    # transformers 5 took away a level that diffusers 0.42 still looks for when it skips layers.
    object.__setattr__(parts["text_encoder"], "text_model", parts["text_encoder"])
    tokenizer = transformers.CLIPTokenizer(
        vocab=vocabulary(),
        merges=[tuple(merge.split(" ")) for merge in read_merges()],
        pad_token="<|endoftext|>",
        model_max_length=77,
    )
    pipeline = diffusers.StableDiffusionPipeline(
        **parts, tokenizer=tokenizer, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run_reference(
    reference: Any,
    sampler: str,
    steps: int,
    *,
    guidance: float,
    size: tuple[int, int],
    seed: int,
    images: int = 1,
    negative: str = NEGATIVE,
    **more: Any,
) -> np.ndarray:
    import diffusers

    original = reference.scheduler
    cls = getattr(diffusers, SAMPLERS[sampler].diffusers)
    reference.scheduler = cls.from_config(original.config)
    try:
        result = reference(
            PROMPT,
            negative_prompt=negative,
            num_inference_steps=steps,
            guidance_scale=guidance,
            width=size[0],
            height=size[1],
            num_images_per_prompt=images,
            generator=[torch.Generator().manual_seed(seed + i) for i in range(images)],
            output_type="np",
            **more,
        )
    finally:
        reference.scheduler = original
    return np.asarray(result.images)


def psnr(found: np.ndarray, expected: np.ndarray) -> float:
    square = float(np.mean((found.astype(np.float64) - expected) ** 2))
    return math.inf if square == 0 else -10 * math.log10(square)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    ("steps", "guidance", "size"),
    [
        (1, 7.5, (64, 64)),
        (2, 7.5, (64, 64)),
        (2, 1.0, (96, 64)),
        (7, 5.0, (64, 96)),
        (7, 1.0, (104, 72)),
        (20, 7.5, (64, 64)),
        (20, 1.0, (72, 64)),
        (50, 7.5, (64, 64)),
        (50, 1.0, (64, 64)),
    ],
)
def test_images_are_those_of_diffusers(
    pipe: sdrt.Pipeline, reference: Any, sampler: str, steps: int, guidance: float, size: tuple[int, int]
) -> None:
    seed = 1000 * steps + size[0]
    expected = run_reference(reference, sampler, steps, guidance=guidance, size=size, seed=seed)
    found = pipe(
        PROMPT,
        negative_prompt=NEGATIVE,
        num_inference_steps=steps,
        guidance_scale=guidance,
        width=size[0],
        height=size[1],
        seed=seed,
        sampler=sampler,
        output_type="np",
    )
    assert found[0].shape == (size[1], size[0], 3)
    assert expected[0].std() > 0.01, "a flat picture would prove nothing"
    assert psnr(found[0], expected[0]) >= 60


def test_ddim_with_eta_is_that_of_diffusers(pipe: sdrt.Pipeline, reference: Any) -> None:
    expected = run_reference(reference, "ddim", 8, guidance=3.0, size=(64, 64), seed=5, eta=0.7)
    found = pipe(
        PROMPT,
        negative_prompt=NEGATIVE,
        num_inference_steps=8,
        guidance_scale=3.0,
        width=64,
        height=64,
        seed=5,
        sampler="ddim",
        eta=0.7,
        output_type="np",
    )
    assert psnr(found[0], expected[0]) >= 60


def test_guidance_down_to_a_noise_level_is_that_of_diffusers(pipe: sdrt.Pipeline, reference: Any) -> None:
    """diffusers' own recipe: a callback that takes guidance away after some steps."""
    guided, steps = 4, 9
    table = make_request(pipe.bundle.manifest, PROMPT, num_inference_steps=steps, sampler="euler").table
    sigmas = Schedule.from_config(dict(pipe.bundle.manifest.scheduler)).sigmas_at(table.timesteps)

    def stop(pipeline: Any, index: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if index == guided - 1:
            pipeline._guidance_scale = 0.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
        return tensors

    callback: dict[str, Any] = {
        "callback_on_step_end": stop,
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"],
    }
    expected = run_reference(reference, "euler", steps, guidance=7.5, size=(64, 64), seed=5, **callback)
    options: dict[str, Any] = {
        "negative_prompt": NEGATIVE,
        "num_inference_steps": steps,
        "width": 64,
        "height": 64,
        "seed": 5,
        "sampler": "euler",
        "output_type": "np",
    }
    found = pipe(PROMPT, guidance_interval=(float(sigmas[guided - 1 : guided + 1].mean()), math.inf), **options)
    assert psnr(found[0], expected[0]) >= 60
    assert psnr(found[0], pipe(PROMPT, **options)[0]) < 60


def check_approximation(
    pipe: sdrt.Pipeline, expected: np.ndarray, sampler: str, guidance: float, **approximation: int
) -> None:
    """Eight steps with an approximation are what is expected, and not what they are without."""
    options: dict[str, Any] = {
        "negative_prompt": NEGATIVE,
        "num_inference_steps": 8,
        "guidance_scale": guidance,
        "width": 72,
        "height": 64,
        "seed": 6,
        "sampler": sampler,
        "output_type": "np",
    }
    found = pipe(PROMPT, **options | approximation)
    assert psnr(found[0], expected) >= 60
    assert not np.array_equal(found[0], pipe(PROMPT, **options)[0])


@pytest.mark.parametrize("guidance", [7.5, 1.0])
@pytest.mark.parametrize("sampler", ["ddim", "plms", "dpmpp_2m"])
def test_feature_caching_is_diffusers_with_its_deep_features_kept(
    pipe: sdrt.Pipeline, reference: Any, sampler: str, guidance: float
) -> None:
    """Ma et al. 2023: in two of three steps the last layer takes from below what it took in the first."""
    calls, kept = 0, torch.empty(0)

    def keep(layer: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        nonlocal calls, kept
        hidden, *rest = inputs
        below = layer.in_channels - reference.unet.config.block_out_channels[0]
        if calls % 3 == 0:
            kept = hidden[:, :below].clone()
        calls += 1
        return (torch.cat([kept, hidden[:, below:]], dim=1), *rest)

    hook = reference.unet.up_blocks[-1].resnets[-1].register_forward_pre_hook(keep)
    try:
        expected = run_reference(reference, sampler, 8, guidance=guidance, size=(72, 64), seed=6)
    finally:
        hook.remove()
    check_approximation(pipe, expected[0], sampler, guidance, cache_interval=3)


@pytest.mark.parametrize(("sampler", "guidance"), [("ddim", 7.5), ("dpmpp_2m", 1.0)])
def test_encoder_reuse_is_diffusers_with_all_that_its_encoder_gave_kept(
    pipe: sdrt.Pipeline, reference: Any, sampler: str, guidance: float
) -> None:
    """Li et al. 2023: in two of three steps the decoder goes on from what the encoder found in the first."""
    calls: dict[Any, int] = Counter()
    kept: dict[Any, Any] = {}

    def keep(layer: Any, _inputs: tuple[Any, ...], output: Any) -> Any:
        if calls[layer] % 3 == 0:
            kept[layer] = output
        calls[layer] += 1
        return kept[layer]

    unet = reference.unet
    hooks = [layer.register_forward_hook(keep) for layer in (unet.conv_in, *unet.down_blocks, unet.mid_block)]
    try:
        expected = run_reference(reference, sampler, 8, guidance=guidance, size=(72, 64), seed=6)
    finally:
        for hook in hooks:
            hook.remove()
    check_approximation(pipe, expected[0], sampler, guidance, encoder_interval=3)


@pytest.mark.parametrize("sampler", ["plms", "euler_a"])
def test_a_batch_is_that_of_diffusers_and_of_single_calls(pipe: sdrt.Pipeline, reference: Any, sampler: str) -> None:
    options: dict[str, Any] = {
        "num_inference_steps": 4,
        "width": 64,
        "height": 64,
        "sampler": sampler,
        "output_type": "np",
    }
    batch = pipe(PROMPT, num_images_per_prompt=3, seed=7, **options)
    expected = run_reference(reference, sampler, 4, guidance=7.5, size=(64, 64), seed=7, images=3, negative="")
    for image, (found, wanted) in enumerate(zip(batch, expected, strict=True)):
        assert psnr(found, wanted) >= 60
        (alone,) = pipe(PROMPT, seed=7 + image, **options)
        assert psnr(found, alone) >= 80
    assert psnr(batch[0], batch[1]) < 40


@pytest.mark.parametrize("clip_skip", [0, 1])
def test_token_ids_and_embeddings_are_those_of_the_original(
    pipe: sdrt.Pipeline, reference: Any, clip_skip: int
) -> None:
    texts = [PROMPT, "", "a photo of an astronaut riding a horse on mars", "ein Bär, 東京 🚀"]
    ids = pipe.tokenizer.encode(texts)
    tokens = reference.tokenizer(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    assert np.array_equal(ids, tokens.input_ids.numpy())
    expected, _ = reference.encode_prompt(texts, "cpu", 1, False, clip_skip=clip_skip or None)
    found = pipe.embed(texts, clip_skip=clip_skip)
    np.testing.assert_allclose(found, expected.detach().numpy(), atol=2e-5)


def test_clip_skip_changes_the_image_as_in_diffusers(pipe: sdrt.Pipeline, reference: Any) -> None:
    options: dict[str, Any] = {"num_inference_steps": 3, "width": 64, "height": 64, "output_type": "np", "seed": 1}
    plain, skipped = pipe(PROMPT, **options)[0], pipe(PROMPT, clip_skip=1, **options)[0]
    expected = run_reference(reference, "plms", 3, guidance=7.5, size=(64, 64), seed=1, negative="", clip_skip=1)
    assert psnr(skipped, expected[0]) >= 60
    assert not np.array_equal(plain, skipped)


def test_one_seed_gives_one_image(pipe: sdrt.Pipeline) -> None:
    options: dict[str, Any] = {"num_inference_steps": 2, "width": 64, "height": 64, "output_type": "np"}
    first, again, other = (pipe(PROMPT, seed=seed, **options)[0] for seed in (3, 3, 4))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_given_latents_take_the_place_of_the_seeds(pipe: sdrt.Pipeline) -> None:
    options: dict[str, Any] = {"num_inference_steps": 2, "width": 64, "height": 64, "output_type": "latent"}
    noise = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(11))
    from_seed = pipe(PROMPT, seed=11, **options)[0]
    np.testing.assert_allclose(pipe(PROMPT, latents=noise, **options)[0], from_seed, atol=2e-4)
    assert from_seed.shape == (4, 8, 8)


def test_steps_are_a_generator_of_what_the_call_does(pipe: sdrt.Pipeline) -> None:
    options: dict[str, Any] = {"num_inference_steps": 5, "width": 64, "height": 64, "seed": 2}
    steps = list(pipe.steps(PROMPT, **options))
    assert [(step.index, step.total) for step in steps] == [(index, 6) for index in range(6)]  # PLMS: one more
    whole = pipe(PROMPT, output_type="np", **options)
    assert np.array_equal(pipe.decode(steps[-1].latents)[0], whole[0])
    early = pipe.steps(PROMPT, **options)
    next(early)
    early.close()


def test_the_callback_sees_each_step_and_may_change_the_latents(pipe: sdrt.Pipeline) -> None:
    options: dict[str, Any] = {"num_inference_steps": 4, "width": 64, "height": 64, "seed": 2, "sampler": "euler"}
    seen = []

    def watch(pipeline: sdrt.Pipeline, index: int, timestep: float, values: dict[str, Any]) -> dict[str, Any]:
        assert pipeline is pipe
        seen.append((index, timestep))
        return values

    watched = pipe(PROMPT, callback_on_step_end=watch, output_type="latent", **options)
    assert [index for index, _ in seen] == [0, 1, 2, 3]
    assert [timestep for _, timestep in seen] == sorted((timestep for _, timestep in seen), reverse=True)
    assert np.array_equal(watched[0], pipe(PROMPT, output_type="latent", **options)[0])

    def wipe(_pipe: object, index: int, _timestep: float, values: dict[str, Any]) -> dict[str, Any]:
        return {"latents": np.zeros_like(values["latents"])} if index == 3 else values

    assert not pipe(PROMPT, callback_on_step_end=wipe, output_type="latent", **options)[0].any()


def test_threads_get_the_images_that_they_would_get_alone(pipe: sdrt.Pipeline) -> None:
    options: dict[str, Any] = {"num_inference_steps": 3, "width": 64, "height": 64, "output_type": "np"}
    alone = {seed: pipe(f"picture {seed}", seed=seed, **options)[0] for seed in range(4)}
    together: dict[int, np.ndarray] = {}

    def work(seed: int) -> None:
        together[seed] = pipe(f"picture {seed}", seed=seed, **options)[0]

    threads = [threading.Thread(target=work, args=(seed,)) for seed in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, image in alone.items():
        assert np.array_equal(together[seed], image)


def test_pil_images_say_how_they_were_made(pipe: sdrt.Pipeline) -> None:
    (image,) = pipe(PROMPT, num_inference_steps=1, width=72, height=64, seed=9)
    assert image.size == (72, 64)
    assert image.mode == "RGB"
    assert "Seed: 9" in image.info["parameters"]


def test_several_prompts_have_an_image_each(pipe: sdrt.Pipeline) -> None:
    options: dict[str, Any] = {"num_inference_steps": 2, "width": 64, "height": 64, "output_type": "np"}
    both = pipe(["a cat", "a dog"], seed=3, **options)
    assert psnr(both[1], pipe("a dog", seed=4, **options)[0]) >= 80


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"height": 100}, "height is 100: expected a multiple of 8, such as 96 or 104"),
        ({"width": 0}, "width is 0"),
        ({"width": 8.5}, "width is 8.5"),
        ({"width": 100_000}, "width is 100000: expected 8 to 4096"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"num_inference_steps": -3}, "num_inference_steps is -3"),
        ({"num_inference_steps": 1001}, "num_inference_steps is 1001"),
        ({"num_inference_steps": 2.5}, "num_inference_steps is 2.5"),
        ({"guidance_scale": math.nan}, "guidance scale is nan"),
        ({"guidance_scale": math.inf}, "guidance scale is inf"),
        ({"guidance_scale": -1.0}, "guidance scale is -1.0"),
        ({"guidance_scale": "7"}, "guidance scale is '7'"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"seed": 2**64}, "seed is"),
        ({"seed": 2**64 - 1, "num_images_per_prompt": 2}, "seed is"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt is 0"),
        ({"num_images_per_prompt": 33}, "33 images at once are too many for this bundle: expected at most 32"),
        ({"sampler": "magic"}, "sampler is 'magic'"),
        ({"eta": -1.0}, "eta is -1.0"),
        ({"timestep_spacing": "random"}, "spacing is 'random'"),
        ({"clip_skip": 2}, "clip skip is 2: expected a whole number from 0 to 1"),
        ({"clip_skip": -1}, "clip skip is -1"),
        ({"negative_prompt": 3}, "negative_prompt is 3"),
        ({"negative_prompt": ["a", "b"]}, "2 negative prompts for 1 prompts"),
        ({"latents": np.zeros((1, 4, 3, 3))}, "latents have the shape"),
        ({"latents": np.full((1, 4, 64, 64), np.nan)}, "not finite"),
        ({"latents": "noise"}, "latents are no array"),
        ({"output_type": "jpeg"}, "output type is 'jpeg'"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(pipe: sdrt.Pipeline, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        pipe(PROMPT, **arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("prompt", [7, None, [], ["a", 3], "nul\0inside", "half \ud83d pair"])
def test_prompts_that_are_no_text_are_refused(pipe: sdrt.Pipeline, prompt: Any) -> None:
    with pytest.raises(InputError):
        pipe(prompt, num_inference_steps=1, width=64, height=64)


@pytest.mark.parametrize("prompt", ["", "🚀" * 20, "مرحبا بالعالم", "a\nb\tc", "é" + "e\u0301"])
def test_unusual_prompts_are_handled(pipe: sdrt.Pipeline, prompt: str) -> None:
    (image,) = pipe(prompt, num_inference_steps=1, width=64, height=64, output_type="np")
    assert np.isfinite(image).all()


def test_a_long_prompt_is_cut_with_a_warning_that_shows_what_was_dropped(pipe: sdrt.Pipeline) -> None:
    with pytest.warns(SdrtWarning, match="dropped 'tail"):
        pipe("word " * 75 + "tail " * 2000, num_inference_steps=1, width=64, height=64)


def test_a_closed_pipeline_says_so(tiny_bundle: Path) -> None:
    pipeline = sdrt.load(tiny_bundle)
    pipeline.close()
    with pytest.raises(InputError, match="closed"):
        pipeline(PROMPT, num_inference_steps=1, width=64, height=64)


def test_altered_weights_are_found_before_they_are_loaded(tiny_bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_bundle, copy)
    weights = copy / "unet.onnx.data"
    with weights.open("r+b") as file:
        file.seek(1000)
        byte = file.read(1)
        file.seek(1000)
        file.write(bytes([byte[0] ^ 1]))
    with sdrt.load(copy) as pipeline, pytest.raises(BundleCorruptError, match=r"unet\.onnx\.data has SHA-256"):
        pipeline(PROMPT, num_inference_steps=1, width=64, height=64)


def test_a_bundle_for_a_backend_that_is_not_here_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_bundle, copy)
    manifest = json.loads((copy / "bundle.json").read_text())
    manifest["backend"]["name"] = "abacus"
    (copy / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(BackendError, match="abacus"):
        sdrt.load(copy)
