"""Frames of the native protocol, in which pictures travel as pixels; embed/PROTOCOL.md describes them."""

from __future__ import annotations

import json
import struct
from enum import IntEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from PIL.Image import Image

    from ..runtime.loop import Step
    from .http import RefusalError

MEDIA_TYPE = "application/vnd.sdrt.frames"

_HEAD = struct.Struct("<IHH")
_ACCEPTED = struct.Struct("<IIIII")
_STEP = struct.Struct("<IIdd")
_PREVIEW = struct.Struct("<IIII")
_IMAGE = struct.Struct("<QIIII")
_ERROR = struct.Struct("<I")
_IN_MEMORY = 1


class Kind(IntEnum):
    """What a frame is."""

    ACCEPTED = 1
    STEP = 2
    PREVIEW = 3
    IMAGE = 4
    DONE = 5
    ERROR = 6
    AT_WORK = 7


def accepted(images: int, steps: int, width: int, height: int, waiting: int) -> bytes:
    """Say what will come, and how many pictures wait with these."""
    return _frame(Kind.ACCEPTED, 0, _ACCEPTED.pack(images, steps, width, height, waiting))


def step(image: int, done: Step) -> bytes:
    """Say that a step of a picture is done."""
    return _frame(Kind.STEP, image, _STEP.pack(done.index + 1, done.total, done.timestep, done.seconds))


def preview(image: int, steps_done: int, steps: int, shown: Image) -> bytes:
    """Show a picture on the way."""
    return _frame(Kind.PREVIEW, image, _PREVIEW.pack(steps_done, steps, *shown.size), shown.tobytes())


def image(number: int, seed: int, size: tuple[int, int], text: str, pixels: bytes | None) -> bytes:
    """Give a finished picture; without `pixels` where they are in shared memory."""
    described = text.encode()
    flags = _IN_MEMORY if pixels is None else 0
    return _frame(Kind.IMAGE, number, _IMAGE.pack(seed, *size, flags, len(described)), described, pixels or b"")


def done(settings: Mapping[str, Any]) -> bytes:
    """Say that all is done, and how it was made."""
    return _frame(Kind.DONE, 0, json.dumps(settings, allow_nan=False).encode("ascii"))


def error(refusal: RefusalError) -> bytes:
    """Say what went wrong, as an answer of that status would."""
    text = json.dumps(refusal.content()).encode("ascii")
    return _frame(Kind.ERROR, 0, _ERROR.pack(refusal.status), text)


def at_work() -> bytes:
    """Say that there is nothing to say yet."""
    return _frame(Kind.AT_WORK, 0)


def kind_of(made: bytes) -> Kind:
    """Tell what a frame is."""
    return Kind(_HEAD.unpack_from(made)[1])


def _frame(kind: Kind, image: int, *parts: bytes) -> bytes:
    return b"".join((_HEAD.pack(sum(map(len, parts)), kind, image), *parts))
