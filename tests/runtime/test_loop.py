from __future__ import annotations

import dataclasses
import tracemalloc
from typing import Any

import numpy as np
import pytest

from sdrt.errors import InputError
from sdrt.runtime.loop import denoise
from sdrt.runtime.noise import batch_noise
from sdrt.runtime.samplers import SAMPLERS, sampler_table
from sdrt.runtime.schedule import Schedule
from sdrt.runtime.solvers import SamplerTable

Array = Any  # of numpy, in either precision
SHAPE = (2, 4, 3, 5)


def random_table(rows: int, depth: int) -> SamplerTable:
    """A table with every kind of term, none of any particular solver."""
    rng = np.random.default_rng(rows * 10 + depth)
    b = rng.normal(size=(rows, depth)) / 4
    b[np.arange(depth)[None, :] > np.arange(rows)[:, None]] = 0
    a_prev = rng.normal(size=rows) / 4
    a_prev[0] = 0
    p, q, a, c, d, e = rng.normal(size=(6, rows)) / 2
    return SamplerTable(
        sampler="random",
        num_inference_steps=rows,
        timesteps=np.arange(rows, 0, -1.0),
        initial_scale=1.5,
        p=p,
        q=q,
        a=a,
        a_prev=a_prev,
        b=b,
        c=c,
        draws_noise=rng.random(rows) < 0.5,
        d=d,
        e=e,
    )


def predict(x: Array, timestep: float) -> Array:
    return np.tanh(x + timestep / 7)


def no_noise() -> Array:
    pytest.fail("noise was drawn")


