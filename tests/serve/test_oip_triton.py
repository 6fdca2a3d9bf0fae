"""Answers in the Open Inference Protocol beside those of a real Triton, which `bench.triton` has recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from bench.oip_answers import answers

if TYPE_CHECKING:
    from .server import Server

TRITON: dict[str, Any] = json.loads((Path(__file__).parent / "triton.json").read_text(encoding="utf-8"))

DESCRIBED = "says what it is itself"
COUNTED = "has no batches to count"
FIXED = "has no repository to load from, and is not unavailable for it"
OTHERWISE = {
    "http GET ": (200, DESCRIBED),
    "grpc server": ("OK", DESCRIBED),
    **{f"http GET /models/demo{version}/config": (200, DESCRIBED) for version in ("", "/versions/1")},
    **{
        f"grpc ModelConfig {asked}": ("OK", DESCRIBED) for asked in ({"name": "demo"}, {"name": "demo", "version": "1"})
    },
    **{
        f"grpc ModelStatistics {asked}": ("OK", COUNTED)
        for asked in ({}, {"name": "demo"}, {"name": "demo", "version": "1"})
    },
    "http GET /models/nope/stats": (404, "does not find what is not there"),
    "grpc ModelStatistics {'name': 'nope'}": ("NOT_FOUND", "does not find what is not there"),
    "grpc ModelStatistics {'name': 'demo', 'version': '2'}": ("NOT_FOUND", "does not find what is not there"),
    "grpc load": ("UNIMPLEMENTED", FIXED),
    "grpc unload": ("UNIMPLEMENTED", FIXED),
    "http index []": (400, "wants an object where there is to be one"),
    "http infer: outputs [{'name': 'image', 'parameters': {'classification': 2}}]": (400, "has no classes"),
    "http infer: prompt with {'shape': [0], 'data': []}": (400, "makes no pictures of no prompts"),
    "http infer: clip_skip 2147483648": (400, "does not wrap numbers round"),
    "http infer: seed of UINT64": (200, "takes all seeds that diffusers takes"),
    "http binary: cut gzip": (400, "wants compressed bodies whole"),
}
"""Where sdrt differs on purpose: its status or code, and why."""


def code(answer: dict[str, Any]) -> Any:
    return answer.get("status", answer.get("code"))


@pytest.fixture(scope="module")
def ours(inference_server: Server) -> dict[str, Any]:
    assert inference_server.grpc is not None
    return answers(inference_server.url.removeprefix("http://"), inference_server.grpc)


def test_answers_are_like_tritons(ours: dict[str, Any]) -> None:
    """Those to mistakes as well, but for the mistakes that Triton calls its own."""
    assert ours.keys() == TRITON.keys()
    for name, theirs in TRITON.items():
        if name in OTHERWISE:
            assert code(ours[name]) == OTHERWISE[name][0], name
            assert ours[name] != theirs, f"{name} needs no exception"
        elif code(theirs) in {500, 501, 503, "INTERNAL"}:
            assert code(ours[name]) in {400, 415, "INVALID_ARGUMENT"}, name
            assert ours[name].get("body", {"error": "str"}) == {"error": "str"}, name
        else:
            assert ours[name] == theirs, name


def test_configurations_have_no_field_that_tritons_lacks(ours: dict[str, Any]) -> None:
    name = "http GET /models/demo/config"
    mine, theirs = ours[name]["body"], TRITON[name]["body"]
    assert mine.keys() <= theirs.keys()
    assert mine["input"] == theirs["input"]
    assert mine["output"] == theirs["output"]
