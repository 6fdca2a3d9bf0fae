"""Calls of one engine by many loops: in order, as one where they agree, and with the same bits as alone."""

from __future__ import annotations

import threading
from collections import Counter
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pytest

from sdrt.errors import BackendError
from sdrt.runtime.onnx import OnnxSession
from sdrt.serve.shared import SharedSession
from sdrt.serve.turns import GivenUpError, Turns

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import sdrt

PATIENCE_S = 60


@pytest.fixture(scope="module")
def unet(pipe: sdrt.Pipeline) -> Iterator[OnnxSession]:
    component = pipe.bundle.component("unet")
    with OnnxSession(pipe.bundle.path(pipe.bundle.merged_graph(component)), component) as session:
        yield session


def shapes(pipe: sdrt.Pipeline, rows: int, side: tuple[int, int] = (16, 16)) -> dict[str, tuple[int, ...]]:
    width = pipe.bundle.manifest.text.embedding_width
    latents = (rows, 4, *side)
    return {"latents": latents, "timestep": (1,), "text_embeddings": (rows, 77, width), "prediction": latents}


@pytest.mark.parametrize("side", [(16, 16), (8, 20), (9, 17), (32, 32)])
@pytest.mark.parametrize("copies", [2, 3, 7])
@pytest.mark.parametrize("rows", [1, 2])
def test_onnxruntime_gives_the_same_bits_in_any_batch(
    pipe: sdrt.Pipeline, unet: OnnxSession, side: tuple[int, int], copies: int, rows: int
) -> None:
    """What sharing rests on. The server tries it anew with each model, on the machine where it runs."""
    shared = SharedSession(Turns(8, lambda _: None), unet, pipe.bundle.component("unet"), stepped=True, joined=True)
    assert shared.is_exact(shapes(pipe, rows, side), copies)


class Engine:
    """Stands in for a library: it says how it was called, and fails or rounds otherwise when it is told to."""

    def __init__(self, component: Any) -> None:
        self.component = component
        self.calls: list[tuple[int, float]] = []
        self.most_rows = 100
        self.error_of_large = 0.0

    def bind(self, shapes: Mapping[str, tuple[int, ...]], *, in_pairs: bool = False) -> EngineBinding:  # noqa: ARG002
        return EngineBinding(self, shapes)

    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...


class EngineBinding:
    """Predicts the latents times the timestep."""

    def __init__(self, engine: Engine, given: Mapping[str, tuple[int, ...]]) -> None:
        self._engine = engine
        self.inputs: Mapping[str, Any] = {each.name: np.zeros(given[each.name]) for each in engine.component.inputs}
        self.outputs: Mapping[str, Any] = {"prediction": np.zeros(given["prediction"])}

    def run(self) -> None:
        rows, t = len(self.inputs["latents"]), float(self.inputs["timestep"][0])
        self._engine.calls.append((rows, t))
        if rows > self._engine.most_rows:
            raise BackendError(f"no memory for {rows} rows")
        error = self._engine.error_of_large * (rows > 2)
        self.outputs["prediction"][...] = self.inputs["latents"] * t + error

    def trim(self) -> None:
        pass


@pytest.fixture
def engine(pipe: sdrt.Pipeline) -> Engine:
    return Engine(pipe.bundle.component("unet"))


def shared_engine(engine: Engine, turns: Turns, *, joined: bool = True, stepped: bool = True) -> SharedSession:
    return SharedSession(turns, engine, engine.component, stepped=stepped, joined=joined)


