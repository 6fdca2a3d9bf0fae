"""Each sampler as a function from a noise schedule to a table of coefficients.

Everything is in the variance-preserving space of `schedule`: x = alpha x_0 + sigma eps with alpha**2 + sigma**2 = 1, so
that x is what the network takes. Samplers that the literature writes in noise over signal, s = sigma / alpha, and in
x_s = x / alpha are rewritten: between steps diffusers' Euler latents are these times sqrt(s**2 + 1), with s that of the
next evaluation, and after the last step, where s is 0, they are the same.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError
from .schedule import spaced_timesteps

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .schedule import Schedule

    Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class SamplerTable:
    """A sampler as numbers: S evaluations of the network, each followed by one linear step.

    ::

        x_0 = initial_scale * unit gaussian
        f_i = network(x_i, timesteps[i])                    guidance included, in whatever the network predicts
        m_i = p[i] x_i + q[i] f_i
        x_{i+1} = a[i] x_i + a_prev[i] x_{i-1} + sum over k of b[i, k] m_{i-k} + c[i] z_i

    z_i is a unit gaussian; a fresh one is drawn where ``draws_noise[i]``, even if c[i] is 0, because the reference's
    generator advances there. x_S is the result. Terms that would reach before i = 0 have the coefficient 0. What the
    model takes for the finished latents at step i, which previews show and the loop has no use for, is
    d[i] x_i + e[i] m_i.

    Attributes
    ----------
    sampler
        Its key in `samplers.SAMPLERS`.
    num_inference_steps
        What was asked for; S may exceed it by one (PLMS).
    timesteps
        float64 of shape (S,): what the network is given.
    initial_scale
        What the unit gaussian is multiplied by to make x_0.
    p, q, a, a_prev, c
        float64 of shape (S,).
    b
        float64 of shape (S, K); K - 1 is how far back the sampler looks.
    draws_noise
        bool of shape (S,).
    d, e
        float64 of shape (S,).

    """

    sampler: str
    num_inference_steps: int
    timesteps: Array
    initial_scale: float
    p: Array
    q: Array
    a: Array
    a_prev: Array
    b: Array
    c: Array
    draws_noise: NDArray[np.bool_]
    d: Array
    e: Array

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, np.ndarray):
                value.flags.writeable = False

    def __len__(self) -> int:
        """How many times the network is evaluated, S."""
        return len(self.timesteps)

    def estimate(self, index: int, x: NDArray[np.float32], m: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return what the model takes for the finished latents, where it is at step `index`.

        Parameters
        ----------
        index
            Of the step, from 0.
        x, m
            x_i and m_i, of one shape.

        """
        return x * float(self.d[index]) + m * float(self.e[index])

    def to_dict(self) -> dict[str, Any]:
        """Return the attributes under their own names as what JSON has: text, numbers, booleans and lists of them.

        ``b`` is a list of S lists of K. Numbers keep every bit of their float64 through ``json.dumps`` and back, and
        all are finite. A program in any language runs the sampler from this alone, by the four lines above.
        """
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in values}


def _table(
    sampler: str,
    schedule: Schedule,
    num_inference_steps: int,
    timesteps: Array,
    to_model: tuple[Array, Array],
    *,
    a: Array,
    b: Array,
    a_prev: Array | None = None,
    c: Array | None = None,
    draws_noise: NDArray[np.bool_] | bool = False,
    initial_scale: float = 1.0,
) -> SamplerTable:
    count = len(timesteps)
    none = np.zeros(count)
    p, q = to_model
    s = schedule.sigmas_at(timesteps)
    alpha = 1 / np.sqrt(s**2 + 1)
    from_x, from_f = _to_sample(schedule.prediction_type, alpha, s * alpha)
    # The network's output is f = (m - p x) / q.
    e = from_f / q
    return SamplerTable(
        sampler=sampler,
        num_inference_steps=num_inference_steps,
        timesteps=timesteps,
        initial_scale=initial_scale,
        p=p,
        q=q,
        a=a,
        a_prev=none.copy() if a_prev is None else a_prev,
        b=b.reshape(count, -1),
        c=none.copy() if c is None else c,
        draws_noise=np.broadcast_to(np.asarray(draws_noise, bool), (count,)).copy(),
        d=from_x - e * p,
        e=e,
    )


def _to_epsilon(prediction_type: str, alpha: Array, sigma: Array) -> tuple[Array, Array]:
    """Return p and q that turn the network's output into the noise, eps = p x + q f."""
    if prediction_type == "epsilon":
        return np.zeros_like(alpha), np.ones_like(alpha)
    if prediction_type == "v_prediction":
        return sigma.copy(), alpha.copy()
    return 1 / sigma, -alpha / sigma


def _to_sample(prediction_type: str, alpha: Array, sigma: Array) -> tuple[Array, Array]:
    """Return p and q that turn the network's output into the clean sample, x_0 = p x + q f."""
    if prediction_type == "epsilon":
        return 1 / alpha, -sigma / alpha
    if prediction_type == "v_prediction":
        return alpha.copy(), -sigma
    return np.zeros_like(alpha), np.ones_like(alpha)


