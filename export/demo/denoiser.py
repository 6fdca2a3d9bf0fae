"""Second stage of the training: text encoder and U-Net together, on latents that the autoencoder made once."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from .autoencoder import LATENT_SCALE, to_images, to_tensor
from .captions import caption
from .muon import Muon
from .networks import new_unet
from .progress import Average, Run, save_grid, trapezoid_rate
from .scenes import Scene, draw, sample_scene
from .tokens import new_tokenizer, token_ids

if TYPE_CHECKING:
    from pathlib import Path

    from tokenizers import Tokenizer

__all__ = ["Denoiser", "alphas_cumprod", "sample", "train_denoiser"]

_TIMESTEPS: Final = 1000
_DROPPED: Final = 0.1  # share of captions left out, for classifier-free guidance (Ho & Salimans 2022)
_SNR_CAP: Final = 5.0  # min-SNR weighting (Hang et al. 2023, arXiv:2303.09556)
_COARSE_FROM: Final = 500  # step from which high noise, where captions decide, counts more
_COARSE_POWER: Final = 2.2
_PAIRS: Final = 0.25  # share of pairs drawn on top of those that are as frequent as single objects
_MUON_RATE: Final = 0.015
_TEXT_RATE: Final = (
    0.1  # of the U-Net's: the text encoder knows its trade already, and an untrained U-Net teaches it nothing
)
_ADAM_RATE: Final = 2e-3
_SAVE_EVERY: Final = 100
_GRID_EVERY: Final = 300
_GRID_PROMPTS: Final = (
    "a large red star on a blue background",
    "a small yellow circle on purple",
    "green ring, white background",
    "a white cross on the left on black",
    "a pink triangle at the top, green background",
    "a large cyan square at the bottom on orange",
    "a red star to the left of a green square on white",
    "a blue circle above a yellow ring on black",
)


class Denoiser(torch.nn.Module):
    """Text encoder and U-Net: noise in latents, given timesteps and token ids."""

    def __init__(self, text_encoder: Any) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.unet = new_unet()

    def forward(self, latents: torch.Tensor, timesteps: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Predict epsilon: (N, 4, H, W) latents, (N,) timesteps, (N, 77) ids to (N, 4, H, W)."""
        prediction: torch.Tensor = self.unet(latents, timesteps, self.text_encoder(ids).last_hidden_state).sample
        return prediction


def alphas_cumprod() -> torch.Tensor:
    """(1000,) float64: Stable Diffusion v1's scaled-linear schedule."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, _TIMESTEPS, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0)


@torch.no_grad()
def sample(
    model: Denoiser, ids: torch.Tensor, empty: torch.Tensor, *, seed: int, steps: int = 20, guidance: float = 5.0
) -> torch.Tensor:
    """Sample with DDIM (Song et al. 2020, arXiv:2010.02502).

    Returns
    -------
    (N, 4, 16, 16) float32 scaled latents for (N, 77) `ids`.

    """
    alphas = alphas_cumprod().float()
    count = len(ids)
    both = torch.cat([empty.expand(count, -1), ids])
    context = model.text_encoder(both).last_hidden_state
    x = torch.randn(count, 4, 16, 16, generator=torch.Generator().manual_seed(seed))
    times = [i * (_TIMESTEPS // steps) + 1 for i in reversed(range(steps))]
    for t, following in zip(times, [*times[1:], 0], strict=True):
        blind, told = model.unet(torch.cat([x, x]), t, context).sample.chunk(2)
        epsilon = blind + guidance * (told - blind)
        clean = (x - (1 - alphas[t]).sqrt() * epsilon) / alphas[t].sqrt()
        x = alphas[following].sqrt() * clean + (1 - alphas[following]).sqrt() * epsilon
    return x


def _prepare(model: Denoiser) -> list[torch.optim.Optimizer]:
    """Start values of the U-Net, and optimisers."""
    with torch.no_grad():
        model.unet.conv_out.weight.zero_()
        for name, module in model.unet.named_modules():
            if name.endswith("proj_out"):
                module.weight.zero_()
    muon, adam = [], []
    for part, share in ((model.text_encoder, _TEXT_RATE), (model.unet, 1.0)):
        matrices: list[torch.Tensor] = []
        others: list[torch.Tensor] = []
        for name, parameter in part.named_parameters():
            outer = "embeddings." in name or name.startswith(("conv_in", "conv_out"))
            (matrices if parameter.ndim > 1 and not outer else others).append(parameter)
        muon.append({"params": matrices, "lr": share * _MUON_RATE})
        adam.append({"params": others, "lr": share * _ADAM_RATE})
    return [Muon(muon, lr=_MUON_RATE), torch.optim.AdamW(adam, lr=_ADAM_RATE, betas=(0.9, 0.98), weight_decay=0)]


def _average_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Replace gradients by their mean over workers, in one message."""
    if not dist.is_initialized():
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, part in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


@torch.no_grad()
def _latents(autoencoder: Any, scenes: list[Scene], rank: int, workers: int, path: Path) -> torch.Tensor:
    """(N, 4, 16, 16) float16 scaled latents of scenes: each worker encodes its share; kept in a file."""
    if path.exists():
        kept: torch.Tensor = torch.load(path, weights_only=True)["latents"]
        return kept
    mine = scenes[rank::workers]
    parts = []
    for start in tqdm(range(0, len(mine), 16), desc="latents", disable=rank > 0):
        x = to_tensor(np.stack([draw(scene) for scene in mine[start : start + 16]]))
        parts.append(autoencoder.encode(x).latent_dist.mean * LATENT_SCALE)
    share = torch.cat(parts)
    latents = torch.empty(len(scenes), *share.shape[1:])
    if workers > 1:
        shares = [torch.empty(len(scenes[r::workers]), *share.shape[1:]) for r in range(workers)]
        dist.all_gather(shares, share)
        for r, part in enumerate(shares):
            latents[r::workers] = part
    else:
        latents = share
    if rank == 0:
        torch.save({"latents": latents.half()}, path)
    return latents.half()


