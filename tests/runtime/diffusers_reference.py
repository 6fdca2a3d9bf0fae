"""diffusers' schedulers, run by hand: in float64 where that separates a wrong formula from rounding."""

from __future__ import annotations

import importlib
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any
from unittest import mock

import diffusers
import numpy as np
import torch

from sdrt.runtime.samplers import SAMPLERS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from sdrt.runtime.schedule import Schedule

Array = Any  # of numpy, in either precision

SHAPE = (1, 4, 3, 4)
SCHEDULER_MODULES = [
    importlib.import_module(f"diffusers.schedulers.scheduling_{name}")
    for name in ("ddpm", "ddim", "pndm", "euler_discrete", "euler_ancestral_discrete", "dpmsolver_multistep")
]
NO_SAMPLE_PREDICTION = ("plms", "euler_a")  # diffusers refuses it there


class Widened:
    """A module in which float32 means float64."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self.float32 = module.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class WidenedNumpy(Widened):
    """numpy, with timesteps still rounded to float32, because the network is given them as such."""

    def linspace(self, *arguments: Any, dtype: Any = None) -> Array:
        values = np.linspace(*arguments)
        return values if dtype is None else values.astype(np.float32).astype(dtype)


@contextmanager
def diffusers_in_float64() -> Iterator[None]:
    """Let diffusers' own code compute in float64, all of it, so that no coefficient of it is rounded."""
    patches = [mock.patch.multiple(module, np=WidenedNumpy(np), torch=Widened(torch)) for module in SCHEDULER_MODULES]
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    with ExitStack() as stack:
        stack.callback(torch.set_default_dtype, before)
        for patch in patches:
            stack.enter_context(patch)
        yield


def noise_in_float32(shape: tuple[int, ...], generator: Any = None, dtype: Any = None, **_: Any) -> torch.Tensor:
    """Draw as a float32 pipeline does, whatever the precision of the arithmetic."""
    return torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype)


def wobble(x: Array, t: float) -> Array:
    """A smooth prediction that leans on x and on t."""
    return 0.8 * np.tanh(1.3 * x + 0.2 * np.sin(t / 50)) + 0.1 * x


def levels(schedule: Schedule, t: float) -> tuple[Array, Array]:
    """Return alpha and sigma at t, which may lie between whole timesteps."""
    s = schedule.sigmas_at(np.array(t))
    return 1 / np.sqrt(1 + s * s), s / np.sqrt(1 + s * s)


def as_epsilon(schedule: Schedule, t: float, x: Array, output: Array) -> Array:
    """Turn a prediction of x_0 into one of the noise, for schedulers that know only that."""
    alpha, sigma = levels(schedule, t)
    return (x - alpha * output) / sigma


def run_diffusers(
    sampler: str, config: Mapping[str, Any], schedule: Schedule, steps: int, *, eta: float = 0.0, seed: int = 1
) -> tuple[Any, Array, Array]:
    """Return the scheduler, its result, and what its generator draws next."""
    converted = schedule.prediction_type == "sample" and sampler in NO_SAMPLE_PREDICTION
    if converted:
        config = {**config, "prediction_type": "epsilon"}
    scheduler = getattr(diffusers, SAMPLERS[sampler].diffusers).from_config(config)
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(seed)
    options: dict[str, Any] = {} if sampler == "plms" else {"generator": generator}
    if sampler == "ddim":
        options["eta"] = eta
    dtype = torch.get_default_dtype()
    x = noise_in_float32(SHAPE, generator, dtype) * scheduler.init_noise_sigma
    with ExitStack() as stack:
        for module in SCHEDULER_MODULES:
            if hasattr(module, "randn_tensor"):
                stack.enter_context(mock.patch.object(module, "randn_tensor", noise_in_float32))
        for t in scheduler.timesteps:
            x_in = scheduler.scale_model_input(x, t).numpy()
            output = wobble(x_in, float(t))
            if converted:
                output = as_epsilon(schedule, float(t), x_in, output)
            x = scheduler.step(torch.from_numpy(output).to(dtype), t, x, **options).prev_sample
    return scheduler, x.numpy(), torch.randn(4, generator=generator, dtype=torch.float32).numpy()
