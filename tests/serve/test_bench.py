"""The measurement of a server under load and in trouble, with numbers that take no time; it raises what it finds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench import serve_load
from bench.serve_clients import NONE_CAME, Order, parse, spread
from bench.serve_life import disconnect, parent, sigterm
from bench.serve_load import overload

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def test_too_much_is_refused_and_nothing_that_was_accepted_is_lost(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_load, "STEPS", 2)
    monkeypatch.setattr(serve_load, "CLOSED_S", 1.0)
    found = overload(home, seconds=2, factor=10)
    assert found["accepted and lost"] == found["accepted and not the exact picture"] == 0
    assert set(found["requests by status"]) == {"200", "429"}
    assert found["probes of /healthz"] > 10
    assert found["memory"]["MB after warm-up, least and most"][0] > 100


def test_what_was_accepted_is_answered_after_sigterm(home: Path) -> None:
    found = sigterm(home, signals=1)
    assert found["exit codes"] == {"0": 1}
    assert found["requests"]["accepted"] == found["requests"]["answered with the exact picture"] > 0


def test_nothing_is_left_of_clients_that_went_away(home: Path) -> None:
    found = disconnect(home, disconnects=10)
    assert found["rounds after which a picture was exact"] == found["rounds"]
    assert found["held after each tenth"][-1]["descriptors"] < 30


def test_a_server_ends_with_the_process_that_has_started_it(home: Path) -> None:
    found = parent(home, deaths=3)
    assert found["sockets left behind"] == 0
    assert set(found["seconds that the server lived on, median and most"]) == {"loading", "ready", "at work"}


def test_an_answer_that_broke_off_is_none() -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n"
    assert parse(head + b"12345") == (200, b"12345")
    assert parse(head + b"123") == (200, None)
    assert parse(b"") == parse(b"HTTP/1.1 2") == (NONE_CAME, None)
    assert parse(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n") == (200, b"ab")


def test_a_stream_counts_if_its_last_event_has_the_picture() -> None:
    order = Order({"prompt": "a star", "stream": True}, "picture")
    partial = b'event: image_generation.partial_image\ndata: {"b64_json": "picture"}\n\n'
    assert not order.is_answered_by(partial)
    assert order.is_answered_by(partial + partial.replace(b"partial_image", b"completed"))
    assert not Order({"prompt": "a star"}, "picture").is_answered_by(b'{"data": [{"b64_json": "other"}]}')


def test_percentiles() -> None:
    assert spread([]) == {}
    assert spread([number / 1000 for number in range(1, 201)]) == {"p50": 100.0, "p99": 198.0, "max": 200.0}
