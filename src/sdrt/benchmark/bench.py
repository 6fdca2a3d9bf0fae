"""`sdrt bench`: from its options to its figures."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..engines import demo, store
from ..engines.devices import nvidia_gpus
from ..errors import BackendError, InputError, SdrtError
from ..generate import fallback
from ..runtime.backends import choose, obstacle
from ..runtime.request import make_request
from .contenders import parse_peers
from .flops import graph_flops
from .machine import describe, load_average
from .report import facts
from .rounds import compete
from .settings import PARTS, PROMPT, SEED, START, Settings
from .start import measure_starts

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..engines.bundle import Bundle
    from ..runtime.request import Request


def bench(
    bundle: str | None,
    *,
    backend: str,
    compare: str | None,
    only: str | None,
    ckpt: str | None,
    rounds: int,
    tell: Callable[[str], object],
    **asked: Any,
) -> dict[str, Any]:
    """Measure a bundle, and peers beside it; the arguments are those of the command line.

    Parameters
    ----------
    tell
        Called with a line for each thing that is begun.

    Returns
    -------
    dict
        Which bundle it is, and what `report.facts` says.

    """
    peers = parse_peers(compare)
    wanted = _parse_only(only)
    spec = fallback() if bundle is None else bundle
    opened = store.resolve(spec, obstacle=lambda found: obstacle(found, backend))
    if reason := obstacle(opened, backend):
        raise BackendError(f"{opened.folder} cannot be run here: {reason}")
    settings = _settings(opened, choose(opened, backend), wanted, ckpt, rounds, **asked)
    if peers and _runs_on_gpu(settings.backend):
        raise InputError(
            f"--compare compares on the CPU, and {opened.folder} runs on an NVIDIA GPU: set CUDA_VISIBLE_DEVICES= to "
            "have it on the CPU"
        )
    if peers and not settings.parts:
        raise InputError(f"--compare compares {', '.join(PARTS)}, and --only asks for {START} alone: add one of them")
    machine = describe()
    starts = measure_starts(settings, tell) if START in wanted else None
    records = compete(settings, peers, tell) if settings.parts else {}
    machine["load_average_after"] = load_average()
    manifest = opened.manifest
    bundle_facts = {"bundle": opened.name, "model": manifest.model.source, "precision": manifest.precision}
    return bundle_facts | facts(settings, records, starts, machine)


def _parse_only(only: str | None) -> tuple[str, ...]:
    """Read which parts are wanted; all if nothing is said."""
    every = (*PARTS, START)
    names = [name.strip() for name in (only or "").split(",") if name.strip()]
    for name in names:
        if name not in every:
            raise InputError(f"there is no part {name!r} to measure: expected some of {', '.join(every)}")
    return tuple(part for part in every if not names or part in names)


def _settings(
    bundle: Bundle,
    backend: str,
    wanted: tuple[str, ...],
    ckpt: str | None,
    rounds: int,
    *,
    launches: int,
    steps: int,
    width: int | None,
    height: int | None,
    batch: int,
    sampler: str | None,
    cfg_scale: float,
    guidance_interval: tuple[float, float] | None,
    cache_interval: int,
    encoder_interval: int,
) -> Settings:
    """Check what is asked for before anything is loaded, and fill in what it leaves open."""
    request = make_request(
        bundle.manifest,
        PROMPT,
        num_inference_steps=steps,
        guidance_scale=cfg_scale,
        seed=SEED,
        height=height,
        width=width,
        num_images_per_prompt=batch,
        sampler=sampler,
        guidance_interval=guidance_interval,
        cache_interval=cache_interval,
        encoder_interval=encoder_interval,
    )
    flops, no_floor = _step_flops(bundle, backend, request)
    return Settings(
        bundle=str(bundle.folder),
        backend=backend,
        steps=steps,
        width=request.width,
        height=request.height,
        batch=batch,
        sampler=request.sampler,
        cfg_scale=request.guidance_scale,
        rounds=rounds,
        launches=launches,
        guidance_interval=request.guidance_interval,
        cache_interval=cache_interval,
        encoder_interval=encoder_interval,
        parts=tuple(part for part in PARTS if part in wanted),
        checkpoint=_checkpoint(bundle, ckpt),
        step_flops=flops,
        no_floor=no_floor,
    )


def _runs_on_gpu(backend: str) -> bool:
    return bool(nvidia_gpus()) and not backend.startswith("openvino")


def _step_flops(bundle: Bundle, backend: str, request: Request) -> tuple[int | None, str | None]:
    """Count the operations of a guided step, or tell why there is nothing to compare it with."""
    if _runs_on_gpu(backend):
        return None, "it is the rate of the CPU, and this runs on an NVIDIA GPU"
    unet = bundle.component("unet")
    rows = len(request.seeds) * (2 if request.guided else 1)
    shape = zip(unet.inputs[0].shape, (rows, *request.latent_shape), strict=True)
    sizes = {dim.name: size for dim, size in shape if not isinstance(dim, int)}
    try:
        return graph_flops(bundle.path(unet.graph), sizes), None
    except SdrtError as error:
        return None, str(error)


def _checkpoint(bundle: Bundle, given: str | None) -> str | None:
    """Find the weights that a bundle was made of, for peers that need them; nothing is downloaded for that.

    Raises
    ------
    InputError
        What the caller has given is none.

    """
    if given is not None:
        from ..export.hub import parse_hub_spec  # noqa: PLC0415 - for those who give one

        if not Path(given).expanduser().exists() and given != demo.NAME and parse_hub_spec(given) is None:
            raise InputError(f"there is no checkpoint {given!r}: expected what sdrt build --ckpt takes")
        return given
    source = bundle.manifest.model.source
    if source == demo.NAME:
        return source
    words = _words(bundle.manifest.command)
    for word, following in zip(words, [*words, ""][1:], strict=True):
        path = following if word == "--ckpt" else word.removeprefix("--ckpt=") if word.startswith("--ckpt=") else ""
        if path and Path(path).expanduser().exists():
            return path
    return _in_cache(source)


def _words(command: str) -> list[str]:
    try:
        return shlex.split(command)
    except ValueError:  # it is for people, and may be anything
        return []


def _in_cache(source: str) -> str | None:
    """Find a repository's diffusers folder among what was downloaded."""
    repo, _, revision = source.partition("@")
    if "/" not in repo or not revision:
        return None
    try:
        from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415 - for those who have built from the hub
        from huggingface_hub.errors import HFValidationError  # noqa: PLC0415
    except ImportError:
        return None
    try:
        index = try_to_load_from_cache(repo, "model_index.json", revision=revision)
    except HFValidationError:
        return None
    return str(Path(index).parent) if isinstance(index, str) else None
