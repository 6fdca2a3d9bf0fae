from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdrt.errors import InputError
from sdrt.runtime.schedule import BETA_SCHEDULES, SPACINGS, Schedule, betas, spaced_timesteps

V1_CONFIG = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.7.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"])
@pytest.mark.parametrize("count", [1, 2, 100, 1000])
def test_betas_are_those_of_diffusers(name: str, count: int) -> None:
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    scheduler = DDPMScheduler(num_train_timesteps=count, beta_schedule=name, beta_start=0.00085, beta_end=0.012)
    np.testing.assert_allclose(betas(name, 0.00085, 0.012, count), scheduler.betas.numpy(), rtol=1e-4, atol=2e-7)
    schedule = Schedule(beta_schedule=name, num_train_timesteps=count, steps_offset=0)
    np.testing.assert_allclose(schedule.alphas_cumprod, scheduler.alphas_cumprod.numpy(), rtol=1e-5, atol=1e-7)


def test_betas_of_stable_diffusion() -> None:
    values = betas("scaled_linear", 0.00085, 0.012, 1000)
    assert values[[0, -1]] == pytest.approx([0.00085, 0.012])
    # The published noise over signal of Stable Diffusion v1's last timestep.
    assert Schedule().sigmas[-1] == pytest.approx(14.6146, abs=1e-4)


@pytest.mark.parametrize(
    ("other", "name"),
    [("scaled-linear", "scaled_linear"), ("quadratic", "scaled_linear"), ("cosine", "squaredcos_cap_v2")],
)
def test_other_names_mean_the_same_betas(other: str, name: str) -> None:
    np.testing.assert_array_equal(betas(other, 0.001, 0.02, 50), betas(name, 0.001, 0.02, 50))


@given(st.sampled_from(BETA_SCHEDULES), st.floats(1e-5, 0.01), st.floats(1e-5, 0.05), st.integers(1, 1000))
def test_betas_are_shares_and_leave_less_and_less_signal(name: str, start: float, more: float, count: int) -> None:
    schedule = Schedule(
        beta_schedule=name, beta_start=start, beta_end=start + more, num_train_timesteps=count, steps_offset=0
    )
    values = betas(name, start, start + more, count)
    assert values.shape == (count,)
    assert ((values > 0) & (values < 1)).all()
    assert (np.diff(schedule.alphas_cumprod) < 0).all()
    assert np.isfinite(schedule.sigmas).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("exponential", 0.1, 0.2, 10), "expected one of linear, scaled_linear"),
        ((7, 0.1, 0.2, 10), "expected one of linear"),
        (("linear", 0.0, 0.2, 10), "beta_start is 0.0"),
        (("linear", 0.1, 1.0, 10), "beta_end is 1.0"),
        (("linear", 0.2, 0.1, 10), "beta_start <= beta_end"),
        (("linear", math.nan, 0.1, 10), "beta_start is nan"),
        (("linear", "0.1", 0.2, 10), "beta_start is '0.1'"),
        (("linear", 0.1, 0.2, 0), "num_train_timesteps is 0"),
        (("linear", 0.1, 0.2, 10.0), "num_train_timesteps is 10.0"),
        (("linear", 0.1, 0.2, True), "num_train_timesteps is True"),
    ],
)
def test_betas_refuse_what_makes_no_sense(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        betas(*arguments)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prediction_type": "flow"}, "expected one of epsilon, v_prediction, sample"),
        ({"steps_offset": -1}, "steps_offset is -1"),
        ({"steps_offset": 1000}, "from 0 to 999"),
        ({"set_alpha_to_one": "yes"}, "set_alpha_to_one"),
        ({"timestep_spacing": "karras"}, "expected one of leading, trailing, linspace"),
        ({"beta_start": 1e-20}, "starts without noise"),
        ({"beta_schedule": "linear", "beta_start": 0.9, "beta_end": 0.99}, "ends without signal"),
    ],
)
def test_schedule_refuses_what_makes_no_sense(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Schedule(**fields)


def test_stable_diffusions_own_configuration_is_the_default() -> None:
    assert Schedule.from_config(V1_CONFIG) == Schedule()


def test_absent_and_null_keys_have_defaults() -> None:
    schedule = Schedule.from_config({"prediction_type": None, "beta_schedule": "linear"})
    assert schedule == Schedule(beta_schedule="linear", set_alpha_to_one=None)


@pytest.mark.parametrize("key", ["trained_betas", "rescale_betas_zero_snr"])
def test_what_is_not_supported_is_refused(key: str) -> None:
    with pytest.raises(InputError, match=key):
        Schedule.from_config({**V1_CONFIG, key: [0.1]})


def test_the_cached_arrays_cannot_be_written_to() -> None:
    with pytest.raises(ValueError, match="read-only"):
        Schedule().alphas_cumprod[0] = 0


@pytest.mark.parametrize("training", [1, 2, 37, 100, 1000])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(("offset", "continuous", "beyond"), [(0, False, 0), (1, True, 0), (1, False, 1)])
def test_timesteps_fall_within_training_for_every_number_of_steps(
    training: int, spacing: str, offset: int, continuous: bool, beyond: int
) -> None:
    for steps in range(1, training - beyond + 1):
        timesteps = spaced_timesteps(
            spacing, steps, training, steps_offset=offset, continuous=continuous, beyond=beyond
        )
        assert timesteps.shape == (steps,)
        assert (np.diff(timesteps) < 0).all()
        assert timesteps[-1] >= 0
        assert timesteps[0] <= training - 1
        assert continuous or (timesteps == timesteps.round()).all()


def test_timesteps_where_diffusers_has_one_too_many() -> None:
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    scheduler = DDIMScheduler(num_train_timesteps=100, timestep_spacing="trailing")
    scheduler.set_timesteps(58)
    theirs = scheduler.timesteps.numpy()
    assert (len(theirs), theirs[-1]) == (59, -1), "diffusers has mended this; drop the note in spaced_timesteps"
    np.testing.assert_array_equal(spaced_timesteps("trailing", 58, 100), theirs[:-1])


def test_timesteps_where_the_offset_does_not_fit() -> None:
    np.testing.assert_array_equal(spaced_timesteps("leading", 4, 4, steps_offset=1), [3, 2, 1, 0])
    np.testing.assert_array_equal(spaced_timesteps("leading", 2, 4, steps_offset=1), [3, 1])
