"""What less work costs: ``python -m bench.approximations [--bundle NAME|DIR] [--backend NAME] [--sampler NAME] ...``.

Settings of ``guidance_interval``, ``cache_interval`` and ``encoder_interval`` are timed beside the exact one, taking
turns, and each kind of evaluation of the U-Net by itself. With the demo model the pictures of prompts that it never saw
are judged, and compared with the exact ones. Peak memory is that of ``sdrt run`` in a process of its own. Results go to
``bench/results/approximations-BUNDLE-SAMPLER.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from tests.export.demo_prompts import accuracy, pictures, unseen, unseen_pairs

import sdrt
from bench.full_size import PROMPT, RESULTS, measured
from sdrt.engines import demo
from sdrt.engines.table import columns
from sdrt.runtime.request import make_request
from sdrt.runtime.samplers import default_sampler

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sdrt.runtime.work import Work

Setting = dict[str, Any]

INTERVAL: Final = (0.3, 5.0)
NARROW: Final = (0.5, 3.0)
SETTINGS: Final[dict[str, Setting]] = {
    "exact": {},
    "guidance 0.3 to 5": {"guidance_interval": INTERVAL},
    "guidance 0.5 to 3": {"guidance_interval": NARROW},
    "cache 2": {"cache_interval": 2},
    "cache 3": {"cache_interval": 3},
    "cache 4": {"cache_interval": 4},
    "cache 5": {"cache_interval": 5},
    "encoder 2": {"encoder_interval": 2},
    "encoder 3": {"encoder_interval": 3},
    "guidance 0.3 to 5, encoder 2": {"guidance_interval": INTERVAL, "encoder_interval": 2},
    "guidance 0.3 to 5, encoder 3": {"guidance_interval": INTERVAL, "encoder_interval": 3},
    "guidance 0.3 to 5, cache 2, encoder 2": {
        "guidance_interval": INTERVAL,
        "cache_interval": 2,
        "encoder_interval": 2,
    },
    "guidance 0.3 to 5, cache 3": {"guidance_interval": INTERVAL, "cache_interval": 3},
    "guidance 0.3 to 5, cache 5": {"guidance_interval": INTERVAL, "cache_interval": 5},
    "guidance 0.5 to 3, cache 3": {"guidance_interval": NARROW, "cache_interval": 3},
    "guidance 0.5 to 3, cache 5": {"guidance_interval": NARROW, "cache_interval": 5},
}


def kind(work: Work) -> str:
    """Name a kind of evaluation."""
    part = "decoder alone" if work.reuses_encoder else "whole U-Net" if work.whole else "outer blocks"
    return f"{part}, {'with and without prompt' if work.guided else 'prompt alone'}"


def timed(pipe: sdrt.Pipeline, rounds: int, **common: Any) -> tuple[dict[str, Any], dict[str, float]]:
    """Make one picture with each setting in turn, and again.

    Returns
    -------
    tuple
        By setting: the evaluations by kind, the median seconds of the loop and of everything from prompt to pixels.
        And the median seconds of each kind of evaluation.

    """
    loops: dict[str, list[float]] = defaultdict(list)
    wholes: dict[str, list[float]] = defaultdict(list)
    kinds: dict[str, list[float]] = defaultdict(list)
    evaluations: dict[str, dict[str, int]] = {}
    manifest = pipe.bundle.manifest
    approximate = {"guidance_interval": INTERVAL, "cache_interval": 2}
    for each in ({}, approximate, approximate | {"encoder_interval": 2}):  # loads what there is, and fills caches
        pipe(PROMPT, seed=0, output_type="np", **common | {"num_inference_steps": 4} | each)
    for round_ in range(rounds):
        for name, setting in SETTINGS.items():
            request = make_request(manifest, PROMPT, seed=round_, **common | setting)
            works = [kind(work) for work in request.work]
            evaluations[name] = dict(Counter(works))
            began = time.perf_counter()
            loop = 0.0
            for step in pipe.run(request):
                kinds[works[step.index]].append(step.seconds)
                loop += step.seconds
                latents = step.latents
            pipe.decode(latents)
            loops[name].append(loop)
            wholes[name].append(time.perf_counter() - began)
    figures = {
        name: {
            "evaluations": evaluations[name],
            "loop seconds": round(statistics.median(loops[name]), 4),
            "seconds": round(statistics.median(wholes[name]), 4),
        }
        for name in SETTINGS
    }
    return figures, {name: round(statistics.median(seconds), 4) for name, seconds in kinds.items()}


def judged(pipe: sdrt.Pipeline, count: int, **common: Any) -> dict[str, dict[str, float]]:
    """By setting: shares of pictures that keep to their prompts, and the median PSNR against the exact pictures."""
    kinds_of_prompt = {
        "unseen prompts": ("all", unseen(count, seed=1)),
        "two objects": ("pair", unseen_pairs(count, 3)),
    }
    exact: dict[str, list[NDArray[np.uint8]]] = {}
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for name, setting in SETTINGS.items():
        ratios = []
        for title, (attribute, asked) in kinds_of_prompt.items():
            images = pictures(pipe, [text for _, text in asked], **common | setting)
            exact.setdefault(title, images)
            found[name][title] = round(accuracy(asked, images)[attribute], 4)
            ratios += [psnr(*pair) for pair in zip(images, exact[title], strict=True)]
        if setting:
            found[name]["PSNR"] = round(statistics.median(ratios), 1)
        print(f"{name}: {found[name]}", flush=True)
    return found


def psnr(image: NDArray[np.uint8], exact: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio in dB; infinite for equal pictures."""
    square = float(np.mean((image.astype(np.float64) - exact) ** 2))
    return 10 * float(np.log10(255**2 / square)) if square else float("inf")


