"""The tables against diffusers' schedulers, and against what is known without them."""

from __future__ import annotations

import json
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sdrt.errors import InputError
from sdrt.runtime.loop import denoise
from sdrt.runtime.noise import batch_noise
from sdrt.runtime.samplers import SAMPLERS, SamplerTable, default_sampler, resolve_sampler, sampler_table
from sdrt.runtime.schedule import BETA_SCHEDULES, PREDICTION_TYPES, SPACINGS, Schedule, betas

from .diffusers_reference import SHAPE, Array, diffusers_in_float64, levels, run_diffusers, wobble
from .test_loop import no_noise
from .test_schedule import V1_CONFIG

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


def gaussian(x: Array, t: float, mean: float = 0.3, deviation: float = 0.5) -> Array:
    """Predict the noise exactly, for data of this mean and deviation and Stable Diffusion's schedule."""
    alpha, sigma = levels(Schedule(), t)
    return sigma * (x - alpha * mean) / (alpha**2 * deviation**2 + sigma**2)


def run_ours(table: SamplerTable, dtype: Any, seed: int) -> tuple[Array, Array]:
    """Return the result, and what the generator draws next; torch's own, so that nothing but the table differs."""
    generator = torch.Generator().manual_seed(seed)

    def draw(shape: tuple[int, ...] = SHAPE) -> Array:
        return torch.randn(shape, generator=generator, dtype=torch.float32).numpy()

    *_, last = denoise(table, draw().astype(dtype), wobble, draw)
    return last.latents, draw((4,))


def relative(ours: Array, theirs: Array) -> Any:
    return np.abs(ours - theirs).max() / max(1.0, np.abs(theirs).max())


@st.composite
def cases(draw: Any) -> dict[str, Any]:
    training = draw(st.sampled_from([1000, 1000, 250, 37]))
    return {
        "sampler": draw(st.sampled_from(list(SAMPLERS))),
        "steps": draw(
            st.one_of(
                st.integers(1, min(60, training)), st.sampled_from([1, 2, 3, 4, 5, 14, 15, training - 1, training])
            )
        ),
        "spacing": draw(st.sampled_from([None, *SPACINGS])),
        "eta": draw(st.floats(0, 1)),
        "seed": draw(st.integers(0, 2**32 - 1)),
        "config": {
            "num_train_timesteps": training,
            "beta_schedule": draw(st.sampled_from(BETA_SCHEDULES)),
            "beta_start": draw(st.sampled_from([0.0001, 0.00085])),
            "beta_end": draw(st.sampled_from([0.012, 0.02])),
            "prediction_type": draw(st.sampled_from(PREDICTION_TYPES)),
            "steps_offset": draw(st.integers(0, 1)),
            "set_alpha_to_one": draw(st.booleans()),
        },
    }


def v1_case(**changes: Any) -> dict[str, Any]:
    config = {**V1_CONFIG, "prediction_type": "epsilon"}
    return {"sampler": "plms", "steps": 50, "spacing": None, "eta": 0.0, "seed": 0, "config": config, **changes}


@given(cases())
@example(v1_case(steps=1))
@example(v1_case(steps=2))
@example(v1_case(steps=4))
@example(v1_case(steps=5))
@example(v1_case(sampler="dpmpp_2m", steps=1))
@example(v1_case(sampler="ddim", steps=50, eta=1.0))
@settings(deadline=None, max_examples=400)
def test_tables_follow_diffusers_in_float64(case: dict[str, Any]) -> None:
    config, sampler, steps = case["config"], case["sampler"], case["steps"]
    eta = case["eta"] if sampler == "ddim" else 0.0
    schedule = Schedule.from_config(config)
    training = schedule.num_train_timesteps
    spacing = case["spacing"] or SAMPLERS[sampler].default_spacing
    if sampler == "dpmpp_2m" and spacing != "trailing" and steps == training:
        with pytest.raises(InputError, match=f"takes at most {training - 1}"):
            sampler_table(sampler, schedule, steps, spacing=spacing)
        return
    table = sampler_table(sampler, schedule, steps, eta=eta, spacing=case["spacing"])

    known = {"linear", "scaled_linear", "squaredcos_cap_v2"} | ({"sigmoid"} if sampler == "ddpm" else set())
    theirs = {**config, "skip_prk_steps": True, "clip_sample": False}
    if case["spacing"] is not None:
        theirs["timestep_spacing"] = case["spacing"]
    with diffusers_in_float64():
        if config["beta_schedule"] not in known:
            # All six take betas as they are; the curves themselves are compared in test_schedule.
            theirs["beta_schedule"] = "linear"
            theirs["trained_betas"] = betas(
                config["beta_schedule"], config["beta_start"], config["beta_end"], training
            ).tolist()
        probe = getattr(diffusers, SAMPLERS[sampler].diffusers).from_config(theirs)
        probe.set_timesteps(steps)
        if probe.timesteps.min() < 0 or probe.timesteps.max() >= training:
            # The two slips of diffusers that spaced_timesteps mends, tested in test_schedule.
            assert table.timesteps.min() >= 0
            assert table.timesteps.max() < training
            return
        scheduler, expected, next_draw = run_diffusers(sampler, theirs, schedule, steps, eta=eta, seed=case["seed"])
    latents, our_next_draw = run_ours(table, np.float64, case["seed"])
    np.testing.assert_array_equal(table.timesteps, scheduler.timesteps.numpy())
    assert relative(latents, expected) < 1e-9
    np.testing.assert_array_equal(our_next_draw, next_draw)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 7, 20, 50])
