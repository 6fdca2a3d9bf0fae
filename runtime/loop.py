"""The denoising loop: a generator of steps, the same for every sampler."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ..errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from numpy.typing import NDArray

    from .solvers import SamplerTable


class Step(Protocol):
    """One evaluation of the network and the step that it led to.

    On a GPU, asking for `latents`, `estimate` or `seconds` waits until the step is done.
    """

    @property
    def index(self) -> int:
        """From 0."""

    @property
    def total(self) -> int:
        """How many there will be."""

    @property
    def timestep(self) -> float:
        """What the network was given."""

    @property
    def latents(self) -> NDArray[np.float32]:
        """After the step: float32 of shape (N, 4, height / 8, width / 8), read-only; it stays valid."""

    @property
    def estimate(self) -> NDArray[np.float32]:
        """What the model takes for the finished latents at this step, in their shape: for previews.

        To be asked for before the next step is; then it stays valid.
        """

    @property
    def seconds(self) -> float:
        """What the step took, the consumer's own time not counted."""


@dataclass(frozen=True, eq=False)
class HostStep:
    """A step that is done, as `Step` describes it; `x` and `m` are what it was made of, as `SamplerTable` has them."""

    index: int
    total: int
    timestep: float
    latents: NDArray[np.float32]
    seconds: float
    table: SamplerTable
    x: NDArray[np.float32]
    m: NDArray[np.float32]

    @cached_property
    def estimate(self) -> NDArray[np.float32]:
        """What the model takes for the finished latents."""
        return self.table.estimate(self.index, self.x, self.m)


def denoise(
    table: SamplerTable,
    latents: NDArray[np.float32],
    predict: Callable[[NDArray[np.float32], float], NDArray[np.float32]],
    draw_noise: Callable[[], NDArray[np.float32]],
) -> Generator[Step, NDArray[np.float32] | None]:
    """Run a sampler, yielding after each step; stop by no longer asking.

    What is sent to the generator, if anything, takes the place of the latents that it yielded.

    Parameters
    ----------
    table
        From `samplers.sampler_table`.
    latents
        Unit gaussian, float32 of shape (N, 4, height / 8, width / 8). It is not written to. float64 is accepted for
        studies of rounding, and everything is then float64.
    predict
        The network with its guidance: takes x, read-only, and the timestep, and returns what the model predicts, in
        the shape of x. The array that it returns is read before it is called again and not kept, so it may be one and
        the same each time.
    draw_noise
        Returns a unit gaussian in the shape of x. Called once for each row of the table that draws noise, after
        `predict`, in order, and so as often as diffusers would draw from its generator.

    Raises
    ------
    InputError
        If latents, prediction or noise have another shape, or latents are not floating point.

    """
    if latents.dtype not in (np.float32, np.float64):
        raise InputError(f"latents are of type {latents.dtype}: expected float32")
    x = x_prev = latents * table.initial_scale
    x.flags.writeable = False
    # The newest m first.
    history: deque[NDArray[np.float32]] = deque(maxlen=table.b.shape[1])
    scratch = np.empty_like(x)

    def add(total: NDArray[np.float32], coefficient: float, term: NDArray[np.float32]) -> None:
        if coefficient:
            np.multiply(term, coefficient, out=scratch, dtype=x.dtype, casting="same_kind")
            np.add(total, scratch, out=total)

    # Plain floats, and the type named in `add`: in the latents' precision, neither widened by numpy's float64 nor
    # narrowed by a prediction in float16.
    p, q, a, a_prev, b, c = (part.tolist() for part in (table.p, table.q, table.a, table.a_prev, table.b, table.c))
    for index, timestep in enumerate(table.timesteps.tolist()):
        began = time.perf_counter()
        output = check_shape("the prediction", predict(x, timestep), x.shape)
        m = np.multiply(output, q[index], dtype=x.dtype, casting="same_kind")
        add(m, p[index], x)
        history.appendleft(m)
        x_next = x * a[index]
        add(x_next, a_prev[index], x_prev)
        for weight, earlier in zip(b[index], history, strict=False):
            add(x_next, weight, earlier)
        if table.draws_noise[index]:
            add(x_next, c[index], check_shape("the noise", draw_noise(), x.shape))
        x_next.flags.writeable = False
        x_prev, x = x, x_next
        replacement = yield HostStep(index, len(table), timestep, x, time.perf_counter() - began, table, x_prev, m)
        if replacement is not None:
            x = check_shape("the replacement", replacement, x.shape).astype(x.dtype)
            x.flags.writeable = False


def check_shape(what: str, array: NDArray[np.float32], shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Return an array if it has the shape of the latents; else raise `InputError`."""
    if array.shape != shape:
        raise InputError(f"{what} has the shape {array.shape}: expected {shape}, that of the latents")
    return array
