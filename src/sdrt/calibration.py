"""Steps of a model's own denoising, from which int8 quantisation learns what its layers read."""

from __future__ import annotations

import math
from importlib.util import find_spec
from itertools import count, cycle, islice
from typing import TYPE_CHECKING

import numpy as np

from .engines import demo
from .engines.post_training import Samples
from .errors import InputError
from .runtime.backends import AUTO
from .runtime.pipeline import Pipeline
from .runtime.request import make_request

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from .engines.bundle import Bundle
    from .runtime.request import Request

PROMPTS = (
    "a photograph of an astronaut riding a horse",
    "portrait of an old fisherman with a grey beard, natural light, 85mm",
    "a bowl of ramen with a soft-boiled egg on a wooden table, top view",
    "the Great Wall of China at sunrise, mist in the valleys",
    "a red fox sleeping in fresh snow",
    "oil painting of a harbour with sailing boats, impressionism",
    "a futuristic city at night, neon lights reflected in wet streets",
    "close-up of a bumblebee on a purple thistle, macro photograph",
    "a pencil sketch of a cathedral, cross-hatching",
    "a cosy living room with a fireplace and a sleeping cat",
    "a yellow taxi in New York, motion blur",
    "watercolour of a village in Provence with lavender fields",
    "two children building a sandcastle on the beach",
    "a steam locomotive crossing a viaduct in autumn",
    "a logo of a mountain, flat vector, white background",
    "an astronomer's desk with brass instruments, chiaroscuro, by Rembrandt",
    "a macaw flying over the rainforest",
    "a plate with three strawberries, product photograph, studio lighting",
    "a black and white photograph of a jazz band on stage",
    "aerial view of a winding river in a desert",
    "a knight in shining armour, digital painting, highly detailed, trending on artstation",
    "a glass of water on a windowsill, rain outside",
    "a crowd in a street market in Marrakesh",
    "an isometric drawing of a tiny greenhouse, pastel colours",
)
"""Subjects, media and compositions of all kinds."""

_LEVELS = 6
# Each round has every noise level; the last of four is held out.
_ROUNDS = 4
_SPACINGS = ("trailing", "leading")
_GUIDANCE = 7.5


def read_prompts(path: Path) -> tuple[str, ...]:
    """Read a list of prompts, one a line; empty lines are skipped.

    Raises
    ------
    InputError
        The file cannot be read, or holds no prompt.

    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): give a text file with a prompt a line") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8: give a text file with a prompt a line") from None
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise InputError(f"{path} holds no prompt: give a text file with a prompt a line")
    return prompts


def default_prompts(bundle: Bundle) -> tuple[str, ...]:
    """Choose prompts that a model understands: `PROMPTS`, or captions of the demo model's kind."""
    if bundle.manifest.model.source != demo.NAME:
        return PROMPTS
    from .export.demo.captions import caption  # noqa: PLC0415 - torch is not among what these two import
    from .export.demo.scenes import sample_scene  # noqa: PLC0415

    rng = np.random.default_rng(0)
    captions = (caption(sample_scene(rng), rng) for _ in count())
    return tuple(islice(filter(None, captions), len(PROMPTS)))


def calibrate(bundle: Bundle, prompts: Sequence[str], report: Callable[[str, int, int], None]) -> Samples:
    """Denoise each prompt as far as one of several noise levels, and keep what the U-Net reads there, with guidance.

    Parameters
    ----------
    bundle
        The fp32 bundle.
    prompts
        Each is used at least once, and all as often as is needed for every noise level to be seen and held out.
    report
        Called with what is being done, the bytes of weights gone through, and those in all.

    Raises
    ------
    BackendError, BundleCorruptError
        The bundle does not run here.

    """
    rounds = _ROUNDS * math.ceil(len(prompts) / (_LEVELS * _ROUNDS))
    weights = sum(entry.bytes for entry in bundle.component("unet").files)
    done, total = 0, rounds * sum(range(_LEVELS))
    samples = []
    # In bf16, where the CPU has that, it takes half the time, and what the layers read has the same ranges.
    with Pipeline(bundle, backend="openvino" if find_spec("openvino") else AUTO) as pipe:
        for index, prompt in enumerate(islice(cycle(prompts), rounds * _LEVELS)):
            level = index % _LEVELS
            request = _request(bundle, prompt, index)
            latents = np.asarray(request.latents, np.float32) * request.table.initial_scale
            for step in islice(pipe.run(request), level):
                latents = step.latents
                done += 1
                report("calibrating: denoising", done * weights, total * weights)
            told = np.concatenate([pipe.embed([""]), pipe.embed([prompt], clip_skip=request.clip_skip)])
            timestep = request.table.timesteps[level : level + 1].astype(np.float32)
            samples.append(
                {
                    "latents": np.concatenate([latents, latents]).astype(np.float32),
                    "timestep": timestep,
                    "text_embeddings": told,
                }
            )
    held_out = [sample for index, sample in enumerate(samples) if _is_held_out(index)]
    return Samples([sample for index, sample in enumerate(samples) if not _is_held_out(index)], held_out)


def _request(bundle: Bundle, prompt: str, index: int) -> Request:
    """Ask for a picture in a few steps; rounds take turns with timesteps up to the last and down to the first."""
    side = bundle.manifest.latent.sample_size
    return make_request(
        bundle.manifest,
        prompt,
        num_inference_steps=_LEVELS,
        guidance_scale=_GUIDANCE,
        sampler="dpmpp_2m",
        timestep_spacing=_SPACINGS[index // _LEVELS % len(_SPACINGS)],
        latents=np.random.default_rng(index).standard_normal((1, 4, side, side), np.float32),
    )


def _is_held_out(index: int) -> bool:
    return index // _LEVELS % _ROUNDS == _ROUNDS - 1
