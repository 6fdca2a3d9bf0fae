"""Captions as the text encoder takes them: ids of CLIP's vocabulary."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from ..vocabulary import write_tokenizer
from .captions import caption
from .scenes import sample_scene

__all__ = ["new_tokenizer", "token_ids", "used_tokens"]


def new_tokenizer() -> Tokenizer:
    """Return CLIP's tokenizer, padding to 77 with the end-of-text token as Stable Diffusion v1 does."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        write_tokenizer(path)
        tokenizer = Tokenizer.from_file(str(path))
    tokenizer.enable_padding(length=77, pad_id=49407, pad_token="<|endoftext|>")  # noqa: S106 - no password
    return tokenizer


def token_ids(tokenizer: Tokenizer, texts: list[str]) -> torch.Tensor:
    """(N, 77) int64 ids of texts."""
    return torch.tensor([encoding.ids for encoding in tokenizer.encode_batch(texts)])


def used_tokens(tokenizer: Tokenizer, seed: int) -> list[int]:
    """Ids that captions use, found by writing many of them."""
    rng = np.random.default_rng([seed, 10])
    texts = [caption(sample_scene(rng), rng) for _ in range(4000)]
    return sorted({i for encoding in tokenizer.encode_batch(texts) for i in encoding.ids})
