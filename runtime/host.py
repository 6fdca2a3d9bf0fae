"""A bundle's components at work on the host: buffers in host memory, the loop in numpy."""

from __future__ import annotations

import threading
from collections import deque
from contextlib import ExitStack
from typing import TYPE_CHECKING

import numpy as np

from .loop import denoise

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from numpy.typing import NDArray

    from ..engines.manifest import Manifest
    from .loop import Step
    from .request import Request
    from .session import Passage, Session


class HostEngines:
    """`.session.Engines` over sessions of the host's; each call has buffers of its own.

    Parameters
    ----------
    manifest
        Of the bundle.
    open_session
        Loads a component by its name; called when it is first needed.

    """

    def __init__(self, manifest: Manifest, open_session: Callable[[str], Session]) -> None:
        self._text = manifest.text
        self._open_session = open_session
        self._lock = threading.Lock()
        self._sessions: dict[str, Session] = {}
        self._stack = ExitStack()
        self._wrap: Callable[[str, Session], Session] | None = None

    def wrap_sessions(self, wrap: Callable[[str, Session], Session]) -> None:
        """Put something between the pipeline and each session that is loaded from now on, given its name and itself.

        For callers that run many requests at once and decide which call of which component comes when.
        """
        self._wrap = wrap

    def encode(self, passages: Sequence[Passage]) -> NDArray[np.float32]:
        """Return the text embeddings, float32 of shape (rows of all passages, 77, width)."""
        return np.concatenate([self._encode(passage) for passage in passages])

    def _encode(self, passage: Passage) -> NDArray[np.float32]:
        shape = passage.ids.shape
        binding = self._session("text_encoder").bind(
            {"input_ids": shape, "clip_skip": (1,), "text_embeddings": (*shape, self._text.embedding_width)}
        )
        binding.inputs["input_ids"][...] = passage.ids
        binding.inputs["clip_skip"][0] = passage.clip_skip
        binding.run()
        return binding.outputs["text_embeddings"][list(passage.rows)]

    def denoise(
        self, request: Request, passages: Sequence[Passage], draw_noise: Callable[[], NDArray[np.float32]]
    ) -> Generator[Step, NDArray[np.float32] | None]:
        """Run the denoising loop; see `.loop.denoise`."""
        initial = draw_noise() if request.latents is None else request.latents
        predict = self._predictor(request, self.encode(passages), initial.shape)
        return (yield from denoise(request.table, initial, predict, draw_noise))

    def latents(
        self, request: Request, passages: Sequence[Passage], draw_noise: Callable[[], NDArray[np.float32]]
    ) -> NDArray[np.float32]:
        """Run the whole loop and return the last latents."""
        (last,) = deque(self.denoise(request, passages, draw_noise), maxlen=1)
        return last.latents

    def _predictor(
        self, request: Request, embeddings: NDArray[np.float32], shape: tuple[int, ...]
    ) -> Callable[[NDArray[np.float32], float], NDArray[np.float32]]:
        """Bind the U-Net, put in the text embeddings, and return the guided prediction as a function of x and t."""
        images, rows = shape[0], len(embeddings)
        batch = (rows, *shape[1:])
        binding = self._session("unet").bind(
            {"latents": batch, "timestep": (1,), "text_embeddings": embeddings.shape, "prediction": batch}
        )
        binding.inputs["text_embeddings"][...] = embeddings
        latents, timestep, output = binding.inputs["latents"], binding.inputs["timestep"], binding.outputs["prediction"]

        def plain(x: NDArray[np.float32], t: float) -> NDArray[np.float32]:
            latents[...] = x
            timestep[0] = t
            binding.run()
            return output

        unconditional, conditional = output[:images], output[-images:]
        guided_output = np.empty(shape, np.float32)
        scale = np.float32(request.guidance_scale)

        def guided(x: NDArray[np.float32], t: float) -> NDArray[np.float32]:
            latents[:images] = x
            latents[images:] = x
            timestep[0] = t
            binding.run()
            np.subtract(conditional, unconditional, out=guided_output)
            np.multiply(guided_output, scale, out=guided_output)
            np.add(guided_output, unconditional, out=guided_output)
            return guided_output

        return guided if request.guided else plain

    def decode(self, latents: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the images, float32 of shape (N, 3, height, width), around [-1, 1]."""
        count, channels, height, width = latents.shape
        # One image after the other: the decoder's activations are the largest thing in memory.
        binding = self._session("vae_decoder").bind(
            {"latents": (1, channels, height, width), "image": (1, 3, 8 * height, 8 * width)}
        )
        images = np.empty((count, 3, 8 * height, 8 * width), np.float32)
        for image, image_latents in zip(images, latents, strict=True):
            binding.inputs["latents"][0] = image_latents
            binding.run()
            image[...] = binding.outputs["image"][0]
        return images

    def _session(self, name: str) -> Session:
        with self._lock:
            if name not in self._sessions:
                session = self._stack.enter_context(self._open_session(name))
                self._sessions[name] = session if self._wrap is None else self._wrap(name, session)
            return self._sessions[name]

    def close(self) -> None:
        """Free everything. Nothing may be running."""
        with self._lock:
            self._sessions.clear()
            self._stack.close()
