"""Train the demo model from nothing: ``python -m sdrt.export.demo.train``.

An interrupted run goes on where its last state was saved. On one machine the result depends on the options alone.
"""

from __future__ import annotations

from pathlib import Path

import click
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from .autoencoder import train_autoencoder
from .denoiser import train_denoiser
from .folder import write_folder


@click.command()
@click.option("--work", type=click.Path(path_type=Path), default=Path(".cache/demo-training"), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=None, help="The diffusers folder to write.")
@click.option("--seed", default=0, show_default=True)
@click.option("--autoencoder-steps", default=1600, show_default=True)
@click.option("--steps", default=4000, show_default=True, help="Steps of text encoder and U-Net.")
@click.option("--scenes", default=12000, show_default=True, help="Scenes that text encoder and U-Net see.")
@click.option("--workers", default=2, show_default=True, help="Processes of one thread each; each adds to the batch.")
def main(
    work: Path, out: Path | None, seed: int, autoencoder_steps: int, steps: int, scenes: int, workers: int
) -> None:
    """Train the autoencoder, then text encoder and U-Net; go on with what was interrupted."""
    torch.set_num_threads(1)  # workers share the cores better than threads, which wait for each other at every layer
    work.mkdir(parents=True, exist_ok=True)
    train_autoencoder(work, steps=autoencoder_steps, seed=seed)
    (work / "workers").unlink(missing_ok=True)  # the meeting place that an interrupted run leaves
    arguments = (work, out, seed, autoencoder_steps, steps, scenes, workers)
    mp.spawn(_worker, arguments, nprocs=workers)  # type: ignore[no-untyped-call]


def _worker(
    rank: int, work: Path, out: Path | None, seed: int, autoencoder_steps: int, steps: int, scenes: int, workers: int
) -> None:
    torch.set_num_threads(1)
    meeting = work / "workers"
    if workers > 1:
        dist.init_process_group("gloo", init_method=f"file://{meeting.absolute()}", rank=rank, world_size=workers)
    autoencoder = train_autoencoder(work, steps=autoencoder_steps, seed=seed)
    model = train_denoiser(autoencoder, work, steps=steps, seed=seed, scenes=scenes, rank=rank, workers=workers)
    if rank == 0 and out is not None:
        write_folder(out, autoencoder, model.text_encoder, model.unet)
    if workers > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
