from __future__ import annotations

import gzip
import hashlib
import json
import warnings
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sdrt.errors import BundleCorruptError, BundleNotFoundError, InputError, SdrtWarning
from sdrt.export.vocabulary import END, START, read_merges, vocabulary, write_tokenizer
from sdrt.runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from pathlib import Path

ASTRONAUT = [320, 1125, 539, 550, 18376, 6765, 320, 4558, 525, 7496]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    write_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(path: Path) -> Tokenizer:
    return Tokenizer(path)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """transformers' tokenizer over the files that a Stable Diffusion v1 folder has, which diffusers users get."""
    from transformers import CLIPTokenizer

    folder = tmp_path_factory.mktemp("reference")
    (folder / "vocab.json").write_text(json.dumps(vocabulary()), encoding="utf-8")
    merges = "\n".join(["#version: 0.2", *read_merges(), ""])
    (folder / "merges.txt").write_text(merges, encoding="utf-8")
    special = {"__type": "AddedToken", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    config = {
        "add_prefix_space": False,
        "bos_token": {**special, "content": START},
        "do_lower_case": True,
        "eos_token": {**special, "content": END},
        "errors": "replace",
        "model_max_length": 77,
        "pad_token": END,
        "tokenizer_class": "CLIPTokenizer",
        "unk_token": {**special, "content": END},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder)


def padded(tokens: list[int]) -> list[int]:
    return [49406, *tokens, *[49407] * (76 - len(tokens))]


# Words of the vocabulary, weights in brackets, contractions, other scripts and what looks alike, control characters.
PIECES = (
    *("a", "Photo", "GREAT", "wall", "(masterpiece:1.2)", "don't", "they'LL", "8k", "...", "!!?", "\u2014", "\u2019"),
    *("e\u0301", "\u00e9", "\u0130", "\u00df", "\ufb01", "\u0152UVRE", "\uff11\uff12", "\u00bd", "\u00c3\u00a9"),
    *("שלום", "مرحبا", "日本語", "한국어", "😀", "👩\u200d👩\u200d👧", "\u200d", "\u3000", "\x01", "\t", "\r\n"),
    *("<|endoftext|>", "<|startoftext|>", "<|EndOfText|>", "</w>", "&amp;"),
)
PROMPTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=60),
    st.tuples(st.sampled_from([" ", ""]), st.lists(st.sampled_from(PIECES), max_size=40)).map(
        lambda t: t[0].join(t[1])
    ),
)


@given(PROMPTS)
@example("<|endoftext|>" * 90)
@example(" ".join(["word"] * 76))
@settings(deadline=None, max_examples=400)
def test_ids_are_those_of_transformers(tokenizer: Tokenizer, reference: Any, prompt: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SdrtWarning)
        ids = tokenizer.encode([prompt])
    theirs = reference([prompt], padding="max_length", max_length=77, truncation=True, return_tensors="np").input_ids
    np.testing.assert_array_equal(ids, theirs)


def test_known_ids(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(["a photo of an astronaut riding a horse on mars", "", "Great Wall photo"])
    assert ids.dtype == np.int64
    assert ids.tolist() == [padded(ASTRONAUT), padded([]), padded([830, 2569, 1125])]


def test_case_space_and_composition_make_no_difference(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(["Café  on\tMARS", "cafe\u0301 on mars"])
    np.testing.assert_array_equal(ids[0], ids[1])


def test_75_tokens_fit(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode([" ".join(["dog"] * 75)])
    assert ids[0].tolist() == [49406, *[1929] * 75, 49407]


def test_what_does_not_fit_is_dropped_and_shown(tokenizer: Tokenizer) -> None:
    with pytest.warns(SdrtWarning, match="77 tokens long and the model reads 75: dropped 'purple café'") as caught:
        ids = tokenizer.encode([" ".join(["dog"] * 75) + " Purple Café"])
    assert ids[0].tolist() == [49406, *[1929] * 75, 49407]
    assert caught[0].filename == __file__


def test_a_warning_is_one_line_of_bounded_length(tokenizer: Tokenizer) -> None:
    with pytest.warns(SdrtWarning, match=r"\.\.\. and \d+ characters more") as caught:
        ids = tokenizer.encode(["long words\n" * 1000])
    assert ids.shape == (1, 77)
    assert ids[0, -1] == 49407
    message = str(caught[0].message)
    assert "\n" not in message
    assert len(message) < 450


def test_each_prompt_of_a_batch_is_as_alone(tokenizer: Tokenizer) -> None:
    prompts = ["one", "", "a rather longer one, with punctuation!"]
    np.testing.assert_array_equal(tokenizer.encode(prompts), np.concatenate([tokenizer.encode([p]) for p in prompts]))
    assert tokenizer.encode([]).shape == (0, 77)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (["fine", "a\0b"], "NUL character at position 1"),
        (["abc\ud83d"], "half a surrogate pair at position 3"),
        ("one string", "put it in a list"),
        ([None], "a prompt is None"),
        ([b"bytes"], "a prompt is b'bytes'"),
    ],
)
def test_what_is_no_text_is_refused(tokenizer: Tokenizer, prompts: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        tokenizer.encode(prompts)
    assert "\n" not in str(caught.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(BundleNotFoundError, match=r"none\.json is not there"):
        Tokenizer(tmp_path / "none.json")


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe", b"not json"])
def test_a_damaged_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(BundleCorruptError, match="build the bundle again"):
        Tokenizer(path)


def test_another_models_tokenizer(tmp_path: Path, path: Path) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    data["added_tokens"] = []
    data["model"]["vocab"] = {"a": 0, END: 1}
    data["model"]["merges"] = []
    data["post_processor"] = None
    other = tmp_path / "tokenizer.json"
    other.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(BundleCorruptError, match="not CLIP's tokenizer"):
        Tokenizer(other)


def test_the_file_has_the_same_bytes_each_time(tmp_path: Path, path: Path) -> None:
    again = tmp_path / "again.json"
    write_tokenizer(again)
    assert again.read_bytes() == path.read_bytes()


def test_the_merges_are_clips() -> None:
    merges = read_merges()
    assert len(merges) == 49152 - 256 - 2
    assert (merges[0], merges[-1]) == ("i n", "jeky ll</w>")
    packed = resources.files("sdrt.export.vocabulary").joinpath("merges.txt.gz").read_bytes()
    digest = hashlib.sha256(gzip.decompress(packed)).hexdigest()
    # Of lines 2 to 48895 of CLIP's own file.
    assert digest == "d308b7377a8ceaa9707a21614fe8c831b9196e197b7aeb69833359362907af02"


def test_the_vocabulary_is_clips() -> None:
    tokens = vocabulary()
    assert len(tokens) == 49408
    assert [tokens[token] for token in ("!", "a</w>", "the</w>", "dog</w>", START, END)] == [
        *(0, 320, 518, 1929),
        *(49406, 49407),
    ]


def test_the_licence_ships_with_the_vocabulary() -> None:
    text = resources.files("sdrt.export.vocabulary").joinpath("LICENSE").read_text(encoding="utf-8")
    assert "Copyright (c) 2021 OpenAI" in text
    assert "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a" in text
