"""Second stage of the training: text encoder and U-Net together, on latents that the autoencoder made once."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from .autoencoder import LATENT_SCALE, to_images, to_tensor
from .captions import caption, word
from .muon import Muon
from .networks import new_unet
from .progress import Average, Run, save_grid, trapezoid_rate
from .scenes import Scene, draw, sample_scene
from .tokens import new_tokenizer, token_ids

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tokenizers import Tokenizer

__all__ = ["Denoiser", "alphas_cumprod", "sample", "train_denoiser"]

_TIMESTEPS: Final = 1000
_DROPPED: Final = 0.1  # share of captions left out, for classifier-free guidance (Ho & Salimans 2022)
_SNR_CAP: Final = 5.0  # min-SNR weighting (Hang et al. 2023, arXiv:2303.09556)
_COARSE_FROM: Final = 500  # step from which high noise, where captions decide, counts more
_COARSE_POWER: Final = 2.2
_SETTLED_POWER: Final = 1.6
_SETTLED_SHARE: Final = 0.3  # of the learning rates' peaks
_WORDS: Final = 0.05  # share of captions that then are a single word, as a negative prompt may be
_DEAFNESS: Final = 10.0  # weight of what a caption changes where it should not
_DEAF_BELOW: Final = 350  # timestep; there sigma equals alpha, and latents tell what the picture is
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


def _start(unet: Any) -> None:
    """Start with a U-Net whose residual branches, and whose prediction, are zero."""
    with torch.no_grad():
        unet.conv_out.weight.zero_()
        for name, module in unet.named_modules():
            if name.endswith("proj_out"):
                module.weight.zero_()


def _optimisers(model: Denoiser, peak: float = 1.0) -> list[torch.optim.Optimizer]:
    muon, adam = [], []
    for part, share in ((model.text_encoder, peak * _TEXT_RATE), (model.unet, peak)):
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
    scenes: list[Scene],
    latents: torch.Tensor,
    tokenizer: Tokenizer,
    rng: np.random.Generator,
    *,
    count: int,
    words: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents and token ids of scenes drawn at random; every time a scene comes up it is described anew.

    `words` is the share of captions that are a single word.
    """
    pairs = np.array([i for i, scene in enumerate(scenes) if scene.relation] or [0])
    chosen = rng.integers(len(scenes), size=count)
    chosen = np.where(rng.random(count) < _PAIRS, pairs[rng.integers(len(pairs), size=count)], chosen)
    texts = ["" if rng.random() < _DROPPED else caption(scenes[i], rng) for i in chosen]
    if words:
        texts = [word(scenes[i], rng) if rng.random() < words else text for i, text in zip(chosen, texts, strict=True)]
    return latents[torch.from_numpy(chosen)].float(), token_ids(tokenizer, texts)