def test_tables_follow_diffusers_as_it_is_installed(sampler: str, steps: int) -> None:
    eta = 0.5 if sampler == "ddim" else 0.0
    pipeline_config = diffusers.PNDMScheduler.from_config(V1_CONFIG).config
    scheduler, expected, next_draw = run_diffusers(sampler, pipeline_config, Schedule(), steps, eta=eta, seed=42)
    table = sampler_table(sampler, Schedule.from_config(V1_CONFIG), steps, eta=eta)
    latents, our_next_draw = run_ours(table, np.float32, 42)
    np.testing.assert_array_equal(table.timesteps, scheduler.timesteps.numpy().astype(np.float64))
    assert latents.dtype == np.float32
    assert relative(latents, expected) < 1e-4
    np.testing.assert_array_equal(our_next_draw, next_draw)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_timesteps_equal_those_of_diffusers_for_every_number_of_steps(sampler: str, spacing: str) -> None:
    scheduler_class = getattr(diffusers, SAMPLERS[sampler].diffusers)
    scheduler = scheduler_class.from_config({**V1_CONFIG, "timestep_spacing": spacing})
    differing = []
    for steps in range(1, 1000):
        scheduler.set_timesteps(steps)
        theirs = scheduler.timesteps.numpy().astype(np.float64)
        ours = sampler_table(sampler, Schedule(), steps, spacing=spacing).timesteps
        if not np.array_equal(ours, theirs):
            differing.append((steps, len(theirs) - len(ours), theirs.min(), theirs.max()))
    # Where they differ, diffusers names a timestep that the model does not have.
    assert all(least < 0 or most > 999 for _, _, least, most in differing)
    assert len(differing) < 80


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_default_spacing_is_that_of_diffusers(sampler: str) -> None:
    pipeline_config = diffusers.PNDMScheduler.from_config(V1_CONFIG).config
    scheduler = getattr(diffusers, SAMPLERS[sampler].diffusers).from_config(pipeline_config)
    assert scheduler.config.timestep_spacing == SAMPLERS[sampler].default_spacing
    assert scheduler.config.steps_offset == Schedule().steps_offset
    named = Schedule(timestep_spacing="trailing")
    np.testing.assert_array_equal(
        sampler_table(sampler, named, 9).timesteps, sampler_table(sampler, Schedule(), 9, spacing="trailing").timesteps
    )


