"""Train the demo model from nothing: ``python -m sdrt.export.demo.train``.

An interrupted run goes on where its last state was saved. On one machine the result depends on the options alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from .autoencoder import train_autoencoder
from .denoiser import train_denoiser
from .folder import write_folder
from .reading import train_text_encoder


@dataclass(frozen=True)
class Plan:
    """The options of the command line."""

    work: Path
    out: Path | None
    seed: int
    autoencoder_steps: int
    text_steps: int
    steps: int
    settling_steps: int
    scenes: int
    workers: int

    @property
    def meeting(self) -> Path:
        """The file over which workers find each other."""
        return self.work / "workers"


@click.command()
@click.option("--work", type=click.Path(path_type=Path), default=Path(".cache/demo-training"), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=None, help="The diffusers folder to write.")
@click.option("--seed", default=0, show_default=True)
@click.option("--autoencoder-steps", default=1600, show_default=True)
@click.option("--text-steps", default=1000, show_default=True, help="First steps of the text encoder, on thumbnails.")
@click.option("--steps", default=4000, show_default=True, help="Steps of text encoder and U-Net.")
@click.option("--settling-steps", default=1200, show_default=True, help="Steps after that, on what guidance magnifies.")
@click.option("--scenes", default=12000, show_default=True, help="Scenes that text encoder and U-Net see.")
@click.option("--workers", default=2, show_default=True, help="Processes of one thread each; each adds to the batch.")
def main(**options: Path | int | None) -> None:
    """Train autoencoder, text encoder on thumbnails, then it and the U-Net; go on with what was interrupted."""
    plan = Plan(**options)  # type: ignore[arg-type]  # click's options are the fields
    torch.set_num_threads(1)  # workers share the cores better than threads, which wait for each other at every layer
    plan.work.mkdir(parents=True, exist_ok=True)
    train_autoencoder(plan.work, steps=plan.autoencoder_steps, seed=plan.seed)
    train_text_encoder(plan.work, steps=plan.text_steps, seed=plan.seed)
    plan.meeting.unlink(missing_ok=True)  # what an interrupted run left
    spawn(_worker, (plan,), nprocs=plan.workers)  # type: ignore[no-untyped-call]


def _worker(rank: int, plan: Plan) -> None:
    torch.set_num_threads(1)
    if plan.workers > 1:
        meeting = f"file://{plan.meeting.absolute()}"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=plan.workers)
    autoencoder = train_autoencoder(plan.work, steps=plan.autoencoder_steps, seed=plan.seed)
    model = train_denoiser(
        autoencoder,
        train_text_encoder(plan.work, steps=plan.text_steps, seed=plan.seed),
        plan.work,
        steps=plan.steps,
        settling_steps=plan.settling_steps,
        seed=plan.seed,
        scenes=plan.scenes,
        rank=rank,
        workers=plan.workers,
    )
    if rank == 0 and plan.out is not None:
        write_folder(plan.out, autoencoder, model.text_encoder, model.unet)
    if plan.workers > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