def _batch(
    scenes: list[Scene], latents: torch.Tensor, tokenizer: Tokenizer, rng: np.random.Generator, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents and token ids of scenes drawn at random; every time a scene comes up it is described anew."""
    pairs = np.array([i for i, scene in enumerate(scenes) if scene.relation] or [0])
    chosen = rng.integers(len(scenes), size=count)
    chosen = np.where(rng.random(count) < _PAIRS, pairs[rng.integers(len(pairs), size=count)], chosen)
    texts = ["" if rng.random() < _DROPPED else caption(scenes[i], rng) for i in chosen]
    return latents[torch.from_numpy(chosen)].float(), token_ids(tokenizer, texts)


def _loss(
    model: Denoiser,
    clean: torch.Tensor,
    ids: torch.Tensor,
    alphas: torch.Tensor,
    *,
    step: int,
    generator: torch.Generator,
) -> tuple[torch.Tensor, float]:
    """Weighted epsilon error, and the plain one; timesteps are stratified over the batch.

    What a caption says about the background matters only where noise hides it, in the noisiest fifth of the timesteps,
    and there an error in the picture hardly shows in epsilon. So after a while these timesteps come up more often, and
    an error in the picture counts with the square root of the signal-to-noise ratio instead of the ratio, up to 1.
    """
    count = len(clean)
    coarse = step >= _COARSE_FROM
    u = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    power = _COARSE_POWER if coarse else 1.0
    t = ((1 - (1 - u) ** power) * _TIMESTEPS).long().clamp(max=_TIMESTEPS - 1)
    noise = torch.randn(clean.shape, generator=generator)
    alpha = alphas[t].view(-1, 1, 1, 1)
    error = (model(alpha.sqrt() * clean + (1 - alpha).sqrt() * noise, t, ids) - noise).pow(2).mean((1, 2, 3))
    snr = alphas[t] / (1 - alphas[t])
    weight = snr.sqrt().clamp(max=1) / snr if coarse else snr.clamp(max=_SNR_CAP) / snr
    return (error * weight).mean(), error.mean().item()


def train_denoiser(
    autoencoder: Any,
    text_encoder: Any,
    work: Path,
    *,
    steps: int,
    seed: int,
    scenes: int,
    batch: int = 24,
    rank: int = 0,
    workers: int = 1,
) -> Denoiser:
    """Train, or go on training, text encoder and U-Net; return them with averaged weights.

    Parameters
    ----------
    autoencoder
        Trained, with latents of standard deviation 1 / 0.18215.
    text_encoder
        Trained to read captions; it goes on learning.
    work
        Folder for the state (`denoiser.pt`), the latents and sample grids.
    steps
        Optimiser steps in all. The learning rates' course depends on it.
    seed
        Together with the other numbers it determines the result on one machine.
    scenes
        How many scenes are drawn and encoded before the first step.
    batch
        Scenes a step and worker.
    rank, workers
        This process and how many there are; more than one need torch.distributed initialised.

    """
    torch.manual_seed(seed)
    tokenizer = new_tokenizer()
    model = Denoiser(text_encoder)
    parameters = list(model.parameters())
    run = Run(work / "denoiser.pt", model, _prepare(model), Average(parameters, 0.998))
    run.resume()
    rng = np.random.default_rng([seed, 11])
    shown = [sample_scene(rng) for _ in range(scenes)]
    latents = _latents(autoencoder, shown, rank, workers, work / "latents.pt") if run.step < steps else torch.empty(0)
    alphas = alphas_cumprod().float()
    with tqdm(total=steps, initial=run.step, desc="denoiser", unit="step", disable=rank > 0) as bar:
        while run.step < steps:
            started = time.perf_counter()
            rng = np.random.default_rng([seed, 12, run.step, rank])
            generator = torch.Generator().manual_seed((seed * 1_000_003 + run.step) * workers + rank)
            clean, ids = _batch(shown, latents, tokenizer, rng, batch)
            run.rate(trapezoid_rate(run.step, steps))
            loss, error = _loss(model, clean, ids, alphas, step=run.step, generator=generator)
            torch.autograd.backward(loss)
            _average_gradients(parameters)
            run.advance()
            run.note(seconds=time.perf_counter() - started, loss=loss.item(), error=error)
            bar.update()
            if run.step % _SAVE_EVERY == 0 or run.step == steps:
                bar.set_postfix(loss=f"{run.notes['loss']:.4f}", error=f"{run.notes['error']:.4f}")
                if rank == 0:
                    run.save()
                    if run.step % _GRID_EVERY == 0 or run.step == steps:
                        run.average.swap()
                        _save_samples(model, autoencoder, tokenizer, work / f"samples-{run.step:05d}.png")
                        run.average.swap()
    run.average.swap()
    return model.eval()


@torch.no_grad()
def _save_samples(model: Denoiser, autoencoder: Any, tokenizer: Tokenizer, path: Path) -> None:
    """Two pictures a prompt, one above the other."""
    ids = token_ids(tokenizer, list(_GRID_PROMPTS) * 2)
    latents = sample(model, ids, token_ids(tokenizer, [""]), seed=0)
    save_grid(to_images(autoencoder.decode(latents / LATENT_SCALE).sample), len(_GRID_PROMPTS), path)
