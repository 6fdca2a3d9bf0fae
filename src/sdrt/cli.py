"""The command line: the only place that sees export, engines and runtime together.

Exit codes: 0, done; 1, it failed; 2, the command makes no sense as typed; 130, interrupted with Ctrl-C. What went wrong
is one line on standard error. With ``--json`` standard output holds one JSON object and nothing else.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ._version import __version__
from .errors import BundleCorruptError, InputError, MissingDependencyError, SdrtError, SdrtWarning

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

FAILURE, USAGE, INTERRUPTED = 1, 2, 130

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


@cli.command()
@click.option(
    "--ckpt", required=True, help="v1-1 ... v1-5, a Hugging Face repo, a diffusers folder, a .ckpt or .safetensors."
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The bundle's folder. [default: in SDRT_HOME]")
@click.option("--name", help="The bundle's name. [default: the checkpoint's]")
@click.option(
    "--precision",
    type=click.Choice(["auto", "fp32", "fp16"]),
    default="auto",
    show_default=True,
    help="auto: fp16 with an NVIDIA GPU, fp32 without.",
)
@click.option("--ema", is_flag=True, help="Take the averaged weights of a file that has both.")
@click.option(
    "--clip-skip", type=int, default=0, show_default=True, help="Last layers of the text encoder to leave out."
)
@click.option("--force", is_flag=True, help="Replace a bundle that exists.")
@_json
def build(ckpt: str, output: Path | None, *, json: bool, **options: Any) -> None:
    """Build a bundle from a Stable Diffusion v1 checkpoint."""
    from . import progress  # noqa: PLC0415 - heavy imports wait for the command that needs them

    _need("torch", "diffusers", "transformers", "onnx", "onnxscript", "safetensors", "huggingface_hub", "onnxruntime")
    from .export.build import build as build_bundle  # noqa: PLC0415

    with progress.stages() as report:
        bundle = build_bundle(
            ckpt, output=output, command=shlex.join(["sdrt", *sys.argv[1:]]), report=report, **options
        )
    if json:
        from .show import bundle_facts  # noqa: PLC0415

        _print_json(bundle_facts(bundle))
    else:
        argument = f" --bundle {shlex.quote(str(output))}" if output else ""
        click.echo(f'built {bundle.folder} ({bundle.size / 1e9:.2f} GB): sdrt run "Great Wall photo"{argument}')


def _need(*packages: str) -> None:
    from importlib.util import find_spec  # noqa: PLC0415

    for package in packages:
        if find_spec(package) is None:
            raise MissingDependencyError(package, "building from a checkpoint", "export")


@cli.command()
@click.argument("prompt")
@click.option("--bundle", help="A bundle's name or folder. [default: the newest that this machine can run]")
@click.option("-n", "--negative-prompt", "negative_prompt", default="", help="What the image shall not show.")
@click.option("--steps", type=int, default=50, show_default=True, help="Steps of the sampler.")
@click.option("--cfg-scale", type=float, default=7.5, show_default=True, help="Guidance; 1 or less turns it off.")
@click.option("--sampler", default="plms", show_default=True, help="ddpm, ddim, plms, euler, euler_a or dpmpp_2m.")
@click.option("--eta", type=float, default=0.0, help="Ancestral noise of ddim, 0 to 1.")
@click.option("--spacing", help="Of timesteps: leading, trailing or linspace. [default: the sampler's own]")
@click.option("--seed", type=int, help="Of the first image; image i has seed + i. [default: drawn at random]")
@click.option("-W", "--width", type=int, help="In pixels, a multiple of 8. [default: the model's]")
@click.option("-H", "--height", type=int, help="In pixels, a multiple of 8. [default: the model's]")
@click.option("-b", "--batch", type=int, default=1, show_default=True, help="How many images.")
@click.option("--clip-skip", type=int, help="Last layers of the text encoder to leave out. [default: the bundle's]")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="A .png, or a folder; several images get -0, -1, ... [default: named after the prompt, here]",
)
@_json
def run(prompt: str, bundle: str | None, output: Path | None, *, json: bool, **options: Any) -> None:
    """Generate images from PROMPT and save them as PNG."""
    from .generate import generate  # noqa: PLC0415

    facts = generate(prompt, bundle, output, **options)
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
@_json
def inspect(what: str, *, json: bool) -> None:
    """Show what a bundle holds, or how a PNG was made."""
    if what.lower().endswith(".png"):
        from .runtime.images import read_parameters  # noqa: PLC0415
        from .runtime.parameters import parse  # noqa: PLC0415

        text = read_parameters(Path(what))
        _print_json(parse(text)) if json else click.echo(text)
        return
    from .engines import store  # noqa: PLC0415
    from .show import bundle_facts, bundle_table  # noqa: PLC0415

    bundle = store.resolve(what)
    _print_json(bundle_facts(bundle)) if json else click.echo(bundle_table(bundle))


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
