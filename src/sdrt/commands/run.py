"""`sdrt run` on the command line."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from .output import json_option, print_json


def interval(_ctx: click.Context, _param: click.Parameter, given: str | None) -> tuple[float, float] | None:
    """Read an interval of noise levels as it is typed."""
    if given is None:
        return None
    try:
        low, high = map(float, given.split(","))
    except ValueError:
        raise click.BadParameter(
            f"{given!r} is no interval: expected two noise levels (sigma), such as 0.3,5"
        ) from None
    return low, high


@click.command()
@click.argument("prompt")
@click.option("--bundle", help="A bundle's name or folder. [default: the newest that this machine can run]")
@click.option(
    "--backend",
    default="auto",
    metavar="NAME",
    show_default=True,
    help="What runs an ONNX bundle: onnxruntime; openvino, in bf16 where the CPU has it, which is faster and not quite "
    "the same picture; openvino:fp32; or auto, the fastest of those installed that computes exactly.",
)
@click.option("-n", "--negative-prompt", "negative_prompt", default="", help="What the image shall not show.")
@click.option("--steps", type=int, default=50, show_default=True, help="Steps of the sampler.")
@click.option("--cfg-scale", type=float, default=7.5, show_default=True, help="Guidance; 1 or less turns it off.")
@click.option(
    "--sampler",
    help="ddpm, ddim, plms, euler, euler_a or dpmpp_2m. [default: the model's; plms for Stable Diffusion v1]",
)
@click.option("--eta", type=float, default=0.0, help="Ancestral noise of ddim, 0 to 1.")
@click.option("--spacing", help="Of timesteps: leading, trailing or linspace. [default: the sampler's own]")
@click.option("--seed", type=int, help="Of the first image; image i has seed + i. [default: drawn at random]")
@click.option("-W", "--width", type=int, help="In pixels, a multiple of 8. [default: the model's]")
@click.option("-H", "--height", type=int, help="In pixels, a multiple of 8. [default: the model's]")
@click.option("-b", "--batch", type=int, default=1, show_default=True, help="How many images.")
@click.option("--clip-skip", type=int, help="Last layers of the text encoder to leave out. [default: the bundle's]")
@click.option(
    "--guidance-interval",
    callback=interval,
    metavar="LOW,HIGH",
    help="Approximate: guidance between these noise levels (sigma) alone, as in 0.3,5, so that other steps take half "
    "the time. [default: everywhere]",
)
@click.option(
    "--cache-interval",
    type=int,
    default=1,
    metavar="K",
    show_default=True,
    help="Approximate: the whole U-Net in every Kth step, its outermost blocks alone in the others.",
)
@click.option(
    "--encoder-interval",
    type=int,
    default=1,
    metavar="K",
    show_default=True,
    help="Approximate: the U-Net's encoder in every Kth step, its decoder alone in the others; with --cache-interval, "
    "in every Kth of the steps that run the whole U-Net.",
)
@click.option(
    "--vae-tiling/--no-vae-tiling",
    default=None,
    help="Decode in tiles: less memory, more time, the same picture to rounding. [default: beyond 768x768 pixels]",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="A .png, or a folder; several images get -0, -1, ... [default: named after the prompt, here]",
)
@json_option
def run(prompt: str, bundle: str | None, output: Path | None, *, json: bool, **options: Any) -> None:
    """Generate images from PROMPT and save them as PNG."""
    began = time.perf_counter()
    from ..generate import generate  # noqa: PLC0415

    facts = generate(prompt, bundle, output, began=began, **options)
    if json:
        print_json(facts)
    else:
        for image in facts["images"]:
            click.echo(f"{image['path']} (seed {image['seed']})")