def test_absent_set_alpha_to_one_is_each_samplers_default() -> None:
    for sampler in ("ddim", "plms"):
        config = {"beta_schedule": "scaled_linear", "skip_prk_steps": True, "clip_sample": False, "steps_offset": 1}
        with diffusers_in_float64():
            schedule = Schedule.from_config({**config, "beta_start": 0.0001, "beta_end": 0.02})
            _, expected, _ = run_diffusers(sampler, config, schedule, 6)
        latents, _ = run_ours(sampler_table(sampler, schedule, 6), np.float64, 1)
        assert relative(latents, expected) < 1e-9


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_prediction_types_say_the_same_thing(sampler: str, spacing: str) -> None:
    """One model, asked for the noise, for v and for the sample, gives one picture."""
    results = []
    # PLMS combines outputs of several levels of noise, which is not the same for noise and for v.
    for prediction_type in ("epsilon", "sample") if sampler == "plms" else PREDICTION_TYPES:
        schedule = Schedule(prediction_type=prediction_type)
        table = sampler_table(sampler, schedule, 12, spacing=spacing)

        def predict(x: Array, t: float, schedule: Schedule = schedule, prediction_type: str = prediction_type) -> Array:
            alpha, sigma = levels(schedule, t)
            eps = wobble(x, t)
            x_0 = (x - sigma * eps) / alpha
            return {"epsilon": eps, "v_prediction": alpha * eps - sigma * x_0, "sample": x_0}[prediction_type]

        draw = batch_noise([0], SHAPE[1:])
        start: Array = draw().astype(np.float64)
        *_, last = denoise(table, start, predict, draw)
        results.append(last.latents)
    for other in results[1:]:
        np.testing.assert_allclose(other, results[0], rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("sampler", ["ddim", "euler", "plms", "dpmpp_2m"])
def test_deterministic_samplers_solve_the_ode(sampler: str) -> None:
    """For gaussian data the probability-flow ODE has a closed solution, which owes nothing to any implementation."""
    table = sampler_table(sampler, Schedule(), 200, spacing="trailing")
    start: Array = batch_noise([0], SHAPE[1:])().astype(np.float64)
    alpha, sigma = levels(Schedule(), 999)
    solution = 0.3 + 0.5 * (table.initial_scale * start - alpha * 0.3) / np.sqrt(alpha**2 * 0.5**2 + sigma**2)
    *_, last = denoise(table, start, gaussian, no_noise)
    np.testing.assert_allclose(last.latents, solution, atol=0.03)


@pytest.mark.parametrize(("sampler", "eta"), [("ddpm", 0.0), ("ddim", 1.0), ("euler_a", 0.0)])
def test_stochastic_samplers_have_the_datas_mean_and_deviation(sampler: str, eta: float) -> None:
    draw = batch_noise([3], (4, 64, 64))
    table = sampler_table(sampler, Schedule(), 200, eta=eta, spacing="trailing")
    *_, last = denoise(table, draw(), gaussian, draw)
    assert last.latents.mean() == pytest.approx(0.3, abs=0.03)
    assert last.latents.std() == pytest.approx(0.5, abs=0.03)


def test_plms_evaluates_once_more_than_it_steps() -> None:
    assert len(sampler_table("plms", Schedule(), 50)) == 51
    assert len(sampler_table("plms", Schedule(), 1)) == 1
    for sampler in set(SAMPLERS) - {"plms"}:
        assert len(sampler_table(sampler, Schedule(), 50)) == 50


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 30])
@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
def test_tables_survive_json(sampler: str, steps: int, beta_schedule: str) -> None:
    table = sampler_table(sampler, Schedule(beta_schedule=beta_schedule), steps)
    read = json.loads(json.dumps(table.to_dict(), allow_nan=False))
    assert (read["sampler"], read["num_inference_steps"]) == (sampler, steps)
    arrays: dict[str, Any] = {k: np.array(v) if isinstance(v, list) else v for k, v in read.items()}
    again = SamplerTable(**arrays)
    for name, value in table.to_dict().items():
        assert again.to_dict()[name] == value
    np.testing.assert_array_equal(run_ours(again, np.float32, 1)[0], run_ours(table, np.float32, 1)[0])


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_the_estimate_of_a_network_that_knows_is_the_clean_sample(
    sampler: str, prediction_type: str, spacing: str
) -> None:
    schedule = Schedule(prediction_type=prediction_type)
    table = sampler_table(sampler, schedule, 7, spacing=spacing)
    clean, noise = np.random.default_rng(0).normal(size=(2, 4, 3, 5))
    for index, sigma_over_alpha in enumerate(schedule.sigmas_at(table.timesteps)):
        alpha = 1 / np.sqrt(1 + sigma_over_alpha**2)
        sigma = sigma_over_alpha * alpha
        x = alpha * clean + sigma * noise
        output = {"epsilon": noise, "v_prediction": alpha * noise - sigma * clean, "sample": clean}[prediction_type]
        m = table.p[index] * x + table.q[index] * output
        np.testing.assert_allclose(table.estimate(index, x, m), clean, rtol=1e-9, atol=1e-9)


