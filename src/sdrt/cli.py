"""The command line: the only place that sees export, engines and runtime together.

Exit codes: 0, done; 1, it failed; 2, the command makes no sense as typed; 130, interrupted with Ctrl-C. What went wrong
is one line on standard error. With ``--json`` standard output holds one JSON object and nothing else.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ._version import __version__
from .errors import BundleCorruptError, InputError, SdrtError, SdrtWarning
from .serve.command import serve

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

FAILURE, USAGE, INTERRUPTED = 1, 2, 130

_SIZE = re.compile(r"([+-]?[0-9]{1,9})[xX]([+-]?[0-9]{1,9})")

_json = click.option("--json", is_flag=True, help="Print one JSON object.")


@click.group(
    context_settings={"auto_envvar_prefix": "SDRT", "help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__, package_name="sdrt")
def cli() -> None:
    """Stable Diffusion v1 as engines: build a bundle once, generate images without PyTorch.

    \b
    sdrt build --ckpt v1-1
    sdrt run "Great Wall photo"

    Every option is an environment variable too: --steps of run is SDRT_RUN_STEPS. Bundles are kept in SDRT_HOME, by
    default the platform's cache folder. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
    """  # noqa: D301 - click's own mark for lines to leave alone


def _sizes(_ctx: click.Context, _param: click.Parameter, given: tuple[str, ...]) -> tuple[tuple[int, int], ...]:
    sizes = []
    for text in given:
        match = _SIZE.fullmatch(text.strip())
        if match is None:
            raise click.BadParameter(f"{text!r} is no size: expected width and height in pixels, such as 512x768")
        sizes.append((int(match[1]), int(match[2])))
    return tuple(sizes)


@cli.command()
@click.option("--ckpt", help="v1-1 ... v1-5, demo, a Hugging Face repo, a diffusers folder, a .ckpt or .safetensors.")
@click.option(
    "--from",
    "source",
    metavar="BUNDLE",
    envvar="SDRT_BUILD_FROM",
    help="Build engines of this fp16 ONNX bundle, by its name or folder, instead of a checkpoint; needs no PyTorch.",
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
    "--name", help="The bundle's name. [default: the checkpoint's; for engines with their targets, as in v1-1-rtx-sm86]"
)
@click.option("--force", is_flag=True, help="Replace bundles that exist.")
@click.option(
    "--precision",
    type=click.Choice(["auto", "fp32", "fp16"]),
    default="auto",
    show_default=True,
    help="auto: fp16 for engines and with an NVIDIA GPU, fp32 for a CPU.",
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
@_json
def build(
    *,
    optimization_level: int | None,
    hardware_compatible: bool,
    version_compatible: bool,
    refit: bool,
    json: bool,
    **given: Any,
) -> None:
    """Build a bundle from a Stable Diffusion v1 checkpoint, or engines from an ONNX bundle.

    With --ckpt and a backend for engines, the ONNX bundle that they are built of is kept in SDRT_HOME under a name of
    its own, such as v1-1-fp16, so that engines for other GPUs can be built --from it.
    """
    if given["ckpt"] is None and given["source"] is None:
        raise click.UsageError("Missing option '--ckpt' or '--from'.", click.get_current_context())
    if given["ckpt"] is not None and given["source"] is not None:
        raise click.UsageError("--ckpt and --from exclude each other: give one.", click.get_current_context())
    from . import build as building  # noqa: PLC0415 - heavy imports wait for the command that needs them
    from . import progress  # noqa: PLC0415
    from .engines.tensorrt import Options  # noqa: PLC0415
    from .show import build_facts, built  # noqa: PLC0415

    options = Options(optimization_level, hardware_compatible, version_compatible, refit)
    order = building.Order(**given, options=options, command=shlex.join(["sdrt", *sys.argv[1:]]))
    decision = building.decide(order)
    with progress.stages(decision.why) as report:
        bundles = building.build(order, decision, report)
    _print_json(build_facts(bundles)) if json else click.echo(built(bundles, order.output))


def _interval(_ctx: click.Context, _param: click.Parameter, given: str | None) -> tuple[float, float] | None:
    if given is None:
        return None
    try:
        low, high = map(float, given.split(","))
    except ValueError:
        raise click.BadParameter(
            f"{given!r} is no interval: expected two noise levels (sigma), such as 0.3,5"
        ) from None
    return low, high


@cli.command()
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
    callback=_interval,
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
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="A .png, or a folder; several images get -0, -1, ... [default: named after the prompt, here]",
)
@_json
def run(prompt: str, bundle: str | None, output: Path | None, *, json: bool, **options: Any) -> None:
    """Generate images from PROMPT and save them as PNG."""
    began = time.perf_counter()
    from .generate import generate  # noqa: PLC0415

    facts = generate(prompt, bundle, output, began=began, **options)
    if json:
        _print_json(facts)
    else:
        for image in facts["images"]:
            click.echo(f"{image['path']} (seed {image['seed']})")


@cli.command("list")
@_json
def list_(*, json: bool) -> None:
    """List the bundles in SDRT_HOME."""
    from .engines import store  # noqa: PLC0415
    from .show import bundle_facts, list_table  # noqa: PLC0415

    listings = store.list_bundles()
    if json:
        bundles = [
            bundle_facts(entry.bundle)
            if entry.bundle
            else {"name": entry.name, "path": str(entry.path), "problem": entry.problem}
            for entry in listings
        ]
        _print_json({"home": str(store.home()), "bundles": bundles})
    elif listings:
        click.echo(list_table(listings))
    else:
        click.echo(f"no bundles in {store.bundles_folder()}: run sdrt build --ckpt v1-1")


@cli.command()
@click.argument("what", metavar="BUNDLE|PNG")
@click.option("--layers", is_flag=True, help="List the layers of the engines, and what of the networks is fused.")
@_json
def inspect(what: str, *, layers: bool, json: bool) -> None:
    """Show what a bundle holds, or how a PNG was made."""
    if what.lower().endswith(".png"):
        if layers:
            raise InputError(f"{what} is a picture, and --layers lists those of engines: give a bundle")
        from .runtime.images import read_parameters  # noqa: PLC0415
        from .runtime.parameters import parse  # noqa: PLC0415

        text = read_parameters(Path(what))
        _print_json(parse(text)) if json else click.echo(text)
        return
    from .engines import store  # noqa: PLC0415
    from .show import bundle_facts, bundle_table, layer_facts  # noqa: PLC0415

    bundle = store.resolve(what)
    if json:
        _print_json(bundle_facts(bundle) | (layer_facts(bundle) if layers else {}))
    elif layers:
        from .engines.fusion_table import table  # noqa: PLC0415

        click.echo(table(bundle))
    else:
        click.echo(bundle_table(bundle))


@cli.command()
@click.argument("bundle")
@_json
def verify(bundle: str, *, json: bool) -> None:
    """Check every file of a bundle against its SHA-256."""
    from . import progress  # noqa: PLC0415
    from .engines import store  # noqa: PLC0415
    from .engines.bundle import Bundle  # noqa: PLC0415

    found = Bundle.read(store.locate(bundle))
    with progress.bytes_bar("hashing", found.size) as advance:
        problems = list(found.problems(advance))
    if json:
        _print_json({"bundle": str(found.folder), "whole": not problems, "problems": problems})
    if problems:
        raise BundleCorruptError(f"{found.folder} is damaged: {'; '.join(problems)}: copy or build it again")
    if not json:
        click.echo(f"{found.folder} is whole: {len(found.manifest.files)} files, {found.size} bytes")


@cli.command()
@_json
def doctor(*, json: bool) -> None:
    """Tell what this machine can run, and what to install for more."""
    from .doctor import examine, table  # noqa: PLC0415

    facts = examine()
    _print_json(facts) if json else click.echo(table(facts))


cli.add_command(serve)


def _print_json(facts: dict[str, Any]) -> None:
    import json  # noqa: PLC0415

    click.echo(json.dumps(facts, indent=2, ensure_ascii=False))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code; tests call this in process."""
    warnings.showwarning = _show_warning
    warnings.simplefilter("always", SdrtWarning)
    with _watching_for_ctrl_c() as was_interrupted:
        try:
            cli.main(args=None if arguments is None else list(arguments), prog_name="sdrt", standalone_mode=False)
        except click.exceptions.Exit as exit_:
            return exit_.exit_code
        except BrokenPipeError:
            # Whoever read our output has had enough, as head does; there is nobody left to tell.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return FAILURE
        except (Exception, KeyboardInterrupt) as error:
            if was_interrupted():
                return _fail("interrupted", INTERRUPTED)
            if isinstance(error, InputError | click.UsageError):
                return _fail(_explained(error), USAGE)
            if isinstance(error, SdrtError | click.ClickException | OSError | MemoryError):
                return _fail(_explained(error), FAILURE)
            raise
    return 0


