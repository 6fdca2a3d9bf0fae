"""OpenAI's client against the server: pictures as `sdrt run` makes them, and refusals by name."""

from __future__ import annotations

import base64
import io
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import openai
import pytest
from PIL import Image

from sdrt.cli import main
from sdrt.runtime.images import encode, to_pil

if TYPE_CHECKING:
    from pathlib import Path

    from openai.types import ImagesResponse

    import sdrt

    from .server import Server

PROMPT = "a large red star on a blue background"
QUICK = {"num_inference_steps": 4, "seed": 42}


def generate(server: Server, prompt: str = PROMPT, *, n: int | None = None, **body: Any) -> ImagesResponse:
    """Ask for pictures; what the client does not know goes into its `extra_body`."""
    known: dict[str, Any] = {name: body.pop(name) for name in ("size", "output_format", "model") if name in body}
    response: ImagesResponse = server.client().images.generate(
        prompt=prompt, n=n or openai.omit, extra_body={**QUICK, **body}, **known
    )
    return response


def pictures(response: ImagesResponse) -> list[bytes]:
    assert response.data is not None
    return [base64.b64decode(image.b64_json or "") for image in response.data]


def drawn(pipe: sdrt.Pipeline, prompt: str = PROMPT, **arguments: Any) -> bytes:
    """The file of the picture that the pipeline makes in this process."""
    (image,) = pipe(prompt, **{**QUICK, **arguments})
    return encode(image)