def memory(bundle: Path, backend: str, sampler: str) -> dict[str, float]:
    """Peak resident memory of a run in a process of its own, mapped files counted, in GB."""
    options: dict[str, tuple[str, ...]] = {
        "exact": (),
        "guidance 0.3 to 5": ("--guidance-interval", "0.3,5"),
        "cache 2": ("--cache-interval", "2"),
        "encoder 2": ("--encoder-interval", "2"),
        "guidance 0.3 to 5, cache 2": ("--guidance-interval", "0.3,5", "--cache-interval", "2"),
    }
    with tempfile.TemporaryDirectory() as folder:
        common = ("--bundle", str(bundle), "--backend", backend, "--sampler", sampler, "--steps", "6", "-o", folder)
        return {name: measured("run", PROMPT, *common, *given)["peak_gb"] for name, given in options.items()}


def table(results: dict[str, Any]) -> str:
    """Lay out the settings for people."""
    rows = [("SETTING", "LOOP", "FASTER", "ALL", "FASTER", "UNSEEN", "PAIRS", "PSNR")]
    exact = results["settings"]["exact"]
    for name, figures in results["settings"].items():
        shares = (figures.get("unseen prompts"), figures.get("two objects"))
        rows.append(
            (
                name,
                *(
                    text
                    for key in ("loop seconds", "seconds")
                    for text in (f"{figures[key]:.3f} s", f"{exact[key] / figures[key]:.2f}x")
                ),
                *("" if share is None else f"{100 * share:.1f}%" for share in shares),
                f"{figures['PSNR']} dB" if "PSNR" in figures else "",
            )
        )
    kinds = [f"{name}: {seconds} s" for name, seconds in results["evaluation seconds"].items()]
    return "\n".join([columns(rows), *kinds, f"peak memory, GB: {results['peak memory GB']}"])


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(prog="python -m bench.approximations", description=__doc__.split(":")[0])
    parser.add_argument("--bundle", default=demo.NAME, help="with graphs for feature caching and encoder reuse")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--sampler", help="by default the model's")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=200, help="of each kind, with the demo model")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with sdrt.load(options.bundle, backend=options.backend) as pipe:
        manifest, folder, backend = pipe.bundle.manifest, pipe.bundle.folder, pipe.backend
        sampler = options.sampler or default_sampler(manifest.scheduler)
        common = {"num_inference_steps": options.steps, "sampler": sampler}
        results: dict[str, Any] = {
            "python": platform.python_version(),
            "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
            "load average before": [round(value, 1) for value in os.getloadavg()],
            "model": manifest.model.source,
            "precision": manifest.precision,
            "backend": backend,
            "sampler": sampler,
            "steps": options.steps,
            "rounds": options.rounds,
            # First: the peak of a process begins with the memory of the one that has started it.
            "peak memory GB": memory(folder, backend, sampler),
        }
        results["settings"], results["evaluation seconds"] = timed(pipe, options.rounds, **common)
        if manifest.model.source == demo.NAME:
            results["prompts of each kind"] = options.prompts
            for name, figures in judged(pipe, options.prompts, **common).items():
                results["settings"][name] |= figures
    results["load average after"] = [round(value, 1) for value in os.getloadavg()]
    output = options.output or RESULTS / f"approximations-{folder.name}-{sampler}.json"
    output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
