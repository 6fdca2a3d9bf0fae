"""The samplers by name, and their tables of coefficients.

A new one is a function in `solvers` and an entry in `SAMPLERS`; the denoising loop does not change.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from . import solvers
from .schedule import check_count, check_spacing, is_number
from .solvers import SamplerTable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from .schedule import Schedule

__all__ = ["SAMPLERS", "SamplerInfo", "SamplerTable", "resolve_sampler", "sampler_table"]


@dataclass(frozen=True)
class SamplerInfo:
    """What there is to know about a sampler before it runs.

    Attributes
    ----------
    label
        The name that Stable Diffusion web UI (A1111) shows and writes into its images.
    diffusers
        The scheduler class of diffusers whose steps it takes.
    default_spacing
        Of timesteps, where neither the caller nor the model's configuration names one.
    aliases
        Other names that are understood, on top of `label`, `diffusers` and the key; see `resolve_sampler`.
    build
        Makes the table from a schedule, a number of steps, a spacing and eta.
    takes_eta
        Whether eta, the share of ancestral noise, may be other than 0.

    """

    label: str
    diffusers: str
    default_spacing: str
    aliases: tuple[str, ...]
    build: Callable[[Schedule, int, str, float], SamplerTable]
    takes_eta: bool = False


SAMPLERS: Mapping[str, SamplerInfo] = MappingProxyType(
    {
        "ddpm": SamplerInfo("DDPM", "DDPMScheduler", "leading", (), solvers.ddpm),
        "ddim": SamplerInfo("DDIM", "DDIMScheduler", "leading", (), solvers.ddim, takes_eta=True),
        "plms": SamplerInfo("PLMS", "PNDMScheduler", "leading", ("pndm",), solvers.plms),
        "euler": SamplerInfo("Euler", "EulerDiscreteScheduler", "linspace", ("euler_discrete",), solvers.euler),
        "euler_a": SamplerInfo(
            "Euler a", "EulerAncestralDiscreteScheduler", "linspace", ("euler_ancestral", "k_euler_a"), solvers.euler_a
        ),
        "dpmpp_2m": SamplerInfo(
            "DPM++ 2M",
            "DPMSolverMultistepScheduler",
            "linspace",
            ("dpmsolver++", "dpm_solver_pp_2m", "k_dpmpp_2m"),
            solvers.dpmpp_2m,
        ),
    }
)


def _plain(name: str) -> str:
    return "".join(name.lower().split()).replace("-", "").replace("_", "")


_NAMES: Mapping[str, str] = MappingProxyType(
    {
        _plain(name): key
        for key, info in SAMPLERS.items()
        for name in (key, info.label, info.diffusers, info.diffusers.removesuffix("Scheduler"), *info.aliases)
    }
)


def resolve_sampler(name: str) -> str:
    """Return the key in `SAMPLERS` of the sampler that `name` means.

    Keys, labels, diffusers' class names and aliases are understood; case, spaces, hyphens and underscores are not
    looked at.

    Raises
    ------
    InputError
        For a name that means none; the message lists those that there are.

    """
    key = _NAMES.get(_plain(name)) if isinstance(name, str) else None
    if key is None:
        raise InputError(f"sampler is {name!r}: expected one of {', '.join(SAMPLERS)}")
    return key


def default_sampler(scheduler: Mapping[str, Any]) -> str:
    """Return the key of the sampler that a model's makers chose; PLMS where they chose none, or one that is not here.

    Parameters
    ----------
    scheduler
        The manifest's; ``sampler`` names it, as diffusers calls it.

    """
    return _NAMES.get(_plain(str(scheduler.get("sampler", ""))), "plms")


def sampler_table(
    sampler: str, schedule: Schedule, num_inference_steps: int, *, eta: float = 0.0, spacing: str | None = None
) -> SamplerTable:
    """Compute the coefficients of a sampler.

    Parameters
    ----------
    sampler
        A name that `resolve_sampler` understands.
    schedule
        The noise schedule that the model was trained with.
    num_inference_steps
        From 1 to ``schedule.num_train_timesteps``.
    eta
        DDIM's share of ancestral noise, 0 to 1; 0 for every other sampler.
    spacing
        ``leading``, ``trailing`` or ``linspace``; None for the schedule's own, and where it has none the sampler's
        default, which is what ``Scheduler.from_config(pipe.scheduler.config)`` gives in diffusers.

    Raises
    ------
    InputError
        For a value outside what is said above, or a combination that a solver cannot run.

    """
    key = resolve_sampler(sampler)
    info = SAMPLERS[key]
    steps = check_count("num_inference_steps", num_inference_steps, schedule.num_train_timesteps)
    if not is_number(eta) or eta < 0:
        raise InputError(f"eta is {eta!r}: expected a number from 0 to 1")
    if eta > 0 and not info.takes_eta:
        takers = ", ".join(name for name, other in SAMPLERS.items() if other.takes_eta)
        raise InputError(f"eta is {eta:g} and the sampler is {key}: eta is for {takers} alone; expected 0")
    return info.build(schedule, steps, spacing_of(key, schedule, spacing), float(eta))


def spacing_of(sampler: str, schedule: Schedule, spacing: str | None) -> str:
    """Return the spacing of timesteps that `sampler_table` takes for a key of `SAMPLERS`.

    Raises
    ------
    InputError
        There is no such spacing.

    """
    if spacing is not None:
        return check_spacing(spacing)
    return schedule.timestep_spacing or SAMPLERS[sampler].default_spacing
