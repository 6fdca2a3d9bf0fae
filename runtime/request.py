"""What a caller asks for, checked once and complete."""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

from ..engines.manifest import DimRange
from ..errors import InputError
from .noise import check_seed
from .samplers import default_sampler, resolve_sampler, sampler_table
from .schedule import Schedule, check_count, is_number
from .tiling import check_tiling
from .work import Work, plan

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike, NDArray

    from ..engines.manifest import Manifest
    from .solvers import SamplerTable

_PIXELS = 8  # image pixels to a latent pixel, in every Stable Diffusion v1 model


@dataclass(frozen=True, eq=False)
class Request:
    """One call of the pipeline.

    Attributes
    ----------
    prompts, negative_prompts
        One of each for every image; the negative ones are empty strings where none were given.
    seeds
        One for every image.
    table
        The sampler's coefficients.
    guidance_scale
        Of classifier-free guidance (Ho & Salimans 2022); `guided` tells whether it is used.
    height, width
        Of the images, in pixels.
    clip_skip
        Last layers of the text encoder to leave out.
    latents
        Unit gaussian to start from, float32 of shape (N, 4, height / 8, width / 8), or None to draw it.
    guidance_interval
        The noise levels between which there is guidance, or None for all.
    cache_interval
        The whole U-Net runs once in so many evaluations.
    encoder_interval
        Of the whole U-Net the encoder runs once in so many of these.
    work
        What each of the table's evaluations comes to.
    vae_tiling
        Whether images are decoded in tiles, or None to choose by their size.

    """

    prompts: tuple[str, ...]
    negative_prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    sampler: str
    table: SamplerTable
    guidance_scale: float
    height: int
    width: int
    clip_skip: int
    eta: float
    latents: NDArray[np.float32] | None
    guidance_interval: tuple[float, float] | None
    cache_interval: int
    encoder_interval: int
    work: tuple[Work, ...]
    vae_tiling: bool | None

    @property
    def guided(self) -> bool:
        """Whether the network runs twice a step, as diffusers decides it: beyond 1."""
        return self.guidance_scale > 1

    @property
    def keeps_features(self) -> bool:
        """Whether some evaluation goes on from the deep features of another."""
        return not all(work.whole for work in self.work)

    @property
    def keeps_encoder(self) -> bool:
        """Whether some evaluation goes on from all that the encoder gave in another."""
        return any(work.reuses_encoder for work in self.work)

    @property
    def exact(self) -> bool:
        """Whether every evaluation does all of its work."""
        return set(self.work) == {Work(self.guided, whole=True)}

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one image's latents."""
        return (4, self.height // _PIXELS, self.width // _PIXELS)


class Arguments(TypedDict, total=False):
    """Keyword arguments of `Pipeline.__call__` and `Pipeline.steps`, which the former documents."""

    negative_prompt: str | Sequence[str] | None
    num_inference_steps: int
    guidance_scale: float
    seed: int | None
    height: int | None
    width: int | None
    num_images_per_prompt: int
    sampler: str | None
    eta: float
    timestep_spacing: str | None
    clip_skip: int | None
    latents: ArrayLike | None
    guidance_interval: tuple[float, float] | None
    cache_interval: int
    encoder_interval: int
    vae_tiling: bool | None


def make_request(
    manifest: Manifest,
    prompt: str | Sequence[str],
    *,
    negative_prompt: str | Sequence[str] | None = None,
    num_inference_steps: int = 50,
    guidance_scale: float = 7.5,
    seed: int | None = None,
    height: int | None = None,
    width: int | None = None,
    num_images_per_prompt: int = 1,
    sampler: str | None = None,
    eta: float = 0.0,
    timestep_spacing: str | None = None,
    clip_skip: int | None = None,
    latents: ArrayLike | None = None,
    guidance_interval: tuple[float, float] | None = None,
    cache_interval: int = 1,
    encoder_interval: int = 1,
    vae_tiling: bool | None = None,
) -> Request:
    """Check a call against the model and fill in what it leaves open; `Pipeline.__call__` documents the arguments.

    Raises
    ------
    InputError
        For the first argument that makes no sense.

    """
    prompts = _texts("prompt", prompt)
    copies = check_count("num_images_per_prompt", num_images_per_prompt)
    negative = _texts("negative_prompt", "" if negative_prompt is None else negative_prompt)
    if len(negative) not in (1, len(prompts)):
        raise InputError(f"there are {len(negative)} negative prompts for {len(prompts)} prompts: give one, or as many")
    if len(negative) == 1:
        negative *= len(prompts)
    if not is_number(guidance_scale) or guidance_scale < 0:
        raise InputError(f"guidance scale is {guidance_scale!r}: expected a number of at least 0, such as 7.5")
    images = len(prompts) * copies
    scale = float(guidance_scale)
    most = _unet_range(manifest, 0).max
    rows = images * (2 if scale > 1 else 1)
    if rows > most:
        raise InputError(
            f"{images} images at once are too many for this bundle: expected at most {most // (rows // images)}; "
            "make them in several calls"
        )
    height = _side("height", height, manifest, 2)
    width = _side("width", width, manifest, 3)
    first = secrets.randbits(32) if seed is None else check_seed(seed)
    layers = manifest.text.layers
    skipped = manifest.text.clip_skip if clip_skip is None else clip_skip
    if isinstance(skipped, bool) or not isinstance(skipped, int) or not 0 <= skipped < layers:
        raise InputError(f"clip skip is {skipped!r}: expected a whole number from 0 to {layers - 1}")
    schedule = Schedule.from_config(dict(manifest.scheduler))
    chosen = default_sampler(manifest.scheduler) if sampler is None else resolve_sampler(sampler)
    table = sampler_table(chosen, schedule, num_inference_steps, eta=eta, spacing=timestep_spacing)
    interval = _guidance_interval(guidance_interval)
    every = _kept_interval("cache_interval", cache_interval, manifest, "unet_shallow", "feature caching")
    encoder_every = _kept_interval("encoder_interval", encoder_interval, manifest, "unet_encoder", "encoder reuse")
    sigmas = schedule.sigmas_at(table.timesteps).tolist()
    return Request(
        prompts=tuple(text for text in prompts for _ in range(copies)),
        negative_prompts=tuple(text for text in negative for _ in range(copies)),
        seeds=tuple(check_seed(first + image) for image in range(images)),
        sampler=chosen,
        table=table,
        guidance_scale=scale,
        height=height,
        width=width,
        clip_skip=skipped,
        eta=float(eta),
        latents=_latents(latents, (images, 4, height // _PIXELS, width // _PIXELS)),
        guidance_interval=interval,
        cache_interval=every,
        encoder_interval=encoder_every,
        work=plan(
            sigmas,
            guided=scale > 1,
            guidance_interval=interval,
            cache_interval=every,
            encoder_interval=encoder_every,
        ),
        vae_tiling=check_tiling(vae_tiling, manifest),
    )


def _texts(what: str, given: str | Sequence[str]) -> tuple[str, ...]:
    texts = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, list | tuple) else None
    if not texts or not all(isinstance(text, str) for text in texts):
        raise InputError(f"{what} is {given!r}: expected a string, or a list of strings")
    return texts


def _unet_range(manifest: Manifest, axis: int) -> DimRange:
    """Give what the U-Net's graph allows for an axis of the latents."""
    (unet,) = (component for component in manifest.components if component.name == "unet")
    size = unet.inputs[0].shape[axis]
    return size if isinstance(size, DimRange) else DimRange("fixed", size, size)


def _side(name: str, given: int | None, manifest: Manifest, axis: int) -> int:
    allowed = _unet_range(manifest, axis)
    if given is None:
        return _PIXELS * min(max(manifest.latent.sample_size, allowed.min), allowed.max)
    side = check_count(name, given)
    least, most = _PIXELS * allowed.min, _PIXELS * allowed.max
    if side % _PIXELS:
        below = max(side // _PIXELS, 1) * _PIXELS
        raise InputError(f"{name} is {side}: expected a multiple of {_PIXELS}, such as {below} or {below + _PIXELS}")
    if not least <= side <= most:
        wanted = f"{least}" if least == most else f"{least} to {most}"
        raise InputError(f"{name} is {side}: expected {wanted}, which is what this bundle was built for")
    return side


def _guidance_interval(given: Any) -> tuple[float, float] | None:
    if given is None:
        return None
    ends = tuple(given) if isinstance(given, tuple | list) else ()
    if len(ends) != 2 or not all(is_number(end) or end == math.inf for end in ends) or not 0 <= ends[0] < ends[1]:
        raise InputError(
            f"guidance interval is {given!r}: expected two noise levels (sigma), the lower one first, such as (0.3, 5)"
        )
    return float(ends[0]), float(ends[1])


def _kept_interval(name: str, given: int, manifest: Manifest, graph: str, purpose: str) -> int:
    """Check how often something is computed that is kept in between, which a graph goes on from."""
    interval = check_count(name, given)
    if interval > 1 and all(component.name != graph for component in manifest.components):
        if manifest.kind == "engine":
            advice = "leave it out, or run an ONNX bundle on the CPU"
        else:
            advice = f"build it again with sdrt build --ckpt {manifest.model.source} --force"
        what = name.replace("_", " ")
        raise InputError(f"{what} is {interval}, and this bundle has no graph for {purpose}: {advice}")
    return interval


def _latents(given: Any, shape: tuple[int, ...]) -> NDArray[np.float32] | None:
    if given is None:
        return None
    try:
        latents = np.asarray(given, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise InputError(f"latents are no array of numbers: {error}") from None
    if latents.shape != shape:
        raise InputError(f"latents have the shape {latents.shape}: expected {shape}, as images and sizes ask for")
    if not math.isfinite(float(np.abs(latents).max())):
        raise InputError("latents hold values that are not finite: expected a unit gaussian")
    return latents
