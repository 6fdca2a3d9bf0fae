"""`sdrt serve` on the command line."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import click

from ..errors import InputError, MissingDependencyError

_SIZE = re.compile(r"([1-9][0-9]{0,4})[xX]([1-9][0-9]{0,4})")


def _largest(_ctx: click.Context, _param: click.Parameter, given: str | None) -> tuple[int, int] | None:
    if given is None:
        return None
    if (match := _SIZE.fullmatch(given.strip())) is None:
        raise click.BadParameter(f"{given!r} is no size: expected width and height in pixels, such as 1024x1024")
    return int(match[1]), int(match[2])


@click.command()
@click.option(
    "--bundle",
    "bundles",
    multiple=True,
    metavar="NAME",
    envvar="SDRT_SERVE_BUNDLE",
    help="A bundle's name or folder; several times for several. [default: the newest that this machine can run]",
)
@click.option(
    "--backend",
    default="auto",
    metavar="NAME",
    show_default=True,
    help="What runs ONNX bundles; see sdrt run --help. With onnxruntime pictures share steps.",
)
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="The address to listen on; one that other machines reach takes a key in SDRT_API_KEY.",
)
@click.option("--port", type=click.IntRange(0, 65535), default=7860, show_default=True, help="0 for any that is free.")
@click.option(
    "--grpc-port", type=click.IntRange(0, 65535), help="Answer gRPC on this port as well; 0 for any. [default: off]"
)
@click.option("--uds", type=click.Path(path_type=Path), help="Listen on a Unix socket at this path, not on a port.")
@click.option("--parent", type=click.IntRange(1), metavar="PID", help="End at once when this process ends.")
@click.option(
    "--at-once",
    type=click.IntRange(1, 32),
    default=4,
    show_default=True,
    help="Pictures that are made at once, in shared steps where that changes none of them.",
)
@click.option("--queue", type=click.IntRange(1), default=32, show_default=True, help="Pictures that may wait.")
@click.option("--max-size", callback=_largest, metavar="WxH", help="Of a picture. [default: twice the model's own]")
@click.option(
    "--allow-shared-memory", is_flag=True, help="Let clients have POSIX shared memory of this machine read and written."
)
@click.option("--log-format", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.pass_context
def serve(context: click.Context, /, *, bundles: tuple[str, ...], at_once: int, queue: int, **options: Any) -> None:
    """Serve pictures as OpenAI's Images API and the Open Inference Protocol of KServe and Triton have it.

    Clients send the key in SDRT_API_KEY, if it is set, as Authorization: Bearer. SIGTERM and Ctrl-C let the server
    answer what it has accepted and then end; a second one ends it at once.
    """
    named = [name for name in ("host", "port", "grpc_port") if _is_given(context, name)]
    if options["uds"] is not None and named:
        raise InputError(f"--uds and --{named[0].replace('_', '-')} exclude each other: give one")
    key = os.environ.get("SDRT_API_KEY") or None
    if key is not None and not (key.isascii() and key.isprintable() and " " not in key):
        raise InputError("SDRT_API_KEY holds what no HTTP header can: expected ASCII without spaces")
    try:
        from .server import Settings  # noqa: PLC0415 - heavy, and an extra
        from .server import serve as serve_until_told  # noqa: PLC0415

        if options["grpc_port"] is not None:
            from . import grpc_service  # noqa: F401, PLC0415 - what is missing is told before anything is loaded
    except ModuleNotFoundError as error:
        if error.name in {"starlette", "uvicorn", "prometheus_client", "grpc", "google"}:
            raise MissingDependencyError(error.name, "sdrt serve", "serve") from None
        raise
    from ..generate import fallback  # noqa: PLC0415

    largest = options.pop("max_size")
    chosen = bundles or (fallback(),)
    serve_until_told(Settings(chosen, key=key, most_at_once=at_once, places=queue, largest=largest, **options), _say)


def _is_given(context: click.Context, name: str) -> bool:
    return context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT


def _say(line: str) -> None:
    click.echo(line)
