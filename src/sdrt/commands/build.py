"""`sdrt build` on the command line."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import click

from .output import json_option, print_json

_SIZE = re.compile(r"([+-]?[0-9]{1,9})[xX]([+-]?[0-9]{1,9})")


def _sizes(_ctx: click.Context, _param: click.Parameter, given: tuple[str, ...]) -> tuple[tuple[int, int], ...]:
    sizes = []
    for text in given:
        match = _SIZE.fullmatch(text.strip())
        if match is None:
            raise click.BadParameter(f"{text!r} is no size: expected width and height in pixels, such as 512x768")
        sizes.append((int(match[1]), int(match[2])))
    return tuple(sizes)


@click.command()
@click.option("--ckpt", help="v1-1 ... v1-5, demo, a Hugging Face repo, a diffusers folder, a .ckpt or .safetensors.")
@click.option(
    "--from",
    "source",
    metavar="BUNDLE",
    envvar="SDRT_BUILD_FROM",
    help="Build engines of this fp16 ONNX bundle, or int8 graphs of this fp32 one, by its name or folder, instead of a "
    "checkpoint; needs no PyTorch.",
)
@click.option(
    "--backend",
    type=click.Choice(["onnx", "tensorrt-rtx", "tensorrt"]),
    help="onnx: graphs that any machine runs. tensorrt-rtx: engines, built with or without a GPU. tensorrt: engines, "
    "built on the GPU that runs them. [default: engines for the NVIDIA GPU of this machine; without a GPU, graphs for "
    "its CPU and, if tensorrt-rtx is installed, engines for the RTX 3090 beside them]",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The bundle's folder. [default: in SDRT_HOME]")
@click.option(
    "--name",
    help="The bundle's name. [default: the checkpoint's; with what was made of it, as in v1-1-int8 and v1-1-rtx-sm86]",
)
@click.option("--force", is_flag=True, help="Replace bundles that exist.")
@click.option(
    "--precision",
    type=click.Choice(["auto", "fp32", "fp16", "int8"]),
    default="auto",
    show_default=True,
    help="auto: fp16 for engines and with an NVIDIA GPU, fp32 for a CPU. int8: faster on a CPU, and not the same "
    "picture; the model denoises for some minutes, and its layers are measured.",
)
@click.option(
    "--calibration-prompts",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="int8: prompts to denoise, one a line. [default: two dozen of all kinds]",
)
@click.option("--ema", is_flag=True, help="Take the averaged weights of a file that has both.")
@click.option("--clip-skip", type=int, help="Last layers of the text encoder to leave out. [default: 0]")
@click.option(
    "--target",
    "targets",
    multiple=True,
    metavar="NAME",
    envvar="SDRT_BUILD_TARGET",
    help="The GPU of the engines: rtx3090, rtx4090, ..., smNN, or native for the one of this machine; several times, "
    "or with commas, for engines that run on each of them. [default: native, or rtx3090 without a GPU]",
)
@click.option(
    "--size",
    "sizes",
    multiple=True,
    callback=_sizes,
    metavar="WxH",
    envvar="SDRT_BUILD_SIZE",
    help="Image size of the engines in pixels; several times for several. [default: the model's]",
)
@click.option(
    "--images",
    multiple=True,
    type=int,
    metavar="N",
    help="How many images a request to the engines makes; several times for several. [default: 1]",
)
@click.option("--dynamic", is_flag=True, help="Engines for all sizes and counts between those given; slower.")
@click.option(
    "--optimization-level",
    type=int,
    metavar="0..5",
    help="tensorrt: how long to search for fast engines; tensorrt-rtx builds the same at every level. [default: 3]",
)
@click.option("--hardware-compatible", is_flag=True, help="tensorrt: engines for all GPUs from Ampere on; slower.")
@click.option("--version-compatible", is_flag=True, help="tensorrt: engines for later versions of TensorRT too.")
@click.option("--refit", is_flag=True, help="Engines whose weights can be replaced; may be slower. Needs a GPU.")
@json_option
def build(
    *,
    optimization_level: int | None,
    hardware_compatible: bool,
    version_compatible: bool,
    refit: bool,
    json: bool,
    **given: Any,
) -> None:
    """Build a bundle from a Stable Diffusion v1 checkpoint, or engines or int8 graphs from an ONNX bundle.

    With --ckpt and a backend for engines, the ONNX bundle that they are built of is kept in SDRT_HOME under a name of
    its own, such as v1-1-fp16, so that engines for other GPUs can be built --from it.
    """
    if given["ckpt"] is None and given["source"] is None:
        raise click.UsageError("Missing option '--ckpt' or '--from'.", click.get_current_context())
    if given["ckpt"] is not None and given["source"] is not None:
        raise click.UsageError("--ckpt and --from exclude each other: give one.", click.get_current_context())
    from .. import build as building  # noqa: PLC0415 - heavy imports wait for the command that needs them
    from .. import progress  # noqa: PLC0415
    from ..engines.tensorrt import Options  # noqa: PLC0415
    from ..show import build_facts, built  # noqa: PLC0415

    options = Options(optimization_level, hardware_compatible, version_compatible, refit)
    order = building.Order(**given, options=options, command=shlex.join(["sdrt", *sys.argv[1:]]))
    decision = building.decide(order)
    with progress.stages(decision.why) as report:
        bundles = building.build(order, decision, report)
    print_json(build_facts(bundles)) if json else click.echo(built(bundles, order.output))
