"""JSON that a stranger wrote: bounded, typed, and never trusted."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

from ..errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

_MAX_BYTES: Final = 1 << 20
"""A config.json has two kilobytes; a megabyte is not one."""


def parse_json_object(data: bytes, where: str) -> dict[str, Any]:
    """Parse one JSON object.

    Parameters
    ----------
    data
        UTF-8 text.
    where
        What to call it in messages.

    Returns
    -------
    dict
        The object, its values as they came.

    Raises
    ------
    CheckpointError
        If it is not JSON, not an object, or names a key twice.

    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        members = dict(pairs)
        if len(members) != len(pairs):
            raise ValueError("a name appears twice in one object")
        return members

    try:
        parsed = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is damaged: it should be JSON, but {error}".replace("\n", " ")) from None
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{where} is damaged: it should be a JSON object, found {type(parsed).__name__}")
    return parsed


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a file of at most a megabyte that holds one JSON object, as `parse_json_object` does."""
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    if len(data) > _MAX_BYTES:
        raise CheckpointError(f"{path} is no configuration: it is larger than {_MAX_BYTES} bytes")
    return parse_json_object(data, str(path))
