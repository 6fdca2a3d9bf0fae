"""The noise schedule that a checkpoint was trained with, as its folder states it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from ..errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping

V1_SCHEDULER: Final[dict[str, Any]] = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "epsilon",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
    "sampler": "PNDMScheduler",
}
"""Stable Diffusion v1's, for files that carry none."""

_TEXTS: Final = {
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"),
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "timestep_spacing": ("leading", "trailing", "linspace"),
}
_FLAGS: Final = ("set_alpha_to_one", "clip_sample", "skip_prk_steps")
_NUMBERS: Final = ("num_train_timesteps", "steps_offset", "beta_start", "beta_end")
_LONGEST_NAME: Final = 80
_UNSUPPORTED: Final = ("trained_betas", "rescale_betas_zero_snr")


def check_scheduler(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Check a ``scheduler_config.json`` and keep what describes the schedule.

    Parameters
    ----------
    config
        The file's contents.
    where
        What to call it in messages.

    Returns
    -------
    dict
        What the file says; Stable Diffusion v1's values where it says nothing. ``sampler`` is the class in diffusers
        that the model's makers chose, if the file names one.

    Raises
    ------
    CheckpointError
        If a value is of the wrong type or out of range, or asks for betas that are not of a named schedule.

    """
    for name in _UNSUPPORTED:
        if config.get(name):
            raise CheckpointError(f"{where}: {name} is set, which Stable Diffusion v1 does not have")
    said = {name: config[name] for name in (*_TEXTS, *_FLAGS, *_NUMBERS) if config.get(name) is not None}
    for name, value in said.items():
        if name in _TEXTS:
            good, expected = isinstance(value, str) and value in _TEXTS[name], " or ".join(_TEXTS[name])
        elif name in _FLAGS:
            good, expected = isinstance(value, bool), "true or false"
        elif name == "num_train_timesteps":
            good, expected = type(value) is int and 1 <= value <= 100_000, "1 to 100000"
        elif name == "steps_offset":
            good, expected = type(value) is int and 0 <= value < 1000, "0 to 999"
        else:
            good, expected = type(value) is float and 0.0 < value < 1.0, "a number between 0 and 1"
        if not good:
            raise CheckpointError(f"{where}: {name} is {value!r:.60}, expected {expected}")
    chosen = config.get("_class_name")
    if isinstance(chosen, str) and chosen.isidentifier() and len(chosen) <= _LONGEST_NAME:
        said["sampler"] = chosen
    return V1_SCHEDULER | said
