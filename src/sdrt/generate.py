"""`sdrt run`: a prompt to files."""

from __future__ import annotations

import math
import os
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import progress
from .engines import demo, store
from .errors import InputError
from .runtime.backends import AUTO
from .runtime.images import save_png
from .runtime.pipeline import load
from .runtime.request import make_request

if TYPE_CHECKING:
    from .runtime.pipeline import Pipeline
    from .runtime.request import Request

_SLUG_LENGTH = 48


def generate(
    prompt: str,
    bundle: str | None,
    output: Path | None,
    *,
    backend: str,
    began: float,
    negative_prompt: str,
    steps: int,
    cfg_scale: float,
    sampler: str | None,
    eta: float,
    spacing: str | None,
    seed: int | None,
    width: int | None,
    height: int | None,
    batch: int,
    clip_skip: int | None,
    guidance_interval: tuple[float, float] | None,
    cache_interval: int,
    encoder_interval: int,
    vae_tiling: bool | None,
) -> dict[str, Any]:
    """Generate images and save them; the arguments are those of the command line.

    Parameters
    ----------
    began
        When the command did, by `time.perf_counter`.

    Returns
    -------
    dict
        What was made, where it is, and how long it took in seconds.

    """
    _check_output(output)
    with load(fallback() if bundle is None else bundle, backend=backend) as pipe:
        request = make_request(
            pipe.bundle.manifest,
            prompt,
            negative_prompt=negative_prompt,
            num_inference_steps=steps,
            guidance_scale=cfg_scale,
            seed=seed,
            height=height,
            width=width,
            num_images_per_prompt=batch,
            sampler=sampler,
            eta=eta,
            timestep_spacing=spacing,
            clip_skip=clip_skip,
            guidance_interval=guidance_interval,
            cache_interval=cache_interval,
            encoder_interval=encoder_interval,
            vae_tiling=vae_tiling,
        )
        paths = _paths(output, request)
        opened = time.perf_counter()
        durations: list[float] = []
        with progress.steps_bar(len(request.table), f"denoising on {pipe.backend}", _remark(pipe, backend)) as count:
            for step in pipe.run(request):
                if not durations:
                    first_step = time.perf_counter() - step.seconds
                durations.append(step.seconds)
                latents = step.latents
                count()
        denoised = time.perf_counter()
        images = pipe.pictures(request, latents)
        decoded = time.perf_counter()
        name, folder, ran_on = pipe.bundle.name, str(pipe.bundle.folder), pipe.backend
    for image, path in zip(images, paths, strict=True):
        save_png(image, path)
    return {
        "bundle": name,
        "bundle_folder": folder,
        "backend": ran_on,
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "sampler": request.sampler,
        "steps": steps,
        "cfg_scale": request.guidance_scale,
        "width": request.width,
        "height": request.height,
        "clip_skip": request.clip_skip,
        # null for an open end: JSON has no infinity
        "guidance_interval": request.guidance_interval
        and [end if math.isfinite(end) else None for end in request.guidance_interval],
        "cache_interval": request.cache_interval,
        "encoder_interval": request.encoder_interval,
        "images": [
            {"path": str(path), "seed": image_seed} for path, image_seed in zip(paths, request.seeds, strict=True)
        ],
        "seconds": {
            "open": opened - began,
            "prepare": denoised - opened - sum(durations),
            "until_first_step": first_step - began,
            "denoise": sum(durations),
            "decode": decoded - denoised,
            "total": time.perf_counter() - began,
        },
        "iterations_per_second": len(durations) / sum(durations),
    }


def _remark(pipe: Pipeline, backend: str) -> str | None:
    """Tell who left the choice to us what would be faster and is not the same, if anything."""
    if backend != AUTO or pipe.backend != "openvino:fp32":
        return None
    from .runtime.openvino import default_precision  # noqa: PLC0415 - loaded in any case by now

    if default_precision() == "fp32":
        return None
    return "running on openvino:fp32; --backend openvino is faster, in bf16, and not quite the same picture"


def fallback() -> str | None:
    """Name the demo, and say so, where no bundle was ever built; else let the store choose."""
    if store.list_bundles():
        return None
    click.echo(
        "sdrt: no bundle is built yet, so this is the demo model, which knows coloured shapes alone: "
        "sdrt build --ckpt v1-1 builds the real one",
        err=True,
    )
    return demo.NAME


def _check_output(output: Path | None) -> None:
    """Say before minutes of work that there is no place for their result."""
    if output is None or output.is_dir():
        folder = output or Path()
    else:
        if output.suffix.lower() != ".png":
            raise InputError(f"output is {str(output)!r}: expected a name that ends in .png, or a folder that exists")
        folder = output.parent
    if not folder.is_dir():
        raise InputError(f"there is no folder {str(folder)!r} to save to: make it first, or give another path with -o")
    if not os.access(folder, os.W_OK):
        raise InputError(f"{str(folder)!r} cannot be written to: change its permissions, or give another path with -o")


def _paths(output: Path | None, request: Request) -> list[Path]:
    """Name the files: as asked, numbered where there are several, or after prompt and seed, overwriting nothing."""
    if output is not None and not output.is_dir():
        if len(request.seeds) == 1:
            return [output]
        return [output.with_name(f"{output.stem}-{number}{output.suffix}") for number in range(len(request.seeds))]
    folder = output or Path()
    slug = re.sub(r"[^a-z0-9]+", "-", request.prompts[0].lower()).strip("-")[:_SLUG_LENGTH].rstrip("-") or "image"
    return [_free(folder, f"{slug}-{seed}") for seed in request.seeds]


def _free(folder: Path, stem: str) -> Path:
    path, number = folder / f"{stem}.png", 1
    while path.exists():
        number += 1
        path = folder / f"{stem}-{number}.png"
    return path