def test_tables_cannot_be_written_to() -> None:
    table = sampler_table("ddim", Schedule(), 5)
    with pytest.raises(ValueError, match="read-only"):
        table.b[0, 0] = 1


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_nothing_reaches_before_the_start(sampler: str) -> None:
    table = sampler_table(sampler, Schedule(), 9)
    depth = table.b.shape[1]
    early = np.arange(depth)[None, :] > np.arange(len(table))[:, None]
    assert (table.b[early] == 0).all()
    assert table.a_prev[0] == 0


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("DPM++ 2M", "dpmpp_2m"),
        ("dpm++ 2m", "dpmpp_2m"),
        ("DPMSolverMultistepScheduler", "dpmpp_2m"),
        ("Euler a", "euler_a"),
        ("euler-a", "euler_a"),
        ("k_euler_a", "euler_a"),
        ("EulerDiscreteScheduler", "euler"),
        ("pndm", "plms"),
        ("PNDMScheduler", "plms"),
        ("DDIM", "ddim"),
        ("ddpm", "ddpm"),
    ],
)
def test_other_names_are_understood(name: str, key: str) -> None:
    assert resolve_sampler(name) == key
    assert sampler_table(name, Schedule(), 3).sampler == key


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("heun", 5), {}, "expected one of ddpm, ddim, plms, euler, euler_a, dpmpp_2m"),
        ((None, 5), {}, "expected one of ddpm"),
        (("ddim", 0), {}, "num_inference_steps is 0: expected a whole number from 1 to 1000"),
        (("ddim", -3), {}, "num_inference_steps is -3"),
        (("ddim", 1001), {}, "num_inference_steps is 1001"),
        (("ddim", 2.5), {}, "num_inference_steps is 2.5"),
        (("ddim", "20"), {}, "num_inference_steps is '20'"),
        (("ddim", True), {}, "num_inference_steps is True"),
        (("ddim", 5), {"eta": -0.1}, "eta is -0.1"),
        (("ddim", 5), {"eta": float("nan")}, "eta is nan"),
        (("ddim", 5), {"eta": float("inf")}, "eta is inf"),
        (("ddim", 5), {"eta": "1"}, "eta is '1'"),
        (("ddim", 5), {"eta": 1.5}, "more noise than there is"),
        (("euler", 5), {"eta": 0.5}, "eta is for ddim alone"),
        (("ddim", 5), {"spacing": "karras"}, "expected one of leading, trailing, linspace"),
    ],
)
def test_bad_arguments_are_refused(arguments: tuple[Any, ...], options: dict[str, Any], message: str) -> None:
    sampler, steps = arguments
    with pytest.raises(InputError, match=message) as caught:
        sampler_table(sampler, Schedule(), steps, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_training_timestep_can_be_a_step(sampler: str) -> None:
    spacing = "trailing" if sampler == "dpmpp_2m" else None
    table = sampler_table(sampler, Schedule(), 1000, spacing=spacing)
    assert table.timesteps[[0, -1]].tolist() == [999, 0]
    assert np.isfinite(run_ours(table, np.float32, 0)[0]).all()


def test_noisier_than_float32_can_tell_diffusers_gives_nan_where_the_table_does_not() -> None:
    """Of the cosine schedule's first ancestral steps, diffusers takes the root of a difference rounded below 0."""
    config = {**V1_CONFIG, "beta_schedule": "squaredcos_cap_v2"}
    schedule = Schedule.from_config(config)
    _, theirs, _ = run_diffusers("euler_a", config, schedule, 4)
    assert np.isnan(theirs).all(), "diffusers has mended this; compare the two"
    assert np.isfinite(run_ours(sampler_table("euler_a", schedule, 4), np.float32, 0)[0]).all()


@pytest.mark.parametrize(
    ("named", "sampler"),
    [
        ("PNDMScheduler", "plms"),
        ("DPMSolverMultistepScheduler", "dpmpp_2m"),
        ("EulerAncestralDiscreteScheduler", "euler_a"),
        ("UniPCMultistepScheduler", "plms"),
        (None, "plms"),
    ],
)
def test_the_default_is_what_the_model_names(named: str | None, sampler: str) -> None:
    assert default_sampler({"sampler": named} if named else {}) == sampler
