"""Some hundreds of mutants of requests; `bench.oip_mutants` sends a hundred thousand."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.oip_mutants import Attack, mutant, seedlings

if TYPE_CHECKING:
    from .server import Server


def test_mutants_are_refused_and_the_server_goes_on(inference_server: Server) -> None:
    assert inference_server.grpc is not None
    attack = Attack(inference_server.url.removeprefix("http://"), inference_server.grpc, seed=1)
    answers, failures = attack.send_all(range(600))
    assert failures == []
    assert answers["http 400"] > 100
    assert answers["grpc INVALID_ARGUMENT"] > 100
    assert inference_server.get("/v2/health/ready") == (200, "")
    assert "Traceback" not in inference_server.errors()


def test_a_mutant_follows_from_its_number() -> None:
    stock = seedlings()
    assert [mutant(0, number, stock) for number in range(50)] == [mutant(0, number, stock) for number in range(50)]
    assert mutant(1, 0, stock) != mutant(0, 0, stock)
    assert {each.grpc for each in stock} == {True, False}
