"""The compiled kernels in a session: the same pictures, errors that are told, and OpenVINO's own without them."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from sdrt.engines.bundle import Bundle
from sdrt.errors import BackendError
from sdrt.runtime import backends, kernels, own_operations, program
from sdrt.runtime.compile_cache import CompileCache

from .kernel_checks import NOT_WRITTEN, kinds, needs_kernels, predict, read, steps, tokens, unet_shapes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    Array = NDArray[Any]


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """Let no test take what another has loaded."""
    yield
    kernels.kernels.cache_clear()


def loaded() -> kernels.Kernels:
    found = kernels.kernels()
    assert found is not None
    return found


def use_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "LIBRARY", kernels.LIBRARY.with_name("nowhere"))
    kernels.kernels.cache_clear()


@needs_kernels
@pytest.mark.parametrize("in_pairs", [False, True])
@pytest.mark.parametrize("name", ["tiny_bundle", "tiny_fp16_bundle"])
def test_a_session_computes_the_same_with_them_and_without(
    name: str,
    in_pairs: bool,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("SDRT_HOME", str(tmp_path))
    bundle = Bundle.open(request.getfixturevalue(name))
    calls: list[str] = []
    real = program.Program.run

    def counted(own: program.Program, inputs: Sequence[int], outputs: Sequence[int]) -> bool:
        calls.extend(steps([own]))
        return real(own, inputs, outputs)

    exact = predict(bundle, "fp32")
    monkeypatch.setattr(program.Program, "run", counted)
    own = predict(bundle, "bf16", in_pairs=in_pairs)
    nodes = kinds(read(bundle))
    assert calls.count("attention") == nodes.count("Softmax")
    assert calls.count("group_norm") > 10
    assert calls.count("layer_norm") == 48
    assert calls.count("product") > 200
    before = len(calls)
    use_none(monkeypatch)
    theirs = predict(bundle, "bf16", in_pairs=in_pairs)
    assert len(calls) == before
    scale = np.linalg.norm(exact)
    assert 0 < np.linalg.norm(own - exact) / scale < 1.2 * np.linalg.norm(theirs - exact) / scale < 0.1


@needs_kernels
def test_what_fails_in_one_is_an_error(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = loaded()._replace(run=lambda *_: -1)
    monkeypatch.setattr(program, "kernels", lambda: broken)
    with pytest.raises(BackendError, match="unet failed in openvino"):
        predict(Bundle.open(tiny_bundle), "bf16")


@needs_kernels
@pytest.mark.parametrize("kernel", [-1, len(program._KERNELS)])
def test_a_program_ends_at_what_fails(kernel: int) -> None:
    sequence = np.zeros(2, program.STEP)
    sequence["kernel"] = kernel, program._KERNELS.index("copy")
    arena = np.arange(64, dtype=np.uint8)
    sequence["operands"][:, :2] = 0, 2 * 32
    sequence["numbers"][:, :3] = 1, 32, 32
    addresses = sequence.ctypes.data, len(sequence), arena.ctypes.data, arena.ctypes.data
    assert loaded().run(*addresses, 1) == -1
    assert (arena == np.arange(64)).all()
    assert loaded().run(sequence[1:].ctypes.data, 1, *addresses[2:], 1) == 0
    assert (arena[32:] == arena[:32]).all()


def attend(q: Array, k: Array, v: Array, threads: int = 4) -> Array:
    result = np.full(q.shape, NOT_WRITTEN, np.uint16)
    pointers = [array.ctypes.data for array in (q, k, v, result)]
    assert loaded().attention(*pointers, 1, q.shape[1], k.shape[1], 5, 40, 0.2, threads) == 0
    return result


@needs_kernels
def test_threads_that_call_at_once_get_what_each_gets_alone() -> None:
    given = [tokens(index, 3, 1, 200 + 50 * index, 200) for index in range(4)]
    alone = [attend(q, k, v) for q, k, v in given]
    wrong: list[int] = []

    def work(index: int) -> None:
        q, k, v = given[index]
        wrong.extend(index for _ in range(30) if not np.array_equal(attend(q, k, v), alone[index]))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(given))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


FORKING = """
import os
import threading

import numpy as np
from tests.runtime.kernel_checks import tokens
from tests.runtime.test_kernels import attend

arrays = [tokens(seed, 1, 500, 200) for seed in range(3)]
before = attend(*arrays)
over = threading.Event()

def keep_computing():
    while not over.is_set():
        attend(*arrays)

busy = threading.Thread(target=keep_computing)
busy.start()
children = []
for _ in range(10):
    child = os.fork()
    if not child:
        # One thread more than there were, and again: the first call starts them all.
        right = all(np.array_equal(attend(*arrays, threads=count), before) for count in (4, 5, 4, 1))
        os._exit(0 if right else 3)
    children.append(child)
    assert np.array_equal(attend(*arrays), before)
over.set()
busy.join()
assert [os.waitpid(child, 0)[1] for child in children] == [0] * len(children)
"""


@needs_kernels
def test_they_compute_in_a_fork_and_go_on_in_what_it_came_from() -> None:
    """Though threads are not taken along, and another of Python's was computing at that moment."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORKING]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, cwd=root)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("content", [None, b"not a library"])
def test_without_the_library_openvinos_own_remain(
    content: bytes | None, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    library = tmp_path / "library.so.1"
    if content is not None:
        library.write_bytes(content)
    monkeypatch.setattr(kernels, "LIBRARY", library)
    kernels.kernels.cache_clear()
    model = read(Bundle.open(tiny_bundle))
    before = kinds(model)
    assert own_operations.put_in(model) == []
    assert kinds(model) == before


class _AlarmError(Exception):
    pass


def run_on(binding: Any) -> None:
    while True:
        binding.run()


@needs_kernels
def test_what_a_signal_raises_comes_out_as_it_is(tiny_bundle: Path) -> None:
    def ring(_signal: int, _frame: object) -> None:
        raise _AlarmError

    before = signal.signal(signal.SIGALRM, ring)
    shapes = unet_shapes(bundle := Bundle.open(tiny_bundle))
    try:
        with backends._openvino_session(bundle, "unet", "bf16", CompileCache(bundle, "openvino")) as session:
            binding = session.bind(shapes)
            for _ in range(20):
                signal.setitimer(signal.ITIMER_REAL, 0.02)
                with pytest.raises(_AlarmError):
                    run_on(binding)
            binding.run()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