def run_loops(turns: Turns, *loops: Callable[[], object]) -> None:
    """Run loops in threads of their own, the first being the oldest, and all there before any of them calls."""
    here = threading.Barrier(len(loops))
    joined = [threading.Event() for _ in loops]
    failures: list[BaseException] = []

    def run(number: int, loop: Callable[[], object]) -> None:
        try:
            if number:
                assert joined[number - 1].wait(PATIENCE_S)
            with turns.taking_part():
                joined[number].set()
                here.wait(PATIENCE_S)
                loop()
        except BaseException as error:  # noqa: BLE001 - it is raised in the test
            failures.append(error)

    threads = [threading.Thread(target=run, args=each, daemon=True) for each in enumerate(loops)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    if failures:
        raise failures[0]


def steps(session: SharedSession, given: dict[str, tuple[int, ...]], value: float, timesteps: Sequence[float]) -> None:
    """A loop that checks what it gets."""
    binding = session.bind(given)
    binding.inputs["latents"][...] = value
    for t in timesteps:
        binding.inputs["timestep"][0] = t
        binding.run()
        np.testing.assert_array_equal(binding.outputs["prediction"], value * t)


def test_loops_that_agree_stay_together(pipe: sdrt.Pipeline, engine: Engine) -> None:
    seen: list[int] = []
    turns = Turns(8, seen.append)
    session = shared_engine(engine, turns)
    given = shapes(pipe, 2)
    run_loops(turns, *(lambda v=value: steps(session, given, v, (3, 2, 1)) for value in (5.0, 6.0, 7.0)))
    assert engine.calls == [(6, 3), (6, 2), (6, 1)]
    assert seen == [3, 3, 3]


def test_rows_with_and_without_guidance_share_a_call(pipe: sdrt.Pipeline, engine: Engine) -> None:
    turns = Turns(8, lambda _: None)
    session = shared_engine(engine, turns)
    run_loops(turns, *(lambda r=rows: steps(session, shapes(pipe, r), float(r), (2, 1)) for rows in (1, 2)))
    assert engine.calls == [(3, 2), (3, 1)]


def test_the_oldest_goes_on_where_timesteps_differ(pipe: sdrt.Pipeline, engine: Engine) -> None:
    turns = Turns(8, lambda _: None)
    session = shared_engine(engine, turns)
    given = shapes(pipe, 1)
    run_loops(
        turns,
        lambda: steps(session, given, 1, (30, 20, 10)),
        lambda: steps(session, given, 2, (35, 25)),
        lambda: steps(session, given, 3, (35, 25)),
    )
    assert engine.calls == [(1, 30), (1, 20), (1, 10), (2, 35), (2, 25)]


def test_no_more_than_the_most_share_a_call(pipe: sdrt.Pipeline, engine: Engine) -> None:
    turns = Turns(2, lambda _: None)
    session = shared_engine(engine, turns)
    given = shapes(pipe, 1)
    run_loops(turns, *(lambda v=value: steps(session, given, v, (2, 1)) for value in (1.0, 2.0, 3.0)))
    assert engine.calls == [(2, 2), (2, 1), (1, 2), (1, 1)]


def test_sessions_that_are_not_joined_are_used_by_age(pipe: sdrt.Pipeline, engine: Engine) -> None:
    """But for the first step, for which the older loop may have something to compile and is not waited for."""
    turns = Turns(8, lambda _: None)
    session = shared_engine(engine, turns, joined=False)
    given = shapes(pipe, 1)
    younger_came = threading.Event()

    def older() -> None:
        assert younger_came.wait(PATIENCE_S)
        steps(session, given, 10, (12, 11, 10))

    def younger() -> None:
        steps(session, given, 20, (22,))
        younger_came.set()
        steps(session, given, 20, (21,))

    run_loops(turns, older, younger)
    timesteps = [t for _, t in engine.calls]
    # Whichever came first, the younger one has not got in between once the older one was at work.
    assert timesteps in ([22, 21, 12, 11, 10], [22, 12, 11, 10, 21])


def test_what_comes_once_a_picture_comes_first(pipe: sdrt.Pipeline, engine: Engine) -> None:
    """A decoder's call waits for no other loop's step."""
    turns = Turns(8, lambda _: None)
    stepped, once = shared_engine(engine, turns), shared_engine(engine, turns, stepped=False)
    given = shapes(pipe, 1)
    run_loops(turns, lambda: steps(stepped, given, 1, (2, 1)), lambda: steps(once, given, 2, (9, 8)))
    assert Counter(engine.calls) == {(1, 2): 1, (1, 1): 1, (1, 9): 1, (1, 8): 1}
    assert engine.calls[0] == (1, 9)


def test_a_call_that_is_too_large_is_run_in_parts_and_not_tried_again(pipe: sdrt.Pipeline, engine: Engine) -> None:
    engine.most_rows = 2
    turns = Turns(3, lambda _: None)
    session = shared_engine(engine, turns)
    given = shapes(pipe, 1)
    run_loops(turns, *(lambda v=value: steps(session, given, v, (2, 1)) for value in (1.0, 2.0, 3.0)))
    assert [call for call in engine.calls if call[0] == 3] == [(3, 2)]
    assert turns.most == 2


def test_what_goes_wrong_is_told_to_its_own_loop(pipe: sdrt.Pipeline, engine: Engine) -> None:
    engine.most_rows = 1
    turns = Turns(2, lambda _: None)
    session = shared_engine(engine, turns)
    failed = threading.Event()

    def too_large() -> None:
        with pytest.raises(BackendError, match="no memory for 2 rows"):
            steps(session, shapes(pipe, 2), 1, (2,))
        failed.set()

    run_loops(turns, too_large, lambda: steps(session, shapes(pipe, 1), 2, (2, 1)))
    assert failed.is_set()


def test_a_loop_that_was_given_up_leaves_its_place(pipe: sdrt.Pipeline, engine: Engine) -> None:
    """It waits at a step of its own while an older loop is at work elsewhere, and goes without having been run."""
    turns = Turns(8, lambda _: None)
    session = shared_engine(engine, turns)
    given = shapes(pipe, 1)
    nobody_waits = threading.Event()
    left = threading.Event()

    def leaving() -> None:
        with turns.taking_part(nobody_waits.is_set):
            inside.set()
            with pytest.raises(GivenUpError):
                steps(session, given, 2, (99,))
        left.set()

    inside = threading.Event()
    with turns.taking_part():
        thread = threading.Thread(target=leaving, daemon=True)
        thread.start()
        assert inside.wait(PATIENCE_S)
        nobody_waits.set()
        turns.wake()
        assert left.wait(PATIENCE_S)
        steps(session, given, 1, (2, 1))
    thread.join(PATIENCE_S)
    assert engine.calls == [(1, 2), (1, 1)]


def test_an_engine_that_rounds_otherwise_in_a_batch_is_found_out(pipe: sdrt.Pipeline, engine: Engine) -> None:
    session = shared_engine(engine, Turns(8, lambda _: None))
    assert session.is_exact(shapes(pipe, 2), 3)
    engine.error_of_large = 1e-6
    assert not session.is_exact(shapes(pipe, 2), 3)
