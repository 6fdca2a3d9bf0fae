"""First stage of the training: the autoencoder, on crops of scenes."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch.nn.functional import max_pool2d
from tqdm import tqdm

from .networks import new_autoencoder
from .progress import Average, Run, cosine_rate, save_grid
from .scenes import IMAGE_SIZE, draw, sample_scene

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

__all__ = ["LATENT_SCALE", "reconstruction_psnr", "to_images", "to_tensor", "train_autoencoder"]

LATENT_SCALE: Final = 0.18215
_POOL: Final = 6000
_CROP: Final = 64
_KL: Final = 1e-3
_SAVE_EVERY: Final = 100


def to_tensor(images: npt.NDArray[np.uint8]) -> torch.Tensor:
    """(N, H, W, 3) uint8 to (N, 3, H, W) float32 in -1..1."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).float() / 127.5 - 1


def to_images(tensor: torch.Tensor) -> npt.NDArray[np.uint8]:
    """(N, 3, H, W) float32 in -1..1 to (N, H, W, 3) uint8."""
    values: npt.NDArray[np.uint8] = ((tensor.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return values


def _scenes(seed: int, stream: int, count: int) -> npt.NDArray[np.uint8]:
    rng = np.random.default_rng([seed, stream])
    return np.stack([draw(sample_scene(rng)) for _ in range(count)])


def _loss(model: Any, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """L1 + L2, more of it near edges, where a flat picture has all its information, and a little KL."""
    posterior = model.encode(x).latent_dist
    latents = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
    error = model.decode(latents).sample - x
    edges = (max_pool2d(x, 5, 1, 2) + max_pool2d(-x, 5, 1, 2)).amax(1, keepdim=True).clamp(max=1)
    kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
    loss: torch.Tensor = ((error.abs() + error**2) * (1 + 2 * edges)).mean() + _KL * kl
    return loss


@torch.no_grad()
def reconstruction_psnr(model: Any, images: npt.NDArray[np.uint8]) -> tuple[float, npt.NDArray[np.uint8]]:
    """Mean over images of the PSNR in dB of decode(encode(x)) as 8-bit pictures, and those pictures."""
    x = to_tensor(images)
    decoded = to_images(
        torch.cat([model.decode(model.encode(part).latent_dist.mean).sample for part in torch.split(x, 16)])
    )
    errors = ((decoded.astype(np.float64) - images) ** 2).mean((1, 2, 3))
    return float((10 * np.log10(255**2 / np.maximum(errors, 1e-3))).mean()), decoded


def train_autoencoder(work: Path, *, steps: int, seed: int, batch: int = 8, rate: float = 2e-3) -> Any:
    """Train, or go on training, the autoencoder; return it with averaged weights.

    Parameters
    ----------
    work
        Folder for the state (`autoencoder.pt`) and sample grids.
    steps
        Optimiser steps in all. The learning rate's cosine would take twice as many; averaging does the rest.
    seed
        Together with `steps` and `batch` it determines the result on one machine.
    batch
        Crops of 64x64 a step.
    rate
        Peak learning rate of AdamW.

    """
    torch.manual_seed(seed)
    model = new_autoencoder()
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=1e-4)
    run = Run(work / "autoencoder.pt", model, [optimiser], Average(model.parameters(), 0.998))
    run.resume()
    if run.step < steps:
        pool, test = _scenes(seed, 1, _POOL), _scenes(seed, 2, 16)
    with tqdm(total=steps, initial=run.step, desc="autoencoder", unit="step") as bar:
        while run.step < steps:
            started = time.perf_counter()
            rng = np.random.default_rng([seed, 3, run.step])
            x = _crops(pool, rng, batch)
            run.rate(cosine_rate(run.step, 2 * steps))
            loss = _loss(model, to_tensor(x), torch.Generator().manual_seed(seed * 1_000_003 + run.step))
            torch.autograd.backward(loss)
            run.advance()
            run.note(seconds=time.perf_counter() - started, loss=loss.item())
            bar.update()
            if run.step % _SAVE_EVERY == 0 or run.step == steps:
                run.average.swap()
                run.notes["psnr"], decoded = reconstruction_psnr(model, test)
                run.average.swap()
                save_grid(np.concatenate([test, decoded]), 8, work / "autoencoder.png")
                bar.set_postfix(loss=f"{run.notes['loss']:.4f}", psnr=f"{run.notes['psnr']:.2f} dB")
                run.save()
    run.average.swap()
    model.eval().requires_grad_(requires_grad=False)
    _standardise(model, _scenes(seed, 4, 128))
    return model


@torch.no_grad()
def _standardise(model: Any, images: npt.NDArray[np.uint8]) -> None:
    """Give each latent channel mean 0 and deviation 1 / 0.18215, by the 1x1 convolutions on either side of the latents.

    So the latents' scale is that of Stable Diffusion v1, and the U-Net sees channels of equal weight.
    """
    latents = torch.cat([model.encode(part).latent_dist.mean for part in torch.split(to_tensor(images), 16)])
    mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3)) * LATENT_SCALE
    before, after = model.quant_conv, model.post_quant_conv
    before.weight[:4] /= deviation.view(-1, 1, 1, 1)
    before.bias[:4] = (before.bias[:4] - mean) / deviation
    before.bias[4:] -= 2 * deviation.log()
    after.bias += after.weight.flatten(1) @ mean
    after.weight *= deviation.view(1, -1, 1, 1)


def _crops(pool: npt.NDArray[np.uint8], rng: np.random.Generator, batch: int) -> npt.NDArray[np.uint8]:
    ys, xs = rng.integers(IMAGE_SIZE - _CROP + 1, size=(2, batch))
    indices = rng.integers(len(pool), size=batch)
    return np.stack([pool[i, y : y + _CROP, x : x + _CROP] for i, y, x in zip(indices, ys, xs, strict=True)])
