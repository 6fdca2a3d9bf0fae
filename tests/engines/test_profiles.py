"""Sizes and counts of images to optimisation profiles."""

from __future__ import annotations

import pytest

from sdrt.engines.manifest import Component, DimRange, InputRange, TensorSpec
from sdrt.engines.profiles import check_sizes, profiles_of, tensors_of
from sdrt.errors import InputError

BATCH, HEIGHT, WIDTH = DimRange("batch", 1, 64), DimRange("height", 1, 512), DimRange("width", 1, 512)
IMAGE = (BATCH, 3, DimRange("image_height", 8, 4096, 8), DimRange("image_width", 8, 4096, 8))
LATENTS = TensorSpec("latents", "float32", (BATCH, 4, HEIGHT, WIDTH))
TEXT = TensorSpec("text_embeddings", "float32", (BATCH, 77, 768))


def part(name: str, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> Component:
    return Component(name, "fp16", (), inputs, outputs, None)


UNET = part("unet", (LATENTS, TensorSpec("timestep", "float32", (1,)), TEXT), (LATENTS,))
DECODER = part("vae_decoder", (LATENTS,), (TensorSpec("image", "float32", IMAGE),))
ENCODER = part("vae_encoder", (TensorSpec("image", "float32", IMAGE),), (LATENTS,))
CLIP = part("text_encoder", (TensorSpec("input_ids", "int64", (BATCH, 77)),), (TEXT,))


def shapes(component: Component, name: str, **given: object) -> list[tuple[tuple[int, ...], ...]]:
    options = {"sizes": [(512, 512)], "images": [1], "dynamic": False} | given
    found = profiles_of(component, options["sizes"], options["images"], 8, dynamic=options["dynamic"])  # type: ignore[arg-type]  # the test's own
    return [(each[name].min, each[name].opt, each[name].max) for each in found]


def test_the_unet_has_a_fixed_profile_with_guidance_and_one_without() -> None:
    assert shapes(UNET, "latents") == [((2, 4, 64, 64),) * 3, ((1, 4, 64, 64),) * 3]
    assert shapes(UNET, "text_embeddings") == [((2, 77, 768),) * 3, ((1, 77, 768),) * 3]
    assert shapes(UNET, "timestep") == [((1,),) * 3] * 2


def test_counts_that_share_a_batch_share_a_profile() -> None:
    assert [best[0] for _, best, _ in shapes(UNET, "latents", images=[1, 2, 4])] == [2, 4, 8, 1]


def test_width_comes_first_in_a_size_and_last_in_a_shape() -> None:
    assert shapes(DECODER, "latents", sizes=[(768, 512), (768, 512)]) == [((1, 4, 64, 96),) * 3]
    assert shapes(ENCODER, "image", sizes=[(768, 512)]) == [((1, 3, 512, 768),) * 3]


def test_the_text_encoder_takes_one_to_twice_the_images() -> None:
    assert shapes(CLIP, "input_ids", images=[1, 4]) == [((1, 77), (2, 77), (8, 77))]


def test_a_dynamic_profile_spans_what_was_asked_for() -> None:
    spans = shapes(UNET, "latents", sizes=[(512, 512), (512, 768), (640, 448)], images=[1, 2], dynamic=True)
    assert spans == [((1, 4, 56, 64), (2, 4, 64, 64), (4, 4, 96, 80))]


def test_tensors_are_narrowed_to_the_profiles() -> None:
    profiles = profiles_of(DECODER, [(512, 512), (768, 512)], [4], 8, dynamic=False)
    inputs, outputs = tensors_of(DECODER, profiles)
    assert inputs[0].shape == (1, 4, 64, DimRange("width", 64, 96))
    assert outputs[0].shape == (1, 3, 512, DimRange("image_width", 512, 768, 8))
    inputs, outputs = tensors_of(ENCODER, profiles_of(ENCODER, [(768, 512)], [1], 8, dynamic=False))
    assert inputs[0].shape == (1, 3, 512, 768)
    assert outputs[0].shape == (1, 4, 64, 96)


@pytest.mark.parametrize(
    ("size", "images", "says"),
    [
        ((500, 512), [1], "the width of 500x512 is 500: expected a multiple of 16 from 64 to 1024"),
        ((512, 0), [1], "the height of 512x0 is 0: expected a multiple of 16 from 64 to 1024"),
        ((512, -64), [1], "the height of 512x-64"),
        ((2048, 512), [1], "the width of 2048x512"),
        ((512, 512), [0], "0 images at once: expected 1 to 4"),
        ((512, 512), [5], "5 images at once: expected 1 to 4"),
        ((512, 512), [], "there is no count of images"),
    ],
)
def test_what_the_graphs_do_not_take_is_refused(size: tuple[int, int], images: list[int], says: str) -> None:
    batch, height, width = DimRange("batch", 1, 8), DimRange("height", 8, 128, 2), DimRange("width", 8, 128, 2)
    with pytest.raises(InputError, match=says):
        check_sizes([TensorSpec("latents", "float32", (batch, 4, height, width))], 8, [(512, 512), size], images)


def test_ranges_are_values() -> None:
    assert InputRange((1,), (2,), (3,)) == InputRange((1,), (2,), (3,))
