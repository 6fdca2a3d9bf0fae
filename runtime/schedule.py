"""The noise schedule a model was trained with, and the timesteps at which a sampler evaluates it.

Letters as in Ho et al. 2020 (arXiv:2006.11239): at timestep t the model sees x_t = alpha_t x_0 + sigma_t eps, where
alpha_t = sqrt(alphas_cumprod[t]) and sigma_t = sqrt(1 - alphas_cumprod[t]).
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
SPACINGS = ("leading", "trailing", "linspace")

_MAX_BETA = 0.999


def _linear(start: float, end: float, count: int) -> NDArray[np.float64]:
    """Linear in beta. Ho et al. 2020, arXiv:2006.11239."""
    return np.linspace(start, end, count)


def _scaled_linear(start: float, end: float, count: int) -> NDArray[np.float64]:
    """Linear in sqrt(beta). Rombach et al. 2022, arXiv:2112.10752."""
    roots: NDArray[np.float64] = np.linspace(math.sqrt(start), math.sqrt(end), count)
    return roots * roots


def _cosine(_start: float, _end: float, count: int) -> NDArray[np.float64]:
    """Squared cosine in alphas_cumprod, each beta at most 0.999. Nichol & Dhariwal 2021, arXiv:2102.09672."""
    alphas_cumprod = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * math.pi / 2) ** 2
    steps: NDArray[np.float64] = 1 - alphas_cumprod[1:] / alphas_cumprod[:-1]
    return steps.clip(max=_MAX_BETA)


def _sigmoid(start: float, end: float, count: int) -> NDArray[np.float64]:
    """Sigmoid over -6..6. Xu et al. 2022 (GeoDiff), arXiv:2203.02923."""
    return start + (end - start) / (1 + np.exp(-np.linspace(-6, 6, count)))


_CURVES: Mapping[str, Callable[[float, float, int], NDArray[np.float64]]] = {
    "linear": _linear,
    "scaled_linear": _scaled_linear,
    "quadratic": _scaled_linear,
    "cosine": _cosine,
    "squaredcos_cap_v2": _cosine,
    "sigmoid": _sigmoid,
}
BETA_SCHEDULES = tuple(_CURVES)


def betas(schedule: str, start: float, end: float, num_train_timesteps: int) -> NDArray[np.float64]:
    """Return the variance that is added at each training timestep.

    Parameters
    ----------
    schedule
        ``linear``; ``scaled_linear`` (Stable Diffusion's); ``quadratic``, which is what tutorials on DDPM call a
        schedule linear in sqrt(beta), and so equals ``scaled_linear``; ``cosine`` (diffusers: ``squaredcos_cap_v2``);
        ``sigmoid``. A hyphen may stand for the underscore.
    start, end
        The first and the last beta, 0 < start <= end < 1. ``cosine`` does not use them.
    num_train_timesteps
        How many betas, 1000 for Stable Diffusion.

    Returns
    -------
    float64 of shape (num_train_timesteps,), each in (0, 1).

    Raises
    ------
    InputError
        For an unknown schedule or numbers outside the ranges above.

    """
    curve = _CURVES.get(schedule.lower().replace("-", "_")) if isinstance(schedule, str) else None
    if curve is None:
        raise InputError(f"beta schedule is {schedule!r}: expected one of {', '.join(BETA_SCHEDULES)}")
    count = check_count("num_train_timesteps", num_train_timesteps)
    for name, value in (("beta_start", start), ("beta_end", end)):
        if not is_number(value) or not 0 < value < 1:
            raise InputError(f"{name} is {value!r}: expected a number between 0 and 1")
    if start > end:
        raise InputError(f"beta_start is {start!r} and beta_end {end!r}: expected beta_start <= beta_end")
    return curve(float(start), float(end), count)


@dataclass(frozen=True)
class Schedule:
    """The noise schedule a model was trained with.

    The defaults are Stable Diffusion v1's.

    Parameters
    ----------
    beta_schedule, beta_start, beta_end, num_train_timesteps
        As `betas` takes them.
    prediction_type
        What the network predicts: ``epsilon`` (the noise), ``v_prediction`` (alpha eps - sigma x_0; Salimans & Ho
        2022, arXiv:2202.00512) or ``sample`` (x_0).
    steps_offset
        What is added to timesteps of ``leading`` spacing, so that the last one is this and not 0.
    set_alpha_to_one
        Whether the last step of DDIM and PLMS ends at alphas_cumprod 1 (True) or at alphas_cumprod[0] (False, as in
        Stable Diffusion v1). None is each sampler's default in diffusers: DDIM True, PLMS False.
    timestep_spacing
        The spacing for every sampler; None is each sampler's own default.

    Raises
    ------
    InputError
        For a value that makes no sense.

    """

    beta_schedule: str = "scaled_linear"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    num_train_timesteps: int = 1000
    prediction_type: str = "epsilon"
    steps_offset: int = 1
    set_alpha_to_one: bool | None = False
    timestep_spacing: str | None = None

    def __post_init__(self) -> None:
        betas(self.beta_schedule, self.beta_start, self.beta_end, self.num_train_timesteps)
        if self.prediction_type not in PREDICTION_TYPES:
            raise InputError(
                f"prediction_type is {self.prediction_type!r}: expected one of {', '.join(PREDICTION_TYPES)}"
            )
        offset = self.steps_offset
        if isinstance(offset, bool) or not isinstance(offset, int) or not 0 <= offset < self.num_train_timesteps:
            raise InputError(
                f"steps_offset is {offset!r}: expected an integer from 0 to {self.num_train_timesteps - 1}"
            )
        if self.set_alpha_to_one not in (None, True, False):
            raise InputError(f"set_alpha_to_one is {self.set_alpha_to_one!r}: expected true or false")
        if self.timestep_spacing is not None:
            check_spacing(self.timestep_spacing)
        if not (self.alphas_cumprod[0] < 1 and self.alphas_cumprod[-1] > 0):
            raise InputError(
                f"the beta schedule {self.beta_schedule} from {self.beta_start:g} to {self.beta_end:g} over "
                f"{self.num_train_timesteps} timesteps starts without noise or ends without signal: expected neither"
            )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Schedule:
        """Read a diffusers ``scheduler_config.json``, whichever scheduler class wrote it.

        Keys that belong to one solver (``skip_prk_steps``, ``solver_order``, ``use_karras_sigmas``...) are no part of
        the schedule and are not read; nor is ``clip_sample``, which diffusers switches off for Stable Diffusion. A key
        that is absent, or null, has the class's default here, with ``steps_offset`` 1, which diffusers' Stable
        Diffusion pipelines insist on; an absent ``set_alpha_to_one`` leaves the choice to the sampler.

        Raises
        ------
        InputError
            For values that make no sense, and for ``trained_betas`` and ``rescale_betas_zero_snr``, which sdrt does
            not support.

        """
        for key in ("trained_betas", "rescale_betas_zero_snr"):
            if config.get(key):
                raise InputError(f"the scheduler's configuration sets {key}: sdrt does not support it; remove it")
        fields = {name: config[name] for name in cls.__dataclass_fields__ if config.get(name) is not None}
        return cls(**{"set_alpha_to_one": None, **fields})

    @cached_property
    def alphas_cumprod(self) -> NDArray[np.float64]:
        """Signal's share of the variance at each timestep: float64 of shape (num_train_timesteps,), falling."""
        alphas = 1 - betas(self.beta_schedule, self.beta_start, self.beta_end, self.num_train_timesteps)
        alphas_cumprod: NDArray[np.float64] = np.multiply.accumulate(alphas)
        alphas_cumprod.flags.writeable = False
        return alphas_cumprod

    @cached_property
    def sigmas(self) -> NDArray[np.float64]:
        """Noise over signal, sigma_t / alpha_t, of Karras et al. 2022 (arXiv:2206.00364), at each timestep."""
        sigmas = np.sqrt((1 - self.alphas_cumprod) / self.alphas_cumprod)
        sigmas.flags.writeable = False
        return sigmas

    def sigmas_at(self, timesteps: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return noise over signal at `timesteps`, linear between whole ones."""
        return np.interp(timesteps, np.arange(self.num_train_timesteps), self.sigmas)


def is_number(value: object) -> bool:
    """Whether `value` is a finite number and no bool."""
    return isinstance(value, int | float | np.number) and not isinstance(value, bool) and math.isfinite(value)


def check_count(name: str, value: int, most: int | None = None) -> int:
    """Return `value` as a plain int of at least 1, and at most `most`; `InputError` otherwise."""
    wanted = "a whole number of at least 1" if most is None else f"a whole number from 1 to {most}"
    try:
        count = operator.index(value)
    except TypeError:
        raise InputError(f"{name} is {value!r}: expected {wanted}") from None
    if isinstance(value, bool) or count < 1 or (most is not None and count > most):
        raise InputError(f"{name} is {value!r}: expected {wanted}")
    return count


def check_spacing(spacing: str) -> str:
    """Return `spacing` if it is a known one; `InputError` otherwise."""
    if spacing not in SPACINGS:
        raise InputError(f"timestep spacing is {spacing!r}: expected one of {', '.join(SPACINGS)}")
    return spacing


def spaced_timesteps(
    spacing: str,
    num_inference_steps: int,
    num_train_timesteps: int,
    *,
    steps_offset: int = 0,
    continuous: bool = False,
    beyond: int = 0,
) -> NDArray[np.float64]:
    """Return the timesteps of a sampler, falling, rounded as diffusers rounds them.

    The spacings are those of table 2 of Lin et al. 2023 (arXiv:2305.08891). Two slips of diffusers are mended. Its
    ``trailing`` has one timestep too many, -1, wherever the division's rounding error lets one more in (58 steps of
    100, for one). Its ``leading`` runs past the last training timestep when `steps_offset` leaves no room, as 1 does
    for 1000 steps of 1000; here the offset yields.

    Parameters
    ----------
    spacing
        ``leading``, ``trailing`` or ``linspace``.
    num_inference_steps, num_train_timesteps
        How many timesteps to choose, from how many.
    steps_offset
        Added to ``leading`` timesteps.
    continuous
        Whether ``linspace`` timesteps may lie between whole ones, in float32's precision.
    beyond
        How many steps more the grid of ``leading`` and ``linspace`` has, at its low end, than are returned.

    Returns
    -------
    float64 of shape (num_inference_steps,), each from 0 to num_train_timesteps - 1.

    """
    count = num_inference_steps + beyond
    last = num_train_timesteps - 1
    if spacing == "linspace":
        grid = np.linspace(0, last, count)
        grid = grid.astype(np.float32).astype(np.float64) if continuous else grid.round()
        return grid[::-1][:num_inference_steps].copy()
    if spacing == "leading":
        grid = np.arange(count, dtype=np.float64) * (num_train_timesteps // count)
        grid += min(steps_offset, last - grid[-1])
        return grid[::-1][:num_inference_steps].copy()
    # arange and not a product, because its rounding decides which way halves go.
    grid = np.arange(num_train_timesteps, 0, -(num_train_timesteps / num_inference_steps)).round() - 1
    return grid[:num_inference_steps]