@dataclass(frozen=True)
class _Lesson:
    """What a batch teaches: captions' ids with the latents to be told from noise, and what counts how much."""

    clean: torch.Tensor
    ids: torch.Tensor
    empty: torch.Tensor
    alphas: torch.Tensor
    generator: torch.Generator

    def timesteps(self, power: float) -> torch.Tensor:
        """(N,) int64, stratified over the batch; noisy ones come up more often the greater the power is over 1."""
        u = (torch.arange(len(self.clean)) + torch.rand(len(self.clean), generator=self.generator)) / len(self.clean)
        return ((1 - (1 - u) ** power) * _TIMESTEPS).long().clamp(max=_TIMESTEPS - 1)

    def noisy(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(N, 4, H, W) latents with noise, and the noise."""
        noise = torch.randn(self.clean.shape, generator=self.generator)
        alpha = self.alphas[t].view(-1, 1, 1, 1)
        return alpha.sqrt() * self.clean + (1 - alpha).sqrt() * noise, noise


def _first_loss(model: Denoiser, lesson: _Lesson, step: int) -> tuple[torch.Tensor, float]:
    """Weighted epsilon error, and the plain one.

    What a caption says about the background matters only where noise hides it, in the noisiest fifth of the timesteps,
    and there an error in the picture hardly shows in epsilon. So after a while these timesteps come up more often, and
    an error in the picture counts with the square root of the signal-to-noise ratio instead of the ratio, up to 1.
    """
    coarse = step >= _COARSE_FROM
    t = lesson.timesteps(_COARSE_POWER if coarse else 1.0)
    x, noise = lesson.noisy(t)
    error = (model(x, t, lesson.ids) - noise).pow(2).mean((1, 2, 3))
    snr = lesson.alphas[t] / (1 - lesson.alphas[t])
    weight = snr.sqrt().clamp(max=1) / snr if coarse else snr.clamp(max=_SNR_CAP) / snr
    return (error * weight).mean(), error.mean().item()


def _settling_loss(model: Denoiser, lesson: _Lesson, _step: int) -> tuple[torch.Tensor, float]:
    """Weighted epsilon error, and the plain one, of a model that learns to look where there is something to see.

    Where there is little noise, latents show the scene, and what a caption adds is no more than the network's own
    uncertainty. Guidance magnifies that, and makes the prediction so steep a function of the latents that PLMS, with
    its extrapolation from four steps, overshoots. So there every picture gets another one's caption: the network learns
    to disregard it, and guided and plain predictions agree.
    """
    t = lesson.timesteps(_SETTLED_POWER)
    deaf = t < _DEAF_BELOW
    ids = torch.where(deaf[:, None], lesson.ids.roll(len(t) // 2, 0), lesson.ids)
    x, noise = lesson.noisy(t)
    told, blind = model(
        torch.cat([x, x[deaf]]), torch.cat([t, t[deaf]]), torch.cat([ids, lesson.empty.expand(int(deaf.sum()), -1)])
    ).split([len(t), int(deaf.sum())])
    error = (told - noise).pow(2).mean((1, 2, 3))
    difference = (told[deaf] - blind).pow(2).mean((1, 2, 3)).sum() / len(t)
    snr = lesson.alphas[t] / (1 - lesson.alphas[t])
    loss = (error * torch.minimum(snr.rsqrt().clamp(min=1), _SNR_CAP / snr)).mean()
    return loss + _DEAFNESS * difference, error.mean().item()


class _Classroom:
    """The scenes that a worker draws its batches from, and the course of a training over them."""

    def __init__(
        self, scenes: list[Scene], latents: torch.Tensor, seed: int, *, batch: int, rank: int, workers: int
    ) -> None:
        self._scenes, self._latents = scenes, latents
        self._seed, self._batch, self._rank, self._workers = seed, batch, rank, workers
        self._tokenizer = new_tokenizer()
        self._empty = token_ids(self._tokenizer, [""])
        self._alphas = alphas_cumprod().float()

    def _lesson(self, number: int, words: float) -> _Lesson:
        rng = np.random.default_rng([self._seed, 12, number, self._rank])
        seed = (self._seed * 1_000_003 + number) * self._workers + self._rank
        clean, ids = _batch(self._scenes, self._latents, self._tokenizer, rng, count=self._batch, words=words)
        return _Lesson(clean, ids, self._empty, self._alphas, torch.Generator().manual_seed(seed))

    def train(
        self,
        run: Run,
        model: Denoiser,
        loss_of: Callable[[Denoiser, _Lesson, int], tuple[torch.Tensor, float]],
        *,
        steps: int,
        first: int = 0,
        words: float = 0.0,
        save_grid: Callable[[Path], None],
    ) -> None:
        """Go on up to a number of steps, with the lessons from the number `first` on; `words` is as in `_batch`."""
        name = run.path.stem
        parameters = list(model.parameters())
        with tqdm(total=steps, initial=run.step, desc=name, unit="step", disable=self._rank > 0) as bar:
            while run.step < steps:
                started = time.perf_counter()
                run.rate(trapezoid_rate(run.step, steps))
                loss, error = loss_of(model, self._lesson(first + run.step, words), run.step)
                torch.autograd.backward(loss)
                _average_gradients(parameters)
                run.advance()
                run.note(seconds=time.perf_counter() - started, loss=loss.item(), error=error)
                bar.update()
                if run.step % _SAVE_EVERY == 0 or run.step == steps:
                    bar.set_postfix(loss=f"{run.notes['loss']:.4f}", error=f"{run.notes['error']:.4f}")
                    if self._rank == 0:
                        run.save()
                        if run.step % _GRID_EVERY == 0 or run.step == steps:
                            run.average.swap()
                            save_grid(run.path.with_name(f"{name}-{run.step:05d}.png"))
                            run.average.swap()
        run.average.swap()


def train_denoiser(
    autoencoder: Any,
    text_encoder: Any,
    work: Path,
    *,
    steps: int,
    settling_steps: int,
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
        Folder for the states (`denoiser.pt`, `settled.pt`), the latents and sample grids.
    steps
        Optimiser steps of the first part. The learning rates' course depends on it.
    settling_steps
        Those of the second, in which captions cease to count where there is little noise. It starts from the averaged
        weights of the first, as float16 keeps them, so that it can be repeated on a model that was written.
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
    model = Denoiser(text_encoder)
    _start(model.unet)
    parameters = list(model.parameters())
    run = Run(work / "denoiser.pt", model, _optimisers(model), Average(parameters, 0.998))
    run.resume()
    rng = np.random.default_rng([seed, 11])
    shown = [sample_scene(rng) for _ in range(scenes)]
    latents = _latents(autoencoder, shown, rank, workers, work / "latents.pt")
    room = _Classroom(shown, latents, seed, batch=batch, rank=rank, workers=workers)

    def save_grid(path: Path) -> None:
        _save_samples(model, autoencoder, path)

    room.train(run, model, _first_loss, steps=steps, save_grid=save_grid)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(parameter.half())
    run = Run(work / "settled.pt", model, _optimisers(model, _SETTLED_SHARE), Average(parameters, 0.99))
    run.resume()
    room.train(run, model, _settling_loss, steps=settling_steps, first=steps, words=_WORDS, save_grid=save_grid)
    return model.eval()


@torch.no_grad()
def _save_samples(model: Denoiser, autoencoder: Any, path: Path) -> None:
    """Two pictures a prompt, one above the other."""
    tokenizer = new_tokenizer()
    ids = token_ids(tokenizer, list(_GRID_PROMPTS) * 2)
    latents = sample(model, ids, token_ids(tokenizer, [""]), seed=0)
    save_grid(to_images(autoencoder.decode(latents / LATENT_SCALE).sample), len(_GRID_PROMPTS), path)
