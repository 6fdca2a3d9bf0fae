"""`sdrt table` on the command line: a sampler's coefficients, for programs that drive a bundle's engines themselves."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from .._version import __version__
from .output import json_option, print_json

if TYPE_CHECKING:
    from ..runtime.schedule import Schedule
    from ..runtime.solvers import SamplerTable

_VERSION = 1
"""Of the JSON; engines/README.md documents it."""

FORMULAS = {
    "first": "x[0] = initial_scale * z, z a unit gaussian",
    "input": "latents = input_scale * x[i], timestep = timesteps[i]",
    "guidance": "f[i] = f_negative + guidance_scale * (f_prompt - f_negative)",
    "output": "m[i] = p[i] * x[i] + q[i] * f[i]",
    "step": "x[i+1] = a[i] * x[i] + a_prev[i] * x[i-1] + sum over k of b[i][k] * m[i-k] + c[i] * z[i]",
    "noise": "z[i] is a fresh unit gaussian, drawn where draws_noise[i] is true",
    "preview": "d[i] * x[i] + e[i] * m[i]",
    "result": "x[evaluations]",
}


@click.command()
@click.option(
    "--sampler",
    help="ddpm, ddim, plms, euler, euler_a or dpmpp_2m. [default: the model's; plms for Stable Diffusion v1]",
)
@click.option("--steps", type=int, default=50, show_default=True, help="Steps of the sampler.")
@click.option(
    "--bundle",
    help="A bundle's name or folder, for the noise schedule and prediction type of its model. [default: those of "
    "Stable Diffusion v1]",
)
@click.option("--spacing", help="Of timesteps: leading, trailing or linspace. [default: the sampler's own]")
@click.option("--eta", type=float, default=0.0, help="Ancestral noise of ddim, 0 to 1.")
@json_option
def table(sampler: str | None, steps: int, bundle: str | None, spacing: str | None, eta: float, *, json: bool) -> None:
    """Print a sampler as a table of coefficients.

    With a bundle this is all that a program needs to make a picture without sdrt, in any language. What the columns
    mean is described in engines/README.md.
    """
    from ..runtime.samplers import SAMPLERS, default_sampler, resolve_sampler, sampler_table, spacing_of  # noqa: PLC0415
    from ..runtime.schedule import Schedule  # noqa: PLC0415

    schedule, chosen = Schedule(), default_sampler({})
    if bundle is not None:
        from ..engines import store  # noqa: PLC0415

        scheduler = dict(store.resolve(bundle).manifest.scheduler)
        schedule, chosen = Schedule.from_config(scheduler), default_sampler(scheduler)
    if sampler is not None:
        chosen = resolve_sampler(sampler)
    coefficients = sampler_table(chosen, schedule, steps, eta=eta, spacing=spacing)
    spaced = spacing_of(chosen, schedule, spacing)
    if json:
        print_json(_facts(coefficients, schedule, bundle, spaced, eta))
        return
    model = "Stable Diffusion v1" if bundle is None else bundle
    click.echo(
        f"{SAMPLERS[chosen].label} for {model}, which predicts {schedule.prediction_type}: {steps} steps, "
        f"{len(coefficients)} evaluations, {spaced} spacing\n"
    )
    click.echo(_rows(coefficients, schedule))
    click.echo(f"\ninitial_scale = {coefficients.initial_scale:.6g}; columns that are 0 throughout are left out")
    click.echo("\n".join(FORMULAS[name] for name in ("first", "output", "step", "noise")))


def _facts(
    coefficients: SamplerTable, schedule: Schedule, bundle: str | None, spacing: str, eta: float
) -> dict[str, Any]:
    """Give the table with what it was made of and how to use it."""
    return {
        "schema_version": _VERSION,
        "sdrt_version": __version__,
        "bundle": bundle,
        "scheduler": asdict(schedule),
        "timestep_spacing": spacing,
        "eta": eta,
        "evaluations": len(coefficients),
        # Nothing to scale: between steps x has the variance that the network was trained with.
        "input_scale": 1.0,
        **coefficients.to_dict(),
        "sigmas": schedule.sigmas_at(coefficients.timesteps).tolist(),
        "formulas": FORMULAS,
    }


def _rows(coefficients: SamplerTable, schedule: Schedule) -> str:
    """Lay out the table for people, to six digits."""
    from ..engines.table import columns  # noqa: PLC0415 - what --help need not pay

    given = {name: getattr(coefficients, name) for name in ("p", "q", "a", "a_prev")}
    given |= {f"b{back}": column for back, column in enumerate(coefficients.b.T)}
    given |= {"c": coefficients.c}
    shown = {"timestep": coefficients.timesteps, "sigma": schedule.sigmas_at(coefficients.timesteps)}
    shown |= {name: column for name, column in given.items() if column.any()}
    rows = [("i", *shown, "noise")]
    rows += [
        (str(i), *(f"{value + 0.0:.6g}" for value in row), "drawn" if drawn else "")
        for i, (row, drawn) in enumerate(zip(zip(*shown.values(), strict=True), coefficients.draws_noise, strict=True))
    ]
    return columns(rows)
