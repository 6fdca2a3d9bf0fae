"""What may be asked of a picture: the fields that every endpoint shares, and the requests that they come to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..runtime.request import make_request
from ..runtime.samplers import SAMPLERS, resolve_sampler
from .http import RefusalError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

    from ..runtime.request import Arguments, Request
    from .models import Model
    from .schema import Schema

MOST_IMAGES = 10
_SPACINGS = ("leading", "trailing", "linspace")


def optional(kind: str, description: str, **more: Any) -> Schema:
    """Describe a field that may be left out or null."""
    return {"type": [kind, "null"], "description": description, **more}


def choice(description: str, *values: str) -> Schema:
    """Describe an optional field that has one of a few values."""
    return optional("string", description, enum=[*values, None])


PROMPT: Schema = {
    "type": "string",
    "maxLength": 32_000,
    "description": "What the picture shall show. The model reads 75 tokens and drops the rest.",
}
MODEL: Schema = optional("string", "One of /v1/models; by default the first of them.")
COUNT: Schema = optional("integer", "How many pictures, 1 by default.", minimum=1, maximum=MOST_IMAGES)
SETTINGS: Mapping[str, Schema] = {
    "negative_prompt": optional("string", "What the picture shall not show.", maxLength=32_000),
    "num_inference_steps": optional("integer", "Steps of the sampler, 50 by default.", minimum=1, maximum=1000),
    "guidance_scale": optional(
        "number", "Of classifier-free guidance, 7.5 by default; 1 or less turns it off.", minimum=0, maximum=1000
    ),
    "seed": optional(
        "integer",
        "Of the first picture, the next one's being one more; drawn at random by default.",
        minimum=-(2**63),
        maximum=2**64 - 1,
    ),
    "sampler": optional("string", f"{', '.join(SAMPLERS)}; by default the model's own.", maxLength=100),
    "eta": optional("number", "Share of ancestral noise of ddim, 0 by default.", minimum=0, maximum=1),
    "timestep_spacing": choice("Of the steps; by default the sampler's own.", *_SPACINGS),
    "guidance_interval": optional(
        "array",
        "Approximate: guidance between these two noise levels (sigma) alone; by default everywhere.",
        items={"type": "number", "minimum": 0},
        minItems=2,
        maxItems=2,
    ),
    "cache_interval": optional(
        "integer", "Approximate: the whole U-Net in every so many steps; 1 by default.", minimum=1, maximum=1000
    ),
    "encoder_interval": optional(
        "integer",
        "Approximate: the U-Net's encoder in every so many of the steps that run the whole; 1 by default.",
        minimum=1,
        maximum=1000,
    ),
    "clip_skip": optional("integer", "Last layers of the text encoder to leave out.", minimum=0, maximum=100),
}


def make_requests(
    model: Model, fields: Mapping[str, Any], count: int, *, latents: NDArray[np.float32] | None = None
) -> list[Request]:
    """Make one request a picture: each has its own noise and its own place in the queue.

    Together they so take no more memory than the server was set up for.

    Parameters
    ----------
    model
        That makes the pictures.
    fields
        ``prompt``, those of `SETTINGS`, ``width`` and ``height``; null ones left out.
    count
        How many pictures; each seed is one more than that before.
    latents
        Unit gaussians to start from, of shape (count, 4, height / 8, width / 8), instead of those of the seeds.

    Raises
    ------
    RefusalError, InputError
        The fields make no sense for this model.

    """
    arguments: Arguments = {}
    for name in (
        "negative_prompt",
        "num_inference_steps",
        "guidance_scale",
        "seed",
        "eta",
        "timestep_spacing",
        "clip_skip",
        "guidance_interval",
        "cache_interval",
        "encoder_interval",
        "width",
        "height",
    ):
        if name in fields:
            arguments[name] = fields[name]
    if "sampler" in fields:
        try:
            arguments["sampler"] = resolve_sampler(fields["sampler"])
        except InputError as error:
            raise RefusalError(400, str(error), param="sampler") from None
    manifest = model.pipeline.bundle.manifest
    requests: list[Request] = []
    for number in range(count):
        if number:
            arguments["seed"] = requests[0].seeds[0] + number
        if latents is not None:
            arguments["latents"] = latents[number : number + 1]
        requests.append(make_request(manifest, fields["prompt"], **arguments))
    return requests