def _split(alphas_cumprod: Array) -> tuple[Array, Array]:
    return np.sqrt(alphas_cumprod), np.sqrt(1 - alphas_cumprod)


def _stride_before(schedule: Schedule, timesteps: Array, count: int, final_alpha_cumprod: float) -> Array:
    """Return alphas_cumprod one whole stride, T // count, below each timestep, whatever the spacing, as diffusers."""
    before = timesteps.astype(int) - schedule.num_train_timesteps // count
    return np.where(before >= 0, schedule.alphas_cumprod[np.maximum(before, 0)], final_alpha_cumprod)


def ddpm(schedule: Schedule, num_inference_steps: int, spacing: str, _eta: float) -> SamplerTable:
    """Ancestral sampling with the posterior variance. Ho et al. 2020, arXiv:2006.11239, formula 7."""
    timesteps = spaced_timesteps(
        spacing, num_inference_steps, schedule.num_train_timesteps, steps_offset=schedule.steps_offset
    )
    ac = schedule.alphas_cumprod[timesteps.astype(int)]
    ac_next = np.append(ac[1:], 1.0)
    beta = 1 - ac / ac_next
    variance = np.maximum((1 - ac_next) / (1 - ac) * beta, 1e-20)
    draws_noise = timesteps > 0
    return _table(
        "ddpm",
        schedule,
        num_inference_steps,
        timesteps,
        _to_sample(schedule.prediction_type, *_split(ac)),
        a=np.sqrt(ac / ac_next) * (1 - ac_next) / (1 - ac),
        b=np.sqrt(ac_next) * beta / (1 - ac),
        c=np.where(draws_noise, np.sqrt(variance), 0.0),
        draws_noise=draws_noise,
    )


def ddim(schedule: Schedule, num_inference_steps: int, spacing: str, eta: float) -> SamplerTable:
    """DDIM, deterministic at eta 0 and DDPM-like at eta 1. Song et al. 2020, arXiv:2010.02502, formulae 12 and 16."""
    timesteps = spaced_timesteps(
        spacing, num_inference_steps, schedule.num_train_timesteps, steps_offset=schedule.steps_offset
    )
    ac = schedule.alphas_cumprod[timesteps.astype(int)]
    final = schedule.alphas_cumprod[0] if schedule.set_alpha_to_one is False else 1.0
    ac_next = _stride_before(schedule, timesteps, num_inference_steps, final)
    variance = eta**2 * (1 - ac_next) / (1 - ac) * (1 - ac / ac_next)
    direction = 1 - ac_next - variance
    if direction.min() < -1e-9:
        raise InputError(f"eta is {eta:g}: some step would add more noise than there is; expected at most 1")
    alpha, sigma = _split(ac)
    return _table(
        "ddim",
        schedule,
        num_inference_steps,
        timesteps,
        _to_epsilon(schedule.prediction_type, alpha, sigma),
        a=np.sqrt(ac_next) / alpha,
        b=np.sqrt(np.maximum(direction, 0.0)) - np.sqrt(ac_next) * sigma / alpha,
        c=np.sqrt(np.maximum(variance, 0.0)),
        draws_noise=eta > 0,
    )


def plms(schedule: Schedule, num_inference_steps: int, spacing: str, _eta: float) -> SamplerTable:
    """Pseudo linear multistep of order 4. Liu et al. 2022, arXiv:2202.09778, formulae 9 and 12.

    As diffusers' PNDMScheduler with ``skip_prk_steps``: the first step is taken twice, with the mean of its two
    evaluations the second time, so that n steps take n + 1 evaluations (1 takes 1). Outputs of v prediction are
    combined first and turned into noise with the step's own alpha, sigma and x. Of ``sample`` prediction, which
    diffusers refuses here, each output is turned into noise where it was evaluated.
    """
    count, training = num_inference_steps, schedule.num_train_timesteps
    timesteps = spaced_timesteps(spacing, count, training, steps_offset=schedule.steps_offset)
    start = timesteps
    if count > 1:
        timesteps = np.insert(timesteps, 1, timesteps[1])
        start = timesteps.copy()
        # The repetition sets out from where a whole stride leads to its timestep.
        start[1] += training // count
    final = 1.0 if schedule.set_alpha_to_one else schedule.alphas_cumprod[0]
    ac_next = _stride_before(schedule, start, count, final)
    ac = schedule.alphas_cumprod[start.astype(int)]
    alpha, sigma = _split(ac)
    step = -(ac_next - ac) / (ac * np.sqrt(1 - ac_next) + np.sqrt(ac * (1 - ac) * ac_next))

    b = np.zeros((len(timesteps), 5))
    # The second evaluation is used once and not remembered, so that early rows reach past it.
    early = ((1.0,), (1 / 2, 1 / 2), (3 / 2, 0, -1 / 2), (23 / 12, -16 / 12, 0, 5 / 12))
    for row, weights in enumerate(early[: len(b)]):
        b[row, : len(weights)] = weights
    b[4:] = np.array((55, -59, 37, -9, 0)) / 24
    if len(b) > 4:
        b[4, 3:] = 0, -9 / 24
    b *= step[:, None]

    a = np.sqrt(ac_next / ac)
    to_model = _to_epsilon(schedule.prediction_type, *_split(schedule.alphas_cumprod[timesteps.astype(int)]))
    if schedule.prediction_type == "v_prediction":
        to_model = np.zeros_like(alpha), np.ones_like(alpha)
        a += step * sigma
        b *= alpha[:, None]
    a_prev = np.zeros_like(a)
    if count > 1:
        a_prev[1], a[1] = a[1], 0.0
    return _table("plms", schedule, count, timesteps, to_model, a=a, b=b, a_prev=a_prev)


