"""The command line: the only place that sees export, engines and runtime together.

Exit codes: 0, done; 1, it failed; 2, the command makes no sense as typed; 130, interrupted with Ctrl-C. What went wrong
is one line on standard error. With ``--json`` standard output holds one JSON object and nothing else.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ._version import __version__
from .commands.bench import bench
from .commands.build import build
from .commands.output import json_option, print_json
from .commands.run import run
from .commands.table import table
from .errors import BundleCorruptError, InputError, SdrtError, SdrtWarning
from .serve.command import serve

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

FAILURE, USAGE, INTERRUPTED = 1, 2, 130


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


@cli.command("list")
@json_option
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
        print_json({"home": str(store.home()), "bundles": bundles})
    elif listings:
        click.echo(list_table(listings))
    else:
        click.echo(f"no bundles in {store.bundles_folder()}: run sdrt build --ckpt v1-1")


@cli.command()
@click.argument("what", metavar="BUNDLE|PNG")
@click.option("--layers", is_flag=True, help="List the layers of the engines, and what of the networks is fused.")
@json_option
def inspect(what: str, *, layers: bool, json: bool) -> None:
    """Show what a bundle holds, or how a PNG was made."""
    if what.lower().endswith(".png"):
        if layers:
            raise InputError(f"{what} is a picture, and --layers lists those of engines: give a bundle")
        from .runtime.images import read_parameters  # noqa: PLC0415
        from .runtime.parameters import parse  # noqa: PLC0415

        text = read_parameters(Path(what))
        print_json(parse(text)) if json else click.echo(text)
        return
    from .engines import store  # noqa: PLC0415
    from .show import bundle_facts, bundle_table, layer_facts  # noqa: PLC0415

    bundle = store.resolve(what)
    if json:
        print_json(bundle_facts(bundle) | (layer_facts(bundle) if layers else {}))
    elif layers:
        from .engines.fusion_table import table  # noqa: PLC0415

        click.echo(table(bundle))
    else:
        click.echo(bundle_table(bundle))


@cli.command()
@click.argument("bundle")
@json_option
def verify(bundle: str, *, json: bool) -> None:
    """Check every file of a bundle against its SHA-256."""
    from . import progress  # noqa: PLC0415
    from .engines import store  # noqa: PLC0415
    from .engines.bundle import Bundle  # noqa: PLC0415

    found = Bundle.read(store.locate(bundle))
    with progress.bytes_bar("hashing", found.size) as advance:
        problems = list(found.problems(advance))
    if json:
        print_json({"bundle": str(found.folder), "whole": not problems, "problems": problems})
    if problems:
        raise BundleCorruptError(f"{found.folder} is damaged: {'; '.join(problems)}: copy or build it again")
    if not json:
        click.echo(f"{found.folder} is whole: {len(found.manifest.files)} files, {found.size} bytes")


@cli.command()
@json_option
def doctor(*, json: bool) -> None:
    """Tell what this machine can run, and what to install for more."""
    from .doctor import examine, table  # noqa: PLC0415

    facts = examine()
    print_json(facts) if json else click.echo(table(facts))


for command in (bench, build, run, serve, table):
    cli.add_command(command)


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
