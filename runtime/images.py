"""Arrays to pictures, and pictures to files that say how they were made."""

from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING

import numpy as np

from ..errors import InputError, SdrtError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray
    from PIL.Image import Image

_KEY = "parameters"


def to_pil(pixels: NDArray[np.float32], parameters: str) -> Image:
    """Make a PIL image of a float32 array of shape (height, width, 3) in [0, 1], `parameters` in its ``info``."""
    from PIL import Image  # noqa: PLC0415 - 0.1 s that calls for arrays need not pay

    image = Image.fromarray((pixels * 255).round().astype(np.uint8))
    image.info[_KEY] = parameters
    return image


def encode(image: Image, file_format: str = "png", quality: int = 100) -> bytes:
    """Give the bytes of a picture's file: ``png`` with its ``parameters`` text, ``jpeg`` or ``webp``.

    `quality`, 0 to 100, is for the latter two.
    """
    from PIL.PngImagePlugin import PngInfo  # noqa: PLC0415

    file = io.BytesIO()
    if file_format == "png":
        info = PngInfo()
        if text := image.info.get(_KEY):
            info.add_text(_KEY, text)
        image.save(file, format="PNG", pnginfo=info)
    else:
        image.save(file, format=file_format.upper(), quality=quality)
    return file.getvalue()


def save_png(image: Image, path: Path) -> None:
    """Write a PNG with its ``parameters`` text, whole or not at all.

    Raises
    ------
    SdrtError
        It cannot be written; the message says why.

    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        draft.write_bytes(encode(image))
        draft.replace(path)
    except OSError as error:
        raise SdrtError(f"{path} could not be written ({error.strerror or error}): choose another path") from error
    finally:
        draft.unlink(missing_ok=True)


def read_parameters(path: Path) -> str:
    """Read the ``parameters`` text of a PNG.

    Raises
    ------
    InputError
        There is no such file, it is no picture, or it has no such text.

    """
    from PIL import Image  # noqa: PLC0415

    try:
        with Image.open(path) as image:
            text = image.info.get(_KEY)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} cannot be read as a picture ({error}): expected a PNG that sdrt wrote") from None
    if not isinstance(text, str):
        raise InputError(f"{path} has no {_KEY!r} text: expected a PNG written by sdrt or Stable Diffusion web UI")
    return text
