"""The compiled kernels in a session: the same pictures, errors that are told, and OpenVINO's own without them."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from sdrt.engines.bundle import Bundle
from sdrt.errors import BackendError
from sdrt.runtime import attention, backends, group_norm, kernels
from sdrt.runtime.compile_cache import CompileCache

from .kernel_checks import kinds, needs_kernels, predict, read, unet_shapes

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let no operation remember the kernels of another test, and small models have all of them."""
    monkeypatch.setattr(group_norm, "_LEAST_NUMBERS", 1)
    yield
    kernels.kernels.cache_clear()
    for module in (attention, group_norm):
        module._operation.cache_clear()


def use(monkeypatch: pytest.MonkeyPatch, found: kernels.Kernels | None) -> None:
    for module in (attention, group_norm):
        module._operation.cache_clear()
        monkeypatch.setattr(module, "kernels", lambda: found)
    if found is None:
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
    real = kernels.kernels()
    assert real is not None

    def counted(kind: str) -> Any:
        def compute(*given: Any) -> int:
            calls.append(kind)
            return int(getattr(real, kind)(*given))

        return compute

    exact = predict(bundle, "fp32")
    use(monkeypatch, kernels.Kernels(counted("attention"), counted("group_norm"), real.threads))
    own = predict(bundle, "bf16", in_pairs=in_pairs)
    assert calls.count("attention") == kinds(read(bundle)).count("Softmax")
    assert calls.count("group_norm") > 10
    use(monkeypatch, None)
    theirs = predict(bundle, "bf16", in_pairs=in_pairs)
    scale = np.linalg.norm(exact)
    assert 0 < np.linalg.norm(own - exact) / scale < 1.2 * np.linalg.norm(theirs - exact) / scale < 0.1


@needs_kernels
@pytest.mark.parametrize("failing", ["attention", "group_norm"])
def test_what_fails_in_one_is_an_error(failing: str, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = kernels.kernels()
    assert real is not None
    broken: dict[str, Any] = {failing: lambda *_: -1}
    use(monkeypatch, real._replace(**broken))
    with pytest.raises(BackendError, match="unet failed in openvino"):
        predict(Bundle.open(tiny_bundle), "bf16")


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
    assert attention.put_in(model) + group_norm.put_in(model) == 0
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
