"""Output for programs, which every command writes alike."""

from __future__ import annotations

from typing import Any

import click

json_option = click.option("--json", is_flag=True, help="Print one JSON object.")
"""Of a command that can print its results for programs."""


def print_json(facts: dict[str, Any]) -> None:
    """Print one JSON object."""
    import json  # noqa: PLC0415 - what --help need not pay

    click.echo(json.dumps(facts, indent=2, ensure_ascii=False))
