"""Components are loaded beside one another, and what goes wrong with one shows where it is needed."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import sdrt
from sdrt.engines import demo
from sdrt.engines.bundle import Bundle
from sdrt.engines.verified import verify_once
from sdrt.errors import BackendError, InputError
from sdrt.runtime import backends

if TYPE_CHECKING:
    from collections.abc import Callable

    from sdrt.engines.bundle import Progress
    from sdrt.runtime.session import Session

PROMPT = "a large red star on a blue background"
QUICK: dict[str, Any] = {"num_inference_steps": 1, "width": 64, "height": 64, "seed": 1, "output_type": "np"}
PATIENCE_S = 60


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.open(demo.bundle_folder(tmp_path_factory.mktemp("home")))


@pytest.fixture
def before(monkeypatch: pytest.MonkeyPatch) -> dict[str, Callable[[], object]]:
    """What shall happen before a component is loaded, by its name."""
    steps: dict[str, Callable[[], object]] = {}
    load = backends._onnx_session

    def load_after(opened: Bundle, name: str) -> Session:
        steps.get(name, lambda: None)()
        return load(opened, name)

    monkeypatch.setattr(backends, "_onnx_session", load_after)
    return steps


def fail(message: str) -> None:
    raise BackendError(message)


def test_the_unet_is_loaded_while_the_text_is_encoded(bundle: Bundle, before: dict[str, Callable[[], object]]) -> None:
    begun, seen = threading.Event(), []
    before |= {"unet": begun.set, "text_encoder": lambda: seen.append(begun.wait(PATIENCE_S))}
    with sdrt.Pipeline(bundle, backend="onnxruntime") as pipe:
        (image,) = pipe(PROMPT, **QUICK)
    assert seen == [True]
    assert image.std() > 0.01


def test_what_goes_wrong_meanwhile_is_raised_and_can_be_tried_again(
    bundle: Bundle, before: dict[str, Callable[[], object]]
) -> None:
    threads = threading.active_count()
    with sdrt.Pipeline(bundle, backend="onnxruntime") as pipe:
        before |= {"unet": lambda: fail("no U-Net"), "text_encoder": lambda: fail("no text encoder")}
        with pytest.raises(BackendError, match="no text encoder"):
            pipe(PROMPT, **QUICK)
        del before["text_encoder"]
        with pytest.raises(BackendError, match="no U-Net"):
            pipe(PROMPT, **QUICK)
        assert threading.active_count() == threads
        before.clear()
        (image,) = pipe(PROMPT, **QUICK)
        assert image.std() > 0.01


def test_closing_after_a_failure_waits_for_what_is_being_loaded(
    bundle: Bundle, before: dict[str, Callable[[], object]]
) -> None:
    failed, loaded = threading.Event(), threading.Event()

    def text() -> None:
        failed.set()
        fail("no text encoder")

    def unet() -> None:
        failed.wait(PATIENCE_S)
        loaded.set()

    before |= {"text_encoder": text, "unet": unet}
    threads = threading.active_count()
    with sdrt.Pipeline(bundle, backend="onnxruntime") as pipe, pytest.raises(BackendError, match="no text encoder"):
        pipe(PROMPT, **QUICK)
    assert loaded.is_set()
    assert threading.active_count() == threads
    with pytest.raises(InputError, match="closed"):
        pipe(PROMPT, **QUICK)


def test_several_threads_load_each_component_once(bundle: Bundle, before: dict[str, Callable[[], object]]) -> None:
    loaded: list[str] = []
    before |= {
        name: lambda name=name: loaded.append(name)  # type: ignore[misc]
        for name in ("text_encoder", "unet", "vae_decoder")
    }
    images: list[np.ndarray] = []
    with sdrt.Pipeline(bundle, backend="onnxruntime") as pipe:
        threads = [threading.Thread(target=lambda: images.extend(pipe(PROMPT, **QUICK))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(loaded) == ["text_encoder", "unet", "vae_decoder"]
    assert len(images) == 4
    assert all(np.array_equal(image, images[0]) for image in images)


def test_what_is_verified_at_the_same_time_is_remembered(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    verify = Bundle.verify_component
    verified: list[str] = []

    def verify_another_first(self: Bundle, name: str, progress: Progress | None = None) -> None:
        if name == "unet":
            verify_once(self, "text_encoder")
        verified.append(name)
        verify(self, name, progress)

    monkeypatch.setattr(Bundle, "verify_component", verify_another_first)
    verify_once(bundle, "unet")
    verify_once(bundle, "text_encoder")
    verify_once(bundle, "unet")
    assert verified == ["text_encoder", "unet"]
