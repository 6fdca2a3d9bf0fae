"""A bundle's components at work on the host: buffers in host memory, the loop in numpy."""

from __future__ import annotations

import functools
import threading
from collections import defaultdict, deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from .loop import denoise
from .predictor import Predictor, component_names, evaluation_shapes
from .tiling import decode_in_tiles, wants_tiles
from .work import Work

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence

    from numpy.typing import NDArray

    from ..engines.manifest import Manifest
    from .loop import Step
    from .request import Request
    from .session import Binding, Passage, Session

T = TypeVar("T")

# A quarter of a megabyte each at Stable Diffusion's width: the prompts of a sitting, and their negative ones.
_EMBEDDINGS = 64


class HostEngines:
    """`.session.Engines` over sessions of the host's; each call has buffers of its own.

    Parameters
    ----------
    manifest
        Of the bundle.
    open_session
        Loads a component by its name; called when it is first needed.

    """

    tiles = True

    def __init__(self, manifest: Manifest, open_session: Callable[[str], Session]) -> None:
        self._manifest = manifest
        self._text = manifest.text
        self._open_session = open_session
        self._lock = threading.Lock()
        self._turns: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        self._sessions: dict[str, Session] = {}
        self._stack = ExitStack()
        self._wrap: Callable[[str, Session], Session] | None = None
        # By token ids and layers left out; whoever is second with the same text may compute it too, and gets the same.
        self._embedding = functools.lru_cache(_EMBEDDINGS)(self._embed)

    def wrap_sessions(self, wrap: Callable[[str, Session], Session]) -> None:
        """Put something between the pipeline and each session that is loaded from now on, given its name and itself.

        For callers that run many requests at once and decide which call of which component comes when.
        """
        self._wrap = wrap

    def encode(self, passages: Sequence[Passage]) -> NDArray[np.float32]:
        """Return the text embeddings, float32 of shape (rows of all passages, 77, width)."""
        texts = [[self._embedding(ids.tobytes(), passage.clip_skip) for ids in passage.ids] for passage in passages]
        return np.stack([known[row] for known, passage in zip(texts, passages, strict=True) for row in passage.rows])

    def _embed(self, ids: bytes, clip_skip: int) -> NDArray[np.float32]:
        """Encode one text by itself, so that what comes of it depends on no other."""
        shape = (1, self._text.max_tokens)
        width = self._text.embedding_width
        binding = self._session("text_encoder").bind(
            {"input_ids": shape, "clip_skip": (1,), "text_embeddings": (*shape, width)}
        )
        binding.inputs["input_ids"][...] = np.frombuffer(ids, np.int64)
        binding.inputs["clip_skip"][0] = clip_skip
        binding.run()
        embedding: NDArray[np.float32] = binding.outputs["text_embeddings"][0]
        return embedding

    def denoise(
        self, request: Request, passages: Sequence[Passage], draw_noise: Callable[[], NDArray[np.float32]]
    ) -> Generator[Step, NDArray[np.float32] | None]:
        """Run the denoising loop; see `.loop.denoise`."""
        initial = draw_noise() if request.latents is None else request.latents
        with _meanwhile(lambda: self._bindings(request)) as bindings:
            embeddings = self.encode(passages)
        bound = bindings.result()
        try:
            return (yield from denoise(request.table, initial, Predictor(request, embeddings, bound), draw_noise))
        finally:
            for each in bound.values():
                for binding in each:
                    binding.trim()  # for the decoder, whose activations are as large

    def _bindings(self, request: Request) -> dict[Work, tuple[Binding, ...]]:
        """Load what a request needs of the U-Net, and bind it to each kind of its work."""
        components = {component.name: component for component in self._manifest.components}

        @functools.cache
        def bind(name: str, work: Work) -> Binding:
            shapes = evaluation_shapes(request, work, components[name])
            return self._session(name).bind(shapes, in_pairs=work.guided)

        # The decoder has the same buffers whether or not the encoder has run just before.
        return {
            work: tuple(bind(name, Work(work.guided, work.whole)) for name in component_names(request, work))
            for work in dict.fromkeys(request.work)
        }

    def latents(
        self, request: Request, passages: Sequence[Passage], draw_noise: Callable[[], NDArray[np.float32]]
    ) -> NDArray[np.float32]:
        """Run the whole loop and return the last latents."""
        (last,) = deque(self.denoise(request, passages, draw_noise), maxlen=1)
        return last.latents

    def decode(self, latents: NDArray[np.float32], *, vae_tiling: bool | None = None) -> NDArray[np.float32]:
        """Return the images, float32 of shape (N, 3, height, width), around [-1, 1]."""
        count, channels, height, width = latents.shape
        if wants_tiles(vae_tiling, self._manifest, 8 * height, 8 * width):
            return np.stack([decode_in_tiles(self._manifest, self._session, each) for each in latents])
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
            turn = self._turns[name]
        with turn:  # one that another thread is loading is waited for, and what else there is can be loaded beside it
            if name not in self._sessions:
                session = self._open_session(name)
                with self._lock:
                    self._stack.enter_context(session)
                self._sessions[name] = session if self._wrap is None else self._wrap(name, session)
            return self._sessions[name]

    def close(self) -> None:
        """Free everything. Nothing may be running."""
        with self._lock:
            self._sessions.clear()
            self._embedding.cache_clear()
            self._stack.close()


@contextmanager
def _meanwhile(work: Callable[[], T]) -> Iterator[Future[T]]:
    """Do some work in a thread while the block runs, and wait for it, however the block ends."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(work)
