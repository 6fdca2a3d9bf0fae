"""sdrt: Stable Diffusion v1 as ONNX and TensorRT engines, with a numpy runtime free of PyTorch.

import sdrt

with sdrt.load("v1-1") as pipe:
    (image,) = pipe("Great Wall photo", num_inference_steps=50, guidance_scale=7.5, seed=42)
image.save("wall.png")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import errors
from ._version import __version__
from .errors import SdrtError, SdrtWarning

if TYPE_CHECKING:
    from .runtime.pipeline import Pipeline, load

__all__ = ["Pipeline", "SdrtError", "SdrtWarning", "__version__", "errors", "load"]


def __getattr__(name: str) -> Any:
    """Import the pipeline when it is first asked for: numpy alone takes longer than all of ``sdrt --help``."""
    if name in {"Pipeline", "load"}:
        from .runtime import pipeline  # noqa: PLC0415

        return getattr(pipeline, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
