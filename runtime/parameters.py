"""The `parameters` text that Stable Diffusion web UI (A1111) writes into its PNGs, and reading it back."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from .._version import __version__
from .samplers import SAMPLERS

if TYPE_CHECKING:
    from ..engines.bundle import Bundle
    from .request import Request

_NEGATIVE = "Negative prompt: "
_PAIR = re.compile(r'\s*(?P<key>[\w ./-]+):\s*(?P<value>"(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')


def describe(bundle: Bundle, request: Request, image: int) -> str:
    """Write down how an image was made.

    Parameters
    ----------
    bundle
        The model.
    request
        The call.
    image
        Which of its images.

    Returns
    -------
    str
        The prompt, the negative prompt where there is one, and a line of ``key: value`` pairs. ``Clip skip`` counts as
        A1111 does, from 1; ``RNG: CPU`` says that the seed is for torch's CPU generator.

    """
    unet = bundle.component("unet")
    settings = {
        "Steps": request.table.num_inference_steps,
        "Sampler": SAMPLERS[request.sampler].label,
        "CFG scale": f"{request.guidance_scale:g}",
        "Seed": request.seeds[image],
        "Size": f"{request.width}x{request.height}",
        "Model hash": unet.files[-1].sha256[:10],
        "Model": bundle.name,
        "RNG": "CPU",
    }
    if request.clip_skip:
        settings["Clip skip"] = request.clip_skip + 1
    if request.eta:
        settings["Eta"] = f"{request.eta:g}"
    if request.guided and request.guidance_interval is not None:
        settings["Guidance interval"] = ",".join(f"{end:g}" for end in request.guidance_interval)
    if request.cache_interval > 1:
        settings["Cache interval"] = request.cache_interval
    if request.encoder_interval > 1:
        settings["Encoder interval"] = request.encoder_interval
    settings["Version"] = f"sdrt {__version__}"
    lines = [request.prompts[image]]
    if request.guided and request.negative_prompts[image]:
        lines.append(_NEGATIVE + request.negative_prompts[image])
    lines.append(", ".join(f"{key}: {_quoted(str(value))}" for key, value in settings.items()))
    return "\n".join(lines)


def parse(text: str) -> dict[str, str]:
    """Read such a text, of any program that writes it.

    Returns
    -------
    dict
        ``Prompt``, ``Negative prompt`` where there is one, and every pair of the last line under its own key.

    """
    *lines, last = text.strip().split("\n")
    settings = {match["key"].strip(): _unquoted(match["value"]) for match in _PAIR.finditer(last)}
    if "Steps" not in settings:
        lines.append(last)
        settings = {}
    prompt, _, negative = ("\n" + "\n".join(lines)).partition(f"\n{_NEGATIVE}")
    found = {"Prompt": prompt.strip()}
    if negative:
        found["Negative prompt"] = negative.strip()
    return found | settings


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if re.search(r'[,:"\n]', value) else value


def _unquoted(value: str) -> str:
    value = value.strip()
    if value.startswith('"'):
        try:
            return str(json.loads(value))
        except ValueError:
            return value
    return value