def test_the_file_is_that_of_sdrt_run(
    server: Server, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDRT_HOME", str(home))
    path = tmp_path / "star.png"
    options = ["-n", "green", "--steps", "4", "--seed", "42", "--cfg-scale", "5", "--sampler", "euler", "-o", str(path)]
    assert main(["run", PROMPT, "--bundle", "demo", *options]) == 0
    response = generate(server, model="demo", negative_prompt="green", guidance_scale=5, sampler="Euler")
    assert pictures(response) == [path.read_bytes()]
    assert response.size == "128x128"
    assert response.output_format == "png"
    assert response.background == "opaque"
    assert response.usage is not None
    assert response.usage.input_tokens == 9, "eight words and one"


def test_pictures_are_the_same_alone_and_with_others(server: Server, pipe: sdrt.Pipeline) -> None:
    """At once, with scales and prompts and seeds of their own; and none with a size and a sampler of its own."""
    orders: list[dict[str, Any]] = [
        {"prompt": f"a {colour} ring", "seed": seed, "guidance_scale": 3.0 + seed, "num_inference_steps": 8}
        for seed, colour in enumerate(["red", "green", "blue", "yellow"])
    ]
    orders += [
        {"guidance_scale": 0, "num_inference_steps": 8},
        {"sampler": "euler_a", "size": "64x136", "num_inference_steps": 7},
        {"guidance_interval": [0.3, 5], "num_inference_steps": 8},
        {"encoder_interval": 2, "cache_interval": 2, "num_inference_steps": 8},
        {"sampler": "ddim", "eta": 1.0, "timestep_spacing": "trailing", "clip_skip": 1},
    ]
    calls, shared = server.figure("sdrt_batch_images_count"), server.figure("sdrt_batch_images_sum")
    with ThreadPoolExecutor(len(orders)) as threads:
        found = [pictures(each) for each in threads.map(lambda order: generate(server, **order), orders)]
    for order, files in zip(orders, found, strict=True):
        arguments = dict(order)
        if "size" in arguments:
            arguments["width"], arguments["height"] = map(int, arguments.pop("size").split("x"))
        assert files == [drawn(pipe, **arguments)], order
    calls, shared = (
        server.figure("sdrt_batch_images_count") - calls,
        server.figure("sdrt_batch_images_sum") - shared,
    )
    assert shared > calls, "none of the pictures shared a call"


def test_several_pictures_have_seeds_one_after_the_other(server: Server, pipe: sdrt.Pipeline) -> None:
    response = generate(server, n=3)
    assert pictures(response) == [drawn(pipe, seed=42 + number) for number in range(3)]
    assert [image.model_extra for image in response.data or []] == [{"seed": 42 + number} for number in range(3)]


def test_a_seed_that_was_drawn_is_told_and_makes_the_same_picture(server: Server) -> None:
    first, second = generate(server, seed=None), generate(server, seed=None)
    assert pictures(first) != pictures(second)
    seed = (first.data or [])[0].model_extra["seed"]  # type: ignore[index]
    assert pictures(generate(server, seed=seed)) == pictures(first)


@pytest.mark.parametrize("file_format", ["jpeg", "webp"])
def test_other_formats(server: Server, file_format: str) -> None:
    (small,) = pictures(generate(server, output_format=file_format, output_compression=10))
    (large,) = pictures(generate(server, output_format=file_format, output_compression=95))
    assert len(small) < len(large)
    image = Image.open(io.BytesIO(large))
    assert (image.format, image.size) == (file_format.upper(), (128, 128))


def test_a_stream_shows_real_pictures_on_the_way(server: Server, pipe: sdrt.Pipeline) -> None:
    settings: dict[str, Any] = {"num_inference_steps": 8, "seed": 7, "sampler": "ddim"}
    with server.client().images.generate(prompt=PROMPT, stream=True, partial_images=3, extra_body=settings) as stream:
        events = list(stream)
    assert [event.type for event in events] == ["image_generation.partial_image"] * 3 + ["image_generation.completed"]
    assert [event.partial_image_index for event in events[:3]] == [0, 1, 2]  # type: ignore[union-attr]
    assert {(event.size, event.quality, event.output_format) for event in events} == {("128x128", "auto", "png")}
    estimates = [step.estimate for step in pipe.steps(PROMPT, **settings)]
    expected = [to_pil(pipe.decode(estimates[index])[0], "") for index in (1, 3, 5)]
    shown = [Image.open(io.BytesIO(base64.b64decode(event.b64_json))) for event in events[:3]]
    for one, other in zip(shown, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    assert "parameters" not in shown[0].info, "they are those of the finished picture"
    assert base64.b64decode(events[3].b64_json) == drawn(pipe, **settings)
    assert events[3].usage.input_tokens == 8  # type: ignore[union-attr]
    assert events[3].model_extra == {"seed": 7}


def test_a_stream_without_partial_pictures(server: Server, pipe: sdrt.Pipeline) -> None:
    stream = server.client().images.generate(prompt=PROMPT, stream=True, extra_body=QUICK)
    (event,) = list(stream)
    assert event.type == "image_generation.completed"
    assert base64.b64decode(event.b64_json) == drawn(pipe)


def test_fewer_steps_than_pictures_to_show(server: Server) -> None:
    body = {"num_inference_steps": 1, "sampler": "ddim"}
    stream = server.client().images.generate(prompt=PROMPT, stream=True, partial_images=3, extra_body=body)
    assert [event.type for event in stream] == ["image_generation.completed"]


def test_models_are_listed(server: Server, pipe: sdrt.Pipeline) -> None:
    (model,) = server.client().models.list().data
    assert (model.id, model.object, model.owned_by) == ("demo", "model", "sdrt")
    assert model == server.client().models.retrieve("demo")
    with pytest.raises(openai.NotFoundError, match="expected one of demo"):
        server.client().models.retrieve("dall-e-3")


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"style": "vivid"}, "style", "style makes no sense here: say it in the prompt"),
        ({"moderation": "auto"}, "moderation", "moderation makes no sense here"),
        ({"svg": {"model": "gpt"}}, "svg", "svg makes no sense here"),
        ({"quality": "hd"}, "quality", 'quality is "hd": expected "auto"'),
        ({"response_format": "url"}, "response_format", 'response_format is "url": expected "b64_json"'),
        ({"background": "transparent"}, "background", 'expected "auto" or "opaque"'),
        ({"output_format": "gif"}, "output_format", 'expected "png" or "jpeg" or "webp"'),
        ({"output_compression": 50}, "output_compression", "output_compression is for jpeg and webp"),
        ({"steps": 20}, "steps", 'unknown field "steps": expected prompt, model, n'),
        ({"latents": "/etc/passwd"}, "latents", "unknown field"),
        ({"n": 11}, "n", "n is 11: expected a whole number from 1 to 10"),
        ({"n": 2, "stream": True}, "n", "n is 2: expected 1 with stream"),
        ({"n": True}, "n", "n is true: expected a whole number"),
        ({"partial_images": 2}, "partial_images", "partial_images is given without stream"),
        ({"partial_images": 4, "stream": True}, "partial_images", "expected a whole number from 0 to 3"),
        ({"stream": "yes"}, "stream", 'stream is "yes": expected true or false'),
        ({"prompt": 5}, "prompt", "prompt is 5: expected a string of at most 32000 characters"),
        ({"prompt": "x" * 32_001}, "prompt", "expected a string of at most 32000 characters"),
        ({"prompt": "a\0b"}, None, "a prompt has a NUL character at position 1"),
        ({"size": "512"}, "size", 'size is "512": expected a string such as 512x512'),
        ({"size": "512x512\n"}, "size", "expected width and height, such as 512x512"),
        ({"size": "264x256"}, "size", "size is 264x256: expected at most 256x256, or the same area"),
        ({"size": "100x128"}, None, "width is 100: expected a multiple of 8"),
        ({"num_inference_steps": 0}, "num_inference_steps", "expected a whole number from 1 to 1000"),
        ({"num_inference_steps": 2.5}, "num_inference_steps", "num_inference_steps is 2.5"),
        ({"guidance_scale": -1}, "guidance_scale", "expected a number from 0 to 1000"),
        ({"guidance_scale": 10**400}, "guidance_scale", "expected a number from 0 to 1000"),
        ({"seed": 2**64}, "seed", "seed is 18446744073709551616"),
        ({"seed": 2**64 - 1, "n": 2}, None, "seed is 18446744073709551616"),
        ({"sampler": "dpm++"}, "sampler", "sampler is 'dpm++': expected one of ddpm"),
        ({"sampler": "plms", "eta": 0.5}, None, "eta is 0.5 and the sampler is plms"),
        (
            {"guidance_interval": [1]},
            "guidance_interval",
            "guidance_interval is [1]: expected an array of 2, each a number",
        ),
        ({"guidance_interval": [1, "x"]}, "guidance_interval[1]", 'guidance_interval[1] is "x": expected a number'),
        ({"guidance_interval": [5, 1]}, None, "guidance interval is [5, 1]: expected two noise levels"),
        ({"encoder_interval": 0}, "encoder_interval", "expected a whole number from 1 to 1000"),
        ({"clip_skip": 3}, None, "clip skip is 3: expected a whole number from 0 to 2"),
        ({"timestep_spacing": "even"}, "timestep_spacing", 'expected "leading" or "trailing" or "linspace"'),
    ],
    ids=lambda each: next(iter(each)) if isinstance(each, dict) else "",
)
def test_what_makes_no_sense_is_refused_by_name(
    server: Server, body: dict[str, Any], param: str | None, message: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        server.client().post("/images/generations", cast_to=object, body={"prompt": PROMPT, **QUICK, **body})
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"
    assert message in caught.value.message
    assert "\n" not in caught.value.message


def test_a_model_that_is_not_there(server: Server) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        generate(server, model="dall-e-3")
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"