def _euler_levels(schedule: Schedule, num_inference_steps: int, spacing: str) -> tuple[Array, Array, Array, float]:
    """Return timesteps, noise over signal at them and then 0, the alphas of these, and the scale of the first x."""
    timesteps = spaced_timesteps(
        spacing,
        num_inference_steps,
        schedule.num_train_timesteps,
        steps_offset=schedule.steps_offset,
        continuous=True,
    )
    s = np.append(schedule.sigmas_at(timesteps), 0.0)
    alpha = 1 / np.sqrt(s**2 + 1)
    # With leading spacing diffusers starts from variance 1, otherwise from the noise's share of it alone.
    return timesteps, s, alpha, 1.0 if spacing == "leading" else float(s[0] * alpha[0])


def euler(schedule: Schedule, num_inference_steps: int, spacing: str, _eta: float) -> SamplerTable:
    """Euler's method on the probability-flow ODE. Karras et al. 2022, arXiv:2206.00364, algorithm 1."""
    timesteps, s, alpha, initial_scale = _euler_levels(schedule, num_inference_steps, spacing)
    return _table(
        "euler",
        schedule,
        num_inference_steps,
        timesteps,
        _to_epsilon(schedule.prediction_type, alpha[:-1], s[:-1] * alpha[:-1]),
        a=alpha[1:] / alpha[:-1],
        b=alpha[1:] * np.diff(s),
        initial_scale=initial_scale,
    )


def euler_a(schedule: Schedule, num_inference_steps: int, spacing: str, _eta: float) -> SamplerTable:
    """Euler's method with ancestral noise. Song et al. 2020, arXiv:2011.13456; as in Crowson's k-diffusion."""
    timesteps, s, alpha, initial_scale = _euler_levels(schedule, num_inference_steps, spacing)
    up = np.sqrt(s[1:] ** 2 * (s[:-1] ** 2 - s[1:] ** 2) / s[:-1] ** 2)
    down = s[1:] ** 2 / s[:-1]
    return _table(
        "euler_a",
        schedule,
        num_inference_steps,
        timesteps,
        _to_epsilon(schedule.prediction_type, alpha[:-1], s[:-1] * alpha[:-1]),
        a=alpha[1:] / alpha[:-1],
        b=alpha[1:] * (down - s[:-1]),
        c=alpha[1:] * up,
        draws_noise=True,
        initial_scale=initial_scale,
    )


def dpmpp_2m(schedule: Schedule, num_inference_steps: int, spacing: str, _eta: float) -> SamplerTable:
    """DPM-Solver++ of order 2, multistep, midpoint. Lu et al. 2022, arXiv:2211.01095, algorithm 2.

    The first step is of order 1, and so is the last, which leads to no noise at all. Only ``trailing`` spacing has
    room for as many steps as there are training timesteps: the grid of the others has one point more.
    """
    count, training = num_inference_steps, schedule.num_train_timesteps
    if spacing != "trailing" and count == training:
        raise InputError(
            f"num_inference_steps is {count}: dpmpp_2m with {spacing} spacing takes at most {training - 1}; "
            "use trailing spacing or fewer steps"
        )
    timesteps = spaced_timesteps(spacing, count, training, steps_offset=schedule.steps_offset, beyond=1)
    s = schedule.sigmas_at(timesteps)
    alpha = 1 / np.sqrt(s**2 + 1)
    sigma = s * alpha
    alpha_next, sigma_next = np.append(alpha[1:], 1.0), np.append(sigma[1:], 0.0)
    gain = alpha_next - alpha * sigma_next / sigma
    b = np.zeros((count, 2))
    b[:, 0] = gain
    if count > 2:
        h = np.diff(-np.log(s))
        extrapolated = gain[1:-1] * h[1:] / h[:-1] / 2
        b[1:-1, 0] += extrapolated
        b[1:-1, 1] = -extrapolated
    return _table(
        "dpmpp_2m",
        schedule,
        count,
        timesteps,
        _to_sample(schedule.prediction_type, alpha, sigma),
        a=sigma_next / sigma,
        b=b,
    )
