"""Prompts to token ids."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np

from ..errors import BundleCorruptError, BundleNotFoundError, InputError, SdrtWarning

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

START_ID = 49406
END_ID = 49407
LENGTH = 77
CAPACITY = LENGTH - 2

_SHOWN = 300  # characters of dropped text in a warning


class Tokenizer:
    """CLIP's tokenizer as Stable Diffusion v1 uses it.

    Ids are those of transformers' CLIPTokenizer, which since its version 5 is the ``tokenizers`` library alone. Older,
    slow tokenizers repaired mojibake with ftfy where that was installed, and unescaped HTML; neither happens here.
    Emoji, right-to-left scripts and combining characters are encoded byte by byte where CLIP has no token for them.

    Safe to use from several threads at once.

    Parameters
    ----------
    path
        A ``tokenizer.json``.

    Raises
    ------
    BundleNotFoundError
        If there is no such file.
    BundleCorruptError
        If it is not a tokenizer, or not CLIP's.

    """

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as Backend  # noqa: PLC0415 - not needed before the first prompt

        if not path.is_file():
            raise BundleNotFoundError(f"{path} is not there: expected the bundle's tokenizer; build the bundle again")
        try:
            self._backend = Backend.from_file(str(path))
        except Exception as error:  # the library raises no narrower class
            raise BundleCorruptError(f"{path} is not a tokenizer ({error}): build the bundle again") from error
        if (self._backend.token_to_id("<|startoftext|>"), self._backend.token_to_id("<|endoftext|>")) != (
            START_ID,
            END_ID,
        ):
            raise BundleCorruptError(f"{path} is not CLIP's tokenizer: build the bundle again")

    def encode(self, prompts: Sequence[str]) -> NDArray[np.int64]:
        """Turn prompts into the text encoder's input.

        Parameters
        ----------
        prompts
            The texts; an empty one is the unconditional prompt. What goes beyond 75 tokens is dropped with an
            `SdrtWarning` that shows it.

        Returns
        -------
        int64 of shape (len(prompts), 77): 49406 (start of text), at most 75 tokens, then 49407 (end of text) to the
        end, which is what Stable Diffusion v1 pads with.

        Raises
        ------
        InputError
            If `prompts` is a string or holds something else than strings, or a prompt has a NUL character or half a
            surrogate pair, which stand for no text.

        """
        if isinstance(prompts, str):
            raise InputError("the prompts are one string: expected a sequence of strings; put it in a list")
        ids = np.full((len(prompts), LENGTH), END_ID, np.int64)
        ids[:, 0] = START_ID
        for row, prompt in zip(ids, prompts, strict=True):
            tokens = self._backend.encode(_checked(prompt), add_special_tokens=False).ids
            row[1 : 1 + min(len(tokens), CAPACITY)] = tokens[:CAPACITY]
            if len(tokens) > CAPACITY:
                self._warn_dropped(tokens[CAPACITY:])
        return ids

    def count(self, prompt: str) -> int:
        """Tell how many tokens a prompt has, those included that go beyond 75 and would be dropped.

        Raises
        ------
        InputError
            As `encode`.

        """
        return len(self._backend.encode(_checked(prompt), add_special_tokens=False).ids)

    def _warn_dropped(self, tokens: list[int]) -> None:
        text = self._backend.decode(tokens, skip_special_tokens=False).strip()
        if len(text) > _SHOWN:
            text = f"{text[:_SHOWN]}... and {len(text) - _SHOWN} characters more"
        warnings.warn(
            f"the prompt is {CAPACITY + len(tokens)} tokens long and the model reads {CAPACITY}: dropped {text!r}",
            SdrtWarning,
            stacklevel=3,
        )


def _checked(prompt: str) -> str:
    if not isinstance(prompt, str):
        raise InputError(f"a prompt is {prompt!r}: expected a string")
    if "\0" in prompt:
        raise InputError(f"a prompt has a NUL character at position {prompt.index(chr(0))}: expected text; remove it")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"a prompt has half a surrogate pair at position {error.start}: expected text in Unicode; remove it"
        ) from None
    return prompt
