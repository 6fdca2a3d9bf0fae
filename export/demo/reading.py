"""First lessons of the text encoder: to tell where a caption puts which colour, before there is a U-Net to listen.

Stable Diffusion v1 starts from a text encoder that has met pictures before, CLIP's. Without that, the error of a noisy
prediction is a poor teacher: it takes the U-Net most of its training to find out which of two objects a colour belongs
to. So the text encoder is first asked for thumbnails of scenes, through a small head that is thrown away; a thousand
steps of it cost as much as a hundred of the U-Net's.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import nn
from torch.nn.functional import gelu, scaled_dot_product_attention
from tqdm import tqdm

from .captions import caption
from .muon import Muon
from .networks import TEXT_WIDTH, new_text_encoder
from .progress import Average, Run, trapezoid_rate
from .scenes import Scene, draw, sample_scene
from .tokens import new_tokenizer, token_ids, used_tokens

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Reader", "thumbnails", "train_text_encoder"]

_SIDE: Final = 16
_SUPERSAMPLED: Final = 32
_TOKENS: Final = 24  # the longest caption has 17; the encoder is causal, so those behind change nothing before them
_WIDTH: Final = 64
_HEADS: Final = 4
_MUON_RATE: Final = 0.01
_ADAM_RATE: Final = 2e-3
_SAVE_EVERY: Final = 100


class _Attention(nn.Module):
    """What each place of the thumbnail takes from the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(_WIDTH, _WIDTH)
        self.key = nn.Linear(TEXT_WIDTH, _WIDTH)
        self.value = nn.Linear(TEXT_WIDTH, _WIDTH)
        self.out = nn.Linear(_WIDTH, _WIDTH)

    def forward(self, places: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        query, key, value = (
            x.unflatten(-1, (_HEADS, -1)).transpose(1, 2)
            for x in (self.query(places), self.key(text), self.value(text))
        )
        taken: torch.Tensor = self.out(scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))
        return places + taken


class Reader(nn.Module):
    """Text encoder, and the head that draws thumbnails from what it says."""

    def __init__(self) -> None:
        super().__init__()
        self.text_encoder = new_text_encoder()
        self.places = nn.Parameter(torch.randn(1, _SIDE * _SIDE, _WIDTH) * 0.5)
        self.first, self.second = _Attention(), _Attention()
        self.hidden, self.colour = nn.Linear(_WIDTH, 2 * _WIDTH), nn.Linear(2 * _WIDTH, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(N, tokens) ids to (N, 256, 3) colours in -1..1, row by row."""
        text = self.text_encoder(ids).last_hidden_state
        places = self.second(self.first(self.places.expand(len(ids), -1, -1), text), text)
        colours: torch.Tensor = self.colour(gelu(self.hidden(places)))
        return colours


def thumbnails(scenes: list[Scene]) -> torch.Tensor:
    """(N, 256, 3) float32 in -1..1: mean colours of 16x16 squares, row by row."""
    factor = _SUPERSAMPLED // _SIDE
    images = np.stack([draw(scene, _SUPERSAMPLED) for scene in scenes])
    means = images.reshape(-1, _SIDE, factor, _SIDE, factor, 3).mean((2, 4), dtype=np.float32)
    return torch.from_numpy(means).flatten(1, 2) / 127.5 - 1


def _scenes(rng: np.random.Generator, count: int) -> list[Scene]:
    """Scenes, as many with two objects as with one: there is more to learn from them."""
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = sample_scene(rng)
        if (scene.relation is not None) == len(scenes) % 2:
            scenes.append(scene)
    return scenes


def train_text_encoder(work: Path, *, steps: int, seed: int, batch: int = 128) -> Any:
    """Train, or go on training, a text encoder to describe scenes; return it with averaged weights.

    Parameters
    ----------
    work
        Folder for the state (`text_encoder.pt`).
    steps
        Optimiser steps in all. The learning rates' course depends on it.
    seed
        Together with `steps` and `batch` it determines the result on one machine.
    batch
        Captions a step; none is kept for the next.

    """
    torch.manual_seed(seed)
    tokenizer = new_tokenizer()
    reader = Reader()
    used = used_tokens(tokenizer, seed)
    with torch.no_grad():
        table = reader.text_encoder.get_input_embeddings().weight
        table[used] = torch.randn(len(used), TEXT_WIDTH) * 0.1
    run = Run(work / "text_encoder.pt", reader, _optimisers(reader), Average(reader.parameters(), 0.99))
    run.resume()
    with tqdm(total=steps, initial=run.step, desc="text encoder", unit="step") as bar:
        while run.step < steps:
            started = time.perf_counter()
            rng = np.random.default_rng([seed, 5, run.step])
            scenes = _scenes(rng, batch)
            ids = token_ids(tokenizer, [caption(scene, rng) for scene in scenes])[:, :_TOKENS]
            run.rate(trapezoid_rate(run.step, steps))
            loss = (reader(ids) - thumbnails(scenes)).pow(2).mean()
            torch.autograd.backward(loss)
            run.advance()
            run.note(seconds=time.perf_counter() - started, loss=loss.item())
            bar.update()
            if run.step % _SAVE_EVERY == 0 or run.step == steps:
                bar.set_postfix(loss=f"{run.notes['loss']:.4f}")
                run.save()
    run.average.swap()
    return reader.text_encoder


def _optimisers(reader: Reader) -> list[torch.optim.Optimizer]:
    matrices: list[torch.Tensor] = []
    others: list[torch.Tensor] = []
    for name, parameter in reader.named_parameters():
        outer = "embeddings." in name or name.startswith("colour")
        (matrices if parameter.ndim == 2 and not outer else others).append(parameter)
    return [Muon(matrices, lr=_MUON_RATE), torch.optim.AdamW(others, lr=_ADAM_RATE, betas=(0.9, 0.98), weight_decay=0)]
