"""A bundle's graphs in a backend's own API with its own defaults, as one would write it without sdrt.

Of sdrt they have the tokenizer and the table of the sampler, which any program needs, and nothing of its sessions.
"""

from __future__ import annotations

import abc
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from ..engines.bundle import TOKENIZER, Bundle
from ..runtime.loop import denoise
from ..runtime.noise import batch_noise
from ..runtime.request import make_request
from ..runtime.tokenizer import Tokenizer
from .contender import Turn
from .settings import SEED

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from .settings import Settings


class Raw(abc.ABC):
    """A contender: three calls of a library, and what one would put around them in numpy."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._bundle = Bundle.open(settings.bundle)
        self._tokenizer = Tokenizer(self._bundle.folder / TOKENIZER)
        self._rows = settings.batch * (2 if settings.guided else 1)
        noise = np.random.default_rng(SEED)
        text = self._bundle.manifest.text
        self._latents = noise.standard_normal(settings.latent_shape, np.float32)
        self._embeddings = noise.standard_normal((self._rows, text.max_tokens, text.embedding_width), np.float32)
        self._images: NDArray[np.float32] = np.empty(0, np.float32)

    @property
    @abc.abstractmethod
    def about(self) -> dict[str, Any]:
        """Tell the precision and the version."""

    @abc.abstractmethod
    def _run(self, component: str, output: str, feeds: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """Run a component on arrays and return an output as an array."""

    def text(self, turn: int) -> Turn:
        """Encode one prompt."""
        began = time.perf_counter()
        self._embed(self._settings.prompt(turn), self._bundle.manifest.text.clip_skip)
        return Turn(time.perf_counter() - began)

    def step(self, turn: int) -> Turn:
        """Run the U-Net once, for all rows of a guided step."""
        began = time.perf_counter()
        self._predict(self._latents, 1.0 + turn, self._embeddings)
        return Turn(time.perf_counter() - began)

    def decode(self, _turn: int) -> Turn:
        """Decode latents."""
        began = time.perf_counter()
        self._decode(self._latents)
        return Turn(time.perf_counter() - began)

    def picture(self, turn: int) -> Turn:
        """Make images: text, the loop, decoding."""
        settings = self._settings
        began = time.perf_counter()
        prompt = settings.prompt(turn)
        request = make_request(
            self._bundle.manifest,
            prompt,
            num_inference_steps=settings.steps,
            guidance_scale=settings.cfg_scale,
            height=settings.height,
            width=settings.width,
            num_images_per_prompt=settings.batch,
            sampler=settings.sampler,
            seed=SEED,
        )
        texts = [self._embed("", 0)] if settings.guided else []
        texts.append(self._embed(prompt, request.clip_skip))
        embeddings = np.repeat(np.concatenate(texts), settings.batch, axis=0)

        def predict(x: NDArray[np.float32], timestep: float) -> NDArray[np.float32]:
            prediction = self._predict(x, timestep, embeddings)
            if not settings.guided:
                return prediction
            unconditional, conditional = np.split(prediction, 2)
            guided: NDArray[np.float32] = unconditional + settings.cfg_scale * (conditional - unconditional)
            return guided

        noise = batch_noise(request.seeds, request.latent_shape)
        for step in denoise(request.table, noise(), predict, noise):
            latents = step.latents
        self._images = self._decode(latents)
        return Turn(time.perf_counter() - began)

    def pixels(self) -> NDArray[np.float32]:
        """Give the last images."""
        return np.clip(self._images.transpose(0, 2, 3, 1) / 2 + 0.5, 0, 1)

    def _embed(self, prompt: str, clip_skip: int) -> NDArray[np.float32]:
        feeds = {"input_ids": self._tokenizer.encode([prompt]), "clip_skip": np.array([clip_skip], np.int64)}
        return self._run("text_encoder", "text_embeddings", feeds)

    def _predict(
        self, latents: NDArray[np.float32], timestep: float, embeddings: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        both = np.concatenate([latents] * (self._rows // len(latents)))
        feeds = {"latents": both, "timestep": np.array([timestep], np.float32), "text_embeddings": embeddings}
        return self._run("unet", "prediction", feeds)

    def _decode(self, latents: NDArray[np.float32]) -> NDArray[np.float32]:
        """Decode one image after the other, for which every machine has the memory."""
        return np.concatenate([self._run("vae_decoder", "image", {"latents": one[None]}) for one in latents])


class RawOpenVino(Raw):
    """OpenVINO with the defaults of its CPU plugin, the graphs reshaped to the shapes at hand.

    Parameters
    ----------
    settings
        What is measured.
    precision
        OpenVINO's name of one that it shall compute in; None for its default, which is bf16 where the CPU has it.

    """

    def __init__(self, settings: Settings, precision: str | None = None) -> None:
        super().__init__(settings)
        import openvino  # noqa: PLC0415 - the library that is measured

        self._core = openvino.Core()
        self._options = {} if precision is None else {"INFERENCE_PRECISION_HINT": precision}
        self._requests: dict[str, Any] = {}

    @property
    def about(self) -> dict[str, Any]:
        """Tell the precision in which graphs were compiled, and the threads."""
        facts: dict[str, Any] = {}
        for request in self._requests.values():
            compiled = request.get_compiled_model()
            facts["precision"] = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
            facts["threads"] = compiled.get_property("INFERENCE_NUM_THREADS")
        return facts

    def _run(self, component: str, output: str, feeds: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        if component not in self._requests:
            model = self._core.read_model(self._bundle.path(self._bundle.component(component).graph))
            model.reshape({name: list(array.shape) for name, array in feeds.items()})
            self._requests[component] = self._core.compile_model(model, "CPU", self._options).create_infer_request()
        found: NDArray[np.float32] = self._requests[component].infer(dict(feeds))[output]
        return found


class RawOnnxRuntime(Raw):
    """onnxruntime's CPU provider with its default options, on the graphs as they were exported."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._sessions: dict[str, Any] = {}

    @property
    def about(self) -> dict[str, Any]:
        """Tell the precision, which is that of the graphs."""
        return {"precision": self._bundle.manifest.precision}

    def _run(self, component: str, output: str, feeds: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        import onnxruntime  # noqa: PLC0415 - the library that is measured

        if component not in self._sessions:
            graph = self._bundle.path(self._bundle.component(component).graph)
            self._sessions[component] = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
        (found,) = self._sessions[component].run([output], dict(feeds))
        array: NDArray[np.float32] = found
        return array
