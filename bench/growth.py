"""How time grows with steps, images and pixels: ``python -m bench.growth AXIS --bundle NAME|DIR [--backend NAME] ...``.

It prints JSON: for each point the seconds of the denoising loop and of everything from prompt to pixels, the first
picture of each shape, which compiles and loads, not counted; and what grows how fast, as the exponent of a power law.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import TYPE_CHECKING, Any, Final

import numpy as np

import sdrt

if TYPE_CHECKING:
    from collections.abc import Sequence

PROMPT: Final = "Great Wall photo"
POINTS: Final[dict[str, tuple[int, ...]]] = {
    "steps": (1, 2, 5, 10, 20, 40),
    "batch": (1, 2, 4),
    "side": (256, 384, 512, 640, 768),
}
#: What each point of an axis asks for.
ARGUMENTS: Final[dict[str, tuple[str, ...]]] = {
    "steps": ("num_inference_steps",),
    "batch": ("num_images_per_prompt",),
    "side": ("width", "height"),
}


def picture(pipe: sdrt.Pipeline, **arguments: Any) -> dict[str, float]:
    """Make a picture and tell the seconds of its loop, and of everything."""
    began = time.perf_counter()
    loop = 0.0
    for step in pipe.steps(PROMPT, seed=42, sampler="ddim", **arguments):
        loop += step.seconds
        latents = step.latents
    pipe.decode(latents)
    return {"loop": loop, "picture": time.perf_counter() - began}


def measure(pipe: sdrt.Pipeline, axis: str, points: Sequence[int], rounds: int, steps: int) -> list[dict[str, Any]]:
    """Measure each point of an axis, `rounds` times.

    Parameters
    ----------
    pipe
        The bundle.
    axis
        A key of `POINTS`: the number of steps, the number of images, or the side of a square picture in pixels.
    points
        Along the axis.
    rounds
        Pictures of each point that count. They are made one after the other: each shape is compiled, and taking turns
        would drop compilations that are still wanted.
    steps
        Of each picture, where the axis is another.

    """
    found = []
    common = {} if axis == "steps" else {"num_inference_steps": steps}
    for point in points:
        asked = common | dict.fromkeys(ARGUMENTS[axis], point)
        picture(pipe, **asked | {"num_inference_steps": 1})
        taken = [picture(pipe, **asked) for _ in range(rounds)]
        found.append({axis: point} | {name: [seconds[name] for seconds in taken] for name in ("loop", "picture")})
    return found


def fit(sizes: Sequence[float], seconds: Sequence[float]) -> dict[str, float]:
    """Fit a power law, and a straight line.

    Returns
    -------
    dict
        ``exponent`` of seconds = c * size ** exponent, least squares of the logarithms; ``intercept`` and ``slope`` of
        seconds = intercept + slope * size, least squares, and the share ``r2`` of the variance that it explains.

    """
    exponent, _ = np.polyfit(np.log(sizes), np.log(seconds), 1)
    slope, intercept = np.polyfit(sizes, seconds, 1)
    left = np.square(np.asarray(seconds) - (intercept + slope * np.asarray(sizes))).sum()
    r2 = 1 - left / np.square(np.asarray(seconds) - np.mean(seconds)).sum()
    return {"exponent": float(exponent), "intercept": float(intercept), "slope": float(slope), "r2": float(r2)}


def fits(axis: str, points: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Fit the medians of the loop and of whole pictures against steps, images, or pixels."""
    sizes = [point[axis] ** (2 if axis == "side" else 1) for point in points]
    return {name: fit(sizes, [statistics.median(point[name]) for point in points]) for name in ("loop", "picture")}


def main() -> None:
    """Measure one axis and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.growth", description=__doc__.split(":", maxsplit=1)[0])
    parser.add_argument("axis", choices=POINTS)
    parser.add_argument("--bundle", required=True)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--points", type=int, nargs="+", help="along the axis")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4, help="of each picture, where the axis is another")
    options = parser.parse_args()
    points = options.points or POINTS[options.axis]
    with sdrt.load(options.bundle, backend=options.backend) as pipe:
        found = measure(pipe, options.axis, points, options.rounds, options.steps)
        backend = pipe.backend
    print(json.dumps({"axis": options.axis, "backend": backend, "points": found, "fits": fits(options.axis, found)}))


if __name__ == "__main__":
    main()
