"""`sdrt bench` on the command line."""

from __future__ import annotations

from typing import Any

import click

from .output import json_option, print_json
from .run import interval


@click.command()
@click.option("--bundle", help="A bundle's name or folder. [default: the newest that this machine can run]")
@click.option("--backend", default="auto", metavar="NAME", show_default=True, help="As in sdrt run.")
@click.option("--steps", type=int, default=20, show_default=True, help="Steps of the sampler.")
@click.option("-W", "--width", type=int, help="In pixels, a multiple of 8. [default: the model's]")
@click.option("-H", "--height", type=int, help="In pixels, a multiple of 8. [default: the model's]")
@click.option("-b", "--batch", type=int, default=1, show_default=True, help="How many images at once.")
@click.option("--sampler", help="As in sdrt run. [default: the model's]")
@click.option("--cfg-scale", type=float, default=7.5, show_default=True, help="Guidance; 1 or less turns it off.")
@click.option(
    "--guidance-interval", callback=interval, metavar="LOW,HIGH", help="Of sdrt's whole pictures, as in sdrt run."
)
@click.option(
    "--cache-interval",
    type=int,
    default=1,
    metavar="K",
    show_default=True,
    help="Of sdrt's whole pictures, as in sdrt run.",
)
@click.option(
    "--encoder-interval",
    type=int,
    default=1,
    metavar="K",
    show_default=True,
    help="Of sdrt's whole pictures, as in sdrt run.",
)
@click.option(
    "--rounds",
    type=click.IntRange(1, 500),
    default=5,
    show_default=True,
    help="How often each is measured, all taking turns; one more turn comes first and does not count.",
)
@click.option(
    "--launches",
    type=click.IntRange(1, 100),
    default=1,
    show_default=True,
    help="Start everybody anew so many times, each time for that many rounds.",
)
@click.option(
    "--compare",
    metavar="A,B,...",
    help="Measure others beside it, with the same weights and settings: diffusers, diffusers-bf16, diffusers-compile, "
    "openvino-raw, openvino-raw-fp32, onnxruntime-raw.",
)
@click.option(
    "--only",
    metavar="PART,...",
    help="Measure some parts alone: text, step, decode, picture (all with peers), start. [default: all]",
)
@click.option(
    "--ckpt", help="Where peers with PyTorch have the weights from. [default: what the bundle was built of, if found]"
)
@json_option
def bench(*, bundle: str | None, json: bool, **options: Any) -> None:
    """Measure how long a bundle takes on this machine, and others beside it.

    Text encoder, guided step of the U-Net, decoder, and whole pictures: medians and 95th percentiles; peak memory; the
    time until the first step of a fresh process, with and without what earlier ones have compiled; the time of a step
    that is not the engine's; and the floor, a step's multiplications at the rate that this CPU multiplies matrices.
    """
    from ..benchmark.bench import bench as measure  # noqa: PLC0415 - heavy imports wait for the command
    from ..benchmark.report import table  # noqa: PLC0415

    found = measure(bundle, tell=lambda line: click.echo(f"sdrt: {line}", err=True), **options)
    print_json(found) if json else click.echo(table(found))
