"""CLIP's vocabulary, and the tokenizer file that is made of it.

A checkpoint in the original format carries no tokenizer, and every Stable Diffusion v1 model uses this one: byte-level
byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909) with 48,894 merges and 49,408 tokens. Where the merges come
from, and their licence, is in the file LICENSE beside this one.
"""

from __future__ import annotations

import gzip
import json
from importlib import resources
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

START = "<|startoftext|>"
END = "<|endoftext|>"
WORD_END = "</w>"

_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def read_merges() -> list[str]:
    """Return the 48,894 merges, the most frequent first, each as two symbols with a space between."""
    packed = resources.files(__name__).joinpath("merges.txt.gz").read_bytes()
    return gzip.decompress(packed).decode().splitlines()


def byte_symbols() -> list[str]:
    """Return the 256 characters that stand for bytes, in the vocabulary's order.

    Bytes that print in Latin-1 stand for themselves and come first; the others follow, in order, as the characters
    from U+0100 on (Radford et al. 2019, GPT-2).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(byte) for byte in printable] + [chr(0x100 + n) for n in range(256 - len(printable))]


def vocabulary() -> dict[str, int]:
    """Return the 49,408 tokens and their ids: bytes, bytes that end a word, merges, start and end of text."""
    symbols = byte_symbols()
    merged = [merge.replace(" ", "") for merge in read_merges()]
    tokens = [*symbols, *(symbol + WORD_END for symbol in symbols), *merged, START, END]
    return {token: number for number, token in enumerate(tokens)}


def write_tokenizer(path: Path) -> None:
    """Write CLIP's tokenizer as a Hugging Face ``tokenizer.json``.

    It does what transformers' CLIPTokenizer does with the files of a Stable Diffusion v1 model. The bytes are the same
    each time.

    Parameters
    ----------
    path
        The file to write; what was there is replaced.

    Raises
    ------
    OSError
        If it cannot be written.

    """
    path.write_bytes(json.dumps(_tokenizer(), ensure_ascii=False, separators=(",", ":")).encode() + b"\n")


def _tokenizer() -> dict[str, Any]:
    tokens = vocabulary()
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": tokens[token],
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": token == START,
                "special": True,
            }
            for token in (START, END)
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "NFC"},
                {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
                {"type": "Lowercase"},
            ],
        },
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": _WORDS}, "behavior": "Removed", "invert": True},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
            ],
        },
        "post_processor": {
            "type": "RobertaProcessing",
            "sep": [END, tokens[END]],
            "cls": [START, tokens[START]],
            "trim_offsets": False,
            "add_prefix_space": False,
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
                {"type": "Replace", "pattern": {"String": WORD_END}, "content": " "},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": END,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": WORD_END,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": tokens,
            "merges": read_merges(),
        },
    }