@pytest.mark.parametrize("rows", [1, 2, 3, 9])
@pytest.mark.parametrize("depth", [1, 2, 5])
def test_the_loop_is_the_tables_formula(rows: int, depth: int) -> None:
    table = random_table(rows, depth)
    latents: Array = batch_noise([1, 2], SHAPE[1:])().astype(np.float64)
    steps = list(denoise(table, latents, predict, batch_noise([3, 4], SHAPE[1:])))

    # The formula of SamplerTable's docstring, letter by letter, with every x and m kept.
    draw = batch_noise([3, 4], SHAPE[1:])
    xs, ms = [table.initial_scale * latents], []
    for i in range(rows):
        ms.append(table.p[i] * xs[i] + table.q[i] * predict(xs[i], table.timesteps[i]))
        x = table.a[i] * xs[i] + sum(table.b[i, k] * ms[i - k] for k in range(min(depth, i + 1)))
        if i:
            x = x + table.a_prev[i] * xs[i - 1]
        if table.draws_noise[i]:
            x = x + table.c[i] * draw()
        xs.append(x)

    assert [step.index for step in steps] == list(range(rows))
    assert {step.total for step in steps} == {rows}
    assert [step.timestep for step in steps] == table.timesteps.tolist()
    for i, step in enumerate(steps):
        np.testing.assert_allclose(step.latents, xs[i + 1], rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(step.estimate, table.d[i] * xs[i] + table.e[i] * ms[i], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_float32_stays_float32_and_latents_are_left_alone(sampler: str) -> None:
    table = sampler_table(sampler, Schedule(), 7)
    draw = batch_noise([0, 1], SHAPE[1:])
    latents = draw()
    kept = latents.copy()
    seen = []

    def half_precision(x: Array, timestep: float) -> Array:
        assert not x.flags.writeable
        seen.append(x)
        return predict(x, timestep).astype(np.float16)

    steps = list(denoise(table, latents, half_precision, draw))
    np.testing.assert_array_equal(latents, kept)
    assert {step.latents.dtype for step in steps} == {np.dtype(np.float32)}
    assert {x.dtype for x in seen} == {np.dtype(np.float32)}


def test_float16_predictions_are_scaled_in_float32() -> None:
    # The coefficients can be far beyond float16's range.
    table = dataclasses.replace(
        random_table(1, 1), q=np.array([1e6]), b=np.array([[1e-6]]), draws_noise=np.array([False])
    )
    latents = np.ones((1, 4, 1, 1), np.float32)
    (step,) = denoise(table, latents, lambda x, _: np.full(x.shape, 0.5, np.float16), no_noise)
    expected = 1.5 * (table.a[0] + 1e-6 * table.p[0]) + 0.5
    np.testing.assert_allclose(step.latents, expected, rtol=1e-5)


def test_steps_stay_valid_and_cannot_be_written_to() -> None:
    table = sampler_table("plms", Schedule(), 4)
    copies, kept = [], []
    draw = batch_noise([0], SHAPE[1:])
    for step in denoise(table, draw(), predict, no_noise):
        kept.append(step.latents)
        copies.append(step.latents.copy())
        assert step.seconds >= 0
        with pytest.raises(ValueError, match="read-only"):
            step.latents[...] = 0
    for view, copy in zip(kept, copies, strict=True):
        np.testing.assert_array_equal(view, copy)


def test_a_predictor_may_reuse_its_buffer() -> None:
    table = sampler_table("dpmpp_2m", Schedule(), 6)
    draw = batch_noise([0], SHAPE[1:])
    latents = draw()
    buffer = np.empty((1, *SHAPE[1:]), np.float32)

    def into_buffer(x: Array, timestep: float) -> Array:
        buffer[...] = predict(x, timestep)
        return buffer

    ours = [step.latents for step in denoise(table, latents, into_buffer, no_noise)]
    plain = [step.latents for step in denoise(table, latents, predict, no_noise)]
    np.testing.assert_array_equal(ours, plain)


@pytest.mark.parametrize(("sampler", "draws"), [("ddpm", 5), ("ddim", 0), ("plms", 0), ("euler_a", 5), ("euler", 0)])
def test_noise_is_drawn_once_a_row_that_draws(sampler: str, draws: int) -> None:
    table = sampler_table(sampler, Schedule(), 5)
    count = 0

    def draw() -> Array:
        nonlocal count
        count += 1
        return np.zeros((1, *SHAPE[1:]), np.float32)

    list(denoise(table, draw(), predict, draw))
    assert count == 1 + draws


def test_what_is_sent_takes_the_place_of_the_latents() -> None:
    table = sampler_table("euler", Schedule(), 3)
    loop = denoise(table, batch_noise([0], SHAPE[1:])(), predict, no_noise)
    first = next(loop)
    sent: Array = np.full(first.latents.shape, 0.25, np.float64)
    second = loop.send(sent)
    sent[...] = 9
    expected = table.a[1] * 0.25 + table.b[1, 0] * (table.p[1] * 0.25 + table.q[1] * predict(0.25, table.timesteps[1]))
    np.testing.assert_allclose(second.latents, expected, rtol=1e-5)
    assert second.latents.dtype == np.float32
    model_output = table.p[1] * 0.25 + table.q[1] * predict(0.25, table.timesteps[1])
    np.testing.assert_allclose(second.estimate, table.d[1] * 0.25 + table.e[1] * model_output, rtol=1e-5)
    assert second.estimate.dtype == np.float32
    with pytest.raises(InputError, match="the replacement has the shape"):
        loop.send(np.zeros((1, 4, 1, 1), np.float32))


def test_work_is_done_only_when_it_is_asked_for() -> None:
    calls = []

    def counted(x: Array, timestep: float) -> Array:
        calls.append(timestep)
        return predict(x, timestep)

    table = sampler_table("euler", Schedule(), 10)
    loop = denoise(table, batch_noise([0], SHAPE[1:])(), counted, no_noise)
    assert calls == []
    next(loop)
    next(loop)
    assert calls == table.timesteps[:2].tolist()


def test_memory_does_not_grow_with_the_steps() -> None:
    table = sampler_table("plms", Schedule(), 200)
    latents = batch_noise([0], (4, 64, 64))()
    output = np.zeros_like(latents)
    tracemalloc.start()
    for _ in denoise(table, latents, lambda x, _: np.multiply(x, 0.5, out=output), no_noise):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # Five remembered outputs, the scratch, and three generations of x.
    assert peak < 12 * latents.nbytes


@pytest.mark.parametrize(
    ("latents", "output", "noise", "message"),
    [
        (np.zeros(SHAPE, int), SHAPE, SHAPE, "latents are of type int"),
        (np.zeros(SHAPE, np.float32), (2, 4, 3, 4), SHAPE, "the prediction has the shape"),
        (np.zeros(SHAPE, np.float32), SHAPE, (1, 4, 3, 5), "the noise has the shape"),
    ],
)
def test_wrong_shapes_and_types_are_refused(
    latents: Array, output: tuple[int, ...], noise: tuple[int, ...], message: str
) -> None:
    table = sampler_table("euler_a", Schedule(), 2)
    loop = denoise(table, latents, lambda _x, _t: np.zeros(output, np.float32), lambda: np.zeros(noise, np.float32))
    with pytest.raises(InputError, match=message):
        list(loop)