@contextlib.contextmanager
def _watching_for_ctrl_c() -> Iterator[Callable[[], bool]]:
    """Tell afterwards whether Ctrl-C was pressed.

    What it raises does not say so always: an extension module that is interrupted while it loads reports an
    ImportError. Once the exit code is settled, a second Ctrl-C shall not change it.
    """
    pressed = False

    def interrupt(_signal: int, _frame: object) -> None:
        nonlocal pressed
        if not pressed:
            pressed = True
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield lambda: pressed
    finally:
        if not pressed:
            signal.signal(signal.SIGINT, before)


def _explained(error: BaseException) -> str:
    if isinstance(error, click.UsageError):
        return error.format_message() + (f" (see {error.ctx.command_path} --help)" if error.ctx else "")
    if isinstance(error, click.ClickException):
        return error.format_message()
    return str(error) or "out of memory: try a smaller size or batch"


def _fail(error: object, code: int) -> int:
    click.echo(f"sdrt: {_one_line(error)}", err=True)
    return code


def _show_warning(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    """Show our own warnings in one line; those of libraries concern developers."""
    if issubclass(category, SdrtWarning):
        click.echo(f"sdrt: warning: {_one_line(message)}", err=True)


def _one_line(message: object) -> str:
    return " ".join(str(message).split())
